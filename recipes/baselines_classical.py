"""What JPEG, WebP, AVIF and Opus give at a stated byte count: the rows to put beside a tokenizer's own.

Command:  python recipes/baselines_classical.py --images data/test/images --audio data/test/speech \\
              --bytes 512 --bitrate 6000 --out rows.json          (--smoke: one shipped picture and sentence, seconds)
Data:     any folders. Images: every file Pillow reads, central square resized to --size (128) pixels. Audio: every file
          soundfile reads (wav, flac, ogg), channels averaged, resampled to 16 kHz, at most --seconds (20) of it.
Hardware: one CPU core; about 1 s an image (AVIF takes most of it) and 0.1 s a second of speech.
Prints:   a table of images (mean bytes of whole files, PSNR, SSIM) and one of speech (bit/s with and without the Ogg
          container, PESQ-wb, STOI, delay-aligned SI-SDR), and how many items were scored; --out keeps all as JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mmtok.bench import classical
from mmtok.tokens import write_atomic

ASSETS = Path(classical.__file__).parents[1] / "assets"
SAMPLE_RATE = 16000  # Hz, the only one PESQ-wb knows


def files_under(folder: Path, limit: int) -> list[Path]:
    """The first files below a folder in path order (all when `limit` is 0)."""
    if not folder.is_dir():
        raise SystemExit(f"{folder} is not a folder; give an existing one")
    found = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    return found[:limit] if limit else found


def load_images(paths: Sequence[Path], size: int) -> list[Tensor]:
    """(3,size,size) floats in [0,1], central squares; files that are no images are counted and named."""
    images, refused = [], []
    for path in paths:
        try:
            with Image.open(path) as picture:
                upright = ImageOps.exif_transpose(picture).convert("RGB")
        except (UnidentifiedImageError, OSError):
            refused.append(path.name)
            continue
        square = ImageOps.fit(upright, (size, size), Image.Resampling.LANCZOS)
        images.append(torch.from_numpy(np.asarray(square, dtype=np.float32) / 255).permute(2, 0, 1))
    _say_refused(refused, "image")
    return images


def load_clips(paths: Sequence[Path], seconds: float) -> list[Tensor]:
    """(1,L) floats in [-1,1] at 16 kHz; files that are no sound are counted and named."""
    import soundfile
    from torchaudio.functional import resample

    clips, refused = [], []
    for path in paths:
        try:
            samples, rate = soundfile.read(path, dtype="float32", always_2d=True)  # (L,C)
        except soundfile.LibsndfileError:
            refused.append(path.name)
            continue
        clip = torch.from_numpy(samples.mean(axis=1))[None, : int(seconds * rate)]
        clip = resample(clip, rate, SAMPLE_RATE) if rate != SAMPLE_RATE else clip
        if clip.shape[1] == 0:
            refused.append(path.name)
            continue
        clips.append(clip / clip.abs().max().clamp(min=1.0))  # a resampler may overshoot 1
    _say_refused(refused, "sound")
    return clips


def _say_refused(names: Sequence[str], kind: str) -> None:
    if names:
        shown = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
        print(f"left out {len(names)} files that are no readable {kind}: {shown}")


def smoke_images(size: int) -> list[Tensor]:
    """The shipped photo, or a picture made here when the checkout has no assets."""
    if found := sorted(ASSETS.glob("*.jpg")):
        return load_images(found[:1], size)
    y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")
    return [torch.stack([x, y, ((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.1).float()])]


def smoke_clips() -> list[Tensor]:
    """Two seconds of the shipped sentence, or a gliding tone made here."""
    if found := sorted(ASSETS.glob("*.flac")):
        return load_clips(found[:1], seconds=2.0)
    t = torch.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
    return [(0.3 * torch.sin(2 * torch.pi * (200 + 150 * t) * t) * torch.sin(2 * torch.pi * 2 * t).abs())[None]]


def table(rows: Sequence[dict], columns: Sequence[str]) -> str:
    """Rows as a Markdown table; None is a dash."""

    def cell(value: object) -> str:
        return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    lines = [columns, ["---"] * len(columns), *([cell(row[c]) for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=Path, help="folder of images")
    parser.add_argument("--audio", type=Path, help="folder of speech")
    parser.add_argument("--bytes", type=int, default=512, help="largest file of one image, header included")
    parser.add_argument("--size", type=int, default=128, help="pixels on a side")
    parser.add_argument("--bitrate", type=int, default=6000, help="bits a second asked of Opus")
    parser.add_argument("--seconds", type=float, default=20.0, help="longest part of a clip that is used")
    parser.add_argument("--limit", type=int, default=0, help="files of each folder; 0 = all")
    parser.add_argument("--out", type=Path, help="JSON file for all rows")
    parser.add_argument("--smoke", action="store_true", help="one shipped picture and sentence instead of folders")
    args = parser.parse_args(argv)
    if not (args.smoke or args.images or args.audio):
        parser.error("nothing to encode: give --images DIR, --audio DIR or --smoke")

    images = load_images(files_under(args.images, args.limit), args.size) if args.images else []
    clips = load_clips(files_under(args.audio, args.limit), args.seconds) if args.audio else []
    if args.smoke:
        images, clips = images or smoke_images(args.size), clips or smoke_clips()
    for folder, found in ((args.images, images), (args.audio, clips)):
        if folder and not found:
            raise SystemExit(f"{folder} holds no file that can be read")

    result: dict[str, list[dict]] = {"images": [], "speech": []}
    if images:
        result["images"] = classical.classical_image_rows(images, args.bytes)
        print(f"\n{len(images)} images of {args.size} x {args.size} px, at most {args.bytes} bytes (whole file)")
        print(table(result["images"], ("codec", "reached", "bytes", "bpp", "psnr_db", "ssim")))
    if clips:
        result["speech"] = classical.opus_rows(clips, SAMPLE_RATE, args.bitrate)
        print(f"\n{len(clips)} clips, {args.bitrate} bit/s asked of Opus")
        columns = ("codec", "frame_ms", "payload_bps", "file_bps", "pesq_wb", "pesq_wb_clips", "stoi", "si_sdr_aligned")
        print(table(result["speech"], columns))
    if args.out:
        write_atomic(args.out, json.dumps(result, indent=2, allow_nan=False).encode())
        print(f"\nwrote {args.out}")


if __name__ == "__main__":
    main()
