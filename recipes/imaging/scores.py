"""Scores of reconstructed pictures: PSNR, SSIM, ST-LPIPS of each, and Frechet distance of all with named features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mmtok.layers.text import TextFeatures
from mmtok.metrics.codes import token_statistics
from mmtok.metrics.image import psnr, ssim
from mmtok.tokenizer import Tokenizer
from mmtok.tokens import Tokens

PER_PICTURE = ("psnr", "ssim", "lpips")


class Judges:
    """The networks that judge pictures; ``folder`` is what ``fetch_data.py --helpers`` made, None leaves them out.

    ``lpips`` is ST-LPIPS on AlexNet; Frechet features are the 2,048 numbers of the InceptionV3 of nsfwjs, so that its
    distances are tagged FD[nsfw-incv3] and compare with no published FID. They are computed in bf16, for both sides.
    """

    def __init__(self, folder: Path | None):
        self.lpips: nn.Module | None = None
        self.inception: nn.Module | None = None
        self._known: dict[tuple[int, ...], Tensor] = {}
        if folder is not None:
            from mmtok.bench.inception import load_inception
            from mmtok.losses.perceptual import load_stlpips

            self.lpips = load_stlpips(folder / "stlpips", net="alex").eval()
            self.inception = load_inception(folder / "nsfwjs").eval()

    @torch.no_grad()
    def features(self, x: Tensor, remember: bool = False) -> Tensor:
        """(n, 2048) of pictures (n, 3, H, W) in [0, 1]; ``remember`` keeps those of the reference set."""
        assert self.inception is not None
        key = (*x.shape, x.data_ptr())
        if remember and key in self._known:
            return self._known[key]
        parts = tqdm(x.split(16), desc="Frechet features", mininterval=5)
        found = torch.cat([self.inception(part, bf16=True) for part in parts])
        if remember:
            self._known[key] = found
        return found

    @torch.no_grad()
    def distances(self, x_hat: Tensor, x: Tensor) -> list[float]:
        """ST-LPIPS of each picture."""
        assert self.lpips is not None
        return [float(d) for a, b in zip(x_hat.split(64), x.split(64), strict=True) for d in self.lpips.distance(a, b)]


def codebook_use(parts: Sequence[Tokens]) -> dict[str, Any]:
    """Usage and perplexity of each level over all tokens, with the number of codes they were counted on."""
    side_free = [Tokens(p.codes, p.lengths, p.spec) for p in parts]
    statistics = token_statistics(Tokens.concat(side_free))
    return {
        "codes_counted": int(torch.cat([p.lengths for p in parts]).sum()),
        "usage": [round(float(v), 4) for v in statistics.usage],
        "perplexity": [round(float(v), 1) for v in statistics.perplexity],
    }


def reconstruct(tokenizer: Tokenizer, x: Tensor, text: TextFeatures | None = None) -> tuple[Tensor, list[Any]]:
    """decode(encode(x)) in 8-bit values, and the tokens."""
    parts, outs = [], []
    for start in tqdm(range(0, len(x), 32), desc=tokenizer.name, mininterval=5):
        rows = slice(start, start + 32)
        some = None if text is None else text[rows]
        tokens = tokenizer.encode(x[rows], text=some)
        x_hat = tokenizer.decode(tokens, text=some)
        assert isinstance(x_hat, Tensor)
        parts.append(tokens)
        outs.append((x_hat * 255).round() / 255)
    return torch.cat(outs), parts


def reconstruction_scores(
    tokenizer: Tokenizer, x: Tensor, judges: Judges, text: TextFeatures | None = None
) -> dict[str, Any]:
    """Scores of the pictures (n, 3, H, W) in [0, 1] after encode and decode."""
    x_hat, parts = reconstruct(tokenizer, x, text)
    bits = torch.cat([p.bits for p in parts])
    return {"bits": float(bits.mean()), **picture_scores(x, x_hat, judges), **codebook_use(parts)}


def picture_scores(x: Tensor, x_hat: Tensor, judges: Judges) -> dict[str, Any]:
    """Scores of pictures against their originals, each (n, 3, H, W) in [0, 1]; lists have one number a picture."""
    found: dict[str, Any] = {"count": len(x), "psnr": psnr(x, x_hat).tolist(), "ssim": ssim(x, x_hat).tolist()}
    if judges.lpips is not None:
        found["lpips"] = judges.distances(x_hat, x)
    if judges.inception is not None:
        from mmtok.metrics.frechet import frechet_distance

        found["frechet"] = frechet_distance(judges.features(x, remember=True), judges.features(x_hat))
    return found


def embeddings_of_text(texts: Sequence[str], config: dict[str, Any], cache: Path) -> tuple[Tensor, Tensor, Tensor]:
    """States (N, S, D) fp16, mask (N, S), and sentence embeddings (N, D) of captions, kept in ``cache``."""
    import hashlib
    import json

    from safetensors.torch import load_file, save

    from mmtok.layers.text import build_text_encoder
    from mmtok.tokens import write_atomic

    key = hashlib.sha256(json.dumps([list(texts), config], sort_keys=True).encode()).hexdigest()[:16]
    file = cache / f"texts-{key}.safetensors"
    if not file.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        encoder = build_text_encoder(config)
        parts = [texts[i : i + 64] for i in range(0, len(texts), 64)]
        found = [encoder(p) for p in tqdm(parts, desc="captions", mininterval=2)]
        states, mask = torch.cat([f.states for f in found]), torch.cat([f.mask for f in found])
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
        mean = nn.functional.normalize(mean, dim=-1)
        write_atomic(file, save({"states": states.half(), "mask": mask, "mean": mean}))
    kept = load_file(file)
    return kept["states"], kept["mask"], kept["mean"]
