"""What every wrapper of another package's tokenizer shares: raw or mitigated, licences, its frozen network."""

from __future__ import annotations

import abc
import copy
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from mmtok.catalogue import Family
from mmtok.data.hub import folder_of, source_name, weights_licence
from mmtok.grid import GridTokenizer
from mmtok.layers.conv2d import edge_pad
from mmtok.layers.receptive import pieces
from mmtok.layers.text import quiet
from mmtok.tokenizer import AudioTokenizer, Tokenizer
from mmtok.tokens import TokenSpec


class Wrapped(Tokenizer, abc.ABC):
    """A tokenizer whose network is another package's, or your own.

    Mitigated (the default), the laws of mmtok hold as far as the network allows. `raw` gives the package's own
    behaviour on the same weights, for measuring it (`mmtok check --raw`).

    Attributes:
        family: the entry of `mmtok list`; None for a codec that only a program knows.
        network: the package's model, frozen, in evaluation mode.
        mitigated: whether the laws are enforced.
        licences: of the ``code`` and the ``weights``.
    """

    family: ClassVar[Family | None] = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # A type of its own, so that codes are never taken for those of mmtok's module of the same name.
        cls.type_name = f"wrapper:{cls.__name__ if cls.family is None else cls.family.name}"

    def __init__(self, network: nn.Module, config: dict[str, Any], source: str | Path):
        """``config`` says, with the weights, what the codes mean: it goes into the fingerprint, ``source`` does not."""
        super().__init__(config)
        name = source_name(Path(source))
        self.name = name if self.family is None else f"{self.family.name}:{name}"
        self.network = network.eval().requires_grad_(False)
        self.mitigated = True
        self.licences = {
            "code": "not stated" if self.family is None else self.family.code_licence,
            "weights": weights_licence(self.family, Path(source)),
        }

    def raw(self) -> Self:
        """The same network without our mitigations: batches as they are, the package's own defaults and lengths."""
        other = copy.copy(self)
        other.mitigated = False
        return other

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Always refused: the weights stay in the folder that they were loaded from."""
        del folder, dtype
        raise ValueError(
            f"{self.name} is another package's tokenizer, which mmtok only reads; keep the weights where they are and "
            "load them as before"
        )


class WrappedAudio(Wrapped, AudioTokenizer):
    """A mono codec of another package. A subclass sets these, and writes `network_encode` and `network_decode`:

    sample_rate, hop_length, frame_group: as `AudioTokenizer`.
    codebook_sizes, level_strides: as `TokenSpec`.
    delay_samples: by how much the network's output is late (negative: early); mitigated decode undoes it.
    encode_margin, decode_margin: frames on either side that a frame depends on at most, so that long sound can be
        processed in pieces with the same result; None where that is unbounded (recurrence, attention).
    chunk_frames: frames of a piece.
    batch_limit: clips of one length that the network encodes together. 1 keeps the law that a clip's codes do not
        depend on its batch to the last code; more is faster on a GPU, and sums in another order may then flip a code
        that is equally near to two.

    Mitigations: clips of different lengths never share a padded batch; all levels unless asked; pieces overlap by the
    receptive field; the delay is undone; the sound has exactly the length that went in.
    """

    codebook_sizes: tuple[int, ...]
    level_strides: tuple[int, ...] = ()
    delay_samples: int = 0
    encode_margin: int | None = None
    decode_margin: int | None = None
    chunk_frames: int = 3000
    batch_limit: int = 1

    def base_spec(self) -> TokenSpec:
        rate = self.sample_rate / self.hop_length
        return TokenSpec(self.name, "audio", self.codebook_sizes, self.level_strides, frame_rate=rate)

    @abc.abstractmethod
    def network_encode(self, x: Tensor, lengths: Tensor, num_codebooks: int | None) -> Tensor:
        """The package's encode.

        Args:
            x: (B, 1, L), L whole frames (and groups), zeros past ``lengths``.
            lengths: (B,) samples of each item, whole frames; all are L when mitigated.
            num_codebooks: None only when raw: the package's own default.

        Returns:
            codes (B, Q, T), int64, levels that are slower than others repeated.
        """

    @abc.abstractmethod
    def network_decode(self, codes: Tensor) -> Tensor:
        """The package's decode: codes (B, Q, T), any prefix of the levels -> sound (B, 1, L) as long as it comes."""

    def encode_samples(self, x: Tensor, lengths: Tensor, num_codebooks: int | None) -> Tensor:
        if not self.mitigated:
            return self.network_encode(x, lengths, num_codebooks)
        Q = num_codebooks or len(self.codebook_sizes)
        codes = x.new_zeros((len(x), Q, x.shape[-1] // self.hop_length), dtype=torch.int64)
        for length in sorted(set(lengths.tolist())):  # one length at a time: nothing is padded because of another clip
            for rows in (lengths == length).nonzero()[:, 0].split(self.batch_limit):
                codes[rows, :, : length // self.hop_length] = self._encode_alike(x[rows, :, :length], Q)
        return codes

    def _encode_alike(self, x: Tensor, num_codebooks: int) -> Tensor:
        hop, parts = self.hop_length, []
        T = x.shape[-1] // hop
        for start, stop, left, right in self._pieces(T, self.encode_margin):
            part = x[..., (start - left) * hop : (stop + right) * hop]
            lengths = torch.full((len(x),), part.shape[-1], device=x.device)
            parts.append(self.network_encode(part, lengths, num_codebooks)[..., left : left + stop - start])
        codes = torch.cat(parts, 2)
        if codes.shape[1:] != (num_codebooks, T):
            found = tuple(codes.shape[1:])
            raise RuntimeError(
                f"{self.name}: expected codes of ({num_codebooks}, {T}) an item, the network gave {found}"
            )
        return codes

    def decode_samples(self, codes: Tensor, lengths: Tensor) -> Tensor:
        if not self.mitigated:
            return self.network_decode(codes)
        sound = torch.zeros(len(codes), 1, codes.shape[2] * self.hop_length, device=codes.device)
        for length in sorted(set(lengths.tolist())):
            rows = (lengths == length).nonzero()[:, 0]
            sound[rows, :, : length * self.hop_length] = self._decode_alike(codes[rows, :, :length])
        return sound

    def _decode_alike(self, codes: Tensor) -> Tensor:
        hop, parts = self.hop_length, []
        for start, stop, left, right in self._pieces(codes.shape[2], self.decode_margin):
            part = codes[..., start - left : stop + right]
            y = self._placed(self.network_decode(part).float(), part.shape[2] * hop)
            parts.append(y[..., left * hop : (left + stop - start) * hop])
        return torch.cat(parts, -1)

    def _pieces(self, T: int, margin: int | None) -> list[tuple[int, int, int, int]]:
        if margin is None:
            return [(0, T, 0, 0)]
        group = self.frame_group
        return pieces(T, max(1, self.chunk_frames // group) * group, -(-margin // group) * group)

    def _placed(self, y: Tensor, length: int) -> Tensor:
        """(B, 1, L) without the delay, cut or padded with zeros to ``length``."""
        y = F.pad(y, (-self.delay_samples, 0))
        return F.pad(y, (0, length - y.shape[-1]))

    def exact(self, sound: Tensor, length: int) -> Tensor:
        return super().exact(sound, length) if self.mitigated else sound

    def timing(self) -> dict[str, Any]:
        """As `AudioTokenizer.timing`, with the delay of the network and what pieces overlap by."""
        margins = {"encoder_frames": self.encode_margin, "decoder_frames": self.decode_margin}
        bounded = {k: "unbounded" if v is None else v for k, v in margins.items()}
        return super().timing() | {"network_delay_samples": self.delay_samples, "receptive_field": bounded}


class WrappedGrid(Wrapped, GridTokenizer):
    """A convolutional image tokenizer of another package. A subclass calls `set_sizes` and writes both methods.

    Mitigations: pictures are padded to whole cells by their edge pixels and cut again. Cells that a prefix lacks are
    decoded as code 0, for want of anything better.
    """

    sizes: tuple[int, ...]

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return self.sizes

    @abc.abstractmethod
    def network_encode(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1], whole cells when mitigated -> codes (B, Q, T) in raster order."""

    @abc.abstractmethod
    def network_decode(self, codes: Tensor, rows: int, columns: int) -> Tensor:
        """Codes (B, Q, rows * columns) -> (B, 3, H, W), about [0, 1], not clipped."""

    def grid_codes(self, x: Tensor, num_codebooks: int | None) -> Tensor:
        codes = self.network_encode(edge_pad(x, self.factor) if self.mitigated else x)
        return codes[:, :num_codebooks]

    def grid_pixels(self, codes: Tensor, rows: int, columns: int) -> Tensor:
        codes = F.pad(codes, (0, rows * columns - codes.shape[2], 0, len(self.sizes) - codes.shape[1]))
        return self.network_decode(codes, rows, columns)


def require(package: str, family: Family) -> ModuleType:
    """Import a module of the package that runs ``family``. Raises ImportError naming the command that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError as e:
        raise ImportError(f"{family.name} needs the package {family.package} ({e}): {family.install}") from e


def transformers_model(family: Family, class_name: str, source: str) -> tuple[Any, Path]:
    """A transformers model of a folder or hub repository, float32 and frozen, and the folder.

    Raises:
        ValueError: no such folder, another type of model, damaged, missing or foreign weights.
        ImportError: transformers is not installed.
    """
    folder = folder_of(source, ("config.json", "*.safetensors", "preprocessor_config.json"))
    cls = getattr(require("transformers", family), class_name)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; expected a folder that transformers' {class_name} has saved")
    try:
        found = json.loads((folder / "config.json").read_text())["model_type"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as e:
        reason = f"config.json names no model_type ({e!r}); restore the file"
        raise ValueError(f"{folder} is no readable folder of transformers' {class_name}: {reason}") from e
    if found != (wanted := cls.config_class.model_type):
        reason = f"it holds a model of type {found!r}, expected {wanted!r}; open it as its own family"
        raise ValueError(f"{folder} is no readable folder of transformers' {class_name}: {reason}")
    try:
        with quiet(require("transformers", family)):
            network, info = cls.from_pretrained(
                str(folder), local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
    except Exception as e:  # transformers, safetensors and huggingface_hub raise errors of their own
        reason = " ".join(str(e).split())[:300]
        raise ValueError(f"{folder} is no readable folder of transformers' {class_name}: {reason}") from e
    absent = sorted(info["missing_keys"]) + sorted(str(k) for k in info.get("mismatched_keys", ()))
    if absent:
        raise ValueError(
            f"{folder}: weights of {class_name} are missing or do not fit: {absent[:3]}; restore the folder"
        )
    return network, folder
