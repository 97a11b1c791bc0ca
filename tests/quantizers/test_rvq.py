from __future__ import annotations

import copy
import itertools

import pytest
import torch

from mmtok.quantizers import ResidualVectorQuantizer, VectorQuantizer


def trained(**options: object) -> ResidualVectorQuantizer:
    torch.manual_seed(0)
    config: dict = {"dim": 4, "num_codebooks": 4, "codebook_size": 16} | options
    quantizer = ResidualVectorQuantizer(**config)
    for _ in range(3):
        quantizer(torch.randn(8, 40, 4), num_codebooks=4)
    return quantizer


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_losses_are_those_of_each_level_on_its_detached_residual(codebook):
    quantizer = trained(codebook=codebook, commitment_weight=0.7, codebook_weight=1.3).eval()
    z = torch.randn(3, 20, 4, requires_grad=True)
    out = quantizer(z)
    residual, terms = z.detach(), []
    for q in range(4):
        e = quantizer.books[q].codebook[out.codes[:, q]].detach()
        terms.append((residual - e).square().mean())
        residual = residual - e
    commitment = torch.stack(terms).mean()
    torch.testing.assert_close(out.stats["commitment_loss"], commitment)
    weight = 0.7 + (1.3 if codebook == "gradient" else 0.0)
    torch.testing.assert_close(out.loss.detach(), weight * commitment)
    assert ("codebook_loss" in out.stats) == (codebook == "gradient")
    # d/dz of 0.7 / 4 * sum_q mean |r_q - e_q|^2, where r_{q+1} = r_q - e_q: every level pulls, none through another.
    pull, r = torch.zeros_like(z), z.detach()
    for q in range(4):
        r = r - quantizer.books[q].codebook[out.codes[:, q]].detach()
        pull += 0.7 / 4 * 2 * r / r.numel()
    (grad,) = torch.autograd.grad(out.loss, z)
    torch.testing.assert_close(grad, pull)


def test_error_falls_with_every_level():
    quantizer = trained().eval()
    z = torch.randn(4, 50, 4)
    errors = [float((quantizer(z, num_codebooks=k).z_q - z).square().mean()) for k in range(1, 5)]
    assert all(b < 0.8 * a for a, b in itertools.pairwise(errors))


def test_one_level_is_the_vector_quantizer():
    torch.manual_seed(0)
    rvq = ResidualVectorQuantizer(4, 1, 16, codebook="gradient", kmeans_init=False)
    vq = VectorQuantizer(4, 16, codebook="gradient", kmeans_init=False)
    vq.book.load_state_dict(rvq.books[0].state_dict())
    z = torch.randn(2, 30, 4)
    torch.manual_seed(1)
    a = rvq(z)
    torch.manual_seed(1)
    b = vq(z)
    assert torch.equal(a.codes, b.codes) and torch.equal(a.z_q, b.z_q)
    torch.testing.assert_close(a.loss, b.loss)
    assert torch.equal(rvq.books[0].codebook, vq.book.codebook)


@pytest.mark.parametrize("codebook_dim", [None, 2])
def test_dropped_levels_touch_nothing(codebook_dim):
    quantizer = trained(quantizer_dropout=1.0, codebook_dim=codebook_dim)
    before = copy.deepcopy(quantizer).eval()
    z = torch.randn(64, 6, 4)
    torch.manual_seed(2)
    levels = quantizer._draw_levels(z, None)
    torch.manual_seed(2)
    out = quantizer(z)
    assert sorted(levels.unique().tolist()) == [1, 2, 3, 4]
    codes = before.encode(z)
    terms = [[], [], [], []]
    for b, n in enumerate(levels.tolist()):
        assert torch.equal(out.codes[b, :n], codes[b, :n]) and bool((out.codes[b, n:] == 0).all())
        torch.testing.assert_close(out.z_q[b].detach(), before.decode(codes[b : b + 1, :n])[0])
    for q in range(4):
        on = levels > q
        used = codes[on, q]
        assert float(out.stats["usage"][q]) == pytest.approx(len(used.unique()) / 16)
        counts = torch.bincount(used.flatten(), minlength=16).float()
        expected = before.books[q].cluster_size.lerp(counts, 0.01)
        alive = expected >= 0.1 * expected.mean()
        torch.testing.assert_close(quantizer.books[q].cluster_size[alive], expected[alive])
        terms[q] = before(z[on], num_codebooks=q + 1).loss * (q + 1)
        if q:
            terms[q] = terms[q] - before(z[on], num_codebooks=q).loss * q
    torch.testing.assert_close(out.loss, torch.stack(terms).mean(), atol=1e-6, rtol=1e-4)


