"""Binary quantizer: a code is a group of bits, each the sign of one number; no codebook is looked up."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mmtok.kernels.binary_codes import MAX_JOINT_BITS, binary_entropy, binary_entropy_grouped, pack_bits, unpack_bits
from mmtok.quantizers.base import Quantized, Quantizer, level_stats, masked_mean, straight_through, valid_levels

KINDS = ("bernoulli", "sign", "spherical")
_ENTROPY_WEIGHT = {"bernoulli": 0.0, "sign": 0.1, "spherical": 0.1}  # what each scheme's own recipe has


class BinaryQuantizer(Quantizer):
    """z -> Linear -> ``num_bits`` numbers l -> bits b, packed into Q = num_bits / bits_per_code codes.

    * ``bernoulli`` (Instella-T2I): b ~ Bernoulli(sigmoid(l / temperature)) in training, b = [l > 0] otherwise; gradient
      through sigmoid(l) without the temperature; z_q = sum_k b_k e_k, one table row e_k a bit.
      Commitment: mean sigmoid(l) (1 - sigmoid(l)), which drives every bit to a decision.
    * ``sign`` (LFQ, arXiv 2310.05737): values a = +-1, gradient one to l; z_q = Linear(a).
      Commitment: mean (l - sg(a))^2.
    * ``spherical`` (BSQ, arXiv 2406.07548): l is scaled to length 1 first, a = +-1 / sqrt(num_bits); else as ``sign``.

    Entropy loss, in nats a bit: (mean entropy of the soft codes - diversity_weight * entropy of their mean) / num_bits:
    each vector sure of its code, all codes used alike. The soft code of ``sign`` and ``spherical`` is the softmax over
    all codes c of -|l - c|^2 / temperature, that of ``bernoulli`` its own distribution. Up to 20 bits the second
    entropy is exact; above, it is summed over groups of ``entropy_group_bits`` (an upper bound). Under several ranks
    each rank takes the entropy of its own part of the batch.

    A prefix of the levels decodes: the bits it does not tell contribute nothing.

    Args:
        dim: D of z. num_bits: bits a position. kind: see above.
        bits_per_code: bits that make one code of 2^bits_per_code values; divides num_bits.
        temperature: a plain attribute, so that a training schedule can set it; > 0.
        entropy_weight: None = 0.1 for ``sign`` and ``spherical``, 0 for ``bernoulli``.
        diversity_weight: see above. commitment_weight: of the commitment. init_std: of the ``bernoulli`` table.
        entropy_group_bits: 1..20, used when num_bits > 20.
    """

    def __init__(
        self,
        dim: int,
        num_bits: int,
        kind: str = "bernoulli",
        bits_per_code: int = 8,
        temperature: float = 0.1,
        entropy_weight: float | None = None,
        diversity_weight: float = 1.0,
        commitment_weight: float = 0.25,
        init_std: float = 0.02,
        entropy_group_bits: int = 8,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
        if not 1 <= bits_per_code <= MAX_JOINT_BITS or num_bits < 1 or num_bits % bits_per_code:
            raise ValueError(
                f"expected bits_per_code in 1..{MAX_JOINT_BITS} that divides num_bits, "
                f"got {bits_per_code} and {num_bits}"
            )
        if temperature <= 0:
            raise ValueError(f"temperature: expected > 0, got {temperature}")
        self.dim, self.num_bits, self.bits_per_code, self.kind = dim, num_bits, bits_per_code, kind
        self.codebook_sizes = (2**bits_per_code,) * (num_bits // bits_per_code)
        self.temperature = temperature
        self.entropy_weight = _ENTROPY_WEIGHT[kind] if entropy_weight is None else entropy_weight
        self.diversity_weight, self.commitment_weight = diversity_weight, commitment_weight
        self.init_std, self.entropy_group_bits = init_std, entropy_group_bits
        self.amplitude = 1 / math.sqrt(num_bits) if kind == "spherical" else 1.0
        self.project_in = nn.Linear(dim, num_bits)
        if kind == "bernoulli":
            self.embed = nn.Parameter(init_std * torch.randn(num_bits, dim))
        else:
            self.project_out = nn.Linear(num_bits, dim)

    def config(self) -> dict:
        names = "dim num_bits kind bits_per_code temperature entropy_weight diversity_weight commitment_weight"
        values = {name: getattr(self, name) for name in f"{names} init_std entropy_group_bits".split()}
        return {"type": "binary", **values}

    def bits(self, codes: Tensor) -> Tensor:
        """codes (B, Q', T) -> bits (B, T, Q' * bits_per_code) bool; bit k of level q at q * bits_per_code + k."""
        return unpack_bits(codes.transpose(1, 2), self.bits_per_code).flatten(2)

    def codes_from_bits(self, bits: Tensor) -> Tensor:
        """The inverse of `bits`: (B, T, Q' * bits_per_code), 0/1 or bool -> codes (B, Q', T) int64."""
        if bits.ndim != 3 or bits.shape[2] == 0 or bits.shape[2] % self.bits_per_code:
            raise ValueError(
                f"bits: expected shape (B, T, a multiple of {self.bits_per_code}), got {tuple(bits.shape)}; "
                f"whole codes only"
            )
        return pack_bits(bits.unflatten(2, (-1, self.bits_per_code))).transpose(1, 2).contiguous()

    def _logits(self, z: Tensor) -> Tensor:
        logits = self.project_in(z)
        if self.kind == "spherical":
            logits = logits / logits.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return logits  # (B, T, num_bits)

    def _embed(self, values: Tensor) -> Tensor:
        """Values of the first n bits (B, T, n), 0/1 or +-amplitude -> (B, T, D); later bits contribute nothing."""
        n = values.shape[-1]
        if self.kind == "bernoulli":
            return values @ self.embed[:n]
        return nn.functional.linear(values, self.project_out.weight[:, :n], self.project_out.bias)

    def _values(self, bits: Tensor) -> Tensor:
        return bits.float() if self.kind == "bernoulli" else (2.0 * bits - 1.0) * self.amplitude

    def _quantize(self, z: Tensor, mask: Tensor | None, num_codebooks: int | None) -> Quantized:
        n = (num_codebooks or self.num_codebooks) * self.bits_per_code
        logits = self._logits(z)[..., :n]  # (B, T, n)
        if self.kind == "bernoulli":
            p = torch.sigmoid(logits)
            sure = torch.sigmoid(logits.detach() / self.temperature)
            bits = torch.rand_like(sure) < sure if self.training else logits > 0
            values = straight_through(p, self._values(bits))
            commitment = masked_mean(p * (1 - p), mask)
            soft = logits / self.temperature
        else:
            bits = logits > 0
            values = straight_through(logits, self._values(bits))
            commitment = masked_mean((logits - values.detach()).square(), mask)
            soft = logits * (4 * self.amplitude / self.temperature)  # |l + a|^2 - |l - a|^2 = 4 a l
        codes = self.codes_from_bits(bits)
        stats = {"commitment_loss": commitment.detach()}
        loss = self.commitment_weight * commitment
        if self.entropy_weight:
            sample, codebook = self._entropies(soft, mask)
            stats |= {"sample_entropy": sample.detach(), "codebook_entropy": codebook.detach()}
            loss = loss + self.entropy_weight * (sample - self.diversity_weight * codebook)
        stats |= level_stats(codes, self.codebook_sizes[0], valid_levels(codes, mask))
        return Quantized(self._embed(values), codes, loss, stats)

    def _entropies(self, soft: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both entropies in nats a bit, from the log-odds (B, T, n)."""
        n = soft.shape[-1]
        rows, valid = soft.flatten(0, 1), None if mask is None else mask.flatten()
        if n <= MAX_JOINT_BITS:
            sample, codebook = binary_entropy(rows, valid)
        else:
            sample, codebook = binary_entropy_grouped(rows, valid, self.entropy_group_bits)
        return sample / n, codebook / n

    def _encode(self, z: Tensor, num_codebooks: int) -> Tensor:
        return self.codes_from_bits(self._logits(z)[..., : num_codebooks * self.bits_per_code] > 0)

    def _decode(self, codes: Tensor) -> Tensor:
        return self._embed(self._values(self.bits(codes)))
