"""TiTok (arXiv 2406.07550), the 1-D tokenizer that the others are compared with: one stage, two stages, tail drop.

Command:   python recipes/claim_titok.py --data data --out runs/claim_titok --results recipes/results
Data:      `python recipes/fetch_data.py --out data --helpers`; training on 64 px crops of the train split, scores on
           crops of test packages (4 of each photograph), never trained on.
Compared:  a 2-D VQ teacher (64 codes of 1,024); 32 codes of 1,024 in one stage on pixels; in two stages, half of the
           steps each, over the teacher's codes and then on pixels with its decoder; and in one stage with tail drop,
           scored at 4, 8, 16 and 32 tokens of one model.
Result:    recipes/results/claim-titok.json, README, recipes/LOG.md.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from imaging.grid import Training, Variant, arguments, run, scores_of, train_all
from imaging.pictures import ASSETS, held_out_crops, packed_training_pictures
from imaging.report import write_claim
from imaging.scores import Judges, reconstruction_scores

import mmtok
from mmtok.data.packed import ImageBatches, image_reader, pack
from mmtok.image.raster2d import Raster2D
from mmtok.image.titok import TiTok
from mmtok.metrics.image import psnr
from mmtok.tokenizer import Tokenizer
from mmtok.training import ImageObjective

SIZE, TOKENS = 64, 32
PREFIXES = (4, 8, 16, 32)
VARIANTS = (
    Variant("teacher"),
    Variant("one-stage"),
    Variant("two-stage"),
    Variant("tail-drop", {"tail_drop": "uniform"}),
)
TEACHER: dict[str, Any] = {
    "image_size": SIZE,
    "patch": 2,
    "multipliers": [1, 2, 2],
    "quantizer": {"type": "vq", "dim": 16, "codebook_size": 1024},
}
MODEL: dict[str, Any] = {
    "num_tokens": TOKENS,
    "encoder": (128, 4, 4),
    "decoder": (128, 4, 4),
    "image_size": SIZE,
    "quantizer": {"type": "vq", "codebook_size": 1024, "metric": "cosine"},
}
TINY: dict[str, Any] = {**MODEL, "encoder": (32, 1, 2), "decoder": (32, 1, 2)}


def main() -> None:
    args = arguments(__doc__, "runs/claim_titok", steps=800, seeds=1)
    if args.smoke:
        packed = pack([ASSETS / "chelsea.jpg"], args.cache, image_reader(384))
    else:
        packed = packed_training_pictures(args.data, args.cache)
    teacher_config = {**TEACHER, "width": 8} if args.smoke else TEACHER
    start = 1 if args.smoke else 24
    pixels = ImageObjective(l2_weight=10.0, l1_weight=0.5)

    def build(variant: Variant, seed: int, folder: Path) -> Training:
        torch.manual_seed(seed)
        batches = ImageBatches(packed, args.batch, ((SIZE, SIZE),), seed)
        if variant.name == "teacher":
            return Training(Raster2D(**teacher_config), pixels, batches, 1e-3, (), start)
        model = TINY if args.smoke else MODEL
        if variant.name != "two-stage":
            return Training(TiTok(**model, **variant.settings), pixels, batches, 1e-3, (), start)
        teacher = mmtok.load(args.out / f"teacher-s{seed}" / "tokenizer")
        assert isinstance(teacher, Raster2D)
        tokenizer = TiTok(**model, teacher=teacher.config)
        assert tokenizer.teacher is not None
        tokenizer.teacher.adopt(teacher)
        half = max(1, args.steps // 2)
        proxy = ImageObjective(l2_weight=0.0, aux_weights={"proxy_loss": 1.0})
        run(Training(tokenizer, proxy, batches, 1e-3, (), start, half), folder / "stage1", args, seed)
        tokenizer.start_stage2()
        return Training(tokenizer, pixels, batches, steps=half)

    done = train_all(VARIANTS, args, build)
    if args.only == "train":
        return
    judges = Judges(None if args.smoke else args.data / "helpers")
    if args.smoke:
        crops = ImageBatches(packed, 4, ((SIZE, SIZE),))(0)["x"]
    else:
        crops = held_out_crops(args.data, args.cache, "test_photo", SIZE, per_picture=4)

    def score(tokenizer: Tokenizer) -> dict[str, Any]:
        found = reconstruction_scores(tokenizer, crops, judges)
        if not isinstance(tokenizer, Raster2D):
            tokens = tokenizer.encode(crops)
            for kept in PREFIXES:
                x_hat = tokenizer.decode(tokens.keep(num_tokens=kept))
                assert isinstance(x_hat, torch.Tensor)
                found[f"psnr{kept}"] = psnr(crops, (x_hat * 255).round() / 255).tolist()
        return found

    rows: dict[str, list[dict[str, Any]]] = {}
    for (name, _), folder in done.items():
        rows.setdefault(name, []).append(scores_of(folder, score))
    extra = {f"psnr{kept}": (f"PSNR, first {kept}", 2) for kept in PREFIXES}
    write_claim("claim-titok", rows, args, "one-stage", extra)


if __name__ == "__main__":
    main()
