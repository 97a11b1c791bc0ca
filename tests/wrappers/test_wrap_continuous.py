"""`vibevoice:` and `pockettts:`: mmtok's codes of the latents of transformers' models, random and tiny."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmtok.bench.laws import check
from mmtok.quantizers.per_dimension import PerDimensionQuantizer
from mmtok.tokens import Tokens, TokensError
from mmtok.wrappers.continuous import (
    POCKETTTS,
    VIBEVOICE,
    VIBEVOICE_STD,
    Continuous,
    PocketTTSWrapper,
    VibeVoiceWrapper,
    split_source,
)

transformers: Any = pytest.importorskip("transformers")
RATE, DIM = 24000, 4
LAWS = ("variety", "padding", "batch shape", "chunking", "levels", "prefix", "round trip", "determinism", "exact size")
LAWS += ("odd sizes", "extreme inputs")


def sound(length: int, count: int = 1, seed: int = 0) -> Tensor:
    """(count, 1, length): noise that swells and fades, so that codes differ."""
    g = torch.Generator().manual_seed(seed + length)
    swell = 0.02 + 0.2 * torch.sin(torch.arange(length) / 700.0).square()
    return torch.randn(count, 1, length, generator=g) * swell


def shaken(model: Any) -> Any:
    for p in model.parameters():  # upstream's first weights give latents that hardly differ
        if p.ndim > 1:
            torch.nn.init.normal_(p, 0, p[0].numel() ** -0.5)
    return model.eval()


def tiny_vibevoice(**changes: Any) -> Any:
    torch.manual_seed(0)
    facts = {"hidden_size": DIM, "kernel_size": 3, "num_filters": 2, "downsampling_ratios": [2, 4, 5]}
    facts |= {"depths": [1, 2, 1, 3], "layer_scale_init_value": 0.5} | changes
    return shaken(transformers.VibeVoiceAcousticTokenizerModel(transformers.VibeVoiceAcousticTokenizerConfig(**facts)))


def tiny_pocket(**changes: Any) -> Any:
    torch.manual_seed(0)
    facts = {"hidden_size": 16, "num_filters": 2, "num_hidden_layers": 1, "num_attention_heads": 2, "latent_dim": DIM}
    facts |= {"num_key_value_heads": 2, "intermediate_size": 16, "upsampling_ratios": [5, 4], "latent_stride": 4}
    facts |= {"upsample_groups": 16, "sliding_window": 8, "layer_scale_initial_scale": 0.5} | changes
    return shaken(transformers.PocketTTSAudioTokenizerModel(transformers.PocketTTSAudioTokenizerConfig(**facts)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("wrap")
    for name, model in (("vibevoice", tiny_vibevoice()), ("pockettts", tiny_pocket())):
        model.save_pretrained(root / name)
    return {name: root / name for name in ("vibevoice", "pockettts")}


@pytest.fixture(scope="module")
def vibevoice(folders: dict[str, Path]) -> VibeVoiceWrapper:
    return VIBEVOICE.open(f"{folders['vibevoice']}@5,1.5")


@pytest.fixture(scope="module")
def pockettts(folders: dict[str, Path]) -> PocketTTSWrapper:
    return POCKETTTS.open(f"{folders['pockettts']}@5,1.5")


@pytest.fixture(params=["vibevoice", "pockettts"])
def tok(request: pytest.FixtureRequest) -> Continuous:
    return request.getfixturevalue(request.param)


def prepared(tok: Continuous, x: Tensor) -> tuple[Tensor, Tensor]:
    """Upstream's input of whole frames (B, 1, L), through its own extractor, and what x was multiplied by (B, 1, 1)."""
    if isinstance(tok, PocketTTSWrapper):
        return torch.nn.functional.pad(x, (0, -x.shape[2] % tok.hop_length)), torch.ones(len(x), 1, 1)
    extractor = transformers.VibeVoiceAcousticTokenizerFeatureExtractor()
    made = extractor([c.numpy() for c in x[:, 0]], sampling_rate=RATE, pad_to_multiple_of=tok.hop_length)
    y = made["input_values"]
    at = x.abs().argmax(2, keepdim=True)
    return y, y.gather(2, at) / x.gather(2, at)


