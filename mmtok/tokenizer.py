"""The one interface: `Tokenizer`, and what images and sound add to it (input of any kind in, exact size out)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmtok.catalogue import Taxonomy
from mmtok.data import audio as audio_io
from mmtok.data import images as image_io
from mmtok.layers.shipped import packed, unpacked
from mmtok.layers.text import TextEncoder, TextFeatures, build_text_encoder
from mmtok.quantizers.base import Quantized
from mmtok.tokens import Tokens, TokensError, TokenSpec, side_value, write_atomic

CHECKPOINT_FORMAT = "mmtok-checkpoint-1"
TRAINING_STATE = (".cluster_size", ".codebook_sum")  # statistics that only training reads


class CheckpointError(ValueError):
    """A checkpoint folder that is incomplete, damaged or was changed after it was written."""


@dataclasses.dataclass
class Reconstruction:
    """What `forward` returns: ``x_hat`` like the input, the quantizer's result, and named extra losses or features."""

    x_hat: Tensor
    quantized: Quantized
    aux: dict[str, Tensor] = dataclasses.field(default_factory=dict)


class Tokenizer(nn.Module):
    """Base of every tokenizer. ``encode(x) -> Tokens``; ``decode(tokens)`` gives back exactly the input's size.

    A subclass sets ``config`` (the keyword arguments that rebuild it), names its ``type_name`` (a key of
    ``auto.TOKENIZERS``) and fills `base_spec`.
    """

    type_name: ClassVar[str] = ""
    modality: ClassVar[str] = ""
    encode_only: ClassVar[bool] = False  # its codes are for reading: decode raises a ValueError

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = config
        self.name = self.type_name
        self.about: dict[str, Any] = {}  # fields of `Taxonomy` that the training decided; kept in config.json
        self.licences: dict[str, str] = {}  # of "code" and "weights", where they are another package's
        self._hash: tuple[tuple, str] | None = None
        self._text_encoder: TextEncoder | None = None

    def base_spec(self) -> TokenSpec:
        """The spec without name and fingerprint."""
        raise NotImplementedError(f"{type(self).__name__} must say what its codes mean")

    @property
    def spec(self) -> TokenSpec:
        """What this tokenizer's codes mean. The fingerprint follows the weights."""
        return dataclasses.replace(self.base_spec(), name=self.name, fingerprint=self.fingerprint)

    @property
    def fingerprint(self) -> str:
        """16 hex digits over config and weights, recomputed when a weight has changed or was replaced.

        Fused optimizers and ``.data`` change weights without a trace, so nothing is remembered in training mode.
        """
        state = tuple((t._version, t.data_ptr(), t.dtype) for t in (*self.parameters(), *self.buffers()))
        if self.training or self._hash is None or self._hash[0] != state:
            self._hash = (state, fingerprint_of(self.type_name, self.config, self.weights()))
        return self._hash[1]

    def train(self, mode: bool = True) -> Tokenizer:
        """As `torch.nn.Module.train`; the fingerprint is computed anew afterwards."""
        self._hash = None
        return super().train(mode)

    def weights(self) -> dict[str, Tensor]:
        """State that inference reads and a checkpoint holds: without the codebooks' training statistics, and without
        frozen helpers that the config names with a checksum (modules with ``external_weights``)."""
        external = self.external_prefixes()
        state = self.state_dict()
        return {k: v for k, v in state.items() if not k.endswith(TRAINING_STATE) and not k.startswith(external)}

    def external_prefixes(self) -> tuple[str, ...]:
        """Prefixes of the state dict's keys whose values come from outside the checkpoint."""
        return tuple(f"{name}." for name, m in self.named_modules() if getattr(m, "external_weights", False))

    @classmethod
    def taxonomy(cls, config: Mapping[str, Any], spec: TokenSpec) -> Taxonomy | None:
        """The columns of `mmtok list` for a tokenizer with this config; None where the class says nothing of it.

        How a checkpoint was trained is not in its config: `about` overrules the fields it names.
        """
        del config, spec
        return None

    @property
    def device(self) -> torch.device:
        """Where the weights are; the CPU for what has none."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def encode(
        self,
        x: Any,
        sample_rate: int | None = None,
        text: Any = None,
        num_codebooks: int | None = None,
        num_tokens: int | None = None,
    ) -> Tokens:
        raise NotImplementedError(f"{type(self).__name__} has no encode")

    def decode(
        self,
        tokens: Tokens,
        text: Any = None,
        size: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor | list[Tensor]:
        raise NotImplementedError(f"{type(self).__name__} has no decode")

    def _check_conditions(self, text: Any) -> None:
        if text is not None and "text" not in self.base_spec().conditions:
            raise ValueError(f"{self.name}: text was given, but this tokenizer takes no text; leave it out")

    def text_features(self, text: Any, count: int) -> TextFeatures | None:
        """Features of ``count`` texts: strings (through the text encoder that the config names), or given ones.

        Args:
            text: None, one string for all items, a list of ``count`` strings, `TextFeatures`, or a tensor (B, S, D).

        Raises:
            ValueError: another count, width or type. ImportError: the text encoder is not installed.
        """
        if text is None:
            return None
        config = self.config.get("text_encoder")
        if isinstance(text, str) or (isinstance(text, (list, tuple)) and all(isinstance(t, str) for t in text)):
            texts = [text] * count if isinstance(text, str) else list(text)
            if len(texts) != count:
                raise ValueError(f"text: expected one string, or {count} (one an item), got {len(texts)}")
            if config is None:
                raise ValueError(f"text: {self.name} names no text encoder; pass features (B, S, D) instead of strings")
            if self._text_encoder is None:
                self._text_encoder = build_text_encoder(config)
            return self._text_encoder.to(self.device)(texts)
        features: Any = text
        if isinstance(features, Tensor):
            whole = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
            features = TextFeatures(features, whole)
        if not isinstance(features, TextFeatures):
            kind = type(text).__name__
            raise ValueError(f"text: expected strings, TextFeatures or a tensor of features (B, S, D), got {kind}")
        if not bool(torch.isfinite(features.states[features.mask]).all()):
            raise ValueError("text: expected finite features, got NaN or infinity")
        if len(features.states) != count:
            raise ValueError(f"text: expected features of {count} items, got {len(features.states)}")
        if config is not None and features.states.shape[2] != config["dim"]:
            raise ValueError(
                f"text: expected features of width {config['dim']} ({config['type']}), got {features.states.shape[2]}"
            )
        return features.to(self.device)

    def use_text_encoder(self, source: str | Path) -> None:
        """Read the text encoder that the config names from a local folder instead: the same weights, elsewhere.

        Raises:
            ValueError: this tokenizer reads no text.
        """
        if self.config.get("text_encoder") is None:
            raise ValueError(f"{self.name} names no text encoder, so there is none to replace")
        self._text_encoder = build_text_encoder({**self.config["text_encoder"], "source": str(source)})

    def _check_counts(self, num_codebooks: int | None, num_tokens: int | None) -> None:
        Q = self.base_spec().num_codebooks
        if num_codebooks is not None and not 1 <= num_codebooks <= Q:
            raise ValueError(f"num_codebooks: expected 1..{Q} for {self.name}, got {num_codebooks}")
        if num_tokens is not None and num_tokens < 1:
            raise ValueError(f"num_tokens: expected at least 1, got {num_tokens}")

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write ``model.safetensors`` and ``config.json`` into ``folder``; the model takes the rounding of ``dtype``.

        ``torch.int8`` stores matrices and kernels with one step a row (half of float16), codebooks and whatever is
        small as float16. The weights in memory are rounded too, so that this object and what `mmtok.load` reads give
        the same codes. Raises ValueError when a weight is too large for ``dtype``; nothing is changed or written then.
        """
        from safetensors.torch import save

        if not dtype.is_floating_point and dtype != torch.int8:
            raise ValueError(f"dtype: expected a floating type such as torch.float16, or torch.int8, got {dtype}")
        plain = torch.float16 if dtype == torch.int8 else dtype
        floats = {k: v for k, v in self.weights().items() if v.is_floating_point()}
        for key, value in floats.items():
            if not bool((value.to(plain).isfinite() | ~value.isfinite()).all()):
                largest = float(value.abs().max())
                raise ValueError(f"{key} holds {largest:.3g}, too large for {plain}; save as torch.float32")
        stored = {k: v.detach().to(plain if k in floats else v.dtype).cpu() for k, v in self.weights().items()}
        if dtype == torch.int8:
            stored |= packed({k: v.detach().cpu() for k, v in floats.items() if not k.startswith("quantizer.")}, plain)
        rounded = unpacked(stored)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with torch.no_grad():
            for key, tensor in floats.items():  # they share memory and version with the parameters and buffers
                tensor.copy_(rounded[key].to(tensor.dtype))
        stored = {k: v.contiguous() for k, v in stored.items()}
        config = {
            "format": CHECKPOINT_FORMAT,
            "type": self.type_name,
            "config": self.config,
            "spec": self.spec.to_dict(),
        }
        config |= {"about": self.about} if self.about else {}
        write_atomic(folder / "model.safetensors", save(stored, metadata={"format": CHECKPOINT_FORMAT}))
        write_atomic(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def fingerprint_of(type_name: str, config: dict[str, Any], weights: dict[str, Tensor]) -> str:
    """Hash of the type, the config and every weight read as float32 (integers as they are), in the order of names."""
    digest = hashlib.sha256(json.dumps([type_name, config], sort_keys=True).encode())
    for key in sorted(weights):
        value = weights[key].detach().cpu()
        value = value.float() if value.is_floating_point() else value
        digest.update(f"{key}{tuple(value.shape)}".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def stack(items: list[Tensor]) -> Tensor | list[Tensor]:
    """One batch tensor when all items have one shape, else the list."""
    return torch.stack(items) if len({tuple(i.shape) for i in items}) == 1 else items


def integers(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


class ImageTokenizer(Tokenizer):
    """Images of any H x W, grey, RGB or RGBA.

    Pictures of one size are encoded together; no picture is padded because of another. A picture whose longer side is
    above ``max_size`` is encoded from a copy reduced to it (antialiased bicubic), and enlarged again by decode; its
    true height and width travel in ``side``. RGBA is laid over white and comes back opaque.
    """

    modality = "image"
    max_size: int = 256
    default_size: int = 128
    batch_limit: int = 32

    def encode_pixels(
        self, x: Tensor, num_codebooks: int | None, num_tokens: int | None, text: TextFeatures | None
    ) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [0, 1] of `encode_size` -> codes (B, Q, T) and the valid positions of each item (B,)."""
        raise NotImplementedError

    def decode_pixels(
        self,
        codes: Tensor,
        height: int,
        width: int,
        text: TextFeatures | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """One item's valid codes (1, Q, T), any prefix in Q and T -> (1, 3, height, width)."""
        raise NotImplementedError

    @torch.no_grad()
    def encode(
        self,
        x: Any,
        sample_rate: int | None = None,
        text: Any = None,
        num_codebooks: int | None = None,
        num_tokens: int | None = None,
    ) -> Tokens:
        """Encode a path, PIL image, array, tensor or a list of them; see `mmtok.data.images.to_pictures`.

        ``text`` (for tokenizers whose spec names it as a condition) is one string for all pictures, one for each, or
        features; see `text_features`. Raises ValueError naming expected and got for a wrong shape, dtype, range or NaN.
        """
        if sample_rate is not None:
            raise ValueError(f"{self.name}: sample_rate is for audio; leave it out for images")
        self._check_conditions(text)
        self._check_counts(num_codebooks, num_tokens)
        pictures, _ = image_io.to_pictures(x)
        features = self.text_features(text, len(pictures))
        groups: dict[tuple[int, int], list[int]] = {}
        for i, p in enumerate(pictures):
            groups.setdefault((p.pixels.shape[1], p.pixels.shape[2]), []).append(i)
        found: dict[int, Tensor] = {}
        with evaluation(self):
            for size, members in groups.items():
                for start in range(0, len(members), self.batch_limit):
                    part = members[start : start + self.batch_limit]
                    batch = torch.stack([image_io.to_rgb(pictures[i].pixels) for i in part]).to(self.device)
                    batch = self._resize(batch, self.encode_size(*size))
                    some = None if features is None else features[part]
                    codes, lengths = self.encode_pixels(batch, num_codebooks, num_tokens, some)
                    found.update((i, c[:, : int(n)]) for i, c, n in zip(part, codes, lengths, strict=True))
        codes = torch.nn.utils.rnn.pad_sequence([found[i].T for i in range(len(pictures))], batch_first=True)
        codes = codes.transpose(1, 2).contiguous()
        lengths = integers([found[i].shape[1] for i in range(len(pictures))]).to(codes.device)
        side = {
            "height": integers([p.pixels.shape[1] for p in pictures]),
            "width": integers([p.pixels.shape[2] for p in pictures]),
            "channels": integers([p.pixels.shape[0] for p in pictures]),
            "bit_depth": integers([p.bit_depth for p in pictures]),
        }
        return Tokens(codes, lengths, self.spec.keep(codes.shape[1]), {k: v.to(codes.device) for k, v in side.items()})

    def working_size(self, height: int, width: int) -> tuple[int, int]:
        """The size at which the network sees a picture: its own, or shrunk to ``max_size`` on the longer side."""
        scale = min(1.0, self.max_size / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))

    def encode_size(self, height: int, width: int) -> tuple[int, int]:
        """The size at which `encode_pixels` sees a picture, where it is not the one that `decode_pixels` makes."""
        return self.working_size(height, width)

    def size_without_side(self, num_tokens: int) -> tuple[int, int]:
        """Height and width at which codes decode that come without them, e.g. from a language model."""
        del num_tokens
        return self.default_size, self.default_size

    def _resize(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if tuple(x.shape[-2:]) == size:
            return x
        x = torch.nn.functional.interpolate(x, size, mode="bicubic", align_corners=False, antialias=True)
        return x.clamp(0, 1)

    @torch.no_grad()
    def decode(
        self,
        tokens: Tokens,
        text: Any = None,
        size: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor | list[Tensor]:
        """Pictures in [0, 1] with the input's height, width and channels: (B, C, H, W), or a list when they differ.

        Args:
            text: as in `encode`, for tokenizers whose spec names it as a condition.
            size: (H, W) to decode at instead of the stored one.
            generator: unused by deterministic decoders.
        """
        self._check_conditions(text)
        tokens.check(self.spec)
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"size: expected (height, width) of at least 1, got {size}")
        longest = self.base_spec().num_tokens
        if longest is not None and len(tokens) and int(tokens.lengths.max()) > longest:
            raise TokensError(f"lengths: expected at most {longest} tokens an image, got {int(tokens.lengths.max())}")
        features = self.text_features(text, len(tokens))
        out: list[Tensor] = []
        with evaluation(self):
            for i in range(len(tokens)):
                item = tokens[i]
                sides = range(1, image_io.MAX_PIXELS + 1)
                height, width = self.size_without_side(item.codes.shape[2])
                height = side_value(item, "height", height, sides)
                width = side_value(item, "width", width, sides)
                channels = side_value(item, "channels", 3, (1, 3, 4))
                height, width = size or (height, width)
                if height * width > image_io.MAX_PIXELS:
                    raise ValueError(f"expected at most {image_io.MAX_PIXELS} px, got {height} x {width}; pass size=")
                some = None if features is None else features[[i]]
                working = self.working_size(height, width)
                pixels = self.decode_pixels(item.codes.to(self.device), *working, some, generator)
                pixels = self._resize(pixels.float().clamp(0, 1), (height, width))[0]
                out.append(image_io.from_rgb(pixels, channels).cpu())
        return stack(out) if out else torch.zeros(0, 3, self.default_size, self.default_size)


class AudioTokenizer(Tokenizer):
    """Sound of any length, rate and channel count, for a mono model at ``sample_rate`` Hz.

    Sound at another rate is resampled to the model's and back (both rates stand in ``side``). Several channels are
    encoded one by one and their frames interleaved (position = frame * channels + channel), so two channels cost twice
    the bits; give a mono mix where that is not wanted. Where levels are slower than others (``level_strides``), a clip
    has whole groups of ``frame_group`` frames, and it is the groups that are interleaved.
    """

    modality = "audio"
    sample_rate: int = 16000
    hop_length: int = 320
    frame_group: int = 1

    def encode_samples(self, x: Tensor, lengths: Tensor, num_codebooks: int | None) -> Tensor:
        """(B, 1, L) zero past ``lengths`` (B,), both multiples of the hop -> codes (B, Q, T)."""
        raise NotImplementedError

    def decode_samples(self, codes: Tensor, lengths: Tensor) -> Tensor:
        """Codes (B, Q, T) with ``lengths`` (B,) frames -> (B, 1, T * hop)."""
        raise NotImplementedError

    @torch.no_grad()
    def encode(
        self,
        x: Any,
        sample_rate: int | None = None,
        text: Any = None,
        num_codebooks: int | None = None,
        num_tokens: int | None = None,
    ) -> Tokens:
        """Encode a path, array (C, L) with ``sample_rate`` in Hz, or a list of clips of different lengths.

        Raises ValueError naming expected and got for a missing rate, wrong shape, NaN, unscaled integers or silence
        of zero length.
        """
        self._check_conditions(text)
        self._check_counts(num_codebooks, num_tokens)
        sounds, _ = audio_io.to_sounds(x, sample_rate)
        hop = self.hop_length
        rows: list[Tensor] = []  # one mono row a channel
        frames: list[int] = []
        for s in sounds:
            samples = audio_io.resample(s.samples, s.sample_rate, self.sample_rate)
            frames.append(self.num_frames(samples.shape[-1]))
            rows.extend(samples)
        row_frames = [f for s, f in zip(sounds, frames, strict=True) for _ in range(s.samples.shape[0])]
        L = max(row_frames) * hop
        group = self.frame_group
        batch = torch.stack([audio_io.fit_length(r, L) for r in rows])[:, None].to(self.device)
        with evaluation(self):
            row_codes = self.encode_samples(batch, integers(row_frames).to(self.device) * hop, num_codebooks)
        codes, lengths, row = [], [], 0
        for s, T in zip(sounds, frames, strict=True):
            C = s.samples.shape[0]
            both = row_codes[row : row + C, :, :T]  # (C, Q, T)
            grouped = both.unflatten(2, (T // group, group))  # (C, Q, groups, frames of a group)
            codes.append(grouped.permute(1, 2, 0, 3).reshape(both.shape[1], T * C))
            lengths.append(T * C)
            row += C
        padded = torch.nn.utils.rnn.pad_sequence([c.T for c in codes], batch_first=True).transpose(1, 2).contiguous()
        side = {
            "num_samples": integers([s.samples.shape[1] for s in sounds]),
            "sample_rate": integers([s.sample_rate for s in sounds]),
            "channels": integers([s.samples.shape[0] for s in sounds]),
        }
        side = {k: v.to(padded.device) for k, v in side.items()}
        tokens = Tokens(padded, integers(lengths).to(padded.device), self.spec.keep(padded.shape[1]), side)
        return tokens if num_tokens is None else tokens.keep(num_tokens=num_tokens)

    @torch.no_grad()
    def decode(
        self,
        tokens: Tokens,
        text: Any = None,
        size: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor | list[Tensor]:
        """Sound with the input's length, rate and channels: (B, C, L), or a list of (C, L) when they differ.

        Without ``side`` (ids of a language model) it is mono at the model's own rate, T * hop samples. Tokens cut by
        ``keep(num_tokens=)`` give the beginning that they describe.
        """
        self._check_conditions(text)
        tokens.check(self.spec)
        if size is not None:
            raise ValueError("size: for images only; audio comes back with its own length")
        out: list[Tensor] = []
        with evaluation(self):
            for i in range(len(tokens)):
                item = tokens[i].to(self.device)
                C = side_value(item, "channels", 1, range(1, audio_io.MAX_CHANNELS + 1))
                rate = side_value(item, "sample_rate", self.sample_rate, audio_io.SAMPLE_RATES)
                groups, group = item.codes.shape[2] // (C * self.frame_group), self.frame_group
                T = groups * group  # whole groups of all channels
                rows = item.codes[0, :, : T * C].unflatten(1, (groups, C, group)).permute(2, 0, 1, 3).flatten(2)
                if T:
                    sound = self.decode_samples(rows, integers([T] * C).to(rows.device))[:, 0].float()
                else:
                    sound = torch.zeros(C, 0, device=rows.device)
                sound = audio_io.resample(sound, self.sample_rate, rate) if T else sound
                wanted = side_value(item, "num_samples", sound.shape[-1], range(2**63))
                out.append(self.exact(sound, self.true_length(T, wanted, rate)).cpu())
        return stack(out) if out else torch.zeros(0, 1, 0)

    def num_frames(self, num_samples: int) -> int:
        """Frames of a clip of ``num_samples`` at the model's rate: whole hops in whole groups."""
        group = self.frame_group
        return -(-num_samples // (self.hop_length * group)) * group

    def exact(self, sound: Tensor, length: int) -> Tensor:
        """The decoded ``sound`` (C, L), cut or padded with zeros to the length that it must have."""
        return audio_io.fit_length(sound, length)

    def true_length(self, frames: int, wanted: int, rate: int) -> int:
        """Samples at ``rate`` that ``frames`` describe when the clip has ``wanted``, rounded up as resampling does.

        A prefix of the tokens describes the beginning; anything else must give the exact length.
        """
        cut = frames * self.hop_length < -(-wanted * self.sample_rate // rate)
        return min(wanted, -(-frames * self.hop_length * rate // self.sample_rate)) if cut else wanted

    def streamer(self, num_codebooks: int | None = None) -> Any:
        """An encoder of sound that arrives in pieces, where the tokenizer is causal: see `mmtok.audio.stream`.

        Raises ValueError where codes depend on sound that is still to come.
        """
        raise ValueError(self._cannot_stream("encode"))

    def decode_streamer(self) -> Any:
        """A decoder of tokens that arrive in pieces, where the tokenizer is causal: see `mmtok.audio.stream`.

        Raises ValueError where the sound depends on codes that are still to come.
        """
        raise ValueError(self._cannot_stream("decode"))

    def _cannot_stream(self, instead: str) -> str:
        return (
            f"{self.name} is not causal: it looks ahead, so it cannot stream; use {instead}, which already works in "
            "pieces, or a tokenizer trained with causal=True"
        )

    def timing(self) -> dict[str, Any]:
        """What codes mean in time, for `mmtok info`: at least ``hop_length`` in samples and whether it ``streams``."""
        return {"hop_length": self.hop_length, "streams": False}


class evaluation:  # noqa: N801 - reads as a phrase: `with evaluation(model):`
    """Evaluation mode inside the block, the former mode after it: encode and decode never depend on train()."""

    def __init__(self, module: nn.Module):
        self.modules = [m for m in module.modules() if m.training]  # a part may be frozen in another mode

    def __enter__(self) -> None:
        for m in self.modules:
            m.training = False

    def __exit__(self, *exc: object) -> None:
        for m in self.modules:
            m.training = True
