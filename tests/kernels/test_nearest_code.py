from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtok.kernels.dispatch import force, installed, over_rows
from mmtok.kernels.nearest_code import nearest_code, nearest_code_reference
from mmtok.kernels.row_search import block_rows

IMPLEMENTATIONS = ["torch", pytest.param("numba", marks=pytest.mark.skipif(not installed("numba"), reason="no numba"))]
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def available() -> list[str]:
    return ["torch", "numba"] if installed("numba") else ["torch"]


def gaussian(*shape: int, seed: int = 0, mean: float = 0.0, sd: float = 1.0) -> torch.Tensor:
    return mean + sd * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@each_implementation
@settings(deadline=None, max_examples=40)
@given(
    N=st.integers(1, 90),
    D=st.integers(1, 40),
    K=st.integers(1, 300),
    mean_sd=st.sampled_from([(0.0, 1.0), (10.0, 0.1), (100.0, 0.1), (0.0, 1e-5), (0.0, 1e-25), (-3.0, 1e3)]),
    seed=st.integers(0, 99),
)
def test_codes_are_those_of_fp64_at_odd_shapes(implementation, N, D, K, mean_sd, seed):
    z = gaussian(N, D, seed=seed, mean=mean_sd[0], sd=mean_sd[1])
    codebook = gaussian(K, D, seed=seed + 100, mean=mean_sd[0], sd=mean_sd[1])
    with force(implementation):
        codes = nearest_code(z, codebook)
    assert codes.dtype == torch.int64
    assert torch.equal(codes, nearest_code_reference(z, codebook))


@each_implementation
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("mean_sd", [(0.0, 1.0), (10.0, 1.0), (10.0, 0.1), (100.0, 0.1), (0.0, 1e-5)])
@pytest.mark.parametrize(("N", "D", "K"), [(600, 8, 1024), (400, 16, 4096), (200, 128, 1024), (700, 3, 5)])
def test_no_code_differs_from_fp64(implementation, metric, mean_sd, N, D, K):
    z, codebook = gaussian(N, D, mean=mean_sd[0], sd=mean_sd[1]), gaussian(K, D, seed=1, mean=mean_sd[0], sd=mean_sd[1])
    with force(implementation):
        codes = nearest_code(z, codebook, metric)
    assert torch.equal(codes, nearest_code_reference(z, codebook, metric))


@each_implementation
@pytest.mark.parametrize("distance", [1e-4, 1e-6, 1e-7])
def test_near_ties_are_settled_in_fp64(implementation, distance):
    """Every row lies between two codes, nearer to one of them by far less than fp32 scores can tell."""
    c = gaussian(500, 16, seed=1)
    twins = torch.cat([c + 1, c - 1]).double()
    z = (c.double() + distance * gaussian(500, 16, seed=2)).float()
    codebook = twins.float()
    expected = nearest_code_reference(z, codebook)
    with force(implementation):
        assert torch.equal(nearest_code(z, codebook), expected)
    score = 0.5 * codebook.square().sum(1) - z @ codebook.T
    naive = score.argmin(1)
    assert (naive != expected).any() or distance > 1e-5  # what the proof and fp64 are for


@each_implementation
def test_exact_ties_on_a_grid_go_to_the_lowest_code(implementation):
    codebook = torch.cartesian_prod(*[torch.arange(0.0, 4.0)] * 4)  # (256, 4), all distances small integers
    codebook = torch.cat([codebook, codebook.flip(0), torch.zeros(70, 4)])
    z = torch.cartesian_prod(*[torch.arange(0.0, 4.0, 0.5)] * 4)[::5]
    with force(implementation):
        codes = nearest_code(z, codebook)
        assert torch.equal(codes, nearest_code_reference(z, codebook))
        assert int(codes.max()) < 256
        assert torch.equal(nearest_code(z, torch.zeros(90, 4)), torch.zeros(len(z), dtype=torch.int64))
        assert torch.equal(nearest_code(z, torch.zeros(90, 4), "cosine"), torch.zeros(len(z), dtype=torch.int64))


@each_implementation
def test_zero_vectors_have_cosine_zero(implementation):
    codebook = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [0.1, 0.1], [0.0, -3.0]])
    z = torch.tensor([[0.0, 0.0], [-5.0, 1.0], [3.0, -4.0], [1e-20, 2e-20], [-1.0, -2.0]]).repeat(40, 1)
    with force(implementation):
        codes = nearest_code(z, codebook, "cosine")
    assert codes[:5].tolist() == [0, 0, 3, 2, 3] and torch.equal(codes, codes[:5].repeat(40))
    assert torch.equal(codes, nearest_code_reference(z, codebook, "cosine"))
    with force(implementation):  # with nothing but a code behind it, the zero code is nearest
        assert nearest_code(z[2:3], codebook[:2], "cosine").tolist() == [1]


def test_uncentred_scores_would_fail_the_same_data():
    """The offset case above is a real test: without centring, most of its codes are wrong."""
    z, codebook = gaussian(300, 16, mean=100, sd=0.1), gaussian(1024, 16, seed=1, mean=100, sd=0.1)
    naive = (0.5 * codebook.square().sum(1) - z @ codebook.T).argmin(1)
    assert (naive != nearest_code_reference(z, codebook)).float().mean() > 0.3


@each_implementation
def test_blocks_join_and_empty_input(implementation):
    K = 1 << 14
    rows = block_rows(K, torch.device("cpu"))
    codebook, z = gaussian(K, 2), gaussian(2 * rows + 3, 2, seed=1)
    with force(implementation):
        assert torch.equal(nearest_code(z, codebook), nearest_code_reference(z, codebook))
        assert nearest_code(z[:0], codebook).shape == (0,)
        assert torch.equal(nearest_code(z.double(), codebook), nearest_code_reference(z, codebook))
        assert torch.equal(nearest_code(z[::2], codebook[::3]), nearest_code_reference(z[::2], codebook[::3]))
        assert torch.equal(nearest_code(z.T.contiguous().T, codebook), nearest_code_reference(z, codebook))


