"""Settings, learning rate, averages and the log, each against its closed form."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

import pytest
import tiny_runs
import torch
from torch import nn

from mmtok.training import ImageObjective, TrainConfig, train
from mmtok.training.ema import WeightAverage
from mmtok.training.log import RunLog

# ---- settings and learning rate ----


def test_learning_rate_is_a_line_and_then_half_a_cosine():
    config = TrainConfig(Path("out"), steps=110, warmup=10, final_lr_share=0.1)
    for step in range(10):
        assert config.lr_share(step) == pytest.approx((step + 1) / 10)
    for step in range(10, 110):
        expected = 0.1 + 0.9 * math.cos(math.pi * (step - 10) / 200) ** 2  # (1 + cos 2a) / 2 = cos^2 a
        assert config.lr_share(step) == pytest.approx(expected)
    assert config.lr_share(10) == 1.0
    assert config.lr_share(60) == pytest.approx(0.55)
    assert config.lr_share(110) == pytest.approx(0.1)
    assert config.lr_share(500) == pytest.approx(0.1)
    assert TrainConfig(Path("out"), steps=4, warmup=0).lr_share(0) == 1.0
    assert TrainConfig(Path("out"), steps=2, warmup=4).lr_share(1) == pytest.approx(0.5)  # shorter than its warm-up


def test_discriminator_has_its_own_peak_even_when_it_is_zero():
    assert TrainConfig(Path("out"), 1, lr=0.5).peak_lr("discriminator") == 0.5
    config = TrainConfig(Path("out"), 1, lr=0.5, discriminator_lr=0.0)
    assert (config.peak_lr("tokenizer"), config.peak_lr("discriminator")) == (0.5, 0.0)


def test_the_schedule_reaches_both_optimizers(tmp_path: Path):
    """Without momentum and decay Adam's step is the learning rate times sign(g), so steps tell the rate."""
    tokenizer, objective = tiny_runs.plain(), tiny_runs.picture_objective(kind="least_squares")
    assert objective.discriminator is not None
    head = objective.discriminator.get_parameter("head.conv.bias")
    weights: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watched(index: int, rank: int) -> dict[str, torch.Tensor]:
        weights.append((tokenizer.get_parameter("widen.bias").detach().clone(), head.detach().clone()))
        return tiny_runs.pictures(8)(index, rank)

    config = tiny_runs.settings(
        tmp_path, 5, lr=1e-2, discriminator_lr=3e-3, betas=(0.0, 0.0), weight_decay=0.0, warmup=2, clip=1e9
    )
    train(tokenizer, objective, watched, config)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for step in range(4):
        moved = [float((weights[step + 1][i] - weights[step][i]).abs().max()) for i in range(2)]
        assert moved[0] == pytest.approx(1e-2 * config.lr_share(step), rel=1e-3)
        assert moved[1] == pytest.approx(3e-3 * config.lr_share(step), rel=1e-3)
        assert rows[step]["lr"] == pytest.approx(1e-2 * config.lr_share(step), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps and accumulate: expected at least 1, got 0"),
        ({"accumulate": 0}, "steps and accumulate: expected at least 1"),
        ({"ema": 1.0}, "ema: expected 0 <= ema < 1, got 1.0"),
        ({"save_every": 0}, "save_every, validate_every, log_every: expected at least 1 step"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**({"out": Path("out"), "steps": 1} | changes))


def test_two_precisions_in_one_process(tmp_path: Path):
    for bf16 in (True, False, True):
        seen = []

        class Watched(tiny_runs.Plain):
            def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> tiny_runs.Reconstruction:
                out = super().forward(x, mask)
                seen.append(out.x_hat.dtype)  # noqa: B023 - read before the loop goes on
                return out

        config = tiny_runs.settings(tmp_path, 1, bf16=bf16, resume=False)
        train(Watched(), ImageObjective(), tiny_runs.pictures(), config)
        assert seen == [torch.bfloat16 if bf16 else torch.float32]


# ---- averages ----


class Weight(nn.Module):
    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))
        self.register_buffer("seen", torch.zeros(3))


