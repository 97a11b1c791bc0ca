from __future__ import annotations

import pytest
import torch

from mmtok.losses.adversarial import (
    ADVERSARIAL_LOSSES,
    feature_matching,
    hinge_discriminator_loss,
    hinge_generator_loss,
    least_squares_discriminator_loss,
    least_squares_generator_loss,
)


def output(*logits, maps=()):
    return [(torch.tensor(part), list(maps)) for part in logits]


def test_hinge_by_hand():
    real, fake = output([2.0, 0.5], [-1.0]), output([-3.0, 0.0], [0.5])
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(((0 + 0.5) / 2 + (0 + 1) / 2 + 2 + 1.5) / 2)
    assert hinge_generator_loss(fake).item() == pytest.approx((1.5 - 0.5) / 2)


def test_least_squares_by_hand():
    real, fake = output([2.0, 0.5], [-1.0]), output([-3.0, 0.0], [0.5])
    want = ((1 + 0.25) / 2 + (9 + 0) / 2 + 4 + 0.25) / 2
    assert least_squares_discriminator_loss(real, fake).item() == pytest.approx(want)
    assert least_squares_generator_loss(fake).item() == pytest.approx(((16 + 1) / 2 + 0.25) / 2)


@pytest.mark.parametrize("name", sorted(ADVERSARIAL_LOSSES))
def test_a_perfect_discriminator_pays_nothing_and_pushes_the_generator_up(name):
    loss = ADVERSARIAL_LOSSES[name]
    low = {"hinge": -1.0, "least_squares": 0.0}[name]
    assert loss.discriminator(output([1.0, 1.0]), output([low])).item() == 0
    logits = torch.full((4,), low, requires_grad=True)
    loss.generator([(logits, [])]).backward()
    assert (logits.grad < 0).all()


@pytest.mark.parametrize("name", sorted(ADVERSARIAL_LOSSES))
def test_bf16_logits_are_read_in_float32(name):
    loss, g = ADVERSARIAL_LOSSES[name], torch.Generator().manual_seed(0)
    logits = torch.randn(3000, generator=g).bfloat16()
    half, full = [(logits, [])], [(logits.float(), [])]
    with torch.autocast("cpu", torch.bfloat16):
        values = loss.generator(half), loss.discriminator(half, half)
    torch.testing.assert_close(values, (loss.generator(full), loss.discriminator(full, full)), rtol=0, atol=0)


def test_feature_matching_by_hand():
    real = output(0.0, 0.0, maps=(torch.tensor([2.0, -4.0]), torch.tensor([10.0])))
    fake = output(0.0, 0.0, maps=(torch.tensor([1.0, -1.0]), torch.tensor([5.0])))
    assert feature_matching(real, fake).item() == pytest.approx((2 + 5) / 2)
    assert feature_matching(real, fake, relative=True).item() == pytest.approx((2 / 3 + 5 / 10) / 2)
    assert feature_matching(real, real).item() == 0


@pytest.mark.parametrize("relative", [False, True])
def test_feature_matching_detaches_the_real_side(relative):
    real_map, fake_map = torch.rand(2, 3, requires_grad=True), torch.rand(2, 3, requires_grad=True)
    feature_matching([(real_map, [real_map * 2])], [(fake_map, [fake_map * 2])], relative).backward()
    assert real_map.grad is None and fake_map.grad.abs().min() > 0


def test_feature_matching_on_a_dead_map_is_finite():
    fake = torch.rand(5, requires_grad=True)
    value = feature_matching([(fake, [torch.zeros(5)])], [(fake, [fake])], relative=True)
    value.backward()
    assert value.isfinite() and fake.grad.isfinite().all()


def test_mismatched_outputs_are_refused():
    one, two = output([1.0]), output([1.0], [1.0])
    for loss in (hinge_discriminator_loss, least_squares_discriminator_loss, feature_matching):
        with pytest.raises(ValueError, match="expected 1 parts"):
            loss(one, two)
    with pytest.raises(ValueError, match="at least one"):
        hinge_generator_loss([])
    with pytest.raises(ValueError, match="at least one"):
        feature_matching(one, one)
    with pytest.raises(ValueError, match="cut the reconstruction"):
        feature_matching(output(0.0, maps=(torch.zeros(3),)), output(0.0, maps=(torch.zeros(4),)))
    with pytest.raises(ValueError, match="expected 1 feature maps"):
        feature_matching(output(0.0, maps=(torch.zeros(3),)), output(0.0))
