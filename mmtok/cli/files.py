"""`mmtok encode` and `mmtok decode`: files and folders to codes, and back."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mmtok.cli.paths import INPUT_ERRORS, Item, make_plan, one_line, readable, settle, work_through

if TYPE_CHECKING:
    from torch import Tensor

    from mmtok.tokenizer import Tokenizer
    from mmtok.tokens import Tokens, TokenSpec

TOKEN_SUFFIX = ".safetensors"
SOUND_SUFFIXES = (".wav", ".flac", ".ogg")  # what `write_audio` writes


def add(commands: argparse._SubParsersAction) -> None:
    """Register both commands."""
    encode = commands.add_parser(
        "encode",
        help="images and sound files -> token files",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Encode images and sound files. One file: OUT is FILE.safetensors. Many files or a folder (with all below\n"
            "it): OUT is a folder; names and structure are kept. A token file holds the codes in the smallest integer\n"
            "that fits, their meaning, and what decode needs to give back the exact size."
        ),
        epilog=(
            "examples:\n"
            "  mmtok encode photo.jpg -o p.safetensors\n"
            "  mmtok encode speech.wav -o s.safetensors --num-codebooks 4     fewer levels: lower bitrate\n"
            "  mmtok encode photos/ sounds/ -o tokens/                        run it again to resume\n"
            "  mmtok encode photo.jpg -o p.safetensors --tokenizer path/to/my/checkpoint\n\n"
            "A bad file: one line, exit code 2. Bad files among many: told at the end, exit code 1, the others written."
        ),
    )
    encode.add_argument("inputs", nargs="+", metavar="INPUT", help="image or sound files, or folders of them")
    encode.add_argument("-o", "--out", required=True, help="FILE.safetensors, or a folder")
    encode.add_argument(
        "--tokenizer", help="name (see mmtok list) or folder; default: the first shipped one, by file type"
    )
    encode.add_argument("--num-codebooks", type=int, metavar="N", help="only the first N levels; default: all")
    encode.add_argument("--num-tokens", type=int, metavar="N", help="only the first N positions; default: all")
    encode.set_defaults(run=run_encode)
    decode = commands.add_parser(
        "decode",
        help="token files -> images and sound files",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Decode token files with the tokenizer that they name. Size, length, sample rate, channels and the 16\n"
            "bits of grey images are the original's. The suffix of OUT chooses the format: .png, .jpg, .wav, .flac;\n"
            "for a folder it is .png and .wav."
        ),
        epilog=(
            "examples:\n"
            "  mmtok decode p.safetensors -o p.png\n"
            "  mmtok decode tokens/ -o decoded/\n"
            "  mmtok decode p.safetensors -o p.png --tokenizer path/to/my/checkpoint"
        ),
    )
    decode.add_argument("inputs", nargs="+", metavar="FILE", help="token files, or folders of them")
    decode.add_argument("-o", "--out", required=True, help="an image or sound file, or a folder")
    decode.add_argument("--tokenizer", help="name or folder; default: the name that the tokens carry")
    decode.set_defaults(run=run_decode)
    for command in (encode, decode):
        command.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...; default: cpu")
        command.add_argument("--text", help="the text condition of tokenizers that need one (mmtok info NAME tells)")
        command.add_argument("--overwrite", action="store_true", help="write outputs again that are already there")


def run_encode(args: argparse.Namespace) -> int:
    """Encode every input; see `work_through` for the exit code."""
    from mmtok import auto
    from mmtok.data import audio, images

    suffixes: dict[str, str] = dict.fromkeys(images.IMAGE_SUFFIXES, "image")
    suffixes |= dict.fromkeys(audio.AUDIO_SUFFIXES, "audio")
    chosen = auto.load(args.tokenizer, device=checked_device(args.device)) if args.tokenizer else None
    if chosen is not None:
        suffixes = {s: m for s, m in suffixes.items() if m == chosen.spec.modality}
    plan = make_plan(args.inputs, args.out, suffixes, lambda _: TOKEN_SUFFIX, {TOKEN_SUFFIX})
    tokenizers: dict[str, Tokenizer] = {}
    for modality in sorted({item.modality for item in plan.items if item.modality}):
        tokenizers[modality] = chosen or auto.load(default_name(modality), device=checked_device(args.device))
        name = tokenizers[modality].spec.name
        print(f"{modality} tokenizer: {name}" + ("" if chosen else " (the first shipped one; --tokenizer chooses)"))

    def tokenizer_of(item: Item) -> Tokenizer:
        readable(item.path)
        if item.modality not in tokenizers:
            expected = ", ".join(sorted(suffixes))
            raise ValueError(f"{item.path}: expected a file that ends in one of {expected}, got {item.path.suffix!r}")
        return tokenizers[item.modality]

    def encode(item: Item) -> str:
        tokens = tokenizer_of(item).encode(
            item.path, text=args.text, num_codebooks=args.num_codebooks, num_tokens=args.num_tokens
        )
        settle(item.out, tokens.save, args.overwrite, same_token_files)
        return f"{describe(tokens)}, {item.out.stat().st_size} bytes in {item.out}"

    def check_old(item: Item) -> None:
        refuse_other_rate(item.out, tokenizer_of(item).spec, args.num_codebooks, args.num_tokens)

    return work_through(plan, encode, check_old, args.overwrite)


def refuse_other_rate(old: Path, spec: TokenSpec, num_codebooks: int | None, num_tokens: int | None) -> None:
    """Raise unless the token file ``old`` is of ``spec`` and the rate asked for: no run mixes two."""
    from mmtok.tokens import Tokens

    try:
        tokens = Tokens.load(old)
        tokens.check(spec)
        levels, longest = tokens.spec.num_codebooks, int(tokens.lengths.max())
        wanted = spec.num_codebooks if num_codebooks is None else num_codebooks
        if levels != wanted or (num_tokens is not None and longest > num_tokens):
            raise ValueError(f"it has {levels} levels x {longest} positions")
    except ValueError as e:
        raise ValueError(
            f"{old} is there, but not with what this run writes ({e}); pass --overwrite, or another -o"
        ) from e


def run_decode(args: argparse.Namespace) -> int:
    """Decode every input; see `work_through` for the exit code."""
    from mmtok import auto
    from mmtok.data.images import IMAGE_SUFFIXES
    from mmtok.tokens import Tokens

    device = checked_device(args.device)
    tokenizers: dict[str, Tokenizer] = {}
    if args.tokenizer:
        tokenizers[""] = auto.load(args.tokenizer, device=device)

    def default_suffix(path: Path) -> str:
        try:
            return ".png" if Tokens.load(path).spec.modality == "image" else ".wav"
        except INPUT_ERRORS:
            return ".png"  # a damaged file: `decode` tells why when its turn comes

    writable = {*IMAGE_SUFFIXES, *SOUND_SUFFIXES}
    plan = make_plan(args.inputs, args.out, {TOKEN_SUFFIX: ""}, default_suffix, writable)

    def decode(item: Item) -> str:
        tokens = Tokens.load(readable(item.path))
        suffixes = IMAGE_SUFFIXES if tokens.spec.modality == "image" else SOUND_SUFFIXES
        if item.out.suffix.lower() not in suffixes:
            expected = ", ".join(sorted(suffixes))
            raise ValueError(f"{item.path} holds {tokens.spec.modality} codes: expected -o with one of {expected}")
        key = "" if args.tokenizer else tokens.spec.name
        if key not in tokenizers:
            tokenizers[key] = load_named(tokens.spec.name, device)
        if len(tokens) != 1:
            raise ValueError(
                f"{item.path}: expected the codes of one file, got a batch of {len(tokens)}; save tokens[i]"
            )
        tokenizer = tokenizers[key]
        x = tokenizer.decode(tokens.to(device), text=args.text)[0].cpu()
        rate = getattr(tokenizer, "sample_rate", 0)
        settle(item.out, lambda path: write_media(path, x, tokens, rate), args.overwrite)
        return f"{describe(tokens)} -> {item.out}"

    def nothing_to_compare(item: Item) -> None:
        """A picture or sound does not tell what made it, so any output that is there stands."""

    return work_through(plan, decode, nothing_to_compare, args.overwrite)


def checked_device(device: str) -> str:
    """``device``, if torch can use it here."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {device}: torch cannot use it here ({one_line(e)}); try --device cpu") from e
    return device


