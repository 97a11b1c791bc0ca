"""Packing kernels in Triton: in the interpreter at small shapes (see test_triton_stats), on a GPU at real ones."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from interpreter import results_of
from torch import Tensor

from mmtok.kernels.binary_codes import pack_bits, sign_pack, unpack_bits
from mmtok.kernels.dispatch import force
from mmtok.kernels.scalar_codes import fsq_pack, pack_digits, unpack_digits

ROOT = Path(__file__).resolve().parents[2]
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BITS = {  # name: N, D, type or layout
    "empty": (0, 5, "bool"),
    "one": (1, 1, "bool"),
    "odd": (130, 18, "bool"),
    "widest": (7, 62, "bool"),
    "whole_numbers": (9, 33, "int64"),
    "floats": (9, 8, "float32"),
    "columns": (20, 9, "transposed"),
}
LEVELS = {"one_level": (3,), "usual": (8, 5, 5, 5), "wide": (1000, 7, 9, 11, 13), "widest": (1 << 31, 1 << 30)}


def bits_case(N: int, D: int, kind: str) -> Tensor:
    bits = torch.rand(D, N, generator=torch.Generator().manual_seed(N + D)) < 0.5
    if kind == "transposed":
        return bits.T
    return bits.T.contiguous().to(getattr(torch, kind))


def logits_case(N: int, D: int, kind: str) -> Tensor:
    x = torch.randn(D, N, generator=torch.Generator().manual_seed(N + D)).T
    x = x if kind == "transposed" else x.contiguous()
    if N:
        x[0, 0] = 0.0  # no bit
    return x.bfloat16() if kind == "float32" else x


def digits_case(levels: tuple[int, ...], N: int = 131) -> Tensor:
    g = torch.Generator().manual_seed(len(levels))
    digits = torch.stack([torch.randint(0, n, (N,), generator=g) for n in levels], 1)
    digits[0] = torch.tensor(levels) - 1  # the largest code
    return digits


def bounded_case(levels: tuple[int, ...]) -> Tensor:
    """Floats that round to every level, some of them exactly half way between two."""
    half = torch.tensor(levels) // 2
    offsets = 0.98 * torch.rand(131, len(levels), generator=torch.Generator().manual_seed(1)) - 0.49
    offsets[::7] = 0.0
    x = digits_case(levels) - half + offsets
    x[5] = torch.where(torch.tensor(levels) > 3, 0.5, 0.0)  # to even: 0
    return x


def run_in_interpreter(out: str) -> None:
    real = torch.empty

    def poisoned(*args, **kwargs) -> Tensor:
        t = real(*args, **kwargs)
        return t.fill_(float("nan") if t.is_floating_point() else -7)

    torch.empty = poisoned
    from mmtok.kernels.triton import packed_codes

    results = {}
    for name, case in BITS.items():
        codes = packed_codes.pack_bits(bits_case(*case), sign=False)
        signs = packed_codes.pack_bits(logits_case(*case), sign=True)
        results["bits", name] = (codes, packed_codes.unpack_bits(codes, case[1]), signs)
    for name, levels in LEVELS.items():
        codes = packed_codes.pack_digits(digits_case(levels), levels, centred=False)
        results["digits", name] = (codes, packed_codes.unpack_digits(codes, levels))
        results["fsq", name] = packed_codes.pack_digits(bounded_case(levels), levels, centred=True)
    few = packed_codes.pack_digits(digits_case((8, 5))[::3].int(), (8, 5), centred=False)
    none = packed_codes.unpack_digits(torch.zeros(0, dtype=torch.int64), (8, 5))
    results["strided"] = (few, none)
    torch.save(results, out)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return results_of(__file__, tmp_path_factory.mktemp("interpreted"))


@pytest.mark.parametrize("name", BITS)
def test_bits_in_the_interpreter(interpreted: dict, name: str):
    bits, logits = bits_case(*BITS[name]), logits_case(*BITS[name])
    codes, unpacked, signs = interpreted["bits", name]
    with force("reference"):
        assert torch.equal(codes, pack_bits(bits))
        assert torch.equal(signs, pack_bits(logits > 0))
    assert torch.equal(unpacked, bits.bool())


@pytest.mark.parametrize("name", LEVELS)
def test_digits_in_the_interpreter(interpreted: dict, name: str):
    levels, digits = LEVELS[name], digits_case(LEVELS[name])
    codes, unpacked = interpreted["digits", name]
    weights = [math.prod(levels[:i]) for i in range(len(levels))]
    expected = [sum(d * w for d, w in zip(row, weights, strict=True)) for row in digits.tolist()]
    assert codes.tolist() == expected
    assert torch.equal(unpacked, digits)


@pytest.mark.parametrize("name", [name for name in LEVELS if name != "widest"])
def test_rounding_and_packing_in_the_interpreter(interpreted: dict, name: str):
    with force("reference"):
        assert torch.equal(interpreted["fsq", name], fsq_pack(bounded_case(LEVELS[name]), LEVELS[name]))


def test_strided_and_empty_in_the_interpreter(interpreted: dict):
    few, none = interpreted["strided"]
    assert torch.equal(few, pack_digits(digits_case((8, 5))[::3], (8, 5)))
    assert none.shape == (0, 2) and none.dtype == torch.int64


@pytest.mark.parametrize(
    "call",
    [
        lambda: pack_bits(torch.ones(2, 3)),
        lambda: sign_pack(torch.ones(2, 3), 3),
        lambda: unpack_bits(torch.ones(2, dtype=torch.int64), 3),
        lambda: pack_digits(torch.ones(2, 2, dtype=torch.int64), (3, 4)),
        lambda: unpack_digits(torch.ones(2, dtype=torch.int64), (3, 4)),
        lambda: fsq_pack(torch.ones(2, 2), (3, 4)),
    ],
    ids=["pack_bits", "sign_pack", "unpack_bits", "pack_digits", "unpack_digits", "fsq_pack"],
)
def test_forcing_triton_on_a_cpu_is_refused(call):
    with force("triton"), pytest.raises(ValueError, match="'triton' is forced but not available"):
        call()


class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.parametrize(("N", "D", "per_code"), [(65536, 18, 18), (4097, 64, 8), (1000, 62, 62), (0, 8, 4)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_signs(self, N: int, D: int, per_code: int, dtype: torch.dtype):
        x = torch.randn(N, D, device="cuda").to(dtype)
        with force("triton"):
            codes = sign_pack(x, per_code)
            bits = unpack_bits(codes, per_code)
            again = pack_bits(bits)
        with force("reference"):
            assert torch.equal(codes, sign_pack(x, per_code))
        assert torch.equal(bits.flatten(1), x > 0) and torch.equal(again, codes)

    @pytest.mark.parametrize("levels", [(8, 5, 5, 5), (7, 5, 5, 5, 5), (1000, 1000, 1000)])
    def test_digits_and_rounding(self, levels: tuple[int, ...]):
        size = torch.tensor(levels, device="cuda")
        digits = (torch.rand(65536, len(levels), device="cuda") * size).long()
        bounded = digits - size // 2 + 0.98 * torch.rand(digits.shape, device="cuda") - 0.49
        with force("triton"):
            codes, rounded = pack_digits(digits, levels), fsq_pack(bounded, levels)
            assert torch.equal(unpack_digits(codes, levels), digits)
        with force("reference"):
            assert torch.equal(codes, pack_digits(digits, levels))
            assert torch.equal(rounded, codes)


if __name__ == "__main__":
    run_in_interpreter(sys.argv[1])
