"""Metrics of sound: PESQ, STOI, SI-SDR raw and delay-aligned, SDR, multi-scale mel and log-STFT distance.

Sounds are (B,C,L) floats in [-1,1] with their sample rate in Hz; every function gives (B,) float64 on the CPU (channels
are scored one by one and averaged). Nothing is resampled or padded here: what a metric cannot score is a ValueError,
never a made-up value, because one silent default shifts a whole benchmark.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

MEL_WINDOWS = (32, 64, 128, 256, 512, 1024, 2048)  # samples
MEL_BANDS = (5, 10, 20, 40, 80, 160, 320)
STFT_WINDOWS = (512, 2048)  # samples
MAGNITUDE_FLOOR = 1e-5
MAX_DELAY_SECONDS = 0.05
SDR_TAPS = 512  # samples: the filter of BSS Eval


def pesq_wb(reference: Tensor, estimate: Tensor, sample_rate: int) -> Tensor:
    """Wide-band PESQ (ITU-T P.862.2) by the `pesq` package.

    Args:
        reference: (B,C,L) float, speech of at least 0.25 s.
        estimate: same shape.
        sample_rate: Hz, 16000 only.

    Returns:
        (B,) MOS-LQO in about [1.0, 4.64], higher is better.

    Raises:
        ValueError: another rate, shapes that differ, silence, NaN, or a clip in which PESQ finds no speech.
        ImportError: the extra ``audio-metrics`` is missing.
    """
    return _pesq(reference, estimate, sample_rate, "wb", (16000,))


def pesq_nb(reference: Tensor, estimate: Tensor, sample_rate: int) -> Tensor:
    """Narrow-band PESQ (ITU-T P.862.1) by the `pesq` package; as `pesq_wb`, at 8 or 16 kHz, in about [1.0, 4.55]."""
    return _pesq(reference, estimate, sample_rate, "nb", (8000, 16000))


def _pesq(reference: Tensor, estimate: Tensor, sample_rate: int, mode: str, rates: tuple[int, ...]) -> Tensor:
    reference, estimate = _checked_pair(reference, estimate, sample_rate)
    if sample_rate not in rates:
        raise ValueError(
            f"PESQ-{mode}: expected a sample rate of {' or '.join(map(str, rates))} Hz, got {sample_rate}; "
            "resample both sounds first"
        )
    _refuse_constant("estimate", estimate)
    package = _from_extra("pesq")

    def score(r: Tensor, e: Tensor) -> float:
        try:
            return float(package.pesq(sample_rate, r.numpy(), e.numpy(), mode))
        except package.PesqError as error:
            detail = error.args[0] if error.args else type(error).__name__
            text = detail.decode() if isinstance(detail, bytes) else str(detail)
            raise ValueError(
                f"PESQ-{mode} cannot score a clip of {len(r) / sample_rate:.2f} s ({text}); "
                "it needs at least 0.25 s with audible speech: leave such clips out and report how many"
            ) from error

    return _by_channel(score, reference, estimate, f"PESQ-{mode}")


def stoi(reference: Tensor, estimate: Tensor, sample_rate: int) -> Tensor:
    """Short-time objective intelligibility (Taal et al. 2011, eq. 6) by the `pystoi` package (which works at 10 kHz).

    Args:
        reference: (B,C,L) float, with at least about 0.4 s that is not silence.
        estimate: same shape.
        sample_rate: Hz.

    Returns:
        (B,), at most 1, higher is better.

    Raises:
        ValueError: shapes that differ, silence, NaN, or too little speech for one 384 ms segment.
        ImportError: the extra ``audio-metrics`` is missing.
    """
    reference, estimate = _checked_pair(reference, estimate, sample_rate)
    package = _from_extra("pystoi")

    def score(r: Tensor, e: Tensor) -> float:
        try:
            with warnings.catch_warnings():
                # pystoi warns and gives 1e-5 when the clip is too short: that number must never enter a mean.
                warnings.simplefilter("error", RuntimeWarning)
                return float(package.stoi(r.numpy(), e.numpy(), sample_rate, extended=False))
        except (RuntimeWarning, ValueError, IndexError) as error:
            raise ValueError(
                f"STOI cannot score a clip of {len(r) / sample_rate:.2f} s: expected at least about 0.4 s of speech "
                f"that is not silence ({str(error)[:80]}); leave such clips out and report how many"
            ) from error

    return _by_channel(score, reference, estimate, "STOI")


def si_sdr(reference: Tensor, estimate: Tensor, sample_rate: int) -> Tensor:
    """Scale-invariant signal-to-distortion ratio (arXiv 1811.02508 eq. 4, means removed) by torchmetrics.

    A delay of a few samples ruins it although nobody hears it; `si_sdr_aligned` stands beside it for that reason.

    Args:
        reference: (B,C,L) float.
        estimate: same shape.
        sample_rate: Hz; checked, the value does not depend on it.

    Returns:
        (B,) dB, higher is better.

    Raises:
        ValueError: shapes that differ, a constant signal, NaN.
    """
    reference, estimate = _checked_pair(reference, estimate, sample_rate)
    _refuse_constant("estimate", estimate)
    return _si_sdr(reference, estimate)


def _si_sdr(reference: Tensor, estimate: Tensor) -> Tensor:
    from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

    reference, estimate = reference.cpu().double(), estimate.cpu().double()
    return scale_invariant_signal_distortion_ratio(estimate, reference, zero_mean=True).mean(dim=-1)  # (B,C) -> (B,)


def sdr(reference: Tensor, estimate: Tensor, sample_rate: int) -> Tensor:
    """Signal-to-distortion ratio of BSS Eval (Vincent et al. 2006, DOI 10.1109/TSA.2005.858005) for one source, by
    torchmetrics: what a causal filter of 512 taps cannot make of the reference counts as distortion.

    The filter forgives a gain, an equaliser and lateness up to 511 samples, never earliness: a copy 8 samples late
    scores as a copy, 8 samples early (as DAC at 16 and 24 kHz) as noise. `si_sdr` forgives neither, `si_sdr_aligned`
    both.

    Args:
        reference: (B,C,L) float, L above 512.
        estimate: same shape.
        sample_rate: Hz; checked, the value does not depend on it.

    Returns:
        (B,) dB, higher is better; infinite for a copy at any gain.

    Raises:
        ValueError: shapes that differ, a constant signal, NaN, clips too short.
    """
    reference, estimate = _checked_pair(reference, estimate, sample_rate)
    _refuse_constant("estimate", estimate)
    if reference.shape[-1] <= SDR_TAPS:
        raise ValueError(f"SDR: expected more than its {SDR_TAPS} taps, got {reference.shape[-1]}; use longer clips")
    r, e = reference.cpu().double(), estimate.cpu().double()
    values = torch.stack([_sdr(a, b) for a, b in zip(r.flatten(0, 1), e.flatten(0, 1), strict=True)]).view(r.shape[:2])
    gain = (r * e).sum(-1, keepdim=True) / r.square().sum(-1, keepdim=True)
    # Of a copy, rounding alone decides what comes out: 260 dB, 300 dB, infinity.
    copied = (e - gain * r).abs().amax(-1) <= 1e-6 * e.abs().amax(-1)  # (B,C)
    return values.masked_fill(copied, torch.inf).mean(dim=-1)


def _sdr(reference: Tensor, estimate: Tensor) -> Tensor:
    """Of one channel (L,)."""
    from torchmetrics.functional.audio import signal_distortion_ratio

    with contextlib.suppress(torch.linalg.LinAlgError):
        value = signal_distortion_ratio(estimate, reference, filter_length=SDR_TAPS)
        if not bool(value.isnan()):
            return value
    # Pure tones have no single best filter, and what a filter explains whole has a negative rest by rounding: a little
    # noise in the reference settles both, and leaves values below 80 dB as they are.
    return signal_distortion_ratio(estimate, reference, filter_length=SDR_TAPS, load_diag=1e-10)


def align(reference: Tensor, estimate: Tensor, max_shift: int) -> tuple[Tensor, Tensor]:
    """Find the delay of `estimate` by cross-correlation (FFT, all channels together) and take it away.

    Args:
        reference: (B,C,L) float.
        estimate: same shape.
        max_shift: largest delay to look for, in samples, 0 <= max_shift < L.

    Returns:
        shift (B,) int64 samples on the CPU, positive where the estimate is late; and the estimate moved by it, (B,C,L)
        float32 on its device, with zeros where nothing is known (|shift| samples at one end).

    Raises:
        ValueError: shapes that differ, a constant signal, NaN, a max_shift out of range.
    """
    reference, estimate = _checked_pair(reference, estimate, 1)
    _refuse_constant("estimate", estimate)
    L = reference.shape[-1]
    if not 0 <= max_shift < L:
        raise ValueError(f"max_shift: expected 0..{L - 1} samples for clips of {L}, got {max_shift}; lower it")
    shift = _shifts(reference, estimate, max_shift)
    source = torch.arange(L, device=estimate.device) + shift[:, None].to(estimate.device)  # (B,L)
    inside = (source >= 0) & (source < L)
    moved = estimate.gather(-1, source.clamp(0, L - 1)[:, None].expand_as(estimate))
    return shift, torch.where(inside[:, None], moved, 0.0)


def _shifts(reference: Tensor, estimate: Tensor, max_shift: int) -> Tensor:
    L = reference.shape[-1]
    r, e = (x.cpu().double() for x in (reference, estimate))
    r, e = (x - x.mean(dim=-1, keepdim=True) for x in (r, e))
    n = 1 << (L + max_shift).bit_length()  # room for both signs of the shift without wrapping
    spectrum = torch.fft.rfft(r, n).conj() * torch.fft.rfft(e, n)
    correlation = torch.fft.irfft(spectrum, n).sum(dim=1)  # (B,n): at k, sum over l of r[l] e[l + k]
    lags = torch.arange(-max_shift, max_shift + 1)
    # Smallest |lag| first, so that a tie (a periodic sound) is no delay rather than a whole period.
    lags = lags[torch.argsort(lags.abs(), stable=True)]
    return lags[correlation[:, lags % n].argmax(dim=-1)]  # (B,)


def si_sdr_aligned(reference: Tensor, estimate: Tensor, sample_rate: int) -> Tensor:
    """SI-SDR after `align` within 50 ms, over the samples that both sounds have; `delay` says what was taken away.

    Arguments, unit and errors as in `si_sdr`; clips must last more than 100 ms.
    """
    reference, estimate, limit = _delay_inputs(reference, estimate, sample_rate)
    rows = []
    for b, shift in enumerate(_shifts(reference, estimate, limit).tolist()):
        kept = reference.shape[-1] - abs(shift)
        first, late = max(0, -shift), max(0, shift)
        r, e = reference[b : b + 1, :, first : first + kept], estimate[b : b + 1, :, late : late + kept]
        for name, x in (("reference", r), ("estimate", e)):
            _refuse_constant(name, x)
        rows.append(_si_sdr(r, e))
    return torch.cat(rows)


def delay_samples(reference: Tensor, estimate: Tensor, sample_rate: int) -> Tensor:
    """Delay of the estimate with its sign, (B,) int64 samples: the peak of the cross-correlation within +-50 ms.

    Positive: the estimate is late, estimate[l + delay] ~ reference[l]; DAC at 16 and 24 kHz has -8, it is early. This
    is what a codec's card states. Arguments and errors as in `si_sdr_aligned`; `align` takes a limit of your own.
    """
    return _shifts(*_delay_inputs(reference, estimate, sample_rate))


def delay(reference: Tensor, estimate: Tensor, sample_rate: int) -> Tensor:
    """How far the estimate is out of step, (B,) samples >= 0: `delay_samples` without its sign, for a table of metrics
    where lower is better."""
    return delay_samples(reference, estimate, sample_rate).abs().double()


def _delay_inputs(reference: Tensor, estimate: Tensor, sample_rate: int) -> tuple[Tensor, Tensor, int]:
    reference, estimate = _checked_pair(reference, estimate, sample_rate)
    _refuse_constant("estimate", estimate)
    limit = round(MAX_DELAY_SECONDS * sample_rate)
    if reference.shape[-1] <= 2 * limit:
        raise ValueError(
            f"a delay is looked for within {limit} samples, so clips need more than {2 * limit}, got "
            f"{reference.shape[-1]}; use longer clips, or align() with a max_shift of your own"
        )
    return reference, estimate, limit


def mel_distance(reference: Tensor, estimate: Tensor, sample_rate: int) -> Tensor:
    """Multi-scale mel distance as DAC defines it (arXiv 2306.06546 section 3.4): sum over 7 scales of the mean
    |log10 mel - log10 mel_hat| of magnitudes clamped at 1e-5.

    Windows 32 ... 2048 samples (periodic Hann, hop a quarter), 5 ... 320 slaney bands up to half the sample rate; bands
    too narrow for the FFT stay in the mean as zeros, as in DAC, so that the values compare with published ones.

    Args:
        reference: (B,C,L) float, L above 1024.
        estimate: same shape.
        sample_rate: Hz; values at different rates do not compare.

    Returns:
        (B,) in decades of magnitude summed over scales, lower is better, 0 for equal sounds.

    Raises:
        ValueError: shapes that differ, a constant reference, NaN, clips too short for the longest window.
    """
    reference, estimate = _checked_pair(reference, estimate, sample_rate)
    from torchaudio.functional import melscale_fbanks

    total = reference.new_zeros(reference.shape[0])
    for window, bands in zip(MEL_WINDOWS, MEL_BANDS, strict=True):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="At least one mel filterbank has all zero")  # known: see above
            bank = melscale_fbanks(
                window // 2 + 1, 0.0, sample_rate / 2, bands, sample_rate, norm="slaney", mel_scale="slaney"
            ).to(reference.device)  # (F, bands)
        pair = [bank.T @ _magnitude(x, window) for x in (reference, estimate)]
        total += _log10_difference(pair[0], pair[1])
    return total.cpu().double()


def stft_distance(reference: Tensor, estimate: Tensor, sample_rate: int) -> Tensor:
    """Mean |20 log10 |S| - 20 log10 |S_hat|| over windows of 512 and 2048 samples (hop a quarter, periodic Hann,
    magnitudes clamped at 1e-5): the log part of DAC's multi-scale STFT loss (arXiv 1910.11480 eq. 5), in dB.

    Returns:
        (B,) dB, lower is better. Arguments and errors as in `mel_distance`.
    """
    reference, estimate = _checked_pair(reference, estimate, sample_rate)
    total = reference.new_zeros(reference.shape[0])
    for window in STFT_WINDOWS:
        total += 20 * _log10_difference(_magnitude(reference, window), _magnitude(estimate, window))
    return (total / len(STFT_WINDOWS)).cpu().double()


def _magnitude(x: Tensor, window: int) -> Tensor:
    B, C, L = x.shape
    reflected = window // 2  # samples mirrored at each end
    if reflected >= L:
        raise ValueError(
            f"expected more than {reflected} samples for the {window}-sample window, got {L}; use longer clips"
        )
    hann = torch.hann_window(window, device=x.device)
    frames = torch.stft(x.reshape(B * C, L), window, window // 4, window=hann, return_complex=True)
    return frames.abs().reshape(B, C, *frames.shape[1:])  # (B,C,F,frames)


def _log10_difference(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.clamp(min=MAGNITUDE_FLOOR).log10(), b.clamp(min=MAGNITUDE_FLOOR).log10()
    return (a - b).abs().flatten(1).mean(dim=1)  # (B,)


def _by_channel(score: Callable[[Tensor, Tensor], float], reference: Tensor, estimate: Tensor, metric: str) -> Tensor:
    B, C, L = reference.shape
    pairs = zip(reference.reshape(B * C, L).cpu(), estimate.reshape(B * C, L).cpu(), strict=True)
    values = torch.tensor([score(r, e) for r, e in pairs], dtype=torch.float64).reshape(B, C)
    if not bool(torch.isfinite(values).all()):
        b = int((~torch.isfinite(values)).nonzero()[0, 0])
        raise ValueError(f"{metric} has no finite value for item {b}; leave such clips out and report how many")
    return values.mean(dim=1)  # (B,)


def _from_extra(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"this metric computes with {name} and needs the extra 'audio-metrics': pip install 'mmtok[audio-metrics]'"
        ) from error


def _checked_pair(reference: Tensor, estimate: Tensor, sample_rate: int) -> tuple[Tensor, Tensor]:
    if reference.shape != estimate.shape:
        raise ValueError(
            f"estimate: expected the reference's shape {tuple(reference.shape)}, got {tuple(estimate.shape)}; "
            "cut both to the same channels and length"
        )
    if reference.ndim != 3 or 0 in reference.shape:
        raise ValueError(
            f"sounds: expected a non-empty (B,C,L), got {tuple(reference.shape)}; use x[None, None] on (L,)"
        )
    if isinstance(sample_rate, bool) or not isinstance(sample_rate, int) or sample_rate < 1:
        raise ValueError(f"sample_rate: expected a whole number of Hz above 0, got {sample_rate!r}; pass e.g. 16000")
    for name, x in (("reference", reference), ("estimate", estimate)):
        if not x.is_floating_point():
            raise ValueError(f"{name}: expected floats in [-1,1], got {x.dtype}; divide 16-bit samples by 32768")
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name}: expected finite samples, got NaN or infinity; check the decoder")
    reference, estimate = reference.detach().float(), estimate.detach().float()
    _refuse_constant("reference", reference)
    return reference, estimate


def _refuse_constant(name: str, x: Tensor) -> None:
    constant = x.amax(dim=-1) == x.amin(dim=-1)  # (B,C)
    if bool(constant.any()):
        b, c = (int(i) for i in constant.nonzero()[0])
        raise ValueError(
            f"{name}: expected a sound, got a constant (silence) at item {b}, channel {c}; "
            "leave silent clips out and report how many"
        )
