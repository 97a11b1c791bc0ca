"""Judges of speech: predicted opinions, recognised words, speakers. Entries of `SCORERS` by way of `audio_scorers`.

None has a value for items whose label ``kind`` names something else than speech; without the label they count as it.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmtok.bench.audio_judging import (
    AT_16K,
    RATE,
    SHORTEST,
    AudioScorer,
    from_extra,
    helpers_folder,
    mono,
    refuse_other_sounds,
    refuse_silence,
    sample_rate_of,
    sha256,
    version_of,
)
from mmtok.bench.recognition import SphinxRecogniser, WhisperRecogniser, join_whisper, normaliser, word_errors
from mmtok.bench.records import Item
from mmtok.bench.scorers import Measure, UnscoredError, Value
from mmtok.bench.speaker_network import load_speaker_encoder


class Opinion(AudioScorer):
    """Opinions that a network predicts of one sound alone.

    Args:
        judge: mono sound (L,) of 16 kHz in [-1, 1] -> the measures. The others: see `AudioScorer`.
    """

    def __init__(
        self,
        judge: Callable[[Tensor], dict[str, float]],
        measures: tuple[Measure, ...],
        backend: str,
        version: str,
        settings: Mapping[str, Any],
    ):
        fixed = {**AT_16K, "clipped": "to [-1, 1]", "shortest_seconds": SHORTEST}
        super().__init__(measures, backend, version, {**fixed, **settings})
        self._judge = judge

    def values(self, item: Item, x_hat: Tensor) -> dict[str, Value]:
        rate = sample_rate_of(item, x_hat)
        refuse_other_sounds(item, SHORTEST)
        x = mono(x_hat, rate).clamp(-1, 1)  # as a file would hold it
        refuse_silence(x_hat=x)
        return dict(self._judge(x[0]))


class DnsMos(Opinion):
    name: ClassVar[str] = "dnsmos"


class DistillMos(Opinion):
    name: ClassVar[str] = "distillmos"


class Words(AudioScorer):
    """Word and character errors of a recogniser against the item's text, as pairs (errors, words or characters).

    Args:
        recognise: mono sound (1, L) of 16 kHz -> its words. The others: see `AudioScorer`.
    """

    def __init__(
        self,
        recognise: Callable[[Tensor], str],
        suffix: str,
        backend: str,
        version: str,
        settings: Mapping[str, Any],
    ):
        what = f"as {backend} hears it: substitutions, deletions and insertions over those of the transcript"
        measures = (
            Measure(f"wer{suffix}", "1", "lower", f"word errors, {what}", summary="ratio", absolute=True),
            Measure(f"cer{suffix}", "1", "lower", f"character errors, {what}", summary="ratio", absolute=True),
        )
        fixed = {**AT_16K, "language": "en", "normaliser": "Whisper's English one (transformers)"}
        fixed |= {"errors": f"jiwer {version_of('jiwer', 'asr')}"}
        super().__init__(measures, backend, version, {**fixed, **settings})
        self._recognise = recognise
        self._plain = normaliser()

    def values(self, item: Item, x_hat: Tensor) -> dict[str, Value]:
        rate = sample_rate_of(item, x_hat)
        refuse_other_sounds(item, 0.0)
        if not item.text:
            raise UnscoredError("no transcript")
        if not (item.labels.get("language") or "en").lower().startswith("en"):
            raise UnscoredError(f"spoken in {item.labels['language']}, the recogniser is English")
        if not any(c.isalnum() for c in self._plain(item.text)):
            raise UnscoredError("a transcript without words")
        # Silence is heard as no words at all, which is what it should cost.
        heard = self._recognise(mono(x_hat, rate).clamp(-1, 1))
        errors, words = word_errors([item.text], [heard])[0]
        wrong, characters = character_errors(self._plain(item.text).strip(), self._plain(heard).strip())
        wer, cer = (m.name for m in self.measures)
        return {wer: (float(errors), float(words)), cer: (float(wrong), float(characters))}


class WordsWhisper(Words):
    name: ClassVar[str] = "words_whisper"


class WordsSphinx(Words):
    name: ClassVar[str] = "words_sphinx"


class SpeakerSimilarity(AudioScorer):
    """Cosine of the speaker embeddings of original and reconstruction.

    Args:
        embed: mono sound (1, L) of 16 kHz -> (D,) of length 1. version, settings: see `Scorer`.
    """

    name: ClassVar[str] = "speaker"

    def __init__(self, embed: Callable[[Tensor], Tensor], version: str, settings: Mapping[str, Any]):
        about = (
            "cosine of GE2E d-vectors of original and reconstruction; two clips of one voice have about 0.78, of two "
            "voices 0.50 (measured over 42 speakers, 6 clips each)"
        )
        measure = Measure("speaker_similarity", "1", "higher", about)
        fixed = {**AT_16K, "shortest_seconds": SHORTEST, "windows": "1.6 s, 1.3 a second", "voice_detector": "none"}
        super().__init__((measure,), "GE2E d-vectors of resemblyzer", version, {**fixed, **settings})
        self._embed = embed

    def values(self, item: Item, x_hat: Tensor) -> dict[str, Value]:
        rate = sample_rate_of(item, x_hat)
        refuse_other_sounds(item, SHORTEST)
        pair = [mono(x, rate) for x in (item.reference, x_hat)]
        refuse_silence(*pair)
        a, b = (self._embed(x).double() for x in pair)
        return {"speaker_similarity": float(F.cosine_similarity(a, b, dim=0))}


def character_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """(errors, characters of the reference) by jiwer, spaces among them. Raises ImportError without ``asr``."""
    try:
        import jiwer
    except ImportError as e:
        raise ImportError("character errors are counted by jiwer: pip install 'mmtok[asr]'") from e
    out = jiwer.process_characters(reference, hypothesis)
    return out.substitutions + out.deletions + out.insertions, len(reference)


def dnsmos(helpers: Path | None) -> DnsMos:
    """DNSMOS P.835 and P.808 and PLCMOS. Raises ImportError without the extra ``judges``."""
    del helpers
    package, losses = (from_extra(f"speechmos.{name}", "judges") for name in ("dnsmos", "plcmos"))
    folder = Path(package.__file__).parent
    files = [folder / "dnsmos_models" / name for name in ("sig_bak_ovr.onnx", "model_v8.onnx")]
    noise = package.DNSMOS(*map(str, files))
    noise.onnx_sess, noise.p808_onnx_sess = _session(files[0]), _session(files[1])
    lost = losses.PLCMOS()
    lost.session = _session(Path(lost.model_path))

    def judge(x: Tensor) -> dict[str, float]:
        found = noise(x.numpy(), RATE, False)
        values = {f"dnsmos_{key}": float(found[f"{key}_mos"]) for key in ("ovrl", "sig", "bak", "p808")}
        drawn = np.random.get_state()  # PLCMOS draws its 15 raters from numpy's global generator
        np.random.seed(0)
        try:
            return {**values, "plcmos": float(lost(x.numpy())["plcmos"])}
        finally:
            np.random.set_state(drawn)

    what = {
        "dnsmos_ovrl": "DNSMOS P.835, overall quality of speech; it hears noise, not missing high frequencies",
        "dnsmos_sig": "DNSMOS P.835, quality of the voice",
        "dnsmos_bak": "DNSMOS P.835, quality of the background",
        "dnsmos_p808": "DNSMOS P.808, overall quality of speech",
        "plcmos": "PLCMOS v2, quality of speech after lost packets were concealed; steady noise is not what it judges",
    }
    measures = tuple(Measure(name, "MOS", "higher", about, absolute=True) for name, about in what.items())
    settings = {
        "short_sounds": "DNSMOS repeats what is shorter than 9.01 s",
        "plcmos_raters": "15, drawn with seed 0",
        "threads": 1,
        "onnxruntime": version("onnxruntime"),
        "librosa": version("librosa"),
        "weights": {path.name: sha256(path) for path in (*files, Path(lost.model_path))},
    }
    return DnsMos(judge, measures, "speechmos", version("speechmos"), settings)


def distillmos(helpers: Path | None) -> DistillMos:
    """DistillMOS. Raises ImportError without the extra ``judges``."""
    del helpers
    package = from_extra("distillmos", "judges")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints where its weights lie
        network = package.ConvTransformerSQAModel().eval()

    def judge(x: Tensor) -> dict[str, float]:
        with torch.no_grad():
            return {"distillmos": float(network(x[None]))}

    measure = Measure("distillmos", "MOS", "higher", "DistillMOS (arXiv 2502.05356), quality of speech", absolute=True)
    weights = Path(package.__file__).parent / "weights" / "distill_mos_v7.pt"
    settings = {"windows": "7.68 s, zeros behind shorter sounds", "level": "peak 1", "weights": sha256(weights)}
    return DistillMos(judge, (measure,), "distillmos", version("distillmos"), settings)


def words_whisper(helpers: Path | None) -> WordsWhisper:
    """Errors of Whisper base. Raises ImportError without the extra ``asr``, FileNotFoundError without its model."""
    folder = join_whisper(helpers_folder(helpers))
    recogniser = WhisperRecogniser(folder)
    settings = {"decoding": "greedy, 8-bit, no 4 words twice in a row", "weights": sha256(folder / "model.bin")}
    installed = f"faster-whisper {version('faster-whisper')}"
    return WordsWhisper(recogniser, "", recogniser.name, installed, settings)


def words_sphinx(helpers: Path | None) -> WordsSphinx:
    """Errors of pocketsphinx. Raises ImportError without the extra ``asr``."""
    del helpers
    recogniser = SphinxRecogniser()

    def recognise(x: Tensor) -> str:
        # Its running mean of the spectrum goes on from sound to sound, and would make results depend on their order.
        recogniser.decoder.reinit_feat()
        return recogniser(x)

    settings = {"model": "US English of the package", "state": "reset before every sound"}
    return WordsSphinx(recognise, "_sphinx", recogniser.name, f"pocketsphinx {version('pocketsphinx')}", settings)


def speaker(helpers: Path | None) -> SpeakerSimilarity:
    """Speaker similarity. Raises FileNotFoundError without the weights."""
    folder = helpers_folder(helpers) / "resemblyzer"
    network = load_speaker_encoder(folder)
    return SpeakerSimilarity(network.embed, "weights of 0.1.4", {"weights": sha256(folder / "pretrained.pt")})


def _session(path: Path) -> Any:
    """One thread: sums in one order, and no threads beside those of torch."""
    runtime = from_extra("onnxruntime", "judges")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
