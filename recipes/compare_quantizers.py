"""Which quantizer when: every scheme of the zoo, alone, on the latents of the shipped speech codec.

Command:   OMP_NUM_THREADS=1 python recipes/compare_quantizers.py --data data --out recipes/results
           python recipes/compare_quantizers.py --data my_recordings --out /tmp/x --seeds 1 --steps 200 --only rvq fsq
Data:      `python recipes/fetch_data.py --out data`, or any folder of audio. Latents z are what the encoder of
           audio-codec-16k-4kbps gives before its own quantizer: training latents from randomly drawn training files
           (--minutes of sound), held-out latents from the benchmark's set `speech` (a folder without
           test files: its `val` part). One mean vector is subtracted and one number divided by, for all alike.
Protocol:  each quantizer trains on the same frozen latents: AdamW on what it has of parameters, at one rate with a
           cosine to 0 (a third of that rate where it diverges, which the table says); its own averages and k-means;
           loss = its own loss + mean square error of z_q; the same steps, batches and seeds for all. `pq` and
           `per_dimension` are fitted instead. Figures are means over the seeds.
           SNR = 10 log10(variance of z / mean square error) over all held-out positions, with a 95 % bootstrap
           interval over clips of the error that is averaged over the seeds. Usage, perplexity and dead codes (used
           less than 0.1 of the mean) are counted on held-out codes, mean over levels. "Entropy bits" is the sum of
           the levels' log2 perplexity: what a memoryless coder of each level alone would need. Times are CPU seconds
           of one thread.
Writes:    quantizers-latents.json and quantizers-latents.md.
Time:      15 CPU minutes on one core of a Xeon with AMX, 2 seeds, beside other work.
Result:    11,986 held-out positions; 10 bits: vq (EMA) 4.2 dB, fsq 2.3 dB; 80 bits: rvq (EMA) 11.6 dB, binary 7.1 dB.
           All rows: recipes/results/quantizers-latents.md, and the section "Which quantizer when" of README.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import platform
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from hearing.scores import speech_clips
from torch import Tensor
from tqdm import tqdm

import mmtok
from mmtok.audio.codec import AudioCodec
from mmtok.bench.tables import interval_text, markdown_table
from mmtok.data.audio import read_audio, resample
from mmtok.data.sources import find_sources
from mmtok.kernels.codebook_stats import usage_perplexity
from mmtok.quantizers import PerDimensionQuantizer, ProductQuantizer, Quantizer, build_quantizer
from mmtok.tokens import write_atomic

ASSETS = Path(__file__).resolve().parents[1] / "mmtok" / "assets"
CODEC = "audio-codec-16k-4kbps"
WINDOW = 32  # positions; a multiple of every stride, so that groups never cross the end of a clip
PREFIXES = {"rvq (EMA)": (4, 5, 6)}  # fewer levels of the same training, also scored
Run = dict[str, Any]


def schemes(dim: int, bits: int) -> dict[str, dict[str, Any]]:
    """name -> configuration; a code has 2^bits values, or about that, and the coarse half of the names 8 such codes."""
    K, narrow = 2**bits, min(8, dim)
    one = {"dim": dim, "codebook_size": K}
    chain = {**one, "num_codebooks": 8}
    grid = [8, 5, 5, 5] if bits == 10 else [2] * bits
    factorised = {"codebook_dim": narrow, "metric": "cosine", "codebook": "gradient"}
    strided = {**one, "type": "strided_rvq", "level_strides": (4, 4, 2, 2, 1, 1, 1, 1)}
    many_bits = {"dim": dim, "num_bits": 8 * bits, "bits_per_code": bits}
    return {
        "vq (EMA)": {"type": "vq", **one},
        "vq (gradient)": {"type": "vq", **one, "codebook": "gradient"},
        f"vq (cosine, width {narrow})": {"type": "vq", **one, **factorised},
        "vq (the same, rotation trick)": {"type": "vq", **one, **factorised, "gradient": "rotation"},
        "simvq": {"type": "simvq", **one},
        f"fsq {grid if bits == 10 else ''}".strip(): {"type": "fsq", "dim": dim, "levels": grid},
        "lfq": {"type": "lfq", "dim": dim, "num_bits": bits},
        "bsq": {"type": "bsq", "dim": dim, "num_bits": bits},
        "random_projection": {"type": "random_projection", **one, "codebook_dim": min(16, dim)},
        "pq, 1 group (k-means)": {"type": "pq", **one},
        "rvq (EMA)": {"type": "rvq", **chain},
        f"rvq (cosine, width {narrow})": {"type": "rvq", **chain, **factorised},
        "grouped_rvq, 2 groups": {"type": "grouped_rvq", **chain},
        f"split_rvq, width {dim}": {"type": "split_rvq", **chain, "inner_dim": dim},
        "strided_rvq (EMA)": {**strided, "codebook_dim": None, "metric": "euclidean", "codebook": "ema"},
        f"strided_rvq (cosine, width {narrow})": strided,
        f"rfsq, {bits} numbers": {"type": "rfsq", "dim": dim, "num_codebooks": 8, "levels": [2] * bits},
        "binary (bernoulli)": {"type": "binary", **many_bits},
        "binary (sign = LFQ, grouped entropy)": {"type": "lfq", **many_bits, "entropy": "grouped"},
        "binary (spherical = BSQ, grouped entropy)": {"type": "bsq", **many_bits, "entropy": "grouped"},
        "pq, 8 groups": {"type": "pq", **chain},
        "per_dimension, 1 bit": {"type": "per_dimension", "dim": dim, "bits": 1},
    }


def find_clips(data: Path, minutes: float, seed: int) -> tuple[list[Tensor], list[Tensor], Run]:
    """Training clips and held-out clips (1, L) at 16 kHz, and what they are in words."""
    sources = find_sources(data, "audio")
    test = speech_clips(data)
    about: Run = {"held_out": "test" if test else "val", "unreadable": [], "training_packages": []}
    test = test or [mono(s.path) for s in sources if s.split == "val"]
    training = [s for s in sources if s.split == "train"]
    if not test or not training:
        raise ValueError(f"--data: expected files to train on and files held out, got {len(training)} and {len(test)}")
    random.Random(seed).shuffle(training)
    clips, seconds = [], 0.0
    for source in tqdm(training, desc="reading", unit="file", mininterval=2):
        if seconds >= 60 * minutes:
            break
        try:
            clips.append(mono(source.path))
        except (ValueError, OSError) as e:  # as in mmtok.data.packed: a broken file does not end the run, and is told
            about["unreadable"].append(str(e))
            continue
        seconds += clips[-1].shape[1] / 16000
        about["training_packages"] = sorted({*about["training_packages"], source.package})
    about |= {"training_files": len(clips), "training_seconds": round(seconds, 1), "held_out_files": len(test)}
    return clips, test, about


def mono(path: Path) -> Tensor:
    x, rate = read_audio(path)
    return resample(x.mean(0, keepdim=True), rate, 16000)


@torch.no_grad()
def latents(codec: AudioCodec, clips: list[Tensor], unit: str) -> list[Tensor]:
    """z (T, D) of each clip (1, L) that has a whole frame; what is left of the last frame is cut off."""
    hop, found = codec.hop_length, []
    for clip in tqdm(clips, desc=f"encoding, {unit}", unit="clip", mininterval=2):
        if whole := clip.shape[1] // hop * hop:
            found.append(codec.latent(clip[None, :, :whole])[0].float())
    return found


def train(quantizer: Quantizer, windows: Tensor, steps: int, batch: int, lr: float, seed: int) -> bool:
    """Train or fit on windows (M, WINDOW, D); false when it diverged: ten times the error of no code at all."""
    dim = windows.shape[2]
    if isinstance(quantizer, PerDimensionQuantizer):
        quantizer.fit(windows.view(-1, dim))
    elif isinstance(quantizer, ProductQuantizer):
        quantizer.fit(list(windows.view(-1, dim).split(65536)), progress=False)
    else:
        parameters, draw = list(quantizer.parameters()), torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0) if parameters else None
        most = 10 * windows.square().mean().item()
        quantizer.train()
        for step in range(steps):
            z = windows[torch.randint(len(windows), (batch,), generator=draw)]
            with torch.set_grad_enabled(optimizer is not None):
                out = quantizer(z)
                error = (out.z_q - z).square().mean()
            if not error.item() <= most:  # NaN too
                return False
            if optimizer is not None:
                optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
                optimizer.zero_grad()
                (out.loss + error).backward()
                optimizer.step()
    quantizer.eval()
    return True


def train_stably(config: Run, windows: Tensor, args: argparse.Namespace, seed: int) -> tuple[Quantizer, Run]:
    """A trained quantizer with its CPU seconds and rate: --lr, or a third, a ninth ... of it while it diverges."""
    lr = args.lr
    while lr > 1e-3 * args.lr:
        torch.manual_seed(seed)
        quantizer, started = build_quantizer(config), time.process_time()
        if train(quantizer, windows, args.steps, args.batch, lr, seed):
            return quantizer, {"train_seconds": time.process_time() - started, "lr": lr}
        lr /= 3
    raise RuntimeError(f"{config}: diverged at every rate from {args.lr} down to {lr}")


@torch.no_grad()
def score(quantizer: Quantizer, clips: list[Tensor], num_codebooks: int | None = None) -> Run:
    """Everything that is measured on held-out latents (T, D); ``error`` and ``energy`` are sums for each clip."""
    codes = [quantizer.encode(z[None], num_codebooks) for z in clips]  # each (1, Q', T)
    mean = torch.cat(clips).mean(0)
    error = [float((quantizer.decode(c)[0] - z).square().sum()) for c, z in zip(codes, clips, strict=True)]
    use = []
    for q, (K, stride) in enumerate(zip(quantizer.codebook_sizes, quantizer.level_strides, strict=True)):
        if q < codes[0].shape[1]:  # a code that a coarse level repeats counts once
            counts = torch.bincount(torch.cat([c[0, q, ::stride] for c in codes]), minlength=K)
            use.append({k: float(v) for k, v in usage_perplexity(counts).items()} | {"K": K, "stride": stride})
    rows, seconds = torch.cat(clips)[None], []
    for _ in range(4):  # the first one warms up
        started = time.process_time()
        quantizer.encode(rows, num_codebooks)
        seconds.append(time.process_time() - started)
    return {
        "levels": len(use),
        "bits": sum(math.log2(u["K"]) / u["stride"] for u in use),
        "entropy_bits": sum(math.log2(u["perplexity"]) / u["stride"] for u in use),
        **{name: statistics.mean(u[name] for u in use) for name in ("usage", "perplexity", "dead_share", "K")},
        "encode_positions_per_second": rows.shape[1] / statistics.median(seconds[1:]),
        "error": error,
        "energy": [float((z - mean).square().sum()) for z in clips],
    }


def snr_interval(error: np.ndarray, energy: np.ndarray, draws: int = 2000) -> dict[str, float]:
    """SNR in dB of sums (clips,) of squared error and of squared deviation, with its 95 % interval over clips."""
    picks = np.random.default_rng(0).integers(len(error), size=(draws, len(error)))
    drawn = 10 * np.log10(energy[picks].sum(1) / error[picks].sum(1))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"mean": float(10 * np.log10(energy.sum() / error.sum())), "low": float(low), "high": float(high)}


def summarise(name: str, config: Run, runs: list[Run]) -> Run:
    """One row from the scores of each seed."""
    error, energy = np.array([r.pop("error") for r in runs]), np.array([r.pop("energy") for r in runs])
    by_seed = 10 * np.log10(energy.sum(1) / error.sum(1))
    row = {key: statistics.mean(r[key] for r in runs) for key in runs[0]}
    interval = snr_interval(error.mean(0), energy[0])
    return {"name": name, "config": config, **row, "snr_db": interval, "snr_db_by_seed": by_seed.tolist()}


def table(rows: list[Run], lr: float) -> str:
    header = "scheme; codes a position; bits; entropy bits; usage %; perplexity of K; dead %; SNR dB [95 %]"
    lines = []
    for r in rows:
        perplexity = f"{r['perplexity']:.0f} of {r['K']:.0f}" if r["K"] > 2 else f"{r['perplexity']:.2f} of 2"
        name = r["name"] + (f" (diverged; at mean rate {r['lr']:.1g})" if r.get("lr", lr) < lr else "")
        cells = [name, f"{r['levels']:.0f} x {r['K']:.0f}", f"{r['bits']:.4g}", f"{r['entropy_bits']:.1f}"]
        cells += [f"{100 * r['usage']:.0f}", perplexity, f"{100 * r['dead_share']:.0f}", interval_text(r["snr_db"], 2)]
        cells += [f"{r['train_seconds']:.0f}" if "train_seconds" in r else "-"]
        lines.append([*cells, f"{r['encode_positions_per_second'] / 1000:.0f}"])
    return markdown_table([*header.split("; "), "training s", "encode, 1000 positions/s"], lines)


def compare(known: Tensor, held_out: list[Tensor], chosen: dict[str, Run], args: argparse.Namespace) -> list[Run]:
    """Rows of all chosen schemes, trained on known (M, WINDOW, D) and scored on held_out, each (T, D)."""
    rows: list[Run] = []
    warm_up = {"type": "vq", "dim": known.shape[2], "codebook_size": 16}  # compiles what is compiled on first use
    train(build_quantizer(warm_up), known, 2, args.batch, args.lr, args.seed)
    with tqdm(total=len(chosen) * args.seeds, desc="quantizers", unit="run") as bar:
        for name, config in chosen.items():
            bar.set_postfix_str(name)
            runs: dict[int | None, list[Run]] = {q: [] for q in (None, *PREFIXES.get(name, ()))}
            for seed in range(args.seed, args.seed + args.seeds):
                quantizer, facts = train_stably(config, known, args, seed)
                for q, found in runs.items():
                    found.append(score(quantizer, held_out, q) | facts)
                bar.update()
            for q, found in runs.items():
                rows.append(summarise(name if q is None else f"{name}, first {q} of 8", config, found))
            tqdm.write(table(rows[-len(runs) :], args.lr).split("\n", 2)[2])
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with speech.jsonl, or any audio")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of quantizers-latents.json and .md")
    parser.add_argument("--steps", type=int, default=500, help="training steps of each quantizer")
    parser.add_argument("--batch", type=int, default=64, help=f"windows of {WINDOW} positions a step")
    parser.add_argument("--lr", type=float, default=1e-2, help="peak learning rate, the same for all")
    parser.add_argument("--minutes", type=float, default=60.0, help="of training sound")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn files and the first training")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each quantizer")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="beginnings of names, such as rvq")
    parser.add_argument("--smoke", action="store_true", help="a few steps of tiny codebooks on the packaged clip")
    args = parser.parse_args(arguments)
    if args.smoke:
        args.steps, args.batch, args.seeds = 2, 2, 1
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.process_time()
    codec = mmtok.load(CODEC)
    assert isinstance(codec, AudioCodec)
    if args.smoke:
        clip = mono(ASSETS / "speech.flac")
        half = clip.shape[1] // 2
        clips, test, about = [clip[:, :half]], [clip[:, half:]], {"held_out": "second half of the packaged clip"}
    else:
        clips, test, about = find_clips(args.data, args.minutes, args.seed)
    known, held_out = latents(codec, clips, "training"), latents(codec, test, "held out")
    known = torch.cat([z[: len(z) // WINDOW * WINDOW].view(-1, WINDOW, z.shape[1]) for z in known])
    centre = known.mean((0, 1))
    scale = (known - centre).square().mean().sqrt()
    known, held_out = (known - centre) / scale, [(z - centre) / scale for z in held_out]
    about |= {"training_positions": known.shape[0] * WINDOW, "held_out_positions": sum(map(len, held_out))}

    chosen = schemes(known.shape[2], 4 if args.smoke else 10)
    if args.only:
        chosen = {name: config for name, config in chosen.items() if name.startswith(tuple(args.only))}
    own = [score(codec.quantizer, [z * scale + centre for z in held_out])]
    rows = [summarise("for reference: the codec's own rvq, trained with it", codec.quantizer.config(), own)]
    rows += compare(known, held_out, chosen, args)
    run = {
        "command": " ".join(["python", "recipes/compare_quantizers.py", *(arguments or sys.argv[1:])]),
        "date": time.strftime("%Y-%m-%d"),
        "settings": {k: v for k, v in vars(args).items() if k not in ("data", "out")},
        "codec": {"name": CODEC, "fingerprint": codec.fingerprint},
        "data": about,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "numpy")},
        "machine": platform.platform(),
        "cpu_minutes": round((time.process_time() - started) / 60, 1),
    }
    write_atomic(args.out / "quantizers-latents.json", (json.dumps(run | {"rows": rows}, indent=1) + "\n").encode())
    write_atomic(args.out / "quantizers-latents.md", f"`{run['command']}`\n\n{table(rows, args.lr)}\n".encode())
    print(table(rows, args.lr))


if __name__ == "__main__":
    main()
