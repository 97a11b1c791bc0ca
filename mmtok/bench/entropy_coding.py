"""What an adaptive arithmetic coder spends on codes: the sum of -log2 of what was predicted from the codes before.

Nothing is learnt ahead and nothing is sent beside, so each length is one that a decoder can follow (prequential coding,
Dawid 1984). An arithmetic coder comes within 2 bits of it for a whole stream (Witten, Neal, Cleary 1987).

The estimator is the Dirichlet-multinomial one of Hutter (arXiv 1305.3671): with n codes seen, n_x of them x and m of
them different, p(x) = (n_x + c u(x)) / (n + c), c = m / (2 ln((n + 1) / m)). Krichevsky and Trofimov's estimator
(c = K / 2) learns nothing before n comes near K; here c follows how many codes really occur, so that K may be 2^64. At
order 0, u is 1/K; at order 1, every context has counts of its own and u is the level's own prediction of order 0, which
is what a context falls back on (MacKay and Peto 1995). The probabilities of all K codes sum to one at each step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence

from mmtok.tokens import Tokens

ESTIMATOR = "Dirichlet-multinomial, mass m / (2 ln((n + 1) / m)) (arXiv 1305.3671), order 1 falls back on order 0"
BEGIN = -1  # context of the first code of an item; no code is negative


class Counts:
    """What was seen in one context."""

    __slots__ = ("counts", "mass", "total")

    def __init__(self) -> None:
        self.counts: dict[Hashable, int] = {}
        self.total, self.mass = 0, 1.0

    def probability(self, code: Hashable, base: float) -> float:
        """Of ``code`` to come next, where ``base`` is what is expected of it without this context."""
        return (self.counts.get(code, 0) + self.mass * base) / (self.total + self.mass)

    def learn(self, code: Hashable) -> None:
        self.counts[code] = self.counts.get(code, 0) + 1
        self.total += 1
        self.mass = len(self.counts) / (2 * math.log((self.total + 1) / len(self.counts)))


def adaptive_bits(codes: Sequence[Hashable], codebook_size: int, *contexts: Sequence[Hashable]) -> tuple[float, ...]:
    """Bits of all ``codes``, each predicted from those before it: at order 0, and at order 1 with each of ``contexts``.

    Args:
        codes: in the order in which they are coded.
        codebook_size: K.
        contexts: what the decoder knows when it comes to each code, one a code.
    """
    if any(len(c) != len(codes) for c in contexts):
        raise ValueError(f"contexts: expected {len(codes)}, one a code, got {[len(c) for c in contexts]}")
    alone, base = Counts(), 1 / codebook_size
    tables: list[dict[Hashable, Counts]] = [{} for _ in contexts]
    spent = [0.0] * (1 + len(contexts))
    for i, code in enumerate(codes):
        p = alone.probability(code, base)
        spent[0] -= math.log2(p)
        for j, (table, known) in enumerate(zip(tables, contexts, strict=True), 1):
            own = table.get(known[i])
            if own is None:
                own = table[known[i]] = Counts()
            spent[j] -= math.log2(own.probability(code, p))  # p where the context is new
            own.learn(code)
        alone.learn(code)
    return tuple(spent)


@dataclasses.dataclass(frozen=True)
class LevelBits:
    """Bits of all codes of one level, over all items in their order.

    Args:
        samples: codes counted. nominal: samples * log2 K.
        order0: predicted by how often each code came. order1_previous: behind the code before it of the same level and
            item. order1_level: behind the code of the level before at the same position; None for the first level.
    """

    samples: int
    nominal: float
    order0: float
    order1_previous: float
    order1_level: float | None

    @property
    def mixture(self) -> float:
        """`mixture_bits` of the two or three."""
        return mixture_bits([b for b in (self.order0, self.order1_previous, self.order1_level) if b is not None])


def mixture_bits(bits: Sequence[float]) -> float:
    """Bits of the Bayesian mixture of several predictors, each of which spends ``bits`` on the same codes.

    That of the best, and log2 of their number at most. Equal weights at first and Bayes' rule at each step multiply up
    to the mean of the 2^-bits, so that nothing needs to be predicted anew.
    """
    best = min(bits)
    return best + math.log2(len(bits)) - math.log2(sum(2.0 ** (best - b) for b in bits))


def level_bits(items: Sequence[Tokens]) -> list[LevelBits]:
    """`LevelBits` of each level of a set: ``items`` are batches of one, of one spec; what one taught helps the next.

    Levels that repeat a code (``level_strides``) are coded where it is new. A decoder has the levels in their order.

    Raises:
        ValueError: no items, or of different specs.
    """
    if not items or any(t.spec != items[0].spec for t in items):
        raise ValueError(f"items: expected Tokens of one spec, got {sorted({t.spec.name for t in items})}")
    spec, found = items[0].spec, []
    for q, (size, stride) in enumerate(zip(spec.codebook_sizes, spec.level_strides, strict=True)):
        codes: list[int] = []
        previous: list[int] = []
        below: list[int] = []
        for item in items:
            own = new_codes(item, q)
            codes += own
            previous += [BEGIN, *own[:-1]] if own else []
            below += item.codes[0, q - 1, : int(item.lengths[0]) : stride].tolist() if q else []
        contexts = (previous, below) if q else (previous,)
        bits = adaptive_bits(codes, size, *contexts)
        found.append(LevelBits(len(codes), len(codes) * math.log2(size), bits[0], bits[1], bits[2] if q else None))
    return found


def new_codes(item: Tokens, level: int) -> list[int]:
    """The codes of one level of the only item, a repeated one once."""
    return item.codes[0, level, : int(item.lengths[0]) : item.spec.level_strides[level]].tolist()
