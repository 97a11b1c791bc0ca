"""Claims of SEED (arXiv 2307.08041): causal 1-D codes suit a causal language model, and still find their caption.

Command:   python recipes/claim_causal.py --data data --out runs/claim_causal --results recipes/results
           (several copies of the command share the work)
Data:      `python recipes/fetch_data.py --out data --helpers`: 4,359 captioned pictures and their mirror images, split
           80 / 10 / 10 by caption; features of EfficientNet-Lite0 (49 x 320), sentence embeddings of MiniLM.
Compared:  16 codes of 256 each (128 bits): causal queries; the same with bidirectional queries; and the 4 x 4 raster
           of a 2-D VQ autoencoder. Each gets the same small causal transformer on its codes (bits an image on the test
           split, and with frequencies by position alone). Recall of a picture by its caption, from the continuous
           embedding and from the codes. 3 seeds.
Result:    recipes/results/claim-causal.json, README, recipes/LOG.md.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from imaging.features import bits_per_image, first_of_each_caption, hits, semantic_material, unigram_bits
from imaging.grid import Training, Variant, arguments, run, scores_of, train_all
from imaging.pictures import Captioned, SquareBatches, square
from imaging.report import write_claim
from imaging.scores import codebook_use
from torch import Tensor

from mmtok.image.causal1d import Causal1D
from mmtok.image.raster2d import Raster2D
from mmtok.metrics.image import psnr
from mmtok.tokenizer import Tokenizer, evaluation
from mmtok.tokens import Tokens
from mmtok.training import ImageObjective

SIZE, SQUARE, TOKENS, CODES = 64, 72, 16, 256
VARIANTS = (
    Variant("causal", {"causal": True}),
    Variant("bidirectional", {"causal": False}),
    Variant("raster-2d"),
)
SEMANTIC: dict[str, Any] = {
    "num_tokens": TOKENS,
    "quantizer": {"type": "vq", "dim": 16, "codebook_size": CODES},
    "pixel_decoder": {"dim": 128, "depth": 3, "num_heads": 4, "patch_size": 8},
    "contrastive": {"dim": 128, "text_dim": 384},
    "text_encoder": {"type": "minilm", "source": "package", "dim": 384, "max_tokens": 16},
    "image_size": SIZE,
}
RASTER: dict[str, Any] = {
    "width": 48,
    "multipliers": (1, 2, 2),
    "patch": 4,
    "quantizer": {"type": "vq", "dim": 16, "codebook_size": CODES},
    "image_size": SIZE,
}


def smoke_pictures() -> tuple[Captioned, Tensor, Tensor]:
    rng = np.random.default_rng(0)
    pixels = np.stack([square(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8), SQUARE) for _ in range(9)])
    splits = ["train"] * 4 + ["val"] * 2 + ["test"] * 3
    captioned = Captioned(pixels, list("abcdefghi"), [Path("x")] * 9, splits, ["drawing"] * 9)
    return captioned, torch.randn(9, 49, 320), torch.randn(9, 384)


@torch.no_grad()
def codes_of(tokenizer: Tokenizer, features: Tensor, pixels: Tensor) -> Tensor:
    """(n, T) codes of pictures, from their cached features where the tokenizer reads those."""
    found = []
    with evaluation(tokenizer):
        for f, x in zip(features.split(64), pixels.split(64), strict=True):
            if isinstance(tokenizer, Causal1D):
                codes = tokenizer.quantizer.encode(tokenizer.encode_task(tokenizer.query(None, f.float())))
            else:
                codes = tokenizer.encode(x).codes
            found.append(codes[:, 0])
    return torch.cat(found)


def main() -> None:
    args = arguments(__doc__, "runs/claim_causal", steps=600)
    if args.smoke:
        plain, features, embeddings = smoke_pictures()
        captioned = plain
    else:
        plain, captioned, features, embeddings = semantic_material(args.data, args.cache, SQUARE)
    train_rows = captioned.rows("train")

    def build(variant: Variant, seed: int, folder: Path) -> Training:
        torch.manual_seed(seed)
        if variant.name == "raster-2d":
            batches = SquareBatches(captioned, train_rows, args.batch, SIZE, seed, move=False)
            objective = ImageObjective(l2_weight=10.0, l1_weight=0.5)
            return Training(Raster2D(**RASTER), objective, batches, codebook_batches=1 if args.smoke else 8)
        tokenizer = Causal1D(**SEMANTIC, **variant.settings)
        more = {"features": features, "text_embedding": embeddings}
        batches = SquareBatches(captioned, train_rows, args.batch, SIZE, seed, more, move=False)
        contrast = ImageObjective(l2_weight=0.0, quantizer_weight=0.0, aux_weights={"contrastive_loss": 1.0})
        stage1 = Training(tokenizer, contrast, batches, steps=max(1, args.steps // 2))
        run(stage1, folder / "stage1", args, seed)
        tokenizer.start_stage2()
        weights = {"feature_loss": 2.0, "embedding_loss": 0.5}
        objective = ImageObjective(l2_weight=10.0, l1_weight=0.5, quantizer_weight=1.0, aux_weights=weights)
        return Training(tokenizer, objective, batches, codebook_batches=1 if args.smoke else 8)

    done = train_all(VARIANTS, args, build)
    if args.only == "train":
        return

    def score(tokenizer: Tokenizer) -> dict[str, Any]:
        test = plain.rows("test")
        x, f = plain.images(test, SIZE), features[test]
        codes = codes_of(tokenizer, f, x)
        held = plain.rows("val")
        fit = codes_of(tokenizer, features[train_rows], captioned.images(train_rows, SIZE))
        stop = codes_of(tokenizer, features[held], plain.images(held, SIZE))
        steps = 4 if args.smoke else 1200
        tokens = Tokens(codes[:, None], torch.full((len(codes),), codes.shape[1]), tokenizer.spec)
        pictures = torch.cat([batch_decode(tokenizer, c) for c in codes[:, None].split(64)])
        found: dict[str, Any] = {
            "count": len(x),
            "bits": float(tokens.bits.mean()),
            "model_bits": bits_per_image(fit, stop, codes, CODES, 0, steps),
            "position_bits": unigram_bits(fit, codes, CODES),
            "psnr": psnr(x, pictures).tolist(),
            **codebook_use([tokens]),
        }
        if isinstance(tokenizer, Causal1D):
            asked = first_of_each_caption(plain, test)
            place = {int(i): n for n, i in enumerate(test)}
            chosen = torch.tensor([place[int(i)] for i in asked])
            with torch.no_grad(), evaluation(tokenizer):
                text = tokenizer.embed_text(embeddings[asked].float())
                continuous = tokenizer.embed(features=f[chosen].float())
                coded = tokenizer.embed_codes(codes[chosen][:, None])
            for name, vectors in (("embedding", continuous), ("codes", coded)):
                found[f"recall5_{name}"] = hits(text @ vectors.T)
            found["asked"] = len(asked)
        return found

    rows: dict[str, list[dict[str, Any]]] = {}
    for (name, _), folder in sorted(done.items()):
        rows.setdefault(name, []).append(scores_of(folder, score))
    extra = {
        "model_bits": ("bits, transformer", 1),
        "position_bits": ("bits, frequencies", 1),
        "recall5_embedding": ("recall@5 %, embedding", 1),
        "recall5_codes": ("recall@5 %, codes", 1),
    }
    write_claim("claim-causal", rows, args, "causal", extra)


@torch.no_grad()
def batch_decode(tokenizer: Tokenizer, codes: Tensor) -> Tensor:
    """Codes (n, 1, T) -> pictures (n, 3, 64, 64) in [0, 1]."""
    with evaluation(tokenizer):
        if isinstance(tokenizer, Causal1D):
            assert tokenizer.pixel_decoder is not None
            x = tokenizer.pixel_decoder(tokenizer.decoded(tokenizer.quantizer.decode(codes)))
        else:
            assert isinstance(tokenizer, Raster2D)
            x = tokenizer.pixels(tokenizer.quantizer.decode(codes), SIZE, SIZE)
    return x.float().clamp(0, 1)


if __name__ == "__main__":
    main()