def default_name(modality: str) -> str:
    """The first shipped tokenizer of a modality."""
    from mmtok import auto

    names = auto.available(f"{modality}-*")
    if not names:
        raise ValueError(f"no {modality} tokenizer is shipped here; mmtok doctor tells why, --tokenizer names another")
    return names[0]


def load_named(name: str, device: str) -> Tokenizer:
    """The tokenizer that a token file names."""
    from mmtok import auto

    try:
        return auto.load(name, device=device)
    except INPUT_ERRORS as e:
        raise ValueError(f"the tokens name {name!r}: {one_line(e)}; --tokenizer DIR gives it by its folder") from e


def same_tokens(a: Tokens, b: Tokens) -> bool:
    """Equal spec, codes, lengths and side entries, both on the CPU."""
    import torch

    return (
        a.spec == b.spec
        and torch.equal(a.codes, b.codes)
        and torch.equal(a.lengths, b.lengths)
        and a.side.keys() == b.side.keys()
        and all(torch.equal(a.side[key], b.side[key]) for key in a.side)
    )


def same_token_files(old: Path, new: Path) -> bool:
    """Whether two files hold the same tokens; their bytes may differ, since safetensors shuffles its header."""
    from mmtok.tokens import Tokens

    try:
        return same_tokens(Tokens.load(old), Tokens.load(new))
    except ValueError:
        return False  # what is there is no token file


