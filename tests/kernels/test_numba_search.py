"""The compiled CPU search: which of its ways is taken, and that each gives the codes of fp64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from mmtok.kernels.dispatch import installed
from mmtok.kernels.nearest_code import nearest_code_reference
from mmtok.kernels.residual_codes import residual_codes_reference

pytestmark = pytest.mark.skipif(not installed("numba"), reason="needs the extra 'fast': pip install 'mmtok[fast]'")


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def matrix_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 products are right on every processor, only slow on some."""
    from mmtok.kernels.numba import nearest_code

    monkeypatch.setattr(nearest_code, "has_matrix_unit", lambda: True)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(("N", "D", "K"), [(64, 48, 256), (333, 64, 300), (4099, 50, 257), (70, 200, 4096)])
def test_products_in_bf16_lead_to_the_codes_of_fp64(matrix_unit, metric, N, D, K):
    from mmtok.kernels.numba.nearest_code import CompiledSearch

    z, codebook = gaussian(N, D), gaussian(K, D, seed=1)
    search = CompiledSearch(codebook, metric, N)
    codes = search.nearest(z)
    assert search.short is not None and search.packed is None  # nothing fell back to fp32
    assert torch.equal(codes, nearest_code_reference(z, codebook, metric))
    few = search.nearest(z[:3])
    assert torch.equal(few, codes[:3])


def test_products_with_an_offset_and_near_ties(matrix_unit):
    from mmtok.kernels.numba.nearest_code import CompiledSearch

    centres = gaussian(300, 64)
    codebook = 100 + torch.cat([centres, centres + 1e-4 * gaussian(300, 64, seed=1), centres])
    z = 100 + (centres + 0.3 * gaussian(300, 64, seed=2))
    codes = CompiledSearch(codebook, "euclidean", 300).nearest(z)
    assert torch.equal(codes, nearest_code_reference(z, codebook))
    assert int(codes.max()) < 600  # the third part repeats the first


def test_crowded_codes_go_on_in_fp32(matrix_unit):
    """Codes much closer to each other than to their centre: bf16 tells little, so the search changes its way."""
    from mmtok.kernels.numba.nearest_code import CompiledSearch

    directions = torch.cat([torch.ones(200, 64), -torch.ones(200, 64)])
    codebook = 10 * directions + 0.1 * gaussian(400, 64)
    z = (10 * directions + 0.1 * gaussian(400, 64, seed=1)).repeat(60, 1)
    search = CompiledSearch(codebook, "euclidean", len(z))
    codes = search.nearest(z)
    assert search.short is None
    assert torch.equal(codes[:400], nearest_code_reference(z[:400], codebook))
    assert torch.equal(codes, codes[:400].repeat(60))


def test_most_rows_are_proved_in_fp32():
    """The proof is not empty: few rows of plain data need fp64."""
    import numpy as np

    from mmtok.kernels.numba.nearest_code import CompiledSearch
    from mmtok.kernels.numba.search import CODES, search

    for D, K in ((8, 1024), (40, 1024)):
        z, codebook = gaussian(5000, D), gaussian(K, D, seed=1)
        s, codes = CompiledSearch(codebook, "euclidean", 5000), np.empty(5000, np.int64)
        half = s.half.reshape(-1, CODES)
        assert s.packed is not None
        settled = search(z.numpy(), s.codebook, s.inverse, False, s.packed, half, s.centre, s.reach, codes)
        assert settled < 0.01 * 5000


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_few_rows_through_a_chain(metric):
    """Offsets, tiny scales, duplicates and zero codes on the way that prepares nothing."""
    from mmtok.kernels.numba.nearest_code import few_codes, takes_few

    for mean, sd in ((0.0, 1.0), (100.0, 0.1), (0.0, 1e-25), (0.0, 1e20)):
        codebooks = sd * gaussian(3, 60, 10) * 0.5 ** torch.arange(3)[:, None, None]
        codebooks[0] += mean
        codebooks[1, 40:] = codebooks[1, :20]
        codebooks[2, 7] = 0
        z = mean + sd * gaussian(24, 10, seed=1)
        assert takes_few(24, list(codebooks)) and not takes_few(25, list(codebooks))
        before = z.clone()
        codes = few_codes(z, list(codebooks), metric)
        assert torch.equal(codes, residual_codes_reference(z, codebooks, metric)) and torch.equal(z, before)


def test_no_folder_for_the_compiled_code_is_no_error(monkeypatch):
    import importlib

    from numba.core import caching

    from mmtok.kernels.numba import search

    def nowhere(*args: object) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(caching.FunctionCache, "__init__", nowhere)
    try:
        fresh = importlib.reload(search)
        x, codebook = torch.tensor([5.0]).numpy(), torch.tensor([[9.0], [4.0]]).numpy()
        assert fresh.exact_row(x, codebook, torch.ones(2).double().numpy(), False, 0) == 1
    finally:
        monkeypatch.undo()
        importlib.reload(search)


def test_narrower_registers_give_the_same_codes():
    """A processor without AVX-512 compiles other tiles: those of Haswell run here too."""
    code = """
import torch
from llvmlite import binding
real = binding.get_host_cpu_features()
class Without(dict):
    def get(self, name, default=None):
        return False if name.startswith("avx512") else super().get(name, default)
binding.get_host_cpu_features = lambda: Without(real)
from mmtok.kernels.nearest_code import nearest_code, nearest_code_reference
from mmtok.kernels.dispatch import force
from mmtok.kernels.numba import search
assert (search.LANES, search.ROWS) == (8, 6)
torch.manual_seed(0)
for N, D, K in ((100, 8, 300), (101, 33, 7), (50, 130, 260)):
    z, c = torch.randn(N, D), torch.randn(K, D)
    for metric in ("euclidean", "cosine"):
        with force("numba"):
            assert torch.equal(nearest_code(z, c, metric), nearest_code_reference(z, c, metric))
print("same")
"""
    settings = {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma",
        "NUMBA_CACHE_DIR": "/dev/null/none",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env={**os.environ, **settings}, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.strip() == "same", done.stderr[-2000:]
