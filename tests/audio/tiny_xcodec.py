"""Tiny random XcodecModels of transformers, and their tensors under the authors' names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

transformers: Any = pytest.importorskip("transformers")

K, RATE = 32, 16000
KBPS = (0.25, 0.5, 0.75, 1.0, 2.0)  # 1, 2, 3, 4 and 8 levels of 5 bits at 50 Hz, as the released 0.5 .. 4 of 10 bits
LEVELS = (1, 2, 3, 4, 8)
ACOUSTIC: dict[str, Any] = {
    "encoder_hidden_size": 4,
    "decoder_hidden_size": 32,
    "hidden_size": 8,
    "downsampling_ratios": [8, 5, 4, 2],
    "upsampling_ratios": [8, 5, 4, 2],
}
SEMANTIC: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
# Everything that would disturb the teacher's features if anything of it ran in training mode.
DISTURBED = {"hidden_dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5, "mask_time_prob": 0.9}


def noise(length: int, count: int = 1, seed: int = 0) -> Tensor:
    """(count, 1, length): noise whose loudness and colour change, so that frames differ."""
    generator = torch.Generator().manual_seed(seed + 1000 * length)
    x = torch.randn(count, 1, length, generator=generator)
    slow = F.interpolate(torch.rand(count, 1, length // 800 + 2, generator=generator), size=length, mode="linear")
    return (0.4 * slow * (x + torch.roll(x, 1, -1) * (1 - 2 * slow))).clamp(-1, 1)


@torch.no_grad()
def released_model(kind: str = "hubert", semantic: Any = None, acoustic: Any = None, **config: Any) -> Any:
    """A random XcodecModel whose layers all matter, with codebooks of vectors like those that they code."""
    torch.manual_seed(0)
    teacher = {"hubert": transformers.HubertConfig, "wavlm": transformers.WavLMConfig}[kind](
        **{**SEMANTIC, **DISTURBED, **(semantic or {})}
    )
    numbers = {"codebook_size": K, "target_bandwidths": list(KBPS), **config}
    settings = transformers.XcodecConfig(
        acoustic_model_config={**ACOUSTIC, **(acoustic or {})}, semantic_model_config=teacher, **numbers
    )
    model = transformers.XcodecModel(settings).eval()
    for name, p in model.named_parameters():
        if name.endswith("alpha"):
            p.uniform_(0.5, 1.5)
        elif "norm" in name or "parametrizations" in name:
            p.add_(0.1 * torch.randn_like(p))
        else:
            p.copy_(torch.randn_like(p) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.1))
            if "res_unit" in name and name.endswith("conv2.weight"):
                p.mul_(0.3)  # a sum of loud branches leaves the range of sound, and float32's accuracy in it
    x = noise(40 * settings.hop_length, 2, seed=7)
    states = model.encoder_semantic(model._extract_semantic_features(x).transpose(1, 2))
    residual = model.fc(torch.cat([model.acoustic_encoder(x), states], 1).transpose(1, 2)).flatten(0, 1)
    for level in model.quantizer.quantizers:
        book = level.codebook
        rows = residual[torch.randperm(len(residual))[: len(book.embed)]]
        book.embed.copy_(rows + 0.3 * residual.std() * torch.randn_like(rows))
        book.embed_avg.copy_(3 * book.embed)
        book.cluster_size.fill_(3.0)
        residual = residual - level.codebook.decode(level.codebook.encode(residual))
    return model


def save(model: Any, folder: Path) -> Path:
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    return folder


def original_name(key: str) -> str:
    """transformers' name -> the authors' (its conversion script, backwards), for four blocks."""
    unit = {"snake1": 0, "conv1": 1, "snake2": 2, "conv2": 3}
    rules = [
        (r"acoustic_encoder\.conv1", "encoder.block.0"),
        (r"acoustic_encoder\.snake1", "encoder.block.5"),
        (r"acoustic_encoder\.conv2", "encoder.block.6"),
        (r"acoustic_encoder\.block\.(\d)\.snake1", lambda m: f"encoder.block.{int(m[1]) + 1}.block.3"),
        (r"acoustic_encoder\.block\.(\d)\.conv1", lambda m: f"encoder.block.{int(m[1]) + 1}.block.4"),
        (
            r"acoustic_encoder\.block\.(\d)\.res_unit(\d)\.(\w+)",
            lambda m: f"encoder.block.{int(m[1]) + 1}.block.{int(m[2]) - 1}.block.{unit[m[3]]}",
        ),
        (r"acoustic_decoder\.conv1", "decoder_2.model.0"),
        (r"acoustic_decoder\.snake1", "decoder_2.model.5"),
        (r"acoustic_decoder\.conv2", "decoder_2.model.6"),
        (r"acoustic_decoder\.block\.(\d)\.snake1", lambda m: f"decoder_2.model.{int(m[1]) + 1}.block.0"),
        (r"acoustic_decoder\.block\.(\d)\.conv_t1", lambda m: f"decoder_2.model.{int(m[1]) + 1}.block.1"),
        (
            r"acoustic_decoder\.block\.(\d)\.res_unit(\d)\.(\w+)",
            lambda m: f"decoder_2.model.{int(m[1]) + 1}.block.{int(m[2]) + 1}.block.{unit[m[3]]}",
        ),
        (r"(encoder_semantic\.conv|decoder_semantic\.conv[12])(?=\.)", r"\1.conv"),
        (r"(\w+_semantic\.conv_blocks\.\d\.(?:res_units\.\d\.conv1|conv))(?=\.)", r"\1.conv"),
        (r"fc(?=\.)", "fc_prior"),
        (r"fc1(?=\.)", "fc_post1"),
        (r"fc2(?=\.)", "fc_post2"),
        (r"quantizer\.quantizers\.(\d)\.codebook", r"quantizer.vq.layers.\1._codebook"),
    ]
    for pattern, replacement in rules:
        found = re.match(pattern, key)
        if found:
            return re.sub(pattern, replacement, key, count=1)
    return key


def original_state(model: Any) -> dict[str, Tensor]:
    """The model's tensors as the authors' files hold them: weight norm over axis 0 in both acoustic parts."""
    state = {}
    for key, value in model.state_dict().items():
        name = original_name(key)
        if name.startswith(("encoder.", "decoder_2.")) and name.endswith("weight"):
            scale = torch.rand(value.shape[0], 1, 1) + 0.5  # a direction has any length
            length = torch.linalg.vector_norm(value, dim=(1, 2), keepdim=True)
            state |= {name[:-6] + "weight_g": length, name[:-6] + "weight_v": value * scale}
        elif key.startswith("semantic_model.") and "parametrizations" in key:  # as torch 1 wrote it
            state[re.sub(r"parametrizations\.weight\.original(\d)", lambda m: f"weight_{'gv'[int(m[1])]}", name)] = (
                value
            )
        else:
            state[name] = value
    return state
