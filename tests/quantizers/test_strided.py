from __future__ import annotations

import pytest
import torch

from mmtok.quantizers import ResidualVectorQuantizer, StridedResidualVectorQuantizer
from mmtok.quantizers.strided import group_mean, repeat_groups
from mmtok.tokens import Tokens, TokenSpec

D = 4


def trained(strides: tuple[int, ...] = (4, 2, 1), **options: object) -> StridedResidualVectorQuantizer:
    torch.manual_seed(0)
    config: dict = {"codebook_size": 16, "codebook_dim": None, "metric": "euclidean", "codebook": "ema"} | options
    quantizer = StridedResidualVectorQuantizer(D, strides, **config)
    for _ in range(3):
        quantizer(torch.randn(8, 40, D), num_codebooks=len(strides))
    return quantizer.eval()


@pytest.mark.parametrize("T", [1, 3, 4, 7, 12])
@pytest.mark.parametrize("stride", [1, 2, 4, 9])
def test_group_means_are_of_the_valid_positions(T, stride):
    torch.manual_seed(T)
    x, valid = torch.randn(3, T, D), torch.rand(3, T) < 0.6
    mean, some = group_mean(x, valid, stride)
    G = -(-T // stride)
    assert mean.shape == (3, G, D) and some.shape == (3, G)
    for b in range(3):
        for g in range(G):
            group = slice(g * stride, (g + 1) * stride)
            rows = x[b, group][valid[b, group]]
            assert bool(some[b, g]) == (len(rows) > 0)
            torch.testing.assert_close(mean[b, g], rows.mean(0) if len(rows) else torch.zeros(D))
    back = repeat_groups(mean, stride, T)
    assert torch.equal(back, mean[:, torch.arange(T) // stride])


def test_levels_follow_the_equation():
    quantizer = trained()
    z = torch.randn(2, 11, D)
    out = quantizer(z)
    residual, commitments = z, []
    for q, stride in enumerate((4, 2, 1)):
        terms = []
        left = residual.clone()
        for b in range(2):
            for start in range(0, 11, stride):
                mean = residual[b, start : start + stride].mean(0)
                distance = (quantizer.books[q].codebook - mean).square().sum(1)
                code = int(distance.argmin())
                assert out.codes[b, q, start : start + stride].tolist() == [code] * min(stride, 11 - start)
                left[b, start : start + stride] -= quantizer.books[q].codebook[code]
                terms.append(distance[code] / D)
        commitments.append(
            torch.stack(terms).mean()
        )  # a mean over groups: a code counts once, however often it repeats
        residual = left
    torch.testing.assert_close(out.z_q, z - residual)
    torch.testing.assert_close(out.stats["commitment_loss"], torch.stack(commitments).mean())


def test_strides_of_one_are_the_residual_quantizer():
    strided = trained((1, 1, 1))
    plain = ResidualVectorQuantizer(D, 3, 16).eval()
    plain.load_state_dict(strided.state_dict())
    z = torch.randn(2, 9, D)
    a, b = strided(z), plain(z)
    assert torch.equal(a.codes, b.codes) and torch.equal(a.z_q, b.z_q)
    assert torch.equal(strided.encode(z), plain.encode(z))
    torch.testing.assert_close(a.loss, b.loss)


def test_masks_with_holes_and_short_ends():
    """Whatever is masked, the codes of a group are those of its valid positions alone, and decode as forward says."""
    quantizer = trained()
    torch.manual_seed(1)
    z, mask = torch.randn(4, 13, D), torch.rand(4, 13) < 0.6
    mask[:, 0] = torch.tensor([True, False, False, True])
    out = quantizer(z, mask)
    torch.testing.assert_close(out.z_q[mask], quantizer.decode(out.codes)[mask])
    for b in range(4):
        mean, _ = group_mean(z[b : b + 1], mask[b : b + 1], 4)
        code = repeat_groups(quantizer.books[0].nearest(mean[0])[None], 4, 13)[0]
        assert torch.equal(out.codes[b, 0][mask[b]], code[mask[b]])
    ends = torch.tensor([13, 10, 5, 1])
    mask = torch.arange(13) < ends[:, None]
    out = quantizer(z, mask)
    for b, T in enumerate(ends.tolist()):
        assert torch.equal(out.codes[b, :, :T], quantizer.encode(z[b : b + 1, :T])[0])


def test_any_cut_of_the_codes_decodes_to_the_cut_of_the_whole():
    quantizer = trained()
    codes = quantizer.encode(torch.randn(2, 21, D))
    whole = quantizer.decode(codes)
    torch.testing.assert_close(quantizer.decode(codes[:, :, 3:14]), whole[:, 3:14])
    odd = codes.clone()
    odd[0, 0, 2] = (codes[0, 0, 2] + 1) % 16  # differs within its group: it counts where it stands
    changed = (quantizer.decode(odd) != whole).any(2)
    assert changed.nonzero().tolist() == [[0, 2]]


def test_statistics_count_a_repeated_code_once():
    quantizer = trained((4, 1), dead_code_threshold=0.0).train()
    z = torch.randn(3, 10, D)
    before = [quantizer.books[q].cluster_size.clone() for q in range(2)]
    out = quantizer(z)
    for q, positions in enumerate((3 * 3, 3 * 10)):
        added = quantizer.books[q].cluster_size - 0.99 * before[q]
        assert float(added.sum()) == pytest.approx(0.01 * positions, rel=1e-3)
    counts = torch.bincount(out.codes[:, 0, ::4].flatten(), minlength=16).float()
    entropy = torch.special.entr(counts / counts.sum()).sum()
    torch.testing.assert_close(out.stats["perplexity"][0], entropy.exp())


@pytest.mark.parametrize("codebook_dim", [None, 2])
def test_dropout_per_item(codebook_dim):
    quantizer = trained(codebook_dim=codebook_dim, quantizer_dropout=1.0)
    z = torch.randn(40, 6, D)
    codes = quantizer.encode(z)
    decoded = [quantizer.decode(codes[:, :k]) for k in (1, 2, 3)]
    torch.manual_seed(2)
    levels = quantizer.train()._draw_levels(z, None)
    torch.manual_seed(2)
    out = quantizer(z)
    assert sorted(levels.unique().tolist()) == [1, 2, 3]
    for b, n in enumerate(levels.tolist()):
        assert torch.equal(out.codes[b, :n], codes[b, :n]) and bool((out.codes[b, n:] == 0).all())
        torch.testing.assert_close(out.z_q[b], decoded[n - 1][b])


def test_the_strides_fit_the_token_spec():
    quantizer = trained()
    spec = TokenSpec("x", "audio", quantizer.codebook_sizes, quantizer.level_strides, frame_rate=40.0)
    assert spec.level_strides == (4, 2, 1)
    assert spec.bitrate_bps == pytest.approx(40 * 4 * (1 / 4 + 1 / 2 + 1))
    tokens = Tokens(quantizer.encode(torch.randn(1, 9, D)), torch.tensor([9]), spec)
    tokens.check(spec)


def test_defaults_are_those_of_snac():
    config = StridedResidualVectorQuantizer(32).config()
    assert config["level_strides"] == [4, 2, 1] and config["codebook_dim"] == 8 and config["metric"] == "cosine"
    assert config["codebook"] == "gradient" and config["codebook_size"] == 4096


@pytest.mark.parametrize("strides", [(), (2, 0)])
def test_constructor_names_what_is_wrong(strides):
    with pytest.raises(ValueError, match=r"level_strides: expected at least one stride, each >= 1, got \("):
        StridedResidualVectorQuantizer(D, strides)
