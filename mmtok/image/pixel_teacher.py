"""A 2-D tokenizer as the teacher of a 1-D one: its codes are predicted first, its decoder is tuned then (TiTok)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmtok.image.raster2d import Raster2D


class PixelTeacher(nn.Module):
    """The frozen 2-D tokenizer that the first stage learns from, in two halves.

    The reader (pictures to codes) serves the first stage only and is gone in the second; codebook and decoder turn the
    logits over its codes into pixels and are tuned in the second.

    Args:
        config: of a `Raster2D` with one codebook. stage: 1 or 2.
    """

    def __init__(self, config: Mapping[str, Any], stage: int):
        super().__init__()
        source = Raster2D(**config)
        sizes = source.quantizer.codebook_sizes
        if len(sizes) != 1:
            raise ValueError(f"teacher: expected a quantizer with one codebook, got {len(sizes)}")
        self.factor, self.teacher_config = source.factor, source.config
        self.codebook = nn.Parameter(torch.zeros(sizes[0], source.quantizer.dim))
        self.decoder, self.from_quantizer, self.pixel_range = source.decoder, source.from_quantizer, source.pixel_range
        if self.codebook.device.type != "meta":
            self._read_codebook(source)
        del source.decoder, source.from_quantizer
        self.reader = source if stage == 1 else None

    @torch.no_grad()
    def _read_codebook(self, source: Raster2D) -> None:
        every = torch.arange(len(self.codebook), device=self.codebook.device)
        self.codebook.copy_(source.quantizer.decode(every[None, None])[0])

    @torch.no_grad()
    def adopt(self, teacher: Raster2D) -> None:
        """Take the weights of a trained teacher. Raises ValueError when it has another config, or after stage 1."""
        if self.reader is None:
            raise ValueError("adopt: expected stage 1, got stage 2, where the teacher has no encoder any more")
        if teacher.config != self.teacher_config:
            raise ValueError(
                f"teacher: expected a Raster2D of config {self.teacher_config}, got {teacher.config}; "
                "give TiTok the config of the teacher: teacher=teacher.config"
            )
        state = teacher.state_dict()
        self.reader.load_state_dict({k: v for k, v in state.items() if k in self.reader.state_dict()})
        self.decoder.load_state_dict(teacher.decoder.state_dict())
        self.from_quantizer.load_state_dict(teacher.from_quantizer.state_dict())
        self._read_codebook(teacher)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """(B, 3, H, W), H and W multiples of factor -> codes (B, h * w), the targets of the first stage."""
        if self.reader is None:
            raise ValueError("codes: expected stage 1, got stage 2, where the teacher has no encoder any more")
        with torch.autocast(x.device.type, enabled=False):
            return self.reader.quantizer.encode(self.reader.latent(x.float()))[:, 0]

    def forward(self, logits: Tensor, height: int, width: int) -> Tensor:
        """Logits (B, h * w, K) -> pixels (B, 3, height, width): the mean code vector of each cell, decoded."""
        z_q = logits.float().softmax(-1) @ self.codebook
        x = self.decoder(self.from_quantizer(z_q), height // self.factor, width // self.factor).float()
        return x * 0.5 + 0.5 if self.pixel_range == "signed" else x
