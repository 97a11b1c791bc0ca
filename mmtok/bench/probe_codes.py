"""What a probe reads of a task: a contender's codes, kept in the run's folder, or plain features to compare with."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import re
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmtok.bench.contenders import Contender
from mmtok.bench.parts import Context
from mmtok.bench.probe_heads import Frames, slots_of
from mmtok.bench.probe_material import FOLDER, Task
from mmtok.bench.scorers import NotRunError
from mmtok.quantizers.base import Quantizer
from mmtok.tokens import Tokens, write_atomic
from mmtok.wrappers.bytes_tokenizer import BytesTokenizer

LOG_MEL, PIXELS = "continuous[log-mel]", "continuous[pixels 8x8]"
MELS, WINDOW, HOP, SIDE = 80, 0.025, 0.010, 8  # bands, seconds, seconds, pixels of a side


@dataclasses.dataclass(frozen=True)
class Baseline:
    """Features without a tokenizer, read by the same heads, so that accuracies have a scale: log-mel bands, 100 a
    second, or the picture reduced to 8 x 8 pixels."""

    modality: str

    @property
    def label(self) -> str:
        return PIXELS if self.modality == "image" else LOG_MEL

    def protocol(self) -> dict[str, Any]:
        if self.modality == "image":
            return {"features": f"RGB of {SIDE} x {SIDE} pixels, antialiased bilinear, standardised on training items"}
        return {
            "features": f"log of {MELS} mel bands, window {WINDOW * 1000:g} ms, hop {HOP * 1000:g} ms, "
            "standardised on training items",
            "backend": "torchaudio",
        }


Source = Contender | Baseline


@dataclasses.dataclass(frozen=True)
class Reading:
    """What was read of a task.

    Args:
        frames: of the items ``kept``. kept: (n,) positions of those items in the task.
        unscored: reason -> number of items that the contender refused.
        frame_rate: frames a second, None for pictures.
        tokens: of a contender, else None.
    """

    frames: Frames
    kept: Tensor
    unscored: dict[str, int]
    frame_rate: float | None
    tokens: Tokens | None


def reading(source: Source, task: Task, context: Context) -> Reading:
    """The codes or features of every item of a task. Raises NotRunError where codes mean nothing to a probe."""
    if isinstance(source, Baseline):
        rows = [features_of(task, i) for i in range(len(task))]
        return Reading(
            Frames(rows, (), "features"), torch.arange(len(task)), {}, 1 / HOP if task.sample_rate else None, None
        )
    if isinstance(source.tokenizer, BytesTokenizer):
        raise NotRunError(
            f"{source.label}: its codes are the bytes of a compressed file, where a position stands for no time or "
            "place; decode it and encode the result with a tokenizer to probe what it keeps"
        )
    tokens, kept, unscored = encoded(source, task, context)
    return Reading(slots_of(tokens), kept, unscored, source.tokenizer.spec.frame_rate, tokens)


def encoded(contender: Contender, task: Task, context: Context) -> tuple[Tokens, Tensor, dict[str, int]]:
    """The codes of the items one by one, which of them there are, and why others are missing; kept in the run."""
    settings = [contender.protocol(), task.name, task.keys, context.smoke]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]
    name = re.sub(r"[^\w.-]+", "-", contender.label)[:60]
    file = context.out / FOLDER / "codes" / f"{task.name}-{name}-{digest}.safetensors"
    about = file.with_suffix(".json")
    if not about.is_file():
        parts, kept = [], []
        unscored: collections.Counter[str] = collections.Counter()
        for i in _bar(range(len(task)), f"{task.name} {contender.label}", context.progress):
            try:
                parts.append(contender.encode(task[i]).to("cpu"))
                kept.append(i)
            except ValueError as e:
                unscored[" ".join(str(e).split())[:160]] += 1
        if not parts:
            raise NotRunError(f"{contender.label} refused all {len(task)} items of {task.name}: {next(iter(unscored))}")
        file.parent.mkdir(parents=True, exist_ok=True)
        Tokens.concat(parts).save(file)
        write_atomic(about, json.dumps({"kept": kept, "unscored": unscored}).encode())  # last: it says all is there
    found = json.loads(about.read_text("utf-8"))
    return Tokens.load(file), torch.tensor(found["kept"]), found["unscored"]


def _bar(items: range, name: str, show: bool) -> Any:
    from tqdm import tqdm

    return tqdm(items, desc=name, mininterval=5, disable=not show)


def features_of(task: Task, i: int) -> Tensor:
    """(T, F) of one item: log-mel frames (frame t is centred at (t + 1/2) hops), or 64 pixels of 3 numbers."""
    x = task[i].x
    if task.sample_rate is None:
        small = F.interpolate(x[None], (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)[0]
        return small.flatten(1).T.contiguous()
    return log_mel(x, task.sample_rate)


def log_mel(x: Tensor, sample_rate: int) -> Tensor:
    """(T, 80) natural log of the mel power spectrum of x (1, L), T = ceil(L / hop)."""
    from torchaudio.functional import melscale_fbanks

    hop, window = round(HOP * sample_rate), round(WINDOW * sample_rate)
    size = 1 << (window - 1).bit_length()
    frames = -(-x.shape[-1] // hop)
    left = (size - hop) // 2
    padded = F.pad(x, (left, size + hop * frames - x.shape[-1] - left))
    shape = torch.hann_window(window)
    spectrum = torch.stft(padded[0], size, hop, window, shape, center=False, return_complex=True).abs().square()
    bank = melscale_fbanks(size // 2 + 1, 0.0, min(8000.0, sample_rate / 2), MELS, sample_rate)
    return (spectrum[:, :frames].T @ bank).clamp_min(1e-7).log()


@torch.no_grad()
def latents_of(contender: Contender, tokens: Tokens) -> list[Tensor]:
    """What the codes stand for, (T, D) an item: the vectors that the tokenizer's own quantizer decodes them to.

    Raises:
        NotRunError: it has no quantizer of mmtok's, as wrapped tokenizers.
    """
    quantizer = getattr(contender.tokenizer, "quantizer", None)
    if not isinstance(quantizer, Quantizer):
        raise NotRunError(
            f"{contender.label} shows no vectors behind its codes (no quantizer of mmtok's); see what its codes give"
        )
    rows = []
    for b in range(len(tokens)):
        item = tokens[b].to(contender.tokenizer.device)
        rows.append(quantizer.decode(item.codes)[0].float().cpu())
    return rows
