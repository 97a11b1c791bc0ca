"""Claim of Instella-T2I (arXiv 2506.21022): binary latents hold more than one-hot VQ codes, token for token.

Command:   python recipes/claim_binary.py --data data --out runs/claim_binary --results recipes/results
           (several copies of the command share the work)
Data:      `python recipes/fetch_data.py --out data --helpers`; training on 64 px crops of the train split, scores on
           crops of test packages (4 of each photograph), never trained on.
Compared:  one architecture and one schedule; 16 tokens of 48 bits, 16 tokens of 12 bits (as many as a VQ code has),
           16 VQ codes of 4,096, and 64 VQ codes (as many bits as the first, four times the tokens). 3 seeds, 2 of
           them in the stored results.
Result:    recipes/results/claim-binary.json, README, recipes/LOG.md.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from imaging.grid import Training, Variant, arguments, scores_of, train_all
from imaging.pictures import ASSETS, held_out_crops, packed_training_pictures
from imaging.report import write_claim
from imaging.scores import Judges, reconstruction_scores

from mmtok.data.packed import ImageBatches, image_reader, pack
from mmtok.image.binary1d import Binary1D
from mmtok.training import ImageObjective

SIZE = 64
# As in image_binary1d.py: no pull of the bits, a little entropy.
BITS = {"commitment_weight": 0.0, "entropy_weight": 0.02, "entropy_group_bits": 1}
VQ = {"type": "vq", "codebook_size": 4096, "codebook_dim": 16}
VARIANTS = (
    Variant("binary-16x48", {"num_tokens": 16, "num_bits": 48, "quantizer": BITS}),
    Variant("vq-16x12", {"num_tokens": 16, "quantizer": VQ}),
    Variant("binary-16x12", {"num_tokens": 16, "num_bits": 12, "quantizer": {**BITS, "bits_per_code": 12}}),
    Variant("vq-64x12", {"num_tokens": 64, "quantizer": VQ}),
)
MODEL = {
    "patch_size": 4,
    "encoder": (128, 4, 0),
    "decoder": (128, 4, 4),
    "head_dim": 32,
    "axes_dims": (4, 14, 14),
    "absolute_positions": True,
    "image_size": SIZE,
}
TINY = {**MODEL, "encoder": (32, 1, 0), "decoder": (32, 1, 1)}


def main() -> None:
    args = arguments(__doc__, "runs/claim_binary", steps=800)
    cache = args.cache
    if args.smoke:
        packed = pack([ASSETS / "chelsea.jpg"], cache, image_reader(384))
    else:
        packed = packed_training_pictures(args.data, cache)

    def build(variant: Variant, seed: int, folder: Path) -> Training:
        del folder
        torch.manual_seed(seed)
        tokenizer = Binary1D(**(TINY if args.smoke else MODEL), **variant.settings)
        blocks = () if args.smoke else (*tokenizer.encoder.blocks, *tokenizer.decoder.blocks)
        objective = ImageObjective(l2_weight=10.0, l1_weight=0.5)
        start = 1 if args.smoke else 24  # batches for the k-means start of a VQ codebook
        return Training(
            tokenizer, objective, ImageBatches(packed, args.batch, ((SIZE, SIZE),), seed), 1.5e-3, blocks, start
        )

    done = train_all(VARIANTS, args, build)
    if args.only == "train":
        return
    judges = Judges(None if args.smoke else args.data / "helpers")
    if args.smoke:
        crops = ImageBatches(packed, 4, ((SIZE, SIZE),))(0)["x"]
    else:
        crops = held_out_crops(args.data, cache, "test_photo", SIZE, per_picture=4)
    rows: dict[str, list[dict[str, Any]]] = {}
    for (name, _), folder in sorted(done.items()):
        rows.setdefault(name, []).append(scores_of(folder, lambda t: reconstruction_scores(t, crops, judges)))
    write_claim("claim-binary", rows, args, baseline="vq-16x12")


if __name__ == "__main__":
    main()
