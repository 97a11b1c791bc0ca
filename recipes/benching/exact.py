"""What exact arithmetic answers, in fp64, and how far a contestant's codes are from it.

A code is wrong when another code is nearer by more than the rounding of fp64 itself, or as near and lower. In a chain
of levels a row counts once, at the first level where its codes leave those of the fp64 chain: up to there both have
the same residual, so the two codes can be compared. Chains are run in fp32 by everybody, which rounds the residuals;
`Answer.rounding` tells how much of a difference that alone can make, and only more than it is an error of ours.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from benching.protocol import Verdict

NEAR_TIE = 2.0**-20  # of |x| max|c|: about what fp32 scores cannot tell apart
_BLOCK = 1 << 24  # fp64 scores at a time: 128 MiB


@dataclasses.dataclass(frozen=True)
class Answer:
    """fp64 codes of N rows over Q levels.

    Args:
        codes: (N, Q) int64. rows: Q tensors (N, d), what each level had to code. codebooks: Q tensors (K, d).
        near_ties: (N, Q) bool, the best two codes differ by less than `NEAR_TIE`.
        rounding: (N,) bound on what fp32 residuals and scores may change, as a difference of half squared distances;
            None where every code must be that of exact arithmetic.
    """

    codes: Tensor
    rows: list[Tensor]
    codebooks: list[Tensor]
    near_ties: Tensor
    rounding: Tensor | None = None


def unit64(x: Tensor) -> Tensor:
    x = x.double()
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-300)


def nearest64(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, d), codebook (K, d), fp64 -> codes (N,), the lowest of equals, and near_ties (N,) bool."""
    centre = codebook.mean(0)
    x, c = x - centre, codebook - centre
    norms, longest = 0.5 * c.square().sum(1), c.norm(dim=1).max()
    codes = torch.empty(len(x), dtype=torch.int64, device=x.device)
    near = torch.empty(len(x), dtype=torch.bool, device=x.device)
    step = max(1, _BLOCK // len(c))
    for start in range(0, len(x), step):
        block = x[start : start + step]
        scores = torch.addmm(norms, block, c.T, alpha=-1)  # (n, K)
        best, code = scores.min(1)
        codes[start : start + step] = code
        if len(c) > 1:
            second = scores.scatter_(1, code[:, None], torch.inf).min(1).values
            near[start : start + step] = second - best < NEAR_TIE * block.norm(dim=1) * longest
        else:
            near[start : start + step] = False
    return codes, near


def answer(z: Tensor, codebook: Tensor, metric: str = "euclidean") -> Answer:
    """One level, exact: no rounding is forgiven. z (N, D), codebook (K, D)."""
    x, c = (unit64(z), unit64(codebook)) if metric == "cosine" else (z.double(), codebook.double())
    codes, near = nearest64(x, c)
    return Answer(codes[:, None], [x], [c], near[:, None])


def chain_answer(z: Tensor, codebooks: Tensor) -> Answer:
    """The residual chain r_{q+1} = r_q - C_q[k_q]. z (N, D), codebooks (Q, K, D)."""
    residual, rows, books, columns, near = z.double(), [], [], [], []
    for codebook in codebooks.double():
        code, tie = nearest64(residual, codebook)
        rows.append(residual)
        books.append(codebook)
        columns.append(code)
        near.append(tie)
        residual = residual - codebook[code]
    # Each of Q subtractions rounds by 2^-24 of the residual, and the score by a few more.
    longest = torch.stack([c.norm(dim=1).max() for c in books]).max()
    rounding = (len(books) * 2.0**-23 + 2.0**-21) * (rows[0].norm(dim=1) + longest) * longest
    return Answer(torch.stack(columns, 1), rows, books, torch.stack(near, 1), rounding)


def factorised_answer(z: Tensor, into: list, codebooks: Tensor, out: list) -> Answer:
    """DAC's chain: level q codes the direction of W_q r + b_q, and r loses the projection back of its code.

    z (N, D); into, out: Q pairs (weight, bias); codebooks (Q, K, d).
    """
    residual, rows, books, columns, near = z.double(), [], [], [], []
    for (w_in, b_in), codebook, (w_out, b_out) in zip(into, codebooks.double(), out, strict=True):
        rows.append(unit64(residual @ w_in.double().T + b_in.double()))
        books.append(unit64(codebook))
        code, tie = nearest64(rows[-1], books[-1])
        columns.append(code)
        near.append(tie)
        residual = residual - codebook[code] @ w_out.double().T - b_out.double()
    # Unit vectors on both sides; a product over D = 1024 in fp32 has a relative error of some 2^-24 sqrt(D).
    rounding = torch.full((len(z),), (len(books) + 8) * 2.0**-19, dtype=torch.float64, device=z.device)
    return Answer(torch.stack(columns, 1), rows, books, torch.stack(near, 1), rounding)


def judge_codes(truth: Answer, codes: Tensor) -> Verdict:
    """codes (N, Q), or for one level of any shape with N of them, against the answer."""
    N, Q = truth.codes.shape
    near = int(truth.near_ties.any(1).sum())
    if codes.numel() != N * Q:
        return Verdict(False, f"expected codes of shape {(N, Q)}, got {tuple(codes.shape)}", total=N, near_ties=near)
    codes = codes.to(truth.codes.device, torch.int64).reshape(N, Q)
    K = torch.tensor([len(c) for c in truth.codebooks], device=codes.device)
    if N and not bool(((codes >= 0) & (codes < K)).all()):
        return Verdict(False, "codes outside 0..K-1", wrong=N, total=N, near_ties=near)
    differs = codes != truth.codes
    level = torch.where(differs.any(1), differs.int().argmax(1), Q)  # the first level that differs; Q = none
    wrong = beyond = 0
    for q in range(Q):
        n = (level == q).nonzero()[:, 0]
        if not len(n):
            continue
        x, c = truth.rows[q][n], truth.codebooks[q]
        theirs, best = ((x - c[k[n, q]]).square().sum(1) / 2 for k in (codes, truth.codes))
        regret = theirs - best
        bad = (regret > 1e-12 * best) | ((theirs == best) & (codes[n, q] > truth.codes[n, q]))
        wrong += int(bad.sum())
        if truth.rounding is not None:
            beyond += int((regret > truth.rounding[n]).sum())
    failed = wrong if truth.rounding is None else beyond
    note = f"{failed} of {N} rows have a code that exact arithmetic does not give" if failed else ""
    return Verdict(failed == 0, note, wrong, N, near)


def judge_values(expected: list[Tensor], got: list[Tensor], tolerance: float) -> Verdict:
    """Largest error over the largest expected value, at most ``tolerance``, for each pair of tensors."""
    if len(expected) != len(got):
        return Verdict(False, f"expected {len(expected)} results, got {len(got)}")
    worst = 0.0
    for e, g in zip(expected, got, strict=True):
        if e.shape != g.shape:
            return Verdict(False, f"expected shape {tuple(e.shape)}, got {tuple(g.shape)}")
        e, g = e.double(), g.detach().double()
        if e.numel():
            error = float((e - g).abs().max() / e.abs().max().clamp_min(1e-300))
            worst = error if error != error else max(worst, error)
            if error != error:
                break
    ok = worst <= tolerance  # False for NaN
    return Verdict(ok, "" if ok else f"relative error {worst:.1e}, more than {tolerance:.0e}")


def judge_integers(expected: Tensor, got: Tensor, doubtful: Tensor | None = None) -> Verdict:
    """Equal integers; where ``doubtful`` is true (rounding decides) a difference is counted, not judged."""
    got = got.to(expected.device).reshape(expected.shape)
    differs = expected != got.to(expected.dtype)
    clear = differs if doubtful is None else differs & ~doubtful
    ties = 0 if doubtful is None else int(doubtful.sum())
    failed = int(clear.sum())
    note = f"{failed} of {expected.numel()} are not what the equation gives" if failed else ""
    return Verdict(failed == 0, note, int(differs.sum()), expected.numel(), ties)