@each_implementation
@pytest.mark.parametrize("N", [1, 2, 7, 24, 25])
def test_few_rows(implementation, N):
    codebook, z = gaussian(300, 40), gaussian(N, 40, seed=1)
    for metric in ("euclidean", "cosine"):
        with force(implementation):
            assert torch.equal(nearest_code(z, codebook, metric), nearest_code_reference(z, codebook, metric))


@each_implementation
def test_threads_share_the_rows(implementation):
    z, codebook = gaussian(50_001, 16), gaussian(512, 16, seed=1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with force(implementation):
            codes = nearest_code(z, codebook)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(codes[::200], nearest_code_reference(z[::200], codebook))
    with force(implementation):
        assert torch.equal(codes, nearest_code(z, codebook))


def test_an_error_in_a_thread_reaches_the_caller():
    threads, seen = torch.get_num_threads(), []

    def work(start: int, stop: int) -> None:
        seen.append((start, stop))
        if start >= 45:
            raise RuntimeError(f"rows {start} to {stop}")

    try:
        torch.set_num_threads(2)
        with pytest.raises(RuntimeError, match="rows 45 to 54"):
            over_rows(100, work, cost=1e9, device=torch.device("cpu"))
        assert sorted(seen)[:6] == [(0, 9), (9, 18), (18, 27), (27, 36), (36, 45), (45, 54)] and len(seen) <= 7
        seen.clear()
        over_rows(44, work, cost=1e9, device=torch.device("cpu"))
        assert sorted(seen) == [(n, n + 4) for n in range(0, 44, 4)]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_compiled_and_exported_graphs(metric):
    half = gaussian(400, 6)
    codebook = torch.cat([half, half])  # every code twice, in different blocks of an exported graph
    z = gaussian(50, 6, seed=1)
    expected = nearest_code_reference(z, codebook, metric)
    assert int(expected.max()) < 400
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: nearest_code(x, codebook, metric), fullgraph=True, backend="eager")
    assert torch.equal(compiled(z), expected)
    with pytest.raises(ValueError, match="NaN"):
        compiled(torch.full_like(z, torch.nan))

    class Search(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nearest_code(x, codebook, metric)

    program = torch.export.export(Search(), (z,), dynamic_shapes=({0: torch.export.Dim("N", min=2)},))
    assert torch.equal(program.module()(torch.cat([z, z])), expected.repeat(2))
    assert not any("mmtok" in str(node.target) for node in program.graph.nodes)  # runs where mmtok is not installed


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_global_matmul_precision_changes_nothing(precision):
    torch.manual_seed(0)
    z, codebook = 10 + torch.randn(3000, 64), 10 + torch.randn(512, 64)
    before = torch.get_float32_matmul_precision()
    expected = nearest_code_reference(z, codebook)
    try:
        torch.set_float32_matmul_precision(precision)
        for implementation in available():
            with force(implementation):
                assert torch.equal(nearest_code(z, codebook), expected)
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


@each_implementation
@pytest.mark.parametrize("N", [5, 300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_codebooks_of_other_types(implementation, N, dtype):
    z, codebook = gaussian(N, 12), gaussian(90, 12, seed=1).to(dtype)
    for metric in ("euclidean", "cosine"):
        with force(implementation):
            assert torch.equal(nearest_code(z, codebook, metric), nearest_code_reference(z, codebook, metric))


def test_a_broken_package_is_named_and_does_without(monkeypatch):
    import importlib

    def refuse(name: str) -> None:
        raise ImportError("Numba needs NumPy 2.3 or less")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(importlib, "import_module", refuse)
    installed.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"numba is installed but cannot be imported \(Numba needs NumPy"):
            assert not installed("numba")
        assert torch.equal(nearest_code(torch.eye(3), torch.eye(3)), torch.arange(3))
    finally:
        monkeypatch.undo()
        installed.cache_clear()


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
        (torch.zeros(2, 2), torch.tensor([[0.0, float("nan")]]), "euclidean", "codebook: expected finite"),
        (torch.tensor([[float("inf"), -float("inf")]]), torch.zeros(5, 2), "cosine", "got 2 NaN or infinite"),
    ],
)
def test_bad_input_is_named(z, codebook, metric, message):
    with pytest.raises(ValueError, match=message):
        nearest_code(z, codebook, metric)


def test_huge_finite_values_are_not_taken_for_nan():
    z = torch.full((4, 4), 3e38)  # the sum overflows, the values are finite
    assert nearest_code(z, torch.eye(4) * 1e-3).shape == (4,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_every_implementation_on_a_gpu_gives_the_same_codes(metric):
    z, codebook = gaussian(5000, 24, mean=10), gaussian(777, 24, seed=1, mean=10)
    expected = nearest_code(z, codebook, metric)
    assert torch.equal(expected[:300], nearest_code_reference(z[:300], codebook, metric))
    z, codebook = z.cuda(), codebook.cuda()
    for precision in ("highest", "high"):
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision(precision)
            for implementation in ("torch", "triton"):
                with force(implementation), torch.autocast("cuda", dtype=torch.float16):
                    assert torch.equal(nearest_code(z, codebook, metric).cpu(), expected)
        finally:
            torch.set_float32_matmul_precision(before)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: nearest_code(x, codebook, metric), fullgraph=True)
    assert torch.equal(compiled(z).cpu(), expected)
    with pytest.raises(ValueError, match="NaN"):
        nearest_code(z * torch.nan, codebook, metric)
