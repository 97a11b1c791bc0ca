from __future__ import annotations

import math

import pytest
import torch

from mmtok.kernels.binary_codes import unpack_bits
from mmtok.quantizers import BinaryQuantizer, BinarySphericalQuantizer, LookupFreeQuantizer, build_quantizer


def make(kind: str, num_bits: int = 6, bits_per_code: int = 3, **options: float | str) -> BinaryQuantizer:
    torch.manual_seed(0)
    return BinaryQuantizer(5, num_bits, kind, bits_per_code, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["bernoulli", "sign", "spherical"])
def test_bits_and_codes(kind):
    quantizer = make(kind, 12, 4).eval()
    z = torch.randn(3, 7, 5)
    codes = quantizer.encode(z)
    bits = quantizer.bits(codes)
    assert quantizer.codebook_sizes == (16, 16, 16)
    assert torch.equal(bits, quantizer.project_in(z) > 0)
    assert torch.equal(quantizer.codes_from_bits(bits), codes)
    assert torch.equal(quantizer.codes_from_bits(bits[..., :8].float()), codes[:, :2])
    with pytest.raises(ValueError, match=r"a multiple of 4\), got \(3, 7, 10\)"):
        quantizer.codes_from_bits(bits[..., :10])


def test_values_of_the_three_kinds():
    z = torch.randn(3, 7, 5)
    bernoulli = make("bernoulli").eval()
    bits = (bernoulli.project_in(z) > 0).float()
    torch.testing.assert_close(bernoulli(z).z_q, bits @ bernoulli.embed)
    for kind, amplitude in (("sign", 1.0), ("spherical", 1 / math.sqrt(6))):
        quantizer = make(kind).eval()
        values = amplitude * torch.where(quantizer.project_in(z) > 0, 1.0, -1.0)
        torch.testing.assert_close(quantizer(z).z_q, quantizer.project_out(values))


@pytest.mark.parametrize("kind", ["bernoulli", "sign", "spherical"])
def test_bits_not_told_contribute_nothing(kind):
    quantizer = make(kind).eval()
    codes = quantizer.encode(torch.randn(2, 4, 5))
    prefix, full = quantizer.decode(codes[:, :1]), quantizer.decode(codes)
    bits = quantizer.bits(codes)[..., 3:].float()
    if kind == "bernoulli":
        rest = bits @ quantizer.embed[3:]
    else:
        rest = quantizer.amplitude * (2 * bits - 1) @ quantizer.project_out.weight[:, 3:].T
    torch.testing.assert_close(prefix + rest, full)


def test_bernoulli_draws_with_the_temperature_and_differentiates_without():
    quantizer = make("bernoulli", temperature=0.5)
    z = torch.randn(1, 1, 5)
    logits = quantizer.project_in(z).detach()[0, 0]
    drawn = quantizer.bits(quantizer(z.expand(1, 20000, 5)).codes).float().mean((0, 1))
    torch.testing.assert_close(drawn, torch.sigmoid(logits / 0.5), atol=0.015, rtol=0)
    quantizer.temperature = 1e-6  # what a schedule does
    assert torch.equal(quantizer(z).codes, quantizer.encode(z))
    x = z.clone().requires_grad_()
    weight = torch.randn(5)
    (grad,) = torch.autograd.grad((quantizer(x).z_q * weight).sum(), x)
    p = torch.sigmoid(logits)
    expected = (p * (1 - p) * (quantizer.embed @ weight)) @ quantizer.project_in.weight
    torch.testing.assert_close(grad[0, 0], expected)


def test_bernoulli_loss_is_the_mean_variance_of_the_bits():
    quantizer = make("bernoulli", commitment_weight=0.5)
    z = torch.randn(2, 9, 5)
    p = torch.sigmoid(quantizer.project_in(z))
    torch.testing.assert_close(quantizer(z).loss, 0.5 * (p * (1 - p)).mean())


@pytest.mark.parametrize("kind", ["bernoulli", "sign", "spherical"])
def test_loss_equals_the_softmax_over_the_whole_codebook(kind):
    """The entropies from softmax(-|l - c|^2 / temperature) over all 2^6 codes, as the papers write them."""
    quantizer = make(kind, temperature=0.3, entropy_weight=0.2, diversity_weight=1.5, commitment_weight=0.4).eval()
    z = torch.randn(2, 30, 5)
    mask = torch.rand(2, 30) < 0.7
    logits = quantizer.project_in(z)[mask].double()  # (N, 6)
    table = unpack_bits(torch.arange(64), 6).double()
    if kind == "bernoulli":
        log_p = (logits @ table.T / 0.3).log_softmax(1)
        commitment = (logits.sigmoid() * (-logits).sigmoid()).mean()
    else:
        if kind == "spherical":
            logits = logits / logits.norm(dim=1, keepdim=True)
        codes = (2 * table - 1) * quantizer.amplitude
        log_p = (-torch.cdist(logits, codes).square() / 0.3).log_softmax(1)
        commitment = torch.cdist(logits, codes).min(1).values.square().sum() / logits.numel()
    sample = -(log_p.exp() * log_p).sum(1).mean() / 6
    codebook = torch.special.entr(log_p.exp().mean(0)).sum() / 6
    out = quantizer(z, mask)
    torch.testing.assert_close(out.stats["sample_entropy"].double(), sample, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(out.stats["codebook_entropy"].double(), codebook, atol=1e-6, rtol=1e-5)
    expected = 0.4 * commitment + 0.2 * (sample - 1.5 * codebook)
    torch.testing.assert_close(out.loss.double(), expected, atol=1e-6, rtol=1e-5)


def test_entropy_loss_spreads_the_codes():
    """Latents with a large common offset give one code; the entropy loss alone makes the projection use many."""
    torch.manual_seed(0)
    z = torch.randn(4, 100, 5) + 5
    quantizer = make("sign", num_bits=6, bits_per_code=6, temperature=1.0, commitment_weight=0.0, entropy_weight=1.0)
    before = float(quantizer(z).stats["perplexity"])
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.03)
    for _ in range(60):
        optimizer.zero_grad()
        quantizer(z).loss.backward()
        optimizer.step()
    after = float(quantizer(z).stats["perplexity"])
    assert before < 5 and after > 20


