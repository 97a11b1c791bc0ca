"""The nearest-code search on torch ops alone: fp32 scores by blocks of rows, a proof for each row, fp64 without one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_BLOCK_BYTES_CPU = 2 << 20  # scores of one row block: about one core's L2
_BLOCK_BYTES_DEVICE = 128 << 20  # an accelerator needs enough rows to fill it
# Which of the three bf16 parts of a row meets which of a code: the products above 2^-24 of the whole.
_ROW_PARTS = (0, 0, 1, 0, 2, 1)
_CODE_PARTS = (0, 1, 0, 2, 0, 1)
_CAPTURED_BLOCKS = 16  # at most this many codebook blocks are unrolled into a captured graph
_EXACT_AT_ONCE = 1 << 20  # elements of the fp64 temporaries: 8 MiB


class RowSearch:
    """One codebook (K, D), shifted and squared once, ready to score blocks of rows.

    Score s = |c|^2 / 2 - x.c, with x and c shifted by the codebook's mean, or their directions in the cosine metric.
    The norms ride in the product, [x, 1] . [-c, |c|^2 / 2]: one pass over the scores less than adding them after it.

    The proof of a row: with u = 2^-24, rounding of the shifted coordinates moves a score by at most 2u |x| R + u R^2,
    the norm's own sum by D u R^2 / 2, and the product of M terms by (M + 1) u (|x| R + R^2 / 2), R the greatest |c|.
    Two scores further apart than twice (M + D + 10) u (|x| R + R^2 / 2) are in their true order. A product whose terms
    are split in three bf16 parts (M = 6 (D + 1)) leaves out 3u |x| R more, and is given twice the bound, since matrix
    units may truncate where they add. Rows whose best two scores are closer are settled in fp64.
    """

    def __init__(self, codebook: Tensor, metric: str) -> None:
        self.original, self.cosine = codebook.detach(), metric == "cosine"
        K, D = codebook.shape
        self.centre, inverse = centre_of(self.original, self.cosine)
        # A captured graph does not see the setting change later, so it always takes the way that no setting touches.
        captured = torch.compiler.is_compiling()
        self.split = captured or reduced_precision(codebook.device.type)
        rows = (D + 1) * (len(_CODE_PARTS) if self.split else 1)
        self.relative = 1.01 * (2 if self.split else 1) * (rows + D + 10) * 2.0**-24
        step = K if captured else max(1, _EXACT_AT_ONCE // D)  # by pieces, since a second copy would be large
        parts = (
            shift_codes(self.original[k : k + step], inverse[k : k + step], self.centre) for k in range(0, K, step)
        )
        if captured:
            c, self.reach = next(parts)
            self.codebook = self._split_codes(c).T.contiguous()  # (D + 1 or 6 (D + 1), K)
            return
        self.codebook, self.reach = torch.empty(rows, K, device=codebook.device), self.centre.new_zeros(())
        for k, (c, reach) in zip(range(0, K, step), parts, strict=True):
            self.codebook[:, k : k + step] = self._split_codes(c).T
            self.reach = torch.maximum(self.reach, reach)

    def _split_codes(self, c: Tensor) -> Tensor:
        return _join_thirds(c, _CODE_PARTS) if self.split else c

    def nearest(self, x: Tensor) -> Tensor:
        """x (N, D), any floating type -> codes (N,)."""
        N, (K, D) = x.shape[0], self.original.shape
        if N * K * D <= _EXACT_AT_ONCE // 4:  # a few rows: fp64 at once is the shortest way
            return distances(x[:, None], self.original, self.cosine).min(1).indices
        scores = torch.empty(min(N, block_rows(K, x.device)), K, device=x.device)  # used again for every block
        codes = torch.empty(N, dtype=torch.int64, device=x.device)
        for start in range(0, N, len(scores)):
            part = x[start : start + len(scores)]
            codes[start : start + len(scores)] = self._nearest_block(part, scores[: len(part)])
        return codes

    def _nearest_block(self, x: Tensor, scores: Tensor) -> Tensor:
        rows = self._shift(x)  # (n, D)
        torch.mm(self._widen(rows), self.codebook, out=scores)
        best, codes = scores.min(1)  # on a CPU faster than argmin; the lowest code on ties
        second = scores.scatter_(1, codes[:, None], torch.inf).amin(1)
        error = self.relative * self.reach * (rows.norm(dim=1) + 0.5 * self.reach) + 1e-36
        doubtful = (~(second - best > 2 * error)).nonzero()[:, 0]  # also when either is not a number
        if len(doubtful):
            limit = (best + 2 * error)[doubtful, None]
            near = ~(scores[doubtful] > limit).scatter_(1, codes[doubtful, None], False)  # (n', K)
            codes[doubtful] = settle(x[doubtful], self.original, self.cosine, near.nonzero())
        return codes

    def nearest_captured(self, x: Tensor) -> Tensor:
        """The same with N symbolic and without the second look: blocks of the codebook and a running minimum."""
        x, K = self._widen(self._shift(x)), self.codebook.shape[1]
        block = max(256, -(-K // _CAPTURED_BLOCKS))
        best, codes = torch.mm(x, self.codebook[:, :block]).min(1)
        for start in range(block, K, block):
            score, code = torch.mm(x, self.codebook[:, start : start + block]).min(1)
            codes = torch.where(score < best, code + start, codes)  # strict: the lower code keeps a tie
            best = torch.minimum(score, best)
        return codes

    def _shift(self, x: Tensor) -> Tensor:
        if self.cosine:
            x = unit(x.double())
        elif x.dtype != torch.float64:
            x = x.float()
        return (x - self.centre.to(x.dtype)).float()  # (n, D)

    def _widen(self, rows: Tensor) -> Tensor:
        rows = F.pad(rows, (0, 1), value=1.0)
        return _join_thirds(rows, _ROW_PARTS) if self.split else rows


def centre_of(codebook: Tensor, cosine: bool) -> tuple[Tensor, Tensor]:
    """The mean (D,) fp32 of the codes (K, D), or of their directions; and what scales each code, (K, 1) fp64 or fp32.

    The scale is 1, or 1 / |code| for ``cosine``, and 0 for a zero code.
    """
    if not cosine:
        c = codebook if codebook.dtype == torch.float64 else codebook.float()
        return c.mean(0).float(), c.new_ones(codebook.shape[0], 1)
    step = max(1, _EXACT_AT_ONCE // codebook.shape[1])
    parts = codebook.split(step) if codebook.numel() > _EXACT_AT_ONCE else (codebook,)
    length = torch.cat([part.double().norm(dim=1, keepdim=True) for part in parts])
    inverse = torch.where(length > 0, 1 / length, 0.0)
    return (codebook * inverse.to(codebook.dtype)).mean(0).float(), inverse


def shift_codes(codebook: Tensor, inverse: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """[centre - c, |c - centre|^2 / 2] (K, D + 1) fp32 for codes c times ``inverse``, and the greatest |c - centre|.

    A zero code (inverse 0) has cosine 0 with everything: as far away as a code of length 1 that is orthogonal, so half
    a unit is added to its norm.
    """
    c = (codebook * inverse - centre.to(inverse.dtype)).float()
    square = c.square().sum(1, keepdim=True)
    half = 0.5 * square + torch.where(inverse > 0, 0.0, 0.5).float()
    return torch.cat([-c, half], 1), square.max().sqrt()


def distances(x: Tensor, c: Tensor, cosine: bool) -> Tensor:
    """Squared distances, or negative cosines, along the last axis, in fp64."""
    x, c = x.double(), c.double()
    return -(unit(x) * unit(c)).sum(-1) if cosine else (x - c).square().sum(-1)


def settle(x: Tensor, codebook: Tensor, cosine: bool, pairs: Tensor) -> Tensor:
    """The nearest in fp64 among the named codes, the lowest on ties.

    Args:
        x: (n, D). codebook: (K, D). pairs: (P, 2) int64, (row, code), at least one for each row.

    Returns:
        codes (n,).
    """
    K = codebook.shape[0]
    best = torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)
    codes = torch.full_like(best, K, dtype=torch.int64)
    for row, code in (part.unbind(1) for part in pairs.split(max(1, _EXACT_AT_ONCE // x.shape[1]))):
        distance = distances(x[row], codebook[code], cosine)
        new = best.scatter_reduce(0, row, distance, "amin")
        codes = torch.where(new < best, K, codes)  # what was best before is not any more
        codes = codes.scatter_reduce(0, row, torch.where(distance == new[row], code, K), "amin")
        best = new
    return codes


def block_rows(codebook_size: int, device: torch.device) -> int:
    """Rows whose scores against ``codebook_size`` codes fill one block."""
    budget = _BLOCK_BYTES_CPU if device.type == "cpu" else _BLOCK_BYTES_DEVICE
    return max(1, budget // (4 * codebook_size))


def unit(x: Tensor) -> Tensor:
    """Rows scaled to length 1; a zero row stays zero."""
    length = x.norm(dim=-1, keepdim=True)
    return x / torch.where(length > 0, length, 1.0)


def reduced_precision(device_type: str) -> bool:
    """Whether an fp32 product on such a device may be computed in TF32 or bf16 under the present global settings."""
    if device_type == "cuda":
        return torch.backends.cuda.matmul.fp32_precision == "tf32"
    if device_type == "cpu":
        return torch.backends.mkldnn.matmul.fp32_precision in ("bf16", "tf32")  # type: ignore[attr-defined]
    return False


def _join_thirds(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """x (n, D) = high + middle + low of 8 bits each, whose products are exact in any mode; set side by side."""
    high = x.bfloat16().float()
    middle = (x - high).bfloat16().float()
    thirds = (high, middle, (x - high - middle).bfloat16().float())
    return torch.cat([thirds[i] for i in order], 1)
