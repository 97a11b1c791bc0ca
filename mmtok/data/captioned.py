"""Captioned pictures as the recipes and the benchmark see them: split by caption, squares of one size."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import torch

from mmtok.data.sources import Source

HELD_OUT = {"test": 0.1, "val": 0.1}  # shares of all captions


def caption_split(text: str) -> str:
    """``test``, ``val`` or ``train`` from the hash of a caption's words, so that one concept is on one side."""
    words = " ".join(re.findall(r"\w+", text.lower()))
    value = int(hashlib.sha1(words.encode()).hexdigest()[:12], 16) / 16**12
    if value < HELD_OUT["test"]:
        return "test"
    return "val" if value < HELD_OUT["test"] + HELD_OUT["val"] else "train"


def style_of(source: Source) -> str:
    """What a caption of a source says in front."""
    if "openclipart" in source.package:
        return "clip art"
    return {"photo": "photo", "emoji": "3D emoji", "stamp": "sticker"}.get(source.kind, "drawing")


def square(picture: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (size, size, 3): enlarged to the longer side, the rest filled with the edge's mean colour."""
    h, w = picture.shape[:2]
    scale = size / max(h, w)
    H, W = max(1, round(h * scale)), max(1, round(w * scale))
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()[None]
    x = torch.nn.functional.interpolate(x, (H, W), mode="bicubic", align_corners=False, antialias=True)[0]
    edge = torch.cat([x[:, 0], x[:, -1], x[:, :, 0], x[:, :, -1]], 1).mean(1)
    out = edge[:, None, None].expand(3, size, size).clone()
    top, left = (size - H) // 2, (size - W) // 2
    out[:, top : top + H, left : left + W] = x
    return out.clamp(0, 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
