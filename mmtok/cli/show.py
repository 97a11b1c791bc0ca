"""`mmtok list` and `mmtok info`: which tokenizers there are, and what a tokenizer or a token file holds."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmtok.catalogue import LEGEND
from mmtok.cli.files import TOKEN_SUFFIX, describe
from mmtok.cli.paths import readable

SHIPPED_HEAD = ("name", "modality", "levels x codes", "tokens", "rate", "checkpoint")
FAMILY_HEAD = ("family", "modality", "package", "after the colon")
LICENCE_HEAD = ("family", "licence of the code", "of the weights")
TAXONOMY_HEAD = (
    *("architecture", "input", "quantization", "bitrate", "objective", "auxiliary", "joint", "domain"),
    *("streamable/order", "Hz/tokens"),
)
PUBLISHED_NOTE = (
    "The checkpoint does not say how it was trained: objective, auxiliary and domain are those of the published system."
)


def add(commands: argparse._SubParsersAction) -> None:
    """Register both commands."""
    info = commands.add_parser(
        "info",
        help="the card of a tokenizer, or what a token file holds",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Show the card of a tokenizer (name, folder, family or family:source) with its licences, or the "
        "spec, size and codes of a token file.",
        epilog="examples:\n"
        "  mmtok info NAME                 a name from mmtok list\n"
        "  mmtok info encodec              how to install and name a family of other people's tokenizers\n"
        "  mmtok info encodec:FOLDER       one of them: licences, package, taxonomy, delay\n"
        "  mmtok info p.safetensors --json",
    )
    info.add_argument("what", metavar="NAME|FILE", help="a tokenizer's name, folder or family:source, or a token file")
    listing = commands.add_parser(
        "list",
        help="the tokenizers that are there",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Show the names that --tokenizer and mmtok.load() take, with their rates; the families of other "
        "people's tokenizers, with their licences; and of both the columns of the survey of arXiv 2506.10274.",
        epilog="examples:\n  mmtok list\n  mmtok list 'audio*'\n  mmtok list --json\n  mmtok list --legend",
    )
    listing.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help="shell pattern, e.g. 'audio*'")
    listing.add_argument("--legend", action="store_true", help="say what the words of the taxonomy mean, and stop")
    for command, run in ((info, run_info), (listing, run_list)):
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(run=run)


def run_info(args: argparse.Namespace) -> int:
    """Print one card or one token file."""
    from mmtok import auto

    family, colon, _ = args.what.partition(":")
    is_tokens = args.what.endswith(TOKEN_SUFFIX) and not (colon and family in auto.families("*"))
    facts = token_facts(Path(args.what)) if is_tokens else tokenizer_facts(args.what)
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    readme = facts.pop("readme", "")
    print("\n".join(lines(facts)))
    if facts.get("taxonomy") and facts.get("about") == {}:
        print(f"\n{PUBLISHED_NOTE}")
    if readme:
        print(f"\n{readme.rstrip()}")
    return 0


def run_list(args: argparse.Namespace) -> int:
    """Print a line a tokenizer; nothing that fits is an error of the pattern."""
    from mmtok import auto

    if args.legend:
        print(LEGEND, end="")
        return 0
    names, families = auto.available(args.pattern), auto.families(args.pattern)
    if not names and not families:
        known = ", ".join([*auto.available("*"), *auto.families("*")])
        known = known or "none is shipped here; see mmtok doctor"
        raise ValueError(f"no tokenizer fits {args.pattern!r}; there are: {known}")
    shipped: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            shipped[name] = auto.card(name)
        except ValueError as e:
            shipped[name] = {"name": name, "damaged": str(e)}
    others = {name: auto.family_card(entry) for name, entry in families.items()}
    if args.json:
        print(json.dumps(shipped | others, indent=2))
        return 0
    blocks = []
    if shipped:
        blocks += [table([SHIPPED_HEAD, *((name, *cells(card)) for name, card in shipped.items())])]
        blocks += taxonomy_block("taxonomy (arXiv 2506.10274; mmtok list --legend says what the words mean)", shipped)
    if others:
        heading = "other people's tokenizers: mmtok.load('<family>:<source>')"
        blocks += [[heading, *table([FAMILY_HEAD, *(family_cells(card) for card in others.values())])]]
        licences = [(name, *card["licences"].values()) for name, card in others.items()]
        blocks += [["their licences, as far as known", *table([LICENCE_HEAD, *licences])]]
        blocks += taxonomy_block("taxonomy of their published models (arXiv 2506.10274; mmtok list --legend)", others)
    print("\n\n".join("\n".join(block) for block in blocks))
    return 0


def taxonomy_block(heading: str, cards: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """A heading and a row a card; no block where no card has a taxonomy."""
    rows = [(name, *taxonomy_cells(card["taxonomy"])) for name, card in cards.items() if card.get("taxonomy")]
    return [[heading, *table([("name", *TAXONOMY_HEAD), *rows])]] if rows else []


def taxonomy_cells(columns: Mapping[str, str]) -> tuple[str, ...]:
    """The columns of a taxonomy in the order of `TAXONOMY_HEAD`."""
    last = columns["streamable"] if "streamable" in columns else columns["order"]
    return (*(columns[key] for key in TAXONOMY_HEAD[:8]), last, columns["rate"])


def family_cells(card: Mapping[str, Any]) -> tuple[str, ...]:
    """A family's card as the cells of `mmtok list`; what may be long stands last."""
    package = f"{card['package']} {card['installed'] or '(not installed)'}"
    return (card["name"], card["modality"], package, card["source"])


