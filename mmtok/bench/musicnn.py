"""The music tagger musicnn (arXiv 1909.06654) without TensorFlow: its checkpoint is read here, its network is torch's.

Its second last layer, 200 numbers for 3 seconds, is a feature space for the Frechet audio distance (arXiv 1812.08466).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RATE, N_FFT, HOP, BANDS = 16000, 512, 256, 96
WINDOW = 187  # frames: the 3 seconds that it was trained on
NORM_EPSILON = 1e-3
TABLE_MAGIC, FOOTER, TRAILER = 0xDB4775248B80FB57, 48, 5  # of the index: a LevelDB table
FLOAT = 1  # TensorFlow's number of float32


def read_bundle(prefix: str | Path) -> dict[str, Tensor]:
    """The float32 tensors of a TensorFlow checkpoint, ``PREFIX.index`` and ``PREFIX.data-00000-of-00001``.

    The index is a LevelDB table: blocks of entries whose keys share a prefix with the key before; its values are
    protocol buffers with the type, the shape, and the place of a tensor in the data. Other types are left out.

    Raises:
        FileNotFoundError: a file is missing. ValueError: no such table, compressed, or data cut short.
    """
    index, data = (Path(f"{prefix}{end}").read_bytes() for end in (".index", ".data-00000-of-00001"))
    try:
        if len(index) < FOOTER or struct.unpack("<Q", index[-8:])[0] != TABLE_MAGIC:
            raise ValueError("no table of tensors")
        at = 0
        handle = []  # of the block that lists the others, behind that of another one, both in the footer
        for _ in range(4):
            number, at = _varint(index[-FOOTER:], at)
            handle.append(number)
        found = {}
        for _, place in _entries(index, handle[2], handle[3]):
            offset, at = _varint(place, 0)
            size, _ = _varint(place, at)
            for key, value in _entries(index, offset, size):
                tensor = _tensor(value, data) if key else None  # the entry without a key describes the whole
                if tensor is not None:
                    found[key.decode("utf-8")] = tensor
        return found
    except (IndexError, KeyError, TypeError, UnicodeDecodeError, struct.error, ValueError) as e:
        raise ValueError(f"{prefix}: damaged or no TensorFlow checkpoint ({str(e)[:120]}); fetch it again") from e


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, the lowest first, and where it ends."""
    number = shift = 0
    while True:
        byte = data[at]
        number |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return number, at


