"""Grouped soft entropy in Triton: in the interpreter at small shapes (see test_triton_stats), on a GPU at real ones."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from interpreter import results_of
from torch import Tensor

from mmtok.kernels.binary_codes import binary_entropy_grouped
from mmtok.kernels.dispatch import force

ROOT = Path(__file__).resolve().parents[2]
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CASES = {  # name: N, D, bits of a group, share of rows that count, scale of the logits
    "empty": (0, 3, 2, 1.0, 1.0),
    "one_bit": (1, 1, 1, 1.0, 1.0),
    "smaller_last_group": (33, 7, 3, 1.0, 1.0),
    "several_chunks": (131, 4, 4, 1.0, 1.0),
    "masked": (70, 10, 5, 0.6, 2.0),
    "nothing_counts": (5, 4, 4, 0.0, 1.0),
    "saturated": (20, 6, 6, 1.0, 60.0),
    "largest_group": (40, 18, 9, 0.8, 1.0),
    "group_above_all_bits": (17, 2, 8, 1.0, 1.0),
    "columns": (19, 8, 4, 1.0, 1.0),
}


def logits_case(name: str) -> tuple[Tensor, Tensor | None]:
    N, D, _, share, scale = CASES[name]
    g = torch.Generator().manual_seed(N + D)
    x = scale * torch.randn(D, N, generator=g).T
    x = x if name == "columns" else x.contiguous()
    return x, None if share == 1 else torch.rand(N, generator=g) < share


def weights(N: int, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.full((N,), 1.0 / max(1, N))
    return mask.float() / mask.sum().clamp_min(1)


def entropy_of(p: Tensor) -> Tensor:
    return -(p * p.clamp_min(1e-37).log()).sum()


def run_in_interpreter(out: str) -> None:
    real = torch.empty

    def poisoned(*args, **kwargs) -> Tensor:
        t = real(*args, **kwargs)
        return t.fill_(float("nan") if t.is_floating_point() else -7)

    torch.empty = poisoned
    from mmtok.kernels.triton import binary_entropy

    binary_entropy._CHUNK_TILES = 2  # several chunks at few rows
    results = {}
    for name, (N, _, bits, _, _) in CASES.items():
        x, mask = logits_case(name)
        if mask is not None:
            x[~mask] = float("nan")
        x.requires_grad_()
        value = entropy_of(binary_entropy.mean_code_distribution(x, weights(N, mask), bits))
        results[name] = (value.detach(), torch.autograd.grad(value, x)[0])
    torch.save(results, out)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return results_of(__file__, tmp_path_factory.mktemp("interpreted"))


@pytest.mark.parametrize("name", CASES)
def test_entropy_and_gradient_in_the_interpreter(interpreted: dict, name: str):
    x, mask = logits_case(name)
    x.requires_grad_()
    value, grad = interpreted[name]
    if len(x) == 0 or (mask is not None and not mask.any()):
        assert float(value) == 0 and bool((grad == 0).all())
        return
    with force("reference"):
        expected = binary_entropy_grouped(x, mask, CASES[name][2])[1]
    (expected_grad,) = torch.autograd.grad(expected, x)
    torch.testing.assert_close(value.double(), expected.detach().double(), atol=3e-6, rtol=3e-6)
    torch.testing.assert_close(grad, expected_grad, atol=1e-6, rtol=2e-4)
    if mask is not None:
        assert bool((grad[~mask] == 0).all())


def test_forcing_triton_on_a_cpu_is_refused():
    with force("triton"), pytest.raises(ValueError, match="binary_entropy_grouped: 'triton' is forced but not"):
        binary_entropy_grouped(torch.zeros(2, 3))


class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.parametrize(("N", "D", "bits"), [(65536, 64, 8), (4097, 18, 9), (100, 7, 3)])
    def test_value_gradient_and_repetition(self, N: int, D: int, bits: int):
        g = torch.Generator("cuda").manual_seed(0)
        x = torch.randn(N, D, device="cuda", generator=g).requires_grad_()
        mask = torch.rand(N, device="cuda", generator=g) < 0.9
        found = {}
        for how in ("triton", "torch"):
            with force(how):
                runs = []
                for _ in range(3):
                    value = binary_entropy_grouped(x, mask, bits)[1]
                    runs.append((value.detach(), torch.autograd.grad(value, x)[0]))
            found[how] = runs
        for value, grad in found["triton"][1:]:
            assert torch.equal(value, found["triton"][0][0]) and torch.equal(grad, found["triton"][0][1])
        torch.testing.assert_close(found["triton"][0][0], found["torch"][0][0], atol=1e-4, rtol=1e-5)
        scale = float(found["torch"][0][1].abs().max())
        torch.testing.assert_close(found["triton"][0][1], found["torch"][0][1], atol=1e-4 * scale, rtol=1e-3)


if __name__ == "__main__":
    run_in_interpreter(sys.argv[1])
