"""LaVIT's selector, merger and tokenizer: masked softmaxes, kept rows against the full-length run, ragged lengths."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmtok.image.dynamic import PUBLISHED, Dynamic
from mmtok.layers.token_merger import (
    FuserBlock,
    Policy,
    TokenMerger,
    TokenPredictor,
    hard_keep,
    kept_order,
    key_bias,
    policy_softmax,
)

VISION = {
    "type": "timm",
    "name": "vit_tiny_patch16_224",
    "image_size": 32,
    "depth": 1,
    "arguments": {"patch_size": 8, "embed_dim": 24, "num_heads": 2},
}  # 4 x 4 patches of width 24
PIXELS = {"image_size": 16, "patch_size": 8, "width": 16, "depth": 1, "num_heads": 2}
N = 16
KEEP = torch.tensor([[0, 1, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0], [1] + [0] * 15, [1] * 16]).bool()


def tiny(seed: int = 0, spread: bool = True, **changes: object) -> Dynamic:
    """A tokenizer whose selector is spread around one half, so that lengths differ."""
    torch.manual_seed(seed)
    base: dict = {"vision": VISION, "merger": (16, 2, 2), "decoder": (16, 2, 2), "code_dim": 4, "pixels": PIXELS}
    tok = Dynamic(**{**base, "quantizer": {"type": "vq", "codebook_size": 12}, **changes})
    if spread and tok.predictor is not None:
        last: Any = tok.predictor.last[-1]
        with torch.no_grad():
            odds = tok.predictor(tok.vision(pictures(8, seed=7))) @ torch.tensor([1.0, -1.0])
            last.weight.mul_(1.5 / odds.std())
            last.bias[0] -= odds.mean() * 1.5 / odds.std()
    return tok


def pictures(count: int = 4, size: tuple[int, int] = (16, 16), seed: int = 1) -> Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def merger(eps: float = 0.0, cross: bool = True) -> TokenMerger:
    torch.manual_seed(3)
    module = TokenMerger(24, 3, 2, 2.0, eps, cross)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return module


def test_the_selector_is_its_equation_in_float32_under_autocast():
    torch.manual_seed(0)
    module, x = TokenPredictor(8), torch.randn(2, 5, 8)
    w = {k: v.detach() for k, v in module.named_parameters()}

    def linear(h: Tensor, name: str) -> Tensor:
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    h = F.gelu(linear(normed, "first.1"))
    h = torch.cat([h[..., :4], h[..., 4:].mean(1, keepdim=True).expand(2, 5, 4)], -1)
    for name in ("last.0", "last.2"):
        h = F.gelu(linear(h, name))
    expected = linear(h, "last.4").log_softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        found = module(x)
    assert found.dtype == torch.float32 and torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(found.exp().sum(-1), torch.ones(2, 5))


def test_the_released_softmax_is_its_equation():
    torch.manual_seed(0)
    scores, weight = torch.randn(1, 2, 3, 4) * 3, torch.tensor([1.0, 0, 1, 0]).view(1, 1, 1, 4)
    found = policy_softmax(scores, Policy(weight, torch.ones(1, 1, 1, 4).bool(), 1e-2, 9))
    for h in range(2):
        for r in range(3):
            top = float(scores[0, h, r].max())
            e = [math.exp(float(s) - top) * float(w) for s, w in zip(scores[0, h, r], weight.flatten(), strict=True)]
            expected = torch.tensor([(v + 1e-2 / 9) / (sum(e) + 1e-2) for v in e])
            assert torch.allclose(found[0, h, r], expected, atol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 500.0])
def test_without_eps_it_is_a_masked_softmax_and_nothing_read_gives_nothing(offset: float):
    scores = torch.randn(2, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    weight = torch.tensor([[1.0, 0, 1, 1, 0], [0, 0, 0, 0, 0]]).view(2, 1, 1, 5)
    shifted = scores + offset * (weight == 0)  # a masked key however strong
    found = policy_softmax(shifted, Policy(weight, torch.ones(2, 1, 1, 5).bool()))
    assert torch.allclose(found[0], scores.masked_fill(weight == 0, -torch.inf).softmax(-1)[0], atol=1e-6)
    assert not found[1].any()


def test_weights_have_the_gradient_of_reading_a_key_a_little_more():
    """The form with weights and the cheap one agree for weights of 1; and for weights of 0 with finite differences."""
    torch.manual_seed(0)
    scores, values = torch.randn(1, 1, 3, 5, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    exists = torch.ones(1, 1, 1, 5).bool()
    w = torch.tensor([1.0, 1, 0, 1, 0], dtype=torch.float64, requires_grad=True)
    (policy_softmax(scores, Policy(w.view(1, 1, 1, 5), exists)) @ values).square().sum().backward()
    assert w.grad is not None
    cheap = w.detach().clone().requires_grad_()
    ((scores + key_bias(cheap.view(1, 1, 1, 5))).softmax(-1) @ values).square().sum().backward()
    assert cheap.grad is not None and torch.allclose(cheap.grad[[0, 1, 3]], w.grad[[0, 1, 3]], atol=1e-5)
    assert not cheap.grad[[2, 4]].any()

    def loss(weights: Tensor) -> float:
        e = (scores - scores.masked_fill(w == 0, -torch.inf).amax(-1, keepdim=True)).clamp(max=0).exp() * weights
        return float((e / e.sum(-1, keepdim=True) @ values).square().sum())

    for i in range(5):
        step = torch.zeros(5, dtype=torch.float64)
        step[i] = 1e-6
        slope = (loss(w.detach() + step) - loss(w.detach())) / 1e-6
        assert abs(slope - float(w.grad[i])) < 1e-3


@pytest.mark.parametrize(("eps", "tolerance"), [(0.0, 2e-6), (1e-6, 2e-5)])
def test_kept_rows_alone_equal_the_full_length_run(eps: float, tolerance: float):
    module, x = merger(eps), torch.randn(3, N, 24)
    kept, present = module(x, KEEP)
    full, also = module(x, KEEP, full_length=True)
    assert kept.shape == (3, N, 24) and torch.equal(present, also)
    assert present.sum(1).tolist() == [6, 1, 16]
    assert float((kept - full).detach()[present > 0].abs().max()) < tolerance
    assert float(kept.detach().std()) > 0.5


def test_the_merger_is_the_textbook_stack():
    """One picture, its blocks written out with torch's own masked attention."""
    module, x, keep = merger(), torch.randn(1, N, 24), KEEP[:1]
    order = keep[0].nonzero().flatten()
    context, h = module.context_norm(x)[:, ~keep[0]], x[:, order]  # type: ignore[misc]
    for block in module.blocks:
        assert isinstance(block, FuserBlock) and block.cross_attn is not None and block.norm1 is not None
        heads = lambda t: t.unflatten(2, (3, 8)).transpose(1, 2)  # noqa: E731
        q, k, v = map(heads, block.self_attn.qkv(block.norm0(h)).chunk(3, -1))  # type: ignore[misc]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + block.self_attn.proj(y.transpose(1, 2).flatten(2))
        q = heads(block.cross_attn.query(block.norm1(h)))  # type: ignore[misc]
        k, v = map(heads, block.cross_attn.key_value(context).chunk(2, -1))  # type: ignore[misc]
        h = h + block.cross_attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = h + block.mlp(block.norm2(h))
    assert torch.allclose(module(x, keep)[0], module.norm(h), atol=1e-5)


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_padding_changes_nothing(eps: float):
    module, x = merger(eps), torch.randn(3, N, 24)
    together, present = module(x, KEEP)
    for i in range(3):
        alone, one = module(x[i : i + 1], KEEP[i : i + 1])
        R = int(one.sum())
        assert alone.shape[1] == R and torch.allclose(together[i, :R], alone[0], atol=2e-6)
        assert not present[i, R:].any()


