"""Three ways in which one causal backbone models codes (B, Q, T): flattened, delayed, and with a depth transformer.

`FlatHead` reads and writes one code a step, Q * T steps. `DelayHeads` reads and writes Q codes a step, level q late by
its delay (MusicGen, arXiv 2306.05284, section 2.2). `DepthTransformer` reads a whole frame a step and writes its Q
codes with a second, small causal transformer (RQ-Transformer, arXiv 2203.01941; Moshi, arXiv 2410.00037).

All three are exact distributions over codes *and* length: one of the levels may say "it ends here" instead of a code
of frame t, and impossible codes get no probability. So their nats can be compared, and add up to the same thing.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmtok.image.dimension_head import draw
from mmtok.lm.backbone import Backbone, Memory
from mmtok.tokens import check_range

Choose = Callable[[int, int, Tensor], Tensor]  # (level, frame, logits (B, K or K + 1)) -> codes (B,); K = the end
Written = tuple[Tensor, Tensor]  # codes (B, Q, T), lengths (B,)


class CodesLM(nn.Module, abc.ABC):
    """What the three ways share: checks, counting, and drawing.

    Args:
        backbone: `Backbone`, `TransformersBackbone`, or a module with ``dim`` and the same ``forward``.
        codebook_sizes: K of each level. Levels of ragged strides belong into `mmtok.vocab`'s layouts.
        end_level: the level that is written first, and that may say "end" (K) instead of a code.
    """

    def __init__(self, backbone: nn.Module, codebook_sizes: Sequence[int], end_level: int = 0):
        super().__init__()
        if not codebook_sizes or min(codebook_sizes) < 2:
            raise ValueError(f"codebook_sizes: expected at least one size >= 2, got {tuple(codebook_sizes)}")
        self.backbone = backbone
        self.codebook_sizes = tuple(int(k) for k in codebook_sizes)
        self.dim, self.end_level = int(backbone.dim), end_level  # pyright: ignore[reportArgumentType]

    @property
    def num_codebooks(self) -> int:
        return len(self.codebook_sizes)

    @property
    def head_sizes(self) -> list[int]:
        """Logits of each level: K, and one more where the end may stand."""
        return [k + (q == self.end_level) for q, k in enumerate(self.codebook_sizes)]

    @abc.abstractmethod
    def _rows(self, codes: Tensor, lengths: Tensor, condition: Tensor | None) -> list[Tensor]:
        """For each level what its head reads, (n, D): one row a place of `_places`, in their order.

        codes (B, Q, T + 1) hold 0 wherever nothing is.
        """

    @abc.abstractmethod
    def _logits(self, level: int, rows: Tensor) -> Tensor:
        """(n, D) -> (n, ``head_sizes[level]``)."""

    @abc.abstractmethod
    def _walk(self, choose: Choose, num_items: int, max_frames: int, condition: Tensor | None) -> Written:
        """Write codes (B, Q, max_frames) and lengths (B,) step by step; ``choose`` makes every choice.

        Chosen codes of places that an item does not have are dropped.
        """

    def loss(self, codes: Tensor, lengths: Tensor, condition: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean nats a frame, all levels and the end together, and what it is made of.

        Args:
            codes: (B, Q, T) int64; what lies at or past an item's length has no influence.
            lengths: (B,) int64, 0..T.
            condition: (B, P, D) embeddings that stand before the sequence, all of them real, or None.

        Returns:
            The loss, with gradient, and without: ``item_nats`` (B,) of each item, the end counted, which sum to
            ``level_nats`` (Q,) of the codes, given that the item goes on, and ``end_nats`` () of going on and of
            ending; ``frames`` () and ``cells`` () counted.
        """
        codes, places = self._prepare(codes, lengths, condition)
        rows = self._rows(codes, lengths, condition)
        items = torch.zeros(len(lengths), device=codes.device)
        levels, ends = [], items.sum()
        for q, (place, K) in enumerate(zip(places, self.codebook_sizes, strict=True)):
            b, t = place.nonzero(as_tuple=True)
            logits = self._logits(q, rows[q]).float()  # (n, K or K + 1)
            goes_on = t < lengths[b]
            codes_sum = logits[:, :K].logsumexp(-1)
            nats = torch.where(goes_on, codes_sum - logits.gather(1, codes[b, q, t][:, None])[:, 0], 0.0)
            levels.append(nats.detach().sum())
            if q == self.end_level:
                whole = logits.logsumexp(-1)
                end = whole - torch.where(goes_on, codes_sum, logits[:, K])
                ends, nats = end.detach().sum(), nats + end
            items = items.index_add(0, b, nats)
        frames = lengths.sum()
        stats = {"item_nats": items.detach(), "level_nats": torch.stack(levels), "end_nats": ends}
        stats |= {"frames": frames, "cells": frames * self.num_codebooks}
        return items.sum() / frames.clamp(min=1), stats

    def logits(self, codes: Tensor, lengths: Tensor, condition: Tensor | None = None) -> list[Tensor]:
        """For each level (B, T + 1, K or K + 1), given what is written before it; NaN where nothing is predicted."""
        codes, places = self._prepare(codes, lengths, condition)
        found = []
        for q, rows in enumerate(self._rows(codes, lengths, condition)):
            values = self._logits(q, rows)
            found.append(values.new_full((*places[q].shape, values.shape[1]), math.nan).index_put((places[q],), values))
        return found

    @torch.no_grad()
    def sample(
        self,
        lengths: Tensor | None = None,
        max_frames: int | None = None,
        num_items: int = 1,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        condition: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw codes (B, Q, T), 0 past an item's length, and lengths (B,).

        Args:
            lengths: (B,) wanted lengths; the end is then given, not drawn. Or else:
            max_frames: every item ends where it likes, and is cut after so many frames.
            num_items: B, unless ``lengths`` say it.
            temperature: 0 takes the likeliest. top_k: choose among so many likeliest only, the end being one of them.
            generator: on the parameters' device.
            condition: (B, P, D) as in `loss`.
        """
        if (lengths is None) == (max_frames is None):
            raise ValueError("expected either lengths (exact) or max_frames (drawn, at most), got both or neither")
        given = None if lengths is None else lengths.to(next(self.parameters()).device)
        num_items = num_items if given is None else len(given)
        shortest, longest = (max_frames or 0,) * 2 if given is None or not num_items else map(int, given.aminmax())
        if (top_k is not None and top_k < 1) or shortest < 0 or num_items < 0:
            raise ValueError(f"expected top_k >= 1, frames and items >= 0, got {top_k}, {shortest} and {num_items}")
        self._check_condition(num_items, condition)

        def choose(level: int, frame: int, logits: Tensor) -> Tensor:
            K, ended = self.codebook_sizes[level], None
            if given is not None and level == self.end_level:
                logits, ended = logits[:, :K], frame >= given
            if top_k is not None and top_k < logits.shape[1]:
                likeliest = logits.topk(top_k)
                logits = torch.full_like(logits, -torch.inf).scatter(1, likeliest.indices, likeliest.values)
            drawn = draw(logits, temperature, generator)
            return drawn if ended is None else torch.where(ended, K, drawn)

        was_training = self.training
        self.eval()
        try:
            codes, found = self._walk(choose, num_items, longest, condition)
        finally:
            self.train(was_training)
        return codes[:, :, : int(found.max()) if num_items else 0], found

    def _places(self, lengths: Tensor, T: int) -> list[Tensor]:
        """For each level (B, T + 1) bool: the frames at which it is predicted."""
        t = torch.arange(T + 1, device=lengths.device)
        return [t < lengths[:, None] + (q == self.end_level) for q in range(self.num_codebooks)]

    def _prepare(self, codes: Tensor, lengths: Tensor, condition: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Checked codes (B, Q, T + 1), 0 where nothing is, and `_places`."""
        Q = self.num_codebooks
        if codes.ndim != 3 or codes.shape[1] != Q or codes.dtype != torch.int64:
            raise ValueError(f"codes: expected int64 (B, {Q}, T), got {codes.dtype} {tuple(codes.shape)}")
        B, _, T = codes.shape
        if lengths.shape != (B,) or lengths.dtype != torch.int64:
            raise ValueError(f"lengths: expected int64 ({B},), got {lengths.dtype} {tuple(lengths.shape)}")
        if bool(((lengths < 0) | (lengths > T)).any()):
            raise ValueError(f"lengths: expected 0..{T}, got {lengths.tolist()}")
        self._check_condition(B, condition)
        real = torch.arange(T, device=codes.device) < lengths[:, None]
        check_range(codes, self.codebook_sizes, real)
        T = int(lengths.max()) if B else 0
        codes = torch.where(real[:, None], codes, 0)[:, :, :T]
        return F.pad(codes, (0, 1)), self._places(lengths, T)

    def _check_condition(self, num_items: int, condition: Tensor | None) -> None:
        if condition is not None and (condition.ndim != 3 or condition.shape[::2] != (num_items, self.dim)):
            raise ValueError(
                f"condition: expected ({num_items}, P, {self.dim}) of the backbone's width, got "
                f"{tuple(condition.shape)}; project it, and repeat it for every item"
            )

    def _read(self, x: Tensor, condition: Tensor | None, past: Memory | None = None) -> Tensor:
        """Backbone over x (B, S, D) behind the condition -> (B, S, D)."""
        if condition is None:
            return self.backbone(x, past)
        return self.backbone(torch.cat([condition.to(x.dtype), x], 1), past)[:, condition.shape[1] :]


def bits(stats: Mapping[str, Tensor], frame_rate: float | None = None) -> dict[str, float]:
    """Bits a frame and a cell by the ``stats`` of `CodesLM.loss`; with a frame rate in Hz also a second."""
    total = float(stats["item_nats"].double().sum()) / math.log(2)
    frames, cells = max(1, int(stats["frames"])), max(1, int(stats["cells"]))
    found = {"bits_per_frame": total / frames, "bits_per_cell": total / cells}
    return found if frame_rate is None else found | {"bits_per_second": total / frames * frame_rate}


def _table(rows: int, dim: int) -> nn.Embedding:
    table = nn.Embedding(rows, dim)
    nn.init.normal_(table.weight, std=dim**-0.5)
    return table


class FlatHead(CodesLM):
    """The reference: Q * T ids in a row, level q of code c as id ``offsets[q] + c``, one table and one head.

    One more id, the last, begins every sequence and ends it. At each step only the ids of the level that is due count
    (and the end, at level 0): the softmax runs over these rows of the head.
    """

    def __init__(self, backbone: nn.Module, codebook_sizes: Sequence[int]):
        super().__init__(backbone, codebook_sizes)
        self.offsets = [sum(self.codebook_sizes[:q]) for q in range(self.num_codebooks + 1)]
        self.table = _table(self.offsets[-1] + 1, self.dim)
        self.head = nn.Linear(self.dim, self.offsets[-1] + 1)

    def _logits(self, level: int, rows: Tensor) -> Tensor:
        due = slice(self.offsets[level], self.offsets[level + 1])
        weight, bias = self.head.weight[due], self.head.bias[due]
        if level == self.end_level:
            weight, bias = torch.cat([weight, self.head.weight[-1:]]), torch.cat([bias, self.head.bias[-1:]])
        return F.linear(rows, weight, bias)

    def _rows(self, codes: Tensor, lengths: Tensor, condition: Tensor | None) -> list[Tensor]:
        B, Q, frames = codes.shape
        ids = codes + torch.tensor(self.offsets[:-1], device=codes.device)[:, None]
        ids = ids.transpose(1, 2).flatten(1)[:, : (frames - 1) * Q]  # (B, T * Q)
        start = ids.new_full((B, 1), self.offsets[-1])
        h = self._read(self.table(torch.cat([start, ids], 1)), condition)  # (B, T * Q + 1, D)
        h = F.pad(h, (0, 0, 0, Q - 1)).unflatten(1, (frames, Q))  # the last frame has room for the end only
        return [h[:, :, q][place] for q, place in enumerate(self._places(lengths, frames - 1))]

    def _walk(self, choose: Choose, num_items: int, max_frames: int, condition: Tensor | None) -> Written:
        Q, past, device = self.num_codebooks, Memory(), self.head.weight.device
        codes = torch.zeros(num_items, Q, max_frames, dtype=torch.int64, device=device)
        lengths = torch.full((num_items,), max_frames, device=device)
        x = self.table(torch.full((num_items, 1), self.offsets[-1], device=device))
        for t in range(max_frames):
            for q in range(Q):
                h = self._read(x, condition, past)[:, -1]
                condition = None  # the backbone remembers it
                chosen = choose(q, t, self._logits(q, h))
                if q == 0:
                    lengths = torch.where((chosen == self.codebook_sizes[0]) & (lengths > t), t, lengths)
                    if not bool((lengths > t).any()):
                        return codes, lengths
                codes[:, q, t] = torch.where(lengths > t, chosen, 0)
                x = self.table(codes[:, q, t] + self.offsets[q])[:, None]
        return codes, lengths


class SummedLM(CodesLM):
    """What reads the codes of all levels at once: tables (subclasses fill them) summed at the input, a head a level."""

    tables: nn.ModuleList
    heads: nn.ModuleList

    def _logits(self, level: int, rows: Tensor) -> Tensor:
        return self.heads[level](rows)

    def _embed(self, codes: Tensor) -> Tensor:
        """codes (B, Q, S), K where a level is empty -> (B, S, D)."""
        return torch.stack([table(codes[:, q]) for q, table in enumerate(self.tables)]).sum(0)


class DelayHeads(SummedLM):
    """Level q of frame t is read and written at step t + ``delays[q]``: the tables of all levels summed, Q heads.

    Codes of one step are independent given the steps before. Where a level has no code, before its first frame and
    after its last, its table's row K stands. The first level without delay says where the item ends; the others are
    then written to their last frame.

    Args:
        backbone, codebook_sizes: as `CodesLM`.
        delays: steps by which each level is late, the smallest 0; None = 0, 1, 2 ... (0, 0, 0 ... is the parallel
            pattern, 0, 1, 1 ... Moshi's acoustic delay).
    """

    def __init__(self, backbone: nn.Module, codebook_sizes: Sequence[int], delays: Sequence[int] | None = None):
        Q = len(codebook_sizes)
        chosen = tuple(int(d) for d in (range(Q) if delays is None else delays))
        if len(chosen) != Q or (Q and min(chosen) != 0):
            raise ValueError(f"delays: expected {Q} steps, the smallest 0, got {chosen}; subtract their minimum")
        super().__init__(backbone, codebook_sizes, chosen.index(0) if Q else 0)
        self.delays = chosen
        self.tables = nn.ModuleList(_table(k + 1, self.dim) for k in self.codebook_sizes)
        self.heads = nn.ModuleList(nn.Linear(self.dim, size) for size in self.head_sizes)

    def _nothing(self, num_items: int, device: torch.device) -> Tensor:
        """(B, Q, 1): the step before the first, where all levels are empty."""
        return torch.tensor(self.codebook_sizes, device=device)[None, :, None].repeat(num_items, 1, 1)

    def _rows(self, codes: Tensor, lengths: Tensor, condition: Tensor | None) -> list[Tensor]:
        B, _, frames = codes.shape
        delays = torch.tensor(self.delays, device=codes.device)
        steps = frames if frames == 1 else max(frames, frames - 1 + max(self.delays))
        t = torch.arange(steps - 1, device=codes.device) - delays[:, None]  # (Q, S - 1), the frame of each cell
        empty = self._nothing(B, codes.device)
        real = (t >= 0) & (t < lengths[:, None, None])  # (B, Q, S - 1)
        cells = torch.where(real, codes.gather(2, t.clamp(0, frames - 1).expand(B, -1, -1)), empty)
        h = self._read(self._embed(torch.cat([empty, cells], 2)), condition)  # (B, S, D)
        h = F.pad(h, (0, 0, 0, frames + max(self.delays) - steps))  # so that every level has T + 1 places
        places = self._places(lengths, frames - 1)
        return [h[:, d : d + frames][place] for d, place in zip(self.delays, places, strict=True)]

    def _walk(self, choose: Choose, num_items: int, max_frames: int, condition: Tensor | None) -> Written:
        past, device = Memory(), next(self.parameters()).device
        codes = torch.zeros(num_items, self.num_codebooks, max_frames, dtype=torch.int64, device=device)
        lengths = torch.full((num_items,), max_frames, device=device)
        empty = cells = self._nothing(num_items, device)
        order = sorted(range(self.num_codebooks), key=lambda q: q != self.end_level)
        for step in range(max_frames + max(self.delays)):
            if num_items and step >= int(lengths.max()) + max(self.delays):
                break
            h = self._read(self._embed(cells), condition, past)[:, -1]
            condition, cells = None, empty.clone()
            for q in order:  # the end level first: it says whether the others have a frame here
                t = step - self.delays[q]
                if not 0 <= t < max_frames:
                    continue
                chosen = choose(q, t, self._logits(q, h))
                if q == self.end_level:
                    lengths = torch.where((chosen == self.codebook_sizes[q]) & (lengths > t), t, lengths)
                here = lengths > t
                codes[:, q, t] = torch.where(here, chosen, 0)
                cells[:, q, 0] = torch.where(here, chosen, empty[:, q, 0])
        return codes, lengths


class DepthTransformer(SummedLM):
    """The backbone reads one frame a step, a small causal transformer writes its levels, coarse to fine.

    The small one's input at level q is the projected state of the backbone, a vector of the level, and the embedding of
    the code at level q - 1 (arXiv 2410.00037, section 3.4.1); its weights are those of all levels, as in 2203.01941.

    Args:
        backbone, codebook_sizes: as `CodesLM`.
        depth_dim, depth_layers, depth_heads: of the small transformer.
    """

    def __init__(
        self,
        backbone: nn.Module,
        codebook_sizes: Sequence[int],
        depth_dim: int = 64,
        depth_layers: int = 2,
        depth_heads: int = 4,
    ):
        super().__init__(backbone, codebook_sizes)
        self.tables = nn.ModuleList(_table(k, self.dim) for k in self.codebook_sizes)
        self.start = nn.Parameter(torch.randn(self.dim) * self.dim**-0.5)
        self.project = nn.Linear(self.dim, depth_dim)
        self.levels = nn.Parameter(torch.randn(self.num_codebooks, depth_dim) * depth_dim**-0.5)
        self.depth_tables = nn.ModuleList(_table(k, depth_dim) for k in self.codebook_sizes[:-1])
        self.depth = Backbone(depth_dim, depth_layers, depth_heads, context=self.num_codebooks)
        self.heads = nn.ModuleList(nn.Linear(depth_dim, size) for size in self.head_sizes)

    def _rows(self, codes: Tensor, lengths: Tensor, condition: Tensor | None) -> list[Tensor]:
        start = self.start.expand(len(codes), 1, -1)
        h = self._read(torch.cat([start, self._embed(codes[:, :, :-1])], 1), condition)  # (B, T + 1, D)
        first, *later = self._places(lengths, codes.shape[2] - 1)
        frames = codes.transpose(1, 2)[first]  # (N, Q): frames of all items, and their ends
        before = [table(frames[:, q]) for q, table in enumerate(self.depth_tables)]
        before = torch.stack([torch.zeros_like(before[0]) if before else self.levels.new_zeros(1), *before], 1)
        y = self.depth(self.project(h[first])[:, None] + self.levels + before)  # (N, Q, d)
        return [y[:, 0], *(y[place[first], q] for q, place in enumerate(later, 1))]

    def _walk(self, choose: Choose, num_items: int, max_frames: int, condition: Tensor | None) -> Written:
        past, device = Memory(), self.start.device
        codes = torch.zeros(num_items, self.num_codebooks, max_frames, dtype=torch.int64, device=device)
        lengths = torch.full((num_items,), max_frames, device=device)
        x = self.start.expand(num_items, 1, -1)
        for t in range(max_frames):
            state = self.project(self._read(x, condition, past)[:, -1:])  # (B, 1, d)
            condition, within, before = None, Memory(), torch.zeros_like(state)
            for q in range(self.num_codebooks):
                y = self.depth(state + self.levels[q] + before, within)[:, 0]
                chosen = choose(q, t, self._logits(q, y))
                if q == 0:
                    lengths = torch.where((chosen == self.codebook_sizes[0]) & (lengths > t), t, lengths)
                    if not bool((lengths > t).any()):
                        return codes, lengths
                codes[:, q, t] = torch.where(lengths > t, chosen, 0)
                if q + 1 < self.num_codebooks:
                    before = self.depth_tables[q](codes[:, q, t])[:, None]
            x = self._embed(codes[:, :, t : t + 1])
        return codes, lengths


HEADS: dict[str, type[CodesLM]] = {"flatten": FlatHead, "delay": DelayHeads, "depth": DepthTransformer}
