"""`Vocab`: packing is exact, layouts are what their definition says, and an id out of place is named."""

from __future__ import annotations

import random
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmtok.tokens import Tokens, TokensError, TokenSpec
from mmtok.vocab import LAYOUTS, Grammar, Vocab

sys.path.insert(0, str(Path(__file__).parent / "vocab"))

from vocab_cases import QUICK, ByteTokenizer, assert_same, cases, cells_by_definition, spec_of, tokens_of


def reads(vocab: Vocab, ids: list[int]) -> str | None:
    """None where unpack takes the ids, else its error, which must be of the announced type and name a position."""
    try:
        vocab.unpack(ids)
    except TokensError as e:
        error = str(e)
    else:
        return None
    assert re.search(r"position \d+", error), error
    return error


def accepts(vocab: Vocab, ids: list[int]) -> bool:
    grammar = Grammar(vocab)
    try:
        for i in ids:
            grammar.push(i)
    except TokensError:
        return False
    return grammar.complete


# ------------------------------------------------------------------------------------------------------- round trip


@QUICK
@given(cases())
def test_unpack_gives_back_every_segment_exactly(case):
    vocab, parts = case
    ids = vocab.pack(parts)
    assert all(type(i) is int for i in ids)
    got = vocab.unpack(ids)
    assert len(got) == len(parts)
    for mine, part in zip(got, parts, strict=True):
        assert_same(mine, part)
    assert vocab.pack(got) == ids


