"""Per-level tables: codes (B, Q, T) as ids (B, Q, S) without offsets, level q shifted right by ``delays[q]`` steps.

The models with one embedding table and one head a level (MusicGen, Parler-TTS, Moshi) read codes so: a cell holds the
code itself, and an empty one an id that is no code, by default K, the row after the codes. Position t of level q stands
at step ``t + delays[q]`` (arXiv 2306.05284, section 2.2), one step later where a column of initial ids comes first.

                     step  0  1  2  3  4  5
    codes  a0 a1 a2        i  a0 a1 a2 s  s      delays (0, 1, 2), T = 3, initial i, special s:
           b0 b1 b2        i  i  b0 b1 b2 s      S = 1 + T + 2
           c0 c1 c2        i  i  i  c0 c1 c2
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from mmtok.tokens import Tokens, TokensError, TokenSpec, check_range


def to_tables(
    tokens: Tokens,
    delays: Sequence[int] | None = None,
    special: int | Sequence[int] | None = None,
    initial: int | Sequence[int] | None = None,
) -> Tensor:
    """The table of a batch, on the device of the codes.

    Args:
        tokens: codes (B, Q, T), every level at every position. Positions past an item's length become empty cells.
        delays: steps by which each level is late, Q integers >= 0; None: 0, 1, .. Q-1. All 0 is the parallel pattern.
        special: the id of empty cells, for all levels or one for each; None: K of the level. Any that is no code, so
            -1 (a cell without embedding) and -100 (a label without loss) too.
        initial: None, or the id of a column that comes first, and then of the empty cells before a level's first code
            too (without it those have ``special``).

    Returns:
        (B, Q, S) int64, S = T + max(delays), and one more with ``initial``.

    Raises:
        ValueError: delays, special or initial that do not fit the levels, levels with strides; TokensError: a code out
            of range.
    """
    spec = tokens.spec
    delay, empty, first, start = _settings(spec, delays, special, initial)
    check_range(tokens.codes, spec.codebook_sizes, tokens.mask)
    B, Q, T = tokens.codes.shape
    ids = torch.empty(B, Q, T + max(delay) + start, dtype=torch.int64, device=tokens.codes.device)  # (B, Q, S)
    for q, d in enumerate(delay):
        ids[:, q, : d + start] = first[q]
        ids[:, q, d + start : d + start + T] = torch.where(tokens.mask, tokens.codes[:, q], empty[q])
        ids[:, q, d + start + T :] = empty[q]
    return ids


def from_tables(
    ids: Tensor,
    spec: TokenSpec,
    delays: Sequence[int] | None = None,
    special: int | Sequence[int] | None = None,
    lengths: Tensor | None = None,
    initial: int | Sequence[int] | None = None,
) -> Tokens:
    """The codes of a table; ``delays``, ``special`` and ``initial`` as it was written with.

    Args:
        ids: (B, Q, S) integers. Q may be less than the levels of ``spec``: then they are its first ones.
        spec: what the codes mean; the Tokens have it (its first Q levels), so that its tokenizer decodes them.
        lengths: (B,) positions of each item; what comes after them is not read. None: an item ends with its last code,
            all before it must be there and all after it must be empty. `valid_steps` gives the lengths of a table that
            is not complete.

    Returns:
        Tokens without side entries, T the longest length, positions past an item's length 0.

    Raises:
        TokensError: a cell with something else than it must have, named by item, level and step.
    """
    spec = _spec_of(ids, spec)
    delay, empty, first, start = _settings(spec, delays, special, initial)
    ids = ids.to(torch.int64)
    B, Q, S = ids.shape
    t = _positions(S, delay, start, ids.device)  # (Q, S)
    code = _is_code(ids, spec)  # (B, Q, S)
    whole = lengths is None
    if lengths is None:
        lengths = ((t + 1) * (code & (t >= 0))).amax((1, 2)) if S else torch.zeros(B, dtype=torch.int64)
    elif lengths.shape != (B,) or lengths.dtype.is_floating_point or bool((lengths < 0).any()):
        raise ValueError(f"lengths: expected {B} integers >= 0, got {lengths.tolist()}")
    lengths = lengths.to(device=ids.device, dtype=torch.int64)
    inside = (t >= 0) & (t < lengths[:, None, None])  # (B, Q, S)
    blank = torch.tensor([empty, first], device=ids.device)[:, :, None]  # (2, Q, 1)
    bad = (inside & ~code) | ((t < 0) & (ids != blank[1]))
    if whole:
        bad |= (t >= lengths[:, None, None]) & (ids != blank[0])
    if bool(bad.any()):
        _refuse_cell(ids, bad, inside, t, spec, blank)
    T = int(lengths.max()) if B else 0
    if T and T + max(delay) + start > S:
        b = int(lengths.argmax())
        _refuse_end(b, T, S, T + max(delay) + start)
    rows = [ids[:, q, d + start : d + start + T] for q, d in enumerate(delay)]
    mask = torch.arange(T, device=ids.device) < lengths[:, None]  # (B, T)
    codes = torch.where(mask[:, None], torch.stack(rows, 1), 0) if T else ids.new_zeros(B, Q, 0)
    return Tokens(codes, lengths, spec)


def valid_steps(
    ids: Tensor,
    spec: TokenSpec,
    delays: Sequence[int] | None = None,
    initial: int | Sequence[int] | None = None,
) -> Tensor:
    """How many positions a table that may stop anywhere has complete: the positions before the first that lacks a code.

    What a model wrote so far decodes up to there: ``from_tables(ids, spec, lengths=valid_steps(ids, spec))``. A cell
    past the table's end, an empty one and one with an id that is no code of its level are alike here; `from_tables`
    without lengths tells a damaged table from one that is complete.

    Args:
        ids: (B, Q, S) integers, any S.

    Returns:
        (B,) int64.
    """
    spec = _spec_of(ids, spec)
    delay, _, _, start = _settings(spec, delays, None, initial)
    code = _is_code(ids.to(torch.int64), spec)
    T = ids.shape[2] - max(delay) - start
    if T <= 0:
        return torch.zeros(ids.shape[0], dtype=torch.int64, device=ids.device)
    whole = torch.stack([code[:, q, d + start : d + start + T] for q, d in enumerate(delay)]).all(0)  # (B, T)
    return whole.long().cumprod(1).sum(1)


def code_mask(
    tokens: Tokens, delays: Sequence[int] | None = None, initial: int | Sequence[int] | None = None
) -> Tensor:
    """Which cells of ``to_tables(tokens, delays, ..., initial)`` hold codes: those that a loss counts, (B, Q, S) bool.

    A model that predicts the next step compares its output at step s with the table at s + 1: ``mask[..., 1:]``.
    """
    delay, _, _, start = _settings(tokens.spec, delays, None, initial)
    S = tokens.codes.shape[2] + max(delay) + start
    t = _positions(S, delay, start, tokens.codes.device)
    return (t >= 0) & (t < tokens.lengths[:, None, None])


def _settings(
    spec: TokenSpec,
    delays: Sequence[int] | None,
    special: int | Sequence[int] | None,
    initial: int | Sequence[int] | None,
) -> tuple[list[int], list[int], list[int], int]:
    """Of each level its delay and the ids of empty cells after and before its codes; how many columns come first."""
    Q = spec.num_codebooks
    if set(spec.level_strides) != {1}:
        raise ValueError(
            f"tables need every level at every position, but {spec.name!r} has the strides {spec.level_strides}; use "
            "the flatten layout of Vocab, or the orpheus preset for SNAC"
        )
    delay = list(range(Q)) if delays is None else list(delays)
    if len(delay) != Q or any(isinstance(d, bool) or not isinstance(d, int) or d < 0 for d in delay):
        raise ValueError(f"delays: expected {Q} integers >= 0, one for each level of {spec.name!r}, got {delay}")
    empty = list(spec.codebook_sizes) if special is None else _each("special", special, spec)
    first = empty if initial is None else _each("initial", initial, spec)
    return delay, empty, first, int(initial is not None)


def _each(name: str, value: int | Sequence[int], spec: TokenSpec) -> list[int]:
    """One id for each level, none of them a code of its level."""
    out = [value] * spec.num_codebooks if isinstance(value, int) else list(value)
    if len(out) != spec.num_codebooks or any(isinstance(i, bool) or not isinstance(i, int) for i in out):
        raise ValueError(f"{name}: expected one id, or one for each of {spec.num_codebooks} levels, got {value!r}")
    for q, (i, k) in enumerate(zip(out, spec.codebook_sizes, strict=True)):
        if 0 <= i < k:
            raise ValueError(f"{name}: expected an id outside the codes 0..{k - 1} of level {q}, got {i}; {k} is usual")
    return out


def _spec_of(ids: Tensor, spec: TokenSpec) -> TokenSpec:
    """The spec of the levels that a table has."""
    if not isinstance(ids, Tensor) or ids.ndim != 3 or ids.is_floating_point() or ids.dtype == torch.bool:
        found = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise TokensError(f"ids: expected integers (B, Q, S), got {found}; for one item give ids[None]")
    if not 1 <= ids.shape[1] <= spec.num_codebooks:
        raise TokensError(f"ids: expected 1..{spec.num_codebooks} levels of {spec.name!r}, got {ids.shape[1]}")
    return spec.keep(ids.shape[1])


def _positions(S: int, delay: list[int], start: int, device: torch.device) -> Tensor:
    """(Q, S): the position whose code a cell holds; negative before the first."""
    return torch.arange(S, device=device) - start - torch.tensor(delay, device=device)[:, None]


def _is_code(ids: Tensor, spec: TokenSpec) -> Tensor:
    sizes = torch.tensor(spec.codebook_sizes, device=ids.device)[:, None]  # (Q, 1)
    return (ids >= 0) & (ids < sizes)


def _refuse_cell(ids: Tensor, bad: Tensor, inside: Tensor, t: Tensor, spec: TokenSpec, blank: Tensor) -> NoReturn:
    """Name the first cell, in the order of time, that has something else than it must have."""
    b, s, q = (int(v) for v in bad.transpose(1, 2).nonzero()[0])
    at, got = int(t[q, s]), int(ids[b, q, s])
    expected, remedy = f"the empty cell's {int(blank[int(at < 0), q, 0])}", "were these the delays it was written with?"
    if bool(inside[b, q, s]):
        expected = f"the code of position {at} in 0..{spec.codebook_sizes[q] - 1}"
        remedy = "lengths=valid_steps(...) reads what is complete before it"
    raise TokensError(
        f"item {b}, level {q}, step {s}: expected {expected}, got {got} ({int(bad.sum())} such cells); {remedy}"
    )


def _refuse_end(b: int, T: int, S: int, needed: int) -> NoReturn:
    raise TokensError(
        f"item {b}, step {S}: the table ends, expected {needed} steps for the codes of {T} positions, got {S}; "
        "lengths=valid_steps(...) reads the positions that are complete"
    )
