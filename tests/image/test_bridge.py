"""Bridge: the KL autoencoder, cells without training, calibration, KL-16's published weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from published_autoencoders import Reference, kl16_shapes, random_state
from torch import Tensor
from torch.nn import functional as F

from mmtok.image.bridge import PUBLISHED, Bridge
from mmtok.image.released.kl16 import convert_kl16, load_kl16
from mmtok.layers.conv2d import ConvShape
from mmtok.quantizers.per_dimension import gaussian_centroids


def tiny(**changes: Any) -> Bridge:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"width": 8, "multipliers": (1, 2), "patch": 2, "latent_dim": 5, "image_size": 32}
    return Bridge(**(settings | changes)).eval()


def picture(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def batch(x: Tensor | list[Tensor]) -> Tensor:
    assert isinstance(x, Tensor)
    return x


def test_codes_are_a_level_for_each_number_of_the_latents():
    tok = tiny(bits=3, scale=2.0)
    x = picture(2, 3, 8, 12)
    tokens = tok.encode(x)
    assert tokens.codes.shape == (2, 5, 6) and tok.spec.codebook_sizes == (8,) * 5 and tok.spec.num_tokens == 64
    mean, _ = tok.moments(x)
    table = gaussian_centroids(8, 3.0) * 5 / 3
    nearest = (2 * mean.double()[..., None] - table).abs().argmin(-1)  # (B, T, D)
    assert torch.equal(tokens.codes, nearest.transpose(1, 2))
    want = tok.pixels(table[nearest].float(), 8, 12)
    assert torch.allclose(batch(tok.decode(tokens)), want.clamp(0, 1), atol=1e-6)


def test_the_scale_cancels_but_for_the_rounding():
    x = picture(1, 3, 8, 8)
    outs = []
    for scale in (1.0, 0.25):
        tok = tiny(scale=scale)
        assert float(tok.scale) == scale
        outs.append((tok.latent(x) / scale, tok.pixels(tok.latent(x), 8, 8), tok(x).x_hat, tok.encode(x).codes))
    assert torch.allclose(outs[0][0], outs[1][0]) and torch.allclose(outs[0][1], outs[1][1], atol=1e-6)
    assert torch.allclose(outs[0][2], outs[1][2], atol=1e-6) and not torch.equal(outs[0][3], outs[1][3])


def test_the_divergence_is_that_of_the_posterior_from_a_standard_gaussian():
    tok, x = tiny(), picture(2, 3, 8, 8)
    mean, log_variance = tok.moments(x)
    posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    want = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0))  # (B, T, D)
    assert torch.allclose(tok(x).aux["kl"], want.mean(), atol=1e-6)
    mask = torch.tensor([[True, False, True, True], [False, True, False, False]])
    assert torch.allclose(tok(x, mask).aux["kl"], want[mask].mean(), atol=1e-6)


def test_log_variances_are_clamped():
    tok, x = tiny(), picture(1, 3, 8, 8)
    with torch.no_grad():
        tok.to_moments.bias[5:] = torch.tensor([-100.0, 100.0, 0.0, 0.0, 0.0])
    _, log_variance = tok.moments(x)
    assert bool((log_variance[..., 0] == -30).all()) and bool((log_variance[..., 1] == 20).all())
    assert bool(tok.train()(x).x_hat.isfinite().all())


def test_it_trains_without_rounding_and_samples_the_posterior():
    tok, x = tiny(bits=1), picture(2, 3, 8, 12)
    out = tok.train()(x)
    torch.manual_seed(3)
    first = tok(x)
    torch.manual_seed(3)
    again = tok(x)
    assert torch.equal(first.x_hat, again.x_hat) and not torch.equal(first.x_hat, out.x_hat)
    assert out.quantized.z_q.unique().numel() == out.quantized.z_q.numel()  # two cells would leave two values
    assert float(out.quantized.loss.detach()) == 0 and out.quantized.stats["usage"].shape == (5,)
    assert torch.allclose(tok.pixels(out.quantized.z_q, 8, 12), out.x_hat)
    ((out.x_hat - x).square().mean() + out.quantized.loss + 1e-3 * out.aux["kl"]).backward()
    for name, p in tok.named_parameters():
        assert p.grad is not None and float(p.grad.abs().max()) > 0, name
    settled = tok.eval()(x)
    assert torch.equal(settled.x_hat, tok(x).x_hat) and torch.allclose(settled.quantized.z_q, tok.latent(x))


def test_rounding_in_training_has_the_same_gradient():
    tok, x = tiny(bits=2), picture(1, 3, 8, 8)
    out = tok(x, quantize=True)
    assert torch.allclose(out.quantized.z_q, tok.quantizer.decode(out.quantized.codes))
    assert torch.equal(out.quantized.codes, tok.encode(x).codes)
    assert torch.allclose(out.x_hat.clamp(0, 1), batch(tok.decode(tok.encode(x))), atol=1e-6)
    (gradient,) = torch.autograd.grad(out.quantized.z_q.sum(), tok.to_moments.bias)
    assert torch.allclose(gradient, torch.tensor([4.0] * 5 + [0.0] * 5))  # four cells, scale 1


def test_a_mask_leaves_cells_out():
    tok, x = tiny(), picture(1, 3, 8, 8)
    mask = torch.tensor([[True, False, False, True]])
    for quantize in (False, True):
        z_q = tok(x, mask, quantize).quantized.z_q
        assert bool((z_q[~mask] == 0).all()) and bool((z_q[mask] != 0).all())


def test_more_cells_need_no_training_and_lose_less(tmp_path: Path):
    from mmtok import auto

    tok = tiny()
    tok.calibrate([picture(8, 3, 32, 32)], "standardise")
    x, errors, prints = picture(2, 3, 32, 32, seed=5), [], set()
    whole = tok(x).x_hat
    before = {k: v.clone() for k, v in tok.state_dict().items() if "quantizer" not in k}
    for bits in (1, 2, 4, 6, 8):
        tok.set_cells(bits)
        assert tok.config["bits"] == bits and tok.spec.codebook_sizes == (2**bits,) * 5
        errors.append(float((tok(x, quantize=True).x_hat - whole).square().mean().detach()))
        prints.add(tok.fingerprint)
        tok.save(tmp_path / str(bits))
        loaded = auto.load(tmp_path / str(bits))
        assert torch.equal(loaded.encode(x).codes, tok.encode(x).codes) and loaded.fingerprint == tok.fingerprint
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3 * errors[0] and len(prints) == 5
    assert all(torch.equal(v, tok.state_dict()[k]) for k, v in before.items())
    assert not tok.quantizer.training and tok.train() and tok.quantizer.training
    tok.set_cells(3)
    assert tok.quantizer.training


@pytest.mark.parametrize("method", ["scale", "standardise", "fit"])
def test_calibration_takes_its_numbers_from_the_data(method: str):
    tok = tiny(bits=2, scale=3.0, ranges=(3.0, 3.0))
    tok.quantizer.set_statistics(torch.ones(5), torch.full((5,), 9.0))  # of an earlier calibration
    pictures = [picture(3, 3, 32, 32), picture(2, 3, 13, 30, seed=2)]
    tok.train()
    tok.calibrate(iter(pictures), method)
    assert tok.training
    padded = [F.pad(p, (0, -p.shape[3] % 4, 0, -p.shape[2] % 4), mode="replicate") for p in pictures]
    rows = torch.cat([tok.eval().moments(p)[0].flatten(0, 1) for p in padded]).detach()
    assert len(rows) == 3 * 64 + 2 * 32
    assert torch.allclose(tok.scale, 1 / rows.std(correction=0), rtol=1e-4)
    scaled = rows / rows.std(correction=0)
    codes = tok.quantizer.encode(scaled[None])[0]  # (D, N)
    shares = torch.stack([torch.bincount(c, minlength=4) / len(rows) for c in codes])
    if method == "scale":
        assert torch.equal(tok.quantizer.mean, torch.zeros(5)) and torch.equal(tok.quantizer.std, torch.ones(5))
    else:
        assert torch.allclose(tok.quantizer.mean, scaled.mean(0), atol=1e-4)
        assert torch.allclose(tok.quantizer.std, scaled.std(0, correction=0), rtol=1e-3)
    uneven = float((shares - 0.25).abs().max())
    assert uneven > 0.3 if method == "scale" else uneven < 0.15
    if method == "fit":
        quarters = torch.stack([q.mean(0) for q in scaled.sort(0).values.tensor_split(4)], 1)  # (D, 4)
        assert torch.allclose(tok.quantizer.decode(torch.arange(4).expand(1, 5, 4))[0].T, quarters, atol=1e-4)
    assert torch.equal(Bridge(**tok.config).quantizer.centroids, tok.quantizer.centroids) == (method != "fit")


def test_calibration_refuses_what_has_no_spread():
    tok = tiny()
    with pytest.raises(ValueError, match="method: expected one of"):
        tok.calibrate([picture(1, 3, 8, 8)], "guess")
    with pytest.raises(ValueError, match="expected pictures with different latents, got 0 latents"):
        tok.calibrate([])


def test_a_sample_of_the_posterior_is_a_function_of_the_picture():
    tok = tiny(posterior="sample", noise_seed=4)
    with torch.no_grad():
        tok.to_moments.bias[5:] = 0.0  # deviations near 1
    x = picture(3, 3, 8, 12)
    torch.manual_seed(9)
    z = tok.latent(x)
    mean, log_variance = tok.moments(x)
    noise = (z - mean) / (0.5 * log_variance).exp()
    assert torch.allclose(noise[0], noise[1], atol=1e-4) and 0.6 < float(noise.std().detach()) < 1.4
    assert torch.equal(tok.latent(x), z) and torch.allclose(tok.latent(x[:1]), z[:1], atol=1e-5)
    other = tiny(posterior="sample", noise_seed=5)
    other.load_state_dict(tok.state_dict())
    assert not torch.allclose(other.latent(x), z) and other.fingerprint != tok.fingerprint


def test_bad_arguments_are_refused():
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"posterior": "mean"}, "posterior: expected one of"),
        ({"scale": 0.0}, "a finite scale > 0"),
        ({"latent_dim": 0}, "latent_dim >= 1"),
        ({"ranges": (5.0,)}, "two ranges"),
        ({"bits": 0}, r"bits in 1\.\.16"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            tiny(**arguments)


def test_a_few_steps_lower_the_error():
    tok, x = tiny(), picture(8, 3, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    optimizer = torch.optim.Adam(tok.train().parameters(), 5e-3)
    errors = []
    for _ in range(30):
        out = tok(x)
        error = (out.x_hat - x).square().mean()
        optimizer.zero_grad()
        (error + 1e-6 * out.aux["kl"]).backward()
        optimizer.step()
        errors.append(float(error.detach()))
    assert errors[-1] < 0.6 * errors[0], errors


def test_kl16_weights_give_the_published_forward_pass(tmp_path: Path):
    state = random_state(kl16_shapes(16, (1, 2), 4, attention=1))
    torch.save({"model": state | {"loss.logvar": torch.zeros(())}}, tmp_path / "kl16.ckpt")
    config = PUBLISHED | {"width": 16, "multipliers": (1, 2), "attention": (1,), "latent_dim": 4}
    tok = load_kl16(tmp_path / "kl16.ckpt", config)
    reference, x = Reference(state, 2, False), picture(2, 3, 8, 12)
    moments = reference.conv("quant_conv", reference.encode(x * 2 - 1))
    mean, log_variance = moments.chunk(2, 1)
    found = tok.moments(x)
    assert torch.allclose(found[0], mean.flatten(2).transpose(1, 2), atol=1e-4)
    assert torch.allclose(found[1], log_variance.flatten(2).transpose(1, 2), atol=1e-4)
    z = torch.randn(2, 4, 4, 6)
    want = reference.decode(reference.conv("post_quant_conv", z)) * 0.5 + 0.5
    assert torch.allclose(tok.pixels(z.flatten(2).transpose(1, 2) * 0.2325, 8, 12), want, atol=1e-4)
    assert math.isclose(float(tok.scale), 0.2325, rel_tol=1e-6) and tok.posterior == "mode" and not tok.training
    assert load_kl16(state, config, "sample").config["posterior"] == "sample"


def test_every_published_kl16_tensor_has_its_place():
    shapes = kl16_shapes()
    with torch.device("meta"):
        tok = Bridge(**PUBLISHED)
        state = {k: torch.empty(v) for k, v in shapes.items()}
    assert tok.factor == 16 and tok.base_spec().num_tokens == 256 and tok.base_spec().codebook_sizes == (64,) * 16
    parameters = {k: tuple(v.shape) for k, v in tok.named_parameters()}
    assert {k: tuple(v.shape) for k, v in convert_kl16(state).items()} == parameters
    assert sum(p.numel() for p in tok.parameters()) == sum(torch.Size(s).numel() for s in shapes.values())
    assert sum(p.numel() for p in tok.parameters()) == kl16_count()


def kl16_count() -> int:
    """By hand: 3 x 3 convolutions 9 i o + o, norms 2 c, shortcuts i o + o, attention 2 c + 4 (c c + c)."""

    def res(i: int, o: int) -> int:
        return 2 * i + 9 * i * o + o + 2 * o + 9 * o * o + o + (i * o + o if i != o else 0)

    attention = 2 * 512 + 4 * (512 * 512 + 512)
    down = [(128, 128)] * 4 + [(128, 256)] + [(256, 256)] * 3 + [(256, 512), (512, 512)]
    up = [(512, 512)] * 3 + [(512, 256)] + [(256, 256)] * 5 + [(256, 128)] + [(128, 128)] * 5
    middles = 4 * res(512, 512) + 2 * attention
    resample = sum(9 * c * c + c for c in (128, 128, 256, 256)) + sum(9 * c * c + c for c in (512, 256, 256, 128))
    encoder = 9 * 3 * 128 + 128 + 2 * 512 + 9 * 512 * 32 + 32
    decoder = 9 * 16 * 512 + 512 + 2 * 128 + 9 * 128 * 3 + 3
    between = 32 * 32 + 32 + 16 * 16 + 16
    return sum(res(*c) for c in down + up) + 2 * attention + middles + resample + encoder + decoder + between


def test_names_that_do_not_fit_are_refused():
    state = random_state(kl16_shapes(16, (1, 2), 4, attention=1))
    shape = ConvShape(16, (1, 2), 2, (1,))
    assert len(convert_kl16(state, shape)) == len(state) - 4 * 2 * 2  # four attentions join q, k and v
    with pytest.raises(ValueError, match=r"unexpected \['encoder.down.1.attn.0.k.bias'"):
        convert_kl16(state, ConvShape(16, (1, 2), 2))
    with pytest.raises(ValueError, match="KL-16: the weights do not fit Bridge as configured"):
        load_kl16(state, PUBLISHED | {"width": 16, "multipliers": (1, 2), "attention": (1,), "latent_dim": 8})
