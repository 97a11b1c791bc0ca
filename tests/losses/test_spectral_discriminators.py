from __future__ import annotations

import math
import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
import torchaudio
from torch import nn

from mmtok.losses.adversarial import ADVERSARIAL_LOSSES, feature_matching
from mmtok.losses.discriminators import MultiPeriodDiscriminator, PatchDiscriminator
from mmtok.losses.spectral_discriminators import (
    JoinedDiscriminator,
    MultiFrequencyDiscriminator,
    MultiResolutionDiscriminator,
)

RATE = 16_000


def banded(**changes: Any) -> Any:
    settings: dict[str, Any] = {"n_ffts": (64, 128), "width": 4} | changes
    return MultiResolutionDiscriminator(**settings)


def mels(**changes: Any) -> Any:
    settings: dict[str, Any] = {"hop_lengths": (8, 16), "widths": (32, 64)} | changes
    return MultiFrequencyDiscriminator(RATE, **settings)


def joined(in_channels: int = 1) -> JoinedDiscriminator:
    periods = MultiPeriodDiscriminator((2, 3), in_channels, (4, 8))
    return JoinedDiscriminator([periods, banded(n_ffts=(64,), in_channels=in_channels)], peak=0.8)


MAKERS = [banded, mels, joined]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def conv(before: int, after: int, kernel: int) -> int:
    """Weights, one norm for each output channel, biases."""
    return before * after * kernel + 2 * after


