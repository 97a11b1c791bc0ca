"""Judges of sounds: signal metrics, PESQ, STOI, feature sets, and the judges of speech from `speech_scorers`.

Every function named in ``__all__`` is an entry of `mmtok.bench.scorers.SCORERS`. Networks run in float32 on the CPU,
one sound at a time. What reads 16 kHz gets both sounds resampled in one way, which its ``settings`` state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmtok.bench.audio_judging import (
    AT_16K,
    FETCH,
    RATE,
    SHORTEST,
    AudioScorer,
    helpers_folder,
    mono,
    refuse_other_sounds,
    refuse_silence,
    sample_rate_of,
    sha256,
    unscored,
    version_of,
)
from mmtok.bench.musicnn import MusicTagger, read_bundle
from mmtok.bench.records import Item
from mmtok.bench.scorers import Measure, Scorer, SetScorer, UnscoredError, Value
from mmtok.bench.speech_scorers import distillmos, dnsmos, speaker, words_sphinx, words_whisper
from mmtok.data.audio import resample
from mmtok.layers.whisper import SHIPPED, SHIPPED_SHA256, build_whisper
from mmtok.metrics import audio
from mmtok.metrics.frechet import frechet_distance, frechet_floor

FEWEST = 4  # windows of a set: `frechet_floor` takes two random halves of two

__all__ = [
    "audio_signal",
    "distillmos",
    "dnsmos",
    "fad_musicnn",
    "fad_whisper",
    "pesq",
    "speaker",
    "stoi",
    "words_sphinx",
    "words_whisper",
]


class AudioSignal(Scorer):
    """Distances of `mmtok.metrics.audio` at the item's own rate; each has its own reason where it has no value."""

    name: ClassVar[str] = "audio_signal"
    modality: ClassVar[str] = "audio"
    measures = (
        Measure("si_sdr", "dB", "higher", "scale-invariant SDR, nothing aligned: a shift of a few samples ruins it"),
        Measure("si_sdr_aligned", "dB", "higher", "SI-SDR after the delay within 50 ms was taken away, see delay"),
        Measure(
            "delay",
            "samples",
            "neither",
            "peak of the cross-correlation within 50 ms; above 0 the reconstruction is late, below 0 early",
            summary="median",
        ),
        Measure(
            "sdr",
            "dB",
            "higher",
            "BSS Eval SDR with a causal filter of 512 taps: forgives gain, equalising and up to 511 samples of "
            "lateness, but no earliness: 8 samples early scores near 0 dB, 8 samples late as a copy",
        ),
        Measure("mel_distance", "log10 (sum of 7 scales)", "lower", "multi-scale mel distance as in DAC's losses"),
        Measure("stft_distance", "dB", "lower", "log-magnitude distance, windows of 512 and 2048 samples"),
    )

    def __init__(self) -> None:
        self.backend = "mmtok.metrics.audio on torchmetrics and torchaudio"
        self.version = f"torchmetrics {version('torchmetrics')}, torchaudio {version('torchaudio')}"
        self.settings = {
            "sample_rate": "the item's",
            "resampler": "none",
            "channels": "scored one by one, mean",
            "delay_within_seconds": audio.MAX_DELAY_SECONDS,
            "sdr_taps": audio.SDR_TAPS,
            "mel_windows": audio.MEL_WINDOWS,
            "mel_bands": audio.MEL_BANDS,
            "stft_windows": audio.STFT_WINDOWS,
            "magnitude_floor": audio.MAGNITUDE_FLOOR,
        }

    def scores(self, item: Item, x_hat: Tensor) -> dict[str, Value | UnscoredError]:
        """See `Scorer.scores`. Raises ValueError where ``x_hat`` has another shape, or the item no sample rate."""
        rate = sample_rate_of(item, x_hat)
        found: dict[str, Value | UnscoredError] = {}
        functions: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
            m.name: getattr(audio, "delay_samples" if m.name == "delay" else m.name) for m in self.measures
        }
        for name, function in functions.items():
            try:
                refuse_silence(item.reference, x_hat)
                found[name] = float(function(item.reference[None], x_hat[None], rate))
            except UnscoredError as e:
                found[name] = e
            except ValueError as e:  # too short for a window, one silent channel: the metric says which
                found[name] = unscored(e)
        return found


class Quality(AudioScorer):
    """A metric of `mmtok.metrics.audio` that needs speech to be there.

    Args:
        function: (reference, estimate, rate) -> (B,). package: that computes it. rate: Hz that both are resampled to,
            None for the item's. shortest: seconds that an item must have. The others: see `AudioScorer`.
    """

    def __init__(
        self,
        function: Callable[[Tensor, Tensor, int], Tensor],
        package: str,
        measure: Measure,
        settings: Mapping[str, Any],
        rate: int | None,
        shortest: float,
    ):
        fixed = {"channels": "scored one by one, mean", "shortest_seconds": shortest}
        super().__init__((measure,), package, version_of(package, "audio-metrics"), {**settings, **fixed})
        self._function, self._rate, self._shortest = function, rate, shortest

    def values(self, item: Item, x_hat: Tensor) -> dict[str, Value]:
        rate = sample_rate_of(item, x_hat)
        refuse_other_sounds(item, self._shortest)
        refuse_silence(item.reference, x_hat)
        to = self._rate or rate
        pair = [resample(x, rate, to)[None] for x in (item.reference, x_hat)]
        try:
            return {self.measures[0].name: float(self._function(pair[0], pair[1], to))}
        except ValueError as e:
            text = str(e)
            raise unscored(f"no speech that {self.backend} finds" if "cannot score a clip" in text else e) from e


