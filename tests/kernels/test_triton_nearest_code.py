"""Nearest code in Triton: the interpreter's codes against fp64 for small shapes, and a GPU's at real sizes.

The interpreter must be chosen before triton is imported, so one subprocess (this file, run as a script) works through
all cases and the tests judge its tensors one by one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

gpu = pytest.mark.gpu
no_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def interpret(script: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Run ``script`` under Triton's interpreter; it saves {case: values} to the path it is given."""
    pytest.importorskip("triton")
    out = folder / "results.pt"
    here = Path(script).resolve()
    paths = [str(here.parents[2]), str(here.parent), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, script, str(out)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


def allow_scalar_bounds() -> None:
    """Triton 3.6's interpreter turns a kernel's scalar into a loop bound by int(array), which numpy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def poison_new_tensors() -> None:
    """Whatever a kernel fails to write shows: -7 in integers, NaN in floats."""
    empty, empty_like = torch.empty, torch.empty_like

    def spoil(x: Tensor) -> Tensor:
        return x.fill_(float("nan") if x.is_floating_point() else -7)

    torch.empty = lambda *size, **options: spoil(empty(*size, **options))
    torch.empty_like = lambda x, **options: spoil(empty_like(x, **options))


def exact(z: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """fp64 codes; the cosine of a zero vector is 0."""
    x, c = z.double(), codebook.double()
    if metric == "cosine":
        length = c.norm(dim=1)
        return (-(c @ x.T) / torch.where(length > 0, length, 1.0)[:, None]).T.contiguous().min(1).indices
    codes = [(row - c).square().sum(1).min(0).indices for row in x]
    return torch.stack(codes) if codes else x.new_empty(0, dtype=torch.int64)


def planted_ties(N: int, K: int, D: int) -> tuple[Tensor, Tensor]:
    """Rows almost half way between two codes: their distances differ by less than bf16x3 can tell."""
    codebook = torch.randn(K, D)
    pairs = torch.randint(0, K, (N, 2))
    lean = 0.5 + 1e-7 * torch.randn(N, 1)
    return lean * codebook[pairs[:, 0]] + (1 - lean) * codebook[pairs[:, 1]], codebook


def operands(kind: str, N: int, K: int, D: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(N + 7 * K + 31 * D)
    z, codebook = torch.randn(N, D), torch.randn(K, D)
    if kind == "mean10":
        return 10 + 0.1 * z, 10 + 0.1 * codebook
    if kind == "mean100":
        return 100 + 0.1 * z, 100 + 0.1 * codebook
    if kind == "tiny":
        return 1e-5 * z, 1e-5 * codebook
    if kind == "vanishing":  # squares underflow in fp32
        return 1e-25 * z, 1e-25 * codebook
    if kind == "huge":  # squares overflow in fp32
        return 1e25 * z, 1e25 * codebook
    if kind == "duplicates":
        return z, codebook[: (K + 1) // 2].repeat(2, 1)[:K]
    if kind == "near_ties":
        return planted_ties(N, K, D)
    if kind == "one_code":
        return z, codebook[:1].expand(K, D)
    if kind == "zeros":
        z[::3], codebook[1::4] = 0, 0
        return z, -codebook.abs() if D == 8 else codebook
    if kind == "strided":
        return torch.randn(2 * N, 2 * D)[::2, ::2], torch.randn(D, K).T
    if kind == "shifted":  # contiguous, but not where a vector load may start
        return torch.randn(N * D + 1)[1:].view(N, D), torch.randn(K * D + 1)[1:].view(K, D)
    if kind == "bf16":
        return z.bfloat16(), codebook.bfloat16()
    if kind == "fp16":
        return z.half(), codebook.half()
    assert kind == "plain"
    return z, codebook


CASES = [  # kind, N, K, D, metric, precision
    ("plain", 0, 7, 3, "euclidean", "auto"),
    ("plain", 1, 1, 1, "euclidean", "auto"),
    ("plain", 5, 7, 3, "euclidean", "auto"),
    ("plain", 33, 100, 8, "euclidean", "auto"),
    ("plain", 129, 300, 20, "euclidean", "auto"),
    ("plain", 100, 300, 64, "euclidean", "auto"),
    ("plain", 5, 40, 130, "euclidean", "auto"),
    ("plain", 33, 100, 20, "euclidean", "ieee"),
    ("plain", 100, 300, 20, "euclidean", "bf16"),
    ("plain", 33, 100, 64, "euclidean", "bf16"),
    ("plain", 33, 100, 8, "cosine", "auto"),
    ("plain", 33, 100, 64, "cosine", "auto"),
    ("plain", 33, 100, 64, "cosine", "bf16"),
    ("plain", 33, 70, 3, "cosine", "ieee"),
    ("mean10", 33, 100, 64, "euclidean", "auto"),
    ("mean100", 33, 100, 8, "euclidean", "auto"),
    ("mean100", 33, 100, 20, "cosine", "auto"),
    ("mean100", 33, 100, 64, "euclidean", "bf16"),
    ("tiny", 33, 100, 8, "euclidean", "auto"),
    ("vanishing", 33, 70, 8, "euclidean", "auto"),
    ("huge", 33, 70, 8, "euclidean", "auto"),
    ("duplicates", 33, 100, 8, "euclidean", "auto"),
    ("duplicates", 33, 100, 20, "cosine", "auto"),
    ("one_code", 5, 300, 8, "euclidean", "auto"),
    ("near_ties", 33, 100, 8, "euclidean", "auto"),
    ("near_ties", 33, 100, 64, "euclidean", "auto"),
    ("zeros", 33, 100, 8, "cosine", "auto"),
    ("zeros", 33, 100, 20, "cosine", "auto"),
    ("strided", 33, 100, 8, "euclidean", "auto"),
    ("strided", 33, 100, 64, "euclidean", "auto"),
    ("shifted", 5, 100, 3, "euclidean", "auto"),
    ("bf16", 33, 100, 8, "euclidean", "auto"),
    ("fp16", 33, 100, 64, "euclidean", "auto"),
]


def name_of(case: tuple) -> str:
    return "-".join(str(part) for part in case)


def work_through(out: str) -> None:
    from mmtok.kernels.triton import nearest_code as kernels

    results = {}
    for case in CASES:
        kind, N, K, D, metric, precision = case
        z, codebook = operands(kind, N, K, D)
        expected = exact(z, codebook, metric)
        assert kernels.supported(z, codebook)
        first, worklist, counter = kernels.search_first_pass(z, codebook[None], metric, precision)
        codes = first.clone()
        kernels.settle(z, codebook[None], metric, codes, worklist, counter)
        if kind == "near_ties":  # the public function is these two steps
            assert torch.equal(kernels.nearest_code(z, codebook, metric, precision), codes[:, 0])
        results[name_of(case)] = {
            "codes": codes[:, 0], "expected": expected, "first": first[:, 0],
            "listed": worklist[: int(counter)].sort().values,
        }  # fmt: skip
    torch.save(results, out)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return interpret(__file__, tmp_path_factory.mktemp("interpreter"))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_codes_are_those_of_fp64(case, results):
    r = results[name_of(case)]
    assert r["codes"].dtype == torch.int64 and r["codes"].shape == (case[1],)
    assert torch.equal(r["codes"], r["expected"])


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_no_certified_code_is_wrong(case, results):
    """The first pass alone: what it certifies is right, and it lists exactly the rows that it does not."""
    r = results[name_of(case)]
    certified = r["first"] >= 0
    assert torch.equal(r["first"][certified], r["expected"][certified])
    assert torch.equal(r["listed"].long(), torch.nonzero(~certified)[:, 0])


def test_certificate_is_neither_vacuous_nor_blind(results):
    plain = [results[name_of(c)]["first"] for c in CASES if c[0] == "plain" and c[1] > 5 and c[5] == "auto"]
    assert torch.cat(plain).ge(0).float().mean() > 0.9
    coarse = [results[name_of(c)] for c in CASES if c[5] == "bf16"]
    assert torch.cat([r["first"] for r in coarse]).lt(0).float().mean() > 0.1  # fp64 had rows to settle
    ties = [results[name_of(c)]["first"] for c in CASES if c[0] in ("duplicates", "one_code")]
    assert torch.cat(ties).lt(0).all()


def test_small_batches_cut_the_codebook_over_programs():
    """The cases with one tile of rows and more codes than a tile went through the join kernel."""
    pytest.importorskip("triton")
    from mmtok.kernels.triton.nearest_code import plan

    assert any(N <= plan(D, 1, p).BLOCK_N and K > plan(D, 1, p).BLOCK_K for _, N, K, D, _, p in CASES)
    assert any(N > plan(D, 1, p).BLOCK_N for _, N, K, D, _, p in CASES)


@pytest.mark.parametrize(
    ("width", "precision", "message"),
    [(8, "fp8", "expected one of auto, ieee, bf16x3, bf16"), (300, "auto", "1 to 256"), (64, "ieee", "1 to 32")],
)
def test_a_plan_that_there_is_not_is_refused(width, precision, message):
    pytest.importorskip("triton")
    from mmtok.kernels.triton.nearest_code import plan

    with pytest.raises(ValueError, match=message):
        plan(width, 1, precision)


def test_the_widest_rows_have_a_plan_of_their_own_on_hopper():
    pytest.importorskip("triton")
    from mmtok.kernels.triton.nearest_code import VARIANTS, plan

    assert plan(256, hopper=True) != plan(256) and plan(64, hopper=True) == plan(64)
    assert {v.architectures for v in VARIANTS} == {(80, 90), (90,)}  # which test_triton_compiles.py compiles


@pytest.fixture
def device_nearest():
    pytest.importorskip("triton")
    from mmtok.kernels.triton.nearest_code import nearest_code

    return nearest_code


SIZES = [(102400, 8, 1024), (65536, 16, 8192), (102400, 128, 1024), (65536, 256, 16384), (13, 64, 1024), (1, 8, 65536)]


@gpu
@no_device
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("precision", ["auto", "bf16"])
@pytest.mark.parametrize(("N", "D", "K"), SIZES)
def test_device_codes_are_those_of_fp64(N, D, K, precision, metric, device_nearest):
    torch.manual_seed(0)
    z, codebook = torch.randn(N, D, device="cuda") + 3, torch.randn(K, D, device="cuda") + 3
    codes = device_nearest(z, codebook, metric, precision)
    sample = torch.randperm(N, device="cuda")[:300]
    assert torch.equal(codes[sample], exact(z[sample], codebook, metric))
    assert torch.equal(codes, device_nearest(z, codebook, metric, precision))  # bitwise repeatable


@gpu
@no_device
@pytest.mark.parametrize("kind", ["mean10", "mean100", "tiny", "duplicates", "near_ties", "zeros", "one_code", "huge"])
@pytest.mark.parametrize("D", [3, 8, 20, 64, 200])
def test_device_codes_of_awkward_data(kind, D, device_nearest):
    z, codebook = (x.cuda() for x in operands(kind, 500, 1000, D))
    for metric in ("euclidean", "cosine"):
        # The cosine of codes that are exact multiples, or underflow, is a matter of fp64 rounding: plain data only.
        if metric == "euclidean" or kind in ("mean10", "mean100", "zeros"):
            assert torch.equal(device_nearest(z, codebook, metric), exact(z, codebook, metric))


@gpu
@no_device
def test_device_codes_do_not_depend_on_modes(device_nearest):
    torch.manual_seed(0)
    z, codebook = 10 + torch.randn(20000, 64, device="cuda"), 10 + torch.randn(1024, 64, device="cuda")
    codes = device_nearest(z, codebook)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert torch.equal(device_nearest(z, codebook), codes)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(device_nearest(z[777:1777], codebook), codes[777:1777])  # nor on the batch


@gpu
@no_device
@pytest.mark.parametrize("D", [8, 64, 256])
def test_device_certificate_leaves_few_rows(D):
    from mmtok.kernels.triton.nearest_code import search_first_pass

    torch.manual_seed(0)
    z, codebook = torch.randn(65536, D, device="cuda"), torch.randn(4096, D, device="cuda")
    codes, _, counter = search_first_pass(z, codebook[None], "euclidean", "auto")
    assert int(codes.lt(0).sum()) == int(counter) < 0.02 * len(z)


@gpu
@no_device
def test_device_memory_is_far_below_rows_times_codes(device_nearest):
    z, codebook = torch.randn(65536, 16, device="cuda"), torch.randn(262144, 16, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    codes = device_nearest(z, codebook)
    assert torch.cuda.max_memory_allocated() - start < 128 << 20  # a matrix of scores would be 64 GiB
    assert torch.equal(codes[:50], exact(z[:50], codebook, "euclidean"))


if __name__ == "__main__":
    allow_scalar_bounds()
    poison_new_tensors()
    work_through(sys.argv[1])