def test_average_closed_form():
    """a_n = prod_{j<=n} d_j a_0 + sum_i (1 - d_i) prod_{i<j<=n} d_j w_i, with d_n = min(decay, (1 + n) / (10 + n))."""
    module = Weight()
    values = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        module.w.copy_(values[0])
    average = WeightAverage(module, decay=0.6)
    decays = [min(0.6, (1 + n) / (10 + n)) for n in range(39)]
    assert decays[0] == 0.1
    assert decays[-1] == 0.6
    for n in range(39):
        with torch.no_grad():
            module.w.copy_(values[n + 1])
        average.update(module, n)
        expected = math.prod(decays[: n + 1]) * values[0]
        for i in range(n + 1):
            expected = expected + (1 - decays[i]) * math.prod(decays[i + 1 : n + 1]) * values[i + 1]
        torch.testing.assert_close(average.average["w"].double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(module.w.double(), values[39].float().double())  # the module itself is only read


def test_applied_gives_the_average_and_puts_everything_back():
    module = Weight()
    average = WeightAverage(module, decay=0.9)
    with torch.no_grad():
        module.w.copy_(torch.tensor([1 / 3, -2 / 7, 1e-7]))
        module.seen.copy_(torch.tensor([1 / 3, 1 / 7, 1 / 11]))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with average.applied(module):
        assert torch.equal(module.w, torch.zeros(3))
        assert torch.equal(module.seen, before["seen"])
        with torch.no_grad():
            for tensor in (module.w, module.seen):
                tensor.copy_((tensor + 1 / 3).half())
    with contextlib.suppress(KeyError), average.applied(module):
        module.w.data.fill_(float("nan"))
        raise KeyError
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert torch.equal(average.average["w"], torch.zeros(3))


# ---- the log ----


def test_training_rows_tell_losses_levels_and_speed(tmp_path: Path):
    tokenizer, objective = tiny_runs.codec(), tiny_runs.sound_objective()
    config = tiny_runs.settings(tmp_path, 4, log_every=2, accumulate=2)
    train(tokenizer, objective, tiny_runs.sounds(3), config, lambda model: {"score": 1 / 3})
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(r["step"], r["kind"]) for r in rows] == [(2, "train"), (4, "train"), (4, "validate")]
    for row in rows[:2]:
        for key in ("usage", "perplexity", "dead_share"):
            assert len(row[key]) == tokenizer.quantizer.num_codebooks, key
        assert all(0 < u <= 1 for u in row["usage"])
        assert all(1 <= p <= 8 for p in row["perplexity"])
        # Dead: used less than a tenth of the mean, which every unused code is.
        assert all(1 - u - 1e-5 <= d < 1 for u, d in zip(row["usage"], row["dead_share"], strict=True))
        for key in ("loss", "wave_l1", "mel", "adversarial", "feature_matching", "discriminator", "commitment_loss"):
            assert math.isfinite(row[key]), key
        assert row["tokenizer_grad_norm"] > 0
        assert row["discriminator_grad_norm"] > 0
        assert row["items_per_second"] > 0
    assert rows[2] == {"step": 4, "kind": "validate", "score": 0.333333}


def test_speed_counts_the_items_since_the_last_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr("mmtok.training.log.time.monotonic", lambda: now[0])
    log = RunLog(tmp_path, 4, 0, active=True)
    for items, seconds in ((12, 3.0), (20, 4.0)):
        log.items += items
        now[0] += seconds
        log.write(1, {})
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["items_per_second"] for r in rows] == [4.0, 5.0]


def test_small_values_keep_their_digits(tmp_path: Path):
    log = RunLog(tmp_path, 1, 0, active=True)
    log.write(1, {"lr": 1.23456789e-7, "usage": torch.tensor([1e-9, 0.5]), "loss": torch.tensor(2.0)})
    log.close()
    row = json.loads((tmp_path / "log.jsonl").read_text())
    assert (row["lr"], row["usage"], row["loss"]) == (1.23457e-7, [1e-9, 0.5], 2.0)


def test_only_the_first_process_writes(tmp_path: Path):
    log = RunLog(tmp_path, 1, 0, active=False)
    log.write(1, {"loss": 1.0})
    log.close()
    assert not (tmp_path / "log.jsonl").exists()


def test_resumed_log_forgets_undone_steps(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"step": s, "kind": "train"}) + "\n" for s in (1, 2, 3, 4)) + '{"step": 5, "lo')
    RunLog(tmp_path, 6, 3, active=False).close()
    assert len(path.read_text().splitlines()) == 5  # not this process's file to change
    RunLog(tmp_path, 6, 3, active=True).close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