@pytest.mark.parametrize("kind", ["sign", "spherical"])
def test_64_bits_train_by_groups(kind):
    quantizer = make(kind, 64, 16, entropy="grouped")
    z = torch.randn(2, 40, 5) + 2
    first = quantizer(z)
    assert first.codes.shape == (2, 4, 40) and 0 < float(first.stats["codebook_entropy"]) <= math.log(2) + 1e-6
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        out = quantizer(z)
        (out.loss + (out.z_q - z).square().mean()).backward()
        optimizer.step()
    after = quantizer(z)
    before_error, error = ((out.z_q.detach() - z).square().mean() for out in (first, after))
    assert float(after.loss.detach()) < float(first.loss.detach()) and float(error) < 0.7 * float(before_error)


def test_grouped_entropy_is_an_upper_bound_of_the_joint_one():
    z = torch.randn(2, 200, 5)
    joint = make("sign", 12, 4)
    loose, tight = (make("sign", 12, 4, entropy="grouped", entropy_group_bits=n) for n in (2, 12))
    values = [float(q(z).stats["codebook_entropy"]) for q in (joint, tight, loose)]
    assert values[0] == pytest.approx(values[1], abs=1e-5) and values[2] > values[0] + 0.1
    assert float(joint(z).stats["sample_entropy"]) == pytest.approx(float(loose(z).stats["sample_entropy"]), abs=1e-6)


def test_which_entropy_is_never_switched_silently():
    for kind in ("sign", "spherical"):
        with pytest.raises(ValueError, match='at most 24 for the joint entropy, got 32; pass entropy="grouped"'):
            make(kind, 32, 8)
    make("bernoulli", 32, 8)  # its entropy weighs nothing
    make("sign", 32, 8, entropy_weight=0.0)
    assert make("sign", 20, 10).entropy == "joint"
    assert make("sign", 24, 8, entropy="grouped").entropy_group_bits == 8
    assert make("sign", 4, 4, entropy="grouped").entropy_group_bits == 4
    named = make("sign", 24, 8, entropy_group_bits=6)  # as configurations from before there was a choice
    assert named.config()["entropy"] == "grouped" and named.config()["entropy_group_bits"] == 6
    with pytest.raises(ValueError, match='expected None with entropy="joint", got 6'):
        make("sign", 12, 4, entropy="joint", entropy_group_bits=6)
    with pytest.raises(ValueError, match=r"entropy_group_bits: expected 1\.\.24, got 25"):
        make("sign", 64, 8, entropy_group_bits=25)
    with pytest.raises(ValueError, match="entropy: expected one of joint, grouped"):
        make("sign", entropy="exact")


@pytest.mark.parametrize("scheme", [LookupFreeQuantizer, BinarySphericalQuantizer])
def test_lfq_and_bsq_are_the_binary_quantizer_by_name(scheme):
    torch.manual_seed(0)
    quantizer = scheme(5, 6, temperature=0.3).eval()
    assert quantizer.codebook_sizes == (64,)
    kind = {"lfq": "sign", "bsq": "spherical"}[quantizer.config()["type"]]
    same = build_quantizer({"type": "binary", "dim": 5, "num_bits": 6, "kind": kind, "bits_per_code": 6})
    same.temperature = 0.3
    same.load_state_dict(quantizer.state_dict())
    z = torch.randn(2, 30, 5)
    a, b = quantizer(z), same.eval()(z)
    assert torch.equal(a.codes, b.codes) and torch.equal(a.z_q, b.z_q) and torch.equal(a.loss, b.loss)
    assert build_quantizer(quantizer.config()).config() == quantizer.config()
    with pytest.raises(ValueError, match=r"bits_per_code in 1\.\.20"):
        scheme(5, 24, entropy="grouped")


def test_default_entropy_weight_is_shown():
    assert make("bernoulli").config()["entropy_weight"] == 0.0
    assert make("sign").config()["entropy_weight"] == 0.1
    assert "sample_entropy" not in make("bernoulli")(torch.randn(1, 4, 5)).stats


def test_constructor_names_what_is_wrong():
    with pytest.raises(ValueError, match="kind: expected one of bernoulli, sign, spherical"):
        make("gumbel")
    with pytest.raises(ValueError, match="divides num_bits"):
        make("sign", 10, 4)
    with pytest.raises(ValueError, match="temperature: expected > 0"):
        make("sign", temperature=0.0)
