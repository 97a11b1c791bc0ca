"""SpeechTokenizer through its package: parity with it, its axis order, and padding that changes its codes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mmtok.bench.laws import check
from mmtok.catalogue import Family
from mmtok.tokens import Tokens, TokensError

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"),
]

pytest.importorskip("einops")
if importlib.util.find_spec("speechtokenizer") is None:  # importing it whole needs far more than the network does
    pytest.skip("speechtokenizer is not installed", allow_module_level=True)

RATE, HOP, LEVELS = 16000, 40, 4
CONFIG = {
    "activation": "ELU",
    "bidirectional": True,
    "codebook_size": 16,
    "dilation_base": 2,
    "dimension": 16,
    "lstm_layers": 2,
    "n_filters": 4,
    "n_q": LEVELS,
    "n_residual_layers": 1,
    "residual_kernel_size": 3,
    "sample_rate": RATE,
    "semantic_dimension": 8,
    "strides": [5, 4, 2],
    "batch_size": 6,  # of the training: read by nothing here
}


def noise(samples: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, samples, generator=torch.Generator().manual_seed(seed)).mul(0.3).clamp(-1, 1)


@torch.no_grad()
def fill_codebooks(network, seed: int = 0) -> None:
    """Codes that a random network's latents really use: residuals that it makes of noise."""
    residual = network.encoder(noise(16 * 5 * HOP, seed + 1)[None])  # (1, D, T)
    generator = torch.Generator().manual_seed(seed)
    for layer in network.quantizer.vq.layers:
        chosen = torch.randperm(residual.shape[2], generator=generator)[:16]
        layer._codebook.embed.copy_(residual[0, :, chosen].T)
        layer._codebook.inited.fill_(1)
        residual = residual - layer.decode(layer.encode(residual))


def random_network(seed: int = 0):
    from mmtok.wrappers.speechtokenizer import model_module

    torch.manual_seed(seed)
    network = model_module().SpeechTokenizer(CONFIG).eval()
    with torch.no_grad():
        for name, p in network.named_parameters():
            if name.startswith("encoder") and ("lstm" in name or name.endswith("weight_g")):
                p.mul_(3.0)  # so that the recurrence carries far
    fill_codebooks(network, seed)
    return network


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speechtokenizer")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    torch.save(random_network().state_dict(), folder / "SpeechTokenizer.pt")
    return folder


@pytest.fixture
def tok(saved):
    from mmtok.wrappers.speechtokenizer import FAMILY

    return FAMILY.open(str(saved))


@pytest.fixture
def upstream(saved):
    from mmtok.wrappers.speechtokenizer import model_module

    return (
        model_module().SpeechTokenizer.load_from_checkpoint(saved / "config.json", saved / "SpeechTokenizer.pt").eval()
    )


def test_the_family_entry(tok):
    from mmtok.wrappers.speechtokenizer import FAMILY

    assert (
        isinstance(FAMILY, Family) and FAMILY.name == "speechtokenizer" and tok.type_name == "wrapper:speechtokenizer"
    )
    assert FAMILY.code_licence == "Apache-2.0" and "card" in FAMILY.weights_licence
    assert FAMILY.taxonomy.cells()["quantization"] == "RVQ" and FAMILY.taxonomy.cells()["auxiliary"] == "SD"
    assert tok.spec.codebook_sizes == (16,) * LEVELS and tok.spec.frame_rate == RATE / HOP
    assert tok.timing()["receptive_field"] == {"encoder_frames": "unbounded", "decoder_frames": "unbounded"}


def test_codes_and_sound_are_upstreams(tok, upstream):
    x = noise(50 * HOP)
    with torch.no_grad():
        wanted = upstream.encode(x[None])  # (Q, 1, T)
        sound = upstream.decode(wanted)
    tokens = tok.encode(x, RATE)
    assert torch.equal(tokens.codes, wanted.transpose(0, 1))
    assert all(len(level.unique()) >= 4 for level in tokens.codes[0])
    torch.testing.assert_close(tok.decode(tokens), sound)


def test_axis_order_with_as_many_clips_as_levels(tok, upstream):
    """(Q, B, T) with Q = B: taken for (B, Q, T), upstream's codes are silently another clip's levels."""
    x = torch.stack([noise(30 * HOP, seed) for seed in range(LEVELS)])
    with torch.no_grad():
        theirs = upstream.encode(x)
        sound = upstream.decode(theirs)
    ours = tok.encode(x, RATE)
    assert theirs.shape == ours.codes.shape == (LEVELS, LEVELS, 30)
    assert torch.equal(ours.codes, theirs.transpose(0, 1)) and not torch.equal(ours.codes, theirs)
    assert torch.equal(tok.raw().encode(x, RATE).codes, ours.codes)
    torch.testing.assert_close(tok.decode(ours), sound)