def test_published_sizes():
    with torch.device("meta"):
        dac: Any = MultiResolutionDiscriminator()
        xcodec: Any = MultiFrequencyDiscriminator(RATE)
    stack = conv(2, 32, 27) + 3 * conv(32, 32, 27) + conv(32, 32, 9)
    assert parameters(dac) == 3 * (5 * stack + conv(32, 1, 9)) == 1_413_990
    assert [part.n_fft for part in dac.parts] == [2048, 1024, 512]
    assert dac.parts[0].bands == ((0, 102), (102, 256), (256, 512), (512, 768), (768, 1025))
    want = 0
    for h in (64, 128, 256, 512, 512, 512):
        widths = (2, h // 32, h // 16, h // 8, h // 4, h // 2, h, 1)
        want += sum(conv(a, b, 9) for a, b in pairwise(widths))
    assert parameters(xcodec) == want
    strides = [[layer.conv.stride for layer in [*part.layers, part.head]] for part in xcodec.parts]
    assert strides == [[(1, 1), (2, 2), (1, 1), (2, 2), (1, 1), (2, 2), (1, 1)]] * 6
    assert [part.bank.shape[0] for part in xcodec.parts] == [65, 129, 257, 513, 1025, 2049]


@pytest.mark.parametrize("length", [80, 96, 301])
@pytest.mark.parametrize("channels", [1, 2])
def test_banded_shapes_for_any_length(length: int, channels: int):
    output = banded(in_channels=channels)(torch.randn(2, channels, length))
    for (logits, maps), n_fft in zip(output, (64, 128), strict=True):
        size, frames = n_fft // 2 + 1, math.ceil(length / (n_fft // 4))
        edges = [int(share * size) for share in (0, 0.1, 0.25, 0.5, 0.75, 1)]
        assert len(maps) == 25 and all(m.shape[:3] == (2, 4, frames) for m in maps)
        widths = [b - a for a, b in pairwise(edges)]
        last = [math.ceil(w / 8) for w in widths]
        assert [m.shape[3] for m in maps[::5]] == widths and [m.shape[3] for m in maps[4::5]] == last
        assert logits.shape == (2, 1, frames, sum(last))


@pytest.mark.parametrize("length", [128, 129, 301])
@pytest.mark.parametrize("channels", [1, 2])
def test_mel_shapes_for_any_length(length: int, channels: int):
    output = mels(in_channels=channels)(torch.randn(2, channels, length))
    for (logits, maps), hop, width in zip(output, (8, 16), (32, 64), strict=True):
        sizes: list[tuple[int, ...]] = [(1 + length // hop, 2 * hop + 1)]
        for i in range(1, 6):
            sizes.append(tuple(math.ceil(n / (1 + i % 2)) for n in sizes[-1]))
        assert [tuple(m.shape) for m in maps] == [
            (2, width // share, *size) for share, size in zip((32, 16, 8, 4, 2, 1), sizes, strict=True)
        ]
        assert logits.shape == (2, 1, *sizes[-1])


def test_banded_front_end_is_the_fourier_transform_of_mirrored_sound():
    part = banded(in_channels=2).parts[0]
    x = torch.randn(3, 2, 200)
    got = part.spectrum(x)  # (B, 2C, frames, F)
    assert got.shape == (3, 4, 13, 33)
    window = torch.hann_window(64)
    middle = torch.fft.rfft(x[1, 1, 5 * 16 - 24 : 5 * 16 + 40] * window)
    torch.testing.assert_close(got[1, 1, 5], middle.real, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[1, 3, 5], middle.imag, rtol=1e-4, atol=1e-4)
    first = torch.cat([x[0, 0, 1:25].flip(0), x[0, 0, :40]])
    torch.testing.assert_close(got[0, 0, 0], torch.fft.rfft(first * window).real, rtol=1e-4, atol=1e-4)
    last = torch.cat([x[0, 0, 168:], x[0, 0, 167:199].flip(0)])
    torch.testing.assert_close(got[0, 0, 12], torch.fft.rfft(last * window).real, rtol=1e-4, atol=1e-4)


def test_a_band_sees_its_own_frequencies_only():
    part = banded(n_ffts=(64,)).parts[0]
    x = torch.randn(1, 1, 200)
    part.spectrum = lambda sound: spectrum
    spectrum = banded(n_ffts=(64,)).parts[0].spectrum(x).requires_grad_()
    _, maps = part(x)
    maps[2 * 5 + 4].square().sum().backward()  # last map of the third band
    assert spectrum.grad is not None
    touched = spectrum.grad.abs().sum(dim=(0, 1, 2)) > 0
    assert touched.nonzero()[[0, -1], 0].tolist() == [8, 15] and touched.sum() == 8


def test_mel_front_end_equals_the_plain_definition():
    part = mels(in_channels=2).parts[1]
    x = 0.1 * torch.randn(3, 2, 333)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # triangles between two frequencies are empty before the clamp
        bank = torchaudio.functional.melscale_fbanks(33, 0.0, RATE / 2, 33, RATE, mel_scale="htk").clamp(1e-6, 1)
    padded = nn.functional.pad(x, (32, 32), mode="reflect")
    frames = padded.unfold(-1, 64, 16) * torch.hann_window(64) / 8  # 8 = sqrt(window)
    magnitude = torch.fft.rfft(frames).abs().clamp(min=1e-7**0.5) @ bank
    decibels = ((20 * magnitude.log10() - 20 + 100) / 100).clamp(0, 1)
    torch.testing.assert_close(part.mels(x), torch.cat([magnitude, decibels], dim=1), rtol=1e-4, atol=1e-4)
    assert 0.2 < decibels.mean() < 0.8


@pytest.mark.parametrize("part", [banded().parts[0], mels().parts[0]])
def test_layers_equal_plain_convolutions(part: Any):
    """The same weights through torch's own layers: activation between every two, none after the head."""
    x = 0.1 * torch.randn(1, 1, 160)

    def plain(layer: Any, padding: str | None) -> nn.Module:
        conv = layer.conv
        edge = (0, 0) if padding else conv.padding
        copy = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, edge)
        copy.load_state_dict({"weight": conv.weight.detach(), "bias": conv.bias.detach()})
        return nn.Sequential(nn.ReflectionPad2d(1), copy) if padding else copy

    logits, maps = part(x)
    if isinstance(part, type(mels().parts[0])):
        layers = [plain(layer, "reflect") for layer in [*part.layers, part.head]]
        want = part.mels(x)
        for layer in layers[:-1]:
            want = nn.functional.leaky_relu(layer(want), 0.2)
        torch.testing.assert_close(maps[-1], want)
        torch.testing.assert_close(logits, layers[-1](want))
        return
    outputs = []
    for (low, high), stack in zip(part.bands, part.stacks, strict=True):
        want = part.spectrum(x)[..., low:high]
        for layer in stack:
            want = nn.functional.leaky_relu(plain(layer, None)(want), 0.1)
        outputs.append(want)
    torch.testing.assert_close(maps[-1], outputs[-1])
    torch.testing.assert_close(logits, plain(part.head, None)(torch.cat(outputs, dim=-1)))


def test_joined_output_is_the_parts_outputs_in_order():
    first, second = MultiPeriodDiscriminator((2, 3), widths=(4, 8)), banded()
    x = torch.randn(2, 1, 200)
    both, alone = JoinedDiscriminator([first, second])(x), [*first(x), *second(x)]
    assert len(both) == 4
    for (logits, maps), (want, want_maps) in zip(both, alone, strict=True):
        assert torch.equal(logits, want) and all(map(torch.equal, maps, want_maps))
    level = 0.8 * (x - x.mean(-1, keepdim=True)) / (x - x.mean(-1, keepdim=True)).abs().amax(-1, keepdim=True)
    scaled = JoinedDiscriminator([first], peak=0.8)
    torch.testing.assert_close(scaled(x)[0][0], first(level)[0][0])
    torch.testing.assert_close(scaled(3 * x + 0.5)[1][0], scaled(x)[1][0], rtol=1e-4, atol=1e-5)
    assert len(JoinedDiscriminator([PatchDiscriminator(width=4, num_layers=1)])(torch.rand(1, 3, 16, 16))) == 1


@pytest.mark.parametrize("make", MAKERS)
def test_items_do_not_see_each_other(make: Any):
    net, x = make().eval(), 0.1 * torch.randn(2, 1, 200)
    for (together, _), (alone, _) in zip(net(x), net(x[1:]), strict=True):
        torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("kind", ADVERSARIAL_LOSSES)
def test_gradient_reaches_the_sound_and_every_weight(make: Any, kind: str):
    net, x = make(), (0.1 * torch.randn(2, 1, 200)).requires_grad_()
    output = net(x)
    ADVERSARIAL_LOSSES[kind].generator(output).backward(retain_graph=True)
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().max() > 0
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    silent = torch.zeros(2, 1, 200, requires_grad=True)
    feature_matching(output, net(silent)).backward()
    assert silent.grad is not None and silent.grad.isfinite().all()


@pytest.mark.parametrize("make", MAKERS)
def test_bf16_autocast_stays_close(make: Any):
    net, x = make().eval(), 0.1 * torch.randn(2, 1, 200)
    with torch.autocast("cpu", torch.bfloat16):
        inside = net(x)
    for (got, _), (want, _) in zip(inside, net(x), strict=True):
        torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.03)


@pytest.mark.parametrize(
    ("make", "shortest", "reason"),
    [(banded, 80, "5/8 of the longest window"), (mels, 128, "8 times the longest hop"), (joined, 40, "5/8 of")],
)
def test_short_sound_and_wrong_shapes_are_refused(make: Any, shortest: int, reason: str):
    net = make()
    assert all(logits.isfinite().all() for logits, _ in net(torch.randn(1, 1, shortest)))
    with pytest.raises(ValueError, match=rf"at least {shortest} samples \({reason}.*got {shortest - 1}; use longer"):
        net(torch.randn(1, 1, shortest - 1))
    with pytest.raises(ValueError, match=r"expected sound \(B,1,L\), got shape \(1, 2, 400\); see in_channels"):
        net(torch.randn(1, 2, 400))


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match=r"n_ffts: expected multiples of 8 .* got \(64, 60\)"):
        banded(n_ffts=(64, 60))
    with pytest.raises(ValueError, match=r"bands: .*n_fft 64 in each, got \(\(0.0, 0.01\),\); lengthen"):
        banded(bands=((0.0, 0.01),))
    with pytest.raises(ValueError, match="bands: expected at least one"):
        banded(bands=())
    with pytest.raises(ValueError, match=r"widths: expected one for each of the 2 hop_lengths .* got 1"):
        mels(widths=(32,))
    with pytest.raises(ValueError, match=r"widths that 32 divides .* got \(32, 48\)"):
        mels(widths=(32, 48))
    with pytest.raises(ValueError, match="parts: expected at least one discriminator"):
        JoinedDiscriminator([])
    with pytest.raises(ValueError, match="peak: expected > 0, got 0"):
        JoinedDiscriminator([banded()], peak=0)