def test_kept_patches_read_earlier_kept_ones_and_all_dropped_ones_only():
    module, x = merger(), torch.randn(1, N, 24)
    kept = KEEP[0].nonzero().flatten().tolist()  # 1 2 5 9 12 13
    base = module(x, KEEP[:1])[0]

    def rows_moved_by(patch: int) -> list[bool]:
        moved = x.clone()
        moved[0, patch] = torch.linspace(-1, 2, 24)
        return ((module(moved, KEEP[:1])[0] - base).abs().amax(-1)[0] > 1e-5).tolist()

    assert rows_moved_by(kept[3]) == [False, False, False, True, True, True]
    assert rows_moved_by(15) == [True] * 6  # dropped, and later than all of them


def test_order_of_kept_patches_and_an_item_without_any():
    order, present = kept_order(KEEP)
    assert order[0, :6].tolist() == [1, 2, 5, 9, 12, 13] and present[0].tolist() == [1.0] * 6 + [0.0] * 10
    with pytest.raises(ValueError, match="got none at item 1"):
        kept_order(torch.tensor([[True, False], [False, False]]))


def test_the_draw_has_the_predicted_probability_and_a_gradient():
    log_probs = torch.tensor([0.2, 0.8]).log().view(1, 1, 2).expand(1, 20000, 2).clone().requires_grad_()
    keep = hard_keep(log_probs, 1.0, torch.rand(1, 20000, 2, generator=torch.Generator().manual_seed(0)))
    assert set(keep.unique().tolist()) == {0.0, 1.0} and abs(float(keep.detach().mean()) - 0.2) < 0.01
    keep.sum().backward()
    assert log_probs.grad is not None and bool((log_probs.grad[..., 0] > 0).all())
    assert torch.allclose(log_probs.grad.sum(-1), torch.zeros(1, 20000), atol=1e-6)


