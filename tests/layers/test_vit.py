"""Vision transformer parts: against timm's block, masks as if the masked were not there, positions on other grids."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmtok.layers.vit import TextTokens, ViT, ViTBlock, grid_embedding, key_mask_with_text

D, T = 12, 7


def block(causal: bool = False, eps: float = 1e-6, qkv_bias: bool = True) -> ViTBlock:
    torch.manual_seed(0)
    made = ViTBlock(D, 3, 2.0, eps, qkv_bias, causal)
    for p in made.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    return made


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("grad", [True, False])  # the plain product and the fused kernel
def test_a_block_is_timms(qkv_bias: bool, grad: bool):
    from timm.models.vision_transformer import Block

    ours = block(qkv_bias=qkv_bias, eps=1e-3)
    theirs = Block(D, 3, 2.0, qkv_bias=qkv_bias)
    theirs.norm1.eps = theirs.norm2.eps = 1e-3
    theirs.load_state_dict(ours.state_dict())
    x = noise(2, T, D) * 0.05  # eps shows
    with torch.set_grad_enabled(grad):
        assert torch.allclose(ours(x), theirs(x), atol=1e-6)


@pytest.mark.parametrize("grad", [True, False])
def test_masked_keys_are_as_if_they_were_not_there(grad: bool):
    made, x = block(), noise(2, T, D)
    mask = torch.tensor([[True] * 5 + [False] * 2, [True] * 7])
    with torch.set_grad_enabled(grad):
        y = made(x, mask)
        assert torch.allclose(y[:1, :5], made(x[:1, :5]), atol=1e-6)
        assert torch.allclose(y[1:], made(x[1:]), atol=1e-6)
        other = x.clone()
        other[0, 5:] += 100
        assert torch.equal(made(other, mask)[0, :5], y[0, :5])
        assert not torch.allclose(made(other)[0, :5], y[0, :5], atol=1e-2)


@pytest.mark.parametrize("grad", [True, False])
def test_a_causal_block_never_looks_ahead(grad: bool):
    made, x = block(causal=True), noise(1, T, D)
    with torch.set_grad_enabled(grad):
        y = made(x)
        for t in range(1, T):
            other = x.clone()
            other[:, t:] += 1
            changed = made(other)
            assert torch.equal(changed[:, :t], y[:, :t]) and not torch.allclose(changed[:, t], y[:, t], atol=1e-3)
        assert torch.allclose(made(x[:, :4]), y[:, :4], atol=1e-6)
        mask = torch.arange(T)[None] < 6
        assert torch.allclose(made(x, mask)[:, :6], y[:, :6], atol=1e-6)
        assert not torch.allclose(made(x, mask)[:, 6], y[:, 6], atol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_keep_gives_those_positions_in_value_and_gradient(causal: bool, masked: bool):
    torch.manual_seed(1)
    vit = ViT(D, 2, 3, 2.0)
    for b in vit.blocks:
        assert isinstance(b, ViTBlock)
        b.attn.causal = causal
    mask = (torch.arange(T)[None] < 6).expand(2, -1) if masked else None
    keep, weight = slice(2, 5), noise(2, 3, D)
    found = []
    for some in (keep, None):
        x = noise(2, T, D).requires_grad_()
        vit.zero_grad()
        y = vit(x, mask, some)
        y = y if some is not None else y[:, keep]
        (y * weight).sum().backward()
        assert x.grad is not None
        found.append([y.detach(), x.grad, *(p.grad.clone() for p in vit.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) == 2 + len(list(vit.parameters()))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    with torch.no_grad():
        x = noise(2, T, D)
        assert torch.allclose(vit(x, mask, keep), vit(x, mask)[:, keep], atol=1e-6)


def test_a_width_that_the_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="expected a multiple of num_heads 5, got 12"):
        ViTBlock(12, 5)


def test_positions_on_their_own_grid_are_the_table_itself():
    table = noise(6, D)
    assert grid_embedding(table, (2, 3), 2, 3) is table
    with pytest.raises(ValueError, match="expected 2 x 2 rows, got 6"):
        grid_embedding(table, (2, 2), 4, 4)


@pytest.mark.parametrize("size", [(8, 12), (7, 5), (2, 3), (1, 1), (4, 24)])
def test_positions_on_another_grid_span_the_same_picture(size: tuple[int, int]):
    """A ramp over the rows stays a ramp over the rows, between the same ends, and nothing leaks into the columns."""
    rows = torch.arange(4.0)[:, None].expand(4, 6)
    columns = torch.arange(6.0)[None].expand(4, 6)
    table = torch.stack([rows.flatten(), columns.flatten(), torch.ones(24)], 1)
    found = grid_embedding(table, (4, 6), *size).view(*size, 3)
    assert torch.allclose(found[..., 0].std(1, correction=0), torch.zeros(size[0]), atol=1e-5)
    assert torch.allclose(found[..., 1].std(0, correction=0), torch.zeros(size[1]), atol=1e-5)
    assert torch.allclose(found[..., 2], torch.ones(size), atol=1e-5)
    for k, (n, old) in enumerate(zip(size, (4, 6), strict=True)):
        ramp = found[:, 0, 0] if k == 0 else found[0, :, 1]
        assert bool((ramp.diff() > 0).all()) and float(ramp.min()) > -0.3 and float(ramp.max()) < old - 1 + 0.3
        centre = (old - 1) / 2
        assert torch.allclose(ramp.flip(0) - centre, centre - ramp, atol=1e-4) and len(ramp) == n


def test_text_tokens_and_their_null():
    torch.manual_seed(0)
    place = TextTokens(5, D, 4)
    states, mask = noise(3, 4, 5), torch.tensor([[True, True, False, False], [True] * 4, [False] * 4])
    tokens, seen = place(3, states, mask)
    assert seen is not None and torch.equal(seen[:2], mask[:2])
    want = place.proj(states[0, :2]) + place.positions[:2]
    assert torch.allclose(tokens[0, :2], want)
    assert torch.equal(tokens[2, 0], place.null) and seen[2].tolist() == [True, False, False, False]
    dropped, only = place(3, states, mask, torch.tensor([True, False, True]))
    assert (
        only is not None and torch.equal(dropped[0, 0], place.null) and only[0].tolist() == [True, False, False, False]
    )
    assert torch.equal(dropped[1], tokens[1]) and torch.equal(only[1], mask[1])
    none, all_of_them = place(3, None)
    assert torch.equal(none, place.null.expand(3, 1, D)) and all_of_them is None
    assert torch.equal(place(3, noise(3, 0, 5))[0], none)
    whole, everything = place(3, states)
    assert everything is not None and bool(everything.all()) and torch.allclose(whole[1], tokens[1])


def test_what_stands_at_padding_has_no_influence_not_even_nan():
    place = TextTokens(5, D, 4)
    states, mask = noise(1, 4, 5), torch.tensor([[True, True, False, False]])
    other = states.clone()
    other[0, 2:] = torch.nan
    assert torch.equal(place(1, states, mask)[0], place(1, other, mask)[0])


@pytest.mark.parametrize("shape", [(2, 5, 5), (2, 4, 6), (1, 4, 5)])
def test_features_of_another_shape_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"expected features of shape \(2, 1..4, 5\), got"):
        TextTokens(5, D, 4)(2, torch.zeros(shape))


def test_the_key_mask_leaves_what_is_not_text_alone():
    mask = key_mask_with_text(3, torch.tensor([[True, False]]))
    assert mask is not None and mask.tolist() == [[True, True, True, True, False]]
    assert key_mask_with_text(3, None) is None
