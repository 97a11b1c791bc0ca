from __future__ import annotations

import copy
import itertools

import pytest
import torch

from mmtok.quantizers import RandomProjectionQuantizer


def test_the_code_is_the_nearest_direction_of_the_projection():
    quantizer = RandomProjectionQuantizer(6, 30, num_codebooks=2, codebook_dim=3, normalize="given")
    mean, std = torch.randn(6), torch.rand(6) + 0.5
    quantizer.set_statistics(mean, std.tolist())
    z = torch.randn(2, 40, 6)
    x = (z - mean) / std
    for q in range(2):
        y = x @ quantizer.projection[q].T
        y = y / y.norm(dim=-1, keepdim=True)
        codes = (y[..., None, :] - quantizer.codebooks[q]).square().sum(-1).argmin(-1)
        assert torch.equal(quantizer.encode(z)[:, q], codes)
    torch.testing.assert_close(quantizer.codebooks.norm(dim=-1), torch.ones(2, 30))
    bound = (6 / (6 + 3)) ** 0.5
    assert 0.9 * bound < float(quantizer.projection.abs().max()) <= bound
    assert not list(quantizer.parameters())


def test_the_seed_fixes_everything():
    first, second, other = (RandomProjectionQuantizer(5, 12, 2, 3, seed=seed) for seed in (1, 1, 2))
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key])
    assert not torch.equal(first.codebooks, other.codebooks)


def test_running_statistics_are_those_of_all_vectors_seen():
    torch.manual_seed(0)
    quantizer = RandomProjectionQuantizer(3, 8, codebook_dim=2)
    seen = []
    for n in (5, 1, 30):
        z = 100 + torch.tensor([1.0, 3.0, 0.1]) * torch.randn(2, n, 3)
        mask = torch.rand(2, n) < 0.7
        quantizer(z, mask)
        seen.append(z[mask])
    quantizer(torch.randn(1, 4, 3), torch.zeros(1, 4, dtype=torch.bool))
    rows = torch.cat(seen)
    assert int(quantizer.num_seen) == len(rows)
    torch.testing.assert_close(quantizer.mean, rows.mean(0))
    torch.testing.assert_close(quantizer.std, rows.std(0, correction=0), rtol=1e-4, atol=1e-5)
    before = copy.deepcopy(quantizer.state_dict())
    quantizer.eval()(torch.randn(2, 9, 3))
    assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items())


def test_normalisation_spreads_the_codes():
    """Latents with a large common offset: without it almost every vector gets one code."""
    torch.manual_seed(0)
    z = 50 + torch.randn(4, 200, 8)
    raw = RandomProjectionQuantizer(8, 64, codebook_dim=4, normalize="given")(z).stats["perplexity"]
    normal = RandomProjectionQuantizer(8, 64, codebook_dim=4)(z).stats["perplexity"]
    assert float(raw) < 3 and float(normal) > 30


def test_decode_is_the_least_squares_preimage_under_unit_covariance():
    quantizer = RandomProjectionQuantizer(4, 30, num_codebooks=3, codebook_dim=2, normalize="given")
    quantizer.set_statistics([1.0, 2.0, 3.0, 4.0], [1.0, 0.5, 2.0, 1.0])
    codes = torch.randint(0, 30, (1, 3, 7))
    x = torch.randn(20000, 4)
    rows, targets = [], []
    for k in (1, 2, 3):  # two equations for four numbers, four, six; and |x|^2 as four more
        A, codebook = quantizer.projection[k - 1], quantizer.codebooks[k - 1]
        y = x @ A.T
        nearest = (y / y.norm(dim=1, keepdim=True) @ codebook.T).argmax(1)
        weight = 1 / (y - A.norm() * codebook[nearest]).square().mean().sqrt()
        rows.append(weight * A)
        targets.append(weight * A.norm() * codebook[codes[0, k - 1]])
        target = torch.cat([*targets, torch.zeros(7, 4)], 1)
        answer = torch.linalg.lstsq(torch.cat([*rows, torch.eye(4)]), target.T).solution.T
        expected = answer * quantizer.std + quantizer.mean
        # Both measure the noise on samples, 1024 and 20000 of them: they agree to a few percent.
        torch.testing.assert_close(quantizer.decode(codes[:, :k])[0], expected, atol=0.15, rtol=0.05)


def test_more_codebooks_decode_better():
    torch.manual_seed(0)
    quantizer = RandomProjectionQuantizer(8, 64, num_codebooks=8, codebook_dim=2)
    z = torch.randn(4, 100, 8)
    quantizer(z)
    errors = [float((quantizer.decode(quantizer.encode(z, k)) - z).square().mean()) for k in range(1, 9)]
    assert errors[0] < 0.9 and errors[3] < 0.7 * errors[0] and errors[7] < 0.7 * errors[3]
    assert all(b < 1.02 * a for a, b in itertools.pairwise(errors))  # also where k d passes D = 8


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"codebook_dim in 1\.\.dim, got 8192, 1 and 16 with dim 8"):
        RandomProjectionQuantizer(8)
    with pytest.raises(ValueError, match="normalize: expected one of running, given"):
        RandomProjectionQuantizer(8, codebook_dim=2, normalize="batch")
    with pytest.raises(ValueError, match='expected "given" to set statistics'):
        RandomProjectionQuantizer(8, codebook_dim=2).set_statistics([0.0] * 8, [1.0] * 8)
    quantizer = RandomProjectionQuantizer(2, codebook_dim=2, normalize="given")
    with pytest.raises(ValueError, match=r"mean and std of shape \(2,\), got \(3,\)"):
        quantizer.set_statistics([0.0] * 3, [1.0] * 3)
    with pytest.raises(ValueError, match="std > 0"):
        quantizer.set_statistics([0.0] * 2, [1.0, 0.0])
