"""The files of the repository, parsed once; shared by the tests of this folder."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "mmtok"


def python_files(*folders: str) -> list[Path]:
    """All Python files below folders of the repository, sorted."""
    found = sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))
    assert found, f"no Python files below {folders}"
    return found


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function of a file with its qualified name, ``Class.method`` or ``outer.inner``."""
    yield from _functions(tree(path), "")


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + child.name, child
        inside = f"{prefix}{child.name}." if hasattr(child, "name") and isinstance(child, _NAMED) else prefix
        yield from _functions(child, inside)


_NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def tracked_files() -> list[Path]:
    """Files that git has, or would take with ``git add``: what is in everybody's clone."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in sorted(set(listed.split("\0"))) if name]
    return [path for path in files if path.is_file()]


def listed_packages(settings: str) -> set[str] | None:
    """``packages`` of [tool.setuptools] in the text of a pyproject.toml; None where setuptools searches for them."""
    section = settings.split("[tool.setuptools]", 1)
    found = re.search(r"^packages\s*=\s*\[(.*?)\]", section[1].split("\n[", 1)[0], re.M | re.S) if section[1:] else None
    return set(re.findall(r'"([^"]+)"', found[1])) if found else None
