from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtok.kernels.binary_codes import (
    binary_entropy,
    binary_entropy_grouped,
    binary_entropy_reference,
    pack_bits,
    unpack_bits,
)
from mmtok.kernels.dispatch import force
from mmtok.kernels.scalar_codes import pack_digits, unpack_digits


@settings(deadline=None, max_examples=30)
@given(levels=st.lists(st.integers(2, 9), min_size=1, max_size=7), seed=st.integers(0, 99))
def test_digits_and_codes_are_one_to_one(levels, seed):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, math.prod(levels), (3, 5), generator=g)
    digits = unpack_digits(codes, levels)
    assert digits.shape == (3, 5, len(levels)) and bool(((digits >= 0) & (digits < torch.tensor(levels))).all())
    assert torch.equal(pack_digits(digits, levels), codes)
    weights = torch.tensor([math.prod(levels[:i]) for i in range(len(levels))])
    assert torch.equal((digits * weights).sum(-1), codes)


def test_digit_count_is_checked():
    with pytest.raises(ValueError, match="last axis of 3"):
        pack_digits(torch.zeros(4, 2, dtype=torch.int64), (2, 3, 4))


@settings(deadline=None, max_examples=20)
@given(num_bits=st.integers(1, 40), seed=st.integers(0, 99))
def test_bits_and_codes_are_one_to_one(num_bits, seed):
    bits = torch.rand(4, 6, num_bits, generator=torch.Generator().manual_seed(seed)) > 0.5
    codes = pack_bits(bits)
    assert torch.equal(unpack_bits(codes, num_bits), bits)
    assert int(codes[0, 0]) == sum(int(b) << k for k, b in enumerate(bits[0, 0].tolist()))  # little-endian


def test_bit_count_is_checked():
    with pytest.raises(ValueError, match=r"1\.\.62 bits, got 63"):
        pack_bits(torch.zeros(2, 63))


@pytest.mark.parametrize("D", [1, 2, 5, 8])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [0.3, 3.0, 30.0])
def test_entropies_equal_the_full_table(D, masked, scale):
    torch.manual_seed(D)
    logits = (scale * torch.randn(41, D)).requires_grad_()
    mask = torch.rand(41) < 0.6 if masked else None
    fast, slow = binary_entropy(logits, mask), binary_entropy_reference(logits, mask)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-6, rtol=2e-6)
        (g_fast,) = torch.autograd.grad(a, logits, retain_graph=True)
        (g_slow,) = torch.autograd.grad(b, logits, retain_graph=True)
        torch.testing.assert_close(g_fast, g_slow, atol=1e-6, rtol=1e-4)
    if mask is not None:
        assert bool((g_fast[~mask] == 0).all())


def test_rare_codes_keep_a_gradient_direction():
    """At 2^18 codes p is 3.8e-6: log(clamp(p, 1e-5)) has one derivative for all of them and a maximum of 11.51."""
    torch.manual_seed(0)
    logits = (0.05 * torch.randn(16, 18)).requires_grad_()
    _, codebook = binary_entropy(logits)
    assert 12.4 < float(codebook.detach()) <= 18 * math.log(2) + 1e-4
    (g,) = torch.autograd.grad(codebook, logits)
    assert bool(torch.isfinite(g).all()) and float(g.abs().max()) > 1e-4


def test_saturated_bits_are_finite():
    logits = torch.tensor([[300.0, -300.0, 0.0], [-300.0, 300.0, 0.0]], requires_grad=True)
    sample, codebook = binary_entropy(logits)
    torch.testing.assert_close(sample, torch.tensor(math.log(2)))
    torch.testing.assert_close(codebook, torch.tensor(2 * math.log(2)))
    (g,) = torch.autograd.grad(sample + codebook, logits)
    assert bool(torch.isfinite(g).all())


def test_groups_bound_the_joint_entropy():
    torch.manual_seed(0)
    one = torch.randn(200, 3)
    logits = 4 * torch.cat(
        [one, one], 1
    )  # bits repeat: the joint entropy is that of half the bits, groups cannot see it
    joint, grouped = binary_entropy(logits), binary_entropy_grouped(logits, bits_per_group=3)
    torch.testing.assert_close(joint[0], grouped[0])
    assert float(grouped[1]) > float(joint[1]) + 0.5
    torch.testing.assert_close(binary_entropy_grouped(logits, bits_per_group=6), joint)
    wide = torch.randn(30, 64)
    with force("reference"):
        expected = binary_entropy_grouped(wide, bits_per_group=7)
    for a, b in zip(binary_entropy_grouped(wide, bits_per_group=7), expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


def test_no_valid_row_gives_zero():
    sample, codebook = binary_entropy(torch.randn(4, 3), torch.zeros(4, dtype=torch.bool))
    assert float(sample) == 0 and float(codebook) == 0


def test_too_many_bits_names_the_other_function():
    with pytest.raises(ValueError, match="binary_entropy_grouped"):
        binary_entropy(torch.zeros(2, 21))
