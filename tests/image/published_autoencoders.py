"""Names, shapes and forward passes of the published convolutional autoencoders, from their description alone.

KL-16 is models/vae.py of LTH14/mar, MaskGIT-VQ is modeling/modules/maskgit_vqgan.py of bytedance/1d-tokenizer. Nothing
here reads our own layers: the tests compare them with this.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Shapes = dict[str, tuple[int, ...]]


def conv(name: str, i: int, o: int, kernel: int = 3, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (o, i, kernel, kernel)} | ({f"{name}.bias": (o,)} if bias else {})


def norm(name: str, c: int) -> Shapes:
    return {f"{name}.weight": (c,), f"{name}.bias": (c,)}


def res(name: str, i: int, o: int, maskgit: bool) -> Shapes:
    bias = not maskgit
    shapes = norm(f"{name}.norm1", i) | conv(f"{name}.conv1", i, o, bias=bias)
    shapes |= norm(f"{name}.norm2", o) | conv(f"{name}.conv2", o, o, bias=bias)
    if i != o:
        shapes |= conv(f"{name}.nin_shortcut", o if maskgit else i, o, 1, bias)
    return shapes


def attn(name: str, c: int) -> Shapes:
    shapes = norm(f"{name}.norm", c)
    for part in ("q", "k", "v", "proj_out"):
        shapes |= conv(f"{name}.{part}", c, c, 1)
    return shapes


def kl16_shapes(ch: int = 128, mult: Sequence[int] = (1, 1, 2, 2, 4), z: int = 16, attention: int = 4) -> Shapes:
    """Two blocks a level, attention at level ``attention`` of the encoder and in both middles."""
    top = ch * mult[-1]
    out = conv("encoder.conv_in", 3, ch) | conv("decoder.conv_in", z, top)
    before = ch
    for i, m in enumerate(mult):
        for j in range(2):
            out |= res(f"encoder.down.{i}.block.{j}", before, ch * m, False)
            before = ch * m
            if i == attention:
                out |= attn(f"encoder.down.{i}.attn.{j}", before)
        if i < len(mult) - 1:
            out |= conv(f"encoder.down.{i}.downsample.conv", before, before)
    for part in ("encoder", "decoder"):
        out |= res(f"{part}.mid.block_1", top, top, False) | res(f"{part}.mid.block_2", top, top, False)
        out |= attn(f"{part}.mid.attn_1", top)
    for i in reversed(range(len(mult))):
        for j in range(3):
            out |= res(f"decoder.up.{i}.block.{j}", before, ch * mult[i], False)
            before = ch * mult[i]
        if i:
            out |= conv(f"decoder.up.{i}.upsample.conv", before, before)
    out |= norm("encoder.norm_out", top) | conv("encoder.conv_out", top, 2 * z)
    out |= norm("decoder.norm_out", ch * mult[0]) | conv("decoder.conv_out", ch * mult[0], 3)
    return out | conv("quant_conv", 2 * z, 2 * z, 1) | conv("post_quant_conv", z, z, 1)


def maskgit_shapes(ch: int = 128, mult: Sequence[int] = (1, 1, 2, 2, 4), z: int = 256, codes: int = 1024) -> Shapes:
    """Two blocks a level in encoder and decoder, means for down-sampling, no attention."""
    top = ch * mult[-1]
    out = conv("encoder.conv_in", 3, ch, bias=False) | conv("decoder.conv_in", z, top)
    before = ch
    for i, m in enumerate(mult):
        for j in range(2):
            out |= res(f"encoder.down.{i}.block.{j}", before, ch * m, True)
            before = ch * m
    for part in ("encoder", "decoder"):
        out |= res(f"{part}.mid.0", top, top, True) | res(f"{part}.mid.1", top, top, True)
    for i in reversed(range(len(mult))):
        for j in range(2):
            out |= res(f"decoder.up.{i}.block.{j}", before, ch * mult[i], True)
            before = ch * mult[i]
        if i:
            out |= conv(f"decoder.up.{i}.upsample_conv", before, before)
    out |= norm("encoder.norm_out", top) | conv("encoder.conv_out", top, z, 1)
    out |= norm("decoder.norm_out", ch * mult[0]) | conv("decoder.conv_out", ch * mult[0], 3)
    return out | {"quantize.embedding.weight": (codes, z)}


def random_state(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Every tensor different, of a size that keeps activations near 1."""
    g = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        fan_in = 1
        for n in shape[1:]:
            fan_in *= n
        draw = torch.randn(shape, generator=g)
        offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        state[name] = offset + draw * (0.1 if len(shape) == 1 else fan_in**-0.5)
    return state


