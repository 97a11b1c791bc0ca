"""`mmtok demo`: a photo and a spoken sentence become ids of a language model and come back, shown in one HTML page."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmtok.cli.files import checked_device, default_name, describe, same_tokens, write_media
from mmtok.cli.paths import make_folder, one_line, readable

if TYPE_CHECKING:
    from torch import Tensor

    from mmtok.bench.report import IdSegment
    from mmtok.tokenizer import Tokenizer
    from mmtok.tokens import Tokens
    from mmtok.vocab import Vocab

ASSETS = Path(__file__).parent.parent / "assets"
PHOTO, SPEECH = ASSETS / "chelsea.jpg", ASSETS / "speech.flac"
NOTES = {
    PHOTO: "Chelsea the cat, photographed by Stéfan van der Walt (CC0); not among the training data.",
    SPEECH: (
        "LibriVox, Sense and Sensibility (public domain); not among the training data. "
        "“unless to be rather cold hearted and rather selfish is to be ill disposed”"
    ),
}
SHOWN = {"image": ("psnr", "ssim"), "audio": ("stoi", "pesq_wb")}  # names in METRICS


class ByteText:
    """UTF-8 bytes as 256 text ids: a text tokenizer that needs no package and no file."""

    def __len__(self) -> int:
        return 256

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, token_ids: list[int]) -> str:
        return bytes(token_ids).decode("utf-8")


@dataclass(frozen=True)
class Encoded:
    """One file and its codes."""

    path: Path
    original: Tensor  # (C, H, W) or (C, L)
    sample_rate: int | None
    tokens: Tokens
    encode_s: float


@dataclass(frozen=True)
class Trip(Encoded):
    """The way there and back."""

    decoded: Tensor
    decode_s: float


def add(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "demo",
        help="a photo and a spoken sentence -> LLM ids -> back, as an HTML report",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Encode a photo and a spoken sentence with the shipped tokenizers, pack both with text into the ids of a\n"
            "language model, unpack, check that nothing has changed, decode, measure, and write an HTML report that\n"
            "opens without a network: pictures, players, spectrograms, token maps, codebook usage, bits, times."
        ),
        epilog=(
            "examples:\n"
            "  mmtok demo                                        the photo and the sentence that ship with mmtok\n"
            "  mmtok demo --image cat.png --audio hello.wav      your own\n"
            "  mmtok demo --out /tmp/demo --open                 show the report in the browser"
        ),
    )
    parser.add_argument("--out", default="mmtok-demo", help="folder to write to; default: mmtok-demo")
    parser.add_argument("--image", default=str(PHOTO), metavar="FILE", help="another picture")
    parser.add_argument("--audio", default=str(SPEECH), metavar="FILE", help="another sound")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...; default: cpu")
    parser.add_argument("--open", action="store_true", help="open the report in the browser")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do the whole round and write the report; 0, or an error of bad input."""
    image, audio, out = readable(Path(args.image)), readable(Path(args.audio)), Path(args.out)
    make_folder(out)
    with step("load torch"):
        from mmtok import auto
        from mmtok.tokens import Tokens, write_atomic
        from mmtok.vocab import Vocab

        device = checked_device(args.device)
    names = {modality: default_name(modality) for modality in ("image", "audio")}
    with step(f"load {names['image']} and {names['audio']}"):
        tokenizers = {modality: auto.load(name, device=device) for modality, name in names.items()}
    sent = [there(tokenizers["image"], image), there(tokenizers["audio"], audio)]
    vocab = Vocab(text=ByteText(), image=tokenizers["image"].spec, audio=tokenizers["audio"].spec)
    sequence = ["a photo of ", sent[0].tokens, " that sounds like ", sent[1].tokens]
    with step("pack text, photo and sound into LLM ids"):
        ids = vocab.pack(sequence)
    with step(f"unpack the {len(ids)} ids and compare"):
        parts = vocab.unpack(ids)
        refuse_difference(sequence, parts)
    received = [part for part in parts if isinstance(part, Tokens)]
    trips = [back(tokenizers[t.spec.modality], leg, t) for leg, t in zip(sent, received, strict=True)]
    with step("measure"):
        scores = [measure(trip) for trip in trips]
    with step(f"write the files into {out}"):
        for trip in trips:
            modality = trip.tokens.spec.modality
            trip.tokens.save(out / f"{modality}.safetensors")
            name = "image.png" if modality == "image" else "audio.wav"
            write_media(out / name, trip.decoded, trip.tokens, trip.sample_rate or 0)
        write_atomic(out / "ids.json", (json.dumps(ids) + "\n").encode())
        report = out / "report.html"
        segments = [s for part in sequence for s in segments_of(vocab, part)]
        write_page(report, trips, scores, segments, len(ids), vocab.size)
    print()
    for trip, rows in zip(trips, scores, strict=True):
        print(f"{trip.path.name}: {describe(trip.tokens)}; {', '.join(f'{k} {v}' for k, v in rows)}")
    print(f"{len(ids)} ids of a vocabulary of {vocab.size}, unpacked without a difference")
    print(f"report: {report.resolve()}")
    if args.open:
        import webbrowser

        webbrowser.open(report.resolve().as_uri())
    return 0


