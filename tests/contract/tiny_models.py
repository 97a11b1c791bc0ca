"""Tiny untrained tokenizers and their inputs, for the contract tests. A new tokenizer adds one line to `TINY`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmtok.audio.codec import AudioCodec
from mmtok.audio.dac import DAC
from mmtok.audio.encodec import EnCodec
from mmtok.audio.mimi import Mimi
from mmtok.audio.xcodec import XCodec, quantizer_preset
from mmtok.image.binary1d import Binary1D
from mmtok.image.bridge import Bridge
from mmtok.image.causal1d import Causal1D
from mmtok.image.dynamic import Dynamic
from mmtok.image.raster2d import Raster2D
from mmtok.image.textok import TexTok
from mmtok.image.titok import TiTok
from mmtok.quantizers.codebook import Codebook
from mmtok.tokenizer import Tokenizer


def tiny_binary1d(rope: str, resize: str, absolute_positions: bool) -> Binary1D:
    return Binary1D(
        num_tokens=6,
        num_bits=12,
        patch_size=4,
        encoder=(16, 2, 1),
        decoder=(16, 2, 1),
        head_dim=16,
        axes_dims=(4, 6, 6),
        rope=rope,
        resize=resize,
        absolute_positions=absolute_positions,
        image_size=48,
        quantizer={"bits_per_code": 4},
    )


def tiny_codec(causal: bool, codebook_dim: int | None = None) -> AudioCodec:
    return AudioCodec(
        strides=(8, 5, 4, 2),
        encoder_width=2,
        decoder_width=32,
        latent_dim=8,
        num_codebooks=3,
        codebook_size=16,
        codebook_dim=codebook_dim,
        dilations=(1, 3),
        causal=causal,
    )


def tiny_xcodec(front: str) -> XCodec:
    """With a Whisper of two windows a second, so that windows end within the test sounds."""
    strides = {"samples": (8, 5, 4, 2), "stft": (80, 2, 2)}[front]
    return XCodec(
        strides=strides,
        encoder_width=4,
        decoder_width=32,
        acoustic_dim=8,
        dilations=(1, 3),
        kernel_size=3,
        front=front,
        semantic={
            "type": "whisper",
            "dim": 16,
            "num_layers": 1,
            "num_heads": 2,
            "window_frames": 25,
            "context_frames": 5,
        },
        quantizer=quantizer_preset("fixed", {"num_codebooks": 3, "codebook_size": 16}),
    )


def tiny_spectral_codec() -> AudioCodec:
    return AudioCodec(
        strides=(80, 2, 2),
        encoder_width=8,
        decoder_width=32,
        latent_dim=8,
        num_codebooks=3,
        codebook_size=16,
        dilations=(1, 3),
        kernel_size=3,
        front="stft",
    )


VISION = {
    "type": "timm",
    "name": "vit_tiny_patch16_224",
    "image_size": 64,
    "arguments": {"embed_dim": 24, "depth": 2, "num_heads": 2},
}
TEXT = {"type": "minilm", "source": "package", "dim": 8, "max_tokens": 5}


def tiny_textok(text_in: tuple[str, ...], quantizer: dict[str, Any]) -> TexTok:
    return TexTok(
        num_tokens=6,
        latent_dim=6,
        patch_size=4,
        encoder=(16, 2, 2),
        decoder=(16, 2, 2),
        image_size=24,
        text_in=text_in,
        text_encoder=TEXT,
        quantizer=quantizer,
    )


def tiny_titok(teacher: dict[str, Any] | None = None, **more: Any) -> TiTok:
    return TiTok(
        num_tokens=6,
        token_size=6,
        patch_size=4,
        encoder=(16, 2, 2),
        decoder=(16, 2, 2),
        image_size=24,
        quantizer={"type": "vq", "codebook_size": 128, "metric": "cosine"},
        teacher=teacher,
        **more,
    )


def tiny_raster() -> Raster2D:
    quantizer = {"type": "rvq", "dim": 6, "codebook_size": 16, "num_codebooks": 2}
    return Raster2D(width=8, multipliers=(1, 2), patch=2, quantizer=quantizer, image_size=32)


def tiny_causal(head: dict[str, Any]) -> Causal1D:
    return Causal1D(
        num_tokens=6,
        vision=VISION,
        qformer={"dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "dropout": 0.0},
        quantizer={"type": "vq", "dim": 6, "codebook_size": 32},
        blocks=(1, 2, 2.0),
        head=head,
        pixel_decoder={"dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4},
        image_size=24,
    )


def tiny_dynamic(keep_ratio: float, method: str) -> Dynamic:
    return Dynamic(
        vision=VISION,
        merger=(16, 2, 2),
        decoder=(16, 2, 2),
        code_dim=6,
        quantizer={"type": "vq", "codebook_size": 32},
        keep_ratio=keep_ratio,
        selection={"method": method},
        pixels={"image_size": 24, "patch_size": 4, "width": 16, "depth": 2, "num_heads": 2, "gradient": True},
    )


TEACHER = {"width": 8, "multipliers": [1, 2], "patch": 2, "quantizer": {"type": "vq", "dim": 6, "codebook_size": 64}}
VQ = {"type": "vq", "codebook_size": 32}
TINY: dict[str, Callable[[], Tokenizer]] = {
    "binary1d": lambda: tiny_binary1d("rotary", "linear", True),
    "binary1d-published": lambda: tiny_binary1d("mixed", "dc", False),
    "textok": lambda: tiny_textok(("encoder", "decoder"), {"type": "fsq", "levels": [5, 5, 4]}),
    "textok-without-text": lambda: tiny_textok((), VQ),
    "titok": tiny_titok,
    "titok-legacy": lambda: tiny_titok(legacy_reshape=True, unit_latents=False),
    "titok-two-stage": lambda: tiny_titok(TEACHER),
    "tatitok": lambda: tiny_titok(text_encoder=TEXT),
    "raster2d": tiny_raster,
    "bridge": lambda: Bridge(width=8, multipliers=(1, 2), latent_dim=4, bits=3, image_size=32),
    "bridge-sample": lambda: Bridge(width=8, multipliers=(1, 2), latent_dim=4, posterior="sample", image_size=32),
    "causal1d": lambda: tiny_causal({"type": "B", "widths": [8, 4]}),
    "dynamic": lambda: tiny_dynamic(1 / 2, "expected"),
    "dynamic-gumbel": lambda: tiny_dynamic(1 / 2, "gumbel"),
    "dynamic-all": lambda: tiny_dynamic(1.0, "expected"),
    "codec-centred": lambda: tiny_codec(False),
    "codec-causal": lambda: tiny_codec(True, codebook_dim=4),
    "codec-spectral": tiny_spectral_codec,
    "dac": lambda: DAC(16000, (2, 4, 5, 8), 2, 16, num_codebooks=3, codebook_size=16, codebook_dim=4),
    "encodec": lambda: EnCodec(16000, 3, 16, 8, shape={"width": 2, "strides": (2, 4, 5, 8)}),
    "mimi": lambda: Mimi(16000, (4, 5, 8), 4, 16, 2, 2, 32, 12, 3, 16, 8),
    "xcodec": lambda: tiny_xcodec("samples"),
    "xcodec-spectral": lambda: tiny_xcodec("stft"),
}
Input = tuple[Any, int | None]  # what encode takes: x and the sample rate


def build(name: str, seed: int = 0) -> Tokenizer:
    """Untrained, but alive: weights of a size that makes the codes depend on the input."""
    torch.manual_seed(seed)
    tok = TINY[name]()
    if isinstance(tok, Binary1D):
        with torch.no_grad():
            for p in tok.parameters():
                p.mul_(3.0)
            tok.encoder_norm.weight.fill_(1.0)
    if any(isinstance(m, Codebook) for m in tok.modules()):
        # k-means puts the codebooks among the latents
        tok.train()(noise(4, 1, 6400) if tok.modality == "audio" else image(24, 3, 24, 24))
    if isinstance(tok, TiTok) and tok.teacher is not None:
        tok.start_stage2()
    if isinstance(tok, Bridge):
        tok.calibrate([image(8, 3, 24, 24)], "standardise")
    if isinstance(tok, Dynamic):
        with torch.no_grad():
            for p in (*tok.decoder.parameters(), *(tok.pixel_decoder or tok.decoder).parameters()):
                p.mul_(4.0)
    return tok.eval()


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.2


def image(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


IMAGES: dict[str, Input] = {
    "odd": (image(3, 17, 33), None),
    "one pixel": (image(3, 1, 1), None),
    "tall": (image(3, 300, 20), None),
    "wide": (image(3, 5, 90), None),
    "grey": (image(1, 31, 16), None),
    "rgba": (image(4, 16, 16), None),
    "uint8 array": ((image(9, 40, 3) * 255).byte().numpy(), None),
    "16-bit grey": ((image(12, 7) * 65535).numpy().astype(np.uint16), None),
}
SOUNDS: dict[str, Input] = {
    "one sample": (noise(1, 1), 16000),
    "319": (noise(1, 319), 16000),
    "320": (noise(1, 320), 16000),
    "321": (noise(321), 16000),
    "5000": (noise(1, 5000), 16000),
    "8 kHz": (noise(1, 2001), 8000),
    "44.1 kHz": (noise(1, 5000), 44100),
    "44.1 kHz, one sample": (noise(1, 1), 44100),
    "44.1 kHz stereo": (noise(2, 5001), 44100),
    "stereo": (noise(2, 3333), 16000),
    "int16": ((noise(1, 999) * 30000).short(), 16000),
    "three channels": (noise(3, 700).numpy(), 48000),
}


def inputs(tok: Tokenizer) -> dict[str, Input]:
    return IMAGES if tok.modality == "image" else SOUNDS


def several(tok: Tokenizer) -> tuple[list[Any], int | None]:
    """A list of clips of one rate, or of pictures, of different sizes."""
    if tok.modality == "image":
        return [x for x, _ in IMAGES.values()], None
    return [x for x, rate in SOUNDS.values() if rate == 16000], 16000


def size_of(tok: Tokenizer, x: Any) -> tuple[int, ...]:
    """The size that decode must give: (C, H, W) or (C, L)."""
    if tok.modality == "audio":
        return tuple(x.shape) if x.ndim == 2 else (1, *x.shape)
    if isinstance(x, np.ndarray):
        return (1, *x.shape) if x.ndim == 2 else (x.shape[2], *x.shape[:2])
    return tuple(x.shape)


def state_of(tok: Tokenizer) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in tok.state_dict().items()}


def same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def one(x: Tensor | list[Tensor]) -> Tensor:
    assert isinstance(x, Tensor) and len(x) == 1
    return x[0]
