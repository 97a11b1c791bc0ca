"""The exact receptive field of a stack of convolutions, and the pieces of long sound that overlap by it."""

from __future__ import annotations

from torch import nn

from mmtok.layers.conv1d import Conv1d, ConvTranspose1d


def positions_read(stack: nn.Module, first: int, last: int) -> tuple[int, int]:
    """First and last input position (negative before 0) that the outputs ``first`` .. ``last`` of ``stack`` depend on.

    Counts every `Conv1d` and `ConvTranspose1d` inside, in the order in which they are defined: true for a stack that
    runs them in that order, with skips that only pass positions straight on (`mmtok.layers.seanet`).
    """
    for layer in reversed([m for m in stack.modules() if isinstance(m, (Conv1d, ConvTranspose1d))]):
        if isinstance(layer, Conv1d):
            first = first * layer.stride - layer.left
            last = last * layer.stride + layer.stride - 1 + layer.right
        else:  # two taps: a position reaches its own outputs and those of the position after it
            first, last = (first + layer.cut) // layer.stride - 1, (last + layer.cut) // layer.stride
    return first, last


def pieces(T: int, size: int, margin: int) -> list[tuple[int, int, int, int]]:
    """(start, stop, frames of context on the left, on the right) that cover T frames in steps of ``size``."""
    return [
        (start, min(start + size, T), min(margin, start), min(margin, T - min(start + size, T)))
        for start in range(0, T, size)
    ]
