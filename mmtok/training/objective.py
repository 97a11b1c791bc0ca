"""What is minimised: an objective has two methods, and two trainings differ in nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from mmtok.losses.adversarial import ADVERSARIAL_LOSSES, feature_matching
from mmtok.losses.balancer import LossBalancer, weighted_sum
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

    def kept_modules(self) -> dict[str, nn.Module]:
        """Helpers that change during training without an optimizer, by name. The loop puts them on the device, saves
        their buffers with the run's state and puts them back."""
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

    @property
    def weights(self) -> dict[str, float]:
        return {"adversarial": self.weight, "feature_matching": self.matching_weight}

    def generator_losses(self, x_hat: Tensor, x: Tensor, step: int) -> Terms:
        """The generator's two losses, unweighted and with their graph; none before the start."""
        if self.discriminator is None or step < self.start:
            return {}
        with torch.no_grad():
            real = self.discriminator(x)
        fake = self.discriminator(x_hat)
        return {"adversarial": self.losses.generator(fake), "feature_matching": feature_matching(real, fake)}

    def discriminator_terms(self, x_hat: Tensor, x: Tensor, step: int) -> tuple[Tensor, Terms]:
        if self.discriminator is None or step < self.start:
            return torch.zeros(()), {}
        loss = self.losses.discriminator(self.discriminator(x), self.discriminator(x_hat.detach()))
        return loss, {"discriminator": loss.detach()}


def aux_losses(output: Reconstruction, weights: Mapping[str, float]) -> Terms:
    """The losses in ``output.aux`` that have a weight; a name that the forward did not give is an error."""
    for name in weights:
        if name not in output.aux:
            raise ValueError(f"aux_weights: expected names among {sorted(output.aux)}, got {name!r}")
    return {name: output.aux[name] for name in weights}


def _detached(losses: Terms) -> Terms:
    return {name: loss.detach() for name, loss in losses.items()}


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

    def kept_modules(self) -> dict[str, nn.Module]:
        return {}

    def generator_loss(self, output: Reconstruction, batch: dict[str, Tensor], step: int) -> tuple[Tensor, Terms]:
        x_hat, x = output.x_hat, batch["x"]
        square, absolute = l2(x_hat, x), l1(x_hat, x)
        loss = self.l2_weight * square + self.l1_weight * absolute + self.quantizer_weight * output.quantized.loss
        terms = {"l2": square.detach(), "psnr_db": -10 * square.detach().log10(), "l1": absolute.detach()}
        if self.perceptual is not None:
            distance = self.perceptual(x_hat, x)
            loss = loss + self.perceptual_weight * distance
            terms["perceptual"] = distance.detach()
        aux, gan = aux_losses(output, self.aux_weights), self.adversary.generator_losses(x_hat, x, step)
        loss = loss + weighted_sum(aux, self.aux_weights) + weighted_sum(gan, self.adversary.weights)
        return loss, terms | _detached(aux) | _detached(gan)

    def discriminator_loss(self, output: Reconstruction, batch: dict[str, Tensor], step: int) -> tuple[Tensor, Terms]:
        return self.adversary.discriminator_terms(output.x_hat, batch["x"], step)


class AudioObjective:
    """Distances of spectra and waveforms, the quantizer's loss, named losses of the forward, an optional GAN.

    Args:
        mel, stft, spectrum: modules (x_hat, x) -> scalar; None leaves the term out.
        mel_weight, stft_weight, spectrum_weight, wave_weight, quantizer_weight: of each term; the waveform's is an L1.
        adversary: see `Adversary`.
        aux_weights: of named losses in ``Reconstruction.aux``, e.g. ``{"semantic_loss": 100.0}``; a name that the
            forward does not give is an error.
        subband, subband_weight: one more such module, e.g. `losses.pqmf.SubbandSTFTLoss`, and its weight.
        balance: None: the loss is the weighted sum. A number: the terms that are computed from the sound (those above
            without the quantizer's and the named ones, and the adversary's two) share a gradient of this norm in
            proportion to their weights, see `losses.balancer.LossBalancer`; the others are added to that.
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
        aux_weights: Mapping[str, float] | None = None,
        subband: nn.Module | None = None,
        subband_weight: float = 1.0,
        balance: float | None = None,
    ):
        modules = {"mel": mel, "stft": stft, "spectrum": spectrum, "subband": subband}
        weights = {"mel": mel_weight, "stft": stft_weight, "spectrum": spectrum_weight, "subband": subband_weight}
        self.distances = {name: module for name, module in modules.items() if module is not None}
        self.adversary = adversary or Adversary(None)
        self.weights = {"wave_l1": wave_weight} | {name: weights[name] for name in self.distances}
        if self.adversary.discriminator is not None:
            self.weights |= self.adversary.weights
        self.quantizer_weight, self.aux_weights = quantizer_weight, dict(aux_weights or {})
        self.balancer = None
        if balance is not None:  # a weight of zero is no share
            self.balancer = LossBalancer({k: w for k, w in self.weights.items() if w != 0}, reference=balance)

    @property
    def discriminator(self) -> nn.Module | None:
        return self.adversary.discriminator

    def frozen_modules(self) -> Sequence[nn.Module]:
        return list(self.distances.values())

    def kept_modules(self) -> dict[str, nn.Module]:
        return {} if self.balancer is None else {"balancer": self.balancer}

    def generator_loss(self, output: Reconstruction, batch: dict[str, Tensor], step: int) -> tuple[Tensor, Terms]:
        x_hat, x = output.x_hat.float(), batch["x"]
        losses = {"wave_l1": l1(x_hat, x)} | {name: module(x_hat, x) for name, module in self.distances.items()}
        losses |= self.adversary.generator_losses(x_hat, x, step)
        aux = aux_losses(output, self.aux_weights)
        sound = weighted_sum(losses, self.weights)
        if self.balancer is not None:
            shared = {name: loss for name, loss in losses.items() if name in self.balancer.weights}
            sound = self.balancer(shared, x_hat) if shared else 0.0  # nothing but a GAN that has not started
        loss = sound + self.quantizer_weight * output.quantized.loss + weighted_sum(aux, self.aux_weights)
        return loss, _detached(losses) | _detached(aux)

    def discriminator_loss(self, output: Reconstruction, batch: dict[str, Tensor], step: int) -> tuple[Tensor, Terms]:
        return self.adversary.discriminator_terms(output.x_hat.float(), batch["x"], step)
