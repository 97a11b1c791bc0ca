"""Nothing in the repository names a package registry's address or a path of somebody's machine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from source_tree import ROOT, short, tracked_files

BINARY = {".safetensors", ".jpg", ".jpeg", ".png", ".webp", ".gif", ".flac", ".wav", ".ogg", ".npz", ".ico", ".gz"}
# In pieces, so that this file does not find itself.
HOSTS = [
    "files." + "pythonhosted.org",
    "pypi.org/" + "simple",
    "test.pypi." + "org",
    r"//pypi\.[\w.-]+",
    r"registry\.(?:npmjs|yarnpkg|npmmirror)" + r"\.\w+",
    r"(?:conda|repo)\.anaconda" + r"\.\w+",
    r"(?:deb|security|archive)\.(?:debian|ubuntu)" + r"\.\w+/",
    r"(?:--(?:extra-)?index-url|--registry|PIP_INDEX_URL|registry)[ =]+['\"]?" + "https?:",
]
PATHS = ["work", "home", "root", "Users", "mnt", "workspace"]
FORBIDDEN = re.compile("|".join([*HOSTS, rf"(?<![\w.}}/-])/(?:{'|'.join(PATHS)})/" + r"[\w.-]+"]))


def found_in(text: str) -> list[str]:
    return [f"line {text.count(chr(10), 0, m.start()) + 1}: {m[0]}" for m in FORBIDDEN.finditer(text)]


def text_files() -> list[Path]:
    return [p for p in tracked_files() if p.suffix.lower() not in BINARY]


def test_no_registry_addresses_or_machine_paths():
    files = text_files()
    assert ROOT / "README.md" in files and ROOT / "pyproject.toml" in files and Path(__file__).resolve() in files
    found = {short(p): hits for p in files if (hits := found_in(p.read_text("utf-8")))}
    assert not found, found


@pytest.mark.parametrize(
    "text",
    [
        f"pip install -i https://{'pypi'}.org/simple x",
        "https://" + "pypi.example.net/x",
        "https://registry." + "npmjs.org/x",
        "pip --index-url " + "https://example.org x",
        "open('/" + "work/main/x.py')",
        "see /" + "home/ada/x",
    ],
)
def test_the_check_itself_sees_addresses_and_paths(text: str):
    assert found_in(text)


@pytest.mark.parametrize(
    "text", ["frame/work/x", "https://arxiv.org/abs/2210.13438", "{root}/work/x", "a/home/b", "pypi"]
)
def test_the_check_itself_lets_other_text_pass(text: str):
    assert not found_in(text)
