"""What the tests of `mmtok.vocab` share: specs, random tokens, a text tokenizer of bytes, whole random documents."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from mmtok.tokens import Tokens, TokenSpec
from mmtok.vocab import Vocab

QUICK = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
DTYPES = [torch.bool, torch.uint8, torch.int32, torch.int64, torch.bfloat16, torch.float32, torch.float64]
DTYPES += [torch.float16, torch.complex64, torch.uint16]


class ByteTokenizer:
    """A text tokenizer with one id a UTF-8 byte, called the way Hugging Face's are."""

    clean_up_tokenization_spaces = True

    def __len__(self) -> int:
        return 256

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        return list(text.encode())

    def decode(self, token_ids: list[int], clean_up_tokenization_spaces: bool = True) -> str:
        text = bytes(token_ids).decode("utf-8", "replace")
        return text.replace(" ,", ",") if clean_up_tokenization_spaces else text


def spec_of(modality: str, sizes: tuple[int, ...], strides: tuple[int, ...] = (), name: str = "x") -> TokenSpec:
    rate, count = (50.0, None) if modality == "audio" else (None, 64)
    return TokenSpec(f"{modality}-{name}", modality, sizes, strides, rate, count, fingerprint=f"{modality}{name}")


def tokens_of(spec: TokenSpec, T: int, seed: int = 0, side: dict[str, torch.Tensor] | None = None) -> Tokens:
    rng = np.random.default_rng(seed)
    rows = [
        np.repeat(rng.integers(0, k, -(-T // s)), s)[:T]
        for k, s in zip(spec.codebook_sizes, spec.level_strides, strict=True)
    ]
    codes = torch.from_numpy(np.stack(rows).astype(np.int64))[None]
    return Tokens(codes, torch.tensor([T]), spec, side or {})


def assert_same(got: object, want: object) -> None:
    if not isinstance(want, Tokens):
        assert got == want
        return
    assert isinstance(got, Tokens)
    assert got.spec == want.spec and torch.equal(got.codes, want.codes) and torch.equal(got.lengths, want.lengths)
    assert list(got.side) == list(want.side)
    for name, value in want.side.items():
        mine = got.side[name]
        assert mine.dtype == value.dtype and mine.shape == value.shape, name
        as_bytes = [v.contiguous().reshape(-1).view(torch.uint8) for v in (mine, value)]
        assert torch.equal(*as_bytes), name  # bytes, so that a NaN equals itself


@st.composite
def sides(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    side = {
        name: torch.tensor([draw(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 70_000))])
        for name in draw(st.sets(st.sampled_from(["num_samples", "sample_rate", "height", "width", "channels", "hop"])))
    }
    for name in draw(st.sets(st.sampled_from(["scale", "height", "größe", "levels", "x" * 200, ""]), max_size=2)):
        dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.lists(st.integers(0, 3), max_size=3))
        raw = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 256, int(np.prod(shape)) * dtype.itemsize)
        if dtype == torch.bool:
            raw %= 2
        data = bytearray(raw.astype(np.uint8).tobytes())
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        side[name] = flat.reshape(1, *shape)
    return side


@st.composite
def layouts(draw: st.DrawFn, most: int = 8) -> tuple[str, tuple[int, ...]]:
    """A layout of any kind, and strides that it can have."""
    kind = draw(st.sampled_from(["flatten", "delay", "coarse_first", "partial_delay", "delay:", "frame:"]))
    Q = draw(st.integers(1, most))
    if "delay" in kind:
        delays = draw(st.lists(st.integers(0, 4), min_size=Q, max_size=Q))
        delays[draw(st.integers(0, Q - 1))] = 0
        return kind + (",".join(map(str, delays)) if kind[-1] == ":" else ""), (1,) * Q
    strides = tuple(draw(st.lists(st.sampled_from([1, 1, 2, 3, 4]), min_size=Q, max_size=Q)))
    if kind == "frame:":
        span = math.lcm(*strides) * draw(st.sampled_from([1, 1, 2]))
        order = draw(st.permutations([q for q, s in enumerate(strides) for _ in range(span // s)]))
        kind += ",".join(map(str, order))
    return kind, strides


def cells_by_definition(name: str, strides: tuple[int, ...], T: int) -> list[tuple[int, int] | None]:
    """(level, position) in writing order, None for an empty cell, by plain loops."""
    Q = len(strides)
    if name == "flatten":
        return [(q, t) for t in range(T) for q in range(Q) if t % strides[q] == 0]
    if name == "coarse_first":
        return [(q, t) for q in range(Q) for t in range(0, T, strides[q])]
    kind, _, text = name.partition(":")
    numbers = [int(n) for n in text.split(",")] if text else []
    if kind == "frame":
        cells, seen = [], Counter()
        while min(seen[q] * strides[q] for q in range(Q)) < T:
            for q in numbers:
                if q < Q:
                    cells.append((q, seen[q] * strides[q]))
                    seen[q] += 1
        return [(q, t) for q, t in cells if t < T]
    delays = numbers[:Q] or (list(range(Q)) if kind == "delay" else [0] + [1] * (Q - 1))
    delays = [d - min(delays) for d in delays]
    steps = range(T + max(delays) if T else 0)
    return [(q, step - delays[q]) if 0 <= step - delays[q] < T else None for step in steps for q in range(Q)]


@st.composite
def cases(draw: st.DrawFn, text: bool = True) -> tuple[Vocab, list]:
    """A vocab of random specs and layouts, and segments for it, adjacent texts already merged."""
    layout, specs = {}, {}
    for modality in draw(st.sampled_from([("image",), ("audio",), ("image", "audio")])):
        layout[modality], strides = draw(layouts())
        Q = len(strides)
        sizes = tuple(draw(st.lists(st.sampled_from([2, 3, 7, 1031]), min_size=Q, max_size=Q)))
        specs[modality] = spec_of(modality, sizes, strides)
    tokenizer = ByteTokenizer() if draw(st.booleans()) else None
    vocab = Vocab(text=tokenizer or draw(st.integers(1, 300)), layout=layout, **specs)
    parts = []
    for _ in range(draw(st.integers(0, 4))):
        after_text = bool(parts) and not isinstance(parts[-1], Tokens)
        if text and not after_text and draw(st.booleans()):
            ids = st.lists(st.integers(0, vocab.text_size - 1), min_size=1, max_size=5)
            parts.append(draw(st.text(min_size=1, max_size=5) if tokenizer else ids))
            continue
        spec = specs[draw(st.sampled_from(sorted(specs)))]
        spec = spec.keep(draw(st.integers(1, spec.num_codebooks)))
        parts.append(tokens_of(spec, draw(st.integers(0, 7)), draw(st.integers(0, 99)), draw(sides())))
    return vocab, parts