@torch.no_grad()
def test_methods_of_selection():
    tok = tiny().eval()
    features = tok.vision(pictures(6))
    assert tok.predictor is not None
    p = tok.predictor(features)[..., 0].exp()
    assert float(p.min()) < 0.4 and float(p.max()) > 0.6
    assert torch.equal(tok.select(features, "threshold") > 0, p > 0.5)
    expected = tok.select(features)
    assert expected.sum(1).tolist() == p.sum(1).round().tolist()
    for row, kept in zip(p, expected > 0, strict=True):
        assert float(row[kept].min()) >= float(row[~kept].max())
    draws = [tok.select(features, "gumbel", torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    with pytest.raises(ValueError, match=r"method: expected one of .* got 'top'"):
        tok.select(features, "top")


def test_one_patch_at_least_is_kept_the_likeliest():
    tok = tiny()
    assert tok.predictor is not None
    with torch.no_grad():
        tok.predictor.last[-1].bias.copy_(torch.tensor([-30.0, 30.0]))  # type: ignore[union-attr]
    x = pictures(3)
    best = tok.predictor(tok.vision(x))[..., 0].argmax(1)
    for method in ("expected", "threshold", "gumbel"):
        keep = tok.select(tok.vision(x), method)
        assert keep.sum(1).tolist() == [1.0] * 3 and torch.equal(keep.argmax(1), best)
    assert tok.encode(x).lengths.tolist() == [1, 1, 1]
    assert math.isfinite(float(tok.train()(x).aux["feature_loss"].detach()))


@pytest.mark.parametrize("method", ["expected", "threshold", "gumbel"])
def test_lengths_differ_and_a_batch_equals_singles(method: str):
    tok = tiny(selection={"method": method, "seed": 4})
    tok.train()(pictures(8))  # the codebook's start
    x = pictures(5, (24, 40))
    tokens = tok.encode(x)
    assert len(set(tokens.lengths.tolist())) > 1
    again = tok.encode(x)
    assert torch.equal(tokens.codes, again.codes) and torch.equal(tokens.lengths, again.lengths)
    whole = tok.decode(tokens)
    for i in range(5):
        single = tok.encode(x[i])
        assert torch.equal(single.codes[0], tokens[i].codes[0]) and int(single.lengths[0]) == int(tokens.lengths[i])
        assert torch.allclose(tok.decode(single)[0], whole[i], atol=1e-5)
        for k in range(1, int(tokens.lengths[i]) + 1):
            cut = tokens[i].keep(num_tokens=k)
            assert tok.decode(cut)[0].shape == (3, 24, 40)
            assert torch.equal(tok.encode(x[i], num_tokens=k).codes, cut.codes)


def test_the_square_gives_back_every_size():
    tok = tiny().eval()
    for size in ((1, 1), (9, 50), (64, 5)):
        y = tok.decode(tok.encode(pictures(1, size)[0]))
        assert isinstance(y, Tensor) and y.shape == (1, 3, *size)
        assert tok(pictures(2, size)).x_hat.shape == (2, 3, *size)
    assert tok.encode_size(9, 50) == (32, 32) and tok.working_size(9, 50) == (16, 16)


def test_losses_are_their_equations():
    tok = tiny().eval()
    x = pictures(3)
    out = tok(x)
    features = tok.vision(x)
    share = (tok.select(features) > 0).float().mean(1)
    restored = tok.reconstruct_features(tok.encode(x).codes, tok.encode(x).lengths)
    assert torch.allclose(out.aux["features"], restored, atol=1e-5)
    cos = (features * restored).sum(-1) / features.norm(dim=-1) / restored.norm(dim=-1)
    assert float(out.aux["feature_loss"].detach()) == pytest.approx(float((1 - cos).mean().detach()), abs=1e-5)
    assert float(out.aux["ratio_loss"].detach()) == pytest.approx(float((1 / 3 - share).square().mean()), abs=1e-6)
    assert float(out.aux["mean_tokens"]) == pytest.approx(float(share.mean() * N), abs=1e-4)


def test_given_features_take_the_place_of_the_encoder():
    tok = tiny().eval()
    x = pictures(2)
    features = tok.vision(x)
    hidden = tok.vision.forward
    tok.vision.forward = lambda x: pytest.fail("the encoder ran")  # type: ignore[method-assign]
    given = tok(x, features=features)
    tok.vision.forward = hidden  # type: ignore[method-assign]
    assert torch.equal(given.x_hat, tok(x).x_hat)
    with pytest.raises(ValueError, match=r"features: expected \(B, 16, 24\) of this encoder, got \(2, 15, 24\)"):
        tok(x, features=features[:, 1:])


@pytest.mark.parametrize("quantize", [True, False])
def test_every_trainable_part_has_a_gradient(quantize: bool):
    tok = tiny(policy_eps=0.0, pixels={**PIXELS, "gradient": True}).train()
    x = pictures(6)
    out = tok(x, quantize=quantize)
    assert bool(out.quantized.codes.any()) == quantize
    (out.x_hat.square().mean() + out.aux["feature_loss"] + out.quantized.loss).backward()
    for name, p in tok.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and float(p.grad.abs().max()) > 0, name
    assert all(p.grad is None for p in tok.vision.parameters())


def test_pixels_teach_the_codes_only_when_asked():
    for gradient in (False, True):
        tok = tiny(pixels={**PIXELS, "gradient": gradient}).train()
        tok(pictures(3)).x_hat.sum().backward()
        weight = tok.to_code[0].weight
        assert isinstance(weight, Tensor) and (weight.grad is not None) == gradient


def test_the_ratio_loss_moves_the_selector_to_its_ratio():
    tok = tiny(spread=False, keep_ratio=0.25).train()
    assert tok.predictor is not None
    optimizer = torch.optim.Adam(tok.predictor.parameters(), 1e-2)
    features = tok.vision(pictures(8))
    shares = []
    for _ in range(80):
        share = tok.select(features, "gumbel", torch.Generator().manual_seed(len(shares))).mean(1)
        optimizer.zero_grad()
        (0.25 - share).square().mean().backward()
        optimizer.step()
        shares.append(float(share.detach().mean()))
    assert shares[0] > 0.35 and abs(sum(shares[-10:]) / 10 - 0.25) < 0.04


def test_keep_ratio_one_is_a_plain_tokenizer():
    tok = tiny(keep_ratio=1.0)
    assert tok.predictor is None and not any("cross_attn" in n for n, _ in tok.merger.named_parameters())
    out = tok.train()(pictures(3))
    assert out.quantized.codes.shape == (3, 1, N) and float(out.aux["ratio_loss"]) == 0
    tokens = tok.encode(pictures(2))
    assert tokens.lengths.tolist() == [N, N]


def test_dropped_tails_are_hidden_from_the_decoder():
    tok = tiny(tail_drop="uniform", keep_ratio=1.0).train()
    torch.manual_seed(0)
    out = tok(pictures(8))
    seen = (out.quantized.z_q.abs().sum(-1) > 0).sum(1)
    assert len(set(seen.tolist())) > 2 and bool((seen >= 1).all())
    tok.eval()
    mask = torch.arange(N)[None] < torch.tensor([3, 16])[:, None]
    tokens = tok.encode(pictures(2))
    masked = tok(pictures(2), mask=mask)
    assert torch.allclose(
        masked.aux["features"][0], tok.reconstruct_features(tokens[0].keep(num_tokens=3).codes)[0], atol=1e-5
    )


def test_without_a_pixel_decoder_codes_and_features_remain():
    tok = tiny(pixels=None).eval()
    tokens = tok.encode(pictures(2))
    assert tok.reconstruct_features(tokens.codes, tokens.lengths).shape == (2, N, 24)
    with pytest.raises(ValueError, match=r"pixels=None .* build it with pixels"):
        tok.decode(tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_ratio": 0.0}, r"keep_ratio: expected a share in \(0, 1\], got 0.0"),
        ({"selection": {"method": "top"}}, "selection: expected a method of"),
        ({"selection": {"tau": 1}}, r"selection: expected keys among .* got \['tau'\]"),
        ({"pixels": {"widht": 8}}, r"pixels: expected keys among .* got \['widht'\]"),
        ({"pixels": {"image_size": 20, "patch_size": 8}}, "that 8 px patches fill, got 20"),
        ({"vision": {**VISION, "class_token": True}}, "expected no class token"),
        ({"merger": (16, 1, 3)}, "dim: expected a multiple of num_heads 3, got 16"),
        ({"tail_drop": "half"}, "tail_drop: expected one of"),
    ],
)
def test_bad_arguments_are_named(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_published_sizes():
    """Counts by hand from the stated shapes; the rounded figures of the facts are 3.2 M, 398 M, 404 M and 1.013 B."""
    with torch.device("meta"):
        tok = Dynamic(**PUBLISHED)
    W, hidden = 1408, 6144
    block = 3 * 2 * W + 8 * (W * W + W) + W * hidden + hidden + hidden * W + W
    assert parameters(tok.merger) == 12 * block + 2 * 2 * W == 398_267_392
    assert tok.predictor is not None
    halves = W * W // 2 + W // 2 + (W // 2) * (W // 4) + W // 4 + (W // 4) * 2 + 2
    assert parameters(tok.predictor) == 2 * W + W * W + W + halves == 3_227_490
    decoder = 12 * block + 2 * W + 32 * W + W + 2 * 256 * W + 2 * (W * W + W)
    assert parameters(tok.decoder) == decoder == 402_999_680
    assert decoder + W * 768 + 768 == 404_081_792  # with the projection to the diffusion model
    vision_block = 2 * 2 * W + 3 * W * W + 2 * W + W * W + W + 2 * W * hidden + hidden + W
    vision = 40 * vision_block + 3 * 14 * 14 * W + W + W + 257 * W
    assert parameters(tok.vision) == vision
    assert round((vision + 2 * W + W * 1024 + 1024) / 1e9, 3) == 1.013  # with the final norm and CLIP's projection
    assert tok.num_tokens == 256
    assert tok.base_spec().codebook_sizes == (16384,) and tok.quantizer.dim == 32
    assert parameters(tok.to_code) == W * W + W + W * 32 + 32


def test_the_ratio_is_of_every_picture_or_of_the_batch():
    """Counts of 1 and 0.25 of the patches miss 0.5 in each picture; their mean misses it by less."""
    features = torch.randn(4, 16, 24, generator=torch.Generator().manual_seed(0))
    losses, shares = {}, {}
    for over in ("picture", "batch"):
        tok = tiny()
        tok.selection["ratio_over"] = over
        keep = torch.zeros(4, 16)
        keep[:2] = 1
        keep[2:, :4] = 1
        tok._select_alike = lambda target, keep=keep: keep  # type: ignore[method-assign]
        out = tok.eval()(torch.rand(4, 3, 24, 24), features=features[:, : tok.num_tokens])
        losses[over], shares[over] = float(out.aux["ratio_loss"]), tok.keep_ratio
    rho = shares["picture"]
    assert losses["picture"] == pytest.approx(((rho - 1) ** 2 + (rho - 0.25) ** 2) / 2, rel=1e-5)
    assert losses["batch"] == pytest.approx((rho - 0.625) ** 2, rel=1e-5)
    with pytest.raises(ValueError, match="ratio_over"):
        tiny(selection={"ratio_over": "corpus"})
