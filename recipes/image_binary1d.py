"""Train the 1-D binary image tokenizer (Instella-T2I's architecture, small): 64 tokens of 64 bits, 512 bytes an image.

Command:   python recipes/image_binary1d.py --data data --out runs/image_binary1d --steps 4300 --compile
Data:      `python recipes/fetch_data.py --out data` (photographs, emoji, stamps), or any folder of images.
Result:    see recipes/LOG.md and checkpoints/image-binary1d-64x64/README.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from mmtok.data.packed import ImageBatches, Packed, image_reader, pack, random_crop
from mmtok.data.sources import Source, find_sources
from mmtok.image.binary1d import Binary1D
from mmtok.losses.perceptual import load_stlpips
from mmtok.training import ImageObjective, TrainConfig, train

# No pull of the bits towards 0 and 1: sampling at temperature 0.1 decides them well enough, while the pull saturates
# the sigmoid, whose slope is the gradient (LOG.md, 2026-11-21: 7 to 13 of 256 codes in use after 380 steps).
QUANTIZER = {"commitment_weight": 0.0, "entropy_weight": 0.02, "entropy_group_bits": 1}
# Larger pictures are read at the size of training: a finer grid than any it saw costs 1.4 dB on the
# packaged photo (measure_cpu.py).
SMALL = {
    "image_size": 128,
    "encoder": (192, 4, 0),
    "decoder": (192, 6, 6),
    "absolute_positions": True,
    "quantizer": QUANTIZER,
}
TINY = {"num_tokens": 8, "num_bits": 16, "encoder": (64, 2, 1), "decoder": (64, 2, 1)}
SIZES = ((128, 128),) * 6 + ((96, 160), (160, 96))
ASSETS = Path(__file__).resolve().parents[1] / "mmtok" / "assets"


def sampling_weights(sources: list[Source]) -> list[float]:
    """Photographs are half of all crops where there are any, whatever their count."""
    photos = sum(s.kind == "photo" for s in sources)
    if not photos or photos == len(sources):
        return [1.0] * len(sources)
    return [0.5 / photos if s.kind == "photo" else 0.5 / (len(sources) - photos) for s in sources]


def held_out_crops(packed: Packed, count: int = 48) -> torch.Tensor:
    rng = np.random.default_rng(7)
    return torch.stack([random_crop(packed[i % len(packed)], (128, 128), rng) for i in range(count)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data", help="folder with images.jsonl, or any folder of images")
    parser.add_argument("--out", default="runs/image_binary1d", help="folder of log, state and weights")
    parser.add_argument("--steps", type=int, default=4300, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=32, help="images a step on one process")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--perceptual", type=float, default=0.0, help="weight of the ST-LPIPS term, 0 = off")
    parser.add_argument("--compile", action="store_true", help="torch.compile each transformer block")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True, help="continue from --out")
    parser.add_argument("--smoke", action="store_true", help="a few steps of a tiny model on the packaged photo")
    args = parser.parse_args()

    sources = find_sources(ASSETS if args.smoke else args.data, "image")
    training = [s for s in sources if s.split == "train"] or sources
    validation = [s for s in sources if s.split == "val"] or training
    cache, read = Path(args.out) / "cache", image_reader(384)
    packed = pack([s.path for s in training], cache, read, sampling_weights(training))
    probe = held_out_crops(pack([s.path for s in validation], cache, read), 2 if args.smoke else 48)

    torch.manual_seed(args.seed)
    tokenizer = Binary1D(**(TINY if args.smoke else SMALL))
    if args.compile:  # block by block: all blocks share one graph, so it takes seconds instead of minutes
        for block in (*tokenizer.encoder.blocks, *tokenizer.decoder.blocks):
            block.compile(dynamic=False)
    config = TrainConfig(
        out=Path(args.out),
        steps=min(args.steps, 3) if args.smoke else args.steps,
        lr=args.lr,
        betas=(0.9, 0.99),
        seed=args.seed,
        warmup=2 if args.smoke else 200,
        resume=args.resume,
    )

    def validate(model: torch.nn.Module) -> dict[str, float]:
        tokens = tokenizer.encode(probe)
        x_hat = tokenizer.decode(tokens)
        assert isinstance(x_hat, torch.Tensor)
        mse = (x_hat - probe).square().flatten(1).mean(1)
        return {"psnr_db": float((-10 * mse.log10()).mean()), "bytes": float(tokens.bits.mean() / 8)}

    perceptual = load_stlpips(net="alex") if args.perceptual else None
    objective = ImageObjective(l2_weight=10.0, l1_weight=0.5, perceptual=perceptual, perceptual_weight=args.perceptual)
    batches = ImageBatches(packed, 2 if args.smoke else args.batch, ((32, 48),) if args.smoke else SIZES, args.seed)
    train(tokenizer, objective, batches, config, validate)
    print(f"weights: {config.out / 'tokenizer'}; log: {config.out / 'log.jsonl'}")


if __name__ == "__main__":
    main()
