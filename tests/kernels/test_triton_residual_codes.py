"""The chain of codebooks in Triton: the interpreter's codes against fp64, and a GPU's at real sizes."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from test_triton_nearest_code import allow_scalar_bounds, exact, gpu, interpret, name_of, no_device, poison_new_tensors
from torch import Tensor


def exact_chain(z: Tensor, codebooks: Tensor, metric: str) -> Tensor:
    """fp64 codes (N, Q) of the recursion k_q = nearest(r_q, C_q), r_{q+1} = r_q - C_q[k_q]."""
    residual, columns = z.double(), []
    for codebook in codebooks.double():
        columns.append(exact(residual, codebook, metric))
        residual = residual - codebook[columns[-1]]
    return torch.stack(columns, 1)


def chain(kind: str, N: int, Q: int, K: int, D: int) -> tuple[Tensor, Tensor]:
    """Codebooks whose spread halves from level to level, as in a trained chain, and rows for them."""
    torch.manual_seed(N + 3 * Q + 7 * K + 31 * D)
    codebooks = torch.randn(Q, K, D) * 0.5 ** torch.arange(Q)[:, None, None]
    z = torch.randn(N, D)
    if kind == "mean100":
        codebooks[0] += 100
        z = z + 100
    elif kind == "tiny":
        codebooks, z = 1e-5 * codebooks, 1e-5 * z
    elif kind == "duplicates":
        codebooks = codebooks[:, : (K + 1) // 2].repeat(1, 2, 1)[:, :K]
    elif kind == "late_ties":  # clear at the first level; at the second the residual lies half way between two codes
        pick = torch.randint(0, K, (3, N))
        middle = 0.5 + 1e-7 * torch.randn(N, 1)
        codebooks[0] *= 50
        z = codebooks[0][pick[0]] + middle * codebooks[1][pick[1]] + (1 - middle) * codebooks[1][pick[2]]
    elif kind == "zeros":
        codebooks[:, 1::4], z[::3] = 0, 0
    elif kind == "strided":
        z, codebooks = torch.randn(D, 2 * N).T[::2], codebooks.transpose(1, 2).contiguous().transpose(1, 2)
    elif kind == "bf16":
        z, codebooks = z.bfloat16(), codebooks.bfloat16()
    else:
        assert kind == "plain"
    return z, codebooks


CASES = [  # kind, N, Q, K, D, metric, precision
    ("plain", 0, 2, 7, 3, "euclidean", "auto"),
    ("plain", 1, 1, 1, 1, "euclidean", "auto"),
    ("plain", 5, 2, 7, 3, "euclidean", "auto"),
    ("plain", 33, 4, 100, 8, "euclidean", "auto"),
    ("plain", 100, 2, 70, 20, "euclidean", "auto"),
    ("plain", 33, 3, 100, 64, "euclidean", "auto"),
    ("plain", 5, 2, 40, 130, "euclidean", "auto"),
    ("plain", 33, 12, 17, 8, "euclidean", "auto"),
    ("plain", 33, 2, 100, 64, "euclidean", "bf16"),
    ("plain", 33, 2, 40, 20, "euclidean", "ieee"),
    ("plain", 33, 3, 100, 8, "cosine", "auto"),
    ("plain", 33, 2, 100, 64, "cosine", "auto"),
    ("mean100", 33, 3, 100, 8, "euclidean", "auto"),
    ("mean100", 33, 2, 100, 64, "euclidean", "auto"),
    ("mean100", 33, 2, 100, 20, "cosine", "auto"),
    ("tiny", 33, 3, 70, 8, "euclidean", "auto"),
    ("duplicates", 33, 2, 100, 8, "euclidean", "auto"),
    ("duplicates", 33, 2, 40, 64, "euclidean", "auto"),
    ("late_ties", 33, 4, 100, 8, "euclidean", "auto"),
    ("late_ties", 33, 3, 100, 64, "euclidean", "auto"),
    ("zeros", 33, 3, 40, 8, "cosine", "auto"),
    ("strided", 33, 2, 40, 64, "euclidean", "auto"),
    ("bf16", 33, 2, 40, 20, "euclidean", "auto"),
]


def work_through(out: str) -> None:
    from mmtok.kernels.triton import nearest_code as kernels
    from mmtok.kernels.triton.residual_codes import residual_codes, supported

    results = {}
    for case in CASES:
        kind, N, Q, K, D, metric, precision = case
        z, codebooks = chain(kind, N, Q, K, D)
        expected, before = exact_chain(z, codebooks, metric), z.clone()
        assert supported(z, codebooks)
        first, worklist, counter = kernels.search_first_pass(z, codebooks, metric, precision)
        codes = first.clone()
        kernels.settle(z, codebooks, metric, codes, worklist, counter)
        if kind == "late_ties":  # the public function is these two steps
            assert torch.equal(residual_codes(z, codebooks, metric, precision), codes)
        results[name_of(case)] = {
            "codes": codes, "expected": expected, "first": first, "untouched": torch.equal(z, before),
            "listed": worklist[: int(counter)].sort().values,
        }  # fmt: skip
    torch.save(results, out)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return interpret(__file__, tmp_path_factory.mktemp("interpreter"))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_codes_are_those_of_fp64(case, results):
    r = results[name_of(case)]
    assert r["codes"].dtype == torch.int64 and r["codes"].shape == case[1:3]
    assert torch.equal(r["codes"], r["expected"])
    assert r["untouched"]  # the residual replaced a copy, never the caller's rows


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_certified_codes_are_right_as_long_as_those_before_them_are(case, results):
    r = results[name_of(case)]
    first, expected = r["first"], r["expected"]
    code = torch.where(first < 0, -1 - first, first)
    right = (code == expected).cumprod(1).bool()
    right_before = torch.cat([torch.ones(len(code), 1, dtype=torch.bool), right[:, :-1]], 1)
    claimed = (first >= 0) & right_before
    assert torch.equal(first[claimed], expected[claimed])
    assert torch.equal(r["listed"].long(), torch.nonzero((first < 0).any(1))[:, 0])


def test_certificate_is_neither_vacuous_nor_blind(results):
    plain = [results[name_of(c)]["first"].flatten() for c in CASES if c[0] == "plain" and c[1] > 5 and c[6] == "auto"]
    assert torch.cat(plain).ge(0).float().mean() > 0.9
    for case in CASES:
        if case[0] == "late_ties":
            first = results[name_of(case)]["first"]
            assert first[:, 0].ge(0).all() and first[:, 1].lt(0).float().mean() > 0.1
        if case[6] == "bf16":
            assert results[name_of(case)]["first"].lt(0).float().mean() > 0.1


@pytest.fixture
def device_chain():
    pytest.importorskip("triton")
    from mmtok.kernels.triton.residual_codes import residual_codes

    return residual_codes


@gpu
@no_device
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(
    ("N", "Q", "K", "D"), [(102400, 8, 1024, 128), (20000, 32, 1024, 8), (13, 8, 2048, 256), (5000, 9, 1000, 20)]
)
def test_device_codes_are_those_of_fp64(N, Q, K, D, metric, device_chain):
    z, codebooks = (x.cuda() for x in chain("mean100" if metric == "euclidean" else "plain", N, Q, K, D))
    codes = device_chain(z, codebooks, metric)
    sample = torch.randperm(N, device="cuda")[:200]
    assert torch.equal(codes[sample], exact_chain(z[sample], codebooks, metric))
    assert torch.equal(codes, device_chain(z, codebooks, metric))  # bitwise repeatable
    assert torch.equal(codes[:, : Q // 2], device_chain(z, codebooks[: Q // 2], metric))  # a prefix of the levels


@gpu
@no_device
@pytest.mark.parametrize("kind", ["tiny", "duplicates", "late_ties", "mean100"])
@pytest.mark.parametrize("D", [3, 8, 20, 64, 200])
def test_device_codes_of_awkward_data(kind, D, device_chain):
    z, codebooks = (x.cuda() for x in chain(kind, 500, 4, 1000, D))
    assert torch.equal(device_chain(z, codebooks), exact_chain(z, codebooks, "euclidean"))


@gpu
@no_device
def test_device_codes_do_not_depend_on_modes(device_chain):
    z, codebooks = (x.cuda() for x in chain("plain", 20000, 4, 512, 64))
    codes = device_chain(z, codebooks)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert torch.equal(device_chain(z, codebooks), codes)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(device_chain(z[777:1777], codebooks), codes[777:1777])  # nor on the batch


@gpu
@no_device
def test_device_memory_does_not_grow_with_the_levels(device_chain):
    peaks = []
    for Q in (2, 32):
        z, codebooks = (x.cuda() for x in chain("plain", 100000, Q, 256, 128))
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        codes = device_chain(z, codebooks)
        # The codes are asked for; the codebooks are prepared once more in two bf16 parts.
        peaks.append(torch.cuda.max_memory_allocated() - start - codes.nbytes - 2 * codebooks.nbytes)
    assert peaks[1] - peaks[0] < 4 << 20


if __name__ == "__main__":
    allow_scalar_bounds()
    poison_new_tensors()
    work_through(sys.argv[1])
