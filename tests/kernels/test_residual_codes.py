from __future__ import annotations

import pytest
import torch

from mmtok.kernels.dispatch import force, installed
from mmtok.kernels.residual_codes import (
    factorised_codes,
    factorised_codes_reference,
    residual_codes,
    residual_codes_reference,
    residual_decode,
    residual_decode_reference,
)
from mmtok.kernels.row_search import block_rows


def books(Q: int, K: int, D: int, mean: float = 0.0) -> torch.Tensor:
    """Codebooks whose spread halves from level to level, as in a trained chain."""
    scale = 0.5 ** torch.arange(Q, dtype=torch.float32)
    out = torch.randn(Q, K, D) * scale[:, None, None]
    out[0] += mean
    return out


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(("N", "Q", "K", "D", "mean"), [(1, 1, 2, 1, 0), (37, 3, 65, 5, 0), (301, 6, 33, 17, 50)])
def test_codes_are_those_of_fp64(metric, N, Q, K, D, mean):
    torch.manual_seed(0)
    codebooks = books(Q, K, D, mean)
    z = mean + torch.randn(N, D)
    expected = residual_codes_reference(z, codebooks, metric)
    for implementation in ("torch", "numba") if installed("numba") else ("torch",):
        with force(implementation):
            codes = residual_codes(z, codebooks, metric)
        # Cosines of numbers are +-1: all codes of one sign tie up to rounding, even in fp64.
        if D > 1:
            assert torch.equal(codes, expected)
        assert codes.shape == (N, Q)


def test_blocks_join():
    torch.manual_seed(0)
    K = 1 << 13
    codebooks = books(2, K, 3)
    z = torch.randn(2 * block_rows(K, torch.device("cpu")) + 5, 3)
    assert torch.equal(residual_codes(z, codebooks), residual_codes_reference(z, codebooks))


def test_prefix_does_not_depend_on_later_levels():
    torch.manual_seed(0)
    codebooks, z = books(5, 40, 6), torch.randn(70, 6)
    codes = residual_codes(z, codebooks)
    errors = []
    for k in range(1, 6):
        assert torch.equal(residual_codes(z, codebooks[:k]), codes[:, :k])
        errors.append(float((z - residual_decode(codes[:, :k], codebooks)).square().mean()))
    assert errors == sorted(errors, reverse=True)


def test_decode_value_and_gradient():
    torch.manual_seed(0)
    codebooks = books(4, 9, 5).requires_grad_()
    codes = torch.randint(0, 9, (50, 3))
    fast, slow = residual_decode(codes, codebooks), residual_decode_reference(codes, codebooks)
    torch.testing.assert_close(fast, slow)
    weight = torch.randn_like(slow)
    (g_fast,) = torch.autograd.grad((fast * weight).sum(), codebooks)
    (g_slow,) = torch.autograd.grad((slow * weight).sum(), codebooks)
    torch.testing.assert_close(g_fast, g_slow)
    assert g_fast[:3].abs().sum() > 0 and g_fast[3].abs().sum() == 0


def test_codebooks_may_come_one_by_one():
    torch.manual_seed(0)
    codebooks, z = books(3, 30, 4), torch.randn(9, 4)
    assert torch.equal(residual_codes(z, list(codebooks)), residual_codes(z, codebooks))
    with pytest.raises(ValueError, match="NaN"):
        residual_codes(z, [codebooks[0], codebooks[1] * torch.nan])
    with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size"):
        residual_codes(z, [codebooks[0], codebooks[1][:5]])


def test_forced_reference():
    torch.manual_seed(0)
    codebooks, z = books(2, 7, 3), torch.randn(11, 3)
    with force("reference"):
        codes = residual_codes(z, codebooks)
        z_q = residual_decode(codes, codebooks)
    assert torch.equal(codes, residual_codes(z, codebooks))
    torch.testing.assert_close(z_q, residual_decode(codes, codebooks))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"codebooks: expected shape \(Q, K, D\)"):
        residual_codes(torch.zeros(2, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="expected width D = 3"):
        residual_codes(torch.zeros(2, 4), torch.zeros(1, 4, 3))
    with pytest.raises(ValueError, match="NaN"):
        residual_codes(torch.full((2, 3), float("nan")), torch.zeros(1, 4, 3))
    with pytest.raises(ValueError, match=r"codes: expected shape \(N, 1\.\.2\)"):
        residual_decode(torch.zeros(5, 3, dtype=torch.int64), torch.zeros(2, 4, 3))


def chain(Q: int, K: int, d: int, D: int) -> tuple[torch.Tensor, ...]:
    """in_weight, in_bias, codebooks, out_weight, out_bias of a factorised chain that reduces its residual."""
    out_weight = torch.linalg.qr(torch.randn(Q, D, d)).Q  # orthonormal columns, so that in_weight undoes it
    scale = 0.6 ** torch.arange(Q)[:, None, None]
    return (
        out_weight.mT.contiguous(),
        0.1 * torch.randn(Q, d),
        scale * torch.randn(Q, K, d),
        out_weight,
        torch.zeros(Q, D),
    )


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("N", [0, 1, 60])
def test_factorised_codes_are_those_of_the_plain_chain(metric, N):
    torch.manual_seed(0)
    weights = list(chain(4, 50, 3, 24))
    weights[4] = 0.1 * torch.randn(4, 24)
    z = torch.randn(N, 24)
    codes = factorised_codes(z, *weights, metric)
    assert torch.equal(codes, factorised_codes_reference(z, *weights, metric)) and codes.shape == (N, 4)
    with force("reference"):
        assert torch.equal(factorised_codes(z, *weights, metric), codes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(factorised_codes(z, *weights, metric), codes)


def test_factorised_codes_name_wrong_shapes():
    weights = list(chain(2, 5, 3, 8))
    with pytest.raises(ValueError, match=r"in_weight.*\(2, 3, 9\).*got z \(4, 9\) and \[\(2, 3, 8\)"):
        factorised_codes(torch.zeros(4, 9), *weights)
    with pytest.raises(ValueError, match="NaN"):
        factorised_codes(torch.full((4, 8), torch.nan), *weights)


def test_a_compiled_chain_keeps_its_codes():
    torch.manual_seed(0)
    codebooks, z = books(3, 40, 6), torch.randn(70, 6)
    torch._dynamo.reset()
    compiled = torch.compile(residual_codes, fullgraph=True, backend="eager")
    assert torch.equal(compiled(z, codebooks), residual_codes_reference(z, codebooks))
