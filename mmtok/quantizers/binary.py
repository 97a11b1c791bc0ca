"""Binary quantizers: a code is a group of bits, each the sign of one number; no codebook is looked up."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mmtok.kernels.binary_codes import (
    MAX_CODE_BITS,
    MAX_JOINT_BITS,
    binary_entropy,
    binary_entropy_grouped,
    pack_bits,
    sign_pack,
    unpack_bits,
)
from mmtok.quantizers.base import Quantized, Quantizer, level_stats, masked_mean, straight_through, valid_levels
from mmtok.quantizers.linear import ExactLinear

KINDS = ("bernoulli", "sign", "spherical")
ENTROPIES = ("joint", "grouped")
_GROUP_BITS = 8
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
    all codes c of -|l - c|^2 / temperature, that of ``bernoulli`` its own distribution. The second entropy is

    * ``joint``: that of all 2^num_bits codes, exact (LFQ eq. 5, BSQ eq. 8); for at most 24 bits.
    * ``grouped``: the sum over groups of ``entropy_group_bits`` consecutive bits, for any number of bits. It is an
      upper bound of the joint one and does not see what bits of different groups have in common.

    Under several ranks each rank takes the entropy of its own part of the batch.

    A prefix of the levels decodes: the bits it does not tell contribute nothing.

    Args:
        dim: D of z. num_bits: bits a position. kind: see above.
        bits_per_code: bits that make one code of 2^bits_per_code values; divides num_bits.
        temperature: a plain attribute, so that a training schedule can set it; > 0.
        entropy_weight: None = 0.1 for ``sign`` and ``spherical``, 0 for ``bernoulli``.
        diversity_weight: see above. commitment_weight: of the commitment. init_std: of the ``bernoulli`` table.
        entropy: ``joint`` or ``grouped``; None = ``grouped`` where entropy_group_bits is named, else ``joint``.
        entropy_group_bits: 1..24, for ``grouped``; None = 8 there.

    Raises:
        ValueError: an argument out of range; more than 24 bits with a weighted ``joint`` entropy.
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
        entropy: str | None = None,
        entropy_group_bits: int | None = None,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
        if not 1 <= bits_per_code <= MAX_CODE_BITS or num_bits < 1 or num_bits % bits_per_code:
            raise ValueError(
                f"expected bits_per_code in 1..{MAX_CODE_BITS} that divides num_bits, "
                f"got {bits_per_code} and {num_bits}"
            )
        if temperature <= 0:
            raise ValueError(f"temperature: expected > 0, got {temperature}")
        if entropy is None:
            entropy = "joint" if entropy_group_bits is None else "grouped"
        if entropy == "grouped" and entropy_group_bits is None:
            entropy_group_bits = min(num_bits, _GROUP_BITS)
        entropy_weight = _ENTROPY_WEIGHT[kind] if entropy_weight is None else entropy_weight
        _check_entropy(entropy, entropy_group_bits, num_bits, entropy_weight)
        self.dim, self.num_bits, self.bits_per_code, self.kind = dim, num_bits, bits_per_code, kind
        self.codebook_sizes = (2**bits_per_code,) * (num_bits // bits_per_code)
        self.temperature = temperature
        self.entropy_weight, self.entropy = entropy_weight, entropy
        self.diversity_weight, self.commitment_weight = diversity_weight, commitment_weight
        self.init_std, self.entropy_group_bits = init_std, entropy_group_bits
        self.amplitude = 1 / math.sqrt(num_bits) if kind == "spherical" else 1.0
        self.project_in = ExactLinear(dim, num_bits)
        if kind == "bernoulli":
            self.embed = nn.Parameter(init_std * torch.randn(num_bits, dim))
        else:
            self.project_out = nn.Linear(num_bits, dim)

    def config(self) -> dict:
        names = "dim num_bits kind bits_per_code temperature entropy_weight diversity_weight commitment_weight"
        values = {name: getattr(self, name) for name in f"{names} init_std entropy entropy_group_bits".split()}
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
            codes = self.codes_from_bits(bits)
            values = straight_through(p, self._values(bits))
            commitment = masked_mean(p * (1 - p), mask)
            soft = logits / self.temperature
        else:
            codes = self._codes(logits)
            values = straight_through(logits, self._values(logits > 0))
            commitment = masked_mean((logits - values.detach()).square(), mask)
            soft = logits * (4 * self.amplitude / self.temperature)  # |l + a|^2 - |l - a|^2 = 4 a l
        stats = {"commitment_loss": commitment.detach()}
        loss = self.commitment_weight * commitment
        if self.entropy_weight:
            sample, codebook = self._entropies(soft, mask)
            stats |= {"sample_entropy": sample.detach(), "codebook_entropy": codebook.detach()}
            loss = loss + self.entropy_weight * (sample - self.diversity_weight * codebook)
        stats |= level_stats(codes, self.codebook_sizes[0], valid_levels(codes, mask))
        z_q, first = self._embed(values), values[..., : self.bits_per_code]
        return Quantized(z_q, codes, loss, stats, z_q if n == self.bits_per_code else self._embed(first))

    def _entropies(self, soft: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both entropies in nats a bit, from the log-odds (B, T, n)."""
        n = soft.shape[-1]
        rows, valid = soft.flatten(0, 1), None if mask is None else mask.flatten()
        if self.entropy_group_bits is None:
            sample, codebook = binary_entropy(rows, valid)
        else:
            sample, codebook = binary_entropy_grouped(rows, valid, self.entropy_group_bits)
        return sample / n, codebook / n

    def _encode(self, z: Tensor, num_codebooks: int) -> Tensor:
        return self._codes(self._logits(z)[..., : num_codebooks * self.bits_per_code])

    def _codes(self, logits: Tensor) -> Tensor:
        """(B, T, Q' * bits_per_code) -> (B, Q', T), bit = [logit > 0]."""
        return sign_pack(logits, self.bits_per_code).transpose(1, 2).contiguous()

    def _decode(self, codes: Tensor) -> Tensor:
        return self._embed(self._values(self.bits(codes)))


