"""Tokenizers, objectives and batches small enough to train in a test; shared by the tests of this folder.

As a script it is what the subprocess tests launch: ``tiny_runs.py ranks FOLDER`` or ``tiny_runs.py endless FOLDER``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmtok.audio.codec import AudioCodec
from mmtok.image.binary1d import Binary1D
from mmtok.losses.discriminators import MultiPeriodDiscriminator, PatchDiscriminator
from mmtok.losses.spectral import MultiScaleMelLoss
from mmtok.quantizers.base import Quantized
from mmtok.tokenizer import Reconstruction, Tokenizer
from mmtok.tokens import TokenSpec
from mmtok.training import AudioObjective, ImageObjective, TrainConfig, train
from mmtok.training.loop import same_start, start_accelerator
from mmtok.training.objective import Adversary

Batches = Callable[[int, int], dict[str, Tensor]]


class Plain(Tokenizer):
    """Two linear layers and no quantizer: everything about it is smooth and exact."""

    type_name = "plain"
    modality = "image"

    def __init__(self) -> None:
        super().__init__({})
        self.narrow, self.widen = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)

    def base_spec(self) -> TokenSpec:
        return TokenSpec("plain", "image", (2,), num_tokens=1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Reconstruction:
        z = self.narrow(x).tanh()
        codes = torch.zeros(len(x), 1, 1, dtype=torch.int64)
        return Reconstruction(self.widen(z), Quantized(z.flatten(2).transpose(1, 2), codes, z.new_zeros(()), {}))


def codec(dropout: float = 0.5) -> AudioCodec:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {
        "encoder_width": 2,
        "decoder_width": 8,
        "latent_dim": 4,
        "num_codebooks": 3,
        "codebook_size": 8,
    }
    return AudioCodec(strides=(4, 2), dilations=(1,), kernel_size=3, quantizer_dropout=dropout, **sizes)


def binary() -> Binary1D:
    torch.manual_seed(2)
    blocks: dict[str, Any] = {"encoder": (16, 1, 0), "decoder": (16, 1, 1), "head_dim": 8, "axes_dims": (4, 2, 2)}
    return Binary1D(num_tokens=4, num_bits=16, patch_size=8, **blocks)


def plain() -> Plain:
    torch.manual_seed(3)
    return Plain()


def sound_objective(start: int = 0, kind: str = "least_squares", wave_weight: float = 1.0) -> AudioObjective:
    torch.manual_seed(4)
    adversary = Adversary(MultiPeriodDiscriminator((2, 3), widths=(2, 4)), kind, start=start)
    mel = MultiScaleMelLoss(16000, (32, 64), (5, 10))
    return AudioObjective(mel, mel_weight=1.0, wave_weight=wave_weight, adversary=adversary)


def picture_objective(start: int = 0, kind: str = "hinge") -> ImageObjective:
    torch.manual_seed(5)
    adversary = Adversary(PatchDiscriminator(width=4, num_layers=1, norm="spectral"), kind, start=start)
    return ImageObjective(l1_weight=0.5, adversary=adversary)


def sounds(batch_size: int = 2, num_samples: int = 256) -> Batches:
    def batches(index: int, rank: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(100 * index + rank)
        return {"x": 0.3 * torch.randn(batch_size, 1, num_samples, generator=generator).clamp(-3, 3)}

    return batches


def pictures(batch_size: int = 2, side: int = 16) -> Batches:
    def batches(index: int, rank: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(100 * index + rank)
        return {"x": torch.rand(batch_size, 3, side, side, generator=generator)}

    return batches


def joined(batches: Batches, parts: int = 2, by_rank: bool = True) -> Batches:
    """One batch made of those of ``parts`` ranks, or of ``parts`` successive indices."""

    def both(index: int, rank: int) -> dict[str, Tensor]:
        calls = [(index, i) if by_rank else (index * parts + i, rank) for i in range(parts)]
        return {"x": torch.cat([batches(*call)["x"] for call in calls])}

    return both


def settings(out: Path, steps: int = 6, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {"lr": 1e-2, "warmup": 2, "ema": 0.9, "log_every": 1, "save_every": 3, "bf16": False}
    return TrainConfig(out=out, steps=steps, **(values | changes))


RANK_STEPS = 4  # the discriminator starts in the middle


def rank_settings(out: Path) -> TrainConfig:
    # A strong weight decay, so that one wrong step of a network that has no gradient shows.
    return settings(out, RANK_STEPS, weight_decay=0.5, lr=3e-3)


def network_state(tokenizer: Tokenizer, objective: AudioObjective | ImageObjective) -> dict[str, Tensor]:
    """Weights and buffers of both networks under the names of the state file."""
    state = {f"tokenizer.{k}": v.detach().clone() for k, v in tokenizer.state_dict().items()}
    if objective.discriminator is not None:
        state |= {f"discriminator.{k}": v.detach().clone() for k, v in objective.discriminator.state_dict().items()}
    return state


def ranks(folder: Path) -> None:
    """Under a launcher: two trainings; every process leaves its weights in ``folder``."""
    rank, state = int(os.environ["RANK"]), {}
    for name, dropout, start in (("dropout", 0.5, 0), ("exact", 0.0, RANK_STEPS // 2)):
        tokenizer, objective = codec(dropout), sound_objective(start)
        with torch.no_grad():  # ranks that start apart must be brought together
            next(tokenizer.parameters()).add_(rank)
        train(tokenizer, objective, sounds(), rank_settings(folder / name))
        state |= {f"{name}.{k}": v.contiguous() for k, v in network_state(tokenizer, objective).items()}
    module = torch.nn.BatchNorm1d(2)  # float and integer buffers that no training above has brought together
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data.fill_(5 + rank)
    same_start(start_accelerator(), module)
    state |= {f"start.{k}": v for k, v in module.state_dict().items()}
    state["num_processes"] = torch.tensor(torch.distributed.get_world_size())
    save_file(state, folder / f"rank{rank}.safetensors")


def endless(folder: Path) -> None:
    """A training that saves after every step, to be killed; wide enough that a save takes a while."""
    torch.manual_seed(0)
    tokenizer = Binary1D(num_tokens=4, num_bits=16, encoder=(384, 1, 0), decoder=(384, 1, 1))
    train(tokenizer, ImageObjective(), pictures(1), settings(folder, 100_000, save_every=1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"ranks": ranks, "endless": endless}[sys.argv[1]](Path(sys.argv[2]))
