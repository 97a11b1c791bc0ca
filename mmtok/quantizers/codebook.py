"""One codebook (K, D) and how it learns: k-means start, moving averages or gradient, revival of dead codes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmtok.kernels.codebook_stats import codebook_stats
from mmtok.kernels.nearest_code import METRICS, nearest_code
from mmtok.quantizers.sync import from_rank_zero, gather_rows, sum_over_ranks

KMEANS_STEPS = 10
KMEANS_VECTORS_PER_CODE = 64  # more vectors than this per code do not move the centroids, they only cost time
LEARNING = ("ema", "gradient")


class Codebook(nn.Module):
    """K vectors of width D, nearest-code lookup, and their update.

    ``ema`` (arXiv 1711.00937, appendix A.1): cluster_size and codebook_sum are moving averages of the counts and of the
    vector sums of each step's global batch, and a code is their quotient. A code that stays unused keeps its value,
    since both averages decay alike. ``gradient``: the codebook is a parameter, cluster_size only serves the revival.

    Revival: after each update, codes whose cluster_size is below ``dead_code_threshold`` times the mean cluster_size
    (the mean is frames_per_step / K, so the rule does not depend on the batch size) are replaced by random vectors of
    the present global batch. Their cluster_size is set to that mean and their codebook_sum to match: the next update
    would otherwise put the old code back. A revived code that wins nothing is dead again after
    log(threshold) / log(decay) steps (229 for 0.1 and 0.99).

    The averages move at every forward pass in training mode. With gradient accumulation that is once a micro-batch, so
    ``decay`` holds per micro-batch: n of them forget as decay^n in one optimizer step.

    Args:
        size: K. dim: D. metric: ``euclidean`` or ``cosine``, for the choice of the code only: codes keep their length.
        learning: ``ema`` or ``gradient``. decay: of the moving averages.
        kmeans_init: start from k-means over the first training batch (of all ranks together).
        dead_code_threshold: share of the mean use below which a code is revived; 0 = never.
    """

    codebook: Tensor
    cluster_size: Tensor
    codebook_sum: Tensor
    initialized: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        metric: str = "euclidean",
        learning: str = "ema",
        decay: float = 0.99,
        kmeans_init: bool = True,
        dead_code_threshold: float = 0.1,
    ) -> None:
        super().__init__()
        if size < 2 or dim < 1:
            raise ValueError(f"expected codebook_size >= 2 and a width >= 1, got {size} and {dim}")
        if metric not in METRICS or learning not in LEARNING:
            raise ValueError(
                f"expected metric in {METRICS} and codebook in {LEARNING}, got {metric!r} and {learning!r}"
            )
        if not 0 <= decay < 1 or not 0 <= dead_code_threshold < 1:
            raise ValueError(
                f"expected decay and dead_code_threshold in [0, 1), got {decay} and {dead_code_threshold}; "
                f"the threshold is a share of the mean use of a code, not a count"
            )
        self.metric, self.learning, self.decay = metric, learning, decay
        self.kmeans_init, self.dead_code_threshold = kmeans_init, dead_code_threshold
        start = torch.randn(size, dim) / math.sqrt(dim)
        if learning == "gradient":
            self.codebook = nn.Parameter(start)
        else:
            self.register_buffer("codebook", start)
            self.register_buffer("codebook_sum", torch.zeros(size, dim))
        self.register_buffer("cluster_size", torch.zeros(size))
        self.register_buffer("initialized", torch.tensor(not kmeans_init))
        self._ready = not kmeans_init  # spares a device synchronisation in every step
        self.register_load_state_dict_post_hook(_look_again)

    def nearest(self, x: Tensor) -> Tensor:
        """x (N, D) -> codes (N,)."""
        return nearest_code(x, self.codebook, self.metric, check_finite=False)

    def lookup(self, codes: Tensor) -> Tensor:
        """codes (...) -> (..., D), with a gradient to a ``gradient`` codebook."""
        return F.embedding(codes, self.codebook)

    @torch.no_grad()
    def start(self, x: Tensor, valid: Tensor) -> None:
        """K-means over the valid rows of x (N, D) of all ranks, once; it waits for a batch that has such rows."""
        if self._ready:
            return
        if not bool(self.initialized):
            rows = gather_rows(x.detach()[valid])
            if rows.shape[0] == 0:
                return
            centroids, counts = kmeans(rows, self.cluster_size.shape[0], self.metric)
            self.codebook.copy_(from_rank_zero(centroids))
            self.cluster_size.copy_(from_rank_zero(counts))
            if self.learning == "ema":
                self.codebook_sum.copy_(self.codebook * self.cluster_size[:, None])
            self.initialized.fill_(True)
        self._ready = True

    def update(self, x: Tensor, codes: Tensor, valid: Tensor) -> None:
        """Move the averages by the valid rows of x (N, D) with codes (N,), over all ranks; then revive dead codes."""
        update_codebooks([(self, x, codes, valid)])

    def move(self, counts: Tensor, sums: Tensor) -> None:
        """Move the averages by one step's counts (K,) and vector sums (K, D); nothing changes if counts are all 0.

        Without a branch on the counts, which would make the host wait for the device.
        """
        some = counts.sum() > 0
        weight = torch.where(some, 1 - self.decay, 0.0).to(counts.dtype)
        self.cluster_size.lerp_(counts, weight)
        if self.learning == "ema":
            self.codebook_sum.lerp_(sums, weight)
            used = some & (self.cluster_size[:, None] > 1e-6)  # below, a quotient of two almost-zeros says nothing
            mean = self.codebook_sum / self.cluster_size[:, None].clamp_min(1e-6)
            self.codebook.copy_(torch.where(used, mean, self.codebook))

    @torch.no_grad()
    def count_each_once(self) -> None:
        """Give codes whose training statistics are not known those of a code that was used once, so that training can
        go on: with the zeros of a fresh codebook the first update would take most codes for dead."""
        self.cluster_size.fill_(1.0)
        if self.learning == "ema":
            self.codebook_sum.copy_(self.codebook * self.cluster_size[:, None])

    def dead(self) -> Tensor:
        """(K,) bool: codes to revive; none before the first update, and none where the threshold is 0."""
        return self.cluster_size < self.dead_code_threshold * self.cluster_size.mean()

    def revive(self, rows: Tensor, dead: Tensor, num_dead: int) -> None:
        """Put the ``num_dead`` codes where ``dead`` (K,) on random ones of rows (N, D), the same on every rank."""
        fresh = from_rank_zero(draw_rows(rows, num_dead))
        mean_size = self.cluster_size.mean()
        self.codebook[dead] = fresh
        self.cluster_size[dead] = mean_size
        if self.learning == "ema":
            self.codebook_sum[dead] = fresh * mean_size


@torch.no_grad()
def update_codebooks(steps: Sequence[tuple[Codebook, Tensor, Tensor, Tensor]]) -> None:
    """Update several codebooks of one K and D at once: one collective for all of them, and one wait for the device.

    The wait reads how many codes of each are dead, which is the same on every rank, since the averages are. Only a
    codebook that has dead codes then gathers this step's vectors and draws from them: in a healthy training that is
    rare. A draw of fixed size could do without the wait, but would send K vectors a rank and level in every step.

    Args:
        steps: for each codebook: itself, x (N, D), codes (N,) and valid (N,) bool; N may differ between them.
    """
    parts = []
    for book, x, codes, valid in steps:
        counts, sums = codebook_stats(x, codes, book.cluster_size.shape[0], valid)
        parts.append(torch.cat([counts[:, None], sums], 1))
    totals = sum_over_ranks(torch.stack(parts))  # (number of codebooks, K, 1 + D)
    for (book, *_), total in zip(steps, totals, strict=True):
        book.move(total[:, 0], total[:, 1:])
    if all(book.dead_code_threshold == 0 for book, *_ in steps):
        return
    some = totals[..., 0].sum(1, keepdim=True) > 0  # a step without a valid vector has nothing to revive with
    dead = torch.stack([book.dead() for book, *_ in steps]) & some
    for (book, x, _, valid), where, num_dead in zip(steps, dead, dead.sum(1).tolist(), strict=True):
        if num_dead:
            book.revive(gather_rows(x.detach()[valid]), where, num_dead)


def _look_again(book: nn.Module, incompatible_keys: object) -> None:
    """After loading weights, ``initialized`` may say something else."""
    book._ready = False  # type: ignore[assignment]


def draw_rows(rows: Tensor, n: int) -> Tensor:
    """n random rows of (N, D): distinct ones while they last, then repeats parted by a jitter of 1 % of the spread."""
    N = rows.shape[0]
    picks = [torch.randperm(N, device=rows.device) for _ in range(-(-n // N))]
    drawn = rows[torch.cat(picks)[:n]]
    if n > N:
        spread = rows.std(0, correction=0)
        drawn[N:] += 0.01 * spread * torch.randn_like(drawn[N:])
    return drawn


def kmeans(rows: Tensor, size: int, metric: str) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from random rows; memory O(N + size), not N x size.

    Args:
        rows: (N, D), N >= 1. size: K. metric: how the nearest centroid is chosen; centroids are plain means.

    Returns:
        centroids (K, D), and counts (K,) scaled to sum to N. A centroid without rows is put on a random row.
    """
    N = rows.shape[0]
    rows = draw_rows(rows, min(N, KMEANS_VECTORS_PER_CODE * size))
    centroids = draw_rows(rows, size)
    counts = rows.new_zeros(size)
    for _ in range(KMEANS_STEPS):
        codes = nearest_code(rows, centroids, metric, check_finite=False)
        counts, sums = codebook_stats(rows, codes, size)
        empty = counts == 0
        centroids = torch.where(empty[:, None], centroids, sums / counts.clamp_min(1)[:, None])
        num_empty = int(empty.sum())
        if num_empty:
            centroids[empty] = draw_rows(rows, num_empty)
    return centroids, counts * (N / rows.shape[0])
