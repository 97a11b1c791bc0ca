from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtok.kernels.dispatch import force
from mmtok.kernels.nearest_code import block_rows, nearest_code, nearest_code_reference, unit


def assert_optimal(z: torch.Tensor, codebook: torch.Tensor, codes: torch.Tensor, metric: str) -> None:
    """The chosen codes are as near as the fp64 optimum, up to what fp32 can tell apart: its error in R^2."""
    x, c = z.double(), codebook.double()
    if metric == "cosine":
        x, c = unit(x), unit(c)
    distance = torch.stack([(row - c).square().sum(1) for row in x])  # (N, K)
    excess = float((distance.gather(1, codes[:, None])[:, 0] - distance.min(1).values).max())
    R = float(torch.cat([x, c]).sub(c.mean(0)).norm(dim=1).max())
    # Scaling to length 1 in fp32 already moves a vector by about 1e-7.
    assert excess <= 4e-6 * R * R + (1e-6 * R + 1e-12 if metric == "cosine" else 0.0)


@settings(deadline=None, max_examples=25)
@given(
    N=st.integers(1, 90),
    D=st.integers(1, 40),
    K=st.integers(1, 300),
    mean_sd=st.sampled_from([(0.0, 1.0), (10.0, 0.1), (100.0, 0.1), (0.0, 1e-5), (-3.0, 1e3)]),
    metric=st.sampled_from(["euclidean", "cosine"]),
    seed=st.integers(0, 99),
)
def test_choice_is_optimal_at_odd_shapes(N, D, K, mean_sd, metric, seed):
    g = torch.Generator().manual_seed(seed)
    z = mean_sd[0] + mean_sd[1] * torch.randn(N, D, generator=g)
    codebook = mean_sd[0] + mean_sd[1] * torch.randn(K, D, generator=g)
    codes = nearest_code(z, codebook, metric)
    assert codes.shape == (N,) and codes.dtype == torch.int64
    assert_optimal(z, codebook, codes, metric)


@pytest.mark.parametrize("mean_sd", [(0.0, 1.0), (10.0, 1.0), (100.0, 0.1), (0.0, 1e-5)])
def test_no_code_differs_from_fp64(mean_sd):
    torch.manual_seed(0)
    z = mean_sd[0] + mean_sd[1] * torch.randn(700, 16)
    codebook = mean_sd[0] + mean_sd[1] * torch.randn(1024, 16)
    assert torch.equal(nearest_code(z, codebook), nearest_code_reference(z, codebook))


def test_uncentred_scores_would_fail_the_same_data():
    """The offset case above is a real test: without centring, most of its codes are wrong."""
    torch.manual_seed(0)
    z, codebook = 100 + 0.1 * torch.randn(300, 16), 100 + 0.1 * torch.randn(1024, 16)
    naive = (0.5 * codebook.square().sum(1) - z @ codebook.T).argmin(1)
    assert (naive != nearest_code_reference(z, codebook)).float().mean() > 0.3


def test_blocks_join_and_empty_input():
    K = 1 << 14
    rows = block_rows(K, torch.device("cpu"))
    torch.manual_seed(0)
    codebook = torch.randn(K, 2)
    z = torch.randn(2 * rows + 3, 2)
    assert torch.equal(nearest_code(z, codebook), nearest_code_reference(z, codebook))
    assert nearest_code(z[:0], codebook).shape == (0,)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_lowest_code_wins_a_tie(metric):
    torch.manual_seed(0)
    half = torch.randn(400, 6)
    codebook = torch.cat([half, half])  # every code twice, in different blocks of a captured graph
    z = torch.randn(50, 6)
    assert int(nearest_code(z, codebook, metric).max()) < 400
    torch._dynamo.reset()
    compiled = torch.compile(nearest_code, fullgraph=True, backend="eager")
    assert torch.equal(compiled(z, codebook, metric), nearest_code(z, codebook, metric))


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_global_matmul_precision_changes_nothing(precision):
    torch.manual_seed(0)
    z, codebook = 10 + torch.randn(3000, 64), 10 + torch.randn(512, 64)
    before = torch.get_float32_matmul_precision()
    expected = nearest_code_reference(z, codebook)
    torch._dynamo.reset()
    compiled = torch.compile(nearest_code, fullgraph=True, backend="eager")
    compiled(z, codebook)  # captured under "highest", used under the other
    try:
        torch.set_float32_matmul_precision(precision)
        assert torch.equal(nearest_code(z, codebook), expected)
        assert torch.equal(compiled(z, codebook), expected)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_autocast_and_half_inputs():
    torch.manual_seed(0)
    z, codebook = torch.randn(500, 32), torch.randn(256, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nearest_code(z, codebook), nearest_code_reference(z, codebook))
    for dtype in (torch.bfloat16, torch.float16):
        low = z.to(dtype)
        assert torch.equal(nearest_code(low, codebook), nearest_code_reference(low, codebook))


def test_cosine_ignores_length():
    torch.manual_seed(0)
    z, codebook = torch.randn(100, 8), torch.randn(64, 8)
    codes = nearest_code(z, codebook, "cosine")
    assert torch.equal(codes, nearest_code(z * torch.rand(100, 1) * 50, codebook * torch.rand(64, 1), "cosine"))
    assert torch.equal(codes, torch.nn.functional.cosine_similarity(z[:, None], codebook[None], dim=2).argmax(1))


def test_forced_reference_is_used_and_missing_ones_raise():
    z, codebook = torch.randn(5, 3), torch.randn(4, 3)
    with force("reference"):
        assert torch.equal(nearest_code(z, codebook), nearest_code_reference(z, codebook))
    with pytest.raises(ValueError, match=r"nearest_code: 'triton' is forced but not available"), force("triton"):
        nearest_code(z, codebook)
    with pytest.raises(ValueError, match="expected one of reference"), force("cuda"):
        pass
    nearest_code(z, codebook)  # the errors above left nothing forced


@pytest.mark.parametrize(
    ("z", "codebook", "metric", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(5, 4), "euclidean", r"z: expected .* \(N, D\)"),
        (torch.zeros(2, 4, dtype=torch.int64), torch.zeros(5, 4), "euclidean", "z: expected a floating point"),
        (torch.zeros(2, 3), torch.zeros(5, 4), "euclidean", "expected width D = 4 as in the codebook, got 3"),
        (torch.zeros(2, 3), torch.zeros(0, 3), "euclidean", "K >= 1"),
        (torch.zeros(2, 3), torch.zeros(5, 3), "manhattan", "metric: expected one of euclidean, cosine"),
        (torch.tensor([[0.0, float("nan")]]), torch.zeros(5, 2), "euclidean", "got 1 NaN or infinite"),
        (torch.tensor([[float("inf"), -float("inf")]]), torch.zeros(5, 2), "cosine", "got 2 NaN or infinite"),
    ],
)
def test_bad_input_is_named(z, codebook, metric, message):
    with pytest.raises(ValueError, match=message):
        nearest_code(z, codebook, metric)


def test_huge_finite_values_are_not_taken_for_nan():
    z = torch.full((4, 4), 3e38)  # the sum overflows, the values are finite
    assert nearest_code(z, torch.eye(4) * 1e-3).shape == (4,)
