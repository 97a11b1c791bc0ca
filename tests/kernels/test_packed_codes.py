from __future__ import annotations

import math
from contextlib import contextmanager, nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mmtok.kernels.binary_codes import (
    MAX_JOINT_BITS,
    binary_entropy,
    binary_entropy_grouped,
    binary_entropy_reference,
    pack_bits,
    sign_pack,
    unpack_bits,
)
from mmtok.kernels.dispatch import force
from mmtok.kernels.scalar_codes import fsq_bound, fsq_pack, level_table, pack_digits, unpack_digits


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
@given(num_bits=st.integers(1, 62), seed=st.integers(0, 99))
def test_bits_and_codes_are_one_to_one(num_bits, seed):
    bits = torch.rand(4, 6, num_bits, generator=torch.Generator().manual_seed(seed)) > 0.5
    codes = pack_bits(bits)
    assert torch.equal(unpack_bits(codes, num_bits), bits)
    assert int(codes[0, 0]) == sum(int(b) << k for k, b in enumerate(bits[0, 0].tolist()))  # little-endian


def test_bit_count_is_checked():
    with pytest.raises(ValueError, match=r"1\.\.62 bits, got 63"):
        pack_bits(torch.zeros(2, 63))

    with pytest.raises(ValueError, match=r"num_bits: expected 1\.\.62, got 63"):
        unpack_bits(torch.zeros(2, dtype=torch.int64), 63)
    with pytest.raises(ValueError, match=r"bits_per_code: expected 1\.\.62, got 0"):
        sign_pack(torch.zeros(2, 4), 0)
    with pytest.raises(ValueError, match="multiple of 3"):
        sign_pack(torch.zeros(2, 4), 3)


