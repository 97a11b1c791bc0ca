"""Nested dropout keeps prefixes, and only prefixes, of the lengths that its kind names."""

from __future__ import annotations

import pytest
import torch

from mmtok.image.binary1d import Binary1D
from mmtok.layers.tail_drop import tail_mask


@pytest.mark.parametrize(("kind", "lengths"), [("uniform", set(range(1, 13))), ("powers", {1, 2, 4, 8, 12})])
def test_every_prefix_of_the_kind_occurs_and_no_other(kind: str, lengths: set[int]):
    torch.manual_seed(0)
    mask = tail_mask(kind, 2000, 12)
    assert mask is not None and mask.dtype == torch.bool and mask.shape == (2000, 12)
    kept = mask.sum(1)
    assert torch.equal(mask, torch.arange(12) < kept[:, None])
    assert set(kept.tolist()) == lengths
    assert torch.bincount(kept).max() < 1.5 * 2000 / len(lengths)


def test_none_is_no_mask_and_other_names_are_refused():
    assert tail_mask("none", 2, 3) is None
    with pytest.raises(ValueError, match=r"tail_drop: expected one of .*got 'half'"):
        tail_mask("half", 2, 3)


def test_it_acts_in_training_only():
    torch.manual_seed(0)
    quantizer = {"bits_per_code": 8}
    tok = Binary1D(4, 8, 4, (16, 1, 0), (16, 1, 1), head_dim=16, axes_dims=(4, 6, 6), quantizer=quantizer)
    tok.tail_drop = "uniform"
    x = torch.rand(16, 3, 16, 16)
    silent = (tok.train()(x).quantized.z_q == 0).all(-1)  # (B, T)
    assert bool(silent[:, 1:].any()) and not bool(silent[:, 0].any())
    assert not bool((tok.eval()(x).quantized.z_q == 0).all(-1).any())
