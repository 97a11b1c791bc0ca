"""Objectives: which terms they have, what they weigh, when the GAN speaks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmtok.losses.adversarial import ADVERSARIAL_LOSSES, feature_matching
from mmtok.losses.balancer import LossBalancer
from mmtok.losses.discriminators import MultiPeriodDiscriminator
from mmtok.losses.pqmf import SubbandSTFTLoss
from mmtok.losses.spectral import MultiScaleMelLoss, MultiScaleSTFTLoss
from mmtok.quantizers.base import Quantized
from mmtok.tokenizer import Reconstruction
from mmtok.training import AudioObjective, ImageObjective, train
from mmtok.training.objective import Adversary


def reconstruction(x_hat: Tensor, quantizer_loss: float = 0.0) -> Reconstruction:
    z = torch.zeros(len(x_hat), 1, 1)
    codes = torch.zeros(len(x_hat), 1, 1, dtype=torch.int64)
    return Reconstruction(x_hat, Quantized(z, codes, torch.tensor(quantizer_loss), {}))


class Distance(nn.Module):
    """A perceptual network of the caller: counts its calls, has a weight and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dropout, self.calls = nn.Conv2d(3, 1, 1), nn.Dropout(0.5), 0

    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        return (self.dropout(self.layer(x_hat)) - self.layer(x)).square().mean()


def test_image_terms_and_weights():
    x, x_hat = torch.full((2, 3, 4, 4), 0.5), torch.full((2, 3, 4, 4), 0.75)
    network = Distance().eval()
    objective = ImageObjective(10.0, 3.0, perceptual=network, perceptual_weight=0.2, quantizer_weight=5.0)
    loss, terms = objective.generator_loss(reconstruction(x_hat, 0.125), {"x": x}, 0)
    distance = float((network.layer(x_hat) - network.layer(x)).square().mean().detach())
    assert network.calls == 1
    assert {k: pytest.approx(float(v), rel=1e-5) for k, v in terms.items()} == {
        "l2": 0.0625,
        "psnr_db": -10 * math.log10(0.0625),
        "l1": 0.25,
        "perceptual": distance,
    }
    assert float(loss.detach()) == pytest.approx(10 * 0.0625 + 3 * 0.25 + 0.2 * distance + 5 * 0.125, rel=1e-5)
    assert objective.frozen_modules() == [network]
    assert objective.discriminator is None
    assert ImageObjective().frozen_modules() == []


def sound_only(aux_weights: dict[str, float]) -> AudioObjective:
    return AudioObjective(None, aux_weights=aux_weights)


@pytest.mark.parametrize(("make", "shape"), [(ImageObjective, (1, 3, 4, 4)), (sound_only, (1, 1, 16))])
def test_named_losses_of_the_forward_are_weighted_and_unknown_names_refused(make: Any, shape: tuple[int, ...]):
    output = reconstruction(torch.full(shape, 0.5))
    output.aux = {"ratio_loss": torch.tensor(0.5, requires_grad=True), "other": torch.tensor(9.0)}
    batch = {"x": torch.full(shape, 0.5)}
    loss, terms = make(aux_weights={"ratio_loss": 2.0}).generator_loss(output, batch, 0)
    assert float(loss.detach()) == pytest.approx(1.0) and float(terms["ratio_loss"]) == 0.5 and "other" not in terms
    loss.backward()
    assert float(output.aux["ratio_loss"].grad) == pytest.approx(2.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"aux_weights: expected names among \['other', 'ratio_loss'\], got 'kl'"):
        make(aux_weights={"kl": 1.0}).generator_loss(output, batch, 0)


def test_training_freezes_the_perceptual_network_that_was_passed_in(tmp_path):
    network = Distance()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    train(tiny_runs.plain(), ImageObjective(perceptual=network), tiny_runs.pictures(), tiny_runs.settings(tmp_path, 2))
    assert network.calls == 2
    assert not network.training
    assert all(p.grad is None and torch.equal(p, before[k]) for k, p in network.named_parameters())


def test_perceptual_term_moves_the_tokenizer():
    x_hat = torch.rand(2, 3, 4, 4, requires_grad=True)
    objective = ImageObjective(0.0, 0.0, perceptual=Distance().eval(), perceptual_weight=1.0)
    objective.generator_loss(reconstruction(x_hat), {"x": torch.rand(2, 3, 4, 4)}, 0)[0].backward()
    assert x_hat.grad is not None and float(x_hat.grad.abs().max()) > 0


