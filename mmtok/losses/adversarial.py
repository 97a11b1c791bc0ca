"""Adversarial losses on discriminator outputs, and feature matching.

A discriminator output is a list with one ``(logits, feature maps)`` pair for each of its parts (periods, resolutions,
...). Parts count alike: every loss is the mean over parts of a mean over elements, so that a part with more logits
(a finer resolution) does not drown the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtok.losses.discriminators import DiscriminatorOutput


def hinge_generator_loss(fake: DiscriminatorOutput) -> Tensor:
    """-mean D(x_hat), scalar float32 (arXiv 1802.05957 eq. 17). Logits may have any shape."""
    return _mean([-logits.float().mean() for logits, _ in fake], "fake")


def hinge_discriminator_loss(real: DiscriminatorOutput, fake: DiscriminatorOutput) -> Tensor:
    """mean max(0, 1 - D(x)) + mean max(0, 1 + D(x_hat)), scalar float32 (arXiv 1802.05957 eq. 16).

    Compute `fake` from a detached reconstruction.
    """
    _check_parts(real, fake)
    terms = [
        F.relu(1 - r.float()).mean() + F.relu(1 + f.float()).mean() for (r, _), (f, _) in zip(real, fake, strict=True)
    ]
    return _mean(terms, "real")


def least_squares_generator_loss(fake: DiscriminatorOutput) -> Tensor:
    """mean (D(x_hat) - 1)^2, scalar float32 (arXiv 1611.04076 eq. 9 without the factor 1/2)."""
    return _mean([(logits.float() - 1).square().mean() for logits, _ in fake], "fake")


def least_squares_discriminator_loss(real: DiscriminatorOutput, fake: DiscriminatorOutput) -> Tensor:
    """mean (D(x) - 1)^2 + mean D(x_hat)^2, scalar float32 (arXiv 1611.04076 eq. 9 without the factor 1/2).

    Compute `fake` from a detached reconstruction.
    """
    _check_parts(real, fake)
    terms = [
        (r.float() - 1).square().mean() + f.float().square().mean() for (r, _), (f, _) in zip(real, fake, strict=True)
    ]
    return _mean(terms, "real")


class AdversarialLoss(NamedTuple):
    """The two sides of one adversarial game."""

    generator: Callable[[DiscriminatorOutput], Tensor]
    discriminator: Callable[[DiscriminatorOutput, DiscriminatorOutput], Tensor]


ADVERSARIAL_LOSSES: dict[str, AdversarialLoss] = {
    "hinge": AdversarialLoss(hinge_generator_loss, hinge_discriminator_loss),
    "least_squares": AdversarialLoss(least_squares_generator_loss, least_squares_discriminator_loss),
}


def feature_matching(real: DiscriminatorOutput, fake: DiscriminatorOutput, relative: bool = False) -> Tensor:
    """Mean over all feature maps of the L1 distance to the real signal's maps (arXiv 2010.05646 eq. 4).

    Args:
        real: output for the real signal; detached here, so it never receives a gradient.
        fake: output for the reconstruction, with its graph.
        relative: divide each map's distance by the mean magnitude of the real map (arXiv 2210.13438 eq. 2), which makes
            layers of different scale count alike.

    Returns:
        Scalar float32.

    Raises:
        ValueError: outputs of different structure or shape, or without feature maps.
    """
    _check_parts(real, fake)
    terms = []
    for part, ((_, real_maps), (_, fake_maps)) in enumerate(zip(real, fake, strict=True)):
        if len(real_maps) != len(fake_maps):
            raise ValueError(f"part {part}: expected {len(real_maps)} feature maps as for real, got {len(fake_maps)}")
        for r, f in zip(real_maps, fake_maps, strict=True):
            if r.shape != f.shape:
                raise ValueError(
                    f"part {part}: feature maps {tuple(r.shape)} (real) and {tuple(f.shape)} (fake) differ; "
                    "cut the reconstruction to the real signal's size first"
                )
            target = r.detach().float()
            distance = (f.float() - target).abs().mean()
            # The clamp only matters for a map that is dead (all zero) on real data.
            terms.append(distance / target.abs().mean().clamp(min=1e-5) if relative else distance)
    return _mean(terms, "feature maps")


def _mean(terms: list[Tensor], what: str) -> Tensor:
    if not terms:
        raise ValueError(f"{what}: expected at least one element, got an empty discriminator output")
    return torch.stack(terms).mean()


def _check_parts(real: DiscriminatorOutput, fake: DiscriminatorOutput) -> None:
    if len(real) != len(fake):
        raise ValueError(
            f"fake: expected {len(real)} parts as for real, got {len(fake)}; use the same discriminator on both"
        )