class LookupFreeQuantizer(BinaryQuantizer):
    """LFQ (arXiv 2310.05737, section 3.1): the `BinaryQuantizer` of kind ``sign``, as one code of num_bits bits.

    Args:
        bits_per_code: None = num_bits, at most 20; more bits are several codes.
        The others: as `BinaryQuantizer`. entropy_weight and commitment_weight are those of the paper's recipe.
    """

    kind_name = "sign"
    type_name = "lfq"

    def __init__(
        self,
        dim: int,
        num_bits: int,
        bits_per_code: int | None = None,
        temperature: float = 0.1,
        entropy_weight: float = 0.1,
        diversity_weight: float = 1.0,
        commitment_weight: float = 0.25,
        entropy: str | None = None,
        entropy_group_bits: int | None = None,
    ) -> None:
        super().__init__(
            dim,
            num_bits,
            self.kind_name,
            num_bits if bits_per_code is None else bits_per_code,
            temperature,
            entropy_weight,
            diversity_weight,
            commitment_weight,
            entropy=entropy,
            entropy_group_bits=entropy_group_bits,
        )

    def config(self) -> dict:
        values = super().config() | {"type": self.type_name}
        del values["kind"], values["init_std"]  # the scheme's own name says the kind; the table of bits is not there
        return values


class BinarySphericalQuantizer(LookupFreeQuantizer):
    """BSQ (arXiv 2406.07548): the `BinaryQuantizer` of kind ``spherical``, as one code of num_bits bits.

    The numbers are scaled to length 1, as are the codes, so the distance between them stays below sqrt(2) whatever
    num_bits. Args: as `LookupFreeQuantizer`.
    """

    kind_name = "spherical"
    type_name = "bsq"


def _check_entropy(entropy: str, group_bits: int | None, num_bits: int, weight: float) -> None:
    if entropy not in ENTROPIES:
        raise ValueError(f"entropy: expected one of {', '.join(ENTROPIES)}, got {entropy!r}")
    if entropy == "joint" and group_bits is not None:
        raise ValueError(
            f'entropy_group_bits: expected None with entropy="joint", got {group_bits}; '
            f'pass entropy="grouped" for an entropy by groups'
        )
    if group_bits is not None and not 1 <= group_bits <= MAX_JOINT_BITS:
        raise ValueError(f"entropy_group_bits: expected 1..{MAX_JOINT_BITS}, got {group_bits}")
    if entropy == "joint" and num_bits > MAX_JOINT_BITS and weight:
        raise ValueError(
            f"num_bits: expected at most {MAX_JOINT_BITS} for the joint entropy, got {num_bits}; "
            f'pass entropy="grouped" (an upper bound, see the class), or entropy_weight=0'
        )
