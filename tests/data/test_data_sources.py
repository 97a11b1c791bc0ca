"""Where training files come from: a manifest or any folder, with a split that never changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmtok.data.sources import find_sources, held_out


def test_a_plain_folder(tmp_path: Path):
    for name in ("b.PNG", "a.jpg", "deep/c.webp", "notes.txt", "s.wav", "deep/t.flac"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.png").mkdir()
    assert [s.path.name for s in find_sources(tmp_path, "image")] == ["a.jpg", "b.PNG", "c.webp"]
    assert [s.path.name for s in find_sources(str(tmp_path), "audio")] == ["t.flac", "s.wav"]
    assert {s.split for s in find_sources(tmp_path, "image")} <= {"train", "val"}


def test_the_split_depends_on_the_relative_name_alone(tmp_path: Path):
    names = [f"{i}.png" for i in range(400)]
    for root in ("one", "two"):
        (tmp_path / root).mkdir()
        for name in names if root == "one" else names[::2]:
            (tmp_path / root / name).touch()
    one, two = ({s.path.name: s.split for s in find_sources(tmp_path / r, "image")} for r in ("one", "two"))
    assert all(one[name] == split for name, split in two.items())
    assert 5 < sum(split == "val" for split in one.values()) < 40
    assert held_out("x", 1.0) and not held_out("x", 0.0)


def test_a_manifest(tmp_path: Path):
    rows = [
        {"path": "x/1.png", "split": "val", "kind": "photo", "licence": "CC0", "sha256": "unused"},
        {"path": "x/2.png", "split": "train", "text": "line\u2028separator", "package": "p"},
    ]
    lines = [json.dumps(r, ensure_ascii=False) for r in rows]
    (tmp_path / "images.jsonl").write_text("\n".join([lines[0], "", lines[1], ""]), encoding="utf-8")
    first, second = find_sources(tmp_path, "image")
    assert first.path == tmp_path / "x/1.png" and (first.split, first.kind, first.licence) == ("val", "photo", "CC0")
    assert second.text == "line\u2028separator" and second.package == "p" and second.kind == ""
    for bad in ("{", "[]", '{"split": "val"}', '{"path": "x"}', "3"):
        (tmp_path / "images.jsonl").write_text(f"{lines[0]}\n{bad}\n", encoding="utf-8")
        with pytest.raises(ValueError, match=r"images\.jsonl, line 2: expected a JSON object with path and split"):
            find_sources(tmp_path, "image")


def test_nothing_to_read(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"fetch_data\.py --out"):
        find_sources(tmp_path / "none", "image")
    with pytest.raises(ValueError, match=r"no audio files \(\.wav"):
        find_sources(tmp_path, "audio")
    (tmp_path / "speech.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no audio files"):
        find_sources(tmp_path, "audio")
