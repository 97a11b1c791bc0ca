"""`Vocab.salvage`: what unpack reads comes back untouched; of the rest what is valid, and a report of all else."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vocab_cases import QUICK, ByteTokenizer, assert_same, cases, spec_of, tokens_of

from mmtok.tokens import Tokens, TokensError
from mmtok.vocab import Salvaged, Vocab
from mmtok.vocab.salvage import KINDS, POLICIES


def damaged(ids: list[int], size: int, rng: random.Random, alien: bool) -> list[int]:
    """``ids`` with one to three things wrong."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        n = rng.randrange(len(ids) + 1)
        other = rng.choice([-1, size, 2**70]) if alien and rng.random() < 0.3 else rng.randrange(size)
        ids = rng.choice(
            [
                ids[:n],
                ids[n:],
                ids[:n] + ids[n + rng.choice([1, 2]) :],
                [*ids[:n], other, *ids[n:]],
                [*ids[:n], other, *ids[n + 1 :]],
                ids[:n] + [rng.choice(ids or [0]) for _ in range(3)] + ids[n:],
            ]
        )
    return ids


def codes_of(parts: list) -> int:
    """Codes that are written for these Tokens."""
    return sum(-(-int(p.lengths[0]) // s) for p in parts if isinstance(p, Tokens) for s in p.spec.level_strides)


def small(layout: str = "flatten") -> tuple[Vocab, Tokens]:
    """4 levels of 5 codes, 10 ids of text; 6 positions whose first codes are 0."""
    spec = spec_of("audio", (5,) * 4)
    tokens = tokens_of(spec, 6, 1, {"num_samples": torch.tensor([1900])})
    tokens.codes[0, :, 0] = 0
    return Vocab(10, audio=spec, layout=layout), tokens


def only(salvaged: Salvaged) -> Tokens:
    (tokens,) = salvaged.parts
    assert isinstance(tokens, Tokens)
    return tokens


# --------------------------------------------------------------------------------------------------------------- laws


@QUICK
@given(cases(), st.booleans(), st.sampled_from(POLICIES))
def test_what_pack_makes_comes_back_as_from_unpack_with_an_empty_report(case, header, policy):
    vocab, parts = case
    ids = vocab.pack(parts, header)
    salvaged = vocab.salvage(ids, policy)
    assert salvaged.report.ok and salvaged.report.items == () and salvaged.report.dropped == 0
    for mine, want in zip(salvaged.parts, vocab.unpack(ids), strict=True):
        assert_same(mine, want)


@QUICK
@given(cases(), st.booleans(), st.sampled_from(POLICIES), st.integers(0, 2**32))
def test_damage_is_survived_accounted_for_and_what_is_left_packs_again(case, header, policy, seed):
    (vocab, parts), rng = case, random.Random(seed)
    packed = vocab.pack(parts, header)
    for _ in range(15):
        ids = damaged(packed, vocab.size, rng, alien=True)
        salvaged = vocab.salvage(ids, policy)
        report = salvaged.report
        again = vocab.pack(salvaged.parts)
        if vocab.tokenizer is None:  # the bytes of a text that lost some need not be UTF-8
            for mine, want in zip(vocab.unpack(again), salvaged.parts, strict=True):
                assert_same(mine, want)
        assert report.ok == is_whole(vocab, ids)
        text = [i for i in ids if 0 <= i < vocab.text_size]
        if vocab.tokenizer is None:
            assert [i for p in salvaged.parts if isinstance(p, list) for i in p] == text
        # each id is text, or of a segment that is kept (its codes, header, pads and markers), or dropped
        lost = [i for i in ids if not 0 <= i < vocab.size]
        assert len(lost) <= report.dropped <= len(ids) - len(text) - codes_of(salvaged.parts)
        for item in report.items:
            assert item.kind in KINDS and 0 <= item.start <= item.position <= len(ids)
            assert (item.kind == "cut") == (item.position == len(ids)) or item.kind == "header"
            assert item.dropped >= 0 and str(item.position) in str(item) and str(item) in str(report)
        if policy == "drop":
            assert sum(item.kept for item in report.items) == 0
        else:
            assert sum(item.kept for item in report.items) <= codes_of(salvaged.parts)


def is_whole(vocab: Vocab, ids: list[int]) -> bool:
    try:
        vocab.unpack(ids)
    except TokensError:
        return False
    return True


@QUICK
@given(cases(), st.booleans(), st.integers(0, 2**32))
def test_a_cut_anywhere_keeps_the_beginning_of_what_was_there(case, header, seed):
    (vocab, parts), rng = case, random.Random(seed)
    ids = vocab.pack(parts, header)
    whole = vocab.unpack(ids)
    for n in {rng.randrange(len(ids) + 1) for _ in range(8)}:
        salvaged = vocab.salvage(ids[:n])
        assert len(salvaged.report.items) <= 1 and len(salvaged.parts) <= len(whole)
        for mine, want in zip(salvaged.parts, whole, strict=False):
            if isinstance(want, Tokens) and isinstance(mine, Tokens):
                (Q, T), most = mine.codes.shape[1:], want.codes.shape[2]
                assert mine.spec == want.spec.keep(Q)
                assert most + max(mine.spec.level_strides) > T  # the last code fills its stride
                assert torch.equal(mine.codes[:, :, :most], want.codes[:, :Q, :T])
        for item in salvaged.report.items:
            assert item.kind == "cut" and item.position == n and item.found == "the end of the sequence"
            assert item.kept == codes_of(salvaged.parts[-1:]) or item.kept == 0
            pads = sum(i in {b.pad for b in vocab.blocks.values()} for i in ids[item.start : n])
            head = sum(i in vocab.ranges["byte"] for i in ids[item.start : n])
            assert item.dropped == n - item.start - (item.kept + pads + head + 1 if item.kept else 0)


@QUICK
@given(st.lists(st.integers(-3, 310) | st.sampled_from([2**63, 2**64, -(2**80)]), max_size=40), st.booleans())
def test_any_list_of_integers_is_read(ids, strings):
    spec = spec_of("audio", (3, 3))
    vocab = Vocab(ByteTokenizer() if strings else 20, audio=spec, layout="delay")
    salvaged = vocab.salvage(ids)
    vocab.pack(salvaged.parts)
    unknown = sum(not 0 <= i < vocab.size for i in ids)
    assert salvaged.report.dropped >= unknown


# -------------------------------------------------------------------------------------------------------- each repair


def test_hanging_codes_of_a_frame_go_and_code_0_stays():
    """Orpheus' decoder takes an id for a code where code > 0, which moves every later code to another place."""
    vocab, tokens = small()
    zeros = Tokens(torch.zeros(1, 4, 6).long(), torch.tensor([6]), tokens.spec)
    for part in (tokens, zeros):
        ids = vocab.pack([[1], part], header=False)
        salvaged = vocab.salvage([*ids[:-4], ids[-1]])  # three codes of the last frame lack
        assert salvaged.parts[0] == [1] and torch.equal(salvaged.parts[1].codes, part.codes[:, :, :5])
        (item,) = salvaged.report.items
        assert (item.kind, item.position, item.start, item.dropped, item.kept) == ("incomplete", 23, 1, 1, 20)
        assert item.expected.startswith("audio level 1 (") and item.found.endswith("(</audio>)")
        assert str(salvaged.report) == (
            "1 id dropped, 1 damaged place\n"
            f"  position 23 (segment at 1): incomplete: expected audio level 1 ({vocab.ranges['audio_1'][0]}.."
            f"{vocab.ranges['audio_1'][-1]}), got {ids[-1]} (</audio>); 1 id dropped, 20 codes kept"
        )
    assert str(vocab.salvage(ids).report) == "nothing dropped"


@pytest.mark.parametrize(
    ("layout", "cut", "shape"),
    [
        ("flatten", 9, (4, 2)),  # 9 codes: two frames, one hanging
        ("delay", 4 * 7 + 2, (4, 4)),  # after step 7: level 3 has four codes
        ("delay", 4 * 5, (3, 3)),  # nine codes of three levels are more than eight of four
        ("delay:0,0,1,2", 4 * 5, (4, 3)),
        ("coarse_first", 6 + 6 + 2, (2, 6)),  # all of two levels rather than two positions of three
        ("coarse_first", 6 + 6 + 5, (3, 5)),
        ("coarse_first", 4, (1, 4)),
        ("frame:3,2,1,0,0,1,2,3", 13, (4, 3)),
    ],
)
def test_a_cut_segment_keeps_the_positions_that_are_whole(layout, cut, shape):
    vocab, tokens = small(layout)
    for header in (True, False):
        ids = vocab.pack([tokens, [3]], header)
        head = 1 + sum(i in vocab.ranges["byte"] for i in ids)
        got = only(vocab.salvage(ids[: head + cut]))
        Q, T = shape
        assert torch.equal(got.codes, tokens.codes[:, :Q, :T])
        assert got.side == (tokens.side if header else {})  # decode gives the beginning, as after keep(num_tokens=)
        assert vocab.salvage(ids[: head + cut], "drop").parts == []


def test_a_missing_end_marker_costs_nothing_where_the_codes_are_whole():
    vocab, tokens = small()
    ids = vocab.pack([tokens])[:-1]
    for after in ([3, 4], vocab.pack([tokens])):
        salvaged = vocab.salvage([*ids, *after])
        assert_same(salvaged.parts[0], tokens)
        assert len(salvaged.parts) == 2
        (item,) = salvaged.report.items
        assert (item.kind, item.position, item.dropped, item.kept) == ("unended", len(ids), 0, 24)


def test_text_in_the_middle_ends_the_segment_and_is_kept():
    vocab, tokens = small()
    ids = vocab.pack([tokens], header=False)
    salvaged = vocab.salvage([*ids[:10], 5, 6, *ids[10:], 7])
    assert torch.equal(salvaged.parts[0].codes, tokens.codes[:, :, :2]) and salvaged.parts[1] == [5, 6, 7]
    kinds = [(item.kind, item.position, item.dropped, item.kept) for item in salvaged.report.items]
    assert kinds == [("unended", 10, 1, 8), ("stray", 12, 16, 0)]
    assert salvaged.report.dropped == 17


@pytest.mark.parametrize("what", ["level", "image", "unknown", "byte"])
def test_an_id_of_another_kind_in_the_middle_costs_the_rest_of_the_segment(what):
    audio, image = spec_of("audio", (5,) * 2), spec_of("image", (6,))
    vocab = Vocab(10, image=image, audio=audio)
    tokens, picture = tokens_of(audio, 4), tokens_of(image, 3)
    ids = vocab.pack([tokens, [9], picture], header=False)
    odd = {"level": ids[5], "image": vocab.ranges["image_0"][2], "unknown": -7, "byte": vocab.ranges["byte"][2]}[what]
    salvaged = vocab.salvage([*ids[:6], odd, *ids[6:]])
    first, text, last = salvaged.parts
    assert torch.equal(first.codes, tokens.codes[:, :, :2]) and text == [9]
    assert_same(last, picture)
    (item,) = salvaged.report.items
    assert item.kind == ("unknown" if what == "unknown" else "misplaced") and item.position == 6
    assert (item.dropped, item.kept) == (5, 4)  # one code that hangs, the odd one, three codes after it
    assert item.found.startswith(f"{odd} (" if what != "unknown" else "-7 (no id of this vocab)")


def test_a_damaged_header_costs_its_side_entries_and_not_the_codes():
    vocab, tokens = small("delay")
    ids, byte = vocab.pack([tokens]), vocab.ranges["byte"]
    head = sum(i in byte for i in ids)
    worse = {
        "no such field": [*ids[:2], byte[77], *ids[3:]],
        "a byte lacks": ids[:head] + ids[head + 1 :],
        "a byte too many": [*ids[: head + 1], byte[0], *ids[head + 1 :]],
        "not an id": [*ids[:3], 10**9, *ids[4:]],
    }
    for what, bad in worse.items():
        got = vocab.salvage(bad)
        assert torch.equal(only(got).codes, tokens.codes) and only(got).side == {}, what
        (item,) = got.report.items
        assert item.kind == "header" and item.kept == 24 and item.dropped == len(bad) - (len(ids) - head), what
        assert vocab.salvage(bad, "drop").parts == [] and vocab.salvage(bad, "drop").report.dropped == len(bad)
    cut = vocab.salvage([*worse["no such field"][:-9], 4])  # and the codes are cut
    assert torch.equal(cut.parts[0].codes, tokens.codes[:, :, :4]) and cut.parts[1] == [4]
    assert [(item.kind, item.kept) for item in cut.report.items] == [("header", 0), ("unended", 16)]


def test_a_header_that_contradicts_whole_codes_is_not_believed():
    vocab, tokens = small()
    byte = vocab.ranges["byte"].start
    bare = vocab.pack([tokens], header=False)
    lies = [byte + b for b in (1, 0, 2)]  # one entry: two levels
    salvaged = vocab.salvage([bare[0], *lies, *bare[1:]])
    assert torch.equal(only(salvaged).codes, tokens.codes)
    (item,) = salvaged.report.items
    assert (item.kind, item.position, item.dropped, item.kept) == ("header", 6, 3, 24)
    assert item.found.endswith("(audio level 2, code 0)")
    long = [byte + b for b in (2, 1, 9, 2, 8)]  # a length of 9 where there are 6, and num_samples = 4
    salvaged = vocab.salvage([bare[0], *long, *bare[1:]])
    assert torch.equal(only(salvaged).codes, tokens.codes) and only(salvaged).side["num_samples"].tolist() == [4]
    (item,) = salvaged.report.items
    assert (item.kind, item.dropped, item.kept) == ("incomplete", 0, 24)


def test_nothing_valid_is_nothing_kept():
    vocab, _ = small()
    begin, end, byte = (vocab.ranges[n].start for n in ("<audio>", "</audio>", "byte"))
    level = [vocab.ranges[f"audio_{q}"].start for q in range(4)]
    for ids, kinds, text in [
        ([begin], ["cut"], []),
        ([begin, byte + 1], ["cut"], []),
        ([begin, level[1], level[2], end, 3], ["misplaced"], [[3]]),
        ([begin, byte + 9, 3], ["unended"], [[3]]),
        ([begin, begin, 3], ["unended", "unended"], [[3]]),
        ([end, level[0], byte, -1, -2, level[0], 3], ["stray", "unknown", "stray"], [[3]]),
        ([1, 99_999, 2], ["unknown"], [[1, 2]]),
    ]:
        salvaged = vocab.salvage(ids)
        assert salvaged.parts == text and [item.kind for item in salvaged.report.items] == kinds, ids
        assert salvaged.report.dropped == len(ids) - sum(map(len, text))
    assert Vocab(0).salvage([5]).report.items[0].expected == "nothing"
    assert len(only(vocab.salvage([begin, end])).codes[0, 0]) == 0  # an empty segment is one that unpack reads


def test_pinned_levels_refuse_a_beginning_with_fewer():
    vocab, tokens = small()
    ids = vocab.pack([tokens], header=False)
    assert only(vocab.salvage(ids[:4])).spec.num_codebooks == 3
    four = {"audio": 4}
    assert vocab.salvage(ids[:4], num_codebooks=four).parts == []
    assert_same(only(vocab.salvage(ids[:7], num_codebooks=four)), tokens_cut(tokens, 1))
    fewer = vocab.pack([tokens.keep(num_codebooks=2)], header=False)
    assert vocab.salvage(fewer).report.ok and not vocab.salvage(fewer, num_codebooks=four).report.ok
    headed = vocab.pack([tokens.keep(num_codebooks=2)])  # a header says itself how many
    assert vocab.salvage(headed, num_codebooks=four).report.ok


def tokens_cut(tokens: Tokens, T: int) -> Tokens:
    cut = tokens.keep(num_tokens=T)
    return Tokens(cut.codes, cut.lengths, cut.spec)


def test_what_is_no_list_of_integers_and_no_policy_is_refused():
    vocab, _ = small()
    for ids in ([1, 2.5], ["a"], [[1], [2]], torch.tensor([1.0]), [None]):
        with pytest.raises(TokensError, match="expected a flat list of ids"):
            vocab.salvage(ids)
    for ids in ([], np.array([3, -4]), torch.tensor([3, 4]), (1,), np.array([2**64 - 1], np.uint64)):
        vocab.salvage(ids)
    with pytest.raises(ValueError, match="policy: expected one of repair, drop, got 'mend'"):
        vocab.salvage([1], "mend")
    with pytest.raises(ValueError, match="num_codebooks: expected at most"):
        vocab.salvage([1], num_codebooks={"audio": 9})


def test_long_damage_takes_no_longer_than_its_length():
    vocab, tokens = small()
    long = tokens_of(tokens.spec, 4_000)
    ids = vocab.pack([long], header=False)
    start = time.process_time()
    salvaged = vocab.salvage(ids[:-2])
    many = vocab.salvage(ids[:6] * 1000)
    strays = vocab.salvage(ids[1:-1])
    mixed = vocab.salvage([ids[5], -1] * 5_000)
    assert time.process_time() - start < 3.0
    assert only(salvaged).codes.shape == (1, 4, 3_999)
    assert len(many.parts) == len(many.report.items) == 1000
    assert len(mixed.report.items) == mixed.report.dropped == 10_000
    assert strays.parts == [] and strays.report.dropped == 16_000 and len(strays.report.items) == 1
