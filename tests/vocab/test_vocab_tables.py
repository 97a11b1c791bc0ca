"""Tables of one row a level: they are what their definition says, come back exactly, and name a damaged cell."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtok.tokens import Tokens, TokensError, TokenSpec
from mmtok.vocab.tables import code_mask, from_tables, to_tables, valid_steps

QUICK = settings(deadline=None, max_examples=40)


def spec_of(*sizes: int, strides: tuple[int, ...] = ()) -> TokenSpec:
    return TokenSpec("codec", "audio", sizes, strides, frame_rate=50.0, fingerprint="f")


def batch_of(spec: TokenSpec, lengths: list[int], T: int, seed: int = 0) -> Tokens:
    rng = np.random.default_rng(seed)
    codes = np.stack([rng.integers(0, k, (len(lengths), T)) for k in spec.codebook_sizes], 1)
    n = torch.tensor(lengths, dtype=torch.int64)
    codes = torch.from_numpy(codes) * (torch.arange(T) < n[:, None])[:, None]
    return Tokens(codes, n, spec)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tokens, dict]:
    spec = spec_of(*draw(st.lists(st.sampled_from([2, 3, 7, 1031]), min_size=1, max_size=5)))
    Q, T = spec.num_codebooks, draw(st.integers(0, 6))
    lengths = draw(st.lists(st.integers(0, T), min_size=1, max_size=4))
    outside = st.sampled_from([-100, -2, -1, 1031, 1032, 50_000])
    ids = st.none() | outside | st.lists(outside, min_size=Q, max_size=Q)
    options = {
        "delays": draw(st.none() | st.lists(st.integers(0, 5), min_size=Q, max_size=Q)),
        "special": draw(ids),
        "initial": draw(ids),
    }
    return batch_of(spec, lengths, T, draw(st.integers(0, 99))), options


def by_definition(tokens: Tokens, delays=None, special=None, initial=None) -> tuple[list, list]:
    """The table and its mask, cell by cell."""
    B, Q, T = tokens.codes.shape
    delays = range(Q) if delays is None else delays
    start = int(initial is not None)
    table, mask = [], []
    for b in range(B):
        for q in range(Q):
            after = tokens.spec.codebook_sizes[q] if special is None else np.broadcast_to(special, Q)[q]
            before = after if initial is None else np.broadcast_to(initial, Q)[q]
            for s in range(T + max(delays) + start):
                t = s - start - delays[q]
                real = 0 <= t < int(tokens.lengths[b])
                table.append(int(tokens.codes[b, q, t]) if real else int(before if t < 0 else after))
                mask.append(real)
    return table, mask


@QUICK
@given(cases())
def test_tables_are_what_the_definition_says_and_come_back_exactly(case):
    tokens, options = case
    B, Q, T = tokens.codes.shape
    ids = to_tables(tokens, **options)
    table, mask = by_definition(tokens, **options)
    steps = T + max(options["delays"] or range(Q)) + (options["initial"] is not None)
    assert ids.dtype == torch.int64 and ids.shape == (B, Q, steps)
    assert ids.flatten().tolist() == table
    placed = {k: options[k] for k in ("delays", "initial")}
    assert code_mask(tokens, **placed).flatten().tolist() == mask
    for lengths in (None, tokens.lengths):
        got = from_tables(ids, tokens.spec, lengths=lengths, **options)
        longest = int(tokens.lengths.max())
        assert got.spec == tokens.spec and got.side == {}
        assert torch.equal(got.codes, tokens.codes[:, :, :longest]) and torch.equal(got.lengths, tokens.lengths)
    assert torch.equal(valid_steps(ids, tokens.spec, **placed), tokens.lengths)
    assert torch.equal(from_tables(ids.int(), tokens.spec, **options).codes, got.codes)


@QUICK
@given(cases(), st.integers(0, 14))
def test_a_table_cut_anywhere_decodes_up_to_its_last_complete_position(case, steps):
    tokens, options = case
    cut = to_tables(tokens, **options)[:, :, :steps]
    placed = {k: options[k] for k in ("delays", "initial")}
    late = max(range(tokens.codes.shape[1]) if options["delays"] is None else options["delays"])
    whole = [
        min(int(n), max(0, steps - late - int(options["initial"] is not None))) for n in tokens.lengths
    ]  # position t is complete once its latest level is written
    valid = valid_steps(cut, tokens.spec, **placed)
    assert valid.tolist() == whole
    got = from_tables(cut, tokens.spec, lengths=valid, **options)
    for b, n in enumerate(whole):
        assert torch.equal(got.codes[b, :, :n], tokens.codes[b, :, :n])


@QUICK
@given(cases(), st.data())
def test_any_damaged_cell_is_refused_and_named(case, data):
    tokens, options = case
    ids = to_tables(tokens, **options)
    if not ids.numel():
        return
    b, q, s = (data.draw(st.integers(0, n - 1)) for n in ids.shape)
    ids[b, q, s] = 99_999
    with pytest.raises(TokensError, match=rf"item {b}, level {q}, step {s}: expected .*, got 99999 \(1 such cells\)"):
        from_tables(ids, tokens.spec, **options)


def test_the_tables_of_musicgen_written_out():
    """Facts 13.1 and 13.2: delay 0..3, special 2048 = card, steps T + K - 1 and one before them."""
    spec = spec_of(2048, 2048, 2048, 2048)
    tokens = Tokens(torch.tensor([[[1, 2], [3, 4], [5, 6], [7, 8]]]), torch.tensor([2]), spec)
    x = 2048
    assert to_tables(tokens, initial=2048).tolist() == [
        [[x, 1, 2, x, x, x], [x, x, 3, 4, x, x], [x, x, x, 5, 6, x], [x, x, x, x, 7, 8]]
    ]
    assert to_tables(tokens, delays=(0, 1, 1, 1)).tolist() == [[[1, 2, x], [x, 3, 4], [x, 5, 6], [x, 7, 8]]]
    assert to_tables(tokens, delays=(0,) * 4).tolist() == tokens.codes.tolist()


def test_the_first_levels_alone_read_as_the_first_levels_of_the_spec():
    spec = spec_of(4, 5, 6)
    tokens = batch_of(spec, [3], 3).keep(num_codebooks=2)
    got = from_tables(to_tables(tokens), spec)
    assert got.spec == spec.keep(2) and torch.equal(got.codes, tokens.codes)
    got.check(spec)


def test_cells_out_of_place_say_what_was_expected():
    spec = spec_of(4, 4)
    good = to_tables(batch_of(spec, [3, 2], 3))  # (2, 2, 4), special 4
    for place, value, want in [
        ((0, 0, 1), 4, "item 0, level 0, step 1: expected the code of position 1 in 0..3, got 4 .*valid_steps"),
        ((1, 1, 2), 7, "item 1, level 1, step 2: expected the code of position 1 in 0..3, got 7"),
        ((0, 1, 0), 0, "item 0, level 1, step 0: expected the empty cell's 4, got 0 .*delays"),
        ((1, 0, 2), -1, "item 1, level 0, step 2: expected the empty cell's 4, got -1"),
        ((0, 1, 3), 4, "item 0, level 1, step 3: expected the code of position 2 in 0..3, got 4"),
        ((1, 0, 3), 1, r"item 1, level 0, step 2: expected the code of position 2 in 0..3, got 4 \(2 such cells\)"),
    ]:
        ids = good.clone()
        ids[place] = value
        with pytest.raises(TokensError, match=want):
            from_tables(ids, spec)
    with pytest.raises(TokensError, match="step 3: the table ends, expected 4 steps for the codes of 3 positions"):
        from_tables(good[:1, :, :3], spec)
    with pytest.raises(TokensError, match="step 4: the table ends, expected 5 steps"):
        from_tables(torch.zeros(1, 2, 4).long(), spec, delays=(0, 0), lengths=torch.tensor([5]))
    for ids, want in [
        (good[0], r"expected integers \(B, Q, S\), got torch.int64 \(2, 4\); for one item give ids\[None\]"),
        (good.float(), "got torch.float32"),
        (good.tolist(), "got list"),
        (good.repeat(1, 2, 1), "expected 1..2 levels of 'codec', got 4"),
    ]:
        for read in (from_tables, valid_steps):
            with pytest.raises(TokensError, match=want):
                read(ids, spec)


def test_settings_that_do_not_fit_are_refused():
    spec = spec_of(4, 6)
    tokens = batch_of(spec, [2], 2)
    for options, want in [
        ({"delays": (0,)}, "delays: expected 2 integers >= 0, .* got "),
        ({"delays": (0, -1)}, "delays: expected 2 integers >= 0"),
        ({"delays": (0, 1.0)}, "delays: expected 2 integers >= 0"),
        ({"special": 5}, r"special: expected an id outside the codes 0\.\.5 of level 1, got 5; 6 is usual"),
        ({"special": (4, 6, 6)}, "special: expected one id, or one for each of 2 levels"),
        ({"initial": True}, "initial: expected one id"),
        ({"initial": (4, 0)}, "initial: expected an id outside the codes .* of level 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=want):
            to_tables(tokens, **options)
    with pytest.raises(TokensError, match=r"level 1, position 0: expected 0\.\.5, got 6"):
        to_tables(Tokens(torch.tensor([[[0], [6]]]), torch.tensor([1]), spec))
    for lengths in (torch.tensor([1, 1]), torch.tensor([-1]), torch.tensor([1.0])):
        with pytest.raises(ValueError, match="lengths: expected 1 integers >= 0"):
            from_tables(to_tables(tokens), spec, lengths=lengths)
    with pytest.raises(ValueError, match=r"strides \(2, 1\); use the flatten layout"):
        to_tables(batch_of(spec_of(4, 4, strides=(2, 1)), [2], 2))


def test_an_empty_batch_and_empty_items_come_back():
    spec = spec_of(4, 4)
    for lengths, T in (([], 3), ([0, 0], 0), ([0], 2)):
        tokens = batch_of(spec, lengths, T)
        got = from_tables(to_tables(tokens), spec)
        assert got.codes.shape == (len(lengths), 2, 0) and got.lengths.tolist() == lengths
