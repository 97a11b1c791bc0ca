"""WavTokenizer: against the authors' class where it can be imported, and always against a small stand-in.

The stand-in has the modules, names, signatures and shapes that the wrapper uses; as upstream, an encoder that is
recurrent and looks ahead, and a decoder that normalises over time. What it shows is that the wrapper calls such code
rightly; that upstream is such code shows the same test with upstream itself (put a clone of the repository on
PYTHONPATH).
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mmtok.bench.laws import check
from mmtok.catalogue import Family
from mmtok.tokens import Tokens, TokensError
from mmtok.wrappers.wavtokenizer import FAMILY, PLACES, WavTokenizer, build, upstream_class

yaml = pytest.importorskip("yaml")

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings(r"ignore:`torch.jit.script.*` is deprecated:DeprecationWarning"),
]

RATE, HOP, K = 24000, 40, 32

STAND_IN = {
    "__init__": "",
    "feature_extractors": """
from types import SimpleNamespace
import torch
from torch import nn

class Codebook(nn.Module):
    def __init__(self, size, width):
        super().__init__()
        self.register_buffer("inited", torch.zeros(1))
        self.register_buffer("embed", torch.zeros(size, width))

class Layer(nn.Module):
    def __init__(self, size, width):
        super().__init__()
        self._codebook = Codebook(size, width)

    @property
    def codebook(self):
        return self._codebook.embed

class Encoder(nn.Module):
    def __init__(self, ratios):
        super().__init__()
        self.hop_length = 1
        for r in ratios:
            self.hop_length *= r
        self.front = nn.Conv1d(1, 8, self.hop_length, self.hop_length)
        self.past = nn.LSTM(8, 16, batch_first=True)
        self.ahead = nn.Conv1d(16, 16, 5, padding=2, padding_mode="replicate")

    def forward(self, x):
        h = self.front(x).transpose(1, 2) * 4
        return self.ahead(self.past(h)[0].transpose(1, 2))

class Quantizer(nn.Module):
    def __init__(self, size, count):
        super().__init__()
        self.bins = size
        self.vq = nn.Module()
        self.vq.layers = nn.ModuleList(Layer(size, 16) for _ in range(count))

class Codec(nn.Module):
    def __init__(self, ratios, size, count):
        super().__init__()
        self.sample_rate = 24000
        self.encoder = Encoder(ratios)
        self.quantizer = Quantizer(size, count)

class EncodecFeatures(nn.Module):
    def __init__(self, encodec_model="encodec_24khz", bandwidths=(6.6,), train_codebooks=False, num_quantizers=1,
                 dowmsamples=(6, 5, 5, 4), vq_bins=16384, vq_kmeans=800):
        super().__init__()
        if encodec_model != "encodec_24khz":
            raise ValueError("unsupported " + encodec_model)
        self.encodec = Codec(dowmsamples, vq_bins, num_quantizers)
        self.bandwidths = bandwidths

    def infer(self, audio, bandwidth_id):
        self.bandwidths[bandwidth_id]
        assert audio.ndim == 2, "expected (B, L)"
        z = self.encodec.encoder(audio[:, None])
        book = self.encodec.quantizer.vq.layers[0].codebook
        codes = torch.cdist(z.transpose(1, 2), book).argmin(-1)
        return book[codes].transpose(1, 2), codes[None], torch.zeros(())
""",
    "models": """
import torch
from torch import nn

class Norm(nn.Module):
    def __init__(self, count, width):
        super().__init__()
        self.scale = nn.Embedding(count, width)

class VocosBackbone(nn.Module):
    def __init__(self, input_channels, dim, intermediate_dim, num_layers, adanorm_num_embeddings=None):
        super().__init__()
        print("making a backbone")
        self.embed = nn.Conv1d(input_channels, dim, 3, padding=1)
        self.over_time = nn.GroupNorm(1, dim)
        self.adanorm = adanorm_num_embeddings is not None
        self.norm = Norm(adanorm_num_embeddings, dim) if self.adanorm else nn.LayerNorm(dim)

    def forward(self, x, bandwidth_id=None):
        h = self.over_time(self.embed(x)).transpose(1, 2)
        if self.adanorm:
            assert bandwidth_id is not None
            return h * self.norm.scale(bandwidth_id)
        return self.norm(h)
""",
    "heads": """
from torch import nn

class ISTFT(nn.Module):
    def __init__(self, hop_length, padding):
        super().__init__()
        self.hop_length, self.padding = hop_length, padding

