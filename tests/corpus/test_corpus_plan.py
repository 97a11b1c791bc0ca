"""The plan: the same for the same source on any file system, compact, written whole, and checked on resume."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from corpus_fixtures import image_bytes, make_dataset, make_folder, make_parquet, make_rows, make_tars
from hypothesis import given
from hypothesis import strategies as st

from mmtok.corpus import listing, source_folder
from mmtok.corpus.listing import expand_braces, first_differences, in_order, unique_keys, walk
from mmtok.corpus.plan import changed, describe, load_plan, make_plan, save_plan
from mmtok.corpus.records import PlanSettings
from mmtok.corpus.sources import read_samples

MAKERS = {
    "folder": (make_folder, {"images": 5}),
    "index": (make_folder, {"images": 5, "captions": "index"}),
    "tar": (make_tars, {"images": 5}),
    "parquet": (make_parquet, {"images": 5}),
    "datasets": (make_dataset, {"images": 5}),
}


def backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let folders be listed in the opposite order."""
    scandir = os.scandir

    class Entries:
        def __init__(self, path: Any) -> None:
            with scandir(path) as entries:
                self.entries = sorted(entries, key=lambda e: e.name, reverse=True)

        def __enter__(self) -> Iterator[os.DirEntry[str]]:
            return iter(self.entries)

        def __exit__(self, *_: object) -> None:
            self.entries = []

    monkeypatch.setattr(os, "scandir", Entries)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_plan_does_not_depend_on_the_order_or_place_of_the_files(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make, arguments = MAKERS[kind]
    make(tmp_path / "here", **arguments)
    plan = make_plan(tmp_path / "here", PlanSettings(items_per_shard=2))
    (tmp_path / "other").mkdir()
    shutil.copytree(tmp_path / "here", tmp_path / "other/place")
    backwards(monkeypatch)
    again = make_plan(tmp_path / "other/place", PlanSettings(items_per_shard=2))
    assert again.fingerprint == plan.fingerprint
    assert (again.listing, again.shards, again.settings, again.found) == (
        plan.listing,
        plan.shards,
        plan.settings,
        plan.found,
    )
    other = make_plan(tmp_path / "here", PlanSettings(items_per_shard=3, text_column=""))
    assert other.fingerprint != plan.fingerprint


@pytest.mark.parametrize("kind", MAKERS)
def test_a_plan_is_the_same_after_it_was_saved(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make, arguments = MAKERS[kind]
    make(tmp_path / "source", **arguments)
    monkeypatch.chdir(tmp_path)
    plan = make_plan("source", PlanSettings(items_per_shard=2))  # a relative path, read from another folder
    save_plan(plan, "plan.json")
    monkeypatch.chdir("/")
    loaded = load_plan(tmp_path / "plan.json")
    assert loaded == plan
    assert [list(read_samples(loaded, s)) for s in loaded.shards] == [list(read_samples(plan, s)) for s in plan.shards]
    first = (tmp_path / "plan.json").read_bytes(), (tmp_path / "plan.files").read_bytes()
    save_plan(loaded, tmp_path / "plan.json")
    assert ((tmp_path / "plan.json").read_bytes(), (tmp_path / "plan.files").read_bytes()) == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.files", "plan.json", "source"]
    assert changed(loaded) is None
    assert make_plan(loaded.location, PlanSettings(**loaded.settings)).fingerprint == plan.fingerprint


def test_a_damaged_plan_is_refused(tmp_path: Path):
    make_folder(tmp_path / "source", images=4)
    plan = make_plan(tmp_path / "source")
    path, files = tmp_path / "plan.json", tmp_path / "plan.files"
    save_plan(plan, path)
    whole, lines = path.read_bytes(), files.read_bytes()
    for broken in (whole[:-5], b"{}", b"[]", whole.replace(b'"schema": 1', b'"schema": 99')):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="expected a plan"):
            load_plan(path)
    path.write_bytes(whole)
    files.write_bytes(lines[:-1])
    with pytest.raises(ValueError, match="list of files"):
        load_plan(path)
    files.write_bytes(lines.replace(b"0001", b"0009"))
    with pytest.raises(ValueError, match="not what the plan wrote"):
        list(read_samples(load_plan(path), plan.shards[0]))
    with pytest.raises(FileNotFoundError, match="create it first"):
        save_plan(plan, tmp_path / "no/plan.json")


# ---- what has changed -------------------------------------------------------------------------------------------


def test_changes_of_a_folder_are_named(tmp_path: Path):
    made = make_folder(tmp_path, images=6)
    plan = make_plan(tmp_path)
    os.utime(tmp_path / made[0].name, (1, 1))
    assert changed(plan) is None
    (tmp_path / made[0].name).write_bytes(made[0].data + b"!")
    size = len(made[0].data)
    assert changed(plan) == f"{made[0].name} has {size + 1} bytes, had {size}"
    (tmp_path / made[1].name).unlink()
    (tmp_path / "image/0/zzz.png").write_bytes(b"")
    (tmp_path / made[2].name).with_suffix(".txt").write_text("a much longer caption than before")
    (tmp_path / made[3].name).rename(tmp_path / "image/1/renamed.png")
    told = changed(plan)
    assert told is not None
    assert f"{made[1].name} is gone" in told
    assert told.endswith("and 3 more")  # a text, and a file that was renamed
    shutil.rmtree(tmp_path / "image")
    assert "cannot be planned any more" in str(changed(plan))


def test_changes_of_texts_tars_and_tables_are_named(tmp_path: Path):
    make_folder(tmp_path / "index", images=3, captions="index")
    make_tars(tmp_path / "tar", images=3)
    make_parquet(tmp_path / "parquet", images=3)
    make_dataset(tmp_path / "datasets", images=3)
    plans = {p.name: make_plan(p) for p in sorted(tmp_path.iterdir())}
    assert [changed(plan) for plan in plans.values()] == [None] * 4
    index = tmp_path / "index/images.jsonl"
    index.write_bytes(index.read_bytes().replace(b"red boat", b"sad goat"))  # of the same length
    assert changed(plans["index"]) == "images.jsonl has another text or key"
    with (tmp_path / "tar/train-0001.tar").open("ab") as f:
        f.write(b"\0" * 512)
    assert "train-0001.tar has" in str(changed(plans["tar"]))
    (tmp_path / "parquet/part-0000.parquet").unlink()
    assert changed(plans["parquet"]) == "part-0000.parquet is gone"
    (tmp_path / "datasets/cache-0123456789abcdef.arrow").write_bytes(b"what `map` leaves")
    assert changed(plans["datasets"]) is None
    shutil.rmtree(tmp_path / "datasets")
    assert "cannot be planned" in str(changed(plans["datasets"]))


def lines(paths: list[str]) -> listing.Listing:
    writer = listing.ListingWriter()
    for path in sorted(paths, key=in_order):
        writer.add(path, len(path))
    return writer.finish()


PATHS = st.lists(
    st.text("ab/", min_size=1, max_size=5).filter(lambda p: "//" not in p and p.strip("/") == p), unique=True
)


@given(old=PATHS, new=PATHS)
def test_differences_are_those_of_the_sets(old: list[str], new: list[str]):
    told = first_differences(lines(old), lines(new), at_most=100)
    gone, more = set(old) - set(new), set(new) - set(old)
    assert sorted(told.split(", ") if told else []) == sorted(
        [f"{p} is gone" for p in gone] + [f"{p} is new" for p in more]
    )


# ---- kinds, prefixes, patterns ----------------------------------------------------------------------------------


def mixed_folder(path: Path) -> None:
    """Pictures, sounds, tars and Parquet in one folder."""
    make_folder(path, images=2, sounds=3)
    make_tars(path / "shards", images=4)
    make_parquet(path / "tables", images=5)


def test_a_folder_of_several_kinds_asks_for_one(tmp_path: Path):
    mixed_folder(tmp_path)
    (tmp_path / "README.md").write_text("about")
    (tmp_path / ".DS_Store").write_bytes(b"")
    with pytest.raises(
        ValueError, match="5 pictures or sounds, 2 tar shards, 2 Parquet files: write folder: or tar: or"
    ):
        make_plan(tmp_path)
    with pytest.raises(ValueError, match="2 image, 3 audio; choose the modality"):
        make_plan(f"folder:{tmp_path}")
    plans = {
        kind: make_plan(f"{kind}:{tmp_path}", PlanSettings(modality="image")) for kind in ("folder", "tar", "parquet")
    }
    counts = {kind: sum(1 for s in plan.shards for _ in read_samples(plan, s)) for kind, plan in plans.items()}
    assert counts == {"folder": 2, "tar": 4, "parquet": 5}
    assert all(plan.kind == kind and changed(plan) is None for kind, plan in plans.items())
    assert plans["folder"].found["left_out"] == {"audio files": 3, ".md": 1, "names that begin with a dot": 1}
    sounds = make_plan(f"folder:{tmp_path}", PlanSettings(modality="audio", extension="flac"))
    assert [s.items for s in sounds.shards] == [1]
    assert make_plan(tmp_path, PlanSettings(pattern="audio/*")).modality == "audio"


def test_two_indexes_ask_for_a_modality_and_one_can_be_named(tmp_path: Path):
    make_folder(tmp_path, images=2, sounds=3, captions="index")
    with pytest.raises(ValueError, match=r"images.jsonl and speech.jsonl"):
        make_plan(tmp_path)
    assert [s.items for s in make_plan(tmp_path, PlanSettings(modality="audio")).shards] == [3]
    with (tmp_path / "images.jsonl").open("a") as f:
        f.write('{"path": "image/9/no-text.png"}\n')
    assert "texts        images.jsonl for 2 of 3" in describe(make_plan(tmp_path, PlanSettings(modality="image")))
    (tmp_path / "images.jsonl").rename(tmp_path / "mine.jsonl")
    plan = make_plan(tmp_path, PlanSettings(index="mine.jsonl"))
    assert (plan.modality, [s.items for s in plan.shards]) == ("image", [3])
    plain = make_plan(tmp_path, PlanSettings(modality="image", index="none"))
    assert [s.items for s in plain.shards] == [2]
    assert [s.text for s in read_samples(plain, plain.shards[0])] == [None, None]
    for row in ('{"path": "../up.png"}', '{"path": "/etc/x.png"}', '{"file": "a.png"}', "[1]", "{"):
        (tmp_path / "mine.jsonl").write_text(row + "\n")
        with pytest.raises(ValueError, match=r"mine.jsonl, line 1: expected a"):
            make_plan(tmp_path, PlanSettings(index="mine.jsonl"))


def test_globs_braces_and_single_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = make_tars(tmp_path / "a", images=6, shards=3)
    make_parquet(tmp_path / "p", images=4)
    keys = [m.key for m in made]

    def read(source: str) -> list[str]:
        plan = make_plan(source)
        return [s.key for shard in plan.shards for s in read_samples(plan, shard)]

    assert read(f"{tmp_path}/a/*.tar") == keys
    assert read(f"{tmp_path}/a/train-{{0000..0002}}.tar") == keys
    assert read(f"{tmp_path}/a/train-{{0000,0002}}.tar") == keys[:2] + keys[4:]
    assert read(f"{tmp_path}/a/train-0001.tar") == keys[2:4]
    assert read(f"{tmp_path}/*/*.tar") == [f"a/{key}" for key in keys]
    assert read(f"parquet:{tmp_path}/p/*") == ["part-0000#0", "part-0000#1", "part-0001#0", "part-0001#1"]
    monkeypatch.chdir(tmp_path / "a")
    assert read("train-000[01].tar") == keys[:4]
    (tmp_path / "a/tar:x.tar").write_bytes((tmp_path / "a/train-0000.tar").read_bytes())
    assert read("tar:x.tar") == [key.replace("train-0000", "tar:x") for key in keys[:2]]
    with pytest.raises(ValueError, match=r"no file at .*train-0003.tar, .*train-0004.tar"):
        make_plan(f"{tmp_path}/a/train-{{0000..0004}}.tar")


BRACED = st.lists(
    st.sampled_from(["a", "-", "{0..3}", "{08..11}", "{3..1}", "{000..002}", "{x,y}", "{x,,z}", ".tar"]), max_size=4
).map("".join)


@given(pattern=BRACED)
def test_braces_expand_as_in_webdataset(pattern: str):
    from braceexpand import braceexpand

    assert expand_braces(pattern) == list(braceexpand(pattern))


@pytest.mark.parametrize("name", ["{}", "{a}", "a{b", "a}b", "{1..}", "plain"])
def test_what_is_no_brace_expression_is_a_name(name: str):
    assert expand_braces(name) == [name]


# ---- refusals ---------------------------------------------------------------------------------------------------


def test_sources_without_anything_in_them_say_what_there_is(tmp_path: Path):
    with pytest.raises(ValueError, match="expected at least one picture or sound, got nothing"):
        make_plan(tmp_path)
    with pytest.raises(ValueError, match="no file at"):
        make_plan(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="expected a folder, there is none"):
        make_plan(f"folder:{tmp_path}/nowhere")
    with pytest.raises(ValueError, match="expected a path after tar"):
        make_plan("tar:")
    (tmp_path / "notes.md").write_text("")
    with pytest.raises(ValueError, match=r"got 1 .md"):
        make_plan(tmp_path)
    with pytest.raises(ValueError, match=r"expected at least one tar file, got 1 .md"):
        make_plan(f"tar:{tmp_path}")
    with pytest.raises(ValueError, match="0 tar, 0 Parquet and 1 others"):
        make_plan(tmp_path / "notes.md")
    make_folder(tmp_path, sounds=2)
    with pytest.raises(ValueError, match="expected at least one picture, got 2 audio files"):
        make_plan(tmp_path, PlanSettings(modality="image"))
    with pytest.raises(ValueError, match="expected a data set that save_to_disk wrote"):
        make_plan(f"datasets:{tmp_path}")


def test_tars_of_two_modalities_or_none_are_refused(tmp_path: Path):
    make_tars(tmp_path / "both", images=2, sounds=2, shards=1)
    with pytest.raises(ValueError, match=r"pictures and sounds .*choose the modality"):
        make_plan(tmp_path / "both")
    plan = make_plan(tmp_path / "both", PlanSettings(modality="audio"))
    assert plan.modality == "audio"
    make_tars(tmp_path / "images", images=2, shards=1)
    with pytest.raises(ValueError, match=r"expected audio members .*png, txt"):
        make_plan(tmp_path / "images", PlanSettings(modality="audio"))
    (tmp_path / "none").mkdir()
    (tmp_path / "none/a.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected image or audio members .*no readable member"):
        make_plan(tmp_path / "none")


def test_columns_that_are_missing_or_not_clear_are_refused(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    def refused(rows: list[dict[str, Any]], expected: str, name: str = "a", **settings: Any) -> None:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
        with pytest.raises(ValueError, match=expected):
            make_plan(tmp_path, PlanSettings(**settings))

    image, sound = make_rows("image", 2, struct=False), make_rows("audio", 2, struct=False)
    refused(image, r"text_column: .* no column 'alt'; it has image \(binary\), caption \(string\)", text_column="alt")
    refused(image, "key_column: .* no column 'nr'", key_column="nr")
    refused(image, "bytes_column: expected bytes", bytes_column="caption")
    refused(image, "text_column: expected a column of strings", text_column="number")
    refused(image, "expected audio in a column, but image", modality="audio")
    refused([{"caption": "a"}], "expected a column of bytes")
    refused([{"x": b"??"}], "nothing that is known as a picture or sound in x")
    refused([{**a, **b} for a, b in zip(image, sound, strict=True)], "pictures and sounds: choose the modality")
    refused([{"x": a["image"], "y": a["image"]} for a in image], "x, y may all be meant; choose one with bytes_column")
    refused(image, "a source of the kind parquet has none", extension="png")
    refused(image[:0] or [{"image": b""}][:0], "expected a column of bytes")
    pq.write_table(pa.Table.from_pylist(image), tmp_path / "a.parquet")
    refused([{"image": image_bytes(0)}], "b.parquet has no column 'caption', as the first file has", name="b")
    both = [{**a, **b} for a, b in zip(image, sound, strict=True)]
    pq.write_table(pa.Table.from_pylist(both), tmp_path / "a.parquet")
    plan = make_plan(tmp_path / "a.parquet", PlanSettings(modality="audio"))
    assert plan.settings["bytes_column"] == "audio"
    assert plan.found["left_out"] == {"column image (bytes)": 1}
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="none of the 1 Parquet files can be read"):
        make_plan(tmp_path / "a.parquet")


def test_folders_that_cannot_be_read_and_links_in_a_circle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_folder(tmp_path / "s", images=2)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/x.png").write_bytes(image_bytes(0))
    (tmp_path / "s/linked").symlink_to(tmp_path / "elsewhere")
    assert [s.items for s in make_plan(tmp_path / "s").shards] == [3]
    (tmp_path / "elsewhere/back").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="leads back to"):
        make_plan(tmp_path / "s")
    (tmp_path / "elsewhere/back").unlink()
    scandir = os.scandir

    def closed(path: Any) -> Any:
        if str(path).rstrip("/").endswith("image/1"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(ValueError, match=r"cannot read the folder .*image/1"):
        make_plan(tmp_path / "s")


@pytest.mark.parametrize(
    ("values", "told"),
    [({"modality": "video"}, "expected image or audio"), ({"items_per_shard": 0}, "expected 1 or more")],
)
def test_settings_are_checked(values: dict[str, Any], told: str):
    with pytest.raises(ValueError, match=told):
        PlanSettings(**values)


def test_options_that_mean_nothing_are_refused(tmp_path: Path):
    make_folder(tmp_path / "f", images=1)
    make_tars(tmp_path / "t", images=1)
    with pytest.raises(ValueError, match="key_column: a source of the kind folder"):
        make_plan(tmp_path / "f", PlanSettings(key_column="id"))
    with pytest.raises(ValueError, match="bytes_column: a source of the kind tar"):
        make_plan(tmp_path / "t", PlanSettings(bytes_column="image"))
    with pytest.raises(ValueError, match=r"no file 'x.jsonl'"):
        make_plan(tmp_path / "f", PlanSettings(index="x.jsonl"))


# ---- size -------------------------------------------------------------------------------------------------------


def test_the_list_of_many_files_is_compact(tmp_path: Path):
    count = 10_000
    tracemalloc.start()
    try:
        shards = source_folder.FileShards(1000)
        for n in range(count):
            path = f"photos/{n // 100:04d}/{n:08d}.jpg"
            shards.add(path, 100_000 + n, path[:-4], {"txt": 20})
        files, cut = shards.finish()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [s.items for s in cut] == [1000] * 10
    assert files.size <= count * (len("photos/0001/00000100.jpg") + 32)
    assert peak < 4 * files.size  # no object a file
    part = cut[7].parts[0]
    assert [line[0] for line in files.range(*part["lines"], crc32=part["crc32"])] == [
        f"photos/{n // 100:04d}/{n:08d}.jpg" for n in range(7000, 8000)
    ]
    # Of a plan file, a thousand files are one line.
    make_folder(tmp_path / "s", images=1)
    plan = dataclasses.replace(make_plan(tmp_path / "s"), shards=cut, listing=files)
    save_plan(plan, tmp_path / "plan.json")
    assert (tmp_path / "plan.json").stat().st_size < 3000
    assert load_plan(tmp_path / "plan.json") == plan


def test_a_folder_is_listed_once_and_no_file_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for n in range(400):
        folder = tmp_path / f"s/{n % 8}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{n}.png").touch()
    scanned: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scanned.append(str(path)) or scandir(path))
    monkeypatch.setattr("io.open", None)
    monkeypatch.setattr("builtins.open", None)
    plan = make_plan(tmp_path / "s")
    assert len(scanned) == 9
    assert sum(s.items or 0 for s in plan.shards) == 400


