"""The README's table of claims, from the stored results of the claim recipes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmtok.bench.tables import markdown_table

COMMAND = "`python recipes/{}.py --data data{} --results recipes/results`"
RECIPES = {"xcodec": "claims_audio"}  # the others are claim_NAME
FLAGS = {
    "binary": " --seeds 2",
    "dynamic": " --steps 450 --seeds 1",
    "xcodec": " --seeds 2",
    "titok": " --steps 300",
}  # as they were run
HEADER = ["system", "the paper's claim", "ours, small and on a CPU", "command"]


def claims_table(results: Path) -> str:
    """One row a system whose results are stored; every number is read from ``results``."""
    rows = []
    for name, (system, claim, ours) in SYSTEMS.items():
        if any(results.glob(f"claim-{name}*.json")):
            rows.append(
                [system, claim, ours(results), COMMAND.format(RECIPES.get(name, f"claim_{name}"), FLAGS.get(name, ""))]
            )
    return markdown_table(HEADER, rows)


def read(results: Path, name: str) -> dict[str, Any]:
    return json.loads((results / f"{name}.json").read_text())


def gap(result: dict[str, Any], variant: str, score: str, digits: int) -> str:
    """``+0.31 [0.20, 0.42]``: variant minus baseline."""
    entry = result["differences"][variant][score]
    if "low" in entry:
        return f"{entry['mean']:+.{digits}f} [{entry['low']:+.{digits}f}, {entry['high']:+.{digits}f}]"
    return f"{entry['mean']:+.{digits}f} (seeds {', '.join(f'{v:+.{digits}f}' for v in entry['each'])})"


def value(result: dict[str, Any], variant: str, score: str, digits: int) -> str:
    return f"{result['variants'][variant][score]['mean']:.{digits}f}"


def share(result: dict[str, Any], variant: str, score: str) -> str:
    """Change against the baseline in percent, from the means."""
    mine, base = (result["variants"][v][score]["mean"] for v in (variant, result["baseline"]))
    return f"{100 * (mine / base - 1):+.0f} %"


def textok(results: Path) -> str:
    parts = []
    for tokens in (4, 16):
        r = read(results, f"claim-textok-{tokens}")
        none = f"{tokens}-none"
        parts.append(
            f"{tokens} tokens, text in both: FD {share(r, f'{tokens}-both', 'frechet')} "
            f"({value(r, none, 'frechet', 1)} without), PSNR {gap(r, f'{tokens}-both', 'psnr', 2)} dB, "
            f"ST-LPIPS {gap(r, f'{tokens}-both', 'lpips', 4)}; encoder only PSNR "
            f"{gap(r, f'{tokens}-encoder', 'psnr', 2)}, decoder only {gap(r, f'{tokens}-decoder', 'psnr', 2)}"
        )
    return "; ".join(parts)


def binary(results: Path) -> str:
    r = read(results, "claim-binary")
    return (
        f"16 tokens of 48 bits against 16 VQ codes of 12: PSNR {gap(r, 'binary-16x48', 'psnr', 2)} dB, "
        f"FD {share(r, 'binary-16x48', 'frechet')}; at like bits, 16 x 12: {gap(r, 'binary-16x12', 'psnr', 2)} dB; "
        f"64 VQ codes (768 bits, as 16 x 48) against 16: {gap(r, 'vq-64x12', 'psnr', 2)} dB"
    )


def causal(results: Path) -> str:
    r = read(results, "claim-causal")
    return (
        f"bits of 128 under a causal transformer: causal {value(r, 'causal', 'model_bits', 1)}, bidirectional "
        f"{value(r, 'bidirectional', 'model_bits', 1)}, 2-D raster {value(r, 'raster-2d', 'model_bits', 1)} "
        f"(frequencies alone: {value(r, 'causal', 'position_bits', 1)}, "
        f"{value(r, 'bidirectional', 'position_bits', 1)}, {value(r, 'raster-2d', 'position_bits', 1)}); "
        f"recall@5 of a picture by its caption: embedding {value(r, 'causal', 'recall5_embedding', 1)} %, codes "
        f"{value(r, 'causal', 'recall5_codes', 1)} %"
    )


def dynamic(results: Path) -> str:
    r = read(results, "claim-dynamic")
    parts = [
        f"{label}: {value(r, name, 'tokens', 1)} tokens, recall@5 {value(r, name, 'recall5', 1)} %, "
        f"probe {value(r, name, 'probe', 1)} %"
        for name, label in (("keep-1", "keep all"), ("keep-half", "1/2"), ("keep-third", "1/3"))
    ]
    frozen = r["frozen_features"]
    return "; ".join(parts) + f" (frozen features: {frozen['recall5']['mean']:.1f} %, {frozen['probe']:.1f} %)"


def bridge(results: Path) -> str:
    r = read(results, "claim-bridge")
    parts = [f"{c} cells {gap(r, f'{c} cells', 'psnr', 2)} dB" for c in (64, 16, 4)]
    heads = {k: sum(v) / len(v) for k, v in r["bits_a_number"].items()}
    return (
        f"PSNR {value(r, 'continuous', 'psnr', 2)} dB continuous; " + ", ".join(parts) + "; bits a number of 6: "
        f"autoregressive head {heads['autoregressive']:.2f}, independent heads {heads['parallel']:.2f}"
    )


def titok(results: Path) -> str:
    r = read(results, "claim-titok")
    one, two, teacher = (value(r, name, "psnr", 2) for name in ("one-stage", "two-stage", "teacher"))
    plain, dropped = (value(r, name, "psnr4", 2) for name in ("one-stage", "tail-drop"))
    return (
        f"{r['steps']} steps, too few for two stages: 32 tokens in one stage {one} dB, in two {two} dB, 2-D teacher "
        f"(64 codes) {teacher} dB; first 4 of 32 tokens: {plain} dB, with tail drop {dropped} dB, at "
        f"{gap(r, 'tail-drop', 'psnr32', 2)} dB for all 32"
    )


TRAINED = (
    ("faithful", "as released"),
    ("faithful-whole", "the same on the whole batch"),
    ("fixed", "without its faults"),
    ("fixed-quick", "the same with its short memory"),
)


def xcodec(results: Path) -> str:
    r, presets = read(results, "claim-xcodec"), read(results, "claim-xcodec-presets")
    both = [
        f"{label} {value(r, 'acoustic', score, digits)}, with the branch {gap(r, 'semantic', score, digits)}"
        for score, label, digits in (
            ("whisper-base", "WER % at 4 kbit/s by Whisper base", 1),
            ("pocketsphinx", "by pocketsphinx", 1),
            ("whisper-base, 1 kbit/s", "at 1 kbit/s by Whisper base", 1),
            ("probe1", "phone accuracy % of a linear probe on level 1", 1),
            ("probe", "on all levels", 1),
            ("pesq_wb", "PESQ", 2),
            ("stoi", "STOI", 3),
            ("mel_distance", "mel distance", 2),
        )
    ]
    training = [
        f"{label} {value(presets, name, 'perplexity', 0)} of 256 (PESQ {value(presets, name, 'pesq_wb', 2)}, "
        f"mel distance {value(presets, name, 'mel_distance', 2)})"
        for name, label in TRAINED
    ]
    heard = {name: entry["mean"] for name, entry in r["originals"].items()}
    originals = f"(WER of the originals {heard['whisper-base']:.1f} and {heard['pocketsphinx']:.1f} %)"
    steps = f"Its training, {presets['steps']} steps: perplexity "
    return "without the branch: " + "; ".join(both) + f" {originals}. {steps}" + ", ".join(training)


SYSTEMS: dict[str, tuple[str, str, Callable[[Path], str]]] = {
    "textok": ("TexTok", "text lowers rFID by 29 % (256 px) and 48 % (512 px)", textok),
    "binary": ("Instella-T2I", "128 binary tokens hold a 1024 px image", binary),
    "causal": ("SEED", "causal 1-D codes suit a causal LM; codes find nearly as well as embeddings", causal),
    "dynamic": ("LaVIT", "about a third of the patches is enough", dynamic),
    "bridge": ("TokenBridge", "64 cells a number equal the continuous autoencoder", bridge),
    "xcodec": (
        "X-Codec",
        "semantic features before the quantizer and a semantic loss after it make codes that say the words",
        xcodec,
    ),
    "titok": ("TiTok", "32 tokens hold an image; two stages beat one", titok),
}
