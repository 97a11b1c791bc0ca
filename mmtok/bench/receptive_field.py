"""Receptive fields by experiment: what changes in codes and reconstruction when the input changes at one place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmtok.bench.contenders import Contender
from mmtok.bench.records import Item
from mmtok.bench.system_probes import given_back
from mmtok.data import audio as audio_io


@dataclasses.dataclass(frozen=True)
class Reach:
    """How far one side of a receptive field goes beyond the position itself, as seen: a lower bound.

    Args:
        distance: samples or pixels, 0 = not at all, infinite where it is the whole probe.
        whole: whether what was changed at one end of the probe was seen at the other.
    """

    distance: float
    whole: bool


class SoundField:
    """The receptive field of codes and of the reconstruction in samples at the model's rate, by experiment.

    All samples before (after) a place are replaced by other sound; the code or sample furthest on the other side that
    changes depends on one of them. The place is then moved by bisection, away from that code, as long as it changes.

    Args:
        contender: of sound, with ``sample_rate`` and ``hop_length``.
        x: (1, L), mono at the model's rate, L whole frames.
        seeds: one other sound for each.
    """

    def __init__(self, contender: Contender, x: Tensor, seeds: Sequence[int]):
        self.contender, self.x = contender, x
        self.tokenizer: Any = contender.tokenizer
        self.rate, self.hop = int(self.tokenizer.sample_rate), int(self.tokenizer.hop_length)
        self.others = [self._noise(seed) for seed in seeds]
        self.codes, self.sound = self._seen(x, True)
        again, sound = self._seen(x, True)
        if not torch.equal(again, self.codes):
            raise ValueError("the same sound has other codes a second time, so a change says nothing")
        # A decoder that draws noise differs by itself.
        self.tolerance = 0.0 if self.sound is None or sound is None else float((sound - self.sound).abs().max())
        self.trials = 0

    def _noise(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(self.x.shape, generator=generator) * 0.3).clamp(-1, 1)

    def _seen(self, x: Tensor, decode: bool) -> tuple[Tensor, Tensor | None]:
        item = Item("probe", x, self.rate, "")
        contender = dataclasses.replace(self.contender, with_text=False)
        tokens = contender.encode(item)
        decode = decode and not self.tokenizer.encode_only
        return tokens.codes[0].cpu(), contender.decode(tokens, item) if decode else None

    def measure(self, what: str, side: str) -> Reach:
        """``what`` is ``codes`` or ``sound``, ``side`` is ``left`` or ``right``; ``trials`` says how many it took."""
        self.trials = 0
        L = self.x.shape[1]
        # One sample of a frame is replaced: the others of its own are then on the far side, however small the field is.
        step = self.hop * max(self.tokenizer.spec.level_strides)
        beside = 1 if side == "left" else -1
        shares = (0.1, 0.5) if side == "left" else (0.9, 0.5)
        places = [max(1, round(L * share / step)) * step + beside for share in shares]
        best: tuple[float, int, Tensor, int] | None = None
        for other in self.others:
            for place in places:
                at = self._furthest(what, side, place, other)
                if at is not None and (best is None or self._distance(side, place, at) > best[0]):
                    best = self._distance(side, place, at), place, other, at
        if best is None or best[0] <= 0:
            return Reach(0.0, False)
        distance, place, other, at = best
        if distance >= 0.8 * L and at == self._end(what, side):
            return Reach(math.inf, True)
        # Between a place that is seen at ``at`` and one that is not, nothing or everything being replaced at the limit.
        seen, unseen = place, 0 if side == "left" else L
        while abs(seen - unseen) > 1:
            middle = (seen + unseen) // 2
            now = self._furthest(what, side, middle, other)
            beyond = now is not None and (now >= at if side == "left" else now <= at)
            seen, unseen = (middle, unseen) if beyond else (seen, middle)
            if beyond and now is not None:
                distance = max(distance, self._distance(side, middle, now))
        return Reach(float(distance), False)

    def _distance(self, side: str, place: int, at: int) -> float:
        """From the nearest replaced sample to the position that changed."""
        return at - (place - 1) if side == "left" else place - at

    def _end(self, what: str, side: str) -> int:
        if side == "right":
            return 0 if what == "sound" else self.hop * min(self.contender.tokenizer.spec.level_strides) - 1
        return self.x.shape[1] - 1 if what == "sound" else int(self._starts()[:, -1].max())

    def _starts(self) -> Tensor:
        """(Q, T) first own sample of each code."""
        Q, T = self.codes.shape
        strides = torch.tensor(self.contender.tokenizer.spec.level_strides[:Q])[:, None]
        return torch.arange(T)[None] // strides * strides * self.hop

    def _furthest(self, what: str, side: str, place: int, other: Tensor) -> int | None:
        """The changed code or sample that is furthest from what was replaced: its nearest own sample."""
        self.trials += 1
        head, tail = (other, self.x) if side == "left" else (self.x, other)
        codes, sound = self._seen(torch.cat([head[:, :place], tail[:, place:]], 1), what == "sound")
        if what == "sound":
            if sound is None or self.sound is None:
                return None
            where = ((sound - self.sound).abs() > self.tolerance).any(0).nonzero()[:, 0]
        else:
            Q = codes.shape[0]
            strides = torch.tensor(self.contender.tokenizer.spec.level_strides[:Q])[:, None]
            starts = self._starts()
            own = starts if side == "left" else starts + strides * self.hop - 1
            where = own[codes != self.codes]
        if not len(where):
            return None
        return int(where.max() if side == "left" else where.min())


def sound_probe(contender: Contender, item: Item, seconds: float) -> Tensor:
    """(1, L) of about ``seconds`` at the model's rate, whole frames: the first channel, repeated where too short."""
    tokenizer: Any = contender.tokenizer
    rate = int(tokenizer.sample_rate)
    step = int(tokenizer.hop_length) * int(getattr(tokenizer, "frame_group", 1))
    x = audio_io.resample(item.x[:1], int(item.sample_rate or rate), rate).clamp(-1, 1)
    length = max(8, round(seconds * rate / step)) * step
    return x.repeat(1, -(-length // x.shape[1]))[:, :length]


@dataclasses.dataclass(frozen=True)
class PictureField:
    """What one patch of a picture reaches.

    Args:
        shares: of the codes that change, one for each patch and each other content.
        reaches: of ``left, right, above, below``: how far the reconstruction's pixels read in that direction.
        patch: side of the patch in pixels. size: (H, W) of the picture.
    """

    shares: list[float]
    reaches: dict[str, Reach]
    patch: int
    size: tuple[int, int]


def picture_field(contender: Contender, item: Item, seeds: Sequence[int]) -> PictureField:
    """Replace a patch at each edge, and one in the middle, by other pixels, and see what changes.

    Raises:
        ValueError: codes that differ for the same picture.
    """
    H, W = item.x.shape[-2:]
    side = max(1, min(8, min(H, W) // 4))
    middle = (H - side) // 2, (W - side) // 2
    # A patch at the left edge is seen furthest to the right: by pixels that read to their left.
    corners = {"left": (middle[0], 0), "right": (middle[0], W - side), "above": (0, middle[1])}
    corners |= {"below": (H - side, middle[1]), "": middle}
    item = dataclasses.replace(item, target=None)
    wanted = _picture(contender, item)
    again = _picture(contender, item)
    if not torch.equal(wanted[0], again[0]):
        raise ValueError("the same picture has other codes a second time, so a change says nothing")
    tolerance = 0.0 if wanted[1] is None or again[1] is None else float((wanted[1] - again[1]).abs().max())
    shares, furthest = [], dict.fromkeys(corners, 0.0)
    for where, (top, left) in corners.items():
        for seed in seeds:
            x = item.x.clone()
            generator = torch.Generator().manual_seed(seed)
            pixels = torch.randint(0, 256, (3, side, side), generator=generator) / 255
            x[:, top : top + side, left : left + side] = pixels
            codes, y = _picture(contender, dataclasses.replace(item, x=x))
            shares.append(_share_changed(codes, wanted[0]))
            if y is not None and wanted[1] is not None:
                changed = ((y - wanted[1]).abs() > tolerance).any(0)
                furthest[where] = max(furthest[where], _beyond(changed, where, side))
    reaches = {}
    for where in ("left", "right", "above", "below"):
        most = (W if where in ("left", "right") else H) - side
        whole = furthest[where] >= most
        reaches[where] = Reach(math.inf if whole else furthest[where], whole)
    return PictureField(shares, reaches, side, (H, W))


def _picture(contender: Contender, item: Item) -> tuple[Tensor, Tensor | None]:
    tokens = contender.encode(item)
    if contender.tokenizer.encode_only:
        return tokens.codes[0].cpu(), None
    return tokens.codes[0].cpu(), given_back(contender, tokens, [item])[0].float().cpu()


def _share_changed(codes: Tensor, wanted: Tensor) -> float:
    T = min(codes.shape[1], wanted.shape[1])
    total = wanted.shape[0] * max(codes.shape[1], wanted.shape[1])
    return (total - int((codes[:, :T] == wanted[:, :T]).sum())) / total


def _beyond(changed: Tensor, where: str, side: int) -> float:
    """How far past a patch at the edge ``where`` the (H, W) map of changes goes."""
    lines = changed.any(0 if where in ("left", "right") else 1).nonzero()[:, 0]
    if not len(lines) or not where:
        return 0.0
    if where in ("left", "above"):
        return float(max(0, int(lines.max()) - (side - 1)))
    length = changed.shape[1 if where == "right" else 0]
    return float(max(0, length - side - int(lines.min())))