@QUICK
@given(cases())
def test_without_header_the_codes_come_back_and_nothing_else(case):
    vocab, parts = case
    ids = vocab.pack(parts, header=False)
    assert not any(i in vocab.ranges["byte"] for i in ids)
    for mine, part in zip(vocab.unpack(ids), parts, strict=True):
        if not isinstance(part, Tokens):
            assert mine == part
            continue
        assert mine.side == {}
        T, strides = int(part.lengths[0]), part.spec.level_strides
        if T == 0:
            assert mine.codes.shape[2] == 0
            continue
        assert mine.spec == part.spec
        assert torch.equal(mine.codes[:, :, :T], part.codes)
        assert int(mine.lengths[0]) == min(-(-T // s) * s for s in strides)  # the last code fills its stride


def test_a_header_of_plain_sizes_is_short():
    spec = spec_of("audio", (1024,) * 8)
    side = {"num_samples": torch.tensor([48_001]), "sample_rate": torch.tensor([16_000]), "channels": torch.tensor([1])}
    vocab = Vocab(100, audio=spec)
    tokens = tokens_of(spec, 150, side=side)
    assert len(vocab.pack([tokens])) - len(vocab.pack([tokens], header=False)) == 1 + 4 + 4 + 2


def test_padding_is_not_written_and_items_of_a_batch_pack_one_by_one():
    spec = spec_of("image", (5, 6))
    vocab = Vocab(10, image=spec)
    batch = Tokens.concat([tokens_of(spec, 3, 1), tokens_of(spec, 5, 2)])
    with pytest.raises(ValueError, match=r"one item, got 2; pack tokens\[i\]"):
        vocab.pack([batch])
    for i in range(2):
        assert_same(vocab.unpack(vocab.pack([batch[i]]))[0], batch[i])
    padded = Tokens(batch.codes[:1], batch.lengths[:1], spec)
    assert vocab.pack([padded]) == vocab.pack([batch[0]])


def test_a_tensor_an_array_and_a_list_of_ids_unpack_alike():
    spec = spec_of("image", (5, 6))
    vocab = Vocab(10, image=spec)
    ids = vocab.pack([[1, 2], tokens_of(spec, 3)])
    for form in (ids, tuple(ids), np.array(ids, np.uint16), torch.tensor(ids)):
        assert_same(vocab.unpack(form)[1], tokens_of(spec, 3))


def test_texts_are_joined_and_empty_ones_vanish():
    spec = spec_of("image", (5,))
    vocab, tokens = Vocab(ByteTokenizer(), image=spec), tokens_of(spec, 2)
    parts = vocab.unpack(vocab.pack(["", "a ", ", b", tokens, tokens, "", "c"]))
    assert [p if isinstance(p, str) else "T" for p in parts] == ["a , b", "T", "T", "c"]
    assert vocab.pack([[104, 105], "!"]) == vocab.pack(["hi!"])
    plain = Vocab(10, image=spec)
    assert plain.unpack(plain.pack([[], [1], [2, 3], tokens, []]))[0] == [1, 2, 3]
    assert plain.pack([]) == [] and plain.unpack([]) == []


# ---------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("name", sorted(LAYOUTS))
@pytest.mark.parametrize("T", [0, 1, 2, 5, 8])
@pytest.mark.parametrize("strides", [(1,), (1, 1), (1, 1, 1, 1), (4, 2, 1), (2, 3)])
def test_layouts_follow_their_definition(name, T, strides):
    if "delay" in name:
        strides = (1,) * len(strides)
    spec = spec_of("audio", (3, 5, 7, 11)[: len(strides)], strides)
    vocab, tokens = Vocab(20, audio=spec, layout=name), tokens_of(spec, T, seed=T)
    want = [
        vocab.ranges["audio_pad"].start
        if cell is None
        else vocab.ranges[f"audio_{cell[0]}"][int(tokens.codes[0, cell[0], cell[1]])]
        for cell in cells_by_definition(name, strides, T)
    ]
    assert vocab.pack([tokens], header=False)[1:-1] == want


def test_the_written_form_stays_what_it_is():
    spec = spec_of("audio", (4, 4, 4), (1, 1, 1))
    tokens = Tokens(
        torch.tensor([[[0, 1], [2, 3]]]), torch.tensor([2]), spec.keep(2), {"num_samples": torch.tensor([300])}
    )
    # text 0..9, bytes 10..265, <audio> 266, </audio> 267, pad 268, levels from 269, 273, 277
    header = [10 + b for b in (2, 0, 2, 2, 0xD8, 0x04)]  # 2 entries: levels = 2; num_samples = 300 (zigzag 600)
    bodies = {
        "flatten": [269, 275, 270, 276],
        "coarse_first": [269, 270, 275, 276],
        "delay": [269, 268, 270, 275, 268, 276],
        "partial_delay": [269, 268, 270, 275, 268, 276],
        "delay:0,0,7": [269, 275, 270, 276],
        "delay:1,0,1": [268, 275, 269, 276, 270, 268],
        "frame:1,0,2": [275, 269, 276, 270],
    }
    for layout, body in bodies.items():
        assert Vocab(10, audio=spec, layout=layout).pack([[7], tokens]) == [7, 266, *header, *body, 267]


def test_a_million_codes_pack_and_unpack_without_a_loop_over_codes():
    spec = spec_of("audio", (1024,) * 8)
    tokens = tokens_of(spec, 125_000)
    for layout in LAYOUTS:
        vocab = Vocab(1000, audio=spec, layout=layout)
        start = time.process_time()
        ids = vocab.pack([tokens])
        packed = time.process_time()
        (got,) = vocab.unpack(ids)
        unpacked = time.process_time()
        assert isinstance(got, Tokens) and torch.equal(got.codes, tokens.codes)
        assert packed - start < 1.0 and unpacked - packed < 1.5, layout


# ---------------------------------------------------------------------------------------------------------- grammar


@QUICK
@given(cases(), st.booleans(), st.integers(0, 2**32))
def test_every_id_of_a_packed_sequence_is_allowed_and_an_illegal_one_is_named(case, header, seed):
    (vocab, parts), rng = case, random.Random(seed)
    ids = vocab.pack(parts, header=header)
    grammar, own = vocab.grammar(), vocab.grammar(header=header)
    for n, i in enumerate(ids):
        assert any(i in r for r in own.allowed())
        mask = grammar.mask()
        assert mask[i]
        if not mask.all() and rng.random() < 0.2:
            illegal = rng.choice(torch.nonzero(~mask).flatten().tolist())
            assert f"position {n}: expected " in (reads(vocab, [*ids[:n], illegal, *ids[n + 1 :]]) or "accepted")
        grammar.push(i)
        own.push(i)
    assert grammar.complete and own.complete
    cut = rng.randrange(len(ids) + 1)
    mask = torch.zeros(vocab.size, dtype=torch.bool)
    for r in accepted_after(vocab, ids[:cut]):
        mask[list(r)] = True
    assert torch.equal(vocab.allowed(ids[:cut]), mask)


def accepted_after(vocab: Vocab, prefix: list[int]) -> list[range]:
    grammar = vocab.grammar()
    for i in prefix:
        grammar.push(i)
    return grammar.allowed()


@QUICK
@given(cases(), st.integers(0, 2**32))
def test_damage_is_an_error_with_a_position_or_a_legal_sequence_and_the_grammar_agrees(case, seed):
    (vocab, parts), rng = case, random.Random(seed)
    ids = vocab.pack(parts, header=rng.random() < 0.5)
    for _ in range(20):
        bad, n = list(ids), rng.randrange(len(ids) + 1)
        kind = rng.choice(["delete", "replace", "cut", "swap", "insert"])
        if kind == "delete":
            del bad[n : n + rng.choice([1, 1, 2])]
        elif kind == "replace" and n < len(bad):
            bad[n] = rng.choice([*ids, rng.randrange(vocab.size)])
        elif kind == "cut":
            bad = bad[:n]
        elif kind == "swap" and n + 1 < len(bad):
            bad[n], bad[n + 1] = bad[n + 1], bad[n]
        else:
            bad.insert(n, rng.randrange(vocab.size))
        error = reads(vocab, bad)
        assert (error is None) == accepts(vocab, bad), error


@QUICK
@given(cases(text=False), st.sampled_from([None, True, False]), st.integers(0, 2**32))
def test_whatever_the_grammar_lets_a_model_write_can_be_read(case, header, seed):
    (vocab, _), rng = case, random.Random(seed)
    grammar, ids = vocab.grammar(header=header), []
    for step in range(120):
        legal = grammar.allowed()
        ends = [r for r in legal if any(r.start == b.end for b in vocab.blocks.values())]
        chosen = ends[0] if ends and (step > 60 or rng.random() < 0.3) else rng.choice(legal)
        pick = rng.choice([0, 1, 2, 4, 8, 128, 255])  # mostly small bytes, so that headers end
        ids.append(chosen[min(len(chosen) - 1, pick)])
        grammar.push(ids[-1])
        if grammar.complete and step > 60:
            break
    assert (reads(vocab, ids) is None) == grammar.complete


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_pinning_the_number_of_levels_closes_the_choice(layout):
    spec = spec_of("audio", (4, 4, 4))
    vocab = Vocab(10, audio=spec, layout=layout)
    for k in (1, 2, 3):
        ids = vocab.pack([tokens_of(spec, 2).keep(num_codebooks=k)], header=False)
        for n, i in enumerate(ids):
            assert vocab.allowed(ids[:n], header=False, num_codebooks={"audio": k})[i]
        other = 3 if k == 2 else 2
        with pytest.raises(TokensError, match="position"):
            vocab.unpack(ids[:-2])
        with pytest.raises(TokensError, match="position"):
            vocab.allowed(ids, header=False, num_codebooks={"audio": other})
    first = vocab.allowed([vocab.ranges["<audio>"].start], header=False)
    assert not first[list(vocab.ranges["byte"])].any() and first[list(vocab.ranges["audio_0"])].all()
    must = vocab.allowed([vocab.ranges["<audio>"].start], header=True)
    assert torch.equal(must.nonzero().flatten(), torch.tensor(list(vocab.ranges["byte"])))
    with pytest.raises(ValueError, match="at most"):
        vocab.grammar(num_codebooks={"audio": 4})


# ----------------------------------------------------------------------------------------------------- ranges, names


def test_ranges_are_disjoint_cover_the_vocab_and_have_unique_strings():
    image, audio = spec_of("image", (300, 7)), spec_of("audio", (5, 2**17, 9) + (2,) * 8)
    vocab = Vocab(ByteTokenizer(), image=image, audio=audio)
    covered = [i for r in vocab.ranges.values() for i in r]
    assert covered == list(range(vocab.size))
    assert list(vocab.ranges)[:7] == ["text", "byte", "<image>", "</image>", "image_pad", "image_0", "image_1"]
    strings = vocab.token_strings()
    assert len(strings) == len(set(strings)) == vocab.size - vocab.text_size
    at = {s: n + vocab.text_size for n, s in enumerate(strings)}
    assert at["<|image_0_00017|>"] == vocab.ranges["image_0"][17]
    assert at["<|byte_003|>"] == vocab.ranges["byte"][3]
    assert at["<|audio_01_000017|>"] == vocab.ranges["audio_01"][17]
    assert at["</audio>"] == vocab.ranges["</audio>"].start and at["<|image_pad|>"] == vocab.ranges["image_pad"].start
    assert "image=" in repr(vocab) and re.search(r"image_1 +\d+ \.\. +\d+ +7 ids", vocab.describe())


def test_adding_audio_leaves_the_ids_of_text_and_images_alone():
    image, audio = spec_of("image", (300, 7)), spec_of("audio", (5, 2))
    alone, both = Vocab(50, image=image), Vocab(50, image=image, audio=audio)
    assert all(both.ranges[name] == r for name, r in alone.ranges.items())
    assert Vocab(50).size == 50 and Vocab(50).unpack([3, 4]) == [[3, 4]]


# ----------------------------------------------------------------------------------------------------------- errors


def small() -> tuple[Vocab, TokenSpec, TokenSpec]:
    image, audio = spec_of("image", (5, 6, 7)), spec_of("audio", (4, 4))
    return Vocab(10, image=image, audio=audio, layout={"audio": "delay"}), image, audio


def test_an_id_out_of_place_is_named_with_what_was_expected():
    vocab, image, audio = small()
    ids = vocab.pack([[1, 2], tokens_of(image, 4)], header=False)
    level2, other = vocab.ranges["image_2"], vocab.ranges["audio_1"][3]
    assert ids[8] in level2
    ids[8] = other
    want = rf"position 8: expected image level 2 \({level2[0]}..{level2[-1]}\), got {other} \(audio level 1, code 3\)"
    with pytest.raises(TokensError, match=want):
        vocab.unpack(ids)
    end, begin = vocab.ranges["</image>"].start, vocab.ranges["<audio>"].start
    for ids, want in [
        ([1, end], rf"position 1: expected text \(0..9\) or <image> .* got {end} \(</image>\)"),
        ([begin, 3], r"position 1: expected .*audio level 0.*, got 3 \(text\)"),
        ([begin, begin], r"position 1: expected .*, got \d+ \(<audio>\)"),
        ([begin], "position 1: the sequence ends inside the segment that opens at position 0, expected .*</audio>"),
        (vocab.pack([[1], tokens_of(audio, 3)])[:-1], "ends inside the segment that opens at position 1"),
        ([1, vocab.size], rf"position 1: expected an integer in 0..{vocab.size - 1}, got {vocab.size}"),
        ([1, 2, -1], "position 2: .*, got -1"),
        ([1, 2.5], "position 1: .*, got 2.5"),
        ([1, None], "position 1: .*, got None"),
        ([True], "position 0: .*, got True"),
        ([0, 2**70], "position 1"),
        ([2**63, -1], "position 0"),
        ([[1], [2]], "flat list of ids, got list with 2 axes"),
        ([[1], [2, 3]], "flat list"),
        ("abc", "flat list of ids, got str"),
        (torch.tensor([1.0]), "position 0: .*, got 1.0"),
    ]:
        with pytest.raises(TokensError, match=want):
            vocab.unpack(ids)
    with pytest.raises(TokensError, match="position 1"):
        vocab.allowed([1, end])


def test_foreign_or_malformed_tokens_are_refused():
    vocab, image, audio = small()
    good = tokens_of(image, 3)
    renamed = TokenSpec("other", "image", (5, 6, 7), num_tokens=64, fingerprint=image.fingerprint)
    out_of_range = Tokens(torch.full((1, 3, 2), 6), torch.tensor([2]), image)
    strided = spec_of("audio", (4, 4), (2, 1))
    ragged = Tokens(torch.tensor([[[0, 1], [2, 3]]]), torch.tensor([2]), strided)
    for parts, want in [
        ([tokens_of(spec_of("image", (5, 6, 7), name="y"), 3)], "fingerprint imagey"),
        ([tokens_of(renamed, 3)], "expected Tokens of .*image-x.*, got .*other"),
        ([tokens_of(spec_of("audio", (4, 4, 4)), 3)], "expected a prefix of"),
        ([out_of_range], "level 0, position 0: expected 0..4, got 6"),
        ([[10]], "segment 0: .*position 0: expected an integer in 0..9, got 10"),
        ([good, [3, -1]], "segment 1: .*position 1: .*got -1"),
        ([good, None], "segment 1: expected str, Tokens or a flat list of text ids, got NoneType"),
        (["hello"], "segment 0: expected a list of ids .*no tokenizer.*'hello'"),
        ("hello", "expected a list of segments, got one str"),
        (good, "expected a list of segments, got one Tokens"),
    ]:
        with pytest.raises(ValueError, match=want):
            vocab.pack(parts)
    with pytest.raises(TokensError, match="no audio ids; build it with audio="):
        Vocab(10, image=image).pack([tokens_of(audio, 3)])
    with pytest.raises(TokensError, match="level 0 has stride 2, expected position 1 to repeat the code of position 0"):
        Vocab(10, audio=strided).pack([ragged])


def test_text_that_encodes_to_ids_past_the_vocab_is_refused():
    """A tokenizer that was extended after the vocab was made turns a marker in a user's text into a real marker."""
    spec = spec_of("image", (5,))

    class Extended(ByteTokenizer):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [600] if text == "<image>" else super().encode(text, add_special_tokens)

    with pytest.raises(TokensError, match=r"segment 0: .*0..255, got 600"):
        Vocab(Extended(), image=spec).pack(["<image>", tokens_of(spec, 2)])


def test_side_entries_that_no_header_can_hold_are_refused_and_pack_without_header():
    spec = spec_of("image", (5,))
    vocab = Vocab(10, image=spec)
    for side, want in [
        ({"x" * 256: torch.zeros(1)}, "256 bytes"),
        ({"deep": torch.zeros((1,) * 9)}, "at most 8 axes"),
        ({"vast": torch.zeros(1, 0, 2**41)}, "under"),
        ({str(n): torch.zeros(1) for n in range(256)}, "at most 253 entries"),
    ]:
        with pytest.raises(TokensError, match=want):
            vocab.pack([tokens_of(spec, 2, side=side)])
        assert len(vocab.pack([tokens_of(spec, 2, side=side)], header=False)) == 4


def test_what_a_vocab_cannot_be_built_from_is_refused():
    image, audio = spec_of("image", (5, 6)), spec_of("audio", (4, 4), (2, 1))
    for kwargs, want in [
        ({"text": -1}, "text: expected a number of ids >= 0"),
        ({"text": True}, "text: expected"),
        ({"text": 5, "image": audio}, "image: expected the spec of an image tokenizer"),
        ({"text": 5, "image": "image-x"}, "image: expected the spec"),
        ({"text": 5, "image": image, "layout": "snake"}, "layout: expected one of .*coarse_first.*, got 'snake'"),
        ({"text": 5, "image": image, "layout": {"audio": "delay"}}, r"only modalities with a spec \['image'\]"),
        ({"text": 5, "audio": audio, "layout": "delay"}, r"strides \(2, 1\); use flatten or coarse_first"),
        ({"text": 5, "image": spec_of("image", (2**20 + 1,))}, "split large codes .*bits_per_code"),
        ({"text": 5, "image": spec_of("image", (2,) * 256)}, "at most 255 levels"),
    ]:
        with pytest.raises(ValueError, match=want):
            Vocab(**kwargs)
    assert Vocab(5, image=spec_of("image", (2**20,))).size == 5 + 256 + 3 + 2**20


def test_a_damaged_header_length_does_not_allocate():
    spec = spec_of("image", (5,))
    vocab = Vocab(10, image=spec)
    byte, begin, end = (vocab.ranges[n].start for n in ("byte", "<image>", "</image>"))
    for huge in ([0xFF] * 8 + [0x7F], [0x80] * 6 + [1]):  # 2 ** 63 - 1 and 2 ** 42 positions
        ids = [begin, *(byte + b for b in (1, 1, *huge)), vocab.ranges["image_0"][2], end]
        assert f"position {len(ids) - 1}: expected image level 0" in (reads(vocab, ids) or "")
    raw = [begin, *(byte + b for b in (1, 128, 0, 1, 1, 0xFF, 0xFF, 0xFF, 0x7F, 5)), end]
    assert f"position {len(raw) - 1}: expected byte" in (reads(vocab, raw) or "")


def test_a_header_with_a_byte_too_many_or_a_bool_that_is_none_is_refused():
    spec = spec_of("image", (5,))
    vocab = Vocab(10, image=spec)
    byte, begin, code, end = (vocab.ranges[n].start for n in ("byte", "<image>", "image_0", "</image>"))
    flag = [byte + b for b in (1, 128, 1, 102, 0, 0)]  # one entry, named, 1 letter: "f", bool, no further axes
    (tokens,) = vocab.unpack([begin, *flag, byte + 1, code, end])
    assert_same(tokens, Tokens(torch.zeros(1, 1, 1).long(), torch.tensor([1]), spec, {"f": torch.tensor([True])}))
    assert f"position 7: expected byte ({byte}..{byte + 1})" in (
        reads(vocab, [begin, *flag, byte + 2, code, end]) or ""
    )
    longer = [begin, *flag, byte + 1, byte + 1, code, end]
    assert re.search(r"position 8: expected .* image level 0 .* got 11 \(byte\)", reads(vocab, longer) or "")


def test_random_ids_never_crash():
    vocab, image, audio = small()
    rng = random.Random(0)
    legal = vocab.pack([[3], tokens_of(image, 3), tokens_of(audio, 2)])
    read = sum(reads(vocab, [rng.choice(legal) for _ in range(rng.randrange(6))]) is None for _ in range(2000))
    assert 0 < read < 2000
