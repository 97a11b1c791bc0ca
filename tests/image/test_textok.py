"""TexTok: where the caption is read and where not, padding of texts, the continuous mode, any size and any prefix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmtok.image.textok import PLACES, PUBLISHED, TexTok
from mmtok.layers.text import TextFeatures

TEXT = {"type": "minilm", "source": "package", "dim": 6, "max_tokens": 5}
TINY: dict[str, Any] = {
    "num_tokens": 4,
    "latent_dim": 4,
    "patch_size": 4,
    "encoder": (16, 2, 2),
    "decoder": (24, 2, 3),
    "image_size": 16,
    "text_encoder": TEXT,
    "quantizer": {"type": "fsq", "levels": [5, 5, 5, 5]},
}


def build(seed: int = 0, **changes: Any) -> TexTok:
    torch.manual_seed(seed)
    return TexTok(**{**TINY, **changes}).eval()


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def captions(batch: int, length: int = 5, seed: int = 2) -> TextFeatures:
    states = torch.randn(batch, length, 6, generator=torch.Generator().manual_seed(seed))
    return TextFeatures(states, torch.arange(length).expand(batch, -1) < 3)


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("size", [(16, 16), (1, 1), (7, 16), (3, 13), (40, 9)])
def test_any_size_comes_back_exactly(size: tuple[int, int], text: bool):
    tok, x = build(), noise(2, 3, *size)
    given = captions(2) if text else None
    tokens = tok.encode(x, text=given)
    assert tokens.codes.shape == (2, 1, 4) and tok.spec.conditions == ("text",)
    y = tok.decode(tokens, text=given)
    assert not isinstance(y, list) and y.shape == x.shape and float(y.std()) > 1e-3
    z = tok.latents(x[:, :, :16, :16], given)
    assert z.shape == (2, 4, 4)


@pytest.mark.parametrize("text_in", [("encoder", "decoder"), ("encoder",), ("decoder",), ()])
def test_each_place_reads_the_text_or_does_not(text_in: tuple[str, ...]):
    tok, x = build(text_in=text_in), noise(2, 3, 16, 16)
    one, other = captions(2), captions(2, seed=9)
    with torch.no_grad():
        moved = not torch.allclose(tok.latents(x, one), tok.latents(x, other), atol=1e-4)
        z_q = noise(2, 4, 4)
        redrawn = not torch.allclose(tok.pixels(z_q, 16, 16, one), tok.pixels(z_q, 16, 16, other), atol=1e-5)
    assert (moved, redrawn) == tuple(p in text_in for p in PLACES)
    assert tok.base_spec().conditions == (("text",) if text_in else ())
    if not text_in:
        with pytest.raises(ValueError, match="takes no text"):
            tok.encode(x, text=one)
        out = tok(x, text=one.states, text_mask=one.mask)  # a training batch may hold captions all the same
        assert torch.equal(out.x_hat, tok(x).x_hat)


def test_padding_of_the_text_changes_nothing():
    tok, x = build(), noise(2, 3, 16, 16)
    long = captions(2)
    short = TextFeatures(long.states[:, :3], long.mask[:, :3])
    dirty = TextFeatures(torch.where(long.mask[..., None], long.states, 1e4), long.mask)
    for other in (short, dirty):
        assert torch.allclose(tok.latents(x, other), tok.latents(x, long), atol=1e-5)
        a, b = tok(x, text=other.states, text_mask=other.mask), tok(x, text=long.states, text_mask=long.mask)
        assert torch.allclose(a.x_hat, b.x_hat, atol=1e-5)
        assert torch.equal(tok.encode(x, text=other).codes, tok.encode(x, text=long).codes)
    everything = TextFeatures(long.states, torch.ones(2, 5, dtype=torch.bool))
    assert not torch.allclose(tok.latents(x, everything), tok.latents(x, long), atol=1e-4)


def test_without_text_the_null_token_stands_in():
    """A missing caption, an empty one and a dropped one are the same; the codes decode without their text."""
    tok, x, given = build(), noise(2, 3, 16, 16), captions(2)
    empty = TextFeatures(given.states, torch.zeros_like(given.mask))
    none = tok.latents(x)
    assert torch.allclose(tok.latents(x, empty), none, atol=1e-5)
    dropped = torch.tensor([True, False])
    half = tok.latents(x, given, dropped)
    assert torch.allclose(half[0], none[0], atol=1e-5) and torch.allclose(half[1], tok.latents(x, given)[1], atol=1e-5)
    tokens = tok.encode(x, text=given)
    y, bare = tok.decode(tokens, text=given), tok.decode(tokens)
    assert isinstance(y, Tensor) and isinstance(bare, Tensor) and not torch.allclose(y, bare, atol=1e-4)


def test_captions_are_dropped_in_training_only_and_in_both_networks_at_once():
    x, given = noise(64, 3, 16, 16), captions(64)
    batch = {"x": x, "text": given.states, "text_mask": given.mask}
    tok = build(text_drop=0.5)
    with_text, without = tok(**batch).x_hat, tok(x).x_hat
    torch.manual_seed(0)
    trained = tok.train()(**batch).x_hat
    kept = (trained - with_text).abs().amax((1, 2, 3)) < 1e-4
    dropped = (trained - without).abs().amax((1, 2, 3)) < 1e-4
    assert bool((kept ^ dropped).all()) and 16 < int(dropped.sum()) < 48
    assert torch.allclose(build(text_drop=0.0).train()(**batch).x_hat, with_text, atol=1e-5)
    assert torch.allclose(build(text_drop=1.0).train()(**batch).x_hat, without, atol=1e-5)


def test_a_prefix_decodes_as_with_the_other_tokens_masked():
    tok, x = build(), noise(2, 3, 16, 16)
    tokens = tok.encode(x)
    for k in range(1, 5):
        y = tok.decode(tokens.keep(num_tokens=k))
        mask = (torch.arange(4) < k).expand(2, -1)
        assert isinstance(y, Tensor) and torch.allclose(y, tok(x, mask).x_hat.clamp(0, 1), atol=1e-5)
        assert torch.equal(tok.encode(x, num_tokens=k).codes, tokens.codes[..., :k])


def test_tail_drop_masks_tokens_in_training_only():
    tok, x = build(tail_drop="uniform"), noise(64, 3, 16, 16)
    assert bool((tok(x).quantized.z_q != 0).any(-1).all())
    torch.manual_seed(0)
    kept = (tok.train()(x).quantized.z_q != 0).any(-1)  # (B, T)
    assert bool((kept[:, :-1] | ~kept[:, 1:]).all()) and {int(n) for n in kept.sum(1)} == {1, 2, 3, 4}
    assert bool((build().train()(x).quantized.z_q != 0).any(-1).all())


def test_continuous_as_in_the_paper():
    """No quantizer: the reconstruction comes from the latents themselves, and there are no codes to ask for."""
    tok, x, given = build(quantizer=None), noise(2, 3, 16, 16), captions(2)
    out = tok(x, text=given.states, text_mask=given.mask)
    z = tok.latents(x, given)
    assert z.shape == (2, 4, 4) and torch.equal(out.quantized.z_q, z)
    assert torch.equal(out.x_hat, tok.pixels(z, 16, 16, given)) and float(out.quantized.loss) == 0
    assert out.quantized.codes.shape == (2, 0, 4)
    mask = (torch.arange(4) < 2).expand(2, -1)
    assert torch.equal(tok(x, mask).quantized.z_q, torch.where(mask[..., None], tok.latents(x), 0.0))
    for call in (lambda: tok.encode(x), lambda: tok.spec):
        with pytest.raises(
            ValueError, match=r"no codes: call forward\(\) or latents\(\), or build it with a quantizer"
        ):
            call()


def test_quantized_after_a_continuous_training():
    tok, x = build(quantizer={"type": "per_dimension", "bits": 6}, continuous=True), noise(2, 3, 16, 16)
    z = tok.latents(x)
    assert torch.equal(tok.train()(x).quantized.z_q, z)
    tokens = tok.eval().encode(x)
    assert tokens.codes.shape == (2, 4, 4) and tok.spec.codebook_sizes == (64,) * 4
    y = tok.decode(tokens)
    assert isinstance(y, Tensor)
    difference = (y - tok(x).x_hat.detach().clamp(0, 1)).abs()
    assert 0 < float(difference.max()) < 0.1


@pytest.mark.parametrize(
    "quantizer",
    [TINY["quantizer"], {"type": "vq", "codebook_size": 16, "codebook": "gradient", "kmeans_init": False}, None],
)
def test_the_gradient_reaches_every_parameter(quantizer: dict[str, Any] | None):
    tok, x = build(quantizer=quantizer, text_drop=0.0).train(), noise(3, 3, 16, 16)
    lengths = torch.tensor([5, 3, 0])  # every text position is used, and the null token by the last item
    given = TextFeatures(captions(3).states, torch.arange(5) < lengths[:, None])
    out = tok(x, text=given.states, text_mask=given.mask)
    ((out.x_hat - x).square().mean() + out.quantized.loss).backward()
    silent = [n for n, p in tok.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
    assert silent == []


def test_it_learns():
    tok = build(text_drop=0.1).train()
    x = torch.stack([F.interpolate(noise(1, 3, 2, 2, seed=i), 16)[0] for i in range(8)])
    given = captions(8)
    optimizer = torch.optim.AdamW(tok.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        out = tok(x, text=given.states, text_mask=given.mask)
        loss = (out.x_hat - x).square().mean() + out.quantized.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_mask_tokens_differ_from_the_start():
    """Patches that start alike would keep a short training at one colour."""
    with torch.no_grad():
        y = build().pixels(torch.zeros(1, 4, 4), 16, 16)
    patches = y.unflatten(2, (4, 4)).unflatten(4, (4, 4)).permute(0, 2, 4, 1, 3, 5).reshape(16, -1)
    assert float(torch.pdist(patches).min()) > 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_in": ("decoder", "head")}, "text_in: expected distinct places among"),
        ({"text_in": ("decoder", "decoder")}, "text_in: expected distinct places among"),
        ({"text_drop": 1.5}, r"text_drop: expected a share in 0\.\.1, got 1.5"),
        ({"image_size": 18}, "expected a multiple of patch_size 4, got 18"),
        ({"tail_drop": "half"}, "tail_drop: expected one of"),
        ({"encoder": (16, 1, 3)}, "expected a multiple of num_heads 3, got 16"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_texts_that_do_not_fit_are_refused():
    tok, x = build(), noise(2, 3, 16, 16)
    for wrong in (torch.zeros(2, 6, 6), torch.zeros(2, 5, 7), captions(3)):
        with pytest.raises(ValueError, match="text"):
            tok.encode(x, text=wrong)


def test_the_published_size():
    """Section 4.1 of the facts: about 176 M. By hand: 12 w^2 + 13 w a block, and what stands around the blocks."""
    with torch.device("meta"):
        tok = TexTok(**PUBLISHED)
        out = tok(torch.zeros(1, 3, 256, 256), text=torch.zeros(1, 128, 2048))
    w, blocks, patches, pixels, N = 768, 24, 1024, 192, 128
    text = 2048 * w + w + 128 * w + w  # Linear, positions, null token
    around = (pixels * w + w) + (w * pixels + pixels) + 2 * patches * w + 2 * N * w + (w * 8 + 8) + (8 * w + w)
    want = blocks * (12 * w * w + 13 * w) + 2 * 2 * w + around + 2 * text
    found = sum(p.numel() for p in tok.parameters())
    assert found == want and round(found / 1e6) == 176
    assert out.x_hat.shape == (1, 3, 256, 256) and out.quantized.z_q.shape == (1, 128, 8)
