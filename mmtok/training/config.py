"""What a run is set by, apart from model, objective and data."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path


@dataclasses.dataclass
class TrainConfig:
    """Numbers of a run.

    Args:
        out: folder of the log, the resumable state and the weights.
        steps: optimizer steps in all.
        lr: peak learning rate of the generator; warm-up over ``warmup`` steps, then a cosine to ``final_lr_share``.
        discriminator_lr: of the discriminator, with the same schedule; None = lr.
        betas, weight_decay: of AdamW.
        clip: largest gradient norm, of generator and discriminator each.
        accumulate: batches whose gradients are averaged in one step.
        ema: decay of the averaged weights, which are what is kept.
        bf16: autocast the networks to bfloat16 (quantizers stay fp32).
        seed: of weights, batches and sampling.
        save_every, validate_every, log_every: in steps.
        resume: continue from ``out`` when a state is there.
    """

    out: Path
    steps: int
    lr: float = 5e-4
    discriminator_lr: float | None = None
    betas: tuple[float, float] = (0.8, 0.99)
    weight_decay: float = 0.01
    warmup: int = 100
    final_lr_share: float = 0.02
    clip: float = 1.0
    accumulate: int = 1
    ema: float = 0.999
    bf16: bool = True
    seed: int = 0
    save_every: int = 250
    validate_every: int = 500
    log_every: int = 10
    resume: bool = True

    def __post_init__(self) -> None:
        self.out = Path(self.out)
        if self.steps < 1 or self.accumulate < 1:
            raise ValueError(f"steps and accumulate: expected at least 1, got {self.steps} and {self.accumulate}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema: expected 0 <= ema < 1, got {self.ema}")

    def lr_share(self, step: int) -> float:
        """Share of the peak learning rate at ``step`` (0-based): linear warm-up, then a half cosine."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        floor = self.final_lr_share
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
