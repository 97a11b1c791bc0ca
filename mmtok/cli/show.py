"""`mmtok list` and `mmtok info`: which tokenizers there are, and what a tokenizer or a token file holds."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmtok.cli.files import TOKEN_SUFFIX, describe
from mmtok.cli.paths import readable


def add(commands: argparse._SubParsersAction) -> None:
    """Register both commands."""
    info = commands.add_parser(
        "info",
        help="the card of a tokenizer, or what a token file holds",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Show the card of a tokenizer (name or folder), or the spec, size and codes of a token file.",
        epilog="examples:\n  mmtok info NAME                 a name from mmtok list\n  mmtok info p.safetensors --json",
    )
    info.add_argument("what", metavar="NAME|FILE", help="a tokenizer's name or folder, or a token file")
    listing = commands.add_parser(
        "list",
        help="the tokenizers that are there",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Show the names that --tokenizer and mmtok.load() take, with their rates.",
        epilog="examples:\n  mmtok list\n  mmtok list 'audio*'\n  mmtok list --json",
    )
    listing.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help="shell pattern, e.g. 'audio*'")
    for command, run in ((info, run_info), (listing, run_list)):
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(run=run)


def run_info(args: argparse.Namespace) -> int:
    """Print one card or one token file."""
    is_tokens = args.what.endswith(TOKEN_SUFFIX)
    facts = token_facts(Path(args.what)) if is_tokens else tokenizer_facts(args.what)
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    readme = facts.pop("readme", "")
    print("\n".join(lines(facts)))
    if readme:
        print(f"\n{readme.rstrip()}")
    return 0


def run_list(args: argparse.Namespace) -> int:
    """Print a line a tokenizer; nothing that fits is an error of the pattern."""
    from mmtok import auto

    names = auto.available(args.pattern)
    if not names:
        known = ", ".join(auto.available("*")) or "none is shipped here; see mmtok doctor"
        raise ValueError(f"no tokenizer fits {args.pattern!r}; there are: {known}")
    cards: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            cards[name] = auto.card(name)
        except ValueError as e:
            cards[name] = {"name": name, "damaged": str(e)}
    if args.json:
        print(json.dumps(cards, indent=2))
        return 0
    rows = [("name", "modality", "levels x codes", "tokens", "rate", "checkpoint")]
    rows += [(name, *cells(card)) for name, card in cards.items()]
    print("\n".join(table(rows)))
    return 0


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
    if facts["modality"] != "audio":
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
        text = ", ".join(str(v) for v in value) if plain else str(value)
        out.append(f"{indent}{key:<{width}}  {text}")
    return out


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as aligned lines."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{w}}" for cell, w in zip(cells, widths, strict=True)).rstrip() for cells in rows]
