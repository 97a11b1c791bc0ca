"""transformers' EnCodec behind our interface: its codes, scales and sound, its faults raw and mitigated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peers.networks import ENCODEC, encodec, swelling
from safetensors.torch import load_file
from torch import Tensor

from mmtok.bench.laws import ABOUT, check
from mmtok.tokens import Tokens, TokensError
from mmtok.wrappers.encodec import FAMILY, Encodec, EncodecChunks, overlap_add

transformers: Any = pytest.importorskip("transformers")

HOP = 24
RATE = ENCODEC["sampling_rate"]  # 100 frames a second of 5 bits a level
CAUSAL = ENCODEC
MUSICGEN = ENCODEC | {"target_bandwidths": [2.0], "use_causal_conv": False, "use_conv_shortcut": False}
# Chunks of 480 samples = 30 frames, one every 456 samples = 28.5 frames; the 48 kHz model has 150 and 148.5.
STEREO_RATE, CHUNK, STRIDE = 4800, 480, 456
STEREO = {
    "upsampling_ratios": [4, 4],
    "sampling_rate": STEREO_RATE,
    "audio_channels": 2,
    "normalize": True,
    "chunk_length_s": 0.1,
    "overlap": 0.05,
    "norm_type": "time_group_norm",
    "use_causal_conv": False,
    "target_bandwidths": [3.0, 6.0, 12.0],  # 2, 4, 8 levels
}
CONFIGS = {"causal": CAUSAL, "musicgen": MUSICGEN, "stereo": STEREO}
LEVELS = {"causal": {1.0: 2, 2.0: 4, 4.0: 8, 8.0: 16, 16.0: 32}, "musicgen": {2.0: 4}}
# One sample; less than a chunk; a chunk and a bit of the next; just over one; three chunks, the last short; or whole.
LENGTHS = (1, 300, CHUNK, STRIDE + 25, 2 * STRIDE + 17, 3 * STRIDE)
mono_kinds = pytest.mark.parametrize("kind", ["causal", "musicgen"])
all_kinds = pytest.mark.parametrize("kind", CONFIGS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for kind, changes in CONFIGS.items():
        found[kind] = tmp_path_factory.mktemp("encodec") / kind
        encodec(changes).save_pretrained(found[kind])
    return found


@pytest.fixture(scope="module")
def opened(folders: dict[str, Path]) -> dict[str, tuple[Any, Any]]:
    """Our tokenizer and upstream's model of each folder, two networks that share nothing."""
    read = transformers.EncodecModel.from_pretrained
    return {k: (FAMILY.open(str(f)), read(f, local_files_only=True).eval()) for k, f in folders.items()}


@pytest.fixture
def tok(opened: dict[str, tuple[Any, Any]], kind: str) -> Any:
    return opened[kind][0]


@pytest.fixture
def upstream(opened: dict[str, tuple[Any, Any]], kind: str) -> Any:
    return opened[kind][1]


def clip_of(tok: Any, frames: float) -> Tensor:
    return swelling(getattr(tok, "model_channels", 1), round(frames * tok.hop_length))


def fewest_codes(codes: Tensor) -> int:
    """The smallest number of different codes in a level of (B, Q, T)."""
    return min(len(level.unique()) for level in codes.transpose(0, 1))


def joined(given: Any, n: int) -> Tensor:
    """Upstream's (chunks, B, Q, T) as (B, Q, T) of all chunks, without the padding of the last."""
    codes = list(given.audio_codes)
    if given.last_frame_pad_length:
        codes[-1] = codes[-1][..., : -given.last_frame_pad_length]
    return torch.cat(codes, -1)


