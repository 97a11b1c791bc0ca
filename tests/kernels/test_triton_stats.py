"""Counts, sums and the residual decode in Triton: in the interpreter at small shapes, on a GPU at real ones.

The interpreter must be chosen before the kernels are imported, so this file runs itself once as a program; its cases
write what they got and what is right, and each pair is then a test here.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from interpreter import results_of
from torch import Tensor

from mmtok.kernels.codebook_stats import codebook_stats, codebook_stats_reference
from mmtok.kernels.dispatch import force
from mmtok.kernels.residual_codes import residual_decode_reference

ROOT = Path(__file__).resolve().parents[2]
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# name: N, D, K, kind of codes, share of rows that count, type and layout of z, tiles (None = those that ship)
STATS = {
    "empty": (0, 3, 4, "even", 1.0, "fp32", None),
    "one_row": (1, 1, 2, "even", 1.0, "fp32", None),
    "shipped_tiles": (150, 5, 40, "even", 1.0, "fp32", None),
    "one_code": (77, 3, 5, "one", 1.0, "fp32", ((16, 8),)),
    "skewed": (77, 3, 5, "skewed", 1.0, "fp32", ((16, 8),)),
    "whole_chunks": (64, 4, 6, "runs", 1.0, "fp32", ((16, 8),)),
    "masked": (77, 3, 9, "skewed", 0.6, "fp32", ((16, 8),)),
    "all_masked": (20, 3, 9, "even", 0.0, "fp32", ((16, 8),)),
    "wide": (40, 37, 6, "even", 0.8, "fp32", ((16, 8),)),
    "mostly_unused": (30, 2, 200, "even", 1.0, "fp32", ((16, 8),)),
    "columns": (50, 3, 7, "even", 0.9, "transposed", ((16, 8),)),
    "every_other_row": (50, 3, 7, "even", 0.9, "strided", ((16, 8),)),
    "bf16": (50, 3, 7, "even", 1.0, "bf16", ((16, 8),)),
}
# name: N, levels of codes, Q, K, D, layout of the codes
DECODE = {
    "empty": (0, 2, 3, 4, 5, "rows"),
    "one_row": (1, 1, 1, 2, 1, "rows"),
    "prefix": (33, 2, 4, 5, 3, "rows"),
    "wide": (9, 3, 3, 4, 150, "rows"),
    "level_major": (21, 4, 4, 3, 7, "columns"),
}


def stats_case(N: int, D: int, K: int, kind: str, share: float, layout: str) -> tuple[Tensor, Tensor, Tensor | None]:
    g = torch.Generator().manual_seed(N + D)
    z = torch.randn(N, D, generator=g)
    if layout == "transposed":
        z = torch.randn(D, N, generator=g).T
    elif layout == "strided":
        z = torch.randn(2 * N, D, generator=g)[::2]
    elif layout == "bf16":
        z = z.bfloat16()
    codes = {
        "even": torch.randint(0, K, (N,), generator=g),
        "one": torch.full((N,), K - 2),
        "skewed": torch.where(torch.rand(N, generator=g) < 0.7, 2, torch.randint(0, K, (N,), generator=g)),
        "runs": torch.arange(N) // 8 // 2 % K,  # every code fills whole chunks
    }[kind]
    if share == 1:
        return z, codes, None
    mask = torch.rand(N, generator=g) < share
    z = z.clone()
    z[~mask] = float("nan")
    return z, codes, mask


def decode_case(N: int, used: int, Q: int, K: int, D: int, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(N + Q)
    codes = torch.randint(0, K, (used, N), generator=g)
    codes = codes.T if layout == "columns" else codes.T.contiguous()
    return codes, torch.randn(Q, K, D, generator=g), torch.randn(N, D, generator=g)


def run_in_interpreter(out: str) -> None:
    real = torch.empty

    def poisoned(*args, **kwargs) -> Tensor:
        t = real(*args, **kwargs)
        return t.fill_(float("nan") if t.is_floating_point() else -7)

    torch.empty = poisoned
    from mmtok.kernels.triton import codebook_stats as stats
    from mmtok.kernels.triton import residual_decode as decode

    results, shipped = {}, stats.TILES
    for name, (N, D, K, kind, share, layout, tiles) in STATS.items():
        z, codes, mask = stats_case(N, D, K, kind, share, layout)
        stats.TILES = tiles or shipped
        results["stats", name] = stats.codebook_stats(z, codes, K, mask)
    stats.TILES = ((16, 8),)
    for name, case in DECODE.items():
        codes, codebooks, weight = decode_case(*case)
        codebooks.requires_grad_()
        z_q = decode.residual_decode(codes, codebooks)
        (grad,) = torch.autograd.grad((z_q * weight).sum(), codebooks)
        results["decode", name] = (z_q.detach(), grad)
    torch.save(results, out)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return results_of(__file__, tmp_path_factory.mktemp("interpreted"))


@pytest.mark.parametrize("name", STATS)
def test_counts_and_sums_in_the_interpreter(interpreted: dict, name: str):
    N, D, K, kind, share, layout, _ = STATS[name]
    counts, sums = interpreted["stats", name]
    z, codes, mask = stats_case(N, D, K, kind, share, layout)
    expected_counts, expected_sums = codebook_stats_reference(z, codes, K, mask)
    assert torch.equal(counts, expected_counts)
    torch.testing.assert_close(sums, expected_sums, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", DECODE)
def test_decode_and_its_gradient_in_the_interpreter(interpreted: dict, name: str):
    codes, codebooks, weight = decode_case(*DECODE[name])
    codebooks.requires_grad_()
    expected = residual_decode_reference(codes, codebooks)
    (expected_grad,) = torch.autograd.grad((expected * weight).sum(), codebooks, allow_unused=False)
    z_q, grad = interpreted["decode", name]
    torch.testing.assert_close(z_q, expected.detach(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(grad, expected_grad, atol=1e-5, rtol=1e-5)


def test_forcing_triton_on_a_cpu_is_refused():
    with force("triton"), pytest.raises(ValueError, match="codebook_stats: 'triton' is forced but not available"):
        codebook_stats(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), 4)


class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.parametrize(("N", "D", "K"), [(12800, 128, 1024), (65536, 256, 16384), (102400, 8, 1024), (5, 33, 7)])
    @pytest.mark.parametrize("kind", ["even", "one"])
    def test_sums_are_right_and_repeat_bitwise(self, N: int, D: int, K: int, kind: str):
        g = torch.Generator("cuda").manual_seed(0)
        z = torch.randn(N, D, device="cuda", generator=g)
        codes = torch.randint(0, K, (N,), device="cuda", generator=g)
        codes = torch.full_like(codes, K - 1) if kind == "one" else codes
        mask = torch.rand(N, device="cuda", generator=g) < 0.9
        z[~mask] = float("nan")
        with force("triton"):
            counts, sums = codebook_stats(z, codes, K, mask)
            for _ in range(3):
                again = codebook_stats(z, codes, K, mask)
                assert torch.equal(again[0], counts) and torch.equal(again[1], sums)
        exact = torch.zeros(K, D, dtype=torch.float64, device="cuda").index_add_(0, codes[mask], z[mask].double())
        assert torch.equal(counts, torch.bincount(codes[mask], minlength=K).float())
        torch.testing.assert_close(sums.double(), exact, atol=1e-2 if kind == "one" else 1e-4, rtol=1e-5)

    @pytest.mark.parametrize(("N", "Q", "K", "D"), [(65536, 8, 1024, 128), (4096, 32, 1024, 8), (1000, 3, 50, 1024)])
    def test_decode_gradient_repeats_bitwise(self, N: int, Q: int, K: int, D: int):
        from mmtok.kernels.triton import residual_decode as decode

        g = torch.Generator("cuda").manual_seed(0)
        codes = torch.randint(0, K, (Q, N), device="cuda", generator=g).T
        codebooks = torch.randn(Q, K, D, device="cuda", generator=g).requires_grad_()
        weight = torch.randn(N, D, device="cuda", generator=g)
        assert decode.supported(codes, codebooks)
        z_q = decode.residual_decode(codes, codebooks)
        grads = [torch.autograd.grad((z_q * weight).sum(), codebooks, retain_graph=True)[0] for _ in range(3)]
        expected = residual_decode_reference(codes, codebooks)
        (expected_grad,) = torch.autograd.grad((expected * weight).sum(), codebooks)
        torch.testing.assert_close(z_q, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(grads[0], expected_grad, atol=1e-3, rtol=1e-4)
        assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])

    def test_decode_compiles_without_a_graph_break(self):
        from mmtok.kernels.triton.residual_decode import residual_decode

        codes = torch.randint(0, 50, (300, 3), device="cuda")
        codebooks = torch.randn(3, 50, 16, device="cuda")
        compiled = torch.compile(residual_decode, fullgraph=True)
        assert torch.equal(compiled(codes, codebooks), residual_decode(codes, codebooks))


if __name__ == "__main__":
    run_in_interpreter(sys.argv[1])
