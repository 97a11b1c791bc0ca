from __future__ import annotations

import pytest
import torch

from mmtok.quantizers import build_quantizer
from mmtok.quantizers.gradient import GRADIENTS, choose_gradient, rotate


def rotation_matrix(z: torch.Tensor, z_q: torch.Tensor) -> torch.Tensor:
    """|z_q| / |z| times the D x D rotation in the plane of both: cosine and sine on an orthonormal basis of it."""
    u, v = z / z.norm(), z_q / z_q.norm()
    w = v - (u @ v) * u
    w = w / w.norm()
    cosine, sine = u @ v, (v - (u @ v) * u).norm()
    plane = cosine * (torch.outer(u, u) + torch.outer(w, w)) + sine * (torch.outer(w, u) - torch.outer(u, w))
    rest = torch.eye(len(z), dtype=z.dtype) - torch.outer(u, u) - torch.outer(w, w)
    return z_q.norm() / z.norm() * (plane + rest)


@pytest.mark.parametrize("D", [2, 3, 16])
def test_rotation_is_that_of_an_explicit_matrix(D):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(2, 7, D, generator=g, dtype=torch.float64)
    z_q, weight = torch.randn(2, 7, D, generator=g).double(), torch.randn(2, 7, D, generator=g).double()
    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    out = rotate(ours, z_q)
    assert torch.equal(out, z_q)
    (grad,) = torch.autograd.grad((out * weight).sum(), ours)
    matrices = [rotation_matrix(a, b) for a, b in zip(z.flatten(0, 1), z_q.flatten(0, 1), strict=True)]
    turned = torch.stack([R @ e for R, e in zip(matrices, theirs.flatten(0, 1), strict=True)])
    torch.testing.assert_close(turned, z_q.flatten(0, 1))
    (expected,) = torch.autograd.grad((turned * weight.flatten(0, 1)).sum(), theirs)
    torch.testing.assert_close(grad, expected)
    # The gradient stands to z as it stood to z_q.
    cosine = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(cosine(grad, z, dim=-1), cosine(weight, z_q, dim=-1))


def test_vectors_without_a_direction_pass_the_gradient_straight_through():
    z = torch.tensor([[0.0, 0, 0], [1, 2, 3], [0, 0, 0]], requires_grad=True)
    z_q = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 0]])
    out = rotate(z, z_q)
    assert torch.equal(out, z_q)
    weight = torch.randn(3, 3)
    (grad,) = torch.autograd.grad((out * weight).sum(), z)
    assert torch.equal(grad, weight)


@pytest.mark.parametrize("off", [0.0, 1e-6, 1e-3])
def test_opposite_vectors_keep_the_gradient_finite_and_of_its_length(off):
    torch.manual_seed(0)
    z = torch.randn(5, 8)
    z_q = -2 * z + off * torch.randn(5, 8)
    z.requires_grad_()
    out = rotate(z, z_q)
    assert torch.equal(out, z_q)
    weight = torch.randn(5, 8)
    (grad,) = torch.autograd.grad((out * weight).sum(), z)
    torch.testing.assert_close(grad.norm(dim=1), 2 * weight.norm(dim=1), rtol=1e-2, atol=0)
    along = (grad * z).sum(1) / z.norm(dim=1)  # and the component along z is the one that was along z_q
    torch.testing.assert_close(along, 2 * (weight * z_q).sum(1) / z_q.norm(dim=1), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", GRADIENTS)
def test_value_is_exact_and_nothing_flows_to_the_choice(kind):
    torch.manual_seed(0)
    z, z_q = 100 * torch.randn(50, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    out = choose_gradient(z, z_q, kind)
    assert torch.equal(out, z_q)
    assert torch.autograd.grad(out.sum(), z_q, allow_unused=True) == (None,)


FAMILY = {
    "vq": {"type": "vq", "dim": 4, "codebook_size": 9},
    "rvq": {"type": "rvq", "dim": 4, "num_codebooks": 3, "codebook_size": 9},
    "grouped": {"type": "grouped_rvq", "dim": 4, "num_codebooks": 4, "codebook_size": 9},
    "strided": {"type": "strided_rvq", "dim": 4, "level_strides": [2, 1], "codebook_size": 9, "codebook_dim": None},
}


@pytest.mark.parametrize("name", FAMILY)
def test_the_family_rotates_z_to_its_sum_of_codes(name):
    torch.manual_seed(0)
    quantizer = build_quantizer(FAMILY[name] | {"gradient": "rotation"})
    quantizer(torch.randn(4, 20, 4))
    quantizer.eval()
    z = torch.randn(2, 5, 4, requires_grad=True)
    weight = torch.randn(2, 5, 4)
    out = quantizer(z)
    (grad,) = torch.autograd.grad((out.z_q * weight).sum(), z)
    width = 2 if name == "grouped" else 4  # each group turns in its own space
    x, q = z.detach().view(-1, width), out.z_q.detach().view(-1, width)
    expected = torch.stack([rotation_matrix(a, b).T @ w for a, b, w in zip(x, q, weight.view(-1, width), strict=True)])
    torch.testing.assert_close(grad.view(-1, width), expected, atol=1e-4, rtol=1e-3)


def test_split_rotates_inside_its_branches():
    torch.manual_seed(0)
    quantizer = build_quantizer(
        {"type": "split_rvq", "dim": 4, "num_codebooks": 2, "codebook_size": 9, "inner_dim": 3, "gradient": "rotation"}
    )
    quantizer(torch.randn(4, 20, 4))
    quantizer.eval()
    z = torch.randn(1, 1, 4, requires_grad=True)
    weight = torch.randn(4)
    out = quantizer(z)
    (grad,) = torch.autograd.grad((out.z_q[0, 0] * weight).sum(), z)
    total = torch.zeros(4)
    for row, branch in enumerate(("semantic", "acoustic")):
        inside, outside = getattr(quantizer, f"{branch}_in").weight, getattr(quantizer, f"{branch}_out").weight
        h = inside @ z[0, 0]
        e = getattr(quantizer, branch).books[0].codebook[out.codes[0, row, 0]]
        total += inside.T @ rotation_matrix(h, e).T @ outside.T @ weight
    torch.testing.assert_close(grad[0, 0], total, atol=1e-5, rtol=1e-4)


def test_unknown_kind_is_named():
    with pytest.raises(ValueError, match="gradient: expected one of straight_through, rotation, got 'gumbel'"):
        choose_gradient(torch.zeros(1, 2), torch.zeros(1, 2), "gumbel")
    for name, config in FAMILY.items():
        with pytest.raises(ValueError, match="gradient: expected one of"):
            build_quantizer(config | {"gradient": name})