@pytest.mark.parametrize(
    ("N", "D", "per_code"),
    [(0, 8, 4), (1, 1, 1), (5, 62, 62), (5000, 18, 18), (700, 64, 8), (300, 48, 24), (300, 50, 25)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_signs_are_packed_as_bits(N, D, per_code, dtype):
    """5000 rows of 18 bits are more than one block of rows."""
    torch.manual_seed(0)
    x = torch.randn(D, N).to(dtype).T  # not contiguous
    if N:
        x[0, 0] = 0.0
        x[-1, -1] = float("nan") if N > 1 else 1.0
    codes = sign_pack(x, per_code)
    bits = (x > 0).reshape(N, D // per_code, per_code)
    with force("reference"):
        assert torch.equal(codes, sign_pack(x, per_code))
        assert torch.equal(codes, pack_bits(bits))
    assert torch.equal(codes, pack_bits(bits)) and torch.equal(codes, pack_bits(bits.double()))
    assert codes.shape == (N, D // per_code) and codes.dtype == torch.int64
    assert torch.equal(unpack_bits(codes, per_code), bits)


FSQ_LEVELS = [(3,), (8, 5, 5, 5), (7, 7, 7, 7, 7), (1000, 1000, 16), (1000, 1000, 1000)]


def bounds(levels):
    n = torch.tensor(levels, dtype=torch.float32)
    half, offset = (n - 1) * 0.999 / 2, torch.where(n % 2 == 0, 0.5, 0.0)
    return torch.atanh(offset / half), half, offset


@pytest.mark.parametrize("levels", FSQ_LEVELS)
@pytest.mark.parametrize("shape", [(0,), (1,), (255,), (3, 300)])
def test_bounded_numbers_are_rounded_and_packed(levels, shape):
    torch.manual_seed(0)
    x = 2 * torch.randn(*shape, len(levels))
    constants = bounds(levels)
    bounded = fsq_bound(x, *constants)
    with force("reference"):
        assert torch.equal(bounded, fsq_bound(x, *constants))
    codes = fsq_pack(bounded, levels)
    digits = bounded.round().long() + torch.tensor(levels) // 2
    assert bool(((digits >= 0) & (digits < torch.tensor(levels))).all())
    assert torch.equal(codes, pack_digits(digits, levels)) and codes.shape == shape
    with force("reference"):
        assert torch.equal(codes, fsq_pack(bounded, levels))
    assert torch.equal(codes, fsq_pack(bounded.round(), levels))


def test_bounding_has_the_gradient_of_the_formula():
    torch.manual_seed(0)
    x = torch.randn(300, 4, requires_grad=True)
    shift, half, offset = bounds((8, 5, 5, 5))
    (g,) = torch.autograd.grad(fsq_bound(x, shift, half, offset).sum(), x)
    torch.testing.assert_close(g, (half * (1 - torch.tanh(x + shift).square())).detach())


@pytest.mark.parametrize("levels", [(2,), (8, 5, 5, 5), (64, 64, 64)])
def test_the_table_holds_what_every_code_means(levels):
    table = level_table(levels)
    codes = torch.arange(math.prod(levels))
    half = torch.tensor(levels) // 2
    assert torch.equal(table, (unpack_digits(codes, levels) - half) / half)
    assert table.dtype == torch.float32 and float(table.min()) == -1 and float(table.max()) <= 1
    assert torch.equal(fsq_pack(F.embedding(codes, table) * half, levels), codes)


def test_levels_are_checked():
    with pytest.raises(ValueError, match="decode larger sets by unpack_digits"):
        level_table((64, 64, 65))
    with pytest.raises(ValueError, match=r"product of at most 2\^62"):
        pack_digits(torch.zeros(2, 3, dtype=torch.int64), (2**31, 2**31, 2))
    with pytest.raises(ValueError, match="pack_digits takes integer digits"):
        fsq_pack(torch.zeros(2, 2, dtype=torch.int64), (3, 3))
    with pytest.raises(ValueError, match=r"expected shape \(2,\) each"):
        fsq_bound(torch.zeros(3, 2), torch.zeros(2), torch.zeros(1), torch.zeros(2))


@contextmanager
def medium_precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# Settings that let a CPU compute fp32 products in bf16.
lowered = pytest.mark.parametrize(
    "lower", [medium_precision, lambda: torch.autocast("cpu", torch.bfloat16)], ids=["medium", "autocast"]
)


@lowered
def test_no_precision_setting_changes_codes(lower):
    torch.manual_seed(0)
    x, levels = torch.randn(4099, 24), (7, 7, 7, 7, 7)
    bounded = fsq_bound(torch.randn(4099, 5), *bounds(levels))
    with force("reference"):
        expected = pack_bits(x > 0), sign_pack(x, 24), fsq_pack(bounded, levels)
    with lower():
        got = pack_bits(x > 0), sign_pack(x, 24), fsq_pack(bounded, levels)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@lowered
def test_no_precision_setting_changes_entropies(lower):
    """4096 rows, because small products are computed in fp32 whatever the setting."""
    torch.manual_seed(0)
    logits = torch.randn(4096, 14).requires_grad_()
    seen = []
    for setting in (nullcontext, lower):
        with setting():
            values = [*binary_entropy(logits), *binary_entropy_grouped(logits, bits_per_group=14)]
            seen.append((torch.stack(values).detach(), torch.autograd.grad(values[1] + values[3], logits)[0]))
    torch.testing.assert_close(seen[1][0], seen[0][0], atol=2e-6, rtol=2e-6)
    assert float((seen[1][1] - seen[0][1]).norm() / seen[0][1].norm()) < 1e-5


def entropy_parts(logits):
    return torch.stack(binary_entropy(logits)), torch.stack(binary_entropy_grouped(logits, bits_per_group=3))


CAPTURED = {
    "pack_bits": lambda x: pack_bits(x > 0),
    "sign_pack": lambda x: sign_pack(x, 2),
    "unpack_bits": lambda x: unpack_bits(x.long().abs()[:, 0], 5),
    "pack_digits": lambda x: pack_digits(x.long().abs() % 3, (3, 4, 3, 4)),
    "unpack_digits": lambda x: unpack_digits(x.long().abs()[:, 0] % 12, (3, 4)),
    "fsq_bound": lambda x: fsq_bound(x, *(t.clone() for t in CONSTANTS)),
    "fsq_pack": lambda x: fsq_pack(x.clamp(-1, 1), (3, 4, 5, 6)),
    "entropies": entropy_parts,
}
CONSTANTS = bounds((3, 4, 5, 6))


class Captured(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("name", CAPTURED)
def test_graphs_are_captured_whole(name):
    torch.manual_seed(0)
    x = 3 * torch.randn(21, 4)
    expected = CAPTURED[name](x)
    compiled = torch.compile(CAPTURED[name], fullgraph=True, backend="aot_eager")
    shapes = {"x": {0: torch.export.Dim("N", min=2)}}
    exported = torch.export.export(Captured(CAPTURED[name]), (x[:5],), dynamic_shapes=shapes).module()
    for got in (compiled(x), exported(x)):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("D", [1, 2, 5, 8, 12])
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


def test_the_largest_joint_entropy_is_that_of_independent_equal_bits():
    """All rows alike: H = sum of the bits' entropies, with the gradient -x s (1 - s) shared by the rows."""
    torch.manual_seed(0)
    row = torch.randn(MAX_JOINT_BITS, dtype=torch.float64)
    logits = row.float().expand(8, -1).clone().requires_grad_()
    codebook = binary_entropy(logits)[1]
    (g,) = torch.autograd.grad(codebook, logits)
    s = torch.sigmoid(row)
    bits = torch.special.entr(s) + torch.special.entr(1 - s)
    torch.testing.assert_close(codebook.detach().double(), bits.sum(), atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(g.double(), (-row * s * (1 - s) / 8).expand(8, -1), atol=1e-8, rtol=1e-5)


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
        binary_entropy(torch.zeros(2, MAX_JOINT_BITS + 1))
