"""What this CPU does that shaped the code: fused attention, bf16 convolutions, and picture sizes beyond training.

Command:   OMP_NUM_THREADS=1 python recipes/measure_cpu.py
Data:      none but the packaged photo and the shipped image checkpoint; random inputs have seed 0.
Prints:    one JSON line a measurement; times are medians of alternating rounds in one process, quoted as ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import mmtok
from mmtok.data.images import read_image
from mmtok.metrics import METRICS
from mmtok.tokenizer import ImageTokenizer

PHOTO = Path(__file__).resolve().parents[1] / "mmtok" / "assets" / "chelsea.jpg"


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v


def attention(positions: int, heads: int, width: int, batch: int, rounds: int) -> dict:
    """Seconds of forward + backward in bf16: torch's fused kernel over the plain product."""
    seconds: dict[str, list[float]] = {"fused": [], "plain": []}
    for _ in range(rounds + 1):
        for name, run in (("fused", F.scaled_dot_product_attention), ("plain", plain)):
            q, k, v = (torch.randn(batch, heads, positions, width).bfloat16().requires_grad_() for _ in range(3))
            start = time.perf_counter()
            run(q, k, v).float().sum().backward()
            seconds[name].append(time.perf_counter() - start)
    fused, direct = (statistics.median(s[1:]) for s in (seconds["fused"], seconds["plain"]))
    return {"attention": [batch, heads, positions, width], "fused_over_plain": round(fused / direct, 2)}


def convolution(channels: int, out: int, stride: int, length: int) -> dict:
    """Cosine of bf16 results with fp32 ones: the strided convolution, and the gradient of the transposed one."""
    x, weight = torch.randn(4, channels, length), torch.randn(out, channels, 2 * stride) * 0.1
    forward = [F.conv1d(x.to(t), weight.to(t), stride=stride).float() for t in (torch.float32, torch.bfloat16)]
    z, grad = torch.randn(4, out, length // stride), torch.randn(4, channels, length + stride)
    back = []
    for t in (torch.float32, torch.bfloat16):
        leaf = z.clone().to(t).detach().requires_grad_()
        F.conv_transpose1d(leaf, weight.to(t), stride=stride).backward(grad.to(t))
        assert leaf.grad is not None
        back.append(leaf.grad.float())
    cosines = [round(float(F.cosine_similarity(a.flatten(), b.flatten(), 0)), 3) for a, b in (forward, back)]
    return {"bf16_conv": [channels, out, 2 * stride, stride], "forward": cosines[0], "transposed_gradient": cosines[1]}


def sizes(longer_sides: list[int]) -> dict:
    """PSNR of the packaged photo by the longer side at which the shipped image tokenizer reads it."""
    tokenizer = mmtok.load("image-binary1d-64x64")
    assert isinstance(tokenizer, ImageTokenizer)
    x, found = read_image(PHOTO)[None], {}
    for side in longer_sides:
        tokenizer.max_size = side
        x_hat = tokenizer.decode(tokenizer.encode(x))
        found[side] = round(float(METRICS["psnr"].function(x, x_hat)), 2)
    return {"photo_psnr_db_by_size": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of each candidate")
    parser.add_argument("--smoke", action="store_true", help="one round at small shapes")
    args = parser.parse_args()
    torch.manual_seed(0)
    shapes = [(16, 1, 8)] if args.smoke else [(128, 6, 32), (320, 6, 32), (128, 3, 64), (320, 3, 64)]
    for positions, heads, width in shapes:
        shape = (positions, heads, width, 2 if args.smoke else 32)
        print(json.dumps(attention(*shape, 1 if args.smoke else args.rounds)))
    for channels, out, stride in ((16, 32, 8), (32, 64, 5), (64, 128, 4), (128, 256, 2)):
        print(json.dumps(convolution(channels, out, stride, 80 if args.smoke else 8000)))
    print(json.dumps(sizes([128] if args.smoke else [256, 192, 160, 144, 128, 112])))


if __name__ == "__main__":
    main()