@mono_kinds
@torch.no_grad()
def test_mono_codes_and_sound_are_upstreams(tok: Encodec, upstream: Any, kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tok, "batch_limit", 3)  # a whole batch, as upstream's, so that it is summed in one order
    assert isinstance(tok, Encodec) and tok.spec.codebook_sizes == (32,) * max(LEVELS[kind].values())
    assert tok.spec.frame_rate == 100 and tok.hop_length == HOP and tok.name == f"encodec:{kind}"
    x = swelling(3, 1, 40 * HOP)
    mask = torch.ones(3, 40 * HOP, dtype=torch.bool)
    for rate, levels in LEVELS[kind].items():
        given = upstream.encode(x, mask, rate)
        assert given.audio_codes.shape == (1, 3, levels, 40)
        tokens = tok.encode(list(x), RATE, num_codebooks=levels)
        assert torch.equal(tokens.codes, given.audio_codes[0])
        assert fewest_codes(tokens.codes) >= 8
        torch.testing.assert_close(
            tok.decode(tokens), upstream.decode(given.audio_codes, given.audio_scales, mask).audio_values
        )
    single = upstream.encode(x[:1], bandwidth=rate)
    assert torch.equal(tok.encode(x[0], RATE).codes, single.audio_codes[0])
    torch.testing.assert_close(
        tok.decode(tok.encode(x[0], RATE)), upstream.decode(single.audio_codes, [None]).audio_values
    )


@mono_kinds
@torch.no_grad()
def test_mono_clips_are_padded_to_whole_frames(tok: Encodec, upstream: Any, kind: str):
    for n in (1, 100, 30 * HOP + 7):
        x = swelling(1, n)
        padded = torch.nn.functional.pad(x, (0, -n % HOP))[None]
        given = upstream.encode(padded, bandwidth=max(LEVELS[kind])).audio_codes
        tokens = tok.encode(x, RATE)
        assert torch.equal(tokens.codes, given[0])
        torch.testing.assert_close(tok.decode(tokens), upstream.decode(given, [None]).audio_values[..., :n])


@all_kinds
@torch.no_grad()
def test_levels_that_upstream_has_no_rate_for(tok: Any, upstream: Any, kind: str):
    x = clip_of(tok, 50.5)
    whole = tok.encode(x, tok.sample_rate)
    for levels in (1, 3, len(tok.codebook_sizes) - 1):
        tokens = tok.encode(x, tok.sample_rate, num_codebooks=levels)
        assert torch.equal(tokens.codes, whole.codes[:, :levels]) and tokens.spec.num_codebooks == levels
        y = tok.decode(whole.keep(levels))
        assert torch.equal(tok.decode(tokens), y) and y.shape == (1, *x.shape)
        if kind != "stereo":
            wanted = upstream.decode(tokens.codes[None], [None]).audio_values[..., : x.shape[1]]
            torch.testing.assert_close(y, wanted)
    assert len({float(tok.decode(whole.keep(q)).sum()) for q in range(1, len(tok.codebook_sizes) + 1)}) > 3


