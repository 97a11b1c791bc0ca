"""Presets: the ids are those that the systems were trained with, come back exactly, and a damaged one is named.

The numbers stand literally, with the section of the facts that they come from: "audio" is audio-codecs.md, "image" is
image-tokenizers.md.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mmtok
from mmtok.tokens import Tokens, TokensError, TokenSpec
from mmtok.vocab.frames import FlatPreset
from mmtok.vocab.presets import (
    PRESETS,
    YUE_BLOCKS,
    LaVIT,
    Llasa,
    Moshi,
    MusicGen,
    Orpheus,
    SeedLlama,
    YuEStage1,
    YuEStage2,
)

QUICK = settings(deadline=None, max_examples=40)
FLAT = ("seed-llama", "lavit", "orpheus", "llasa", "yue-stage-1", "yue-stage-2")


def audio(*sizes: int, strides: tuple[int, ...] = ()) -> TokenSpec:
    return TokenSpec("codec", "audio", sizes, strides, frame_rate=50.0, fingerprint="f")


def image(size: int, num_tokens: int) -> TokenSpec:
    return TokenSpec("pictures", "image", (size,), num_tokens=num_tokens, fingerprint="f")


PUBLISHED = {
    "seed-llama": image(8192, 32),
    "lavit": image(16_384, 256),
    "orpheus": audio(4096, 4096, 4096, strides=(4, 2, 1)),
    "llasa": audio(65_536),
    "yue-stage-1": audio(*[1024] * 8),
    "yue-stage-2": audio(*[1024] * 8),
    "musicgen": audio(*[2048] * 4),
    "moshi": audio(*[2048] * 8),
}
# the same conventions for codecs so small that a test model can have them
TINY = {
    "seed-llama": SeedLlama(image(5, 3), image_id_shift=10, begin=15, end=16, codebook_size=5, num_tokens=3),
    "lavit": LaVIT(image(5, 4), begin=7, end=8, first=9, codebook_size=5, num_tokens=4),
    "orpheus": Orpheus(audio(3, 3, 3, strides=(4, 2, 1)), text_size=20, end_of_text=9, codebook_size=3),
    "llasa": Llasa(audio(6), text_size=11, codebook_size=6),
    "yue-stage-1": YuEStage1(audio(3, 4), codebook_sizes=(3, 4)),
    "yue-stage-2": YuEStage2(audio(3, 4), codebook_sizes=(3, 4)),
    "musicgen": MusicGen(audio(4, 4, 4), codebook_sizes=(4, 4, 4)),
    "moshi": Moshi(audio(4, 4, 4), codebook_sizes=(4, 4, 4), text_size=12),
}


def batch_of(spec: TokenSpec, lengths: list[int], seed: int) -> Tokens:
    rng, T = np.random.default_rng(seed), max(lengths, default=0)
    rows = [
        np.repeat(rng.integers(0, k, (len(lengths), -(-T // s))), s, 1)[:, :T]
        for k, s in zip(spec.codebook_sizes, spec.level_strides, strict=True)
    ]
    n = torch.tensor(lengths, dtype=torch.int64)
    codes = torch.from_numpy(np.stack(rows, 1)) * (torch.arange(T) < n[:, None])[:, None]
    return Tokens(codes, n, spec)


def same(got: Tokens, want: Tokens) -> bool:
    """Whether codes, lengths and spec are equal; side entries aside."""
    return got.spec == want.spec and torch.equal(got.codes, want.codes) and torch.equal(got.lengths, want.lengths)


@st.composite
def flat_cases(draw: st.DrawFn, published: bool | None = None) -> tuple[FlatPreset, Tokens]:
    name = draw(st.sampled_from(FLAT))
    big = draw(st.booleans()) if published is None else published
    preset = PRESETS[name](PUBLISHED[name]) if big else TINY[name]
    assert isinstance(preset, FlatPreset)
    counts = preset.counts
    frames = draw(st.integers(0, 6) if counts is None else st.integers(counts[0], min(counts[-1], counts[0] + 6)))
    return preset, batch_of(preset.written, [frames * preset.positions] * preset.items, draw(st.integers(0, 99)))


# ---------------------------------------------------------------------------------------------------- published ids


def one(spec: TokenSpec, codes: list[list[int]]) -> Tokens:
    return Tokens(torch.tensor([codes]), torch.tensor([len(codes[0])]), spec)


def test_seed_llama_as_in_image_1_5():
    preset = SeedLlama(PUBLISHED["seed-llama"])
    assert preset.special == {"<img>": 40192, "</img>": 40193} and preset.size == 40194
    codes = [0, 8191, *range(30)]
    ids = preset.pack(one(preset.spec, [codes]))
    assert ids == [40192, 32000, 40191, *range(32000, 32030), 40193] and len(ids) == 34
    moved = SeedLlama(PUBLISHED["seed-llama"], begin=40193, end=40192)
    assert moved.pack(one(preset.spec, [codes])) == [40193, *ids[1:-1], 40192]


def test_lavit_as_in_image_2_4():
    preset = LaVIT(PUBLISHED["lavit"])
    assert preset.special == {"[IMG]": 32000, "[/IMG]": 32001}
    assert preset.pack(one(preset.spec, [[0, 16383, 7]])) == [32000, 32002, 48385, 32009, 32001]
    for n in (0, 1, 256):
        assert len(preset.pack(batch_of(preset.spec, [n], n))) == n + 2
    with pytest.raises(TokensError, match=r"expected 0\.\.256 codes, got 257 positions"):
        preset.pack(batch_of(preset.spec, [257], 0))


def test_orpheus_as_in_audio_13_2():
    preset = Orpheus(PUBLISHED["orpheus"])
    assert preset.special == {
        "start_of_speech": 128257,
        "end_of_speech": 128258,
        "start_of_human": 128259,
        "end_of_human": 128260,
        "start_of_ai": 128261,
        "end_of_text": 128009,
    }
    # c0, c1a, c2a, c2b, c1b, c2c, c2d = 1, 2, 4, 5, 3, 6, 7; then the smallest and the largest codes
    tokens = one(
        preset.spec,
        [
            [1, 1, 1, 1, 0, 0, 0, 0, 4095, 4095, 4095, 4095],
            [2, 2, 3, 3, 0, 0, 0, 0, 4095, 4095, 4095, 4095],
            [4, 5, 6, 7, 0, 0, 0, 0, 4095, 4095, 4095, 4095],
        ],
    )
    first = [128267, 132364, 136462, 140559, 144653, 148752, 152849]  # 128266 + place * 4096 + code
    zeros = [128266, 132362, 136458, 140554, 144650, 148746, 152842]
    last = [132361, 136457, 140553, 144649, 148745, 152841, 156937]
    assert preset.pack(tokens) == [128257, *first, *zeros, *last, 128258]
    assert same(preset.unpack([*first, *zeros, *last], markers=False), tokens)
    assert preset.size == 156938


def test_orpheus_has_none_of_the_bugs_in_audio_13_2():
    preset = Orpheus(PUBLISHED["orpheus"])
    zeros = [128266 + n * 4096 for n in range(7)]
    assert preset.unpack(zeros, markers=False).codes.tolist() == [[[0] * 4] * 3]  # 0 is a code
    want = r"position 1: expected a code of level 1 at place 1 \(132362\.\.136457\), got 136458"
    with pytest.raises(TokensError, match=want):  # 4096 is none
        preset.unpack([128266, 132362 + 4096, *zeros[2:]], markers=False)
    with pytest.raises(TokensError, match=r"position 10: expected a code of level 2 at place 3 .* got the end"):
        preset.unpack([*zeros, *zeros[:3]], markers=False)
    cut = preset.unpack([128257, *zeros, *zeros[:3]], partial="drop")
    assert cut.codes.shape == (1, 3, 4) and cut.side["dropped_ids"].tolist() == [3]
    with pytest.raises(TokensError, match=r"position 8: expected a code of level 1"):  # dropping is not repairing
        preset.unpack([*zeros, 128266, 5], markers=False, partial="drop")


def test_llasa_as_in_audio_13_2():
    preset = Llasa(PUBLISHED["llasa"])
    assert list(preset.special.values()) == list(range(128256, 128264))
    assert preset.special["<|TEXT_GENERATION_START|>"] == 128256
    assert preset.special["<|SPEECH_GENERATION_START|>"] == 128260
    assert preset.special["<|SPEECH_GENERATION_END|>"] == 128261
    assert preset.special["<|SPEECH_UNDERSTANDING_END|>"] == 128263
    assert preset.pack(one(preset.spec, [[0, 65535]])) == [128260, 128264, 193799, 128261]
    assert Llasa(PUBLISHED["llasa"], text_size=100).pack(one(preset.spec, [[3]])) == [104, 111, 105]


def test_the_blocks_of_yue_as_in_audio_13_2():
    assert [YUE_BLOCKS[n][0] for n in ("dac_16k", "dac_44k", "xcodec", "mert", "hubert")] == [
        32022,
        36118,
        45334,
        57622,
        58646,
    ]
    stops = [first + levels * size for first, levels, size in YUE_BLOCKS.values()]
    assert stops == [36118, 45334, 57622, 58646, 59158, 75542, 83734]  # each block begins where the last one stops


def test_stage_1_of_yue_as_in_audio_13_2():
    preset = YuEStage1(PUBLISHED["yue-stage-1"])
    assert [preset.special[n] for n in ("eod", "soa", "eoa", "stage_1", "xcodec", "stage_2")] == [
        32000,
        32001,
        32002,
        32013,
        32016,
        32017,
    ]
    spec = preset.spec.keep(1)
    tokens = Tokens(torch.tensor([[[0, 1, 2]], [[1023, 5, 6]]]), torch.tensor([3, 3]), spec)  # vocals, instruments
    body = [45334, 46357, 45335, 45339, 45336, 45340]
    assert preset.pack(tokens) == [32001, 32016, *body, 32002]
    assert same(preset.unpack([32001, 32016, *body, 32002]), tokens)
    cut = preset.unpack([32001, 32016, *body, 45334, 32002], partial="drop")  # a vocal code alone
    assert same(cut, tokens) and cut.side["dropped_ids"].tolist() == [1, 1]
    want = r"position 9: expected a code of level 0 of the instruments \(45334\.\.46357\), got 32002 \(eoa\)"
    with pytest.raises(TokensError, match=want):
        preset.unpack([32001, 32016, *body, 45334, 32002])
    mix = YuEStage1(PUBLISHED["yue-stage-1"], tracks=1)
    assert mix.pack(one(spec, [[0, 7]])) == [32001, 32016, 45334, 45341, 32002]


def test_stage_2_of_yue_as_in_audio_13_2():
    preset = YuEStage2(PUBLISHED["yue-stage-2"])
    assert preset.generated == range(46358, 53526)
    tokens = one(preset.spec, [[9 if q else 3, 1023 if q == 7 else q] for q in range(8)])
    frames = [45337, 46367, 47391, 48415, 49439, 50463, 51487, 52511]  # 45334 + level * 1024 + 3 or 9
    frames += [45334, 46359, 47384, 48409, 49434, 50459, 51484, 53525]  # level, but 1023 of the last
    ids = [32001, 32013, 45337, 45334, 32017, *frames]
    assert preset.pack(tokens) == ids
    assert preset.pack(tokens, markers=False) == frames
    assert same(preset.unpack(frames, markers=False), tokens)
    for n, value, want in [
        (2, 45338, "position 5: expected 45338, level 0 of frame 0 as at position 2, got 45337"),
        (
            4,
            32016,
            r"position 4: expected a code of level 0 \(45334..46357\) or stage_2 \(32017\), got 32016 \(xcodec\)",
        ),
        (8, 47391, r"position 8: expected a code of level 3 \(48406..49429\), got 47391"),
    ]:
        bad = [*ids]
        bad[n] = value
        with pytest.raises(TokensError, match=want):
            preset.unpack(bad)
    for partial, more in (("refuse", frames[8:]), ("drop", frames[8:9])):
        with pytest.raises(TokensError, match="position 21: expected the end of the sequence after 2 frames, got"):
            preset.unpack([*ids, *more], partial=partial)
    with pytest.raises(TokensError, match=r"position 13: expected a code of level 0 .* of frame 1 of 2, got the end"):
        preset.unpack(ids[:13])
    cut = preset.unpack(ids[:20], partial="drop")
    assert same(cut, tokens.keep(num_tokens=1))
    assert cut.side["dropped_ids"].tolist() == [7]


def test_musicgen_as_in_audio_13_2():
    preset, x = MusicGen(PUBLISHED["musicgen"]), 2048
    assert preset.special == {"special": 2048} and preset.delays == (0, 1, 2, 3)
    tokens = one(preset.spec, [[1, 2], [3, 4], [5, 6], [7, 2047]])
    table = [[[x, 1, 2, x, x, x], [x, x, 3, 4, x, x], [x, x, x, 5, 6, x], [x, x, x, x, 7, 2047]]]
    assert preset.pack(tokens).tolist() == table
    cut = preset.unpack(torch.tensor(table)[:, :, :5], partial="drop")
    assert same(cut, tokens.keep(num_tokens=1))
    assert cut.side["dropped_ids"].tolist() == [3]  # 2, 4 and 6 of the second position


def test_moshi_as_in_audio_13_2():
    preset = Moshi(PUBLISHED["moshi"])
    names = ("audio_initial", "text_initial", "text_pad", "text_end_pad", "zero", "ungenerated")
    assert [preset.special[n] for n in names] == [2048, 32000, 3, 0, -1, -2]
    assert preset.delays == (0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1)
    own = one(preset.spec, [[q, 10 + q] for q in range(8)])
    user = one(preset.spec, [[100 + q, 200 + q] for q in range(8)])
    ids = preset.pack(own, user, torch.tensor([[3, 31999]]))
    late = [[2048, 2048, q, 10 + q] for q in range(1, 8)]
    late_user = [[2048, 2048, 100 + q, 200 + q] for q in range(1, 8)]
    assert ids.tolist() == [
        [[32000, 3, 31999, -1], [2048, 0, 10, -1], *late, [2048, 100, 200, -1], *late_user],
    ]
    assert same(preset.unpack(ids), own) and same(preset.unpack(ids, stream="user"), user)
    assert preset.text(ids).tolist() == [[3, 31999]]
    alone = preset.pack(own)
    assert alone[:, [0, 9, 10]].tolist() == [[[32000, -1, -1, -1], [2048, -1, -1, -1], [2048, 2048, -1, -1]]]
    assert preset.unpack(alone, stream="user").lengths.tolist() == [0] and preset.text(alone).tolist() == [[-1, -1]]
    asked = preset.pack(own, missing="ungenerated")
    assert asked[:, [0, 9, 10]].tolist() == [[[32000, -2, -2, -1], [2048, -2, -2, -1], [2048, 2048, -2, -2]]]
    assert preset.unpack(asked, stream="user", partial="drop").lengths.tolist() == [0]
    cut = preset.unpack(ids[..., :-1], partial="drop")  # what the system itself keeps
    assert same(cut, own.keep(num_tokens=1)) and cut.side["dropped_ids"] == 1


# ------------------------------------------------------------------------------------------------------ round trips


@QUICK
@given(flat_cases())
def test_unpack_gives_back_what_was_packed(case):
    preset, tokens = case
    for markers in (True, False):
        ids = preset.pack(tokens, markers=markers)
        assert all(type(i) is int and 0 <= i < preset.size for i in ids)
        for form in (ids, np.array(ids, np.int32), torch.tensor(ids)):
            got = preset.unpack(form, markers=markers)
            assert same(got, tokens) and got.side == {}
        dropped = preset.unpack(ids, markers=markers, partial="drop")
        assert same(dropped, tokens) and dropped.side["dropped_ids"].tolist() == [0] * preset.items
    got.check(preset.spec)  # what decode asks first


@QUICK
@given(flat_cases(published=True), st.data())
def test_an_id_that_is_replaced_is_named_or_is_another_code(case, data):
    preset, tokens = case
    ids = preset.pack(tokens)
    n = data.draw(st.integers(0, len(ids) - 1))
    ids[n] = data.draw(st.sampled_from([0, -1, 31_999, 200_000, preset.special[(*preset.special,)[0]], ids[n] + 1]))
    try:
        got = preset.unpack(ids)
    except TokensError as e:
        at = int(str(e).removeprefix("position ").split(":")[0])
        # YuE's level 0 stands twice: the second of two that differ is named; a count or an end is named where it shows
        assert at in (n, n + 1) or (isinstance(preset, (YuEStage2, LaVIT, SeedLlama)) and n < at <= len(ids))
    else:
        assert preset.pack(got) == ids


@QUICK
@given(flat_cases(), st.data())
def test_a_sequence_cut_anywhere_is_refused_or_keeps_its_whole_frames(case, data):
    preset, tokens = case
    body = preset.pack(tokens, markers=False)
    whole = preset.pack(tokens)
    opening = len(whole) - len(body) - (preset.end is not None)
    n = data.draw(st.integers(opening, len(whole) - 1)) if len(whole) > opening else opening
    if n < len(whole):
        with pytest.raises(TokensError, match=rf"position {n}: expected .*, got the end of the sequence"):
            preset.unpack(whole[:n])
    frames, rest = divmod(n - opening, len(preset.cells))
    if isinstance(preset, SeedLlama) and frames < preset.counts[0]:
        with pytest.raises(TokensError, match="codes"):
            preset.unpack(whole[:n], partial="drop")
        return
    got = preset.unpack(whole[:n], partial="drop")
    assert got.side["dropped_ids"].tolist() == [rest] * preset.items
    assert torch.equal(got.codes, tokens.codes[:, :, : frames * preset.positions])


@QUICK
@given(st.sampled_from(["musicgen", "moshi"]), st.booleans(), st.lists(st.integers(0, 5), min_size=1, max_size=3))
def test_tables_come_back(name, published, lengths):
    preset = PRESETS[name](PUBLISHED[name]) if published else TINY[name]
    tokens, other = batch_of(preset.spec, lengths, 1), batch_of(preset.spec, lengths, 2)
    if isinstance(preset, Moshi):
        text = torch.arange(tokens.mask.numel()).view(tokens.mask.shape) % preset.text_size
        ids = preset.pack(tokens, other, text.int())
        assert ids.shape == (len(lengths), 1 + 2 * preset.spec.num_codebooks, max(lengths) + 2)
        assert torch.equal(preset.text(ids), torch.where(tokens.mask, text, -1))
        assert same(preset.unpack(ids, stream="user"), other)
        drop = preset.unpack(ids, partial="drop")
    else:
        assert isinstance(preset, MusicGen)
        ids = preset.pack(tokens)
        drop = preset.unpack(ids, partial="drop")
    assert same(preset.unpack(ids), tokens) and same(drop, tokens)
    assert drop.side["dropped_ids"].tolist() == [0] * len(lengths)


def test_ids_of_a_shipped_codec_decode_to_the_same_sound():
    """Ours has the shape of the codec that YuE reads: 8 levels of 1024 codes, 50 frames a second."""
    tok = mmtok.load("audio-xcodec-16k-4kbps")
    preset = YuEStage2(tok.spec)
    tokens = tok.encode(torch.sin(torch.arange(3200) * 0.1)[None, None], sample_rate=16_000)
    sound = tok.decode(preset.unpack(preset.pack(tokens)))
    assert sound.shape == (1, 1, 3200) and torch.equal(sound, tok.decode(tokens))


def test_segments_finds_the_marked_parts_of_a_document():
    preset = TINY["lavit"]
    assert isinstance(preset, LaVIT)
    a, b = batch_of(preset.spec, [2], 0), batch_of(preset.spec, [0], 1)
    ids = [1, 2, *preset.pack(a), 3, *preset.pack(b)]
    got = [preset.unpack(ids[s]) for s in preset.segments(ids)]
    assert len(got) == 2 and same(got[0], a) and same(got[1], b)
    assert preset.segments([1, 2]) == [] and preset.segments(np.array(ids)) == preset.segments(torch.tensor(ids))
    for bad, want in [
        ([1, 8], r"position 1: expected \[IMG\] \(7\), got 8 \(\[/IMG\]\)"),
        ([7, 9, 7], r"position 2: expected \[/IMG\] \(8\), got 7"),
        ([7, 9], r"position 2: expected \[/IMG\] \(8\) of the segment that opens at position 0, got the end"),
    ]:
        with pytest.raises(TokensError, match=want):
            preset.segments(bad)
    (open_one,) = preset.segments([1, 7, 9], partial="drop")
    assert preset.unpack([1, 7, 9][open_one], partial="drop").codes.tolist() == [[[0]]]
    stage_2 = TINY["yue-stage-2"]
    assert isinstance(stage_2, YuEStage2)
    with pytest.raises(ValueError, match="no begin and end marks"):
        stage_2.segments(ids)


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_the_spec_of_another_codec_is_refused(name):
    good = PUBLISHED[name]
    K, Q = good.codebook_sizes[0], good.num_codebooks
    for spec in (image(K + 1, 32), image(2, 3), audio(*[K] * Q, strides=(3,) * Q), audio(*[K] * (Q + 1)), "codec"):
        with pytest.raises(ValueError, match=rf"expected the spec of a tokenizer with .*\({K}.*, got .*spec.keep\(n\)"):
            PRESETS[name](spec)
    assert sorted(PRESETS) == sorted(PUBLISHED) and PRESETS[name].__doc__
    assert "arXiv" in PRESETS[name].__doc__ or "canopyai/Orpheus-TTS" in PRESETS[name].__doc__


def test_ids_out_of_place_are_named():
    seed, lavit = SeedLlama(PUBLISHED["seed-llama"]), LaVIT(PUBLISHED["lavit"])
    codes = [*range(32000, 32032)]
    for preset, ids, want in [
        (seed, [*codes, 40193], r"position 0: expected <img> \(40192\), got 32000"),
        (seed, [], r"position 0: expected <img> \(40192\), got the end of the sequence"),
        (seed, [40192, 5, 40193], r"position 1: expected an image code \(32000\.\.40191\), got 5"),
        (seed, [40192, *codes[:20], 40193], r"position 21: expected 32 codes, 20 were read, got 40193 \(</img>\)"),
        (seed, [40192, *codes, 32000, 40193], "position 33: expected 32 codes, 33 were read, got 32000"),
        (seed, [40192, *codes, 40193, 7], "position 34: expected the end of the sequence, got 7"),
        (seed, [40192, *codes], r"position 33: expected an image code .* or </img> \(40193\), got the end"),
        (lavit, [32000, 48386, 32001], r"position 1: expected an image code \(32002\.\.48385\), got 48386"),
        (lavit, [32000, 32000], r"position 1: expected an image code .*, got 32000 \(\[IMG\]\)"),
        (lavit, [[1], [2, 3]], "flat list of integers, got list of several axes"),
        (lavit, [32000, 1.5], "flat list of integers, got float64"),
        (lavit, torch.tensor([[1]]), "flat list of integers, got int64 with 2 axes"),
    ]:
        with pytest.raises(TokensError, match=want):
            preset.unpack(ids)
    for call in (lavit.unpack, lavit.segments):
        with pytest.raises(ValueError, match="partial: expected 'refuse' or 'drop', got 'repair'"):
            call([32000, 32001], partial="repair")


def test_tokens_that_the_convention_cannot_write_are_refused():
    orpheus, stage_1 = Orpheus(PUBLISHED["orpheus"]), YuEStage1(PUBLISHED["yue-stage-1"])
    good = batch_of(orpheus.spec, [4], 0)
    uneven = Tokens(good.codes.clone(), good.lengths, good.spec)
    uneven.codes[0, 1] = torch.tensor([1, 1, 2, 3])
    stereo = Tokens(good.codes, good.lengths, good.spec, {"channels": torch.tensor([2])})
    foreign = TokenSpec("other", "audio", (4096,) * 3, (4, 2, 1), 50.0, fingerprint="g")
    level_0 = stage_1.spec.keep(1)
    for preset, tokens, want in [
        (orpheus, batch_of(orpheus.spec, [6], 0), "expected whole frames of 4 positions, got 6 positions"),
        (orpheus, batch_of(orpheus.spec, [4, 4], 0), r"expected Tokens of 1 item\(s\), got 2; tokens\[i\]"),
        (orpheus, good.keep(num_codebooks=2), "expected Tokens of .*, got "),
        (orpheus, uneven, "level 1 has stride 2, expected position 3 to repeat the code of position 2, 2, got 3"),
        (orpheus, stereo, r"expected mono sound, got \[2\] channels"),
        (orpheus, Tokens(good.codes, good.lengths, foreign), r"ids of 'other' \(fingerprint g\), not of 'codec' \(f\)"),
        (orpheus, Tokens(good.codes + 4096, good.lengths, good.spec), r"level 0, position 0: expected 0\.\.4095"),
        (orpheus, [1, 2], "expected Tokens, got list"),
        (stage_1, batch_of(stage_1.spec, [4, 4], 0), r"tokens.keep\(num_codebooks=1\) has the first levels"),
        (stage_1, batch_of(level_0, [4, 3], 0), r"expected tracks of one length, got \[4, 3\] positions"),
        (stage_1, batch_of(level_0, [4], 0), r"expected Tokens of 2 item\(s\), got 1"),
    ]:
        with pytest.raises(ValueError, match=want):
            preset.pack(tokens)


def test_special_ids_that_are_codes_or_equal_are_refused():
    with pytest.raises(
        ValueError, match=r"special ids \['<img>'\]: expected none among the codes \['32000\.\.40191'\]"
    ):
        SeedLlama(PUBLISHED["seed-llama"], begin=32_005)
    with pytest.raises(ValueError, match="expected each to differ"):
        LaVIT(PUBLISHED["lavit"], end=32_000)
    with pytest.raises(ValueError, match="num_tokens = 32, got 64"):
        SeedLlama(image(8192, 64))
    with pytest.raises(ValueError, match="tracks: expected 1"):
        YuEStage1(PUBLISHED["yue-stage-1"], tracks=3)
    with pytest.raises(ValueError, match=r"codebook_sizes: expected one size.*, got \(4, 5\)"):
        MusicGen(audio(4, 5), codebook_sizes=(4, 5))


def test_damaged_tables_are_named():
    musicgen, moshi = TINY["musicgen"], TINY["moshi"]
    assert isinstance(musicgen, MusicGen) and isinstance(moshi, Moshi)
    tokens = batch_of(musicgen.spec, [3, 2], 0)
    table = musicgen.pack(tokens)
    table[1, 2, 4] = 9
    with pytest.raises(TokensError, match=r"item 1, level 2, step 4: expected the code of position 1 in 0\.\.3, got 9"):
        musicgen.unpack(table)
    with pytest.raises(
        TokensError, match=r"item 1, level 2, step 4: expected a code in 0\.\.3 or an empty cell, got 9"
    ):
        musicgen.unpack(table, partial="drop")
    ids = moshi.pack(tokens)
    for place, value, want in [
        ((0, 0, 0), 3, "item 0, stream 0, step 0: expected 12, got 3"),
        ((1, 0, 2), 12, r"item 1, stream 0, step 2: expected text in 0\.\.11, got 12"),
    ]:
        bad = ids.clone()
        bad[place] = value
        with pytest.raises(TokensError, match=want):
            moshi.text(bad)
    for call, want in [
        (lambda: moshi.unpack(ids[:, 1:]), r"expected \(B, 7, S\), got \(2, 6, 5\)"),
        (lambda: moshi.unpack(ids, stream="text"), "stream: expected 'own' or 'user', got 'text'"),
        (lambda: moshi.pack(tokens, missing="none"), "missing: expected 'zero' or 'ungenerated'"),
        (
            lambda: moshi.pack(tokens, batch_of(moshi.spec, [3, 3], 0)),
            r"user: expected .* lengths \[3, 2\], got .*3, 3",
        ),
        (
            lambda: moshi.pack(tokens, text=torch.zeros(2, 2).long()),
            r"text: expected integers \(2, 3\), got .*\(2, 2\)",
        ),
        (
            lambda: moshi.pack(tokens, text=torch.full((2, 3), 12)),
            r"text: item 0, position 0: expected 0\.\.11, got 12",
        ),
    ]:
        with pytest.raises(ValueError, match=want):
            call()
