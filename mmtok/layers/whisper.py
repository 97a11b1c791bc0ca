"""The encoder of Whisper (arXiv 2212.04356, section 2.2) as a frozen speech teacher: 50 features a second of sound.

Its features are the mean over all hidden states, as X-Codec takes them of HuBERT (arXiv 2408.17175, section 3.2), each
number standardised by its mean and deviation over speech: Whisper has a few numbers that outgrow all others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmtok.layers.shipped import shipped_weights, unpacked

SHIPPED = "speech-whisper-tiny/model.safetensors"  # written by recipes/convert_speech.py
SHIPPED_SHA256 = "ccf615d0b5ed7599b8e8291aa7bbbc3d501edd5cbba7d9b94b89329bc121b737"
SHIPPED_SHAPE = {"dim": 384, "num_layers": 4, "num_heads": 6}
N_FFT, FRAME_STEP, N_MELS = 400, 160, 80  # 25 ms windows every 10 ms at 16 kHz
LONGEST = 1500  # frames of 20 ms: the half minute that Whisper was trained on


class _Layer(nn.Module):
    """Pre-norm attention and MLP; keys have no bias."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.value, self.out = (nn.Linear(dim, dim) for _ in range(3))
        self.key = nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class WhisperEncoder(nn.Module):
    """(B, 1, L) sound of 16 kHz -> (B, L / 320, dim) float32; frozen, always in evaluation mode.

    A sound is read in windows of ``window_frames`` that start at its beginning, each with ``context_frames`` of its
    neighbours on either side, so features of a long sound depend on their neighbourhood alone.

    Args:
        dim, num_layers, num_heads: of the transformer; Whisper tiny has 384, 4, 6.
        window_frames, context_frames: frames of 20 ms; together at most 1500.
        external_weights: the weights come from outside the checkpoint and are not saved with it.
    """

    mel: Tensor
    mean: Tensor
    deviation: Tensor
    sample_rate, hop_length = 16000, 320

    def __init__(
        self,
        dim: int,
        num_layers: int,
        num_heads: int,
        window_frames: int = 400,
        context_frames: int = 25,
        external_weights: bool = False,
    ):
        super().__init__()
        if window_frames < 1 or context_frames < 0 or window_frames + 2 * context_frames > LONGEST:
            raise ValueError(
                f"window_frames, context_frames: expected 1 or more, 0 or more, and window + 2 context <= {LONGEST}, "
                f"got {window_frames} and {context_frames}"
            )
        self.dim, self.window_frames, self.context_frames = dim, window_frames, context_frames
        self.external_weights = external_weights
        self.conv1 = nn.Conv1d(N_MELS, dim, 3, padding=1)
        self.conv2 = nn.Conv1d(dim, dim, 3, stride=2, padding=1)
        self.layers = nn.ModuleList(_Layer(dim, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)
        self.register_buffer("mel", torch.rand(N_MELS, N_FFT // 2 + 1) / N_FFT)  # the filterbank, from the checkpoint
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("deviation", torch.ones(dim))
        self.register_buffer("window", torch.hann_window(N_FFT), persistent=False)
        self.register_buffer("positions", sinusoids(LONGEST, dim), persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> WhisperEncoder:
        """Stays in evaluation mode: a teacher's features must not depend on who trains."""
        del mode
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Features of (B, 1, L), L a multiple of 320.

        Raises:
            ValueError: another shape or length.
        """
        if x.ndim != 3 or x.shape[1] != 1 or x.shape[2] % self.hop_length:
            raise ValueError(f"x: expected (B, 1, L) with L a multiple of {self.hop_length}, got {tuple(x.shape)}")
        T, parts = x.shape[2] // self.hop_length, []
        for start in range(0, T, self.window_frames):
            stop = min(start + self.window_frames, T)
            left, right = max(0, start - self.context_frames), min(T, stop + self.context_frames)
            states = self._window(x[:, 0, left * self.hop_length : right * self.hop_length])
            parts.append(states[:, start - left : stop - left])
        return torch.cat(parts, 1) if parts else x.new_zeros(x.shape[0], 0, self.dim, dtype=torch.float32)

    def _window(self, x: Tensor) -> Tensor:
        """(B, n * 320) -> (B, n, dim)."""
        states = self.hidden_states(self.log_mel(x))
        mean = torch.stack([s.float() for s in states]).mean(0)
        return (mean - self.mean) / self.deviation

    def log_mel(self, x: Tensor) -> Tensor:
        """(B, n * 320) -> (B, 80, 2 n) float32: log10 mel power, floored 80 dB below its largest value, then scaled."""
        with torch.autocast(x.device.type, enabled=False):
            x = F.pad(x.float()[:, None], (N_FFT // 2, N_FFT // 2), mode="reflect")[:, 0]
            window = cast(Tensor, self.window)
            spectrum = torch.stft(x, N_FFT, FRAME_STEP, window=window, center=False, return_complex=True)
            power = spectrum[..., :-1].abs().square()  # Whisper drops the last frame
            logs = (self.mel @ power).clamp_min(1e-10).log10()
            return torch.maximum(logs, logs.amax((1, 2), keepdim=True) - 8) / 4 + 1

    def hidden_states(self, mel: Tensor) -> list[Tensor]:
        """(B, 80, 2 n) -> the embedding and the output of every layer (B, n, dim), the last one normalised."""
        h = F.gelu(self.conv2(F.gelu(self.conv1(mel)))).transpose(1, 2)
        h = h + cast(Tensor, self.positions)[: h.shape[1]].to(h.dtype)
        states = [h]
        for layer in self.layers:
            h = layer(h)
            states.append(h)
        states[-1] = self.norm(h)
        return states


def sinusoids(length: int, dim: int) -> Tensor:
    """(length, dim): sines of dim / 2 wavelengths in geometric progression to 10000, then their cosines."""
    speeds = torch.exp(-math.log(10000) / (dim // 2 - 1) * torch.arange(dim // 2))
    angles = torch.arange(length)[:, None] * speeds
    return torch.cat([angles.sin(), angles.cos()], 1)


def build_whisper(config: Mapping[str, Any]) -> WhisperEncoder:
    """The encoder that ``config`` describes.

    ``{"type": "whisper"}`` is Whisper tiny as it ships with mmtok (8-bit, external); with ``dim``, ``num_layers`` and
    ``num_heads`` it is one with weights of its own, random at first. ``window_frames`` and ``context_frames`` are those
    of `WhisperEncoder`.

    Raises:
        ValueError: unknown keys, or shipped weights that are missing or damaged.
    """
    windows = {"window_frames", "context_frames"}
    shape = {k: v for k, v in config.items() if k in SHIPPED_SHAPE}
    unknown = sorted(set(config) - {"type"} - windows - set(SHIPPED_SHAPE))
    if unknown or (shape and set(shape) != set(SHIPPED_SHAPE)):
        raise ValueError(
            f"whisper: expected all or none of {sorted(SHIPPED_SHAPE)}, and {sorted(windows)}; got {sorted(config)}"
        )
    encoder = WhisperEncoder(
        **(shape or SHIPPED_SHAPE),
        **{k: config[k] for k in windows if k in config},
        external_weights=not shape,
    )
    if not shape and encoder.conv1.weight.device.type != "meta":
        encoder.load_state_dict(unpacked(shipped_weights(SHIPPED, SHIPPED_SHA256, "recipes/convert_speech.py")))
    return encoder