@pytest.mark.parametrize("kind", ["stereo"])
@torch.no_grad()
def test_stereo_codes_scales_and_sound_are_upstreams(tok: EncodecChunks, upstream: Any, kind: str):
    assert isinstance(tok, EncodecChunks) and tok.spec.codebook_sizes == (32,) * 8
    assert tok.spec.frame_rate == 30 / 456 * 4800  # 30 frames a chunk
    for n in LENGTHS:
        x = swelling(3, 2, n)
        for batch, rates in ((x[:1], {12.0: 8}), (x, {3.0: 2, 6.0: 4, 12.0: 8})):
            mask = torch.ones(len(batch), n, dtype=torch.bool)
            for rate, levels in rates.items():
                given = upstream.encode(batch, mask, rate)
                scales = torch.cat(given.audio_scales, 1)
                tokens = tok.encode(list(batch), STEREO_RATE, num_codebooks=levels)
                assert torch.equal(tokens.codes, joined(given, n)) and tokens.codes.shape[2] == tok.num_frames(n)
                assert tokens.side["scale"].shape == (len(batch), -(-n // STRIDE))
                torch.testing.assert_close(tokens.side["scale"], scales)
                wanted = upstream.decode(
                    given.audio_codes, given.audio_scales, mask, last_frame_pad_length=given.last_frame_pad_length
                ).audio_values
                torch.testing.assert_close(tok.decode(tokens), wanted)
        assert fewest_codes(tokens.codes) >= (8 if n > CHUNK else 1)
    assert len(scales[0].unique()) == len(scales[0]) == 3


@pytest.mark.parametrize(
    "changes", [{"chunk_length_s": None, "overlap": None}, {"normalize": False}, {"audio_channels": 1}]
)
@torch.no_grad()
def test_chunks_loudness_and_channels_need_not_come_together(changes: dict):
    network = encodec(STEREO | changes)
    tok = EncodecChunks(network, "other")
    x = swelling(1, tok.model_channels, 2 * STRIDE + 200)
    given = network.encode(x, bandwidth=12.0)
    tokens = tok.encode(x[0], STEREO_RATE)
    assert torch.equal(tokens.codes, joined(given, x.shape[2])) and fewest_codes(tokens.codes) >= 8
    pad = given.last_frame_pad_length
    wanted = network.decode(given.audio_codes, given.audio_scales, last_frame_pad_length=pad).audio_values
    torch.testing.assert_close(tok.decode(tokens), wanted[..., : x.shape[2]])
    assert bool((tokens.side["scale"] == 1).all()) == (not network.config.normalize)


@all_kinds
def test_all_laws_hold(tok: Any, kind: str):
    laws = [law for law in ABOUT if law != "delay"]  # a random network's sound is too unlike the input to tell
    report = check(tok, only=laws, seconds=0.2)
    assert report.ok, report.table()
    assert {r.law for r in report.rows if r.status == "not applicable"} <= {"chunking", "device"}


def test_clips_of_one_length_may_share_a_batch_where_speed_is_worth_a_near_tie():
    """Rounding depends on the batch and turns a near tie now and then, and every level after it: hence one by one."""
    tok = Encodec(encodec(CAUSAL), "tiny")
    clips = list(swelling(5, 1, 20 * HOP))
    alone = tok.encode(clips, RATE)
    shapes: list[int] = []
    hook = tok.network.encoder.register_forward_pre_hook(lambda m, x: shapes.append(len(x[0])))
    assert torch.equal(tok.encode(clips, RATE).codes, alone.codes) and shapes == [1] * 5
    tok.batch_limit = 3
    shapes.clear()
    together = tok.encode(clips, RATE).codes
    assert shapes == [3, 2] and float((together != alone.codes).float().mean()) < 0.02
    hook.remove()


@all_kinds
def test_fault_lowest_rate_unless_asked(tok: Any, kind: str):
    """EnCodec's `encode` without a rate takes the lowest: 2 levels of 32 here as in encodec_24khz."""
    raw = check(tok.raw(), only=("levels",), seconds=0.1)["levels"]
    assert check(tok, only=("levels",), seconds=0.1)["levels"].miss_rate == 0
    expected = {"causal": 30 / 32, "musicgen": 0.0, "stereo": 6 / 8}[kind]
    assert raw.miss_rate == expected and raw.status == ("broken" if expected else "ok")


@pytest.mark.parametrize(("kind", "harmed"), [("causal", False), ("musicgen", True), ("stereo", True)])
def test_fault_padding(tok: Any, harmed: bool, kind: str):
    """Codes of a clip beside longer ones: only the causal model is blind to the zeros behind its end."""
    raw, mitigated = (check(t, only=("padding",), seconds=0.35)["padding"] for t in (tok.raw(), tok))
    assert (raw.miss_rate > 0.005) == harmed and mitigated.miss_rate == 0


@pytest.mark.parametrize("kind", ["causal"])
def test_fault_padding_of_very_short_clips(tok: Encodec, kind: str):
    """Even the causal model reflects its beginning, up to 6 frames into the clip: a shorter one sees its padding."""
    rows = {}
    for frames in (1, 3, 6, 7, 12):
        x, longer = swelling(1, frames * HOP), swelling(1, 20 * HOP)
        for t in (tok.raw(), tok):
            alone = t.encode(x, RATE, num_codebooks=32).codes
            beside = t.encode([x, longer], RATE, num_codebooks=32)[0].codes
            rows[frames, t.mitigated] = float((alone != beside).double().mean())
    assert all(rate == 0 for (_, mitigated), rate in rows.items() if mitigated)
    assert rows[3, False] > 0.05 and rows[7, False] == rows[12, False] == 0


@pytest.mark.parametrize("kind", ["stereo"])
def test_fault_scale_counts_the_padding(tok: EncodecChunks, kind: str):
    """Upstream masks the padding but still divides by it: the scale of the shorter clip shrinks by sqrt(100 / 480)."""
    x, longer = swelling(2, 100), swelling(2, CHUNK)
    alone = tok.encode(x, STEREO_RATE).side["scale"][0, 0]
    raw, ours = (t.encode([x, longer], STEREO_RATE).side["scale"] / alone for t in (tok.raw(), tok))
    torch.testing.assert_close(raw[0, 0], torch.tensor((100 / CHUNK) ** 0.5))
    assert float(ours[0, 0]) == 1


@pytest.mark.parametrize("kind", ["stereo"])
@torch.no_grad()
def test_fault_lengths_just_past_a_stride(tok: EncodecChunks, upstream: Any, kind: str):
    """From the third chunk on, upstream cannot stack chunks of 29 and 30 frames; a last chunk that ends before its
    neighbour does cannot be added. Both happen within the hop after a stride."""
    raw = tok.raw()
    failed = []
    for over in (1, 8, 9, 16, 17, 24):
        x = swelling(2, 2 * STRIDE + over)
        try:
            raw.decode(raw.encode(x, STEREO_RATE))
        except RuntimeError:
            failed.append(over)
        tokens = tok.encode(x, STEREO_RATE)
        assert tok.decode(tokens).shape == (1, *x.shape)
        starts = range(0, x.shape[1], STRIDE)  # upstream on each chunk by itself
        alone = [upstream.encode(x[None, :, s : s + CHUNK], bandwidth=12.0).audio_codes[0, 0] for s in starts]
        assert torch.equal(tokens.codes[0], torch.cat(alone, 1))
    assert failed == [1, 8, 9, 16]


@pytest.mark.parametrize("kind", ["stereo"])
def test_opposite_phase_is_silence_to_upstream(tok: EncodecChunks, kind: str):
    x = swelling(1, 700)
    tokens = tok.encode(torch.cat([x, -x]), STEREO_RATE)
    assert bool((tokens.side["scale"] == 1e-8).all()) and float(tok.decode(tokens).abs().max()) < 1e-5
    assert float(tok.decode(tok.encode(torch.cat([x, x]), STEREO_RATE)).abs().max()) > 1e-2


@pytest.mark.parametrize("kind", ["stereo"])
def test_stereo_channels_go_in_pairs(tok: EncodecChunks, kind: str):
    x = swelling(3, 700)
    mono, pair, three = (tok.encode(c, STEREO_RATE) for c in (x[2:], x[:2], x))
    twice = tok.encode(x[[2, 2]], STEREO_RATE)
    assert torch.equal(mono.codes, twice.codes)
    torch.testing.assert_close(tok.decode(mono)[0], tok.decode(twice)[0].mean(0, keepdim=True))
    assert torch.equal(three.codes[..., 0::2], pair.codes) and torch.equal(three.codes[..., 1::2], mono.codes)
    assert torch.equal(three.side["scale"][0], torch.stack([pair.side["scale"][0], mono.side["scale"][0]], 1).flatten())
    torch.testing.assert_close(tok.decode(three)[0], torch.cat([tok.decode(pair)[0], tok.decode(mono)[0]]))


@all_kinds
def test_exact_size_of_any_sound(tok: Any, kind: str):
    for channels, n, rate in (
        (1, 1, 8000),
        (2, 999, 8000),
        (3, 1111, 16000),
        (1, 501, 1000),
        (2, 456, tok.sample_rate),
    ):
        x = swelling(channels, n)
        assert tok.decode(tok.encode(x, rate)).shape == (1, channels, n)
    clips = [swelling(1, 700), swelling(2, 1500), swelling(1, 20)]
    tokens = tok.encode(clips, tok.sample_rate)
    for i, (clip, y) in enumerate(zip(clips, tok.decode(tokens), strict=True)):
        alone = tok.encode(clip, tok.sample_rate)
        assert torch.equal(tokens[i].codes, alone.codes) and torch.equal(y, tok.decode(alone)[0])


@all_kinds
def test_every_prefix_of_tokens_decodes_to_the_beginning(tok: Any, kind: str):
    x = swelling(2, 2 * STRIDE + 20)
    tokens = tok.encode(x, tok.sample_rate)
    whole, sizes = tok.decode(tokens), []
    T = tokens.codes.shape[2]
    for t in sorted({1, 2, 3, 29, 30, 31, T // 2, T - 2, T - 1, T} | set(range(1, T, 9))):
        y = tok.decode(tokens.keep(num_tokens=t))
        assert bool(y.isfinite().all()) and y.shape[:2] == (1, 2)
        sizes.append(y.shape[2])
    assert sizes == sorted(sizes) and sizes[-1] == x.shape[1]
    assert torch.equal(tok.encode(x, tok.sample_rate, num_tokens=9).codes, tokens.codes[..., :9])
    if kind == "stereo":  # the first chunk alone: the same up to where the second one starts
        first = tok.decode(tokens.keep(num_tokens=30))
        assert first.shape[2] == CHUNK and torch.equal(first[..., :STRIDE], whole[..., :STRIDE])


@all_kinds
def test_tokens_survive_file_training_mode_and_missing_side(tok: Any, kind: str, tmp_path: Path):
    x = swelling(1, 1000)
    tokens = tok.encode([x, x[:, :300]], tok.sample_rate)
    y = tok.decode(tokens)
    tokens.save(tmp_path / "t.safetensors")
    again = Tokens.load(tmp_path / "t.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(tok.decode(again), y, strict=True))
    tok.train()
    assert torch.equal(tok.encode([x, x[:, :300]], tok.sample_rate).codes, tokens.codes) and tok.network.training
    tok.eval()
    bare = Tokens(tokens[0].codes, tokens[0].lengths, tokens.spec)
    assert tok.decode(bare).shape[:2] == (1, 1) and tok.decode(bare).shape[2] >= 1000
    assert tok.decode(tokens[:0]).shape[0] == 0


@pytest.mark.parametrize("kind", ["stereo"])
def test_stereo_side_is_checked(tok: EncodecChunks, kind: str):
    tokens = tok.encode(swelling(2, 1000), STEREO_RATE)
    scale = tokens.side["scale"]
    assert scale.shape == (1, 3)
    for bad in (scale[:, :2], scale[0], scale * torch.nan, -scale, scale.long()):
        with pytest.raises(TokensError, match="side"):
            tok.decode(Tokens(tokens.codes, tokens.lengths, tokens.spec, tokens.side | {"scale": bad}))
    louder = Tokens(tokens.codes, tokens.lengths, tokens.spec, tokens.side | {"scale": scale * 2})
    torch.testing.assert_close(tok.decode(louder), tok.decode(tokens) * 2)
    short = Tokens(tokens.codes, tokens.lengths, tokens.spec, tokens.side | {"num_samples": torch.tensor([500])})
    with pytest.raises(TokensError, match="another length"):
        tok.decode(short)
    with pytest.raises(ValueError, match="size"):
        tok.decode(tokens, size=(4, 4))
    padded = tok.encode([swelling(2, 1000), swelling(2, 100)], STEREO_RATE).side["scale"]
    assert padded[1, 1:].tolist() == [1, 1] and float(padded[1, 0]) != 1


@all_kinds
def test_raw_keeps_upstreams_length(tok: Any, upstream: Any, kind: str):
    x = clip_of(tok, 20.4)
    raw = tok.raw()
    y = raw.decode(raw.encode(x, tok.sample_rate))
    assert y.shape == (1, len(x), 21 * tok.hop_length) and raw.fingerprint == tok.fingerprint
    whole = torch.nn.functional.pad(x, (0, 21 * HOP - x.shape[1])) if kind != "stereo" else x
    given = upstream.encode(whole[None])
    assert torch.equal(raw.encode(x, tok.sample_rate).codes, given.audio_codes[0])
    torch.testing.assert_close(y, upstream.decode(given.audio_codes, given.audio_scales).audio_values)


def test_overlap_add_cross_fades():
    a, b = torch.ones(1, 6), torch.full((1, 4), 3.0)
    y = overlap_add([a, b], 4)[0]
    assert y.shape == (8,) and y[:4].tolist() == [1] * 4 and y[6:].tolist() == [3, 3]
    torch.testing.assert_close(y[4:6], torch.tensor([1 + 2 / 3, 1 + 4 / 3]))
    short = overlap_add([a, b[:, :1]], 4)[0]  # ends before the part that it follows
    assert short.shape == (6,) and float(short[5]) == 1


def test_fingerprint_follows_facts_and_not_the_folder(folders: dict[str, Path]):
    one, two = (Encodec(encodec(CAUSAL), source) for source in ("a", "b"))
    assert one.fingerprint == two.fingerprint == FAMILY.open(str(folders["causal"])).fingerprint
    assert Encodec(encodec(CAUSAL | {"pad_mode": "constant"}), "a").fingerprint != one.fingerprint
    with pytest.raises(TokensError, match="fingerprint"):
        one.decode(FAMILY.open(str(folders["musicgen"])).encode(swelling(1, 100), RATE))
    json.dumps(one.config)


def test_licences_and_taxonomy(folders: dict[str, Path], tmp_path: Path):
    tok = FAMILY.open(str(folders["causal"]))
    assert tok.licences["code"] == "Apache-2.0" and "CC-BY-NC-4.0" in tok.licences["weights"]
    shutil.copytree(folders["causal"], tmp_path / "carded")
    (tmp_path / "carded" / "README.md").write_text("---\nlicense: mit\n---\n")
    assert FAMILY.open(str(tmp_path / "carded")).licences["weights"] == "mit (model card)"
    cells = FAMILY.taxonomy.cells()
    assert cells["quantization"] == "RVQ" and cells["streamable"] == "y" and "75" in cells["rate"]
    with pytest.raises(ValueError, match="another package"):
        tok.save(tmp_path)


def test_bad_folders_are_refused(folders: dict[str, Path], tmp_path: Path):
    with pytest.raises(ValueError, match="no folder"):
        FAMILY.open(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"config\.json"):
        FAMILY.open(str(tmp_path))
    other = tmp_path / "dac"
    sizes = {"encoder_hidden_size": 4, "decoder_hidden_size": 16, "downsampling_ratios": [2, 2], "hidden_size": 8}
    transformers.DacModel(transformers.DacConfig(**sizes, upsampling_ratios=[2, 2], n_codebooks=2)).save_pretrained(
        other
    )
    with pytest.raises(ValueError, match="EncodecModel"):
        FAMILY.open(str(other))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((folders["stereo"] / "config.json").read_text())
    weights = (folders["stereo"] / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="EncodecModel"):
        FAMILY.open(str(broken))
    (broken / "model.safetensors").write_bytes(weights)
    assert load_file(broken / "model.safetensors") and isinstance(FAMILY.open(str(broken)), EncodecChunks)
    config = json.loads((broken / "config.json").read_text())
    for change, word in (({"overlap": None}, "overlap"), ({"overlap": -0.5}, "overlap")):
        (broken / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=word):
            FAMILY.open(str(broken))


def test_networks_that_no_class_takes():
    with pytest.raises(ValueError, match="EncodecChunks"):
        Encodec(encodec(STEREO), "x")
    with pytest.raises(ValueError, match="audio_channels"):
        EncodecChunks(encodec(STEREO | {"audio_channels": 3}), "x")
    with pytest.raises(ValueError, match="target_bandwidths"):
        Encodec(encodec(CAUSAL | {"target_bandwidths": [0.1]}), "x")
