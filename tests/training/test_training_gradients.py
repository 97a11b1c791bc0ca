"""Which loss moves which network, gradient accumulation, and steps whose gradient is not finite."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import tiny_runs
import torch
from torch import Tensor, nn

from mmtok.losses.adversarial import hinge_generator_loss
from mmtok.tokenizer import Reconstruction
from mmtok.training import ImageObjective, train
from mmtok.training.loop import frozen, one_batch
from mmtok.training.objective import Terms


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {k: None if p.grad is None else p.grad.clone() for k, p in module.named_parameters()}


def assert_gradients_close(first: dict[str, Tensor | None], second: dict[str, Tensor | None]) -> None:
    """Equal up to fp32 rounding: 1e-4 of each tensor's largest value."""
    assert first.keys() == second.keys()
    assert any(g is not None and bool(g.abs().max() > 1e-6) for g in first.values())
    for key, g in first.items():
        other = second[key]
        assert (g is None) == (other is None), key
        if g is not None and other is not None:
            torch.testing.assert_close(g, other, rtol=0, atol=1e-4 * float(g.abs().max()) + 1e-7, msg=key)


# ---- each loss moves its own network only ----


class GeneratorOnly(ImageObjective):
    """The discriminator is listened to and never taught."""

    def discriminator_loss(self, output: Reconstruction, batch: dict[str, Tensor], step: int) -> tuple[Tensor, Terms]:
        return torch.zeros(()), {}


def test_generator_loss_gives_the_discriminator_no_gradient():
    whole = tiny_runs.picture_objective()
    objective = GeneratorOnly(adversary=whole.adversary)
    tokenizer = tiny_runs.plain()
    terms = one_batch(tokenizer, objective, tiny_runs.pictures()(0, 0), 0)
    assert {"adversarial", "feature_matching"} <= terms.keys()
    discriminator = objective.discriminator
    assert discriminator is not None
    assert all(g is None for g in gradients(discriminator).values())
    assert all(p.requires_grad for p in discriminator.parameters())
    assert all(g is not None for g in gradients(tokenizer).values())


def test_the_adversarial_term_reaches_the_tokenizer():
    x = tiny_runs.pictures()(0, 0)["x"]
    tokenizer, discriminator = tiny_runs.plain(), tiny_runs.picture_objective().discriminator
    assert discriminator is not None
    discriminator.eval()  # spectral norm advances at every call in training mode
    objective = GeneratorOnly(l2_weight=0.0, adversary=tiny_runs.Adversary(discriminator, "hinge", matching_weight=0.0))
    one_batch(tokenizer, objective, {"x": x}, 0)
    expected = torch.autograd.grad(
        hinge_generator_loss(discriminator(tokenizer(x).x_hat)), list(tokenizer.parameters())
    )
    assert_gradients_close(gradients(tokenizer), dict(zip(dict(tokenizer.named_parameters()), expected, strict=True)))


def test_discriminator_loss_teaches_the_discriminator_only():
    x = tiny_runs.pictures()(0, 0)["x"]
    tokenizer, objective = tiny_runs.plain(), tiny_runs.picture_objective()
    discriminator = objective.discriminator
    assert discriminator is not None
    discriminator.eval()
    output = tokenizer(x)
    loss, _ = objective.discriminator_loss(output, {"x": x}, 0)
    loss.backward()
    assert all(g is None for g in gradients(tokenizer).values())
    expected = gradients(discriminator)
    discriminator.zero_grad()
    one_batch(tokenizer, objective, {"x": x}, 0)
    assert_gradients_close(gradients(discriminator), expected)


def test_frozen_puts_back_what_was_trainable_even_after_an_error():
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    with contextlib.suppress(KeyError), frozen(layer):
        assert not layer.weight.requires_grad
        raise KeyError
    assert layer.weight.requires_grad
    assert not layer.bias.requires_grad
    with frozen(None):
        pass


# ---- accumulation: the mean over two batches of 4 is the batch of 8 ----


def test_accumulated_gradients_equal_those_of_the_joined_batch():
    """Codec with fixed codebooks (evaluation mode) and GAN; all its losses here are means over the batch."""
    results = []
    for batches, share in (
        ([tiny_runs.sounds(4)(i, 0) for i in range(2)], 0.5),
        ([tiny_runs.joined(tiny_runs.sounds(4), by_rank=False)(0, 0)], 1.0),
    ):
        tokenizer, objective = tiny_runs.codec(), tiny_runs.sound_objective()
        assert objective.discriminator is not None
        with torch.no_grad():  # fixed codebooks that are worth choosing from
            z = tokenizer.encoder(tiny_runs.sounds(4)(9, 0)["x"]).transpose(1, 2)
            tokenizer.quantizer(z)
        tokenizer.eval()
        for batch in batches:
            one_batch(tokenizer, objective, batch, 0, share)
        results.append((gradients(tokenizer), gradients(objective.discriminator)))
    assert_gradients_close(results[0][0], results[1][0])
    assert_gradients_close(results[0][1], results[1][1])


