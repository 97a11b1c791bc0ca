"""NVIDIA Cosmos discrete image tokenizers (arXiv 2501.03575), as the TorchScript files that are published."""

from __future__ import annotations

import hashlib
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmtok.catalogue import Family, Taxonomy
from mmtok.data.hub import folder_of
from mmtok.wrappers.raw_cells import RawCells

FILES = ("encoder.jit", "decoder.jit")
LEVELS = (8, 8, 8, 5, 5, 5)  # of the published FSQ; 64,000 codes
PROBE = 64  # pixels of the picture that shows the factor: whole cells of 8 and of 16
LARGEST = 1024  # pixels of the longer side: trained on crops at several resolutions, run up to 2048 by its authors


def open_cosmos(source: str) -> CosmosWrapper:
    """A folder or hub repository with encoder.jit and decoder.jit; nothing else in it is read but the card.

    Raises:
        ValueError: no such folder, a missing or damaged file, a tokenizer of video or with continuous latents.
    """
    folder = folder_of(source, FILES)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder}: expected {' and '.join(FILES)}, missing {missing}; download them from the model's page"
        )
    encoder, decoder = (_load(folder / name) for name in FILES)
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest()[:16] for name in FILES}
    return CosmosWrapper(encoder, decoder, folder, digests)


def _load(path: Path) -> nn.Module:
    with warnings.catch_warnings():  # torch recommends another format, which is not what NVIDIA publishes
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.load", category=DeprecationWarning)
        try:
            return torch.jit.load(str(path), map_location="cpu")
        except (RuntimeError, ValueError, OSError) as e:
            reason = " ".join(str(e).split())[:200]
            raise ValueError(f"{path} is no readable TorchScript file ({reason}); download it again") from e


FAMILY = Family(
    name="cosmos",
    title="Cosmos discrete image tokenizers: wavelets, convolutions, 64,000 codes of FSQ",
    modality="image",
    source="folder or hub repository with encoder.jit and decoder.jit",
    example="cosmos:nvidia/Cosmos-0.1-Tokenizer-DI16x16",
    package="torch",
    install="pip install torch",
    code_licence="Apache-2.0 (Cosmos-Tokenizer; the files are run by torch, BSD-3-Clause)",
    weights_licence="NVIDIA Open Model License",
    taxonomy=Taxonomy(
        architecture="DWT+CNN/CNN+DWT",
        input="P",
        quantization="FSQ",
        bitrate="F",
        objective=("GAN", "Perc", "Rec"),
        auxiliary=(),
        joint=True,
        domain="N",
        rate="256 (f16), 1024 (f8) at 256 px",
        order="2D",
    ),
    open=open_cosmos,
)


class CosmosWrapper(RawCells):
    """Two TorchScript modules: pixels (B, 3, H, W) in [-1, 1] -> (ids (B, h, w), vectors, ...), and ids -> pixels.

    The six digits of FSQ arrive as one id a cell, so there is one level of K = product of the levels: those in the
    file's ``_levels``, else the published 8, 8, 8, 5, 5, 5. Cells of 8 or 16 px: a probe shows which. Weights keep the
    type of the file (the published ones are bfloat16: traced casts may not be changed afterwards), so codes on another
    device may differ. NVIDIA's own `ImageTokenizer` pads both sides of a picture to multiples of 16; here the edge is
    repeated right and below. Pictures with a longer side above 1024 px are reduced.

    Args:
        encoder, decoder: the modules.
        source: where they came from, for the name and the model card.
        digests: of the files, for the fingerprint: constants of a trace are not among its weights.

    Raises:
        ValueError: the encoder does not make a square grid of integers of a square picture.
    """

    family = FAMILY

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, source: str | Path, digests: dict[str, str] | None = None
    ):
        levels = next((b.tolist() for name, b in encoder.named_buffers() if name.endswith("_levels")), list(LEVELS))
        config = {"levels": levels, "files": dict(digests or {})}
        super().__init__(nn.ModuleDict({"encoder": encoder, "decoder": decoder}), config, source)
        self.sizes = (math.prod(levels),)
        probe = self._ids(torch.zeros(1, 3, PROBE, PROBE), str(source))
        rows, columns = probe.shape[1:]
        if rows != columns or rows == 0 or PROBE % rows:
            raise ValueError(f"{source}: expected a square grid of whole cells for {PROBE} px, got {rows} x {columns}")
        self.id_type = probe.dtype  # what the decoder was traced with
        self.set_sizes(PROBE // rows, LARGEST)

    @torch.no_grad()
    def _ids(self, x: Tensor, where: str) -> Tensor:
        upstream: Any = self.upstream["encoder"]
        try:
            found = upstream(x.to(self.dtype))
        except RuntimeError as e:
            reason = " ".join(str(e).split())[-200:]
            raise ValueError(f"{where}: the encoder fails on {tuple(x.shape)}, a batch of pictures ({reason})") from e
        ids = found[0] if isinstance(found, (tuple, list)) else found
        if not isinstance(ids, Tensor) or ids.ndim != 3 or ids.is_floating_point():
            kind = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(
                f"{where}: expected integers (B, h, w) of a discrete image tokenizer (DI8x8, DI16x16), got {kind}; "
                "continuous (CI, CV) and video (DV) tokenizers have no ids of a picture"
            )
        return ids

    def network_encode(self, x: Tensor) -> Tensor:
        return self._ids(x * 2 - 1, self.name).flatten(1)[:, None].long()

    def network_decode(self, codes: Tensor, rows: int, columns: int) -> Tensor:
        x = self.upstream["decoder"](codes[:, 0].unflatten(1, (rows, columns)).to(self.id_type))
        return (x.float() + 1) / 2