class ISTFTHead(nn.Module):
    def __init__(self, dim, n_fft, hop_length, padding="same"):
        super().__init__()
        self.out = nn.Linear(dim, hop_length)
        self.istft = ISTFT(hop_length, padding)

    def forward(self, x):
        return self.out(x).flatten(1).tanh()
""",
    "pretrained": """
import torch
from torch import nn

class WavTokenizer(nn.Module):
    def __init__(self, feature_extractor, backbone, head):
        super().__init__()
        self.feature_extractor, self.backbone, self.head = feature_extractor, backbone, head

    @torch.inference_mode()
    def encode_infer(self, audio_input, **kwargs):
        features, codes, _ = self.feature_extractor.infer(audio_input, **kwargs)
        return features, codes

    @torch.inference_mode()
    def decode(self, features_input, **kwargs):
        return self.head(self.backbone(features_input, **kwargs))

    @torch.inference_mode()
    def codes_to_features(self, codes):
        books = torch.cat([l.codebook for l in self.feature_extractor.encodec.quantizer.vq.layers])
        offsets = torch.arange(len(codes)) * self.feature_extractor.encodec.quantizer.bins
        return nn.functional.embedding(codes + offsets.view(-1, 1, 1), books).sum(0).transpose(1, 2)
""",
}


def settings(**changes) -> dict:
    """A config laid out as those in the repository; ``changes`` as part__argument=value."""
    arguments = {
        "feature_extractor": {
            "encodec_model": "encodec_24khz",
            "bandwidths": [6.6, 6.6, 6.6, 6.6],
            "train_codebooks": True,
            "num_quantizers": 1,
            "dowmsamples": [5, 4, 2],
            "vq_bins": K,
            "vq_kmeans": 4,
        },
        "backbone": {
            "input_channels": 512,
            "dim": 64,
            "intermediate_dim": 64,
            "num_layers": 1,
            "adanorm_num_embeddings": 4,
        },
        "head": {"dim": 64, "n_fft": 4 * HOP, "hop_length": HOP, "padding": "same"},
    }
    for key, value in changes.items():
        part, _, name = key.partition("__")
        arguments[part][name] = value
    classes = {"feature_extractor": "EncodecFeatures", "backbone": "VocosBackbone", "head": "ISTFTHead"}
    modules = {"feature_extractor": "feature_extractors", "backbone": "models", "head": "heads"}
    parts = {k: {"class_path": f"decoder.{modules[k]}.{classes[k]}", "init_args": arguments[k]} for k in arguments}
    return {"seed_everything": 1, "model": {"class_path": "decoder.experiment.WavTokenizer", "init_args": parts}}


@contextlib.contextmanager
def without_upstream() -> Iterator[None]:
    """Inside, nothing of upstream or a stand-in is imported; afterwards what was imported before is again."""
    tops = {p.partition(".")[0] for p in PLACES} | {"encoder"}

    def taken() -> dict:
        return {n: sys.modules.pop(n) for n in list(sys.modules) if n.partition(".")[0] in tops}

    before = taken()
    try:
        yield
    finally:
        taken()
        sys.modules.update(before)


def write_stand_in(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, text in STAND_IN.items():
        (folder / f"{name}.py").write_text(text)
    return folder


@pytest.fixture(params=["stand-in", "upstream"])
def code(request, tmp_path, monkeypatch):
    """Which code is found, and the config that makes a small network of it."""
    if request.param == "upstream":
        try:
            upstream_class()
        except ImportError as e:
            pytest.skip(str(e)[:60])
        yield settings()
        return
    write_stand_in(tmp_path / "code" / "decoder")
    monkeypatch.syspath_prepend(tmp_path / "code")
    with without_upstream():
        yield settings(backbone__input_channels=16)


def noise(samples: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, samples, generator=torch.Generator().manual_seed(seed)).mul(0.3).clamp(-1, 1)


@torch.no_grad()
def random_network(config: dict, seed: int = 0):
    """Random weights whose recurrence carries far, and codes that its latents really use."""
    torch.manual_seed(seed)
    parts = config["model"]["init_args"]
    network = build({k: parts[k]["init_args"] for k in parts}, Path("config.yaml")).eval()
    for name, p in network.named_parameters():
        if "lstm" in name or "past." in name or name.endswith("scale.weight"):
            p.copy_(torch.randn(p.shape) * (0.15 if p.shape[-1] > 64 else 1.0))
    codec = network.feature_extractor.encodec
    latents = codec.encoder(noise(4 * K * HOP, seed + 1)[None])  # (1, D, T)
    for layer in codec.quantizer.vq.layers:
        layer._codebook.embed.copy_(latents[0, :, torch.randperm(latents.shape[2])[:K]].T)
        layer._codebook.inited.fill_(1)
    return network


def save(folder: Path, config: dict, network) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.yaml").write_text(yaml.safe_dump(config))
    state = network.state_dict() | {"multiperioddisc.weight": torch.zeros(2)}  # Lightning saves discriminators too
    torch.save({"epoch": 1, "state_dict": state, "hyper_parameters": {"sample_rate": RATE}}, folder / "model.ckpt")
    return folder


@pytest.fixture
def folder(code, tmp_path):
    return save(tmp_path / "saved", code, random_network(code))


@pytest.fixture
def tok(folder):
    return FAMILY.open(str(folder))


def test_the_family_entry():
    assert isinstance(FAMILY, Family) and FAMILY.name == "wavtokenizer"
    assert FAMILY.code_licence == "MIT" and "check the card" in FAMILY.weights_licence
    cells = FAMILY.taxonomy.cells()
    assert cells["quantization"] == "SVQ" and cells["rate"] == "40, 75" and cells["streamable"] == "n"


def test_codes_and_sound_are_upstreams(tok, code, folder):
    theirs = random_network(code)
    condition = torch.tensor([0])
    x = noise(60 * HOP)
    features, wanted = theirs.encode_infer(x, bandwidth_id=condition)  # (B, L) -> (B, D, T), (1, B, T)
    tokens = tok.encode(x, RATE)
    assert wanted.shape == (1, 1, 60) and torch.equal(tokens.codes, wanted.transpose(0, 1))
    assert len(tokens.codes.unique()) >= 4
    sound = theirs.decode(features, bandwidth_id=condition)
    torch.testing.assert_close(tok.decode(tokens)[:, 0], sound)
    assert tok.spec.codebook_sizes == (K,) and tok.spec.frame_rate == RATE / HOP and tok.sample_rate == RATE
    batch = torch.stack([noise(30 * HOP, seed) for seed in range(3)])
    _, wanted = theirs.encode_infer(batch[:, 0], bandwidth_id=condition)
    tokens = tok.encode(batch, RATE)
    assert wanted.shape == (1, 3, 30) and torch.equal(tokens.codes[:, 0], wanted[0])
    sound = theirs.decode(theirs.codes_to_features(wanted), bandwidth_id=condition)
    torch.testing.assert_close(tok.decode(tokens)[:, 0], sound, atol=1e-5, rtol=1e-4)
    if hasattr(theirs, "from_pretrained0802"):  # the authors' own way of loading
        loaded = type(theirs).from_pretrained0802(folder / "model.yaml", folder / "model.ckpt")
        assert torch.equal(loaded.encode_infer(x, bandwidth_id=condition)[1][:, 0], tok.encode(x, RATE).codes[0])


def test_equal_lengths_may_share_a_batch(tok):
    clips = [noise(50 * HOP, seed) for seed in range(4)]
    batch = tok.encode(clips, RATE)
    for i, clip in enumerate(clips):
        assert torch.equal(batch[i].codes, tok.encode(clip, RATE).codes)
    report = check(tok, only=("batch size", "batch shape"), seconds=0.1)
    assert report.ok, report.table()


def test_the_condition_is_explicit(tok, code, folder):
    tokens = tok.encode(noise(20 * HOP), RATE)
    assert tok.bandwidth_id == 0 and tok.config["bandwidth_id"] == 0
    (folder / "model.yaml").write_text(yaml.safe_dump(code | {"bandwidth_id": 2}))
    other = FAMILY.open(str(folder))
    assert other.bandwidth_id == 2 and other.fingerprint != tok.fingerprint
    assert torch.equal(other.encode(noise(20 * HOP), RATE).codes, tokens.codes)  # the encoder does not read it
    with pytest.raises(TokensError):
        other.decode(tokens)
    same = Tokens(tokens.codes, tokens.lengths, other.spec, tokens.side)
    theirs = random_network(code)
    features = theirs.codes_to_features(tokens.codes.transpose(0, 1))
    torch.testing.assert_close(other.decode(same)[:, 0], theirs.decode(features, bandwidth_id=torch.tensor([2])))
    assert not torch.allclose(other.decode(same), tok.decode(tokens))
    for wrong in (4, -1, True, "0", None):
        (folder / "model.yaml").write_text(yaml.safe_dump(code | {"bandwidth_id": wrong}))
        with pytest.raises(ValueError, match=r"bandwidth_id: expected 0\.\.3"):
            FAMILY.open(str(folder))


def test_a_backbone_without_condition(code, tmp_path):
    code["model"]["init_args"]["backbone"]["init_args"].pop("adanorm_num_embeddings")
    tok = FAMILY.open(str(save(tmp_path / "plain", code, random_network(code))))
    assert tok.decode(tok.encode(noise(700), RATE)).shape == (1, 1, 700)


@pytest.mark.parametrize(("channels", "samples", "rate"), [(1, 1, RATE), (2, 3 * HOP + 1, RATE), (1, 999, 16000)])
def test_exact_size(tok, channels, samples, rate):
    x = noise(samples * channels).reshape(channels, samples)
    out = tok.decode(tok.encode(x, rate))
    assert out.shape == (1, channels, samples) and out.isfinite().all()


def test_laws_hold(tok):
    laws = ("padding", "levels", "prefix", "determinism", "exact size", "odd sizes", "range", "foreign ids")
    report = check(tok, only=laws, seconds=0.06)
    assert report.ok, report.table()
    assert all(row.compared > 0 for row in report.rows)


def test_padding_changes_upstreams_codes_and_sound(tok):
    """No batched inference (the repository's issue 3): padding alters a clip's last codes, and all of its sound."""
    raw = check(tok.raw(), only=("padding",), seconds=0.06)["padding"]
    assert raw.status == "broken" and raw.miss_rate > 0.005
    assert check(tok, only=("padding",), seconds=0.06)["padding"].miss_rate == 0
    codes = tok.encode([noise(60 * HOP), noise(20 * HOP, 1)], RATE).codes
    lengths = torch.tensor([60, 20])
    alone = tok.decode_samples(codes[1:, :, :20], lengths[1:])
    ours, theirs = (t.decode_samples(codes, lengths)[1:, :, : 20 * HOP] for t in (tok, tok.raw()))
    torch.testing.assert_close(ours, alone, atol=1e-5, rtol=1e-4)
    assert (theirs - alone).abs().mean() > 0.02 * alone.abs().mean()


def test_upstreams_sound_is_longer_than_what_went_in(tok):
    x = noise(10 * HOP + 1)
    assert tok.raw().decode(tok.raw().encode(x, RATE)).shape == (1, 1, 11 * HOP)
    assert tok.decode(tok.encode(x, RATE)).shape == (1, 1, 10 * HOP + 1)


def test_the_same_after_train_and_from_a_file(tok, tmp_path):
    x = noise(20 * HOP)
    before, fingerprint = tok.encode(x, RATE), tok.fingerprint
    sound = tok.decode(before)
    tok.train()
    assert torch.equal(tok.encode(x, RATE).codes, before.codes) and torch.equal(tok.decode(before), sound)
    assert tok.fingerprint == fingerprint
    tok.eval()
    before.save(tmp_path / "tokens.safetensors")
    assert torch.equal(tok.decode(Tokens.load(tmp_path / "tokens.safetensors")), sound)
    for tensor in (before.codes, sound):
        assert not tensor.is_inference()  # upstream's are, and refuse every change in place
    with pytest.raises(ValueError, match="only reads"):
        tok.save(tmp_path)


def test_codes_of_another_and_safetensors(tok, code, folder, tmp_path):
    from safetensors.torch import save_file

    other = WavTokenizer(random_network(code, seed=1), 0, "other")
    with pytest.raises(TokensError):
        other.decode(tok.encode(noise(400), RATE))
    state = torch.load(folder / "model.ckpt", weights_only=True)["state_dict"]
    again = tmp_path / "again"
    again.mkdir()
    (again / "model.yaml").write_text((folder / "model.yaml").read_text())
    (again / "README.md").write_text("---\nlicense: mit\n---\n")
    save_file({k: v.contiguous() for k, v in state.items()}, again / "model.safetensors")
    loaded = FAMILY.open(str(again))
    assert loaded.fingerprint == tok.fingerprint
    assert loaded.licences == {"code": "MIT", "weights": "mit (model card)"}


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_bad_folders(code, folder, tmp_path, capsys):
    trace = tmp_path / "trace"
    config = yaml.safe_dump(code)
    weights = (folder / "model.ckpt").read_bytes()
    state = torch.load(folder / "model.ckpt", weights_only=True)["state_dict"]

    def with_weights(value) -> bytes:
        torch.save(value, tmp_path / "value.pt")
        return (tmp_path / "value.pt").read_bytes()

    def case(**files) -> str:
        path = tmp_path / f"bad{len(list(tmp_path.iterdir()))}"
        path.mkdir()
        files = {"model_yaml": config, "model_ckpt": weights} | files
        for name, content in files.items():
            if content is not None:
                data = content.encode() if isinstance(content, str) else content
                (path / name.replace("_", ".")).write_bytes(data)
        return str(path)

    evil = yaml.safe_load(config)
    evil["model"]["init_args"]["head"] = {"class_path": "subprocess.Popen", "init_args": {"args": ["false"]}}
    other_args, other_hop = yaml.safe_load(config), yaml.safe_load(config)
    other_args["model"]["init_args"]["head"]["init_args"]["width"] = 3
    other_hop["model"]["init_args"]["feature_extractor"]["init_args"]["dowmsamples"] = [4, 5, 3]
    untrained = {k: torch.zeros(1) if k.endswith("inited") else v for k, v in state.items()}
    cases = [
        (str(tmp_path / "absent"), "no folder"),
        (case(model_yaml=None), r"expected one \.yaml or \.yml file, got \[\]"),
        (case(model_ckpt=None), r"expected one \.ckpt"),
        (case(second_ckpt=weights), r"got \['model.ckpt', 'second.ckpt'\]"),
        (case(model_yaml="a: [1"), "no yaml"),
        (case(model_yaml="- 1"), "expected a mapping, got list"),
        (case(model_yaml="model_type: encodec"), "no config of a WavTokenizer"),
        (case(model_yaml=yaml.safe_dump(evil)), "expected the classes .*got .*Popen"),
        (case(model_yaml=yaml.safe_dump(other_args)), "makes no WavTokenizer"),
        (case(model_yaml=yaml.safe_dump(other_hop)), "does not fit|takes 60 samples"),
        (case(model_ckpt=b"no zip"), "cannot read"),
        (case(model_ckpt=with_weights({"state_dict": {}})), "does not fit"),
        (case(model_ckpt=with_weights({"state_dict": state, "callbacks": Bomb(trace)})), "save the tensors alone"),
        (case(model_ckpt=with_weights({"state_dict": untrained})), "never trained"),
    ]
    for source, message in cases:
        with pytest.raises(ValueError, match=message):
            FAMILY.open(source)
    assert not trace.exists()
    torch.load(next(s for s, m in cases if "alone" in m) + "/model.ckpt", weights_only=False)
    assert trace.exists()  # the file does run code where it is let
    assert "making" not in capsys.readouterr().out  # what upstream prints stays out of a command's results


def test_encoder_and_decoder_of_different_hops(code):
    code["model"]["init_args"]["head"]["init_args"]["hop_length"] = HOP // 2
    with pytest.raises(ValueError, match=rf"takes {HOP} samples a frame, the decoder gives {HOP // 2}"):
        WavTokenizer(random_network(code), 0, "x")


@pytest.mark.parametrize("place", PLACES)
def test_the_class_is_found_in_each_place(place, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(p for p in sys.path if not (Path(p) / "decoder").is_dir())])
    package = place.removesuffix(".pretrained")
    home = write_stand_in(tmp_path / package.replace(".", "/"))
    if package == place:  # OuteTTS: the package itself has the class
        (home / "__init__.py").write_text("from .pretrained import WavTokenizer\n")
    with without_upstream():
        assert upstream_class().__module__ == f"{package}.pretrained"
        assert isinstance(WavTokenizer(random_network(settings(backbone__input_channels=16)), 0, "x"), WavTokenizer)


def test_what_to_clone_is_said(folder, monkeypatch, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "decoder.py").write_text("")  # somebody else's module of that name
    monkeypatch.syspath_prepend(tmp_path / "other")
    with without_upstream():
        sys.modules.update(dict.fromkeys(["wavtokenizer", "outetts"]))  # not installed
        with pytest.raises(ImportError, match=r"git clone https://github.com/jishengpeng/WavTokenizer .*PYTHONPATH"):
            FAMILY.open(str(folder))
