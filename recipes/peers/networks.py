"""Small random networks of other packages' own classes, alive enough that their codes depend on the sound.

No published weights are needed: padding masks, lengths, noise and default rates are faults of the code, not of the
weights. Kernels keep the signal's size, and codebooks hold what they are to code, so that many codes occur.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ENCODEC: dict[str, Any] = {  # 2, 4, 8, 16, 32 levels, as the 24 kHz model has; 100 frames a second of 5 bits a level
    "upsampling_ratios": [4, 3, 2],
    "sampling_rate": 2400,
    "target_bandwidths": [1.0, 2.0, 4.0, 8.0, 16.0],
}
SNAC_LIKE_24KHZ: dict[str, Any] = {  # as the 24 kHz model: depthwise, no attention
    "sampling_rate": 8000,
    "encoder_dim": 4,
    "encoder_rates": [2, 3, 5],
    "decoder_dim": 16,
    "decoder_rates": [5, 3, 2],
    "attn_window_size": None,
    "codebook_size": 16,
    "codebook_dim": 3,
    "vq_strides": [4, 2, 1],
    "noise": True,
    "depthwise": True,
}
MIMI: dict[str, Any] = {"num_filters": 2, "sliding_window": 4}  # the published strides: 1,920 samples a frame


def noise(samples: int, seed: int = 0) -> Tensor:
    """(1, samples)."""
    return torch.randn(1, samples, generator=torch.Generator().manual_seed(seed)).mul(0.3).clamp(-1, 1)


def swelling(*shape: int) -> Tensor:
    """Noise whose loudness changes as it goes."""
    generator = torch.Generator().manual_seed(sum(shape))
    swell = torch.linspace(0.1, 1.0, shape[-1]) if shape[-1] > 1 else torch.ones(1)
    return (torch.randn(*shape, generator=generator) * 0.3 * swell).clamp(-1, 1)


@torch.no_grad()
def encodec(changes: Mapping[str, Any] = ENCODEC) -> Any:
    """transformers' EncodecModel."""
    import transformers

    torch.manual_seed(3)
    config = transformers.EncodecConfig(num_filters=4, hidden_size=8, codebook_size=32, **changes)
    network = transformers.EncodecModel(config).eval()
    for name, p in network.named_parameters():
        if "lstm" in name or name.endswith("bias"):
            p.normal_(std=0.2)
        elif name.endswith("original0"):
            p.mul_(1.7)
        elif ".norm." in name:
            p.uniform_(0.5, 1.5)
    z = network.encoder(swelling(1, config.audio_channels, 480))  # (1, D, T)
    for q, layer in enumerate(network.quantizer.layers):
        spread = torch.randn(32, 8) * z.std((0, 2)) * 0.8**q
        layer.codebook.embed.copy_(spread + (z.mean((0, 2)) if q == 0 else 0))
    return network


