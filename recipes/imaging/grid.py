"""A grid of small trainings, variants x seeds: resumable, and several processes may work on one grid side by side."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import mmtok
from mmtok.tokenizer import Tokenizer
from mmtok.tokens import write_atomic
from mmtok.training import Objective, TrainConfig, train
from mmtok.training.loop import Batches


@dataclass(frozen=True)
class Variant:
    """One row of a comparison: ``name``, and the settings that its builder reads."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class Training:
    """What one training needs.

    ``compiled`` are the modules to compile one by one (blocks share a graph); ``steps`` stands in for ``--steps``.
    """

    tokenizer: Tokenizer
    objective: Objective
    batches: Batches
    lr: float = 1e-3
    compiled: Sequence[torch.nn.Module] = ()
    codebook_batches: int = 0
    steps: int | None = None


def arguments(doc: str | None, out: str, steps: int, seeds: int = 3) -> argparse.Namespace:
    """The flags that all claim recipes have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder that fetch_data.py made")
    parser.add_argument("--out", type=Path, default=Path(out), help="folder of the runs; finished ones are not redone")
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/imaging"), help="packed pictures and features, shared by the claims"
    )
    parser.add_argument("--results", type=Path, help="folder for the result's JSON (recipes/results for the README)")
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps of each training")
    parser.add_argument("--variants", nargs="+", help="only these rows of the comparison, by name")
    parser.add_argument("--seeds", type=int, default=seeds, help="trainings of each variant, seeds 0, 1, ...")
    parser.add_argument("--batch", type=int, default=32, help="images a step")
    parser.add_argument("--only", choices=("train", "score"), help="stop after the trainings, or only score them")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True, help="continue from --out")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--smoke", action="store_true", help="a few steps of tiny models, no downloaded data")
    args = parser.parse_args()
    if args.smoke:
        args.steps, args.seeds, args.batch, args.cache = 2, 1, 2, args.out / "cache"
    return args


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """True inside the block when no other process works on ``folder``; the kernel frees it when a process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def train_all(
    variants: Sequence[Variant], args: argparse.Namespace, build: Callable[[Variant, int, Path], Training]
) -> dict[tuple[str, int], Path]:
    """Train every variant with every seed; the folders of the finished tokenizers, by (variant, seed).

    All trainings of a seed see the same batches in the same order. Seeds go around outermost, so that a comparison
    exists early. What another process has taken is left out of the result.
    """
    names = [v.name for v in variants]
    if unknown := sorted(set(args.variants or ()) - set(names)):
        raise SystemExit(f"--variants: expected names among {names}, got {unknown}")
    variants = [v for v in variants if args.variants is None or v.name in args.variants]
    done: dict[tuple[str, int], Path] = {}
    for seed in range(args.seed, args.seed + args.seeds):
        for variant in variants:
            folder = args.out / f"{variant.name}-s{seed}"
            finished = folder / "finished.json"
            with claimed(folder) as mine:
                if not mine:
                    print(f"{folder}: another process works on it", flush=True)
                    continue
                if not finished.is_file() and args.only != "score":
                    print(f"{folder}: {args.steps} steps", flush=True)
                    run(build(variant, seed, folder), folder, args, seed)
                    write_atomic(finished, json.dumps({"steps": args.steps, "settings": variant.settings}).encode())
                if finished.is_file():
                    done[variant.name, seed] = folder / "tokenizer"
    return done


def run(training: Training, folder: Path, args: argparse.Namespace, seed: int) -> None:
    """One training into ``folder``."""
    for module in training.compiled:
        module.compile(dynamic=False)
    steps = training.steps or args.steps
    config = TrainConfig(
        out=folder,
        steps=steps,
        lr=training.lr,
        betas=(0.9, 0.99),
        seed=seed,
        warmup=min(100, max(1, steps // 8)),
        ema=0.995,
        save_every=200,
        validate_every=10**9,
        codebook_batches=training.codebook_batches,
        resume=args.resume,
        bf16=not args.smoke,
    )
    train(training.tokenizer, training.objective, training.batches, config)


def scores_of(folder: Path, score: Callable[[Tokenizer], dict[str, Any]], name: str = "scores.json") -> dict[str, Any]:
    """Scores of a finished tokenizer, kept beside it: they belong to its fingerprint and are computed once."""
    tokenizer = mmtok.load(folder)
    kept = folder.parent / name
    if kept.is_file():
        found = json.loads(kept.read_text())
        if found["fingerprint"] == tokenizer.fingerprint:
            return found
    found = {"fingerprint": tokenizer.fingerprint, **score(tokenizer)}
    write_atomic(kept, json.dumps(found).encode())
    return found