def test_a_walk_is_in_one_order(tmp_path: Path):
    for name in ("b/x.png", "a.png", "a/z.png", "a/b/c.png", "a.b/y.png", "z.png", "a/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [folder.path + name for folder in walk(tmp_path) for name, _ in folder.files]
    assert found == sorted(found, key=in_order)
    assert found == ["a.png", "z.png", "a/a.png", "a/z.png", "a/b/c.png", "a.b/y.png", "b/x.png"]


@given(names=st.lists(st.text("ab.", min_size=1, max_size=6), unique=True, max_size=8))
def test_keys_without_endings_stay_unique(names: list[str]):
    keys = unique_keys(names)
    assert len(set(keys)) == len(names)
    assert all(name.startswith(key) for name, key in zip(names, keys, strict=True))


# ---- in words ---------------------------------------------------------------------------------------------------


def test_a_plan_is_told_in_words(tmp_path: Path):
    make_folder(tmp_path / "f", images=3)
    (tmp_path / "f/notes.md").write_text("")
    make_tars(tmp_path / "t", sounds=3, captions="json")
    make_parquet(tmp_path / "p", images=4)
    told = {p.name: describe(make_plan(p)) for p in sorted(tmp_path.iterdir())}
    size = sum(len(image_bytes(n)) for n in range(3)) / 1000
    assert told["f"].splitlines() == [
        f"source       {tmp_path}/f (folder) at {tmp_path}/f",
        "modality     image",
        "items        3, in 1 shard",
        f"bytes        {size:.1f} kB",
        "keys         image/0/0000, image/1/0001, image/2/0002",
        "texts        .txt for 3 of 3",
        "left out     1 .md",
    ]
    assert "items        known when read, in 2 shards" in told["t"]
    assert "texts        .json" in told["t"]
    assert "texts        column caption (guessed; text_column chooses)" in told["p"]
    assert "bytes column image (guessed)" in told["p"]
    assert "kept beside  number, id" in told["p"]
    chosen = PlanSettings(text_column="", bytes_column="image", key_column="id")
    named = describe(make_plan(tmp_path / "p", chosen))
    assert "texts        none" in named
    assert "bytes column image\nkey column   id" in named
    json.dumps(make_plan(tmp_path / "p", chosen).found)