@torch.no_grad()
def upstream(tok: Continuous, x: Tensor) -> tuple[Tensor, Tensor]:
    """Upstream's latents (B, T, D) and the sound that it makes of them, at the loudness of x."""
    network: Any = tok.network
    y, gain = prepared(tok, x)
    if isinstance(tok, PocketTTSWrapper):
        z = network.encode(y).latents
        return z, network.decode(z).audio_values
    z = network.encode(y, sample=False).latents
    return z, network.decode(z).audio / gain


@torch.no_grad()
def test_codes_are_those_of_the_quantizer_on_upstreams_latents(tok: Continuous):
    quantizer = PerDimensionQuantizer(DIM, 5, 5.0, 5.0)
    quantizer.set_statistics([0.0] * DIM, [1.5] * DIM)
    for x in (sound(tok.hop_length), sound(6001), sound(2000, 3)):
        z, _ = upstream(tok, x)
        tokens = tok.encode(x, RATE)
        assert torch.equal(tokens.codes, quantizer.encode(z)) and tok.codebook_sizes == (32,) * DIM
        table = quantizer.centroids[0] * 1.5
        nearest = (z[..., None] - table).abs().argmin(-1).transpose(1, 2)
        assert (tokens.codes == nearest).double().mean() > 0.999  # the same, but for ties in rounding
        network: Any = tok.network
        z_q = table[tokens.codes].transpose(1, 2)
        theirs = network.decode(z_q)[0] / prepared(tok, x)[1]
        assert torch.allclose(tok.decode(tokens), theirs[..., : x.shape[2]], atol=1e-5, rtol=1e-4)
        assert torch.equal(tok.encode(x, RATE, num_codebooks=2).codes, tokens.codes[:, :2])
    codes = tok.encode(sound(6001), RATE).codes
    assert all(len(codes[:, q].unique()) >= 4 for q in range(DIM))


@torch.no_grad()
def test_sixteen_bits_come_close_to_the_continuous_decode(folders: dict[str, Path]):
    for family in (VIBEVOICE, POCKETTTS):
        x, errors = sound(5000, 2), []
        for bits in (3, 6, 16):
            fine = family.open(f"{folders[family.name]}@{bits},1.5")
            y, theirs = fine.decode(fine.encode(x, RATE)), upstream(fine, x)[1][..., :5000]
            errors.append(float((y - theirs).square().mean() / theirs.square().mean()))
        assert errors[0] > 4 * errors[1] > 0 and errors[2] < 1e-4
        assert fine.codebook_sizes == (65536,) * DIM


@torch.no_grad()
def test_a_missing_dimension_decodes_as_its_mean(folders: dict[str, Path]):
    tok = VIBEVOICE.open(f"{folders['vibevoice']}@6")
    assert (tok.config["mean"], tok.config["std"]) == (0.0493, VIBEVOICE_STD) and 5 < VIBEVOICE_STD < 5.2
    tokens = tok.encode(sound(2000), RATE)
    z = tok.quantizer.decode(tokens.codes[:, :1])
    assert torch.allclose(z[..., 1:], torch.tensor(0.0493))
    network: Any = tok.network
    theirs = network.decode(z).audio / float(tokens.side["gain"])
    assert torch.allclose(tok.decode(tokens.keep(num_codebooks=1)), theirs, atol=1e-5)


def test_laws_hold(tok: Continuous):
    report = check(tok, only=LAWS, seconds=0.25)
    assert report.ok, report.table()
    assert report["padding"].compared > 1000
    pieces = tok.encode_margin is not None and tok.decode_margin is not None
    assert report["chunking"].compared > 1000 if pieces else report["chunking"].status == "not applicable"
    assert pieces == isinstance(tok, VibeVoiceWrapper)


