"""Strided residual vector quantizer: coarse levels have one code for several positions (SNAC, arXiv 2410.14411)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmtok.quantizers.rvq import ResidualVectorQuantizer, all_valid


class StridedResidualVectorQuantizer(ResidualVectorQuantizer):
    """A residual chain whose level q averages what is left over groups of s_q positions, codes the mean once, and
    repeats the code (arXiv 2410.14411, multi-scale RVQ: average pooling before, nearest-neighbour upsampling after).

    Groups count from position 0. A mean is over the valid positions of its group, so the last group may be shorter,
    and padding changes nothing. codes (B, Q, T) repeat a level's code over its group, which is what
    `TokenSpec.level_strides` means. Whoever cuts a long signal cuts ``encode`` at multiples of the least common
    multiple of the strides. `decode` reads the code at each position itself: it decodes any cut, and codes that differ
    within a group (`encode` makes none) each count where they stand.

    Losses and statistics of a level count its groups, not the positions. With ``codebook_dim`` None the gradient is
    that of one outer step as in `ResidualVectorQuantizer`: straight through, each position gets its own.

    Defaults are SNAC's: factorised codes of width 8 chosen by cosine, codebooks that learn by gradient, K = 4096. The
    k-means start and the revival are ours; kmeans_init=False and dead_code_threshold=0 leave them out.

    Args:
        dim: D of z. level_strides: s_q of each level, coarse to fine; Q of them. codebook_size: K.
        The others: as `ResidualVectorQuantizer`.
    """

    type_name = "strided_rvq"

    def __init__(
        self,
        dim: int,
        level_strides: Sequence[int] = (4, 2, 1),
        codebook_size: int = 4096,
        codebook_dim: int | None = 8,
        metric: str = "cosine",
        codebook: str = "gradient",
        decay: float = 0.99,
        commitment_weight: float = 0.25,
        codebook_weight: float = 1.0,
        kmeans_init: bool = True,
        dead_code_threshold: float = 0.1,
        quantizer_dropout: float = 0.0,
        gradient: str = "straight_through",
    ) -> None:
        strides = tuple(int(s) for s in level_strides)
        if not strides or min(strides) < 1:
            raise ValueError(f"level_strides: expected at least one stride, each >= 1, got {strides}")
        super().__init__(
            dim,
            len(strides),
            codebook_size,
            codebook_dim,
            metric,
            codebook,
            decay,
            commitment_weight,
            codebook_weight,
            kmeans_init,
            dead_code_threshold,
            quantizer_dropout,
            gradient,
        )
        self._strides = strides

    @property
    def level_strides(self) -> tuple[int, ...]:
        return self._strides

    def config(self) -> dict:
        config = super().config()
        del config["num_codebooks"]
        return config | {"level_strides": list(self._strides)}

    def _pool(self, q: int, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        return group_mean(x, all_valid(x) if valid is None else valid, self._strides[q])

    def _repeat(self, q: int, x: Tensor, length: int) -> Tensor:
        return repeat_groups(x, self._strides[q], length)

    def _encode(self, z: Tensor, num_codebooks: int) -> Tensor:
        return self._encode_masked(z, None, num_codebooks)

    def _encode_masked(self, z: Tensor, mask: Tensor | None, num_codebooks: int) -> Tensor:
        residual, codes = z, []
        for q in range(num_codebooks):
            h = self._pool(q, residual, mask)[0]
            h = self.project_in[q](h) if self.codebook_dim is not None else h  # (B, G, d)
            code = self._book(q).nearest(h.flatten(0, 1)).view(h.shape[:2])
            y = self._book(q).lookup(code)
            y = self.project_out[q](y) if self.codebook_dim is not None else y  # (B, G, D)
            residual = residual - self._repeat(q, y, z.shape[1])
            codes.append(self._repeat(q, code, z.shape[1]))
        return torch.stack(codes, 1)


def group_mean(x: Tensor, valid: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """The mean of the valid positions in each group of ``stride`` positions, of which the last may be shorter.

    Sums position by position in order, so that a CPU and a GPU add alike and padding adds zeros at the end.

    Args:
        x: (B, T, D). valid: (B, T) bool. stride: >= 1.

    Returns:
        means (B, G, D), 0 in groups without a valid position, and (B, G) bool, true where there is one;
        G = ceil(T / stride). While a graph is captured G is larger, with empty groups at the end: a size that can be 1
        would tie the graph to lengths where it is not.
    """
    if stride == 1:
        return torch.where(valid[..., None], x, 0.0), valid
    T = x.shape[1]
    G = T // stride + 2 if torch.compiler.is_compiling() else -(-T // stride)
    starts = stride * torch.arange(G, device=x.device)  # (G,)
    total, count = x.new_zeros(1), x.new_zeros(1)
    for offset in range(stride):
        at = (starts + offset).clamp(max=T - 1)
        on = valid.index_select(1, at) & (starts + offset < T)  # (B, G)
        total = total + torch.where(on[..., None], x.index_select(1, at), 0.0)
        count = count + on
    return total / count.clamp_min(1)[..., None], count > 0


def repeat_groups(x: Tensor, stride: int, length: int) -> Tensor:
    """x (B, G, ...), one entry a group of ``stride`` positions -> (B, length, ...), one a position."""
    if stride == 1:
        return x
    return x.index_select(1, torch.arange(length, device=x.device) // stride)
