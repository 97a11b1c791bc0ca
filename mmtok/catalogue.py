"""What is said of a tokenizer beside its codes: the columns of the survey's taxonomy, and the families of wrappers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

# The first words of each set are those of Discrete Audio Tokens (arXiv 2506.10274, its table of tokenizers); the words
# behind them are what images and classical codecs need beside those.
ARCHITECTURES = ("CNN", "RNN", "T", "Q", "MLP", "DCT", "DWT", "MDCT", "LP", "-")  # T transformer, Q learnt queries
INPUTS = ("T", "T-F", "P", "F", "L")  # time, time-frequency; pixels, features of a frozen encoder, latents
QUANTIZERS = ("RVQ", "GVQ", "SVQ", "MSRVQ", "CSRVQ", "PQ", "FSQ", "K-Means", "BQ", "PDQ", "SQ")
BITRATES = ("F", "A")  # fixed, adaptive to the input
OBJECTIVES = ("GAN", "Diff", "MP", "Feat", "Rec", "VQ", "Perc", "KL", "Con", "Ent")
AUXILIARIES = ("Dis", "SD", "SST", "TC")
DOMAINS = "SMAND"
ORDERS = ("1D", "1D causal", "2D", "file")

LEGEND = """\
architecture  encoder/decoder: CNN, RNN, T transformer, Q learnt queries, MLP; DCT, DWT, MDCT, LP (linear prediction)
              of classical codecs; - none
input         T time, T-F time-frequency; P pixels, F features of a frozen encoder, L latents of another autoencoder
quantization  RVQ residual, GVQ grouped, SVQ single, MSRVQ multi-scale, CSRVQ cross-scale, PQ product, FSQ finite,
              K-Means, BQ binary, PDQ per dimension, SQ scalar with entropy coding
bitrate       F fixed, A adaptive to the input
objective     GAN, Diff diffusion, MP masked prediction, Feat feature matching, Rec reconstruction, VQ, Perc perceptual
              network, KL, Con contrastive, Ent entropy; - made by hand
auxiliary     Dis disentanglement, SD semantic distillation, SST supervised semantics, TC text conditioning
joint         encoder, quantizer and decoder were trained together
domain        S speech, M music, A general audio; N photographs, D drawings and icons
streamable    sound can be encoded and decoded as it arrives (of the network, not of this wrapper)
order         images: 1D, 1D causal (a prefix is meant to be read from the left), 2D raster, file (bytes)
"""


@dataclasses.dataclass(frozen=True)
class Taxonomy:
    """The columns of Discrete Audio Tokens (arXiv 2506.10274) for one tokenizer, and their image analogue.

    Args:
        architecture: ``encoder/decoder``, each of `ARCHITECTURES` joined by ``+``.
        input: of `INPUTS`.
        quantization: of `QUANTIZERS`.
        bitrate: ``F`` or ``A``.
        objective: of `OBJECTIVES`; empty for what was made by hand.
        auxiliary: of `AUXILIARIES`.
        joint: whether encoder, quantizer and decoder were trained together.
        domain: letters of `DOMAINS`.
        rate: frame rate in Hz for sound, tokens a picture for images, as text.
        streamable: for sound; None for images.
        order: for images, of `ORDERS`; None for sound.

    Raises:
        ValueError: a word that is not in its set, or not exactly one of ``streamable`` and ``order``.
    """

    architecture: str
    input: str
    quantization: str
    bitrate: str
    objective: tuple[str, ...]
    auxiliary: tuple[str, ...]
    joint: bool
    domain: str
    rate: str
    streamable: bool | None = None
    order: str | None = None

    def __post_init__(self) -> None:
        for field, order in (("objective", OBJECTIVES), ("auxiliary", AUXILIARIES)):
            words = sorted(getattr(self, field), key=lambda w: (*order, w).index(w))  # one spelling of one fact
            object.__setattr__(self, field, tuple(words))
        sides = self.architecture.split("/")
        if len(sides) != 2:
            raise ValueError(f"architecture: expected encoder/decoder, got {self.architecture!r}")
        known: list[tuple[str, tuple[str, ...], Any]] = [
            ("architecture", tuple(word for side in sides for word in side.split("+")), ARCHITECTURES),
            ("input", tuple(self.input.split("+")), INPUTS),
            ("quantization", tuple(self.quantization.split("+")), QUANTIZERS),
            ("bitrate", (self.bitrate,), BITRATES),
            ("objective", self.objective, OBJECTIVES),
            ("auxiliary", self.auxiliary, AUXILIARIES),
            ("domain", tuple(self.domain), DOMAINS),
        ]
        for field, words, legal in known:
            if unknown := [w for w in words if w not in legal]:
                raise ValueError(f"{field}: expected words of {tuple(legal)}, got {unknown}")
        if not self.domain or not self.rate:
            raise ValueError(f"domain and rate: expected text, got {self.domain!r} and {self.rate!r}")
        if (self.streamable is None) == (self.order is None):
            raise ValueError("expected exactly one of streamable (sound) and order (images)")
        if self.order is not None and self.order not in ORDERS:
            raise ValueError(f"order: expected one of {ORDERS}, got {self.order!r}")

    def cells(self) -> dict[str, str]:
        """Every column as text, in the order of the survey; the last but one is ``streamable`` or ``order``."""
        last = {"order": self.order} if self.streamable is None else {"streamable": "y" if self.streamable else "n"}
        return {
            "architecture": self.architecture,
            "input": self.input,
            "quantization": self.quantization,
            "bitrate": self.bitrate,
            "objective": ", ".join(self.objective) or "-",
            "auxiliary": ", ".join(self.auxiliary) or "-",
            "joint": "y" if self.joint else "n",
            "domain": self.domain,
            **{k: str(v) for k, v in last.items()},
            "rate": self.rate,
        }


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of other people's tokenizers: ``mmtok.load("<name>:<source>")``.

    Args:
        name: before the colon.
        title: what it is, in a few words.
        modality: ``image`` or ``audio``.
        source: what stands after the colon, in words, e.g. ``folder or hub repository`` or ``quality 1..95``.
        example: a whole name, e.g. ``encodec:facebook/encodec_24khz``.
        package: the package that runs it, imported at use.
        install: the command that installs the package.
        code_licence: of that package.
        weights_licence: of the published weights; a model card in the folder overrules it.
        taxonomy: of the published models; ``rate`` names them all.
        open: source -> tokenizer.
    """

    name: str
    title: str
    modality: str
    source: str
    example: str
    package: str
    install: str
    code_licence: str
    weights_licence: str
    taxonomy: Taxonomy
    open: Callable[[str], Any] = dataclasses.field(repr=False)
