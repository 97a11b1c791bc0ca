"""BSS Eval's SDR against mir_eval, and what it forgives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import mmtok
from mmtok.data.audio import read_audio
from mmtok.metrics import METRICS
from mmtok.metrics.audio import sdr, si_sdr_aligned

RATE = 16000


def noise(length: int = 6000, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(1, 1, length, generator=torch.Generator().manual_seed(seed))


def shifted(x: torch.Tensor, late: int) -> torch.Tensor:
    """x later by ``late`` samples, zeros where nothing is known."""
    y = torch.zeros_like(x)
    if late >= 0:
        y[..., late:] = x[..., : x.shape[-1] - late]
    else:
        y[..., :late] = x[..., -late:]
    return y


def filtered(x: torch.Tensor) -> torch.Tensor:
    taps = torch.tensor([0.5, 0.3, -0.2, 0.1]).flip(0)[None, None]
    return torch.nn.functional.conv1d(torch.nn.functional.pad(x, (3, 0)), taps)


CASES = {
    "white noise": lambda x: x + 0.3 * noise(seed=1),
    "late": lambda x: shifted(x, 8) + 0.01 * noise(seed=1),
    "early": lambda x: shifted(x, -8),
    "filtered": lambda x: filtered(x) + 0.05 * noise(seed=1),
    "another sound": lambda x: noise(seed=2),
    "clipped": lambda x: x.clamp(-0.1, 0.1),
}


@pytest.mark.filterwarnings("ignore:mir_eval.separation:FutureWarning")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("coloured", [False, True])
def test_equals_mir_eval(case: str, coloured: bool):
    separation = pytest.importorskip("mir_eval.separation")
    x = filtered(filtered(noise())) if coloured else noise()
    y = CASES[case](x)
    want = separation.bss_eval_sources(x[0].double().numpy(), y[0].double().numpy(), False)[0]
    assert np.isfinite(want[0])
    assert float(sdr(x, y, RATE)) == pytest.approx(want[0], abs=1e-6)


def test_lateness_is_forgiven_and_earliness_is_not():
    x, rate = read_audio(Path(mmtok.__file__).parent / "assets" / "speech.flac")
    x = x[None, :1, :40000]
    late, early = shifted(x, 8), shifted(x, -8)
    assert float(sdr(x, late, rate)) > 35  # the last 8 samples fall off the end
    assert float(sdr(x, early, rate)) < 3
    for moved in (late, early):  # both are copies, which the aligned measure says
        assert float(si_sdr_aligned(x, moved, rate)) > 60


def test_copies_at_any_gain_are_infinite_and_what_a_filter_explains_is_far_above_any_codec():
    x = noise()
    assert sdr(x, x.clone(), RATE).tolist() == [float("inf")]
    assert sdr(x, -0.25 * x, RATE).tolist() == [float("inf")]
    x[..., -600:] = 0  # so that nothing of the filtered sound falls off the end
    for explained in (filtered(x), shifted(x, 8), shifted(x, 511)):
        assert float(sdr(x, explained, RATE)) > 80
    assert float(sdr(x, shifted(x, 512), RATE)) < 5  # one sample beyond the filter


def test_a_pure_tone_has_a_value():
    tone = torch.cos(torch.arange(200_000, dtype=torch.float64) * torch.pi).float()[None, None]
    tone[..., 0] += 1e-3
    noisy = tone + 0.1 * noise(200_000)
    assert float(sdr(tone, noisy, RATE)) == pytest.approx(40, abs=0.5)


def test_items_and_channels_are_scored_one_by_one():
    x = torch.cat([noise(seed=i) for i in range(4)]).view(2, 2, -1)
    y = x + torch.cat([0.1 * 2**i * noise(seed=10 + i) for i in range(4)]).view(2, 2, -1)
    single = [[float(sdr(x[b, c][None, None], y[b, c][None, None], RATE)) for c in range(2)] for b in range(2)]
    found = sdr(x, y, RATE)
    assert found.shape == (2,) and found.dtype == torch.float64
    assert found.tolist() == pytest.approx([sum(row) / 2 for row in single])
    assert METRICS["sdr"].function is sdr and METRICS["sdr"].direction == "higher"


def test_what_it_refuses():
    x = noise()
    with pytest.raises(ValueError, match="more than its 512 taps, got 512"):
        sdr(x[..., :512], x[..., :512], RATE)
    with pytest.raises(ValueError, match="estimate: expected a sound, got a constant"):
        sdr(x, torch.zeros_like(x), RATE)
    with pytest.raises(ValueError, match="expected the reference's shape"):
        sdr(x, x[..., 1:], RATE)
