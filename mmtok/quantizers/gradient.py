"""How the gradient passes the choice of a code, which has none of its own: straight through, or rotated."""

from __future__ import annotations

import torch
from torch import Tensor

from mmtok.quantizers.base import straight_through

GRADIENTS = ("straight_through", "rotation")
_TINY = 1e-20  # a shorter vector has no direction
_OPPOSITE = 1e-4  # |u + v| of unit vectors below which fp32 no longer knows the direction of u + v


def check_gradient(kind: str) -> None:
    """Raise ValueError unless ``kind`` is one of GRADIENTS."""
    if kind not in GRADIENTS:
        raise ValueError(f"gradient: expected one of {', '.join(GRADIENTS)}, got {kind!r}")


def choose_gradient(z: Tensor, z_q: Tensor, kind: str) -> Tensor:
    """z_q in value, exactly; its gradient goes to z alone, as ``kind`` says.

    Args:
        z: (..., D). z_q: (..., D), the chosen vectors; no gradient goes to them.
        kind: ``straight_through`` (the gradient is one) or ``rotation`` (see `rotate`).
    """
    check_gradient(kind)
    return straight_through(z, z_q) if kind == "straight_through" else rotate(z, z_q)


def rotate(z: Tensor, z_q: Tensor) -> Tensor:
    """The rotation trick: z_q = sg(|z_q| / |z| R) z, R the rotation in the plane of both that turns z towards z_q.

    With the unit vectors u of z and v of z_q and r = (u + v) / |u + v|, R = I - 2 r r' + 2 v u' (arXiv 2410.06424,
    eq. 4 to 6 there): a few scalar products a vector, no D x D matrix. The gradient that reaches z has the angle to z
    that the gradient of z_q has to z_q, and |z_q| / |z| times its length.

    Where z or z_q is 0 there is no direction to turn, and the gradient passes straight through. Where both are opposite
    the plane is not determined: r is left out, and R = I - 2 u u', which also takes u to v and keeps lengths.
    """
    e, q = z.detach(), z_q.detach()
    length, length_q = e.norm(dim=-1, keepdim=True), q.norm(dim=-1, keepdim=True)
    u, v = e / length.clamp_min(_TINY), q / length_q.clamp_min(_TINY)
    between = u + v
    size = between.norm(dim=-1, keepdim=True)
    r = torch.where(size > _OPPOSITE, between / size.clamp_min(_OPPOSITE), 0.0)
    turned = z - 2 * r * (r * z).sum(-1, keepdim=True) + 2 * v * (u * z).sum(-1, keepdim=True)
    scaled = length_q / length.clamp_min(_TINY) * turned
    moved = torch.where((length > _TINY) & (length_q > _TINY), scaled, z)
    return q + (moved - moved.detach())
