"""Claims of TokenBridge (arXiv 2503.16430): 64 cells a number lose nothing, and a head over numbers must be causal.

Command:   python recipes/claim_bridge.py --data data --out runs/claim_bridge --results recipes/results
Data:      `python recipes/fetch_data.py --out data --helpers`; training on 64 px crops of the train split, scores on
           crops of test packages (4 of each photograph), never trained on.
Compared:  one KL autoencoder (64 positions of 16 numbers), continuous against 4, 8, 16, 32 and 64 cells a number, with
           the Gaussian table after `calibrate`; nothing is trained for that. Then, on its 64-cell codes, nats a number
           of the autoregressive head over dimensions against independent heads, each behind the same small causal
           transformer over positions; 3 seeds.
Result:    recipes/results/claim-bridge.json, README, recipes/LOG.md.
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
from imaging.scores import Judges, picture_scores, reconstruction_scores
from torch import Tensor, nn
from tqdm import tqdm

from mmtok.data.packed import ImageBatches, image_reader, pack
from mmtok.image.bridge import Bridge
from mmtok.image.dimension_head import CodesHead, DimensionHead, ParallelHead, energy_order
from mmtok.layers.vit import ViTBlock
from mmtok.tokenizer import Tokenizer, evaluation
from mmtok.training import ImageObjective

SIZE = 64
CELLS = (64, 32, 16, 8, 4)
MODEL: dict[str, Any] = {"image_size": SIZE}
TINY: dict[str, Any] = {"width": 8, "multipliers": (1, 1, 1), "latent_dim": 4, "image_size": SIZE}
KL_WEIGHT = 1e-3


class Positions(nn.Module):
    """A small causal transformer over the latents of the positions before: one condition a position."""

    def __init__(self, latent_dim: int, dim: int = 128, depth: int = 3):
        super().__init__()
        self.latent_in = nn.Linear(latent_dim, dim)
        self.start = nn.Parameter(torch.zeros(dim))
        self.positions = nn.Parameter(torch.randn((SIZE // 8) ** 2, dim) * 0.02)
        self.blocks = nn.ModuleList(ViTBlock(dim, 4, 2.0, causal=True) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, z: Tensor) -> Tensor:
        """z (B, T, D) -> (B, T, dim)."""
        x = torch.cat([self.start.expand(len(z), 1, -1), self.latent_in(z[:, :-1])], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


@torch.no_grad()
def codes_and_latents(tokenizer: Bridge, x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (n, T, D) and their dequantized values."""
    with evaluation(tokenizer):
        codes = torch.cat([tokenizer.encode_pixels(part, None, None, None)[0] for part in x.split(64)])
    return codes.transpose(1, 2).contiguous(), tokenizer.quantizer.decode(codes)


def head_bits(
    kind: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], cells: int, seed: int, steps: int
) -> float:
    """Bits a number on the test codes of a head that learnt with its own `Positions`."""
    torch.manual_seed(seed)
    D = train[0].shape[2]
    body = Positions(D)
    head: CodesHead
    if kind == "autoregressive":
        order = energy_order(train[1].flatten(0, 1))
        head = DimensionHead(128, D, cells, dim=64, depth=2, num_heads=4, order=order)
    else:
        head = ParallelHead(128, D, cells)
    both = nn.ModuleList([body, head])
    optimizer = torch.optim.AdamW(both.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    draw = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(steps), desc=f"{kind} head, seed {seed}", mininterval=5):
        rows = torch.randint(len(train[0]), (16,), generator=draw)
        codes, z = train[0][rows], train[1][rows]
        with torch.autocast("cpu", torch.bfloat16):
            loss = head.loss(body(z).flatten(0, 1), codes.flatten(0, 1))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    both.eval()
    with torch.no_grad():
        parts = zip(test[0].split(32), test[1].split(32), strict=True)
        nats = [float(head.loss(body(z).flatten(0, 1), c.flatten(0, 1))) * len(c) for c, z in parts]
    return sum(nats) / len(test[0]) / float(torch.log(torch.tensor(2.0)))


def main() -> None:
    args = arguments(__doc__, "runs/claim_bridge", steps=2000, seeds=1)
    cache = args.cache
    if args.smoke:
        packed = pack([ASSETS / "chelsea.jpg"], cache, image_reader(384))
    else:
        packed = packed_training_pictures(args.data, cache)

    def build(variant: Variant, seed: int, folder: Path) -> Training:
        del variant, folder
        torch.manual_seed(seed)
        objective = ImageObjective(l2_weight=10.0, l1_weight=0.5, aux_weights={"kl": KL_WEIGHT})
        batches = ImageBatches(packed, args.batch, ((SIZE, SIZE),), seed)
        return Training(Bridge(**(TINY if args.smoke else MODEL)), objective, batches, 1e-3)

    done = train_all([Variant("autoencoder")], args, build)
    if args.only == "train":
        return
    judges = Judges(None if args.smoke else args.data / "helpers")
    some = ImageBatches(packed, 4 if args.smoke else 32, ((SIZE, SIZE),), seed=12345)
    many = torch.cat([some(i)["x"] for i in range(2 if args.smoke else 64)])
    crops = some(99)["x"] if args.smoke else held_out_crops(args.data, cache, "test_photo", SIZE, per_picture=4)

    def score(tokenizer: Tokenizer) -> dict[str, Any]:
        assert isinstance(tokenizer, Bridge)
        tokenizer.calibrate([many])
        with torch.no_grad(), evaluation(tokenizer):
            plain = torch.cat([tokenizer(part).x_hat for part in crops.split(32)]).clamp(0, 1)
        found: dict[str, Any] = {"continuous": picture_scores(crops, (plain * 255).round() / 255, judges)}
        for cells in CELLS:
            tokenizer.set_cells(cells.bit_length() - 1)
            found[f"{cells} cells"] = reconstruction_scores(tokenizer, crops, judges)
        tokenizer.set_cells(6)
        train, test = codes_and_latents(tokenizer, many), codes_and_latents(tokenizer, crops)
        steps = 2 if args.smoke else 400
        for kind in ("autoregressive", "parallel"):
            found[kind] = [head_bits(kind, train, test, 64, seed, steps) for seed in range(1 if args.smoke else 3)]
        return found

    rows: dict[str, list[dict[str, Any]]] = {}
    heads: dict[str, list[float]] = {}
    for _, folder in sorted(done.items()):
        found = scores_of(folder, score)
        for name in ("continuous", *(f"{c} cells" for c in CELLS)):
            rows.setdefault(name, []).append(found[name])
        for kind in ("autoregressive", "parallel"):
            heads.setdefault(kind, []).extend(found[kind])
    write_claim("claim-bridge", rows, args, "continuous", notes={"bits_a_number": heads})
    print("bits a number of 6:", {k: [round(v, 3) for v in values] for k, values in heads.items()})


if __name__ == "__main__":
    main()