def test_fewer_levels_and_prefixes(tok, upstream):
    x = noise(40 * HOP + 7)
    tokens = tok.encode(x, RATE)
    padded = torch.nn.functional.pad(x, (0, HOP - 7))[None]
    for k in range(1, LEVELS + 1):
        few = tok.encode(x, RATE, num_codebooks=k)
        assert torch.equal(few.codes, tokens.codes[:, :k])
        with torch.no_grad():
            codes = upstream.encode(padded, n_q=k)
            sound = upstream.decode(codes)[..., : x.shape[1]]
        assert torch.equal(few.codes, codes.transpose(0, 1))
        torch.testing.assert_close(tok.decode(few), sound)
        torch.testing.assert_close(tok.decode(tokens.keep(num_codebooks=k)), sound)
    for T in (1, 2, 17):
        assert tok.decode(tokens.keep(num_tokens=T)).shape == (1, 1, T * HOP)


@pytest.mark.parametrize(("channels", "samples", "rate"), [(1, 1, RATE), (2, HOP + 1, RATE), (1, 999, 22050)])
def test_exact_size(tok, channels, samples, rate):
    x = noise(samples * channels).reshape(channels, samples)
    out = tok.decode(tok.encode(x, rate))
    assert out.shape == (1, channels, samples) and out.isfinite().all()


def test_laws_hold(tok):
    laws = (
        "padding",
        "batch size",
        "batch shape",
        "levels",
        "prefix",
        "determinism",
        "exact size",
        "odd sizes",
        "range",
    )
    report = check(tok, only=laws, seconds=0.12)
    assert report.ok, report.table()
    assert all(row.compared > 0 for row in report.rows)
    assert check(tok, only=("foreign ids", "extreme inputs", "round trip"), seconds=0.05).ok


def test_padding_changes_upstreams_codes(tok):
    """The BiLSTM reads the zeros behind a clip backwards, so another clip in the batch changes codes of this one."""
    raw = check(tok.raw(), only=("padding",), seconds=0.12)["padding"]
    assert raw.status == "broken" and raw.miss_rate > 0.02
    ours = check(tok, only=("padding",), seconds=0.12)["padding"]
    assert ours.status == "ok" and ours.miss_rate == 0


def test_upstreams_sound_is_longer_than_what_went_in(tok):
    x = noise(10 * HOP + 1)
    assert tok.raw().decode(tok.raw().encode(x, RATE)).shape == (1, 1, 11 * HOP)
    assert tok.decode(tok.encode(x, RATE)).shape == (1, 1, 10 * HOP + 1)
    assert check(tok.raw(), only=("exact size",), seconds=0.05)["exact size"].miss_rate > 0


def test_the_same_after_train_and_from_a_file(tok, tmp_path):
    x = noise(20 * HOP)
    before, fingerprint = tok.encode(x, RATE), tok.fingerprint
    tok.train()
    assert torch.equal(tok.encode(x, RATE).codes, before.codes)
    assert tok.fingerprint == fingerprint
    tok.eval()
    before.save(tmp_path / "tokens.safetensors")
    again = Tokens.load(tmp_path / "tokens.safetensors")
    assert torch.equal(tok.decode(again), tok.decode(before))
    with pytest.raises(ValueError, match="only reads"):
        tok.save(tmp_path)


def test_codes_of_another_are_refused(tok):
    from mmtok.wrappers.speechtokenizer import SpeechTokenizer

    other = SpeechTokenizer(random_network(1), CONFIG, "other")
    with pytest.raises(TokensError):
        other.decode(tok.encode(noise(400), RATE))
    other_activation = SpeechTokenizer(random_network(), CONFIG | {"activation": "GELU"}, "other")
    assert other_activation.fingerprint != tok.fingerprint  # the same weights mean other codes