def describe(tokens: Tokens) -> str:
    """Size, rate, tokens and bits of the first item, in words; what the tokens do not tell is left out."""
    T, bits, spec = int(tokens.lengths[0]), float(tokens.bits[0]), tokens.spec
    count = sum(-(-T // stride) for stride in spec.level_strides)
    side = {key: int(value[0]) for key, value in tokens.side.items() if value.ndim == 1}
    parts = []
    if {"width", "height"} <= side.keys():
        parts = [f"{side['width']} x {side['height']} px", f"{bits / (side['width'] * side['height']):.4f} bpp"]
    elif {"num_samples", "sample_rate"} <= side.keys():
        seconds, channels = side["num_samples"] / side["sample_rate"], side.get("channels", 1)
        # Tokens cut by --num-tokens tell of the beginning only, and their rate is that of the beginning. Bytes have no
        # rate of their own, and where chunks carry a loudness a position stands for all channels.
        streams = 1 if "scale" in tokens.side else channels
        rate = None if spec.codebook_sizes == (256,) else spec.frame_rate
        told = min(seconds, T / streams / rate) if rate else seconds
        cost = f"{bits / told / 1000:.2f} kbit/s" if told else "no sound"
        parts = [f"{seconds:.2f} s, {side['sample_rate']} Hz, {channels} channel{'s' * (channels > 1)}", cost]
    grid = f"{spec.num_codebooks} levels x {T} positions = {count} tokens"
    return ", ".join([spec.name, *parts[:1], grid, f"{bits:.0f} bits = {bits / 8:.0f} bytes", *parts[1:]])


def write_media(path: Path, x: Tensor, tokens: Tokens, sample_rate: int) -> None:
    """Write a decoded image (C, H, W) or sound (C, L) in the depth or rate that the tokens carry.

    ``sample_rate`` in Hz is the tokenizer's own, at which sound comes whose tokens carry none.
    """
    if tokens.spec.modality == "image":
        from mmtok.data.images import write_image

        depth = tokens.side.get("bit_depth")
        write_image(path, x, bit_depth=8 if depth is None else int(depth[0]))
    else:
        from mmtok.data.audio import write_audio

        rate = tokens.side.get("sample_rate")
        write_audio(path, x, sample_rate if rate is None else int(rate[0]))