class Reference:
    """Runs a published state dict; ``channels_per_group`` replaces the published 32 groups at tiny widths."""

    def __init__(self, state: dict[str, Tensor], levels: int, maskgit: bool, channels_per_group: int = 4):
        self.s, self.levels, self.maskgit, self.cpg = state, levels, maskgit, channels_per_group

    def conv(self, name: str, x: Tensor, **how: int) -> Tensor:
        return F.conv2d(x, self.s[f"{name}.weight"], self.s.get(f"{name}.bias"), **how)

    def norm(self, name: str, x: Tensor) -> Tensor:
        w, b = self.s[f"{name}.weight"], self.s[f"{name}.bias"]
        groups = x.unflatten(1, (-1, self.cpg))  # (B, groups, channels of one, H, W)
        var, mean = torch.var_mean(groups, (2, 3, 4), correction=0, keepdim=True)
        x = ((groups - mean) / (var + 1e-6).sqrt()).flatten(1, 2)
        return x * w[:, None, None] + b[:, None, None]

    def res(self, name: str, x: Tensor) -> Tensor:
        h = self.norm(f"{name}.norm1", x)
        h = self.conv(f"{name}.conv1", h * h.sigmoid(), padding=1)
        h = self.norm(f"{name}.norm2", h)
        h = self.conv(f"{name}.conv2", h * h.sigmoid(), padding=1)
        if f"{name}.nin_shortcut.weight" in self.s:
            x = self.conv(f"{name}.nin_shortcut", h if self.maskgit else x)
        return x + h

    def attn(self, name: str, x: Tensor) -> Tensor:
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{p}", h).flatten(2) for p in "qkv")
        weights = torch.einsum("bci,bcj->bij", q, k * x.shape[1] ** -0.5).softmax(-1)
        return x + self.conv(f"{name}.proj_out", torch.einsum("bij,bcj->bci", weights, v).view_as(x))

    def level(self, name: str, x: Tensor) -> Tensor:
        j = 0
        while f"{name}.block.{j}.norm1.weight" in self.s:
            x = self.res(f"{name}.block.{j}", x)
            if f"{name}.attn.{j}.norm.weight" in self.s:
                x = self.attn(f"{name}.attn.{j}", x)
            j += 1
        return x

    def middle(self, part: str, x: Tensor) -> Tensor:
        if self.maskgit:
            return self.res(f"{part}.mid.1", self.res(f"{part}.mid.0", x))
        return self.res(f"{part}.mid.block_2", self.attn(f"{part}.mid.attn_1", self.res(f"{part}.mid.block_1", x)))

    def last(self, part: str, x: Tensor, padding: int) -> Tensor:
        h = self.norm(f"{part}.norm_out", x)
        return self.conv(f"{part}.conv_out", h * h.sigmoid(), padding=padding)

    def encode(self, x: Tensor) -> Tensor:
        x = self.conv("encoder.conv_in", x, padding=1)
        for i in range(self.levels):
            x = self.level(f"encoder.down.{i}", x)
            if i < self.levels - 1 and self.maskgit:
                x = F.avg_pool2d(x, 2)
            elif i < self.levels - 1:
                x = self.conv(f"encoder.down.{i}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        return self.last("encoder", self.middle("encoder", x), 0 if self.maskgit else 1)

    def decode(self, z: Tensor) -> Tensor:
        x = self.middle("decoder", self.conv("decoder.conv_in", z, padding=1))
        for i in reversed(range(self.levels)):
            x = self.level(f"decoder.up.{i}", x)
            if i:
                name = f"decoder.up.{i}.upsample_conv" if self.maskgit else f"decoder.up.{i}.upsample.conv"
                x = self.conv(name, x.repeat_interleave(2, 2).repeat_interleave(2, 3), padding=1)
        return self.last("decoder", x, 1)
