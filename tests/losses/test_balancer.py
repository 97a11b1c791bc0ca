from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmtok.losses.balancer import LossBalancer


def pieces(x_hat: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
    """Two losses whose gradients of every item have the norms ``scale`` and 1e-6 / B times the size of x_hat."""
    direction = torch.zeros_like(x_hat[0])
    direction.view(-1)[0] = scale
    return {"loud": (x_hat * direction).flatten(1).sum(1).mean(), "quiet": 1e-6 * x_hat[..., 1].mean()}


def sound(seed: int = 0, batch: int = 4) -> Tensor:
    return torch.randn(batch, 1, 8, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradient(balancer: LossBalancer, losses: dict[str, Tensor], x_hat: Tensor) -> Tensor:
    return torch.autograd.grad(balancer(losses, x_hat), x_hat)[0]


@pytest.mark.parametrize("scale", [1.0, 1e-5, 1e6])
@pytest.mark.parametrize("reference", [1.0, 0.25])
def test_weights_are_shares_whatever_the_scales(scale: float, reference: float):
    x_hat = sound()
    balancer = LossBalancer({"loud": 3.0, "quiet": 1.0}, reference=reference)
    got = gradient(balancer, pieces(x_hat, scale), x_hat)
    want = torch.zeros(4, 1, 8)
    want[..., 0], want[..., 1] = 0.75 * reference / 4, 0.25 * reference / 4  # a mean over 4 items
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


def test_the_value_is_the_weighted_sum():
    x_hat = sound()
    losses = pieces(x_hat)
    value = LossBalancer({"loud": 3.0, "quiet": 1.0})(losses, x_hat)
    assert value.item() == pytest.approx(3 * losses["loud"].item() + losses["quiet"].item(), rel=1e-6)
    assert value.requires_grad


def test_gradient_goes_on_from_the_reconstruction_to_the_network():
    layer = torch.nn.Linear(8, 8)
    x_hat = layer(sound().detach())
    balancer = LossBalancer({"loud": 1.0, "quiet": 1.0})
    expected = gradient(balancer, pieces(x_hat), x_hat).detach()
    (2 * LossBalancer({"loud": 1.0, "quiet": 1.0})(pieces(x_hat), x_hat)).backward()
    assert layer.bias.grad is not None
    torch.testing.assert_close(layer.bias.grad, 2 * expected.sum(dim=(0, 1)))


def test_the_average_follows_its_definition():
    balancer = LossBalancer({"loud": 1.0}, decay=0.9)
    norms = [1.0, 5.0, 2.0, 8.0]
    for now, norm in enumerate(norms):
        x_hat = sound(now)
        got = gradient(balancer, {"loud": pieces(x_hat, norm)["loud"]}, x_hat)
        powers = [0.9 ** (now - t) for t in range(now + 1)]
        average = sum(p * n for p, n in zip(powers, norms, strict=False)) / sum(powers)
        assert float(4 * got[0, 0, 0]) == pytest.approx(norm / average, rel=1e-5)


def test_norms_are_those_of_items():
    """Items of different loudness keep their ratio: the mean of their norms is what is scaled."""
    x_hat = sound(batch=2)
    weight = torch.tensor([1.0, 3.0])[:, None, None]
    loss = (weight * x_hat).flatten(1).sum(1).mean()
    got = gradient(LossBalancer({"a": 2.0}), {"a": loss}, x_hat)
    assert (2 * got).flatten(1).norm(dim=1).tolist() == pytest.approx([0.5, 1.5])


def test_a_loss_that_joins_later_takes_its_share():
    balancer = LossBalancer({"loud": 3.0, "quiet": 1.0})
    for step in range(5):
        x_hat = sound(step)
        alone = gradient(balancer, {"loud": pieces(x_hat)["loud"]}, x_hat)
        torch.testing.assert_close(alone.flatten(1).norm(dim=1), torch.full((4,), 0.25))
    x_hat = sound(9)
    both = gradient(balancer, pieces(x_hat), x_hat)
    torch.testing.assert_close(both[..., :2], torch.tensor([0.75 / 4, 0.25 / 4]).expand(4, 1, 2))


@pytest.mark.parametrize("first", [True, False])
def test_a_zero_gradient_changes_nothing(first: bool):
    balancer = LossBalancer({"loud": 1.0, "quiet": 1.0}, decay=0.5)
    steps = [0.0, 2.0, 0.0, 0.0, 2.0] if first else [2.0, 0.0, 2.0]
    for step, scale in enumerate(steps):
        x_hat = sound(step)
        got = gradient(balancer, pieces(x_hat, scale), x_hat)
        want = 0.0 if scale == 0 else 0.5 / 4
        torch.testing.assert_close(got[..., 0], torch.full((4, 1), want), rtol=1e-5, atol=0)
        torch.testing.assert_close(got[..., 1], torch.full((4, 1), 0.5 / 4), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_seen_once_and_forgotten(bad: float):
    balancer = LossBalancer({"loud": 1.0, "quiet": 1.0})
    x_hat = sound()
    good = gradient(balancer, pieces(x_hat), x_hat)
    state = {k: v.clone() for k, v in balancer.state_dict().items()}
    assert not gradient(balancer, pieces(x_hat, bad), x_hat).isfinite().all()
    assert balancer.total[0] == state["total"][0] and balancer.count[0] == state["count"][0]
    torch.testing.assert_close(gradient(balancer, pieces(x_hat), x_hat), good)


def test_nothing_moves_where_nothing_is_differentiated():
    balancer = LossBalancer({"loud": 3.0, "quiet": 1.0})
    x_hat = sound()
    with torch.no_grad():
        inside = balancer(pieces(x_hat), x_hat)
    detached = balancer(pieces(x_hat.detach()), x_hat.detach())
    assert inside == detached and not inside.requires_grad and not detached.requires_grad
    assert balancer.count.tolist() == [0, 0]


def test_state_goes_around():
    first, second = (LossBalancer({"loud": 1.0, "quiet": 2.0}, decay=0.9) for _ in range(2))
    for step in range(3):
        x_hat = sound(step)
        gradient(first, pieces(x_hat, 2.0**step), x_hat)
    assert set(first.state_dict()) == {"total", "count"} and not list(first.parameters())
    x_hat = sound(7)
    fresh = gradient(second, pieces(x_hat, 3.0), x_hat)
    second.load_state_dict(first.state_dict())
    continued = gradient(second, pieces(x_hat, 3.0), x_hat)
    assert torch.equal(continued, gradient(first, pieces(x_hat, 3.0), x_hat))
    assert not torch.allclose(continued, fresh)


def test_what_cannot_be_balanced_is_refused():
    for weights in ({}, {"a": 0.0}, {"a": 1.0, "b": -1.0}):
        with pytest.raises(ValueError, match="weights: expected at least one, each > 0, got"):
            LossBalancer(weights)
    with pytest.raises(ValueError, match=r"decay in \[0, 1\) and reference > 0, got 1.0 and 1.0"):
        LossBalancer({"a": 1.0}, decay=1.0)
    balancer, x_hat = LossBalancer({"a": 1.0}), sound()
    with pytest.raises(ValueError, match=r"expected some of \['a'\], got \['b'\]; add its weight"):
        balancer({"a": x_hat.sum(), "b": x_hat.sum()}, x_hat)
    with pytest.raises(ValueError, match=r"expected some of \['a'\], got none"):
        balancer({}, x_hat)
    for foreign in (torch.ones(()), torch.ones((), requires_grad=True)):
        with pytest.raises(ValueError, match="expected 'a' to depend on x_hat, got one that does not; compute it from"):
            balancer({"a": foreign}, x_hat)


# ---- ranks ----


def steps(batch: slice) -> tuple[LossBalancer, Tensor]:
    """Three steps on a part of each step's four items; the last step's gradient of each item before the mean."""
    balancer, last = LossBalancer({"loud": 1.0, "quiet": 2.0}, decay=0.5), torch.zeros(0)
    for step in range(3):
        whole = torch.randn(4, 1, 8, generator=torch.Generator().manual_seed(step))
        x_hat = whole[batch].clone().requires_grad_()
        losses = {"loud": x_hat.square().mean(), "quiet": 1e-6 * x_hat.abs().pow(3).mean()}
        last = len(x_hat) * gradient(balancer, losses, x_hat)
    return balancer, last


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    patience = timedelta(seconds=120)
    dist.init_process_group("gloo", timeout=patience, init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        balancer, last = steps(slice(2 * rank, 2 * rank + 2))
        save_file(balancer.state_dict() | {"last": last}, f"{folder}/{rank}.safetensors")
        dist.barrier()  # gloo may abort where one rank takes the group down while the other still uses it
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path: Path):
    torch.multiprocessing.spawn(one_rank, (str(tmp_path),), nprocs=2)
    first, second = load_file(tmp_path / "0.safetensors"), load_file(tmp_path / "1.safetensors")
    balancer, last = steps(slice(0, 4))
    assert torch.equal(first["total"], second["total"]) and first["count"].tolist() == [1.75, 1.75]
    torch.testing.assert_close(first["total"], balancer.total)
    torch.testing.assert_close(torch.cat([first["last"], second["last"]]), last)
