"""The residual quantizer as EnCodec, and X-Codec after it, released their training: three faults kept, to be measured.

`recipes/claims_audio.py` compares it with `ResidualVectorQuantizer`, which has none of them. Encoding and decoding are
the same in both, and so are the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmtok.quantizers.base import Quantized, straight_through
from mmtok.quantizers.codebook import Codebook, update_codebooks
from mmtok.quantizers.rvq import LevelRun, ResidualVectorQuantizer


class LegacyCodebook(Codebook):
    """Dead codes by an absolute count, and a revival that the next update undoes.

    Fault 1: only the code is replaced; its moving averages stay, so the next update puts the old code back. Fault 2:
    a code is dead below ``dead_code_count`` assignments a step, whatever the batch, so that with fewer than that many
    vectors for each code nearly all of them are replaced in every step.
    """

    def __init__(self, size: int, dim: int, decay: float, kmeans_init: bool, dead_code_count: float):
        super().__init__(size, dim, decay=decay, kmeans_init=kmeans_init, dead_code_threshold=0.5)
        if dead_code_count < 0:
            raise ValueError(f"dead_code_count: expected 0 or more assignments a step, got {dead_code_count}")
        self.dead_code_count = dead_code_count

    @torch.no_grad()
    def count_each_once(self) -> None:
        """As often as keeps a code alive here."""
        self.cluster_size.fill_(max(1.0, self.dead_code_count))
        self.codebook_sum.copy_(self.codebook * self.cluster_size[:, None])

    def dead(self) -> Tensor:
        return self.cluster_size < self.dead_code_count

    def revive(self, rows: Tensor, dead: Tensor, num_dead: int) -> None:
        averages = self.cluster_size.clone(), self.codebook_sum.clone()
        super().revive(rows, dead, num_dead)
        self.cluster_size.copy_(averages[0])
        self.codebook_sum.copy_(averages[1])


class LegacyResidualVectorQuantizer(ResidualVectorQuantizer):
    """`ResidualVectorQuantizer` with `LegacyCodebook` and a straight-through residual.

    Fault 3: each level's straight-through output is subtracted with its gradient, which is one, so the residual of
    level 2 and later has none, and their commitment losses do not reach the encoder. Quantizer dropout draws one
    number of levels for the whole batch. ``updates_per_step`` is 2 in X-Codec's loop, whose discriminator step runs the
    generator a second time in training mode.

    Args:
        dim, num_codebooks, codebook_size, decay, commitment_weight, kmeans_init: as `ResidualVectorQuantizer`.
        dead_code_count: assignments a step below which a code is replaced; 2 in both releases.
        quantizer_dropout: whether a training batch uses a number of levels drawn from ``dropout_levels``.
        dropout_levels: those numbers; X-Codec's bitrates 0.5, 1, 1.5, 2 and 4 kbit/s are 1, 2, 3, 4 and 8 levels.
        updates_per_step: moving-average updates in one forward.
    """

    type_name = "rvq_legacy"

    def __init__(
        self,
        dim: int,
        num_codebooks: int,
        codebook_size: int,
        decay: float = 0.99,
        commitment_weight: float = 1.0,
        kmeans_init: bool = True,
        dead_code_count: float = 2.0,
        quantizer_dropout: bool = True,
        dropout_levels: tuple[int, ...] = (1, 2, 3, 4, 8),
        updates_per_step: int = 2,
    ) -> None:
        super().__init__(
            dim, num_codebooks, codebook_size, decay=decay, commitment_weight=commitment_weight, kmeans_init=kmeans_init
        )
        self.books = torch.nn.ModuleList(
            LegacyCodebook(codebook_size, dim, decay, kmeans_init, dead_code_count) for _ in range(num_codebooks)
        )
        self.dead_code_count, self.updates_per_step = dead_code_count, updates_per_step
        self.drops = quantizer_dropout
        self.dropout_levels = tuple(n for n in dropout_levels if n <= num_codebooks) or (num_codebooks,)

    def config(self) -> dict:
        book = self._book(0)
        return {
            "type": self.type_name,
            "dim": self.dim,
            "num_codebooks": self.num_codebooks,
            "codebook_size": self.codebook_sizes[0],
            "decay": book.decay,
            "commitment_weight": self.commitment_weight,
            "kmeans_init": book.kmeans_init,
            "dead_code_count": self.dead_code_count,
            "quantizer_dropout": self.drops,
            "dropout_levels": list(self.dropout_levels),
            "updates_per_step": self.updates_per_step,
        }

    def run(self, z: Tensor, valid: Tensor, levels: Tensor, num_codebooks: int) -> LevelRun:
        residual, total, first = z, torch.zeros_like(z), torch.zeros_like(z)
        codes, terms, seen = [], [], []
        for q in range(num_codebooks):
            on = valid & (levels > q)[:, None]  # (B, T)
            y, _, code, losses, looked_up = self._level(q, residual, residual, on)
            y = torch.where(on[..., None], straight_through(residual, y), 0.0)
            residual, total = residual - y, total + y
            first = first if q else total
            codes.append(torch.where(on, code, 0))
            terms.append(losses)
            seen.append(looked_up)
        return LevelRun(total, first, codes, terms, seen)

    def finish(self, run: LevelRun) -> Quantized:
        for _ in range(self.updates_per_step - 1 if self.training else 0):
            update_codebooks(run.seen)
        return super().finish(run)

    def _draw_levels(self, z: Tensor, num_codebooks: int | None) -> Tensor:
        if num_codebooks is None and self.training and self.drops:
            drawn = int(torch.randint(len(self.dropout_levels), ()))
            return torch.full((z.shape[0],), self.dropout_levels[drawn], device=z.device)
        return super()._draw_levels(z, num_codebooks)
