from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch

from mmtok.losses.adversarial import feature_matching, hinge_discriminator_loss
from mmtok.losses.discriminators import (
    MultiPeriodDiscriminator,
    MultiScaleSTFTDiscriminator,
    NormedConv2d,
    PatchDiscriminator,
)


def periods(**changes: Any):
    settings: dict[str, Any] = {"periods": (2, 3, 11), "widths": (4, 8, 8)} | changes
    return MultiPeriodDiscriminator(**settings)


def stfts(**changes: Any):
    settings: dict[str, Any] = {"n_ffts": (64, 128), "width": 4} | changes
    return MultiScaleSTFTDiscriminator(**settings)


def patches(**changes: Any):
    settings: dict[str, Any] = {"width": 4, "num_layers": 2} | changes
    return PatchDiscriminator(**settings)


CASES = [(periods, (2, 1, 397)), (stfts, (2, 1, 397)), (patches, (2, 3, 25, 31))]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("length", [11, 12, 97, 400])
def test_period_shapes_for_any_length(length):
    output = periods()(torch.randn(2, 1, length))
    assert len(output) == 3
    for (logits, maps), period in zip(output, (2, 3, 11), strict=True):
        rows = -(-length // period)
        assert [m.shape[1] for m in maps] == [4, 8, 8]
        for m in maps[:2]:
            rows = -(-rows // 3)
            assert m.shape[2:] == (rows, period)
        assert maps[2].shape[2:] == (rows, period) and logits.shape == (2, 1, rows, period)


def test_a_period_sees_its_columns_only():
    part = periods(periods=(5,))
    x = torch.randn(1, 1, 100, requires_grad=True)
    part(x)[0][0][..., 2].sum().backward()
    touched = x.grad.reshape(20, 5).abs().sum(dim=0)
    assert touched[2] > 0 and (touched[[0, 1, 3, 4]] == 0).all()


def test_the_tail_is_filled_by_reflection():
    net, x = periods(periods=(5,)), torch.randn(1, 1, 12)
    whole = torch.cat([x, x[..., [10, 9, 8]]], dim=-1)
    torch.testing.assert_close(net(x)[0][0], net(whole)[0][0])


@pytest.mark.parametrize("length", [65, 66, 301])
@pytest.mark.parametrize("channels", [1, 2])
def test_stft_shapes_for_any_length(length, channels):
    output = stfts(in_channels=channels)(torch.randn(2, channels, length))
    for (logits, maps), n_fft in zip(output, (64, 128), strict=True):
        frames, frequencies = 1 + length // (n_fft // 4), n_fft // 2 + 1
        assert len(maps) == 5 and maps[0].shape == (2, 4, frames, frequencies)
        for _ in range(3):
            frequencies = -(-frequencies // 2)
        assert maps[-1].shape == (2, 4, frames, frequencies) and logits.shape == (2, 1, frames, frequencies)


def test_stft_front_end_is_the_fourier_transform():
    part = stfts(in_channels=2).parts[0]
    x = torch.randn(3, 2, 200)
    got = part._spectrum(x)  # (B, 2C, frames, F)
    assert got.shape == (3, 4, 13, 33)
    centre = 5 * 16  # frame 5 spans samples 48 to 111
    want = torch.fft.rfft(x[1, 1, centre - 32 : centre + 32] * torch.hann_window(64)) / 8
    torch.testing.assert_close(got[1, 1, 5], want.real, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1, 3, 5], want.imag, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["spectral", "group", "none"])
@pytest.mark.parametrize("size", [(12, 12), (13, 40), (33, 31)])
def test_patch_shapes_for_any_size(norm, size):
    [(logits, maps)] = patches(norm=norm)(torch.randn(2, 3, *size))
    assert [m.shape[1] for m in maps] == [4, 8, 16]
    assert [tuple(m.shape[2:]) for m in maps] == [
        tuple(s // 2 for s in size),
        tuple(s // 2 // 2 for s in size),
        tuple(s // 2 // 2 - 1 for s in size),
    ]
    assert logits.shape == (2, 1, *(s // 2 // 2 - 2 for s in size))


def test_patch_of_three_layers_sees_70_pixels():
    x = torch.randn(1, 3, 128, 128, requires_grad=True)
    [(logits, _)] = PatchDiscriminator(width=2, norm="none")(x)
    logits[0, 0, 7, 7].backward()
    seen = x.grad.abs().sum(dim=(0, 1))
    assert (seen.sum(dim=0) > 0).sum() == 70 and (seen.sum(dim=1) > 0).sum() == 70


def test_spectral_norm_bounds_every_layer():
    net = patches(norm="spectral").train()
    for _ in range(30):  # power iterations
        net(torch.randn(1, 3, 16, 16))
    for layer in [*net.layers, net.head]:
        sigma = torch.linalg.matrix_norm(layer.conv.weight.detach().flatten(1), ord=2)
        assert sigma == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_items_do_not_see_each_other(make, shape):
    net, x = make().eval(), torch.randn(shape)
    for (joint, _), (alone, _) in zip(net(x), net(x[1:]), strict=True):
        torch.testing.assert_close(joint[1:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_gradient_reaches_input_and_every_weight(make, shape):
    net, x = make(), torch.randn(shape, requires_grad=True)
    output = net(x)
    torch.stack([logits.square().mean() for logits, _ in output]).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() > 0
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    silent = torch.zeros(shape, requires_grad=True)
    feature_matching(output, net(silent)).backward()
    assert silent.grad.isfinite().all()


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_bf16_autocast_stays_close_and_keeps_the_stored_weights(make, shape):
    net, x = make().eval(), torch.randn(shape)
    plain = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        inside = net(x)
    for (a, maps_a), (b, maps_b) in zip(plain, inside, strict=True):
        assert a.shape == b.shape and len(maps_a) == len(maps_b)
        torch.testing.assert_close(b.float(), a, rtol=0.05, atol=0.02)
    assert all(p.dtype == torch.float32 for p in net.parameters())


@pytest.mark.parametrize("norm", ["weight", "spectral"])
def test_weights_are_worked_out_in_float32_under_autocast(norm):
    layer, seen = NormedConv2d(3, 4, (3, 3), norm=norm), []
    parametrization = cast(torch.nn.ModuleDict, layer.conv.parametrizations)["weight"]
    parametrization.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(torch.randn(1, 3, 8, 8))
    assert seen == [False] and output.dtype == torch.bfloat16


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_a_few_steps_learn_to_tell_two_signals_apart(make, shape):
    net = make()
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    real, fake = torch.rand(shape), torch.rand(shape) * 0.1
    losses = []
    for _ in range(12):
        loss = hinge_discriminator_loss(net(real), net(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_state_round_trip(make, shape):
    net, other, x = make().eval(), make().eval(), torch.randn(shape)
    other.load_state_dict(copy.deepcopy(net.state_dict()))
    for (a, _), (b, _) in zip(net(x), other(x), strict=True):
        assert torch.equal(a, b)


def test_default_sizes_are_the_published_ones():
    with torch.device("meta"):
        mpd, mstft, patch = MultiPeriodDiscriminator(), MultiScaleSTFTDiscriminator(), PatchDiscriminator(norm="none")
    per_period = (
        (5 * 32 + 2 * 32)
        + (5 * 32 * 128 + 2 * 128)
        + (5 * 128 * 512 + 2 * 512)
        + (5 * 512 * 1024 + 2 * 1024)
        + (5 * 1024 * 1024 + 2 * 1024)
        + (3 * 1024 + 2)
    )
    assert sum(p.numel() for p in mpd.parameters()) == 5 * per_period
    assert len(mstft.parts) == 5
    convs = [(3, 64), (64, 128), (128, 256), (256, 512), (512, 1)]
    assert sum(p.numel() for p in patch.parameters()) == sum(16 * i * o + o for i, o in convs) == 2_764_737


@pytest.mark.parametrize(
    ("net", "x", "message"),
    [
        (periods(), torch.zeros(1, 1, 10), "at least 11 samples"),
        (periods(), torch.zeros(1, 2, 100), r"\(B,1,L\)"),
        (stfts(), torch.zeros(1, 1, 64), "at least 65 samples"),
        (stfts(), torch.zeros(1, 100), r"\(B,1,L\)"),
        (patches(), torch.zeros(1, 3, 11, 40), "at least 12 x 12 pixels"),
        (patches(), torch.zeros(1, 1, 40, 40), r"\(B,3,H,W\)"),
    ],
)
def test_bad_input_is_refused(net, x, message):
    with pytest.raises(ValueError, match=message):
        net(x)


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (periods, {"periods": (1,)}, "periods"),
        (periods, {"kernel": 4}, "odd kernel"),
        (stfts, {"n_ffts": (66,)}, "multiples of 4"),
        (patches, {"norm": "batch"}, "'spectral', 'group' or 'none'"),
        (patches, {"num_layers": 0}, "num_layers"),
        (patches, {"norm": "group", "width": 36}, "multiple of 32"),
    ],
)
def test_bad_configurations_are_refused(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize(("kernel", "padding", "widths"), [((3, 9), (1, 4), (1, 2, 3)), ((4, 4), (1, 1), (2, 3, 4))])
def test_narrow_maps_survive_bf16(kernel: tuple[int, int], padding: tuple[int, int], widths: tuple[int, ...]):
    """An output one column wide: torch's own bfloat16 convolution is wrong there on some CPUs."""
    layer = NormedConv2d(4, 4, kernel, stride=(2, 2), padding=padding)
    for width in widths:
        x = torch.randn(2, 4, 11, width)
        want = torch.nn.functional.conv2d(x, layer.conv.weight, layer.conv.bias, 2, padding)
        torch.testing.assert_close(layer(x), want)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(layer(x).float(), want, rtol=0.05, atol=0.03)
