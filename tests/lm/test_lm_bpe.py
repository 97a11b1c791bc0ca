"""`CodeBPE`: exact both ways, never across items or (by choice) frames, and damage is named."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmtok.tokenizer import Tokenizer
from mmtok.tokens import Tokens, TokensError, TokenSpec
from mmtok.vocab import Vocab

pytest.importorskip("tokenizers")
from mmtok.lm.bpe import LENGTH, MAX_ALPHABET, CodeBPE, _cells, _text
from mmtok.lm.bpe_tokenizer import BPETokenizer

QUICK = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])


def spec_of(
    sizes: tuple[int, ...], strides: tuple[int, ...] = (), modality: str = "audio", name: str = "x"
) -> TokenSpec:
    rate, count = (50.0, None) if modality == "audio" else (None, 64)
    return TokenSpec(f"{modality}-{name}", modality, sizes, strides, rate, count, (), name)


def tokens_of(spec: TokenSpec, lengths: list[int], seed: int = 0, words: int = 6) -> Tokens:
    """Items made of a few words of four positions, so that there is something to join."""
    rng = np.random.default_rng(seed)
    T = max(lengths, default=0)
    book = np.random.default_rng(99).integers(0, 2**31, (words, 4, spec.num_codebooks))
    codes = np.zeros((len(lengths), spec.num_codebooks, T), np.int64)
    for b, n in enumerate(lengths):
        raw = book[rng.integers(0, words, n // 4 + 1)].reshape(-1, spec.num_codebooks)[:n]
        for q, (k, s) in enumerate(zip(spec.codebook_sizes, spec.level_strides, strict=True)):
            codes[b, q, :n] = np.repeat(raw[::s, q] % k, s)[:n]
    side = {"num_samples": torch.arange(len(lengths)) + 7}
    return Tokens(torch.from_numpy(codes), torch.tensor(lengths, dtype=torch.int64), spec, side)


def assert_same(got: Tokens, want: Tokens) -> None:
    assert got.spec == want.spec and torch.equal(got.lengths, want.lengths) and torch.equal(got.codes, want.codes)
    assert list(got.side) == list(want.side) and all(torch.equal(got.side[k], v) for k, v in want.side.items())


SPECS = {
    "one level": spec_of((40,)),
    "three levels": spec_of((16, 8, 11)),
    "snac": spec_of((16, 16, 16), (4, 2, 1)),
    "no level everywhere": spec_of((16, 9), (4, 2)),
    "picture": spec_of((32, 5), modality="image"),
}


@pytest.fixture(scope="module", params=[(name, whole) for name in SPECS for whole in (True, False)], ids=str)
def bpe(request: pytest.FixtureRequest) -> CodeBPE:
    name, whole = request.param
    spec = SPECS[name]
    return CodeBPE.train(
        [tokens_of(spec, [60, 33, 48], s) for s in range(4)], spec, sum(spec.codebook_sizes) + 60, whole
    )


def spelled(bpe: CodeBPE) -> list[np.ndarray]:
    """The levels that each id spells."""
    return [bpe._spell([i])[0] for i in range(bpe.size)]


# ------------------------------------------------------------------------------------------------------- round trip


@QUICK
@given(data=st.data())
def test_round_trip_of_any_tokens(bpe, data):
    spec = bpe.base
    lengths = data.draw(st.lists(st.integers(0, 23), min_size=1, max_size=4))
    tokens = tokens_of(spec, lengths, data.draw(st.integers(0, 999)), words=data.draw(st.sampled_from([6, 5000])))
    packed = bpe.as_tokens(tokens)
    packed.check(bpe.spec)
    assert bpe.spec.modality == spec.modality and packed.codes.shape[:2] == (len(lengths), 1)
    back = bpe.from_tokens(packed)
    assert_same(back, tokens)
    for b, T in enumerate(lengths):
        one = tokens[b]
        ids = bpe.encode(one)
        assert ids == packed.codes[b, 0, : packed.lengths[b]].tolist()  # an item's ids do not hang on its neighbours
        assert_same(bpe.decode(ids, length=T, side=one.side), one)
        if 1 in spec.level_strides:
            assert_same(bpe.decode(torch.tensor(ids, dtype=torch.int64), side=one.side), one)


def test_through_a_vocab_and_its_grammar(bpe):
    spec = bpe.base
    vocab = Vocab(text=50, **{spec.modality: bpe.spec})
    assert len(vocab.ranges[f"{spec.modality}_0"]) == bpe.size
    tokens = tokens_of(spec, [21], 5)
    for header in (True, False):
        ids = vocab.pack([[1, 2], bpe.as_tokens(tokens), [3]], header=header)
        parts = vocab.unpack(ids)
        assert parts[0] == [1, 2] and parts[2] == [3]
        if header:
            assert_same(bpe.from_tokens(parts[1]), tokens)
        elif 1 in spec.level_strides:
            assert torch.equal(bpe.from_tokens(parts[1]).codes, tokens.codes)
        grammar = vocab.grammar()
        for i in ids:
            assert bool(grammar.mask()[i])
            grammar.push(i)
        assert grammar.complete


def test_fewer_ids_than_codes_and_the_measure_is_their_ratio(bpe):
    items = [tokens_of(bpe.base, [40, 0, 17], s) for s in (50, 51)]
    ids = sum(len(bpe.encode(t[b])) for t in items for b in range(3))
    T = torch.tensor([40, 0, 17])
    codes = 2 * sum(int((-(-T // s)).sum()) for s in bpe.base.level_strides)
    assert bpe.compression(iter(items)) == ids / codes < 0.6
    with pytest.raises(ValueError, match="got none"):
        bpe.compression([tokens_of(bpe.base, [0])])


def test_first_ids_are_the_single_codes(bpe):
    first = np.cumsum([0, *bpe.base.codebook_sizes])
    for i in range(first[-1]):
        level, code = bpe._spell([i])
        assert len(level) == 1 and first[level[0]] + code[0] == i
    assert first[-1] + 10 < bpe.size <= first[-1] + 60
    assert len(bpe.spec.fingerprint) == 16 and bpe.spec.fingerprint != bpe.base.fingerprint


def test_rates_of_the_spec_are_the_largest_that_occur():
    made = CodeBPE(SPECS["snac"], [], True)
    assert made.spec.frame_rate == pytest.approx(50 * (1 / 4 + 1 / 2 + 1)) and made.spec.num_tokens is None
    made = CodeBPE(SPECS["picture"], [], True)
    assert made.spec.num_tokens == 128 == len(made.encode(tokens_of(SPECS["picture"], [64])))
    assert made.spec.frame_rate is None


# ------------------------------------------------------------------------------------------------------------ frames


def test_no_id_straddles_a_frame(bpe):
    cycle = bpe._order.tolist()
    inside = {tuple(cycle[a:b]) for a in range(len(cycle)) for b in range(a + 1, len(cycle) + 1)}
    for levels in spelled(bpe):
        whole = len(levels) % len(cycle) == 0 and levels.tolist() == cycle * (len(levels) // len(cycle))
        assert whole or tuple(levels.tolist()) in inside or not bpe.whole_frames


def test_whole_frames_join_frames_too():
    spec = SPECS["three levels"]
    made = CodeBPE.train([tokens_of(spec, [200], 1)], spec, 35 + 60, whole_frames=True)
    assert any(len(levels) > 3 for levels in spelled(made))
    assert any(len(levels) == 2 for levels in spelled(made))


def test_any_merge_straddles_frames_and_whole_frames_does_not():
    """The last code of a frame tells the first of the next one; the two inside a frame are independent."""
    rng = np.random.default_rng(0)
    spec = spec_of((16, 16))
    last = rng.integers(0, 16, 400)
    codes = torch.from_numpy(np.stack([np.append(0, last[:-1]), last]))[None]
    items = [Tokens(codes, torch.tensor([400]), spec)]
    free, whole = (CodeBPE.train(items, spec, 32 + 16, flag) for flag in (False, True))
    assert sum(levels.tolist() == [1, 0] for levels in spelled(free)) == 16
    assert not any(levels.tolist()[:2] == [1, 0] for levels in spelled(whole))
    assert free.compression(items) < whole.compression(items)


def test_frames_that_cannot_be_told_apart_are_refused():
    spec = spec_of((8, 8, 8), (1, 1, 3))  # levels 0 1 2 0 1 0 1 | 0 1 2: from 1 to 0 inside and between frames
    items = [tokens_of(spec, [30])]
    with pytest.raises(ValueError, match=r"\(1, 1, 3\).*whole_frames=False"):
        CodeBPE.train(items, spec, 40)
    made = CodeBPE.train(items, spec, 40, whole_frames=False)
    assert_same(made.from_tokens(made.as_tokens(items[0])), items[0])


def test_merges_never_cross_items():
    """Level 0 always ends in 5 and begins with 3: the pair (5, 3) is at every seam and nowhere else."""
    spec = spec_of((8,))
    codes = torch.tensor([3, 1, 2, 5]).repeat(50, 1, 1)
    made = CodeBPE.train([Tokens(codes, torch.full((50,), 4), spec)], spec, 8 + 20)
    texts = [made._spell([i])[1].tolist() for i in range(made.size)]
    assert [3, 1, 2, 5] in texts
    assert max(map(len, texts)) == 4 and made.size == 8 + 3


# ------------------------------------------------------------------------------------------------------------ damage


@QUICK
@given(data=st.data())
def test_salvage_keeps_whole_frames_and_names_every_other_code(bpe, data):
    ids = data.draw(st.lists(st.integers(0, bpe.size - 1), max_size=30))
    level, code = bpe._spell(ids)
    found = bpe.salvage(ids)
    kept = bpe.encode(found.tokens)
    again = bpe._spell(kept)[0]
    assert len(again) + len(found.dropped) == len(level)  # nothing is lost unsaid
    gone = [n for n, _, _ in found.dropped]
    assert [(n, int(level[n]), int(code[n])) for n in gone] == found.dropped and gone == sorted(set(gone))
    rest = np.delete(np.arange(len(level)), gone)
    assert np.array_equal(level[rest], again) and np.array_equal(code[rest], bpe._spell(kept)[1])
    assert bool(found.report) == bool(gone)
    if not gone:
        assert torch.equal(bpe.decode(ids).codes, found.tokens.codes)
    else:
        with pytest.raises(TokensError, match="salvage"):
            bpe.decode(ids)


def test_salvage_of_known_damage():
    made = CodeBPE(spec_of((4, 4, 4)), [], True)  # ids = 4 * level + code
    good, hanging = [0, 5, 10], [1, 6]
    found = made.salvage([9, *good, *hanging, *good, 2])
    assert found.tokens.codes.tolist() == [[[0, 0], [1, 1], [2, 2]]]
    assert found.dropped == [(0, 2, 1), (4, 0, 1), (5, 1, 2), (9, 0, 2)]
    assert len(found.report) == 3 and "2 hanging codes from number 4 on (levels 0 1)" in found.report[1]
    with pytest.raises(TokensError, match=r"code 0 .* expected level 0, got level 2"):
        made.decode([9, *good])
    with pytest.raises(TokensError, match=r"code 4 .* expected level 1, got the end after 4 codes"):
        made.decode([*good, 0])
    with pytest.raises(TokensError, match="expected 2 positions"):
        made.decode(good, length=2)
    snac = CodeBPE(spec_of((4, 4, 4), (4, 2, 1)), [], True)
    found = snac.salvage([0, 4, 8, 9, 5])  # two whole positions, and the beginning of a third
    assert found.tokens.lengths.tolist() == [2] and found.dropped == [(4, 1, 1)]


def test_salvage_of_what_a_model_has_written_so_far_is_a_stream(bpe):
    """Each id more gives the same positions and perhaps new ones; the last gives all."""
    tokens = tokens_of(bpe.base, [24], 3)
    ids = bpe.encode(tokens)
    steps = [bpe.salvage(ids[:n]).tokens for n in range(len(ids) + 1)]
    for one in steps:
        T = min(int(one.lengths[0]), 24)  # with coarse levels only, the last position may stand for several
        assert torch.equal(one.codes[0, :, :T], tokens.codes[0, :, :T])
    lengths = [int(one.lengths[0]) for one in steps]
    assert lengths == sorted(lengths) and lengths[0] == 0 and lengths[-1] == 24


@pytest.mark.parametrize("bad", [[99_999], [-1], [[1]], [0.5]])
def test_ids_that_are_none_are_refused(bad):
    made = CodeBPE(spec_of((4, 4)), [], True)
    with pytest.raises(TokensError, match=r"0\.\.7|flat list"):
        made.salvage(bad)


def test_foreign_tokens_are_refused(bpe):
    tokens = tokens_of(bpe.base, [8])
    other = CodeBPE(bpe.base, bpe.merges[:-1], True)
    with pytest.raises(TokensError, match="fingerprint"):
        other.from_tokens(bpe.as_tokens(tokens))
    alien = spec_of(bpe.base.codebook_sizes, bpe.base.level_strides, bpe.base.modality, "y")
    with pytest.raises(TokensError, match="fingerprint"):
        bpe.encode(tokens_of(alien, [8]))
    with pytest.raises(TokensError, match="got 2; encode"):
        bpe.encode(tokens_of(bpe.base, [8, 8]))
    if bpe.base.num_codebooks > 1:
        with pytest.raises(TokensError, match="train a BPE of that spec"):
            bpe.encode(tokens.keep(num_codebooks=1))
    if max(bpe.base.level_strides) > 1:
        tokens.codes[0, 0, 1] ^= 1
        with pytest.raises(TokensError, match="level 0 has stride 4"):
            bpe.encode(tokens)


# ---------------------------------------------------------------------------------------------- training and keeping


def test_training_is_deterministic_and_survives_the_disk(bpe, tmp_path):
    spec = bpe.base
    items = [tokens_of(spec, [60, 33, 48], s) for s in range(4)]
    again = CodeBPE.train(iter(items), spec, sum(spec.codebook_sizes) + 60, bpe.whole_frames)
    assert again.merges == bpe.merges and again.spec == bpe.spec
    bpe.save(tmp_path / "bpe")
    loaded = CodeBPE.load(tmp_path / "bpe")
    assert (loaded.spec, loaded.base, loaded.merges) == (bpe.spec, bpe.base, bpe.merges)
    assert loaded.whole_frames == bpe.whole_frames and repr(loaded) == repr(bpe)
    assert loaded.encode(items[0][0]) == bpe.encode(items[0][0])
    assert sorted(p.name for p in (tmp_path / "bpe").iterdir()) == ["bpe.json", "tokenizer.json"]


def test_tokenizer_json_alone_is_the_same_encoding(bpe, tmp_path):
    from tokenizers import Tokenizer

    bpe.save(tmp_path)
    tokens = tokens_of(bpe.base, [30], 8)
    hf = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert hf.encode(bpe._strings(tokens)[0], add_special_tokens=False).ids == bpe.encode(tokens)


def test_files_of_two_trainings_are_refused(tmp_path):
    spec = SPECS["one level"]
    items = [tokens_of(spec, [60])]
    CodeBPE.train(items, spec, 50).save(tmp_path)
    old = (tmp_path / "tokenizer.json").read_bytes()
    CodeBPE.train(items, spec, 45).save(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(old)
    with pytest.raises(ValueError, match=r"damaged or mixed BPE files \(tokenizer.json gives"):
        CodeBPE.load(tmp_path)
    broken = json.loads(old)
    broken["model"]["merges"].insert(0, ["a", "b"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(broken))
    with pytest.raises(ValueError, match="damaged or mixed BPE files"):
        CodeBPE.load(tmp_path)
    (tmp_path / "bpe.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no bpe\.json"):
        CodeBPE.load(tmp_path)


def test_what_cannot_be_trained_is_refused():
    spec = SPECS["three levels"]
    with pytest.raises(ValueError, match=r"vocab_size: expected 35 .* got 34"):
        CodeBPE.train([tokens_of(spec, [9])], spec, 34)
    with pytest.raises(ValueError, match="got none"):
        CodeBPE.train([tokens_of(spec, [0])], spec, 40)
    with pytest.raises(ValueError, match="min_count"):
        CodeBPE.train([tokens_of(spec, [9])], spec, 40, min_count=1)
    with pytest.raises(ValueError, match=f"at most {MAX_ALPHABET} codes .* got {2 * 65_535}.*keep fewer levels"):
        CodeBPE(spec_of((65_535, 65_535)), [], True)


def test_characters_are_private_and_fill_both_planes():
    cells = np.array([0, 65_533, 65_534, MAX_ALPHABET - 1])
    assert [ord(c) for c in _text(cells)] == [0xF0000, 0xFFFFD, 0x100000, 0x10FFFD]
    assert np.array_equal(_cells(_text(cells)), cells)
    made = CodeBPE(spec_of((65_536, 65_532)), [], True)
    tokens = Tokens(torch.tensor([[[0, 65_535], [0, 65_531]]]), torch.tensor([2]), made.base)
    assert made.encode(tokens) == [0, 65_536, 65_535, 131_067]
    assert_same(made.decode(made.encode(tokens)), tokens)


def test_lengths_that_strides_leave_open_travel_beside_the_ids():
    made = CodeBPE(SPECS["no level everywhere"], [], True)
    assert made.as_tokens(tokens_of(made.base, [5, 6])).side[LENGTH].tolist() == [5, 6]
    assert LENGTH not in made.as_tokens(tokens_of(made.base, [8, 6])).side
    assert made.decode(made.encode(tokens_of(made.base, [5]))).lengths.tolist() == [6]


class Countdown(Tokenizer):
    """Sound of one channel whose codes are its samples, level 1 those of level 0 backwards."""

    modality = "audio"
    sample_rate = 50

    def base_spec(self) -> TokenSpec:
        return TokenSpec("", "audio", (16, 16), (), 50.0)

    def encode(self, x, sample_rate=None, text=None, num_codebooks=None, num_tokens=None) -> Tokens:
        assert sample_rate == 50 and text is None
        codes = torch.stack([x, 15 - x], 1)[..., :num_tokens]
        tokens = Tokens(codes, torch.full((len(x),), codes.shape[2]), self.spec)
        return tokens.keep(num_codebooks) if num_codebooks else tokens

    def decode(self, tokens, text=None, size=None, generator=None) -> torch.Tensor:
        tokens.check(self.spec)
        return tokens.codes[:, 0]


def test_a_tokenizer_and_its_bpe_are_a_tokenizer():
    tok = Countdown({})
    tok.name = "countdown"
    x = torch.randint(0, 16, (3, 40), generator=torch.Generator().manual_seed(0))
    whole = BPETokenizer(tok, CodeBPE.train([tok.encode(x, 50)], tok.spec, 32 + 16))
    tokens = whole.encode(x, sample_rate=50)
    assert tokens.spec == whole.spec == whole.bpe.spec and whole.sample_rate == 50
    assert tokens.lengths.tolist() == [40, 40, 40]  # each frame became one id
    assert torch.equal(whole.decode(tokens), x)
    assert torch.equal(whole.decode(whole.encode(x, 50, num_tokens=7)), x[:, :7])
    with pytest.raises(TokensError, match="num_codebooks: expected 1 or None, got 2"):
        whole.encode(x, 50, num_codebooks=2)
    coarse = BPETokenizer(tok, CodeBPE(tok.spec.keep(1), [], True))
    assert torch.equal(coarse.decode(coarse.encode(x, 50)), x)
    with pytest.raises(TokensError, match="train it on this tokenizer's"):
        BPETokenizer(tok, CodeBPE(SPECS["one level"], [], True))


def test_an_empty_batch_goes_through(bpe):
    none = tokens_of(bpe.base, [])
    assert_same(bpe.from_tokens(bpe.as_tokens(none)), none)


def test_speed_is_far_above_what_a_corpus_needs():
    spec = spec_of((64, 64))
    items = [tokens_of(spec, [2000], s, words=40) for s in range(10)]  # 40,000 codes
    start = time.process_time()
    made = CodeBPE.train(items, spec, 128 + 256)
    assert time.process_time() - start < 5  # measured: 0.2 s
    start = time.process_time()
    packed = [made.as_tokens(t) for t in items]
    for one in packed:
        made.from_tokens(one)
    assert time.process_time() - start < 2  # measured: 0.05 s
