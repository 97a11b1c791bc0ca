"""What is minimised: an objective has two methods, and two trainings differ in nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from mmtok.losses.adversarial import ADVERSARIAL_LOSSES, feature_matching
from mmtok.losses.reconstruction import l1, l2
from mmtok.tokenizer import Reconstruction

Terms = dict[str, Tensor]


class Objective(Protocol):
    """The contract of `training.loop.train`; the batch holds the input as ``x``."""

    @property
    def discriminator(self) -> nn.Module | None:
        """The network that plays against the tokenizer; None for no GAN."""
        ...

    def frozen_modules(self) -> Sequence[nn.Module]:
        """Helper networks: perceptual networks, loss front ends, teachers. The loop puts them on the device, in
        evaluation mode, without gradients to their weights."""
        ...

    def generator_loss(self, output: Reconstruction, batch: dict[str, Tensor], step: int) -> tuple[Tensor, Terms]:
        """Scalar to minimise over the tokenizer, and its named terms (unweighted)."""
        ...

    def discriminator_loss(self, output: Reconstruction, batch: dict[str, Tensor], step: int) -> tuple[Tensor, Terms]:
        """Scalar to minimise over the discriminator, on the detached reconstruction."""
        ...


class Adversary:
    """The GAN part that image and audio objectives share; silent before ``start`` steps.

    Args:
        discriminator: returns [(logits, feature maps)] of its parts, or None for no GAN.
        kind: ``hinge`` or ``least_squares``.
        weight, matching_weight: of the generator's adversarial and feature-matching terms.
        start: first step at which the discriminator learns and is listened to.
    """

    def __init__(
        self,
        discriminator: nn.Module | None,
        kind: str = "hinge",
        weight: float = 1.0,
        matching_weight: float = 2.0,
        start: int = 0,
    ):
        if kind not in ADVERSARIAL_LOSSES:
            raise ValueError(f"adversarial kind: expected one of {sorted(ADVERSARIAL_LOSSES)}, got {kind!r}")
        self.discriminator, self.weight, self.matching_weight, self.start = (
            discriminator,
            weight,
            matching_weight,
            start,
        )
        self.losses = ADVERSARIAL_LOSSES[kind]

    def generator_terms(self, x_hat: Tensor, x: Tensor, step: int) -> tuple[Tensor | float, Terms]:
        if self.discriminator is None or step < self.start:
            return 0.0, {}
        with torch.no_grad():
            real = self.discriminator(x)
        fake = self.discriminator(x_hat)
        adversarial, matching = self.losses.generator(fake), feature_matching(real, fake)
        total = self.weight * adversarial + self.matching_weight * matching
        return total, {"adversarial": adversarial.detach(), "feature_matching": matching.detach()}

    def discriminator_terms(self, x_hat: Tensor, x: Tensor, step: int) -> tuple[Tensor, Terms]:
        if self.discriminator is None or step < self.start:
            return torch.zeros(()), {}
        loss = self.losses.discriminator(self.discriminator(x), self.discriminator(x_hat.detach()))
        return loss, {"discriminator": loss.detach()}


class ImageObjective:
    """Pixels (L2 + L1), an optional perceptual network, the quantizer's loss, an optional GAN.

    Args:
        l2_weight, l1_weight: of the pixel terms, on values in [0, 1].
        perceptual: a module (x_hat, x) -> scalar, e.g. `losses.perceptual.load_stlpips()`.
        perceptual_weight: its weight.
        quantizer_weight: of the quantizer's own loss.
        adversary: see `Adversary`.
        aux_weights: of named losses in ``Reconstruction.aux``, e.g. ``{"ratio_loss": 2.0}``; a name that the forward
            does not give is an error.
    """

    def __init__(
        self,
        l2_weight: float = 1.0,
        l1_weight: float = 0.0,
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 0.1,
        quantizer_weight: float = 1.0,
        adversary: Adversary | None = None,
        aux_weights: Mapping[str, float] | None = None,
    ):
        self.aux_weights = dict(aux_weights or {})
        self.l2_weight, self.l1_weight = l2_weight, l1_weight
        self.perceptual, self.perceptual_weight = perceptual, perceptual_weight
        self.quantizer_weight = quantizer_weight
        self.adversary = adversary or Adversary(None)

    @property
    def discriminator(self) -> nn.Module | None:
        return self.adversary.discriminator

    def frozen_modules(self) -> Sequence[nn.Module]:
        return [] if self.perceptual is None else [self.perceptual]

    def generator_loss(self, output: Reconstruction, batch: dict[str, Tensor], step: int) -> tuple[Tensor, Terms]:
        x_hat, x = output.x_hat, batch["x"]
        square, absolute = l2(x_hat, x), l1(x_hat, x)
        loss = self.l2_weight * square + self.l1_weight * absolute + self.quantizer_weight * output.quantized.loss
        terms = {"l2": square.detach(), "psnr_db": -10 * square.detach().log10(), "l1": absolute.detach()}
        if self.perceptual is not None:
            distance = self.perceptual(x_hat, x)
            loss = loss + self.perceptual_weight * distance
            terms["perceptual"] = distance.detach()
        for name, weight in self.aux_weights.items():
            if name not in output.aux:
                raise ValueError(f"aux_weights: expected names among {sorted(output.aux)}, got {name!r}")
            loss = loss + weight * output.aux[name]
            terms[name] = output.aux[name].detach()
        gan, gan_terms = self.adversary.generator_terms(x_hat, x, step)
        return loss + gan, terms | gan_terms

    def discriminator_loss(self, output: Reconstruction, batch: dict[str, Tensor], step: int) -> tuple[Tensor, Terms]:
        return self.adversary.discriminator_terms(output.x_hat, batch["x"], step)


class AudioObjective:
    """Multi-scale mel and STFT distances, waveform L1, the quantizer's loss, an optional GAN.

    Args:
        mel, stft, spectrum: modules (x_hat, x) -> scalar; None leaves the term out.
        mel_weight, stft_weight, spectrum_weight, wave_weight, quantizer_weight: of each term.
        adversary: see `Adversary`.
    """

    def __init__(
        self,
        mel: nn.Module | None,
        stft: nn.Module | None = None,
        spectrum: nn.Module | None = None,
        mel_weight: float = 15.0,
        stft_weight: float = 1.0,
        spectrum_weight: float = 1.0,
        wave_weight: float = 0.0,
        quantizer_weight: float = 1.0,
        adversary: Adversary | None = None,
    ):
        self.mel, self.stft, self.spectrum = mel, stft, spectrum
        self.mel_weight, self.stft_weight, self.spectrum_weight = mel_weight, stft_weight, spectrum_weight
        self.wave_weight, self.quantizer_weight = wave_weight, quantizer_weight
        self.adversary = adversary or Adversary(None)

    @property
    def discriminator(self) -> nn.Module | None:
        return self.adversary.discriminator

    def frozen_modules(self) -> Sequence[nn.Module]:
        return [m for m in (self.mel, self.stft, self.spectrum) if m is not None]

    def generator_loss(self, output: Reconstruction, batch: dict[str, Tensor], step: int) -> tuple[Tensor, Terms]:
        x_hat, x = output.x_hat.float(), batch["x"]
        wave = l1(x_hat, x)
        loss = self.wave_weight * wave + self.quantizer_weight * output.quantized.loss
        terms = {"wave_l1": wave.detach()}
        for name in ("mel", "stft", "spectrum"):
            module, weight = getattr(self, name), getattr(self, f"{name}_weight")
            if module is not None:
                distance = module(x_hat, x)
                loss = loss + weight * distance
                terms[name] = distance.detach()
        gan, gan_terms = self.adversary.generator_terms(x_hat, x, step)
        return loss + gan, terms | gan_terms

    def discriminator_loss(self, output: Reconstruction, batch: dict[str, Tensor], step: int) -> tuple[Tensor, Terms]:
        return self.adversary.discriminator_terms(output.x_hat.float(), batch["x"], step)
