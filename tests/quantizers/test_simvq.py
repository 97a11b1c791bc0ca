from __future__ import annotations

import pytest
import torch

from mmtok.quantizers import SimVectorQuantizer, VectorQuantizer


def test_the_code_is_the_nearest_row_of_the_product():
    torch.manual_seed(0)
    quantizer = SimVectorQuantizer(4, 20)
    z = torch.randn(3, 30, 4)
    codebook = quantizer.basis @ quantizer.transform.weight.T + quantizer.transform.bias
    codes = torch.cdist(z.flatten(0, 1), codebook).argmin(1)
    out = quantizer(z)
    assert torch.equal(out.codes.flatten(), codes)
    torch.testing.assert_close(out.z_q, codebook[codes].view(3, 30, 4))
    torch.testing.assert_close(quantizer.codebook(), codebook)


def test_losses_are_those_of_vq_and_reach_the_matrix():
    torch.manual_seed(0)
    quantizer = SimVectorQuantizer(4, 20, commitment_weight=0.7, codebook_weight=1.3)
    z = torch.randn(2, 9, 4, requires_grad=True)
    mask = torch.rand(2, 9) < 0.6
    out = quantizer(z, mask)
    e = quantizer.codebook().detach()[out.codes[:, 0]]
    error = (z.detach() - e)[mask].square().mean()
    torch.testing.assert_close(out.loss.detach(), 2.0 * error)
    grad_z, grad_bias = torch.autograd.grad(out.loss, [z, quantizer.transform.bias])
    pull = torch.where(mask[..., None], 2 * (z.detach() - e) / (4 * mask.sum()), 0.0)
    torch.testing.assert_close(grad_z, 0.7 * pull)
    torch.testing.assert_close(grad_bias, -1.3 * pull.sum((0, 1)))


def train(quantizer: SimVectorQuantizer | VectorQuantizer) -> float:
    """Usage on fresh data after 150 steps on Gaussian vectors far from the start."""
    g = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        quantizer(2 + torch.randn(1, 256, 8, generator=g)).loss.backward()
        optimizer.step()
    return float(quantizer.eval()(2 + torch.randn(1, 4000, 8, generator=g)).stats["usage"])


def test_every_code_moves_with_every_gradient():
    """One chosen code pulls the others along: usage stays high where a plain learned codebook collapses."""
    torch.manual_seed(0)
    quantizer = SimVectorQuantizer(8, 64)
    basis, before = quantizer.basis.clone(), quantizer.codebook().detach()
    z = torch.full((1, 5, 8), 2.0)
    assert len(quantizer.encode(z).unique()) == 1
    quantizer(z).loss.backward()
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter -= 0.1 * parameter.grad  # type: ignore[operator]
    assert bool((quantizer.codebook().detach() - before).norm(dim=1).gt(1e-4).all())
    plain = VectorQuantizer(8, 64, codebook="gradient", kmeans_init=False, dead_code_threshold=0.0)
    usage, usage_plain = train(quantizer), train(plain)
    assert torch.equal(quantizer.basis, basis)
    assert usage > 0.5 and usage > usage_plain + 0.3


def test_constructor_names_what_is_wrong():
    with pytest.raises(ValueError, match="codebook_size >= 2"):
        SimVectorQuantizer(4, 1)
    with pytest.raises(ValueError, match="gradient: expected one of straight_through, rotation"):
        SimVectorQuantizer(4, 8, gradient="gumbel")