def test_a_subfolder_safetensors_and_the_card(saved, tok, tmp_path):
    from safetensors.torch import save_file

    from mmtok.wrappers.speechtokenizer import FAMILY

    inside = tmp_path / "speechtokenizer_hubert_avg"
    inside.mkdir()
    shutil.copy(saved / "config.json", inside)
    state = torch.load(saved / "SpeechTokenizer.pt", weights_only=True)
    save_file({k: v.contiguous() for k, v in state.items()}, inside / "model.safetensors")
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    again = FAMILY.open(str(tmp_path))
    assert again.fingerprint == tok.fingerprint
    assert again.licences == {"code": "Apache-2.0", "weights": "apache-2.0 (model card)"}
    assert "as published" in tok.licences["weights"]


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_bad_folders(saved, tmp_path):
    from mmtok.wrappers.speechtokenizer import FAMILY, SpeechTokenizer

    trace = tmp_path / "trace"

    def broken(**files: object):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(saved, folder)
        for name, content in files.items():
            path = folder / {"config": "config.json", "weights": "SpeechTokenizer.pt"}[name]
            if content is None:
                path.unlink()
            elif isinstance(content, bytes):
                path.write_bytes(content)
            else:
                torch.save(content, path)
        return str(folder)

    state = torch.load(saved / "SpeechTokenizer.pt", weights_only=True)
    untrained = {k: torch.zeros(1) if k.endswith("inited") else v for k, v in state.items()}
    few = {k: v for k, v in state.items() if "decoder" not in k}
    cases = [
        (str(tmp_path / "absent"), "no folder"),
        (broken(config=None), "has no config.json"),
        (broken(config=b"{"), "no JSON object"),
        (broken(config=b"[1]"), "missing"),
        (broken(config=b'{"model_type": "encodec"}'), "no config of a SpeechTokenizer"),
        (broken(config=json.dumps(CONFIG | {"dimension": 24}).encode()), "make no SpeechTokenizer"),
        (broken(config=json.dumps(CONFIG | {"strides": "x"}).encode()), "make no SpeechTokenizer"),
        (broken(weights=None), "expected SpeechTokenizer.pt, or one"),
        (broken(weights=b"no zip"), "cannot read"),
        (broken(weights=few), "make no SpeechTokenizer"),
        (broken(weights=[1, 2]), "expected a mapping"),
        (broken(weights={"a": Bomb(trace)}), "tensors and plain values"),
        (broken(weights=untrained), "never trained"),
    ]
    for source, message in cases:
        with pytest.raises(ValueError, match=message):
            FAMILY.open(source)
    assert not trace.exists()
    torch.load(next(s for s, m in cases if "plain values" in m) + "/SpeechTokenizer.pt", weights_only=False)
    assert trace.exists()  # the file does run code where it is let
    with pytest.raises(ValueError, match="'strides'"):
        SpeechTokenizer(random_network(), {k: v for k, v in CONFIG.items() if k != "strides"}, "x")
    two = tmp_path / "two"
    for name in ("a", "b"):
        shutil.copytree(saved, two / name)
    with pytest.raises(ValueError, match="several"):
        FAMILY.open(str(two))


def forget(monkeypatch):
    """Until the end of the test, as if nothing of the package had been imported."""
    for name in [n for n in sys.modules if n.partition(".")[0] == "speechtokenizer"]:
        monkeypatch.delitem(sys.modules, name)


def test_only_the_network_is_imported(monkeypatch):
    from mmtok.wrappers.speechtokenizer import model_module

    forget(monkeypatch)
    module = model_module()
    assert module.__name__ == "speechtokenizer.model" and "speechtokenizer" not in sys.modules
    assert not [n for n in sys.modules if n.startswith("speechtokenizer.trainer")]
    assert model_module() is module
    forget(monkeypatch)
    whole = ModuleType("speechtokenizer")  # the package is there already: then it is taken as it is
    spec = importlib.util.find_spec("speechtokenizer")
    whole.__path__ = list(spec.submodule_search_locations)
    monkeypatch.setitem(sys.modules, "speechtokenizer", whole)
    assert model_module().__name__ == "speechtokenizer.model" and sys.modules["speechtokenizer"] is whole


def test_a_missing_package_is_named(saved, monkeypatch):
    from mmtok.wrappers.speechtokenizer import FAMILY

    forget(monkeypatch)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "speechtokenizer", None)
        with pytest.raises(ImportError, match=r"needs the package speechtokenizer .*pip install 'mmtok\[codecs\]'"):
            FAMILY.open(str(saved))
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "einops", None)
        with pytest.raises(ImportError, match=r"einops.*pip install 'mmtok\[codecs\]'"):
            FAMILY.open(str(saved))
    assert "speechtokenizer" not in sys.modules