class Pesq(Quality):
    name: ClassVar[str] = "pesq"


class Stoi(Quality):
    name: ClassVar[str] = "stoi"


class AudioDistance(SetScorer):
    """Frechet audio distance (arXiv 1812.08466) on one network's features.

    Args:
        name: key in SCORERS. tag: of the network, in the measures' names. embed: mono sound (1, L) of 16 kHz ->
        (N, D), one row a window. window: of the sound behind one row, for people. The others: see `Scorer`.
    """

    modality: ClassVar[str] = "audio"

    def __init__(
        self,
        tag: str,
        embed: Callable[[Tensor], Tensor],
        window: str,
        backend: str,
        version: str,
        settings: Mapping[str, Any],
    ):
        self._embed = embed
        self.backend, self.version = backend, version
        self.measures = (
            Measure(
                f"fad[{tag}]",
                "1",
                "lower",
                f"Frechet audio distance on {backend}, all originals against all reconstructions; it compares with "
                "the same network, the same items and the same number of windows alone",
            ),
            Measure(
                f"fad_floor[{tag}]",
                "1",
                "neither",
                "two random halves of the originals against each other: what half as many windows show without a codec",
            ),
        )
        self.settings = {**AT_16K, "window": window, "covariance": "divided by N - 1", "floor_seed": 0, **settings}

    def features(self, x: Tensor, sample_rate: int | None) -> Tensor:
        """(N, D) of a sound (C, L). Raises UnscoredError: shorter than half a second, or not finite."""
        if sample_rate is None or x.ndim != 2:
            raise ValueError(f"x: expected (C, L) with its sample rate, got {tuple(x.shape)} and {sample_rate}")
        if not bool(torch.isfinite(x).all()):
            raise UnscoredError("a reconstruction with NaN or infinity")
        if x.shape[-1] < SHORTEST * sample_rate:
            raise UnscoredError(f"shorter than {SHORTEST} s")
        return self._embed(mono(x, sample_rate)).float()

    def distance(self, reference: Tensor, estimate: Tensor) -> dict[str, float]:
        """See `SetScorer.distance`. Raises UnscoredError with fewer than 4 windows."""
        if min(len(reference), len(estimate)) < FEWEST:
            raise UnscoredError(f"fewer than {FEWEST} windows of sound in the set")
        names = [m.name for m in self.measures]
        return dict(zip(names, (frechet_distance(reference, estimate), frechet_floor(reference)), strict=True))


class FadMusicnn(AudioDistance):
    name: ClassVar[str] = "fad_musicnn"


class FadWhisper(AudioDistance):
    name: ClassVar[str] = "fad_whisper"


def audio_signal(helpers: Path | None) -> AudioSignal:
    """SI-SDR raw and aligned, delay, SDR, mel and STFT distance."""
    del helpers
    return AudioSignal()


def pesq(helpers: Path | None) -> Pesq:
    """Wide-band PESQ. Raises ImportError without the extra ``audio-metrics``."""
    del helpers
    measure = Measure("pesq_wb", "MOS-LQO", "higher", "wide-band PESQ (ITU-T P.862.2), 1.0 to 4.64")
    return Pesq(audio.pesq_wb, "pesq", measure, {**AT_16K, "mode": "wb"}, RATE, 0.25)


def stoi(helpers: Path | None) -> Stoi:
    """Short-time objective intelligibility. Raises ImportError without the extra ``audio-metrics``."""
    del helpers
    measure = Measure("stoi", "1", "higher", "short-time objective intelligibility, at most 1")
    settings = {"sample_rate": 10000, "resampler": "pystoi's own, from the item's rate", "extended": False}
    return Stoi(audio.stoi, "pystoi", measure, settings, None, 0.4)


def fad_musicnn(helpers: Path | None) -> FadMusicnn:
    """Frechet audio distance on musicnn. Raises FileNotFoundError without its weights."""
    folder = helpers_folder(helpers) / "musicnn"
    data = folder / ".data-00000-of-00001"
    if not data.is_file():
        raise FileNotFoundError(f"{data} is missing (weights of the PyPI package musicnn 0.1.0); {FETCH}")
    network = MusicTagger(read_bundle(f"{folder}/"))
    return FadMusicnn(
        "musicnn-mtt",
        lambda x: network.features(x[0]),
        "3 s (187 frames), the last one ends with the sound, shorter sounds repeated",
        "musicnn of MagnaTagATune",
        "weights of 0.1.0",
        {"layer": "200 numbers in front of the tags, after their norm", "weights": sha256(data)},
    )


def fad_whisper(helpers: Path | None) -> FadWhisper:
    """Frechet audio distance on the encoder of Whisper tiny that ships with mmtok: nothing needs to be fetched."""
    del helpers
    encoder = build_whisper({"type": "whisper"})

    def embed(x: Tensor) -> Tensor:
        # Zeros up to a whole frame would be heard, at most 20 ms of the end are not.
        states = encoder(x[None, :, : x.shape[-1] // encoder.hop_length * encoder.hop_length])[0]  # (T, 384)
        window = min(1000 // 20, len(states))
        starts = [*range(0, len(states) - window, window), len(states) - window]
        return torch.stack([states[s : s + window].mean(0) for s in starts])

    return FadWhisper(
        "whisper-tiny",
        embed,
        "1 s (50 frames, their mean), the last one ends with the sound",
        "encoder of Whisper tiny, 8-bit",
        f"weights sha256:{SHIPPED_SHA256[:16]}",
        {"layer": "mean of all hidden states, each number standardised over speech", "file": SHIPPED},
    )