def test_audio_terms_and_weights():
    torch.manual_seed(0)
    x, x_hat = 0.1 * torch.randn(2, 1, 400), 0.1 * torch.randn(2, 1, 400)
    mel, stft = MultiScaleMelLoss(16000, (64,), (8,)), MultiScaleSTFTLoss((64,), (64,), (16,))
    objective = AudioObjective(mel, stft, mel_weight=15.0, stft_weight=2.0, wave_weight=7.0, quantizer_weight=0.5)
    loss, terms = objective.generator_loss(reconstruction(x_hat, 3.0), {"x": x}, 0)
    expected = {
        "wave_l1": float((x_hat - x).abs().mean()),
        "mel": float(mel(x_hat, x)),
        "stft": float(stft(x_hat, x)),
    }
    assert {k: float(v) for k, v in terms.items()} == pytest.approx(expected)
    assert float(loss) == pytest.approx(
        7 * expected["wave_l1"] + 15 * expected["mel"] + 2 * expected["stft"] + 1.5, rel=1e-5
    )
    assert objective.frozen_modules() == [mel, stft]
    without = AudioObjective(None, wave_weight=1.0)
    assert without.frozen_modules() == []
    assert without.generator_loss(reconstruction(x_hat), {"x": x}, 0)[1].keys() == {"wave_l1"}


def test_subband_term_and_weight():
    x, x_hat = 0.1 * torch.randn(2, 1, 800), 0.1 * torch.randn(2, 1, 800)
    subband = SubbandSTFTLoss((64,), (64,), (16,))
    objective = AudioObjective(None, subband=subband, subband_weight=3.0)
    loss, terms = objective.generator_loss(reconstruction(x_hat), {"x": x}, 0)
    assert float(loss) == pytest.approx(3 * float(subband(x_hat, x)), rel=1e-5)
    assert terms.keys() == {"wave_l1", "subband"} and objective.frozen_modules() == [subband]


# ---- balance ----


def balanced_objective(balance: float | None = 1.0, start: int = 0) -> AudioObjective:
    torch.manual_seed(4)
    adversary = Adversary(MultiPeriodDiscriminator((2, 3), widths=(2, 4)), weight=3.0, start=start)
    mel = MultiScaleMelLoss(16000, (32, 64), (5, 10))
    return AudioObjective(
        mel, mel_weight=2.0, wave_weight=0.1, adversary=adversary, aux_weights={"semantic_loss": 4.0}, balance=balance
    )


def sound_output(offset: float = 0.0) -> tuple[Reconstruction, Tensor, Tensor]:
    x_hat = (offset + 0.1 * torch.randn(2, 1, 256, generator=torch.Generator().manual_seed(0))).requires_grad_()
    output = reconstruction(x_hat)
    other = torch.tensor(3.0, requires_grad=True)
    output.quantized.loss, output.aux = 5 * other, {"semantic_loss": 7 * other}
    return output, x_hat, other


def test_balanced_terms_share_the_gradient_at_the_sound_and_the_others_stay_outside():
    batch = {"x": 0.1 * torch.randn(2, 1, 256, generator=torch.Generator().manual_seed(1))}
    objective, plain = balanced_objective(), balanced_objective(None)
    output, x_hat, other = sound_output()
    loss, terms = objective.generator_loss(output, batch, 0)
    want, want_terms = plain.generator_loss(output, batch, 0)
    torch.testing.assert_close(loss.detach(), want.detach())
    assert terms.keys() == {"wave_l1", "mel", "adversarial", "feature_matching", "semantic_loss"}
    torch.testing.assert_close(terms, want_terms)
    loss.backward()
    assert other.grad is not None and float(other.grad) == pytest.approx(5 + 4 * 7)

    x = batch["x"]
    losses = {"wave_l1": (x_hat - x).abs().mean()} | {"mel": plain.distances["mel"](x_hat, x)}
    losses |= plain.adversary.generator_losses(x_hat, x, 0)
    balanced = torch.zeros_like(x)
    for name, weight in {"wave_l1": 0.1, "mel": 2.0, "adversarial": 3.0, "feature_matching": 2.0}.items():
        (part,) = torch.autograd.grad(losses[name], x_hat, retain_graph=True)
        balanced += weight / 7.1 * part / (2 * part.flatten(1).norm(dim=1)).mean()
    assert x_hat.grad is not None
    torch.testing.assert_close(x_hat.grad, balanced, rtol=1e-4, atol=1e-6)


def test_balance_before_the_gan_starts_and_without_weights():
    batch = {"x": torch.zeros(2, 1, 256)}
    output, x_hat, _ = sound_output(0.2)
    balanced_objective(start=9).generator_loss(output, batch, 0)[0].backward()
    assert x_hat.grad is not None and 0.2 < float(2 * x_hat.grad.flatten(1).norm(dim=1).mean()) <= 1.0001
    gan_only = AudioObjective(None, adversary=Adversary(Forbidden(), start=9), quantizer_weight=2.0, balance=1.0)
    assert gan_only.generator_loss(output, batch, 0)[0].item() == 2 * 5 * 3
    with pytest.raises(ValueError, match="weights: expected at least one, each > 0"):
        AudioObjective(None, balance=1.0)
    assert balanced_objective(None).kept_modules() == {} == ImageObjective().kept_modules()