@torch.no_grad()
def test_a_frame_reaches_back_as_far_as_the_margins_and_no_further(vibevoice: VibeVoiceWrapper):
    """Perturb one frame: latents, and sound, change from that frame on (causal), up to the margin."""
    network, hop = vibevoice.network, vibevoice.hop_length
    encodes, decodes = vibevoice.encode_margin, vibevoice.decode_margin
    assert encodes is not None and decodes is not None
    x = sound(hop * 40)
    other = x.clone()
    other[..., 5 * hop : 6 * hop] *= -3
    changed = (vibevoice.network_latents(x) != vibevoice.network_latents(other)).any(2)[0].nonzero()[:, 0]
    assert int(changed.min()) == 5 and encodes - 1 <= int(changed.max()) - 5 <= encodes
    z = vibevoice.network_latents(x)
    moved = z.clone()
    moved[:, 5] += 3
    changed = (network.decode(z).audio != network.decode(moved).audio)[0, 0].nonzero()[:, 0] // hop  # pyright: ignore
    assert int(changed.min()) == 5 and decodes - 1 <= int(changed.max()) - 5 <= decodes


def test_vibevoice_gives_the_loudness_back(vibevoice: VibeVoiceWrapper, tmp_path: Path):
    x = sound(3000)[0]
    loud, quiet = vibevoice.encode(x, RATE), vibevoice.encode(x / 4, RATE)
    assert torch.equal(loud.codes, quiet.codes)  # the network hears both at -25 dBFS
    assert torch.allclose(quiet.side["gain"], 4 * loud.side["gain"], rtol=1e-4)
    assert torch.allclose(vibevoice.decode(loud), 4 * torch.as_tensor(vibevoice.decode(quiet)), rtol=1e-3)
    rms = float((x * loud.side["gain"]).square().mean().sqrt())
    assert rms == pytest.approx(10 ** (-25 / 20), rel=1e-3)
    click = torch.zeros(1, 3000)
    click[0, 500] = 0.5
    clicked = vibevoice.heard(click, RATE)
    assert float(clicked[0][0].max()) == pytest.approx(1, abs=1e-4) and clicked[1] == pytest.approx([2], abs=1e-4)
    both = vibevoice.encode([x, torch.cat([x / 4, x / 8])], RATE)  # mono, and a stereo clip with one factor
    assert torch.equal(both[0].codes, loud.codes) and both.side["gain"].shape == (2,)
    both.save(tmp_path / "tokens")
    again = vibevoice.decode(Tokens.load(tmp_path / "tokens"))
    assert [tuple(y.shape) for y in again] == [(1, 3000), (2, 3000)]
    assert torch.equal(again[0], vibevoice.decode(loud)[0])
    bare = Tokens(loud.codes, loud.lengths, loud.spec)
    assert torch.allclose(vibevoice.decode(bare)[0, :, :3000], again[0] * float(loud.side["gain"]), atol=1e-5)
    with pytest.raises(TokensError, match="gain"):
        vibevoice.decode(Tokens(loud.codes, loud.lengths, loud.spec, {"gain": torch.tensor([0.0])}))


def test_the_folders_extractor_says_how_loud(folders: dict[str, Path], tmp_path: Path, vibevoice: VibeVoiceWrapper):
    moved = shutil.copytree(folders["vibevoice"], tmp_path / "flat")
    transformers.VibeVoiceAcousticTokenizerFeatureExtractor(normalize_audio=False).save_pretrained(moved)
    flat = VIBEVOICE.open(f"{moved}@5,1.5")
    x = sound(3000)
    assert flat.fingerprint != vibevoice.fingerprint and float(flat.encode(x, RATE).side["gain"]) == 1
    z = flat.network_latents(x)
    assert torch.equal(flat.encode(x, RATE).codes, flat.quantizer.encode(z))
    (moved / "preprocessor_config.json").write_text("{not json")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json is not readable"):
        VIBEVOICE.open(f"{moved}@5,1.5")


