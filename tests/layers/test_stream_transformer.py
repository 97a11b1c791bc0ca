"""The windowed causal transformer: its equation, its reach, and pieces of a stream equal to the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmtok.layers.conv1d import Past
from mmtok.layers.stream_transformer import MIN_BLOCK, StreamTransformer, WindowAttention, window_attention

DIM, CONTEXT = 8, 5


def transformer(depth: int = 2, context: int = CONTEXT) -> StreamTransformer:
    torch.manual_seed(0)
    model = StreamTransformer(DIM, depth, 2, 16, context, layer_scale=0.7).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(3.0 if "qkv" in name else 1.0)  # attention that tells positions apart
    return model.eval()


def pushed(model: StreamTransformer, x: Tensor, sizes: list[int]) -> tuple[Tensor, Past]:
    past, start, parts = Past(), 0, []
    for size in sizes:
        parts.append(model(x[:, start : start + size], past))
        start += size
    assert start == x.shape[1]
    return torch.cat(parts, 1), past


@pytest.mark.parametrize(
    ("T", "before", "context"),
    [(4, 0, 5), (5, 0, 5), (6, 0, 5), (9, 4, 5), (1, 3, 5), (3, 2, 1), (2 * MIN_BLOCK + 7, 3, 5), (100, 0, 80)],
)
def test_each_position_sees_itself_and_the_window_before_it(T: int, before: int, context: int):
    torch.manual_seed(T)
    q = torch.randn(2, 3, T, 4).double()
    k, v = torch.randn(2, 2, 3, before + T, 4).double()
    y = window_attention(q, k, v, context)
    assert y.shape == q.shape
    for t in range(T):
        last = before + t
        seen = slice(max(0, last - context + 1), last + 1)
        weights = (q[:, :, t, None] @ k[:, :, seen].transpose(-1, -2) / 2).softmax(-1)  # sqrt(4) = 2
        assert torch.allclose(y[:, :, t], (weights @ v[:, :, seen])[:, :, 0], atol=1e-12)


@torch.no_grad()
def test_pieces_equal_the_whole_beyond_the_context():
    model, x = transformer(), torch.randn(3, 40, DIM).double()
    whole = model(x)
    for sizes in ([1] * 40, [40], [3, 1, 20, 2, 14], [39, 1], [4, 4, 4, 28], [7] * 5 + [5]):
        assert torch.allclose(pushed(model, x, sizes)[0], whole, atol=1e-12)
    assert not torch.allclose(transformer(context=CONTEXT + 1)(x), whole, atol=1e-3)  # the window does something


@torch.no_grad()
def test_the_state_is_bounded_by_the_context():
    model = transformer()
    for T in (CONTEXT - 1, 50, 300):
        past = pushed(model, torch.zeros(2, T, DIM).double(), [1] * T)[1]
        kept = [t for layer, t in past.kept.items() if isinstance(layer, WindowAttention)]
        assert int(past.kept[model]) == T and len(past.kept) == 3 and len(kept) == 2
        assert all(t.shape == (2, 2, 2, CONTEXT - 1, DIM // 2) for t in kept)
        # no longer tensor is kept alive behind a view
        assert all(t.untyped_storage().nbytes() == 8 * t.numel() for t in kept)


@torch.no_grad()
def test_a_stream_of_days_still_turns_rightly():
    """Rotary products depend on differences alone, so a late start must change nothing, in fp32 too."""
    model, x = transformer().float(), torch.randn(1, 20, DIM)
    late = Past()
    late.kept[model] = torch.tensor(25 * 3600 * 24 * 7)
    assert torch.allclose(model(x, late), model(x), atol=2e-5)


@pytest.mark.parametrize("depth", [1, 3])
def test_the_reach_is_what_the_docstring_says(depth: int):
    model, x = transformer(depth), torch.randn(1, 30, DIM).double().requires_grad_()
    model(x)[0, 20].sum().backward()
    assert x.grad is not None
    seen = x.grad[0].abs().sum(1).nonzero()[:, 0]
    assert int(seen.max()) == 20 and int(seen.min()) == 20 - depth * (CONTEXT - 1)


def test_a_scale_of_zero_is_the_identity_and_every_weight_learns():
    x = torch.randn(2, 12, DIM)
    assert torch.equal(StreamTransformer(DIM, 2, 2, 16, CONTEXT, layer_scale=0.0)(x), x)
    model = transformer().float()
    model(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match=r"dim: expected a multiple of 2 \* num_heads = 6, got 8"):
        StreamTransformer(8, 1, 3, 16, 5)
    with pytest.raises(ValueError, match=r"context: expected at least 1 position, got 0"):
        StreamTransformer(8, 1, 2, 16, 0)