@contextmanager
def step(what: str) -> Iterator[None]:
    """Say what goes on, and how long it took."""
    print(f"{what} ...", end=" ", flush=True)
    start = time.perf_counter()
    try:
        yield
    except BaseException:
        print("failed", flush=True)
        raise
    print(f"{time.perf_counter() - start:.2f} s", flush=True)


def there(tokenizer: Tokenizer, path: Path) -> Encoded:
    """Read and encode one file."""
    from mmtok.data.audio import read_audio
    from mmtok.data.images import read_image

    modality = tokenizer.spec.modality
    original, rate = (read_image(path), None) if modality == "image" else read_audio(path)
    with step(f"encode {path.name}"):
        start = time.perf_counter()
        tokens = tokenizer.encode(path)
        seconds = time.perf_counter() - start
    return Encoded(path, original, rate, tokens.to("cpu"), seconds)


def back(tokenizer: Tokenizer, leg: Encoded, tokens: Tokens) -> Trip:
    """Decode what came out of the ids."""
    with step(f"decode {leg.path.name}"):
        start = time.perf_counter()
        decoded = tokenizer.decode(tokens.to(tokenizer.device))[0].cpu()
        seconds = time.perf_counter() - start
    return Trip(**vars(leg), decoded=decoded, decode_s=seconds)


def refuse_difference(sent: list, got: list) -> None:
    """Raise unless the unpacked segments are the packed ones, codes, lengths, sizes and text."""
    if len(sent) != len(got):
        raise RuntimeError(f"packed {len(sent)} segments, unpacked {len(got)}: please report this")
    for a, b in zip(sent, got, strict=True):
        same = type(a) is type(b) and (a == b if isinstance(a, str) else same_tokens(a, b))
        if not same:
            where = a if isinstance(a, str) else a.spec.name
            raise RuntimeError(f"the unpacked segment {where!r} differs from the packed one: please report this")


def measure(leg: Trip) -> list[tuple[str, str]]:
    """Name and value in words of each metric of the modality; "not run" and why where one cannot run."""
    from mmtok.metrics import METRICS

    modality = leg.tokens.spec.modality
    rows = []
    for name in SHOWN[modality]:
        metric = METRICS[name]
        args = (leg.original[None], leg.decoded[None]) + (() if leg.sample_rate is None else (leg.sample_rate,))
        try:
            unit = "" if metric.unit == "1" else f" {metric.unit}"
            rows.append((name, f"{float(metric.function(*args)[0]):.3f}{unit}"))
        except (ImportError, ValueError) as e:
            rows.append((name, f"not run ({one_line(e)})"))
    return rows


def segments_of(vocab: Vocab, part: str | Tokens) -> list[IdSegment]:
    """The ids of one part of the sequence: text, or markers and header around codes."""
    from mmtok.bench.report import IdSegment

    ids = vocab.pack([part])
    if isinstance(part, str):
        return [IdSegment("text", repr(part), ids)]
    head = 1
    while ids[head] in vocab.ranges["byte"]:
        head += 1
    kind = part.spec.modality
    return [
        IdSegment("marker", f"<{kind}> and header", ids[:head]),
        IdSegment(kind, f"codes of the {kind}", ids[head:-1]),
        IdSegment("marker", f"</{kind}>", ids[-1:]),
    ]


def write_page(
    path: Path,
    trips: list[Trip],
    scores: list[list[tuple[str, str]]],
    segments: list[IdSegment],
    num_ids: int,
    vocab_size: int,
) -> None:
    """Lay out the report."""
    from mmtok.bench import report

    note = f"{num_ids} ids of a vocabulary of {vocab_size}; unpacking them gave back text, photo and sound exactly."
    sections: list[report.Section] = [report.IdsSection("What a language model reads", segments, note)]
    for leg, measured in zip(trips, scores, strict=True):
        tokens, title = leg.tokens, "Photo" if leg.sample_rate is None else "Sound"
        bits = float(tokens.bits[0])
        original_bytes = leg.path.stat().st_size
        rows = [
            ("file", f"{leg.path.name}, {original_bytes} bytes"),
            ("tokenizer", f"{tokens.spec.name}, fingerprint {tokens.spec.fingerprint}"),
            ("tokens", describe(tokens)),
            ("bytes", f"{bits / 8:.0f}, {original_bytes * 8 / bits:.0f} times fewer than the file"),
            ("encode", f"{leg.encode_s:.3f} s"),
            ("decode", f"{leg.decode_s:.3f} s"),
            *measured,
        ]
        sections.append(report.TableSection(f"{title}: numbers", rows, note=NOTES.get(leg.path, "")))
        original, decoded = leg.original.numpy(), leg.decoded.numpy()
        if leg.sample_rate is None:
            sections.append(report.ImageSection(f"{title}: original and reconstruction", original, decoded))
        else:
            sections.append(
                report.AudioSection(f"{title}: original and reconstruction", original, decoded, leg.sample_rate)
            )
        sizes = tokens.spec.codebook_sizes
        codes = tokens.codes[0, :, : int(tokens.lengths[0])].numpy()
        sections.append(report.CodesSection(f"{title}: codes and codebook usage", codes, sizes))
    report.write_report(path, "mmtok: a photo and a sentence as tokens", sections)