def test_dropout_only_in_training_and_only_when_no_number_is_named():
    quantizer = trained(quantizer_dropout=1.0)
    z = torch.randn(32, 5, 4)
    assert quantizer._draw_levels(z, 3).tolist() == [3] * 32
    assert quantizer.eval()._draw_levels(z, None).tolist() == [4] * 32
    half = trained(quantizer_dropout=0.5)
    full = (half._draw_levels(torch.zeros(4000, 1, 4), None) == 4).float().mean()
    assert float(full) == pytest.approx(0.5 + 0.5 / 4, abs=0.04)


def test_projected_levels_take_their_gradient_through_the_chain():
    """z_q's gradient is I - prod_q (I - P_q), P_q = W_out W_in: one where the narrow spaces reach, 0 elsewhere."""
    quantizer = trained(codebook_dim=2).eval()
    z = torch.randn(2, 3, 4, requires_grad=True)
    weight = torch.randn(2, 3, 4)
    (grad,) = torch.autograd.grad((quantizer(z).z_q * weight).sum(), z)
    rest = torch.eye(4)
    for q in range(4):
        rest = (torch.eye(4) - quantizer.project_out[q].weight @ quantizer.project_in[q].weight) @ rest
    torch.testing.assert_close(grad, weight @ (torch.eye(4) - rest))


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_projections_learn_from_their_own_level_alone(gradient):
    quantizer = trained(codebook_dim=2, gradient=gradient).eval()
    z, weight = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    (quantizer(z).z_q * weight).sum().backward()
    grads = [layer.weight.grad.clone() for layer in quantizer.project_out]
    for q in range(4):  # d z_q / d V_q = weight' (what enters V_q), whatever the later levels make of it
        entered = quantizer.books[q].codebook[quantizer.encode(z)[:, q]]
        torch.testing.assert_close(grads[q], torch.einsum("btd,bte->de", weight, entered))


def test_a_narrow_chain_learns_at_a_high_rate():
    """With gradients of the projections through the chain this diverges: the error passes 1000 times the variance."""
    torch.manual_seed(0)
    scale = 0.93 ** torch.arange(48)
    quantizer = ResidualVectorQuantizer(48, 8, 64, codebook_dim=8, metric="cosine", codebook="gradient")
    optimizer = torch.optim.AdamW(quantizer.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(150):
        z = torch.randn(8, 32, 48) * scale
        out = quantizer(z)
        error = (out.z_q - z).square().mean()
        optimizer.zero_grad()
        (out.loss + error).backward()
        optimizer.step()
    assert float(error.detach()) < 0.4 * float(scale.square().mean())


@pytest.mark.parametrize("positions", [31, 32, 200])
def test_projected_codes_decode_alike_one_by_one_and_by_projected_codebooks(positions):
    """Below 2 K = 32 positions each code is projected, from there on each codebook; in value and in gradient alike."""
    quantizer = trained(codebook_dim=2, codebook="gradient").eval()
    codes = torch.randint(0, 16, (1, 4, positions))
    weight = torch.randn(1, positions, 4)
    by_level = torch.zeros(1, positions, 4)
    for q in range(4):
        by_level = by_level + quantizer.project_out[q](quantizer.books[q].codebook[codes[:, q]])
    out = quantizer.decode(codes)
    torch.testing.assert_close(out, by_level, atol=1e-5, rtol=1e-5)
    learned = [*quantizer.project_out.parameters(), *(book.codebook for book in quantizer.books)]
    grads = torch.autograd.grad((out * weight).sum(), learned)
    expected = torch.autograd.grad((by_level * weight).sum(), learned)
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_projected_codes_are_those_of_the_chain_of_levels():
    """encode projects z once for all levels; the equation projects what is left at each."""
    quantizer = trained(codebook_dim=2).eval()
    z = torch.randn(3, 50, 4)
    residual, codes = z.double(), quantizer.encode(z)
    for q in range(4):
        into, out, book = quantizer.project_in[q], quantizer.project_out[q], quantizer.books[q].codebook.double()
        h = residual @ into.weight.double().T + into.bias.double()
        nearest = (h[..., None, :] - book).square().sum(-1).argmin(-1)
        assert torch.equal(codes[:, q], nearest)
        residual = residual - book[nearest] @ out.weight.double().T - out.bias.double()


def test_constructor_names_what_is_wrong():
    with pytest.raises(ValueError, match="num_codebooks: expected at least 1, got 0"):
        ResidualVectorQuantizer(4, 0, 16)
    with pytest.raises(ValueError, match=r"quantizer_dropout: expected a share in \[0, 1\], got 2"):
        ResidualVectorQuantizer(4, 2, 16, quantizer_dropout=2)
