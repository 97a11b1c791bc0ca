"""What every quantizer takes and returns: z (B, T, D) in, codes (B, Q, T) and z_q (B, T, D) out, in fp32."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mmtok.kernels.codebook_stats import usage_perplexity
from mmtok.kernels.nearest_code import check_is_finite


@dataclasses.dataclass
class Quantized:
    """What a quantizer's forward gives.

    Args:
        z_q: (B, T, D) fp32, 0 at masked positions; gradient to z by the straight-through rule of the scheme.
        codes: (B, Q, T) int64, 0 at masked positions.
        loss: scalar, the weighted terms together.
        stats: ``usage``, ``perplexity`` and ``dead_share`` (Q,) from this batch's counts (see
            `mmtok.kernels.codebook_stats.usage_perplexity`; of this process, not of all ranks), and each loss term
            before its weight, scalar; all detached.
        z_q_first: (B, T, D) what the first level alone decodes to, with its gradient, 0 at masked positions: what a
            semantic loss on the first level takes. Left out, it is z_q itself (schemes with one codebook).
    """

    z_q: Tensor
    codes: Tensor
    loss: Tensor
    stats: dict[str, Tensor]
    z_q_first: Tensor = None  # type: ignore[assignment]  # never None after construction

    def __post_init__(self) -> None:
        if self.z_q_first is None:
            self.z_q_first = self.z_q


class Quantizer(nn.Module, abc.ABC):
    """Base class: checks, fp32 and masks. A subclass sets ``dim`` and ``codebook_sizes`` and writes four methods.

    Its parameters and buffers stay fp32 when a model is moved to bf16 (``model.bfloat16()``): EMA sums and near-ties
    do not survive 8 bits of mantissa.
    """

    dim: int
    codebook_sizes: tuple[int, ...]

    @abc.abstractmethod
    def _quantize(self, z: Tensor, mask: Tensor | None, num_codebooks: int | None) -> Quantized:
        """z (B, T, D) fp32, 0 where mask (B, T) is false; num_codebooks as the caller gave it, in range."""

    @abc.abstractmethod
    def _encode(self, z: Tensor, num_codebooks: int) -> Tensor:
        """z (B, T, D) fp32 -> codes (B, Q', T)."""

    @abc.abstractmethod
    def _decode(self, codes: Tensor) -> Tensor:
        """codes (B, Q', T) in range -> (B, T, D) fp32."""

    @abc.abstractmethod
    def config(self) -> dict:
        """Plain values from which `build_quantizer` makes a quantizer of the same shape and behaviour."""

    @property
    def num_codebooks(self) -> int:
        return len(self.codebook_sizes)

    @property
    def level_strides(self) -> tuple[int, ...]:
        """Level q has a new code at every level_strides[q]-th position and repeats it between: `TokenSpec` takes it."""
        return (1,) * self.num_codebooks

    def forward(self, z: Tensor, mask: Tensor | None = None, num_codebooks: int | None = None) -> Quantized:
        """Quantize; in training mode also update codebooks that learn from statistics.

        Args:
            z: (B, T, D), any floating type; computed in fp32 whatever the autocast.
            mask: (B, T) bool, true where valid. Masked positions get code 0 and z_q 0 and influence nothing.
            num_codebooks: use only the first so many levels; None = all.

        Raises:
            ValueError: wrong shape, num_codebooks out of range, NaN or infinity at a valid position or in the weights.
        """
        self._check_levels(num_codebooks)
        self._check_shape(z)
        z = _masked(z, mask)
        check_is_finite(z, "z")
        with torch.autocast(z.device.type, enabled=False):
            out = self._quantize(z.float(), mask, num_codebooks)
        if not torch.compiler.is_compiling() and z.device.type != "meta" and not bool(torch.isfinite(out.loss)):
            raise ValueError(
                f"expected a finite loss for finite z, got {float(out.loss.detach())}: weights or codebooks of the "
                f"quantizer are not finite, as after a training that diverged; go back to an earlier checkpoint and "
                f"lower the learning rate"
            )
        if mask is not None:
            single = out.z_q_first is out.z_q
            out.z_q = torch.where(mask[..., None], out.z_q, 0.0)
            out.z_q_first = out.z_q if single else torch.where(mask[..., None], out.z_q_first, 0.0)
            out.codes = torch.where(mask[:, None], out.codes, 0)
        return out

    def encode(self, z: Tensor, num_codebooks: int | None = None, mask: Tensor | None = None) -> Tensor:
        """z (B, T, D) -> codes (B, Q', T) int64; the first k levels do not depend on how many are asked for.

        Args:
            z, num_codebooks, mask: as `forward`. Only a quantizer whose codes span several positions needs the mask for
                anything but zeros at masked positions.

        Raises:
            ValueError: as `forward`.
        """
        num_codebooks = self._check_levels(num_codebooks)
        self._check_shape(z)
        z = _masked(z, mask)
        check_is_finite(z, "z")
        with torch.autocast(z.device.type, enabled=False):
            codes = self._encode_masked(z.float(), mask, num_codebooks)
        return codes if mask is None else torch.where(mask[:, None], codes, 0)

    def _encode_masked(self, z: Tensor, mask: Tensor | None, num_codebooks: int) -> Tensor:
        """`_encode`, for schemes whose codes of valid positions depend on which others are valid."""
        return self._encode(z, num_codebooks)

    def decode(self, codes: Tensor) -> Tensor:
        """codes (B, Q', T) int64, any 1 <= Q' <= Q levels from the first -> z_q (B, T, D) fp32.

        Raises:
            ValueError: wrong shape or type, or a code outside its level's 0..K-1.
        """
        Q = self.num_codebooks
        if codes.ndim != 3 or not 1 <= codes.shape[1] <= Q or codes.dtype != torch.int64:
            raise ValueError(
                f"codes: expected int64 of shape (B, 1..{Q}, T), got {codes.dtype} of shape {tuple(codes.shape)}; "
                f"levels come before positions"
            )
        if not torch.compiler.is_compiling():
            sizes = torch.tensor(self.codebook_sizes[: codes.shape[1]], device=codes.device)[:, None]
            bad = (codes < 0) | (codes >= sizes)  # (B, Q', T)
            if bool(bad.any()):
                b, q, t = (int(i) for i in bad.nonzero()[0])
                raise ValueError(
                    f"codes: expected 0..{self.codebook_sizes[q] - 1} at level {q}, got {int(codes[b, q, t])} "
                    f"at item {b}, position {t} ({int(bad.sum())} such codes); "
                    f"pass this quantizer's own codes, not LLM ids"
                )
        with torch.autocast(codes.device.type, enabled=False):
            return self._decode(codes)

    def _check_levels(self, num_codebooks: int | None) -> int:
        Q = self.num_codebooks
        if num_codebooks is None:
            return Q
        if not 1 <= num_codebooks <= Q:
            raise ValueError(f"num_codebooks: expected 1..{Q}, got {num_codebooks}")
        return num_codebooks

    def _check_shape(self, z: Tensor) -> None:
        if z.ndim != 3 or z.shape[2] != self.dim or not z.is_floating_point():
            raise ValueError(
                f"z: expected a floating point tensor of shape (B, T, {self.dim}), got {z.dtype} of shape "
                f"{tuple(z.shape)}; latents are channels-last: use z.transpose(1, 2) on (B, D, T)"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        def keep_type(t: Tensor) -> Tensor:
            moved = fn(t)
            return t.to(moved.device) if moved.dtype != t.dtype else moved

        return super()._apply(keep_type, recurse)


def _masked(z: Tensor, mask: Tensor | None) -> Tensor:
    """z (B, T, D) with 0 where mask (B, T) is false.

    Raises:
        ValueError: the mask is not bool of that shape.
    """
    if mask is None:
        return z
    if mask.shape != z.shape[:2] or mask.dtype != torch.bool:
        raise ValueError(
            f"mask: expected bool of shape {tuple(z.shape[:2])} (true = valid), "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    return torch.where(mask[..., None], z, 0.0)


def straight_through(z: Tensor, z_q: Tensor) -> Tensor:
    """z_q in value (exactly, since z - z is 0), z in gradient; no gradient to z_q."""
    return z_q.detach() + (z - z.detach())


def level_stats(codes: Tensor, codebook_size: int, valid: Tensor) -> dict[str, Tensor]:
    """Usage statistics of each level from codes (B, Q, T) and valid (B, Q, T) bool; each (Q,).

    All levels have the same K; one scatter counts them together.
    """
    Q = codes.shape[1]
    rows = codes + codebook_size * torch.arange(Q, device=codes.device)[:, None]  # (B, Q, T)
    counts = torch.zeros(Q * codebook_size, device=codes.device)
    counts.scatter_add_(0, rows.flatten(), valid.flatten().float())
    return usage_perplexity(counts.view(Q, codebook_size))


def valid_levels(codes: Tensor, mask: Tensor | None) -> Tensor:
    """(B, Q, T) bool: the mask (B, T), or all true, at every level of codes (B, Q, T)."""
    return torch.ones_like(codes, dtype=torch.bool) if mask is None else mask[:, None].expand_as(codes)


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of x (..., D) over the rows where mask (...) is true; 0, still connected to x, when there is none."""
    if mask is None:
        return x.mean()
    return torch.where(mask[..., None], x, 0.0).sum() / (mask.sum() * x.shape[-1]).clamp_min(1)
