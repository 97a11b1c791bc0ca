from __future__ import annotations

import itertools

import pytest
import torch

from mmtok.quantizers import ProductQuantizer
from mmtok.quantizers.frozen import Moments, RowSample


def rows(n: int = 2000, dim: int = 4, seed: int = 0) -> torch.Tensor:
    """Correlated vectors far from 0."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=g) @ torch.randn(dim, dim, generator=torch.Generator().manual_seed(9)) + 5


def test_fit_finds_separate_clusters_exactly():
    g = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0, 0], [9, 0, 0], [0, 9, 0], [0, 0, 9]])
    labels = torch.randint(0, 4, (400,), generator=g)
    data = centres[labels] + 0.1 * torch.randn(400, 3, generator=g)
    torch.manual_seed(3)
    quantizer = ProductQuantizer(3, 4)
    errors = quantizer.fit(data.split(90), passes=3, progress=False)
    assert len(errors) == 3 and errors[-1] < 0.02
    codes = quantizer.encode(data[None])[0, 0]
    assert quantizer.codebooks.shape == (1, 4, 3)
    for k in range(4):
        assert len(labels[codes == k].unique()) == 1
        torch.testing.assert_close(quantizer.codebooks[0, k], data[codes == k].mean(0))  # Lloyd's fixed point


def test_every_pass_is_a_step_of_lloyd_over_all_rows():
    """The error cannot rise, batches of any cut give the same steps, and fit beats the start from one batch."""
    data, results = rows(3000), []
    for cut in (3000, 700):
        torch.manual_seed(1)
        quantizer = ProductQuantizer(4, 16, num_codebooks=2)
        quantizer.fit([data[:1]], passes=1, progress=False)  # an earlier fit leaves nothing behind
        torch.manual_seed(1)
        errors = quantizer.fit(data.split(cut), passes=6, progress=False)
        assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(errors))
        results.append(errors[-1])
        z_q = quantizer.decode(quantizer.encode(data[None]))[0]
        assert float((z_q - data).square().mean()) <= errors[-1] * (1 + 1e-6)
    assert results[0] == pytest.approx(results[1], rel=0.1)
    torch.manual_seed(1)
    started = ProductQuantizer(4, 16, num_codebooks=2)
    started(data[None, :100])
    assert float((started.decode(started.encode(data[None])) - data).square().mean()) > results[0]


@pytest.mark.parametrize("normalize", ["none", "length", "whiten"])
def test_a_missing_group_contributes_its_mean(normalize):
    torch.manual_seed(0)
    data = rows()
    quantizer = ProductQuantizer(4, 8, num_codebooks=2, normalize=normalize)
    quantizer.fit([data], passes=4, progress=False)
    codes = quantizer.encode(data[None])
    full, prefix = quantizer.decode(codes)[0], quantizer.decode(codes[:, :1])[0]
    error, coarse = ((x - data).square().sum(1).mean() for x in (full, prefix))
    spread = (data - data.mean(0)).square().sum(1).mean()
    assert float(error) < 0.75 * float(coarse) if normalize != "length" else True
    assert float(coarse) < float(spread) * (1.5 if normalize == "length" else 1.0)
    if normalize == "none":
        torch.testing.assert_close(prefix[:, :2], full[:, :2])
        torch.testing.assert_close(prefix[:, 2:], data[:, 2:].mean(0).expand(2000, 2), atol=0.05, rtol=0.02)


def test_length_keeps_directions():
    torch.manual_seed(0)
    data = rows()
    quantizer = ProductQuantizer(4, 16, normalize="length")
    quantizer.fit([data], passes=3, progress=False)
    assert torch.equal(quantizer.encode(data[None]), quantizer.encode(7 * data[None]))
    torch.testing.assert_close(quantizer.length, data.norm(dim=1).mean())
    torch.testing.assert_close(
        quantizer.decode(torch.zeros(1, 1, 1, dtype=torch.int64))[0, 0], quantizer.codebooks[0, 0] * quantizer.length
    )


def test_whitening_has_unit_covariance_and_is_undone():
    data = rows(5000)
    moments = Moments(4, data.device, covariance=True)
    for part in data.split(999):
        moments.add(part)
    mean, whitener, colourer = moments.whitening()
    white = (data.double() - mean) @ whitener
    torch.testing.assert_close(white.T @ white / 5000, torch.eye(4, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(white @ colourer + mean, data.double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(whitener, whitener.T)


def test_whitening_leaves_a_constant_dimension_alone():
    torch.manual_seed(0)
    data = rows()
    data[:, 2] = 3.0
    quantizer = ProductQuantizer(4, 8, normalize="whiten")
    quantizer.fit([data], passes=2, progress=False)
    z_q = quantizer.decode(quantizer.encode(data[None]))
    torch.testing.assert_close(z_q[0, :, 2], torch.full((2000,), 3.0), atol=0.05, rtol=0)


def test_unfitted_use_is_an_error_until_a_training_batch():
    quantizer = ProductQuantizer(4, 4).eval()
    z = torch.randn(2, 20, 4)
    with pytest.raises(ValueError, match=r"expected fitted codes, got random ones; call fit\(batches\)"):
        quantizer.encode(z)
    with pytest.raises(ValueError, match="expected fitted codes"):
        quantizer(z)
    quantizer.train()(z, torch.zeros(2, 20, dtype=torch.bool))
    with pytest.raises(ValueError, match="expected fitted codes"):
        quantizer.encode(z)
    fresh = {key: value.clone() for key, value in quantizer.state_dict().items()}
    quantizer(z)
    books = quantizer.codebooks.clone()
    quantizer(z + 3)
    assert torch.equal(quantizer.codebooks, books)  # frozen from then on
    quantizer.eval().encode(z)
    quantizer.load_state_dict(fresh)
    with pytest.raises(ValueError, match="expected fitted codes"):
        quantizer.encode(z)


def test_more_codes_than_rows():
    torch.manual_seed(0)
    data = rows(5)
    quantizer = ProductQuantizer(4, 12)
    quantizer.fit([data], passes=2, progress=False)
    torch.testing.assert_close(quantizer.decode(quantizer.encode(data[None]))[0], data, atol=0.05, rtol=0)


def test_the_sample_is_uniform_and_small():
    torch.manual_seed(0)
    counts = torch.zeros(40)
    for _ in range(300):
        sample = RowSample(8, 1, torch.device("cpu"))
        for part in torch.arange(40.0)[:, None].split(7):
            sample.add(part)
            assert len(sample.rows) <= 8
        assert len(sample.rows.unique()) == 8
        counts[sample.rows[:, 0].long()] += 1
    assert float(counts.min()) > 30 and float(counts.max()) < 95  # 60 expected, deviation about 7


def test_bad_input_to_fit_is_named():
    quantizer = ProductQuantizer(4, 4)
    with pytest.raises(ValueError, match="got an iterator; pass a list or a DataLoader"):
        quantizer.fit(iter([rows()]))
    with pytest.raises(ValueError, match=r"shape \(N, 4\), got torch.float32 of shape \(2, 5, 4\); flatten"):
        quantizer.fit([torch.randn(2, 5, 4)], progress=False)
    with pytest.raises(ValueError, match="batches: expected finite values, got 1 NaN"):
        quantizer.fit([rows(), torch.tensor([[0.0, 0.0, 0.0, float("nan")]])], progress=False)
    with pytest.raises(ValueError, match="at least one row, got none"):
        quantizer.fit([], progress=False)
    with pytest.raises(ValueError, match="passes: expected at least 1"):
        quantizer.fit([rows()], passes=0)
    with pytest.raises(ValueError, match="expected a divisor of dim 4, got 3"):
        ProductQuantizer(4, 4, num_codebooks=3)
    with pytest.raises(ValueError, match="normalize: expected one of none, length, whiten"):
        ProductQuantizer(4, 4, normalize="l2")
    with pytest.raises(ValueError, match="codebook_size: expected at least 2"):
        ProductQuantizer(4, 1)


def test_a_bar_is_shown_unless_refused(capfd):
    quantizer = ProductQuantizer(4, 4)
    quantizer.fit([rows(50)], passes=1, progress=False)
    assert capfd.readouterr().err == ""
    quantizer.fit([rows(50)], passes=2)
    assert "k-means" in (err := capfd.readouterr().err) and "3/3" in err