@torch.no_grad()
def test_latent_statistics_are_those_of_upstreams_latents(tok: Continuous):
    x = sound(4000)
    z = upstream(tok, x)[0].double()
    mean, std = tok.latent_statistics(x, RATE)
    assert mean == pytest.approx(float(z.mean()), abs=1e-6) and std == pytest.approx(float(z.std(correction=0)))
    assert tok.latent_statistics([x[0], x[0]], RATE)[1] == pytest.approx(std)


def test_training_mode_bits_and_other_tokenizers(tok: Continuous, folders: dict[str, Path]):
    x = [sound(1000)[0], sound(2500)[0]]
    tokens = tok.encode(x, RATE)
    tok.train()
    assert torch.equal(tok.encode(x, RATE).codes, tokens.codes)
    tok.eval()
    json.dumps(tok.config)
    opened = tok.family.open(f"{folders[tok.family.name]}@5,1.5")
    assert opened.fingerprint == tok.fingerprint and opened.name == f"{tok.family.name}:{tok.family.name}@5"
    for setting in ("6,1.5", "5,1.6"):  # codes of other bits, or of another table
        with pytest.raises(TokensError, match="fingerprint"):
            tok.family.open(f"{folders[tok.family.name]}@{setting}").decode(tokens)


def test_fault_vibevoice_encodes_at_random_and_forgets_the_loudness(vibevoice: VibeVoiceWrapper):
    found = check(vibevoice.raw(), only=("determinism",), seconds=0.25)["determinism"]
    assert found.status == "broken" and (found.miss_rate or 0) > 0.05  # of codes and decoded samples together
    x = sound(3000)
    raw = vibevoice.raw().decode(vibevoice.raw().encode(x, RATE))
    assert isinstance(raw, Tensor) and raw.shape[2] == 3000  # whole frames here
    assert "gain" not in vibevoice.raw().encode(x, RATE).side


def test_fault_other_lengths_come_back(tok: Continuous):
    report = check(tok.raw(), only=("exact size", "odd sizes"), seconds=0.25)
    assert report["exact size"].status == report["odd sizes"].status == "broken"


def test_bits_are_never_a_default(folders: dict[str, Path]):
    for source in ("org/repo", "org/repo@", "org/repo@six", "org/repo@6,", str(folders["vibevoice"])):
        with pytest.raises(ValueError, match=r"continuous, its latents have no codes.*@6$"):
            VIBEVOICE.open(source)
    for setting in ("0", "17", "6,0", "6,0.0"):
        with pytest.raises(ValueError, match=r"expected 1\.\.16 bits and a standard deviation > 0"):
            POCKETTTS.open(f"{folders['pockettts']}@{setting}")
    assert split_source(VIBEVOICE, "a@b/c@6") == ("a@b/c", 6, None)
    assert split_source(VIBEVOICE, "a/b@2,0.5") == ("a/b", 2, 0.5)
    assert all("codes are mmtok's" in f.title for f in (VIBEVOICE, POCKETTTS))


def test_bad_input_is_named(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for family, other in ((VIBEVOICE, "pockettts"), (POCKETTTS, "vibevoice")):
        with pytest.raises(ValueError, match="no folder at"):
            family.open(f"{tmp_path / 'nowhere'}@6")
        with pytest.raises(ValueError, match=r"no config\.json"):
            family.open(f"{tmp_path}@6")
        with pytest.raises(ValueError, match=r"missing|no readable folder"):
            family.open(f"{folders[other]}@6")
    broken = shutil.copytree(folders["pockettts"], tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="no readable folder"):
        POCKETTTS.open(f"{broken}@6")
    tiny_pocket(encoder_config=None).save_pretrained(tmp_path / "half")
    with pytest.raises(ValueError, match="without encoder"):
        POCKETTTS.open(f"{tmp_path / 'half'}@6")
    with pytest.raises(ValueError, match="expected a mono tokenizer, got 2 channels"):
        VibeVoiceWrapper(tiny_vibevoice(channels=2), "stereo", 6)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install"):
        VIBEVOICE.open(f"{folders['vibevoice']}@6")
