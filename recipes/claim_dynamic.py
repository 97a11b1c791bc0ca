"""Claim of LaVIT (arXiv 2309.04669): a third of the patches, merged well, keeps what a picture means.

Command:   python recipes/claim_dynamic.py --data data --out runs/claim_dynamic --results recipes/results
           (several copies of the command share the work)
Data:      `python recipes/fetch_data.py --out data --helpers`: 4,359 captioned pictures and their mirror images, split
           80 / 10 / 10 by caption; features of EfficientNet-Lite0, 49 patches of 320 numbers.
Compared:  keep ratios 1, 1/2 and 1/3 of every picture, and 1/3 of the batch's patches, all else equal. Measured on
           restored features (mean over patches): recall of the picture by its caption (a ridge map to MiniLM's space,
           learnt on the training split) and a linear probe of the subject; the frozen features are the ceiling.
Result:    recipes/results/claim-dynamic.json, README, recipes/LOG.md.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from imaging.features import VISION, first_of_each_caption, hits, ridge, semantic_material, subjects
from imaging.grid import Training, Variant, arguments, run, scores_of, train_all
from imaging.pictures import Captioned, SquareBatches, square
from imaging.report import interval, write_claim
from imaging.scores import codebook_use
from torch import Tensor

from mmtok.image.dynamic import Dynamic
from mmtok.metrics.image import psnr
from mmtok.metrics.retrieval import linear_probe
from mmtok.tokenizer import Tokenizer
from mmtok.tokens import Tokens
from mmtok.training import ImageObjective

SIZE, SQUARE = 64, 72
VARIANTS = (
    Variant("keep-1", {"keep_ratio": 1.0}),
    Variant("keep-half", {"keep_ratio": 1 / 2}),
    Variant("keep-third", {"keep_ratio": 1 / 3}),
    Variant("keep-third-of-batch", {"keep_ratio": 1 / 3, "selection": {"ratio_over": "batch"}}),
)
MODEL: dict[str, Any] = {"quantizer": {"type": "vq", "codebook_size": 1024}}
PROBED = ("probe", "asked", "subjects", "probed")
WEIGHTS = {"feature_loss": 1.0, "ratio_loss": 2.0}  # the paper's balance


def smoke_pictures() -> tuple[Captioned, Tensor, Tensor]:
    rng = np.random.default_rng(0)
    pixels = np.stack([square(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8), SQUARE) for _ in range(8)])
    paths = [Path(p) / "x.png" for p in ("animals", "food") * 4]
    splits = ["train"] * 4 + ["test"] * 4
    captioned = Captioned(pixels, list("abcdefgh"), paths, splits, ["drawing"] * 8)
    return captioned, torch.randn(8, 49, 320), torch.randn(8, 384)


@torch.no_grad()
def measure(tokenizer: Tokenizer, features: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor, Tokens, float]:
    """Restored features (n, D), pictures, tokens and cosine of features (n, 49, 320)."""
    assert isinstance(tokenizer, Dynamic)
    restored, pictures, parts, cosines = [], [], [], []
    spec = tokenizer.spec
    for f, x in zip(features.split(64), pixels.split(64), strict=True):
        f = f.float()
        keep = tokenizer.select(f)
        z, present = tokenizer.latent(f, keep)
        codes = tokenizer.quantizer.encode(z, None, present > 0)
        lengths = (present > 0).sum(1)
        back = tokenizer.reconstruct_features(codes, lengths)
        cosines.append(torch.nn.functional.cosine_similarity(back.float(), f, dim=-1).mean(1))
        restored.append(back.mean(1).float())
        pictures.append(tokenizer.pixels(back).clamp(0, 1)[:, :, : x.shape[2], : x.shape[3]])
        parts.append(Tokens(codes, lengths, spec))
    return torch.cat(restored), torch.cat(pictures), Tokens.concat(parts), float(torch.cat(cosines).mean())


def semantics(
    train_x: Tensor, test_x: Tensor, captioned: Captioned, embeddings: Tensor, rows: tuple[np.ndarray, np.ndarray]
) -> dict[str, Any]:
    """Recall of test pictures by caption, and accuracy of the subject, from one vector a picture."""
    train, test = rows
    mx, my, matrix = ridge(train_x, embeddings[train].float())
    asked = first_of_each_caption(captioned, test)
    place = {int(i): n for n, i in enumerate(test)}
    chosen = torch.tensor([place[int(i)] for i in asked])
    guess = torch.nn.functional.normalize((test_x[chosen].double() - mx) @ matrix + my, dim=-1)
    truth = torch.nn.functional.normalize(embeddings[asked].double(), dim=-1)
    names, labels = subjects(captioned, 60 if len(train) > 100 else 1)
    known_train, known_test = torch.from_numpy(labels[train] >= 0), torch.from_numpy(labels[test] >= 0)
    y_train, y_test = torch.from_numpy(labels[train]), torch.from_numpy(labels[test])
    accuracy = linear_probe(train_x[known_train], y_train[known_train], test_x[known_test], y_test[known_test], 1e-2)
    return {
        "recall5": hits(truth @ guess.T),
        "probe": 100 * accuracy,
        "asked": len(asked),
        "subjects": len(names),
        "probed": int(known_test.sum()),
    }


def main() -> None:
    args = arguments(__doc__, "runs/claim_dynamic", steps=600)
    if args.smoke:
        plain, features, embeddings = smoke_pictures()
        captioned = plain
    else:
        plain, captioned, features, embeddings = semantic_material(args.data, args.cache, SQUARE)

    def build(variant: Variant, seed: int, folder: Path) -> Training:
        torch.manual_seed(seed)
        tokenizer = Dynamic(vision=VISION, **MODEL, **variant.settings)
        train_rows, more = captioned.rows("train"), {"features": features}
        batches = SquareBatches(captioned, train_rows, args.batch, SIZE, seed, more, move=False)
        objective = ImageObjective(l2_weight=10.0, l1_weight=0.5, aux_weights=WEIGHTS)
        # The author's advice: selector and merger first, then codes; from the start the codebook collapses (LOG.md).
        tokenizer.quantize = False
        first = Training(tokenizer, objective, batches, steps=max(1, args.steps // 3))
        run(first, folder / "first", args, seed)
        tokenizer.quantize = True
        return Training(tokenizer, objective, batches, codebook_batches=1 if args.smoke else 16)

    done = train_all(VARIANTS, args, build)
    if args.only == "train":
        return
    splits = (plain.rows("train"), plain.rows("test"))

    def score(tokenizer: Tokenizer) -> dict[str, Any]:
        pixels = plain.images(splits[1], SIZE)
        train_x = measure(tokenizer, features[splits[0]], torch.zeros(len(splits[0]), 3, 8, 8))[0]
        test_x, pictures, tokens, cosine = measure(tokenizer, features[splits[1]], pixels)
        return {
            "count": len(pixels),
            "bits": float(tokens.bits.mean()),
            "tokens": tokens.lengths.double().tolist(),
            "cosine": cosine,
            "psnr": psnr(pixels, pictures).tolist(),
            **semantics(train_x, test_x, plain, embeddings, splits),
            **codebook_use([tokens]),
        }

    rows: dict[str, list[dict[str, Any]]] = {}
    for (name, _), folder in sorted(done.items()):
        rows.setdefault(name, []).append(scores_of(folder, score))
    ceiling = semantics(
        features[splits[0]].float().mean(1), features[splits[1]].float().mean(1), plain, embeddings, splits
    )
    extra = {
        "tokens": ("tokens", 1),
        "cosine": ("feature cosine", 3),
        "recall5": ("recall@5 %", 1),
        "probe": ("probe %", 1),
    }
    frozen = {"recall5": interval(np.array([ceiling["recall5"]])), **{k: ceiling[k] for k in PROBED}}
    write_claim("claim-dynamic", rows, args, "keep-1", extra, {"frozen_features": frozen})
    print("frozen features:", frozen)


if __name__ == "__main__":
    main()
