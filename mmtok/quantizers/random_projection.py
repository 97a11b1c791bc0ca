"""Random-projection quantizer (BEST-RQ): frozen random directions label the input; nothing is learned."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmtok.kernels.nearest_code import nearest_code
from mmtok.kernels.row_search import unit
from mmtok.quantizers.base import Quantized, Quantizer, level_stats, straight_through, valid_levels
from mmtok.quantizers.frozen import exact_product
from mmtok.quantizers.sync import sum_over_ranks

NORMALIZATIONS = ("running", "given")
_SMALLEST_STD = 1e-6
_NUM_NOISE_SAMPLES = 1024


class RandomProjectionQuantizer(Quantizer):
    """code_q = argmin_k |c_qk / |c_qk| - A_q x / |A_q x||, x the normalised z (arXiv 2202.01855, section 3.1 eq. 1).

    The A_q (d x D, Xavier uniform) and c_qk (normal, scaled to length 1) are drawn once from ``seed`` and never learn;
    several codebooks are independent of each other, each with its own A_q. The codes are targets for masked prediction,
    so there is no loss and no parameter.

    Normalisation: each of the D numbers to mean 0 and deviation 1, without which one direction takes all codes.
    ``running``: mean and deviation of all valid vectors seen in training mode (of all ranks) before this batch, or in
    the first one, every vector weighed alike; codes settle as these do. ``given``: fixed until `set_statistics` is
    called (mean 0 and deviation 1 at the start).

    Decoding: the code says the direction of A_q x; the length of the target t_q is set to |A_q|_F, the root mean square
    for inputs of unit covariance. z_q is the least-squares preimage under that covariance,
        argmin_x  sum_q |A_q x - t_q|^2 / v_q + |x|^2,
    put back on the scale of z; v_q is the mean square of A_q x - t_q a number, measured on Gaussian inputs drawn from
    ``seed``. (The bare pseudo-inverse, v = 0, blows the error up near k d = D, past that of decoding to the mean.) A
    prefix uses the levels it has, the others contribute nothing. With k d < D most of z is lost: this is a labeller,
    not a codec. The gradient of z_q to z is exactly one.

    Args:
        dim: D. codebook_size: K. num_codebooks: Q. codebook_dim: d <= D. normalize: see above.
        seed: of the frozen tensors; they are also in the state dict, so a loaded quantizer does not depend on it.
    """

    projection: Tensor
    codebooks: Tensor
    mean: Tensor
    std: Tensor
    num_seen: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int = 8192,
        num_codebooks: int = 1,
        codebook_dim: int = 16,
        normalize: str = "running",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if codebook_size < 2 or num_codebooks < 1 or not 1 <= codebook_dim <= dim:
            raise ValueError(
                f"expected codebook_size >= 2, num_codebooks >= 1 and codebook_dim in 1..dim, got {codebook_size}, "
                f"{num_codebooks} and {codebook_dim} with dim {dim}"
            )
        if normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize: expected one of {', '.join(NORMALIZATIONS)}, got {normalize!r}")
        self.dim, self.codebook_sizes = dim, (codebook_size,) * num_codebooks
        self.codebook_dim, self.normalize, self.seed = codebook_dim, normalize, seed
        g = torch.Generator().manual_seed(seed)
        bound = math.sqrt(6 / (dim + codebook_dim))  # Xavier
        projection = bound * (2 * torch.rand(num_codebooks, codebook_dim, dim, generator=g, device="cpu") - 1)
        directions = torch.randn(num_codebooks, codebook_size, codebook_dim, generator=g, device="cpu")
        self.register_buffer("projection", projection)  # (Q, d, D)
        self.register_buffer("codebooks", unit(directions))  # (Q, K, d)
        noise = self._target_noise(torch.randn(_NUM_NOISE_SAMPLES, dim, generator=g, device="cpu"))  # (Q,)
        a = projection.double()
        for k in range(1, num_codebooks + 1):  # the answer for k levels is no sum of answers for one
            scaled = (a[:k] / noise[:k, None, None]).flatten(0, 1)  # (k d, D), V^-1 A
            normal = a[:k].flatten(0, 1).T @ scaled + torch.eye(dim, dtype=torch.float64)
            preimage = torch.linalg.solve(normal, scaled.T).T  # V^-1 A (A' V^-1 A + I)^-1
            self.register_buffer(f"preimage_{k}", preimage.float().contiguous())  # (k d, D)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))
        self.register_buffer("num_seen", torch.zeros((), dtype=torch.int64))
        self._started = False  # spares a device synchronisation in every step
        self.register_load_state_dict_post_hook(_look_again)

    def config(self) -> dict:
        return {
            "type": "random_projection",
            "dim": self.dim,
            "codebook_size": self.codebook_sizes[0],
            "num_codebooks": self.num_codebooks,
            "codebook_dim": self.codebook_dim,
            "normalize": self.normalize,
            "seed": self.seed,
        }

    @torch.no_grad()
    def set_statistics(self, mean: Tensor | Sequence[float], std: Tensor | Sequence[float]) -> None:
        """Normalise by mean and std (D,) from now on, for ``given``.

        Raises:
            ValueError: ``running``, a wrong shape, or a deviation that is not positive and finite.
        """
        if self.normalize != "given":
            raise ValueError(
                f'normalize: expected "given" to set statistics, got {self.normalize!r}, which learns them'
            )
        m, s = (torch.as_tensor(x, dtype=torch.float32, device=self.mean.device) for x in (mean, std))
        if m.shape != (self.dim,) or s.shape != (self.dim,):
            raise ValueError(f"expected mean and std of shape ({self.dim},), got {tuple(m.shape)} and {tuple(s.shape)}")
        if not bool(torch.isfinite(m).all() and torch.isfinite(s).all() and (s > 0).all()):
            raise ValueError(
                "expected a finite mean and a std > 0 in every dimension; drop dimensions that are constant"
            )
        self.mean.copy_(m)
        self.std.copy_(s)

    @torch.no_grad()
    def _target_noise(self, x: Tensor) -> Tensor:
        """(Q,) fp64: for standard normal x (N, D), the mean square of A_q x - t_q, a number."""
        noise = []
        for A, codebook in zip(self.projection, self.codebooks, strict=True):
            y = x @ A.T
            target = codebook[nearest_code(y, codebook, "cosine")] * A.norm()
            noise.append((y - target).double().square().mean())
        return torch.stack(noise)

    @torch.no_grad()
    def _learn_statistics(self, z: Tensor, mask: Tensor | None) -> None:
        """Join this batch's mean and deviation to those so far (Chan's rule: no difference of large sums)."""
        x = z.detach().flatten(0, 1)  # (N, D), 0 where masked
        weight = x.new_ones(len(x)) if mask is None else mask.flatten().float()
        n = sum_over_ranks(weight.sum())
        mean = sum_over_ranks((x * weight[:, None]).sum(0)) / n.clamp_min(1)
        spread = sum_over_ranks(((x - mean).square() * weight[:, None]).sum(0))
        seen, old_mean, old_spread = self.num_seen.float(), self.mean, self.std.square()
        total = (seen + n).clamp_min(1)
        step = mean - old_mean
        spread = spread + old_spread * seen + step.square() * (seen * n / total)
        moved = n > 0
        self.mean.copy_(torch.where(moved, old_mean + step * (n / total), old_mean))
        std = (spread / total).sqrt().clamp_min(_SMALLEST_STD)
        self.std.copy_(torch.where(moved, std, self.std))
        self.num_seen.add_(n.long())

    def _quantize(self, z: Tensor, mask: Tensor | None, num_codebooks: int | None) -> Quantized:
        learns = self.training and self.normalize == "running"
        first_batch = learns and not self._has_started()
        if first_batch:
            self._learn_statistics(z, mask)
        codes = self._encode(z, num_codebooks or self.num_codebooks)
        stats = level_stats(codes, self.codebook_sizes[0], valid_levels(codes, mask))
        no_loss = 0.0 * (z - z.detach()).sum()  # connected to z, so that a training loop can add it
        z_q = straight_through(z, self._decode(codes))
        first = z_q if codes.shape[1] == 1 else straight_through(z, self._decode(codes[:, :1]))
        if learns and not first_batch:
            self._learn_statistics(z, mask)
        return Quantized(z_q, codes, no_loss, stats, first)

    def _has_started(self) -> bool:
        self._started = self._started or bool(self.num_seen > 0)
        return self._started

    def _encode(self, z: Tensor, num_codebooks: int) -> Tensor:
        x = ((z - self.mean) / self.std).flatten(0, 1)  # (N, D)
        codes = [
            nearest_code(exact_product(x, self.projection[q].T), self.codebooks[q], "cosine", check_finite=False)
            for q in range(num_codebooks)
        ]
        return torch.stack(codes).view(num_codebooks, z.shape[0], z.shape[1]).transpose(0, 1).contiguous()

    def _decode(self, codes: Tensor) -> Tensor:
        k = codes.shape[1]
        lengths = self.projection[:k].square().sum((1, 2)).sqrt()  # (k,)
        targets = [self.codebooks[q][codes[:, q]] * lengths[q] for q in range(k)]  # k times (B, T, d)
        return exact_product(torch.cat(targets, -1), getattr(self, f"preimage_{k}")) * self.std + self.mean


def _look_again(quantizer: nn.Module, incompatible_keys: object) -> None:
    """After loading weights, ``num_seen`` may say something else."""
    quantizer._started = False  # type: ignore[assignment]
