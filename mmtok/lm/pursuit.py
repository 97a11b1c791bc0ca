"""Orthogonal matching pursuit in batches: vectors as sparse combinations of others."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 8192  # rows that are combined at once
MAX_CELLS = 2**26  # numbers in the largest temporary
TOLERANCE = 1e-5  # of a length: what is shorter, relative to the whole, is rounding


def combine(targets: Tensor, atoms: Tensor, rows: Tensor, k: int) -> Tensor:
    """(N, D): for each target (N, d) the sparse combination of atoms (M, d), made of their rows (M, D) instead."""
    chosen, weights = matching_pursuit(targets, atoms, k)
    chosen, weights = chosen.cpu(), weights.cpu()
    parts = zip(chosen.split(CHUNK), weights.split(CHUNK), strict=True)
    out = []
    for which, share in parts:
        total = torch.zeros(len(which), rows.shape[1])
        for j in range(which.shape[1]):  # one anchor at a time: (N, k, D) would be vast
            total += share[:, j, None] * rows[which[:, j]]
        out.append(total)
    return torch.cat(out)


def matching_pursuit(targets: Tensor, atoms: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Orthogonal matching pursuit of all targets at once (Pati et al. 1993; used as in arXiv 2506.06607).

    Each step takes the atom of the largest |cosine| with what is left, then fits all taken atoms by least squares. The
    taken atoms are kept as an orthonormal basis (Gram-Schmidt, twice), so a step costs one product with the atoms.

    Args:
        targets: (N, d). atoms: (M, d); zero atoms are never taken. k: at most so many atoms a target.

    Returns:
        chosen (N, k') int64 and weights (N, k'), k' = min(k, M); atoms that are not needed have weight 0.
    """
    (M, d), k = atoms.shape, min(k, len(atoms))
    lengths = atoms.norm(dim=1)  # (M,)
    unit = atoms / lengths.clamp_min(torch.finfo(atoms.dtype).tiny)[:, None]
    all_chosen, all_weights = [], []
    for target in targets.split(max(1, MAX_CELLS // max(M, k * d))):
        n, rows = len(target), torch.arange(len(target), device=target.device)
        residual, basis = target.clone(), target.new_zeros(n, k, d)
        triangle = torch.eye(k, dtype=target.dtype, device=target.device).repeat(n, 1, 1)
        along_basis, chosen = target.new_zeros(n, k), torch.zeros(n, k, dtype=torch.int64, device=target.device)
        taken = (lengths == 0).expand(n, M).clone()
        floor = TOLERANCE * target.norm(dim=1)
        for step in range(k):
            best = (residual @ unit.T).abs().masked_fill(taken, -1.0).argmax(1)  # (n,)
            rest, done = atoms[best], basis[:, :step]
            for _ in range(2):  # once leaves rounding that grows with the step
                part = (done @ rest[..., None])[..., 0]  # (n, step)
                triangle[:, :step, step] += part
                rest = rest - (part[:, None] @ done)[:, 0]
            length = rest.norm(dim=1)
            useful = (length > TOLERANCE * lengths[best]) & (residual.norm(dim=1) > floor) & ~taken[rows, best]
            basis[:, step] = torch.where(useful[:, None], rest / length.clamp_min(1e-30)[:, None], 0.0)
            triangle[:, step, step] = torch.where(useful, length, 1.0)
            along_basis[:, step] = (basis[:, step] * residual).sum(1)
            residual = residual - along_basis[:, step, None] * basis[:, step]
            taken[rows, best] = True
            chosen[:, step] = best
        all_chosen.append(chosen)
        all_weights.append(torch.linalg.solve_triangular(triangle, along_basis[..., None], upper=True)[..., 0])
    return torch.cat(all_chosen), torch.cat(all_weights)