def cells(card: Mapping[str, Any]) -> tuple[str, ...]:
    """A card as the cells of `mmtok list`, behind the name."""
    if "damaged" in card:
        return ("damaged", "", "", "", card["damaged"])
    sizes = card["codebook_sizes"]
    codes = f"{len(sizes)} x {sizes[0]}" if len(set(sizes)) == 1 else " + ".join(map(str, sizes))
    if card["modality"] == "image":
        rate = (f"{card['num_tokens']} positions", f"{card['bytes_per_image']:.0f} bytes an image")
    else:
        rate = (f"{card['frame_rate']:g} Hz", f"{card['bitrate_bps'] / 1000:.2f} kbit/s a channel")
    size = card["checkpoint_bytes"]
    return (card["modality"], codes, *rate, "no weights" if size is None else f"{size / 1e6:.1f} MB")


def tokenizer_facts(name: str) -> dict[str, Any]:
    """The card of a tokenizer; for audio also what a code reads of the sound and how long a stream waits for it."""
    from mmtok import auto

    facts = auto.card(name)
    if facts["modality"] != "audio" or "type" not in facts or "timing" in facts:  # a family by itself has no type
        return facts
    try:
        tokenizer: Any = auto.load(name)
        timing = tokenizer.timing()
    except (ValueError, ImportError, OSError) as e:  # a card is worth showing without its weights or its teacher
        timing = {"unknown": str(e)}
    readme = facts.pop("readme")
    return facts | {"timing": timing, "readme": readme}


def token_facts(path: Path) -> dict[str, Any]:
    """What a token file holds, as plain values."""
    from mmtok.tokens import Tokens

    tokens = Tokens.load(readable(path))
    return {
        "file": str(path),
        "file_bytes": path.stat().st_size,
        "items": len(tokens),
        "summary": [describe(tokens[i]) for i in range(len(tokens))],
        "bits": [float(b) for b in tokens.bits],
        "lengths": tokens.lengths.tolist(),
        "spec": tokens.spec.to_dict(),
        "side": {key: value.tolist() for key, value in tokens.side.items()},
        "first_codes": [level[:12] for level in tokens.codes[0].tolist()] if len(tokens) else [],
    }


def lines(facts: Mapping[str, Any], indent: str = "") -> list[str]:
    """Nested facts as ``key  value`` lines."""
    width = max((len(key) for key in facts), default=0)
    out = []
    for key, value in facts.items():
        if isinstance(value, Mapping):
            out += [f"{indent}{key}", *lines(value, indent + "  ")]
            continue
        plain = isinstance(value, Sequence) and not isinstance(value, str)
        text = ", ".join(str(v) for v in value) if plain else "-" if value is None else str(value)
        out.append(f"{indent}{key:<{width}}  {text}")
    return out


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as aligned lines."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{w}}" for cell, w in zip(cells, widths, strict=True)).rstrip() for cells in rows]
