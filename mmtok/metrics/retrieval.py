"""How much meaning features or codes keep: recall of the right partner, and accuracy of a linear classifier."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def recall_at_k(
    similarity: Tensor, positives: Tensor | None = None, ks: Sequence[int] = (1, 5, 10)
) -> dict[int, float]:
    """Share of the queries (rows) whose partner is among their k most similar items (columns).

    Ties count against the query: an item as similar as the partner stands before it, so that constant features recall
    nothing but by k = M. For the other direction pass ``similarity.T``.

    Args:
        similarity: (N, M), higher is nearer; a cosine or a negative distance.
        positives: (N,) int64, the partner's column of each row; None: row i belongs to column i, N = M.
        ks: the ranks to report, 1 .. M each.

    Returns:
        k -> recall in [0,1].

    Raises:
        ValueError: shapes, columns or ranks that do not fit, or values that are NaN.
    """
    if similarity.ndim != 2 or 0 in similarity.shape:
        raise ValueError(f"similarity: expected a non-empty (N,M), got {tuple(similarity.shape)}")
    N, M = similarity.shape
    if positives is None and N != M:
        raise ValueError(f"positives: expected columns for {N} rows of {M} columns; without them N must equal M")
    columns = (torch.arange(N) if positives is None else positives).to(similarity.device)
    if columns.shape != (N,) or columns.dtype != torch.int64:
        raise ValueError(f"positives: expected int64 ({N},), got {columns.dtype} {tuple(columns.shape)}")
    if int(columns.min()) < 0 or int(columns.max()) >= M:
        raise ValueError(f"positives: expected columns 0..{M - 1}, got {int(columns.min())}..{int(columns.max())}")
    if not ks or min(ks) < 1 or max(ks) > M:
        raise ValueError(f"ks: expected ranks in 1..{M}, got {tuple(ks)}")
    if bool(torch.isnan(similarity).any()):
        raise ValueError("similarity: expected numbers, got NaN; check the features")
    own = similarity.gather(1, columns[:, None])  # (N, 1)
    rank = (similarity >= own).sum(1)  # 1 for a partner that is strictly the nearest
    return {int(k): float((rank <= k).double().mean()) for k in ks}


def linear_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    weight_decay: float = 1e-3,
    steps: int = 100,
) -> float:
    """Accuracy of multinomial logistic regression on frozen features; the same inputs give the same number.

    Features are standardised with the training set's moments. The loss, mean cross-entropy + weight_decay / 2 |W|^2, is
    convex and is minimised in float64 by L-BFGS from zero, so there is no seed and no learning rate.

    Args:
        train_x: (N, D) features.
        train_y: (N,) int64 classes 0 .. K - 1.
        test_x: (M, D).
        test_y: (M,).
        weight_decay: of the weights, not of the biases.
        steps: iterations of L-BFGS at most.

    Returns:
        Share of the test items whose class is the likeliest, in [0,1].

    Raises:
        ValueError: shapes that differ, fewer than two classes, a test class that was not trained, or NaN.
    """
    return float(probe_hits(train_x, train_y, test_x, test_y, weight_decay, steps).double().mean())


def probe_hits(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    weight_decay: float = 1e-3,
    steps: int = 100,
) -> Tensor:
    """(M,) bool, which test items `linear_probe` gets right; arguments and errors as there."""
    train_x, train_y = _labelled(train_x, train_y, "train")
    test_x, test_y = _labelled(test_x, test_y, "test")
    K = int(train_y.max()) + 1
    if train_x.shape[1] != test_x.shape[1]:
        raise ValueError(f"features: expected one width, got {train_x.shape[1]} and {test_x.shape[1]}")
    if K < 2 or int(test_y.max()) >= K:
        raise ValueError(
            f"classes: expected 0..K-1 with K >= 2 in training, got {K} and {int(test_y.max())} in the test"
        )
    mean, std = train_x.mean(0), train_x.std(0, correction=0)
    std = torch.where(std > 1e-8 * (1 + mean.abs()), std, 1.0)  # a constant feature tells nothing and stays 0
    train_x, test_x = (train_x - mean) / std, (test_x - mean) / std
    weight = torch.zeros(train_x.shape[1], K, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(K, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=steps, history_size=20, tolerance_grad=1e-7, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(train_x @ weight + bias, train_y) + 0.5 * weight_decay * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        guess = (test_x @ weight + bias).argmax(1)
    return guess == test_y


def _labelled(x: Tensor, y: Tensor, name: str) -> tuple[Tensor, Tensor]:
    if x.ndim != 2 or len(x) == 0 or y.shape != (len(x),) or y.dtype != torch.int64 or int(y.min()) < 0:
        raise ValueError(
            f"{name}: expected features (N,D) and int64 classes (N,) from 0, got {tuple(x.shape)} and "
            f"{y.dtype} {tuple(y.shape)}"
        )
    x = x.detach().double().cpu()
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name}: expected finite features, got NaN or infinity")
    return x, y.detach().cpu()
