"""Raster2D: the grid and its prefixes, any quantizer, sizes, MaskGIT-VQ's published weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from published_autoencoders import Reference, maskgit_shapes, random_state
from torch import Tensor

from mmtok.image.raster2d import MASKGIT_VQ, Raster2D
from mmtok.image.released.convolutional import decoder_names, encoder_names
from mmtok.image.released.maskgit_vq import convert_maskgit_vq, load_maskgit_vq
from mmtok.layers.conv2d import ConvShape
from mmtok.tokens import Tokens, TokensError

VQ = {"type": "vq", "dim": 4, "codebook_size": 16}


def tiny(**changes: Any) -> Raster2D:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"width": 8, "multipliers": (1, 2, 1), "patch": 2, "image_size": 48, "quantizer": VQ}
    return Raster2D(**(settings | changes))


def alive(**changes: Any) -> Raster2D:
    """With a codebook among the latents."""
    tok = tiny(**changes)
    tok.train()(picture(4, 3, 32, 32))
    return tok.eval()


def picture(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def one(x: Tensor | list[Tensor]) -> Tensor:
    assert len(together(x)) == 1
    return x[0]


def together(x: Tensor | list[Tensor]) -> Tensor:
    assert isinstance(x, Tensor)
    return x


def test_the_number_of_tokens_is_that_of_the_cells():
    tok = alive()
    assert tok.factor == 8 and tok.spec.num_tokens == 36 and tok.default_size == 48
    for (h, w), count in {(48, 48): 36, (17, 33): 15, (1, 1): 1, (8, 16): 2, (96, 60): 6 * 4}.items():
        tokens = tok.encode(picture(3, h, w))
        assert tokens.lengths.tolist() == [count]
        assert tuple(one(tok.decode(tokens)).shape) == (3, h, w)
    assert tiny(image_size=50).spec.num_tokens == 49  # 7 x 7 cells, the last ones partly padding


def test_tokens_that_are_cut_off_decode_as_zeros():
    tok = alive()
    tokens = tok.encode(picture(3, 16, 24))
    z_q = tok.quantizer.decode(tokens.codes)
    for t in (1, 4, 6):
        kept = z_q.clone()
        kept[:, t:] = 0
        want = tok.pixels(kept, 16, 24).clamp(0, 1)[0]
        assert torch.allclose(one(tok.decode(tokens.keep(num_tokens=t))), want.detach(), atol=1e-6)


def test_more_tokens_than_cells_are_refused():
    tok = alive()
    tokens = tok.encode(picture(3, 16, 24))
    tokens.side["height"] = torch.tensor([8])
    with pytest.raises(TokensError, match=r"at most 3 tokens, 1 x 3 cells of 8 px for a picture of 8 x 24, got 6"):
        tok.decode(tokens)


def test_codes_without_a_size_are_a_square():
    tok = alive()
    for t, side in {0: 48, 1: 8, 2: 16, 4: 16, 5: 24, 9: 24, 36: 48}.items():
        assert tok.size_without_side(t) == (side, side)
    tokens = tok.encode(picture(3, 32, 32))
    bare = Tokens(tokens.codes, tokens.lengths, tokens.spec)
    assert torch.equal(one(tok.decode(bare)), one(tok.decode(tokens)))
    assert tuple(one(tok.decode(bare, size=(40, 40))).shape) == (3, 40, 40)


def test_size_resizes_the_picture_and_keeps_its_grid():
    """A larger grid would take the codes for a prefix and lay them out in rows of another length."""
    tok = alive()
    x = picture(2, 3, 16, 24)
    tokens = tok.encode(x)
    small, large = together(tok.decode(tokens)), together(tok.decode(tokens, size=(32, 48)))
    assert large.shape == (2, 3, 32, 48)
    assert float((torch.nn.functional.avg_pool2d(large, 2) - small).abs().mean()) < 0.3 * float(small.std())
    for size in ((0, 3), (4,), (10**5, 10**5)):
        with pytest.raises(ValueError, match=r"size: expected|px, got"):
            tok.decode(tokens, size=size)  # pyright: ignore[reportArgumentType]
    empty = tok.decode(tokens[2:], size=(5, 5))
    assert isinstance(empty, Tensor) and len(empty) == 0


@pytest.mark.parametrize(
    "quantizer",
    [
        {"type": "fsq", "dim": 4, "levels": [4, 4, 3]},
        {"type": "rvq", "dim": 4, "codebook_size": 8, "num_codebooks": 3},
        {"type": "binary", "dim": 4, "num_bits": 8, "bits_per_code": 4},
        {"type": "lfq", "dim": 4, "num_bits": 6},
    ],
)
@pytest.mark.parametrize("latent_dim", [None, 6])
def test_any_quantizer_trains_and_encodes(quantizer: dict[str, Any], latent_dim: int | None):
    tok = tiny(quantizer=quantizer, latent_dim=latent_dim, style="maskgit", middle_attention=False, pixels="unit")
    x = picture(2, 3, 17, 23)
    out = tok.train()(x)
    assert out.x_hat.shape == x.shape and out.quantized.codes.shape[1:] == (len(tok.quantizer.codebook_sizes), 9)
    ((out.x_hat - x).square().mean() + out.quantized.loss).backward()
    for part in (tok.encoder, tok.decoder, tok.to_quantizer, tok.from_quantizer):
        for name, p in part.named_parameters():
            assert p.grad is not None and float(p.grad.abs().max()) > 0, name
    tokens = tok.eval().encode(x)
    assert tokens.spec == tok.spec and tokens.codes.shape == out.quantized.codes.shape


def test_a_mask_keeps_some_cells():
    tok, x = alive(), picture(2, 3, 16, 16)
    mask = torch.tensor([[True, False, True, False], [False, False, False, True]])
    out = tok(x, mask)
    assert bool((out.quantized.z_q[~mask] == 0).all()) and bool((out.quantized.z_q[mask] != 0).any())


def test_a_few_steps_lower_the_error():
    tok, x = tiny(), picture(8, 3, 2, 2).repeat_interleave(8, 2).repeat_interleave(8, 3)
    optimizer = torch.optim.Adam(tok.train().parameters(), 5e-3)
    errors = []
    for _ in range(70):
        out = tok(x)
        error = (out.x_hat - x).square().mean()
        optimizer.zero_grad()
        (error + out.quantized.loss).backward()
        optimizer.step()
        errors.append(float(error.detach()))
    assert errors[-1] < 0.75 * float(x.var()), errors  # the mean colour alone has the variance


def test_the_config_rebuilds_it():
    tok = alive(latent_dim=6, attention=(2,), decoder_attention=(1,), pixels="unit")
    again = Raster2D(**tok.config)
    again.load_state_dict(tok.state_dict())
    assert again.eval().fingerprint == tok.fingerprint and again.config == tok.config


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="pixels: expected one of"):
        tiny(pixels="bytes")
    with pytest.raises(ValueError, match="image_size: expected at least 1"):
        tiny(image_size=0)
    with pytest.raises(ValueError, match="type: expected one of"):
        tiny(quantizer={"dim": 4})


def published_config(**changes: Any) -> dict[str, Any]:
    quantizer = MASKGIT_VQ["quantizer"] | {"dim": 6, "codebook_size": 32}
    return MASKGIT_VQ | {"width": 16, "multipliers": (1, 2), "patch": 1, "quantizer": quantizer} | changes


def test_maskgit_weights_give_the_published_forward_pass(tmp_path: Path):
    state = random_state(maskgit_shapes(16, (1, 2), 6, 32))
    torch.save(state, tmp_path / "vq.bin")
    tok = load_maskgit_vq(tmp_path / "vq.bin", published_config())
    reference, x = Reference(state, 2, True), picture(2, 3, 8, 12)
    h = reference.encode(x)  # images in [0, 1], as 1d-tokenizer feeds them
    z = h.flatten(2).transpose(1, 2)
    assert torch.allclose(tok.latent(x), z, atol=1e-4)
    codes = torch.cdist(z, state["quantize.embedding.weight"].expand(2, -1, -1)).argmin(-1)
    tokens = tok.encode(x)
    assert torch.equal(tokens.codes[:, 0], codes) and len(codes.unique()) > 8
    entry = state["quantize.embedding.weight"][codes].transpose(1, 2).reshape(2, 6, 4, 6)
    decoded = tok.decode(tokens)
    assert isinstance(decoded, Tensor)
    assert torch.allclose(decoded, reference.decode(entry).clamp(0, 1), atol=1e-4)
    book: Any = tok.quantizer
    assert bool(book.book.initialized) and float(book.book.cluster_size.min()) == 1.0 and not tok.training


def test_every_published_maskgit_tensor_has_its_place():
    shapes = maskgit_shapes()
    with torch.device("meta"):
        tok = Raster2D(**MASKGIT_VQ)
        state = {k: torch.empty(v) for k, v in shapes.items()}
    assert tok.factor == 16 and tok.base_spec().num_tokens == 256
    converted = convert_maskgit_vq(state)
    own = {k: tuple(v.shape) for k, v in tok.state_dict().items() if not k.endswith("cluster_size")}
    assert {k: tuple(v.shape) for k, v in converted.items()} == own
    parameters = sum(p.numel() for p in tok.parameters())
    assert parameters == sum(torch.Size(s).numel() for s in shapes.values()) == maskgit_count()


def maskgit_count() -> int:
    """By hand: 3 x 3 convolutions without bias 9 i o, norms 2 c, shortcuts o o, at widths 128 128 256 256 512."""

    def res(i: int, o: int) -> int:
        return 2 * i + 9 * i * o + 2 * o + 9 * o * o + (o * o if i != o else 0)

    down = [(128, 128), (128, 128), (128, 128), (128, 128), (128, 256), (256, 256), (256, 256), (256, 256)]
    down += [(256, 512), (512, 512)]
    up = [(512, 512), (512, 512), (512, 256), (256, 256), (256, 256), (256, 256), (256, 128), (128, 128)]
    up += [(128, 128), (128, 128)]
    middles = 4 * res(512, 512)
    upsample = sum(9 * c * c + c for c in (512, 256, 256, 128))
    encoder = 9 * 3 * 128 + 2 * 512 + 512 * 256 + 256
    decoder = 9 * 256 * 512 + 512 + 2 * 128 + 9 * 128 * 3 + 3
    return sum(res(*c) for c in down + up) + middles + upsample + encoder + decoder + 1024 * 256


def test_names_that_do_not_fit_are_refused():
    state = random_state(maskgit_shapes(16, (1, 2), 6, 32))
    shape = ConvShape(16, (1, 2), 2, middle_attention=False, style="maskgit")
    extra = state | {"encoder.mid.9.conv1.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"MaskGIT-VQ: .*unexpected \['encoder.mid.9.conv1.weight'\]"):
        convert_maskgit_vq(extra, shape)
    state.pop("decoder.up.1.upsample_conv.bias")
    with pytest.raises(ValueError, match=r"missing \['decoder.up.1.upsample_conv.bias'\]"):
        convert_maskgit_vq(state, shape)
    assert len(encoder_names(shape) | decoder_names(shape)) == len(state)  # without the codebook, with what was popped
    quantizer = MASKGIT_VQ["quantizer"] | {"dim": 6, "codebook_size": 64}
    with pytest.raises(ValueError, match=r"quantizer.book.codebook \(32, 6\), expected \(64, 6\)"):
        load_maskgit_vq(random_state(maskgit_shapes(16, (1, 2), 6, 32)), published_config(quantizer=quantizer))