@torch.no_grad()
def dac(strides: Sequence[int] = (2, 4, 5, 8), rate: int = 16000, seed: int = 0, levels: int = 3) -> Any:
    """transformers' DacModel."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.DacConfig(
        encoder_hidden_size=4,
        decoder_hidden_size=2 * 2 ** len(strides),
        downsampling_ratios=list(strides),
        n_codebooks=levels,
        codebook_size=16,
        codebook_dim=3,
        sampling_rate=rate,
        quantizer_dropout=0.5,
    )
    network = transformers.DacModel(config).eval()
    for name, p in network.named_parameters():
        if name.endswith("weight") and p.ndim == 3:
            p.normal_().mul_((p.shape[1] * p.shape[2]) ** -0.5 * (0.5 if "res_unit" in name else 1))
        elif name.endswith("bias"):
            p.normal_().mul_(0.1)
    residual = network.encoder(noise(40 * config.hop_length, seed + 1)[None])
    for level in network.quantizer.quantizers:
        inside = level.in_proj(residual)
        level.codebook.weight.copy_(inside[0, :, torch.randperm(inside.shape[2])[:16]].T)
        residual = residual - level(residual)[0]
    return network


@torch.no_grad()
def snac(config: Mapping[str, Any] = SNAC_LIKE_24KHZ, seed: int = 0) -> Any:
    """The package's SNAC, which carries its biases far."""
    from snac import SNAC

    torch.manual_seed(seed)
    network = SNAC(**config).eval()
    for name, p in network.named_parameters():
        if name.endswith("bias"):
            p.normal_().mul_(0.1)
        elif name.endswith("weight.original0") and "linear" not in name:  # the length of a kernel
            p.mul_(1.3)
    residual = network.encoder(noise(48 * 8 * network.hop_length, seed + 1)[None])
    for level in network.quantizer.quantizers:
        pooled = torch.nn.functional.avg_pool1d(residual, level.stride, level.stride)
        inside = level.in_proj(pooled)
        level.codebook.weight.copy_(inside[0, :, torch.randperm(inside.shape[2])[:16]].T)
        residual = residual - level(residual)[0]
    return network


def mimi_config(changes: Mapping[str, Any] = MIMI) -> Any:
    """A small MimiConfig with ``changes``."""
    import transformers

    numbers = {
        "hidden_size": 16,
        "num_filters": 4,
        "num_hidden_layers": 2,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "codebook_size": 32,
        "codebook_dim": 8,
        "vector_quantization_hidden_dimension": 8,
        "num_quantizers": 5,
        "upsample_groups": 16,
        "sliding_window": 6,
    }
    return transformers.MimiConfig(**{**numbers, **changes})


@torch.no_grad()
def mimi(changes: Mapping[str, Any] = MIMI, seed: int = 0) -> Any:
    """transformers' MimiModel, of which every part changes the codes."""
    import transformers

    torch.manual_seed(seed)
    model = transformers.MimiModel(mimi_config(changes)).eval()
    for name, p in model.named_parameters():
        if "layer_scale" in name or "layernorm" in name:
            p.uniform_(0.5, 1.5)  # as initialized, the transformers would hardly change what passes through them
        elif "_transformer" in name:
            p.normal_(0, 1.5 * p.shape[1] ** -0.5)
    shape = (4, 1, 20 * model.config.frame_size)
    heard = torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1])).mul(0.25).clamp(-1, 1)
    latents = model.encoder(heard).latents
    model.decoder.decoder_seanet.layers[-1].conv.weight.div_(2 * model.decoder(latents).audio_values.std())
    for part in (
        model.quantizer.semantic_residual_vector_quantizer,
        model.quantizer.acoustic_residual_vector_quantizer,
    ):
        rest = part.input_proj(latents).transpose(1, 2).flatten(0, 1)
        for layer in part.layers:
            book = layer.codebook
            book.cluster_usage.uniform_(0.5, 4)
            rows = rest[torch.randperm(len(rest))[: len(book.embed_sum)]]
            book.embed_sum.copy_((rows + 0.1 * rest.std() * torch.randn_like(rows)) * book.cluster_usage[:, None])
            book._embed = None
            rest = rest - book.decode(book.encode(rest))
    return model


def save_snac(network: Any, config: Mapping[str, Any], folder: Path) -> None:
    """As the package's published folders: config.json and pytorch_model.bin."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    torch.save(network.state_dict(), folder / "pytorch_model.bin")


def save_all(folder: Path) -> dict[str, Path]:
    """One folder a family below ``folder``, each as its package saves it; family -> its folder."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    made: dict[str, Callable[[], Any]] = {"encodec": encodec, "dac": dac, "mimi": mimi}
    for family, build in made.items():
        build().save_pretrained(folder / family)
    save_snac(snac(), SNAC_LIKE_24KHZ, folder / "snac")
    return {family: folder / family for family in (*made, "snac")}
