from __future__ import annotations

import itertools

import pytest
import torch

from mmtok.quantizers import GroupedResidualVectorQuantizer, ResidualVectorQuantizer

D, G, LEVELS, K = 6, 3, 2, 16


def trained(**options: object) -> GroupedResidualVectorQuantizer:
    torch.manual_seed(0)
    config: dict = {"num_codebooks": G * LEVELS, "codebook_size": K, "num_groups": G} | options
    quantizer = GroupedResidualVectorQuantizer(D, **config)
    for _ in range(3):
        quantizer(torch.randn(8, 40, D), num_codebooks=G * LEVELS)
    return quantizer.eval()


def test_each_group_is_a_residual_quantizer_of_its_part():
    quantizer = trained()
    z = torch.randn(3, 9, D)
    out = quantizer(z)
    losses = []
    for g in range(G):
        part = ResidualVectorQuantizer(D // G, LEVELS, K).eval()
        part.load_state_dict(quantizer.groups[g].state_dict())
        own = part(z[..., 2 * g : 2 * g + 2])
        assert torch.equal(out.z_q[..., 2 * g : 2 * g + 2], own.z_q)
        for q in range(LEVELS):
            assert torch.equal(out.codes[:, q * G + g], own.codes[:, q])  # rows are level by level
            torch.testing.assert_close(out.stats["perplexity"][q * G + g], own.stats["perplexity"][q])
        losses.append(own.loss)
    torch.testing.assert_close(out.loss, torch.stack(losses).mean())


@pytest.mark.parametrize("codebook_dim", [None, 2])
def test_a_prefix_is_coarse_over_all_groups_and_the_rest_is_zero(codebook_dim):
    quantizer = trained(codebook_dim=codebook_dim)
    z = torch.randn(2, 5, D, requires_grad=True)
    codes = quantizer.encode(z)
    out = quantizer(z, num_codebooks=2)
    assert bool((out.z_q[..., 4:] == 0).all()) and bool((out.z_q[..., :4] != 0).all())
    (grad,) = torch.autograd.grad(out.z_q.sum(), z)
    assert bool((grad[..., 4:] == 0).all()) and float(grad[..., :4].abs().sum()) > 0
    assert bool((quantizer.decode(codes[:, :2])[..., 4:] == 0).all())
    parts = [quantizer.groups[g].decode(codes[:, [g]] if g else codes[:, [0, 3]]) for g in range(G)]
    torch.testing.assert_close(quantizer.decode(codes[:, :4]), torch.cat(parts, 2))  # group 0 has its second level


def test_error_falls_with_every_row():
    quantizer = trained()
    z = torch.randn(4, 50, D)
    errors = [float((quantizer(z, num_codebooks=k).z_q - z).square().mean()) for k in range(1, G * LEVELS + 1)]
    assert all(b < a for a, b in itertools.pairwise(errors))


def test_dropout_keeps_a_prefix_of_the_rows_of_each_item():
    quantizer = trained(quantizer_dropout=1.0)
    z = torch.randn(60, 4, D, requires_grad=True)
    codes = quantizer.encode(z)
    decoded = [quantizer.decode(codes[:, :k]) for k in range(1, 7)]
    sizes = [quantizer.groups[g].books[1].cluster_size.clone() for g in range(G)]
    torch.manual_seed(2)
    out = quantizer.train()(z)
    torch.manual_seed(2)
    torch.rand(60)
    rows = torch.randint(1, 7, (60,))
    assert sorted(rows.unique().tolist()) == [1, 2, 3, 4, 5, 6]
    for b, n in enumerate(rows.tolist()):
        assert torch.equal(out.codes[b, :n], codes[b, :n]) and bool((out.codes[b, n:] == 0).all())
        torch.testing.assert_close(out.z_q[b], decoded[n - 1][b])
    (grad,) = torch.autograd.grad(out.z_q.sum(), z)
    reached = (grad != 0).all(1).view(60, G, 2).all(2)  # (60, G): a group that an item does not use passes nothing
    assert torch.equal(reached, rows[:, None] > torch.arange(G))
    for g in range(G):  # level 1 of group g is row G + g
        moved = quantizer.groups[g].books[1].cluster_size
        used = 4 * int((rows > G + g).sum())
        assert float(moved.sum()) == pytest.approx(0.99 * float(sizes[g].sum()) + 0.01 * used, rel=0.2)
        assert not torch.equal(moved, sizes[g])


@pytest.mark.parametrize(("dim", "num_codebooks", "groups"), [(5, 4, 2), (6, 3, 2), (6, 4, 0)])
def test_constructor_names_what_is_wrong(dim, num_codebooks, groups):
    with pytest.raises(ValueError, match=rf"got {groups}, {dim} and {num_codebooks}"):
        GroupedResidualVectorQuantizer(dim, num_codebooks, 16, groups)
    with pytest.raises(ValueError, match="quantizer_dropout: expected a share"):
        GroupedResidualVectorQuantizer(6, 2, 16, 2, quantizer_dropout=-1)
