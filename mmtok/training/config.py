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
        codebook_batches: batches from which codebooks take their k-means start, before the first step; 0 = the first
            batch alone. With fewer vectors than codes the first level takes them all and leaves the others nothing.
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
    codebook_batches: int = 0
    resume: bool = True

    def __post_init__(self) -> None:
        self.out = Path(self.out)
        if self.steps < 1 or self.accumulate < 1:
            raise ValueError(f"steps and accumulate: expected at least 1, got {self.steps} and {self.accumulate}")
        every = (self.save_every, self.validate_every, self.log_every)
        if min(every) < 1:
            raise ValueError(f"save_every, validate_every, log_every: expected at least 1 step, got {every}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema: expected 0 <= ema < 1, got {self.ema}")

    def peak_lr(self, network: str) -> float:
        """Peak learning rate of ``tokenizer`` or ``discriminator``."""
        return self.lr if network == "tokenizer" or self.discriminator_lr is None else self.discriminator_lr

    def lr_share(self, step: int) -> float:
        """Share of the peak learning rate at ``step`` (0-based): linear warm-up, then a half cosine."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        floor = self.final_lr_share
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
