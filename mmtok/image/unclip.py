"""Pictures from the codes of `Causal1D` through an unCLIP diffusion model, which is how SEED decodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtok.image.causal1d import Causal1D
from mmtok.tokens import Tokens


@torch.no_grad()
def unclip_pictures(
    tokenizer: Causal1D,
    tokens: Tokens,
    pipeline: Any,
    generator: torch.Generator | None = None,
    steps: int = 20,
    guidance: float = 10.0,
) -> Tensor:
    """Pictures from the semantic embedding through a diffusion model, as the original decodes: (B, 3, S, S) in [0, 1].

    They mean the same as the input and look otherwise; S is the pipeline's own size, the aspect is not restored. Each
    item starts from noise of its own, drawn from ``generator`` (None = torch's global one), so a seed repeats it. The
    original draws one unseeded noise when it is built and uses it for every picture.

    Args:
        pipeline: a diffusers ``StableUnCLIPImg2ImgPipeline``, or a local folder with one (needs the extra
            ``generative``). The original uses stable-diffusion-2-1-unclip.
        steps, guidance: denoising steps and weight of classifier-free guidance; the original's values.

    Raises:
        ValueError: tokens of another tokenizer, or a pipeline for embeddings of another width.
        ImportError: a folder was given and diffusers is missing.
    """
    tokens.check(tokenizer.spec)
    if isinstance(pipeline, str | Path):
        try:
            from diffusers import StableUnCLIPImg2ImgPipeline
        except ImportError as e:
            raise ImportError("a diffusion model needs the extra 'generative': pip install 'mmtok[generative]'") from e
        pipeline = StableUnCLIPImg2ImgPipeline.from_pretrained(pipeline, local_files_only=True)
    unet, width = pipeline.unet, pipeline.image_normalizer.config.embedding_dim
    if width != tokenizer.embedding_dim:
        raise ValueError(f"pipeline: expected one for embeddings of width {tokenizer.embedding_dim}, got {width}")
    shape = (1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    pictures = []
    for i in range(len(tokens)):
        embedding = tokenizer.image_embedding(tokens[i].codes.to(tokenizer.device))
        source = torch.device("cpu") if generator is None else generator.device
        noise = torch.randn(shape, generator=generator, device=source)
        out = pipeline(
            prompt="",
            image_embeds=embedding.to(unet.device, unet.dtype),
            noise_level=0,
            num_inference_steps=steps,
            guidance_scale=guidance,
            latents=noise.to(unet.device, unet.dtype),
            generator=generator,
            output_type="pt",
        )
        pictures.append(out.images.float().cpu())
    return torch.cat(pictures)
