"""Claim of TexTok (arXiv 2412.05796): a caption at the encoder and the decoder leaves the tokens more to say.

Command:   python recipes/claim_textok.py --data data --out runs/claim_textok --results recipes/results
           (several copies of the command share the work)
Data:      `python recipes/fetch_data.py --out data --helpers`: 4,359 captioned pictures (emoji, stamps, clip art,
           pictures of things) as 64 px squares, split 80 / 10 / 10 by caption: no test caption was trained on.
Compared:  4 and 16 tokens of 10 bits (VQ, 1,024 codes); the caption in both networks, the encoder or the decoder alone,
           or nowhere; the same model otherwise, 3 seeds (the stored results have 2 where one network alone reads).
           Captions are short names ("3D emoji of red heart"), not the paper's long descriptions; no perceptual or
           adversarial loss.
Result:    recipes/results/claim-textok.json, README, recipes/LOG.md.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from imaging.grid import Training, Variant, arguments, scores_of, train_all
from imaging.pictures import Captioned, SquareBatches, captioned_pictures, square
from imaging.report import write_claim
from imaging.scores import Judges, embeddings_of_text, reconstruction_scores

from mmtok.image.textok import TexTok
from mmtok.layers.text import TextFeatures
from mmtok.training import ImageObjective

SIZE, SQUARE = 64, 72  # training windows of 64 px move within 72
PLACES = {"both": ["encoder", "decoder"], "encoder": ["encoder"], "decoder": ["decoder"], "none": []}
VARIANTS = tuple(
    Variant(f"{tokens}-{place}", {"num_tokens": tokens, "text_in": where})
    for tokens in (4, 16)
    for place, where in PLACES.items()
)
MODEL: dict[str, Any] = {
    "encoder": (128, 4, 4),
    "decoder": (128, 4, 4),
    "image_size": SIZE,
    "quantizer": {"type": "vq", "codebook_size": 1024},
}
TINY = {**MODEL, "encoder": (32, 1, 2), "decoder": (32, 1, 2)}


def text_encoder(helpers: Path | None) -> dict[str, Any]:
    """The config of the frozen text encoder; what a checkpoint names is the installable package."""
    return {"type": "minilm", "source": "package" if helpers is None else str(helpers), "dim": 384, "max_tokens": 16}


def smoke_pictures() -> tuple[Captioned, dict[str, torch.Tensor]]:
    """Four noise squares with random features of no text: only the machinery is checked."""
    rng = np.random.default_rng(0)
    pixels = np.stack([square(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8), SQUARE) for _ in range(4)])
    captioned = Captioned(
        pixels, ["a", "b", "c", "d"], [Path("x")] * 4, ["train", "train", "test", "test"], ["drawing"] * 4
    )
    return captioned, {"text": torch.randn(4, 16, 384), "text_mask": torch.ones(4, 16, dtype=torch.bool)}


def main() -> None:
    args = arguments(__doc__, "runs/claim_textok", steps=600)
    if args.smoke:
        captioned, extra = smoke_pictures()
    else:
        captioned = captioned_pictures(args.data, args.cache, SQUARE)
        encoder = text_encoder(args.data / "helpers" / "minilm")
        states, mask, _ = embeddings_of_text(captioned.captions(), encoder, args.cache)
        extra = {"text": states, "text_mask": mask}
    train_rows, test_rows = captioned.rows("train"), captioned.rows("test")

    def build(variant: Variant, seed: int, folder: Path) -> Training:
        del folder
        torch.manual_seed(seed)
        model = TINY if args.smoke else MODEL
        tokenizer = TexTok(**model, **variant.settings, text_encoder=text_encoder(None))
        blocks = () if args.smoke else (*tokenizer.encoder.blocks, *tokenizer.decoder.blocks)
        batches = SquareBatches(captioned, train_rows, args.batch, SIZE, seed, extra)
        return Training(
            tokenizer, ImageObjective(l2_weight=10.0, l1_weight=0.5), batches, 1.5e-3, blocks, 1 if args.smoke else 48
        )

    done = train_all(VARIANTS, args, build)
    if args.only == "train":
        return
    judges = Judges(None if args.smoke else args.data / "helpers")
    x = captioned.images(test_rows, SIZE)
    text = TextFeatures(extra["text"][test_rows].float(), extra["text_mask"][test_rows])
    rows: dict[str, list[dict[str, Any]]] = {}
    for (name, _), folder in sorted(done.items()):
        mine = None if name.endswith("none") else text
        found = scores_of(folder, lambda t, mine=mine: reconstruction_scores(t, x, judges, mine))
        rows.setdefault(name, []).append(found)
    for tokens in (4, 16):
        part = {name: some for name, some in rows.items() if name.startswith(f"{tokens}-")}
        write_claim(f"claim-textok-{tokens}", part, args, baseline=f"{tokens}-none")


if __name__ == "__main__":
    main()
