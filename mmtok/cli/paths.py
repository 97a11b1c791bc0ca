"""Which file becomes which: inputs gathered, outputs named, a loop that outlives bad files, writes that are whole."""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# What a bad input raises. RuntimeError stands for torch's own, out of memory above all: one of 10,000 files must not
# end the run. `mmtok --traceback` shows where it came from.
INPUT_ERRORS = (ValueError, OSError, ImportError, RuntimeError)


@dataclass(frozen=True)
class Item:
    """One input file, its modality ("" for token files and unknown suffixes) and its output."""

    path: Path
    modality: str
    out: Path


@dataclass(frozen=True)
class Plan:
    """What to do: ``single`` when one file was named (then a failure is exit code 2)."""

    items: Sequence[Item]
    single: bool
    passed_over: Counter[str]


def make_plan(
    inputs: Sequence[str],
    out: str,
    suffixes: Mapping[str, str],
    out_suffix: Callable[[Path], str],
    file_suffixes: set[str],
) -> Plan:
    """Pair every input file with its output.

    Args:
        inputs: files and folders as given; folders are walked, names with a leading dot left out.
        out: as given; a file if it ends in one of ``file_suffixes``, else a folder, which is made.
        suffixes: lower-case suffix -> modality of the files to take from folders.
        out_suffix: the suffix of the output of an input, for a folder.
        file_suffixes: see ``out``.

    Raises:
        ValueError: nothing to do, two inputs with one output, or a file as the output of many.
        OSError: the output cannot be written.
    """
    single = len(inputs) == 1 and not Path(inputs[0]).is_dir()
    found: list[tuple[Path, Path]] = []  # input, and its place below OUT
    passed_over: Counter[str] = Counter()
    for name in inputs:
        root = Path(name)
        if not root.is_dir():
            found.append((root, Path(root.name)))
            continue
        below = Path() if len(inputs) == 1 else Path(root.resolve().name)
        for path in walk(root):
            if path.suffix.lower() in suffixes:
                found.append((path, below / path.relative_to(root)))
            else:
                passed_over[path.suffix.lower() or "no suffix"] += 1
    if not found:
        raise ValueError(f"nothing to do: no file in {', '.join(inputs)} ends in one of {', '.join(sorted(suffixes))}")
    target = Path(out)
    is_file = target.suffix.lower() in file_suffixes
    if not is_file and single and target.suffix and not target.is_dir():
        expected = ", ".join(sorted(file_suffixes))
        raise ValueError(
            f"-o {out}: expected a name that ends in one of {expected}, or a folder, got {target.suffix!r}"
        )
    if is_file and not single:
        raise ValueError(f"-o {out}: expected a folder for {len(found)} inputs, got the name of a file")
    if is_file:
        check_output(target)
        outs = [target]
    else:
        make_folder(target)
        stems = Counter(place.with_suffix("") for _, place in found)
        outs = []
        for path, place in found:
            # a.png beside a.jpg: both keep their suffix, so that neither takes the other's name.
            stem = place.with_suffix("") if stems[place.with_suffix("")] == 1 else place
            outs.append(target / stem.with_name(stem.name + out_suffix(path)))
    twice = [o for o, n in Counter(outs).items() if n > 1]
    if twice:
        sources = [str(path) for (path, _), o in zip(found, outs, strict=True) if o == twice[0]]
        raise ValueError(f"{' and '.join(sources)} would both be written to {twice[0]}; give them folders of their own")
    items = [Item(p, suffixes.get(p.suffix.lower(), ""), o) for (p, _), o in zip(found, outs, strict=True)]
    return Plan(items, single, passed_over)


def walk(folder: Path) -> list[Path]:
    """All files below a folder in a fixed order, without hidden ones and without following links to folders."""
    paths = []
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        paths += [Path(here, name) for name in sorted(names) if not name.startswith(".")]
    return paths


def work_through(plan: Plan, work: Callable[[Item], str], stands: Callable[[Item], None], overwrite: bool) -> int:
    """Do ``work`` on every item; 0 if all went well, 1 if some of many failed; a single one raises.

    Among many, an output that is there is left alone once ``stands`` finds nothing against it. A single output is
    made again and compared by `settle`.
    """
    from tqdm import tqdm

    if plan.single:
        print(work(plan.items[0]))
        return 0
    failed: list[tuple[Path, str]] = []
    skipped = 0
    with tqdm(plan.items, unit="file", disable=None) as bar:
        for item in bar:
            try:
                if item.out.exists() and not overwrite:
                    stands(item)
                    skipped += 1
                    continue
                item.out.parent.mkdir(parents=True, exist_ok=True)
                tqdm.write(f"{item.path}: {work(item)}")
            except BrokenPipeError:
                raise  # nobody reads on: end, rather than fail at every file
            except INPUT_ERRORS as e:
                failed.append((item.path, one_line(e)))
    done = len(plan.items) - skipped - len(failed)
    there = f"{skipped} skipped because they are there" + (" (--overwrite writes them again)" if skipped else "")
    print(f"{done} written, {there}, {len(failed)} failed")
    if plan.passed_over:
        kinds = ", ".join(f"{n} {suffix}" for suffix, n in sorted(plan.passed_over.items()))
        print(f"{plan.passed_over.total()} other files passed over: {kinds}")
    for path, reason in failed:
        print(f"failed: {reason if str(path) in reason else f'{path}: {reason}'}", file=sys.stderr)
    return 1 if failed else 0


def same_bytes(a: Path, b: Path) -> bool:
    """Whether two files are equal."""
    return a.read_bytes() == b.read_bytes()


def settle(
    out: Path,
    write: Callable[[Path], None],
    overwrite: bool,
    same: Callable[[Path, Path], bool] = same_bytes,
) -> None:
    """Write ``out`` through a file beside it, renamed when whole; an output that is there must be the ``same`` or stay.

    Raises:
        ValueError: ``out`` is there, differs from what would be written, and ``overwrite`` is false.
    """
    check_output(out)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        aside = Path(folder, out.name)
        write(aside)
        if out.exists() and not overwrite and not same(out, aside):
            raise ValueError(f"{out} is there and holds something else; pass --overwrite to replace it")
        os.replace(aside, out)


def one_line(error: BaseException) -> str:
    """An exception's message on one line, without errno numbers."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def readable(path: Path) -> Path:
    """``path`` itself, if it is a file with something in it."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected a file")
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes)")
    return path


def check_output(out: Path) -> None:
    """Raise unless a file can be written at ``out``; early, before the work is done for nothing."""
    if out.is_dir():
        raise IsADirectoryError(f"cannot write {out}: it is a folder; give the name of a file")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"cannot write {out}: the folder {out.parent} does not exist; create it first")
    if not os.access(out.parent, os.W_OK):
        raise PermissionError(f"cannot write {out}: the folder {out.parent} is not writable")


def make_folder(folder: Path) -> None:
    """Make the output folder; its parent must be there, so that a typing error makes no tree."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"cannot write into {folder}: it is a file, expected a folder")
    if not folder.is_dir():
        check_output(folder)
        folder.mkdir()
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"cannot write into {folder}: the folder is not writable")