class KilledError(Exception):
    pass


def test_balanced_run_cut_off_and_resumed_is_the_whole_run(tmp_path: Path):
    """6 steps == 3 + resume + 3; the averages of the balancer are part of the state."""

    def run(out: str, end: int = 100) -> dict[str, Tensor]:
        def batches(index: int, rank: int) -> dict[str, Tensor]:
            if index == end:
                raise KilledError
            return tiny_runs.sounds()(index, rank)

        objective = tiny_runs.sound_objective(start=2)
        objective.balancer = LossBalancer(objective.weights, decay=0.9)
        tokenizer = train(tiny_runs.codec(), objective, batches, tiny_runs.settings(tmp_path / out))
        return tiny_runs.network_state(tokenizer, objective) | dict(objective.balancer.state_dict())

    whole = run("whole")
    with pytest.raises(KilledError):
        run("cut", 5)
    stored = load_file(tmp_path / "cut" / "state.safetensors")
    assert stored["module.balancer.count"].tolist() == pytest.approx([2.71, 2.71, 1.0, 1.0])  # the GAN began at step 2
    resumed = run("cut")
    assert whole.keys() == resumed.keys()
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]), key


@pytest.mark.parametrize("kind", ["hinge", "least_squares"])
def test_gan_terms_and_weights(kind: str):
    torch.manual_seed(0)
    x, x_hat = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16, requires_grad=True)
    discriminator = tiny_runs.PatchDiscriminator(width=4, num_layers=1, norm="none")
    adversary = Adversary(discriminator, kind, weight=0.3, matching_weight=0.7, start=5)
    objective, batch = ImageObjective(1.0, 0.0, adversary=adversary), {"x": x}
    assert objective.discriminator is discriminator
    loss, terms = objective.generator_loss(reconstruction(x_hat), batch, 5)
    d_loss, d_terms = objective.discriminator_loss(reconstruction(x_hat), batch, 5)
    with torch.no_grad():
        real, fake = discriminator(x), discriminator(x_hat)
        (real_logits, _), (fake_logits, _) = real[0], fake[0]
        if kind == "hinge":
            expected = -fake_logits.mean()
            d_expected = (1 - real_logits).relu().mean() + (1 + fake_logits).relu().mean()
        else:
            expected = (fake_logits - 1).square().mean()
            d_expected = (real_logits - 1).square().mean() + fake_logits.square().mean()
        matching = feature_matching(real, fake)
        total = (x_hat - x).square().mean() + 0.3 * expected + 0.7 * matching
    torch.testing.assert_close(terms["adversarial"], expected)
    torch.testing.assert_close(terms["feature_matching"], matching)
    torch.testing.assert_close(loss.detach(), total)
    torch.testing.assert_close(d_terms["discriminator"], d_expected)
    torch.testing.assert_close(d_loss.detach(), d_expected)
    assert not any(t.requires_grad for t in (*terms.values(), *d_terms.values()))


class Forbidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> list:
        raise AssertionError("asked before its start")


def test_gan_is_silent_before_its_start():
    x = torch.rand(2, 3, 16, 16)
    objective = ImageObjective(adversary=Adversary(Forbidden(), start=5))
    plain = ImageObjective()
    loss, terms = objective.generator_loss(reconstruction(x / 2), {"x": x}, 4)
    assert torch.equal(loss, plain.generator_loss(reconstruction(x / 2), {"x": x}, 4)[0])
    assert not {"adversarial", "feature_matching"} & terms.keys()
    d_loss, d_terms = objective.discriminator_loss(reconstruction(x / 2), {"x": x}, 4)
    assert not d_loss.requires_grad
    assert d_terms == {}
    with pytest.raises(AssertionError, match="asked before its start"):
        objective.generator_loss(reconstruction(x / 2), {"x": x}, 5)


def test_the_discriminator_keeps_its_weights_until_its_start(tmp_path):
    """Weight decay of a network that does not learn yet would shrink it."""
    objective = tiny_runs.sound_objective(start=2)
    assert objective.discriminator is not None
    weight = objective.discriminator.get_parameter("parts.0.head.conv.bias")
    seen = []

    def watched(index: int, rank: int) -> dict[str, Tensor]:
        seen.append(weight.detach().clone())
        return tiny_runs.sounds()(index, rank)

    train(tiny_runs.codec(), objective, watched, tiny_runs.settings(tmp_path, 4, weight_decay=0.5))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[2], seen[3])


def test_unknown_gan_is_refused():
    assert set(ADVERSARIAL_LOSSES) == {"hinge", "least_squares"}
    with pytest.raises(ValueError, match=r"expected one of \['hinge', 'least_squares'\], got 'wgan'"):
        Adversary(None, "wgan")