def test_accumulated_training_equals_that_of_the_joined_batch(tmp_path: Path):
    """The whole loop with a tokenizer without quantizer and a GAN: weights of both networks and log after 4 steps."""
    results, rows = [], []
    for out, source, accumulate in (
        ("two", tiny_runs.pictures(4), 2),
        ("one", tiny_runs.joined(tiny_runs.pictures(4), by_rank=False), 1),
    ):
        # Least squares: of the hinge loss the gradient to the last bias is 0 here, and Adam would enlarge its rounding.
        tokenizer, objective = tiny_runs.plain(), tiny_runs.picture_objective(kind="least_squares")
        objective.adversary.discriminator.eval()  # type: ignore[union-attr] - spectral norm counts calls
        config = tiny_runs.settings(tmp_path / out, 4, accumulate=accumulate)
        train(tokenizer, objective, source, config)
        results.append(tiny_runs.network_state(tokenizer, objective))
        rows.append([json.loads(line) for line in (tmp_path / out / "log.jsonl").read_text().splitlines()])
    start = tiny_runs.network_state(tiny_runs.plain(), tiny_runs.picture_objective())
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], rtol=1e-3, atol=2e-5, msg=key)
    for name in ("tokenizer.narrow.weight", "discriminator.head.conv.bias"):
        assert float((results[0][name] - start[name]).abs().max()) > 5e-3, name
    for two, one in zip(*rows, strict=True):
        for key in (
            "loss",
            "l2",
            "l1",
            "adversarial",
            "discriminator",
            "tokenizer_grad_norm",
            "discriminator_grad_norm",
        ):
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5), (two["step"], key)


# ---- not finite ----


class Spoilt(ImageObjective):
    """At one step the losses of the networks named in ``spoil`` are infinite."""

    spoil: tuple[str, ...] = ()
    at: int = 2

    def generator_loss(self, output: Reconstruction, batch: dict[str, Tensor], step: int) -> tuple[Tensor, Terms]:
        loss, terms = super().generator_loss(output, batch, step)
        return loss * (float("inf") if step == self.at and "tokenizer" in self.spoil else 1.0), terms

    def discriminator_loss(self, output: Reconstruction, batch: dict[str, Tensor], step: int) -> tuple[Tensor, Terms]:
        loss, terms = super().discriminator_loss(output, batch, step)
        return loss * (float("nan") if step == self.at and "discriminator" in self.spoil else 1.0), terms


@pytest.mark.parametrize("spoil", [("tokenizer",), ("discriminator",), ("tokenizer", "discriminator")])
def test_a_gradient_that_is_not_finite_skips_the_step_and_is_logged(spoil: tuple[str, ...], tmp_path: Path):
    tokenizer, objective = tiny_runs.plain(), Spoilt(adversary=tiny_runs.picture_objective().adversary)
    objective.spoil = spoil
    seen: list[dict[str, Tensor]] = []

    def watched(index: int, rank: int) -> dict[str, Tensor]:
        state = tiny_runs.network_state(tokenizer, objective)
        seen.append({k: v for k, v in state.items() if "_u" not in k and "_v" not in k})
        return tiny_runs.pictures()(index, rank)

    train(tokenizer, objective, watched, tiny_runs.settings(tmp_path, 5, log_every=100))
    assert objective.discriminator is not None
    for name, module in (("tokenizer", tokenizer), ("discriminator", objective.discriminator)):
        for key in (f"{name}.{k}" for k, _ in module.named_parameters()):
            assert torch.equal(seen[2][key], seen[3][key]) == (name in spoil), key  # step 2 ran between them
            assert not torch.equal(seen[3][key], seen[4][key]), key
    assert all(bool(v.isfinite().all()) for v in tiny_runs.network_state(tokenizer, objective).values())

    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [3, 5]  # the skipped one, whatever log_every says, and the last
    for name in ("tokenizer", "discriminator"):
        assert (rows[0].get(f"{name}_skipped") == 1.0) == (name in spoil)
        assert f"{name}_skipped" not in rows[1]