def _entries(table: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of one block; at its end stand the positions where keys are whole, and their number."""
    block, after = table[offset : offset + size], table[offset + size : offset + size + TRAILER]
    if len(after) < TRAILER or after[0] != 0:
        raise ValueError("a block that is compressed or cut short")
    end = size - 4 - 4 * struct.unpack("<I", block[-4:])[0]
    at, key = 0, b""
    while at < end:
        shared, at = _varint(block, at)
        own, at = _varint(block, at)
        length, at = _varint(block, at)
        key = key[:shared] + block[at : at + own]
        at += own
        yield key, block[at : at + length]
        at += length


def _fields(message: bytes) -> dict[int, list[Any]]:
    """The fields of a protocol buffer by their numbers, as integers or bytes."""
    found: dict[int, list[Any]] = {}
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        if tag & 7 == 0:
            value, at = _varint(message, at)
        else:
            length, at = _varint(message, at) if tag & 7 == 2 else ({1: 8, 5: 4}[tag & 7], at)
            value = message[at : at + length]
            at += length
        found.setdefault(tag >> 3, []).append(value)
    return found


def _tensor(entry: bytes, data: bytes) -> Tensor | None:
    """The tensor of a bundle's entry: 1 type, 2 shape (its field 2: sizes), 3 file, 4 offset, 5 bytes."""
    fields = _fields(entry)
    if fields.get(1, [0])[0] != FLOAT:
        return None
    sizes = [_fields(size).get(1, [0])[0] for size in _fields(fields.get(2, [b""])[0]).get(2, [])]
    offset, size = fields.get(4, [0])[0], fields.get(5, [0])[0]
    if fields.get(3, [0])[0] != 0 or size != 4 * math.prod(sizes) or offset + size > len(data):
        raise ValueError(f"a tensor of shape {sizes} in {size} bytes at {offset} of {len(data)}")
    if not size:
        return torch.zeros(sizes)
    return torch.frombuffer(bytearray(data[offset : offset + size]), dtype=torch.float32).reshape(sizes)


class MusicTagger(nn.Module):
    """Log-mel frames (B, T, 96) -> tags (B, tags) as logits and features (B, 200), in evaluation mode.

    Five convolutions read the spectrogram: two are 7 frames wide and high in frequency (timbre), three are one band
    high and long in time (rhythm); the largest value over frequency remains. Three more follow over time, the last two
    with residuals; maximum and mean over time of all of these go through a dense layer. Every activation is ReLU and
    stands in front of its norm.

    Args:
        weights: tensors as the checkpoint names them, ``conv2d/kernel``, ``batch_normalization_1/gamma`` ...

    Raises:
        ValueError: a tensor is missing.
    """

    bank: Tensor
    window: Tensor

    def __init__(self, weights: Mapping[str, Tensor]):
        super().__init__()
        self.front = nn.ModuleList(_conv(weights, i) for i in range(5))
        self.middle = nn.ModuleList(_conv(weights, i) for i in range(5, 8))
        self.norms = nn.ModuleList(_Norm(weights, i) for i in range(11))
        self.dense, self.tags = _linear(weights, "dense"), _linear(weights, "dense_1")
        from torchaudio.functional import melscale_fbanks

        bank = melscale_fbanks(N_FFT // 2 + 1, 0.0, RATE / 2, BANDS, RATE, norm="slaney", mel_scale="slaney")
        self.register_buffer("bank", bank, persistent=False)  # (257, 96)
        self.register_buffer("window", torch.hann_window(N_FFT), persistent=False)
        self.requires_grad_(False).eval()

    def frames(self, x: Tensor) -> Tensor:
        """(L,) sound of 16 kHz, L at least 512 -> (T, 96) log10(10000 mel power + 1), T = 1 + L / 256 rounded down."""
        spectrum = torch.stft(x.float(), N_FFT, HOP, window=self.window, pad_mode="reflect", return_complex=True)
        return (1e4 * (spectrum.abs().square().T @ self.bank) + 1).log10()

    def forward(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """See the class; T of any length, trained on 187."""
        x = self.norms[0](mel[:, None])  # (B,1,T,96)
        parts = []
        for i, conv in enumerate(self.front):
            high = cast(nn.Conv2d, conv).kernel_size[0]  # TensorFlow puts the odd frame of its padding at the end
            h = F.relu(conv(F.pad(x, (0, 0, (high - 1) // 2, high // 2))))
            parts.append(self.norms[i + 1](h).amax(3))  # (B,C,T)
        h = torch.cat(parts, 1).transpose(1, 2)[:, None]  # (B,1,T,561)
        maps = [h]
        for i, conv in enumerate(self.middle):
            y = F.relu(conv(F.pad(h, (0, 0, 3, 3))))  # (B,64,T,1)
            y = self.norms[i + 6](y).transpose(1, 3)  # (B,1,T,64)
            h = y + h if i else y
            maps.append(h)
        joined = torch.cat(maps, 3)[:, 0]  # (B,T,753)
        # Written as pairs (maximum, mean) of each channel, as the checkpoint's dense layer reads them.
        pooled = torch.stack([joined.amax(1), joined.mean(1)], 2).flatten(1)
        features = self.norms[10](F.relu(self.dense(self.norms[9](pooled))))
        return self.tags(features), features

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """(L,) sound of 16 kHz -> (N, 200): windows of 187 frames side by side, the last one ends with the sound.

        A sound of fewer frames is repeated until it has 187.
        """
        frames = self.frames(x)
        frames = frames.repeat(-(-WINDOW // len(frames)), 1)[:WINDOW] if len(frames) < WINDOW else frames
        starts = [*range(0, len(frames) - WINDOW, WINDOW), len(frames) - WINDOW]
        return self(torch.stack([frames[s : s + WINDOW] for s in starts]))[1]


class _Norm(nn.Module):
    """Batch norm with its stored statistics over dimension 1, as the numbers that it multiplies by and adds."""

    scale: Tensor
    shift: Tensor

    def __init__(self, weights: Mapping[str, Tensor], number: int):
        super().__init__()
        name = _name("batch_normalization", number)
        gamma, beta, mean, variance = (
            _take(weights, f"{name}/{part}") for part in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        scale = gamma * (variance + NORM_EPSILON).rsqrt()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", beta - mean * scale)

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, *[1] * (x.ndim - 2))
        return x * self.scale.view(shape) + self.shift.view(shape)


def _conv(weights: Mapping[str, Tensor], number: int) -> nn.Conv2d:
    name = _name("conv2d", number)
    kernel, bias = _take(weights, f"{name}/kernel"), _take(weights, f"{name}/bias")  # (time, band, in, out)
    high, wide, inputs, outputs = kernel.shape
    conv = nn.Conv2d(inputs, outputs, (high, wide))
    conv.weight, conv.bias = nn.Parameter(kernel.permute(3, 2, 0, 1).contiguous()), nn.Parameter(bias)
    return conv


def _linear(weights: Mapping[str, Tensor], name: str) -> nn.Linear:
    kernel, bias = _take(weights, f"{name}/kernel"), _take(weights, f"{name}/bias")
    linear = nn.Linear(*cast("tuple[int, int]", kernel.shape))
    linear.weight, linear.bias = nn.Parameter(kernel.T.contiguous()), nn.Parameter(bias)
    return linear


def _name(kind: str, number: int) -> str:
    """TensorFlow's name of the number-th layer of a kind."""
    return f"{kind}_{number}" if number else kind


def _take(weights: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in weights:
        raise ValueError(f"weights: expected a tensor named {name}, got {len(weights)} others; another network?")
    return weights[name]
