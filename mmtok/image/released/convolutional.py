"""Names of VQGAN's layers, which MAR's KL-16 and MaskGIT-VQ share: ours -> published."""

from __future__ import annotations

from mmtok.image.released.renaming import with_bias
from mmtok.layers.conv2d import ConvShape

Published = dict[str, list[str]]


def layer(ours: str, published: str, bias: bool) -> Published:
    """A layer's weight, and its bias where it has one."""
    names = with_bias(ours, published)
    return names if bias else {k: v for k, v in names.items() if k.endswith(".weight")}


def block_names(ours: str, published: str, widths: tuple[int, int], bias: bool) -> Published:
    """A residual block; the shortcut has weights where the width changes."""
    names = with_bias(f"{ours}.norm1", f"{published}.norm1") | with_bias(f"{ours}.norm2", f"{published}.norm2")
    names |= layer(f"{ours}.conv1", f"{published}.conv1", bias) | layer(f"{ours}.conv2", f"{published}.conv2", bias)
    return names if widths[0] == widths[1] else names | layer(f"{ours}.shortcut", f"{published}.nin_shortcut", bias)


def attention_names(ours: str, published: str) -> Published:
    """Ours joins the 1 x 1 convolutions of query, key and value."""
    names = with_bias(f"{ours}.norm", f"{published}.norm") | with_bias(f"{ours}.proj", f"{published}.proj_out")
    return names | with_bias(f"{ours}.qkv", *(f"{published}.{part}" for part in "qkv"))


def middle_names(part: str, shape: ConvShape) -> Published:
    """The blocks at the coarsest grid of ``part``, encoder or decoder."""
    width, bias = shape.widths[-1], shape.style != "maskgit"
    second = 2 if shape.middle_attention else 1
    blocks = ("block_1", "block_2") if bias else ("0", "1")
    names = block_names(f"{part}.middle.0", f"{part}.mid.{blocks[0]}", (width, width), bias)
    names |= block_names(f"{part}.middle.{second}", f"{part}.mid.{blocks[1]}", (width, width), bias)
    return names | attention_names(f"{part}.middle.1", f"{part}.mid.attn_1") if shape.middle_attention else names


def encoder_names(shape: ConvShape) -> Published:
    bias, widths = shape.style != "maskgit", (shape.width, *shape.widths)
    names = layer("encoder.first", "encoder.conv_in", bias) | middle_names("encoder", shape)
    names |= with_bias("encoder.norm", "encoder.norm_out") | with_bias("encoder.last", "encoder.conv_out")
    for i in range(len(shape.widths)):
        for j in range(shape.blocks):
            ours, published = f"encoder.levels.{i}", f"encoder.down.{i}"
            between = (widths[i] if j == 0 else widths[i + 1], widths[i + 1])
            names |= block_names(f"{ours}.blocks.{j}", f"{published}.block.{j}", between, bias)
            if i in shape.attention:
                names |= attention_names(f"{ours}.attention.{j}", f"{published}.attn.{j}")
        if bias and i < len(shape.widths) - 1:  # else it is a mean, without weights
            names |= with_bias(f"encoder.levels.{i}.resample.conv", f"encoder.down.{i}.downsample.conv")
    return names


def decoder_names(shape: ConvShape) -> Published:
    """Ours counts the levels from the coarsest, as they run; the published ones from the finest."""
    bias, widths = shape.style != "maskgit", (*shape.widths, shape.widths[-1])
    names = with_bias("decoder.first", "decoder.conv_in") | middle_names("decoder", shape)
    names |= with_bias("decoder.norm", "decoder.norm_out") | with_bias("decoder.last", "decoder.conv_out")
    upsample = "upsample.conv" if bias else "upsample_conv"
    for i in range(len(shape.widths)):
        ours, published = f"decoder.levels.{len(shape.widths) - 1 - i}", f"decoder.up.{i}"
        for j in range(shape.blocks + (1 if bias else 0)):
            between = (widths[i + 1] if j == 0 else widths[i], widths[i])
            names |= block_names(f"{ours}.blocks.{j}", f"{published}.block.{j}", between, bias)
            if i in shape.decoder_attention:
                names |= attention_names(f"{ours}.attention.{j}", f"{published}.attn.{j}")
        if i:
            names |= with_bias(f"{ours}.resample.conv", f"{published}.{upsample}")
    return names
