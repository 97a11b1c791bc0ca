"""Loss balancer (EnCodec): weights are shares of the gradient at the reconstruction, whatever the losses' scales."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmtok.quantizers.sync import sum_over_ranks, world_size


def weighted_sum(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor | float:
    """Sum of ``weights[name] * losses[name]`` over the losses; 0.0 where there are none."""
    total: Tensor | float = 0.0
    for name, loss in losses.items():
        total = total + weights[name] * loss
    return total


class LossBalancer(nn.Module):
    """Rescales the gradient of each loss with respect to the reconstruction (arXiv 2210.13438 section 3.4, "Balancer").

    With g_i the gradient of loss i at x_hat and <|g_i|> the moving average of its norm, the reconstruction receives

        G = sum_i reference * (w_i / sum_j w_j) * g_i / <|g_i|>

    where j runs over the losses of this step, so that a discriminator may join later. The norm is taken for each item
    and averaged over items and ranks. Losses here are means over the batch; ``reference`` is therefore the norm of an
    item's own gradient, before the mean over the batch divides it by B, and G does not change with the batch size or
    the number of ranks (EnCodec's code leaves that division out: its G is B times ours).

    The average starts without bias: <n> = sum_t decay^(now - t) n_t / sum_t decay^(now - t). A gradient that is zero or
    not finite on a step leaves its average as it is; one that is not finite passes on, so that the training loop sees
    it. The averages are buffers, equal on all ranks: keep them with the run's state.

    Args:
        weights: share of each loss by its name; > 0, in any unit.
        decay: of the moving average, in [0, 1).
        reference: R, the norm that the shares divide.

    Raises:
        ValueError: no weights, one that is not positive, a decay outside [0, 1) or a reference that is not positive.
    """

    total: Tensor
    count: Tensor

    def __init__(self, weights: Mapping[str, float], decay: float = 0.999, reference: float = 1.0) -> None:
        super().__init__()
        if not weights or min(weights.values()) <= 0:
            raise ValueError(
                f"weights: expected at least one, each > 0, got {dict(weights)}; leave out losses that shall not count"
            )
        if not 0 <= decay < 1 or reference <= 0:
            raise ValueError(f"expected decay in [0, 1) and reference > 0, got {decay} and {reference}")
        self.weights, self.decay, self.reference = dict(weights), decay, reference
        self.register_buffer("total", torch.zeros(len(weights)))  # decayed sum of norms, in the order of the names
        self.register_buffer("count", torch.zeros(len(weights)))  # decayed number of norms

    def forward(self, losses: Mapping[str, Tensor], x_hat: Tensor) -> Tensor:
        """Join losses that depend on the network through ``x_hat`` alone.

        Args:
            losses: unweighted scalars by name, each a mean over the batch; any subset of the names in ``weights``.
            x_hat: reconstruction (B, ...), float32, the tensor that the losses were computed from.

        Returns:
            Scalar float32. Its value is the weighted sum of the losses; its gradient with respect to ``x_hat`` is G.
            Where nothing can be differentiated (``no_grad``, or a detached ``x_hat``) it is that sum and nothing moves.

        Raises:
            ValueError: no losses, an unknown name, or a loss that does not depend on ``x_hat``.
        """
        unknown = sorted(losses.keys() - self.weights.keys())
        if unknown or not losses:
            raise ValueError(f"losses: expected some of {list(self.weights)}, got {unknown or 'none'}; add its weight")
        value = torch.as_tensor(weighted_sum(losses, self.weights))
        if not torch.is_grad_enabled() or not x_hat.requires_grad:
            return value
        gradients = {name: self._gradient(name, loss, x_hat) for name, loss in losses.items()}
        averages = self._averages({name: norm for name, (_, norm) in gradients.items()})
        whole = sum(self.weights[name] for name in losses)
        balanced = torch.zeros_like(x_hat)
        for name, (gradient, _) in gradients.items():
            balanced += self.reference * self.weights[name] / whole * gradient / averages[name]
        surrogate = (x_hat * balanced).sum()  # its gradient with respect to x_hat is `balanced`
        return value.detach() + (surrogate - surrogate.detach())

    def _gradient(self, name: str, loss: Tensor, x_hat: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient of the loss at x_hat (B, ...), and the mean over items of B times its norm (scalar)."""
        gradient = None
        if loss.requires_grad:
            # The graph is kept: other losses share parts of it.
            gradient = torch.autograd.grad(loss, x_hat, retain_graph=True, allow_unused=True)[0]
        if gradient is None:
            raise ValueError(
                f"losses: expected {name!r} to depend on x_hat, got one that does not; compute it from the very tensor "
                "that is passed as x_hat, and add losses of anything else outside of the balancer"
            )
        return gradient, gradient.flatten(1).norm(dim=1).sum()

    @torch.no_grad()
    def _averages(self, norms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take in this step's norms, joined over the ranks, and return the moving averages (scalars)."""
        slots = torch.tensor([list(self.weights).index(name) for name in norms], device=self.total.device)
        values = sum_over_ranks(torch.stack(list(norms.values())).to(self.total)) / world_size()
        news = values.isfinite() & (values > 0)
        total, count = self.total[slots], self.count[slots]
        self.total[slots] = torch.where(news, self.decay * total + values, total)
        self.count[slots] = torch.where(news, self.decay * count + 1, count)
        # Without any norm so far there is nothing to scale by: the gradient is zero, or not finite and passes on.
        average = torch.where(self.count[slots] > 0, self.total[slots] / self.count[slots].clamp(min=1), 1.0)
        return dict(zip(norms, average.clamp(min=1e-20).unbind(), strict=True))
