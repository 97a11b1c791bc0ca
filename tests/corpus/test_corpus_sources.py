"""Reading a planned source: every kind gives back what was put in, and what is damaged is told and stops nothing."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from corpus_fixtures import (
    Made,
    add_member,
    image_bytes,
    make_dataset,
    make_folder,
    make_parquet,
    make_rows,
    make_tars,
    sound_bytes,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtok.corpus.beside import media_of_bytes, plain
from mmtok.corpus.plan import load_plan, make_plan, save_plan
from mmtok.corpus.records import Failure, Plan, PlanSettings, Sample
from mmtok.corpus.sources import read_samples


def everything(plan: Plan) -> tuple[list[Sample], list[Failure]]:
    """All samples and all failures of a plan."""
    items = [item for shard in plan.shards for item in read_samples(plan, shard)]
    return [i for i in items if isinstance(i, Sample)], [i for i in items if isinstance(i, Failure)]


def contents(samples: list[Sample]) -> list[tuple[str, bytes, str | None]]:
    """Key, bytes and text of each."""
    return [(s.key, s.data if s.path is None else s.path.read_bytes(), s.text) for s in samples]  # type: ignore


def expected(made: list[Made]) -> list[tuple[str, bytes, str | None]]:
    return [(m.key, m.data, m.text) for m in made]


KINDS: dict[str, tuple[str, Callable[..., list[Made]], dict[str, Any]]] = {
    "folder-txt": ("folder", make_folder, {"images": 7}),
    "folder-json": ("folder", make_folder, {"sounds": 7, "captions": "json"}),
    "folder-index": ("folder", make_folder, {"images": 7, "captions": "index"}),
    "folder-bare": ("folder", make_folder, {"images": 7, "captions": None}),
    "tar-txt": ("tar", make_tars, {"images": 7}),
    "tar-json": ("tar", make_tars, {"sounds": 7, "captions": "json"}),
    "tar-gz": ("tar", make_tars, {"images": 7, "suffix": ".tar.gz"}),
    "parquet-struct": ("parquet", make_parquet, {"images": 7}),
    "parquet-bytes": ("parquet", make_parquet, {"sounds": 7, "struct": False}),
    "parquet-bare": ("parquet", make_parquet, {"images": 7, "captions": False}),
    "datasets-image": ("datasets", make_dataset, {"images": 7}),
    "datasets-audio": ("datasets", make_dataset, {"sounds": 7}),
    "datasets-bytes": ("datasets", make_dataset, {"sounds": 7, "features": False}),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_back_what_was_put_in(name: str, tmp_path: Path):
    kind, make, arguments = KINDS[name]
    made = make(tmp_path / "source", **arguments)
    plan = make_plan(tmp_path / "source", PlanSettings(items_per_shard=3))
    save_plan(plan, tmp_path / "plan.json")
    plan = load_plan(tmp_path / "plan.json")
    samples, failures = everything(plan)
    assert plan.kind == kind
    assert plan.modality == ("image" if "images" in arguments else "audio")
    assert contents(samples) == expected(made)
    assert not failures
    assert len(plan.shards) > 1
    if kind != "tar":
        assert [shard.items for shard in plan.shards] == [
            sum(1 for _ in read_samples(plan, shard)) for shard in plan.shards
        ]
    json.dumps([s.extra for s in samples], allow_nan=False)


def test_what_else_a_source_says_is_kept(tmp_path: Path):
    make_folder(tmp_path / "json", images=2, captions="json")
    make_folder(tmp_path / "index", sounds=2, captions="index")
    make_tars(tmp_path / "tar", images=2, shards=1, captions="json")
    make_parquet(tmp_path / "parquet", images=2, files=1)
    found = {p.name: everything(make_plan(p))[0][1].extra for p in sorted(tmp_path.iterdir())}
    assert found == {
        "json": {"number": 1},
        "index": {"split": "train", "licence": "CC0-1.0"},
        "tar": {"number": 1},
        "parquet": {"number": 1, "id": "item-00001", "path": "0001.jpg"},
    }


def test_the_text_field_can_be_chosen_or_refused(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(image_bytes(0))
    (tmp_path / "a.json").write_text(json.dumps({"alt": "a boat", "text": "other", "score": float("nan")}))
    (tmp_path / "a.txt").write_text("beside")

    def read(column: str | None) -> Sample:
        return everything(make_plan(tmp_path, PlanSettings(text_column=column)))[0][0]

    assert (read(None).text, read(None).extra) == ("beside", {"alt": "a boat", "text": "other", "score": None})
    assert (read("alt").text, read("alt").extra) == ("a boat", {"text": "other", "score": None})
    assert read("").text is None


# ---- folders ----------------------------------------------------------------------------------------------------


def test_bad_files_of_a_folder_fail_alone(tmp_path: Path):
    source = tmp_path / "source"
    made = make_folder(source, images=6)
    (source / "image/0/link.png").symlink_to(tmp_path / "nowhere.png")
    (source / made[5].name).with_suffix(".txt").write_bytes(b"\xff\xfe\xff")
    plan = make_plan(source, PlanSettings(items_per_shard=4))
    (source / made[2].name).unlink()
    samples, failures = everything(plan)
    assert contents(samples) == expected([made[0], made[1], made[3], made[4]])
    assert {f.key: f.shard for f in failures} == {"image/0/link": 0, made[2].key: 0, made[5].key: 1}
    reasons = {f.key: f.reason for f in failures}
    assert "No such file" in reasons[made[2].key]
    assert "UTF-8" in reasons[made[5].key]
    assert all("\n" not in f.reason for f in failures)


def test_a_sidecar_that_is_no_json_is_told(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(image_bytes(0))
    (tmp_path / "a.json").write_text("{broken")
    samples, failures = everything(make_plan(tmp_path))
    assert not samples
    assert [f.key for f in failures] == ["a"]
    assert ".json is no JSON" in failures[0].reason


def test_files_of_one_stem_keep_their_endings(tmp_path: Path):
    for name in ("a.png", "a.jpg", "b.png", "a.png.png", "c/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(image_bytes(0))
    samples, failures = everything(make_plan(tmp_path))
    # a.png.png without its ending would be the key of the a.png that keeps its own
    assert [s.key for s in samples] == ["a.jpg", "a.png", "a.png.png", "b", "c/a"]
    assert not failures


def test_an_index_names_files_that_are_missing_or_twice(tmp_path: Path):
    made = make_folder(tmp_path, images=3, captions="index")
    with (tmp_path / "images.jsonl").open("a", encoding="utf-8") as f:
        f.write(json.dumps({"path": made[0].name, "text": "again"}) + "\n\n")
        f.write(json.dumps({"path": "image/9/gone.png", "text": "gone"}) + "\n")
    plan = make_plan(tmp_path, PlanSettings(items_per_shard=1))
    samples, failures = everything(plan)
    assert contents(samples) == expected(made)
    assert [(f.key, f.reason.split(":")[0]) for f in failures] == [
        (made[0].key, "duplicate key"),
        ("image/9/gone", "image/9/gone.png"),
    ]
    assert [shard.items for shard in plan.shards] == [2, 1, 1, 1]  # both rows of a path are in one shard


def test_a_name_that_is_no_utf8_is_read_under_a_key_that_is(tmp_path: Path):
    with open(os.fsencode(tmp_path) + b"/a\xff.png", "wb") as f:
        f.write(image_bytes(0))
    plan = make_plan(tmp_path)
    save_plan(plan, tmp_path / "plan.json")
    samples, failures = everything(load_plan(tmp_path / "plan.json"))
    assert [s.key for s in samples] == ["a\\xff"]
    assert not failures


# ---- tars -------------------------------------------------------------------------------------------------------


def tar_of(*members: tuple[str, bytes]) -> bytes:
    """A tar with these members."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members:
            add_member(tar, name, data)
    return out.getvalue()


def test_a_tar_that_is_cut_anywhere_gives_what_comes_before(tmp_path: Path):
    made = make_tars(tmp_path / "whole", images=4, shards=1)
    data = (tmp_path / "whole/train-0000.tar").read_bytes()
    plan = make_plan(tmp_path / "whole")
    with tarfile.open(tmp_path / "whole/train-0000.tar") as tar:
        texts = [m for m in tar.getmembers() if m.name.endswith(".txt")]
    end = texts[-1].offset_data + 512
    for cut in [0, 1, 511, *range(512, end + 1, 512), *range(700, end, 997)]:
        (tmp_path / "whole/train-0000.tar").write_bytes(data[:cut])
        samples, failures = everything(plan)
        # A sample counts as whole once the header of the next one is there.
        whole = sum(cut >= m.offset_data + 512 + 512 for m in texts[:-1])
        assert contents(samples) == expected(made)[:whole], cut
        assert [f.key for f in failures] == ["train-0000"], cut
        assert "train-0000.tar" in failures[0].reason
        assert cut < 512 or ("byte" in failures[0].reason and str(cut) in failures[0].reason), failures
    (tmp_path / "whole/train-0000.tar").write_bytes(data[: end + 512])  # one block of the end mark is enough
    assert [contents(s) for s, f in [everything(plan)] if not f] == [expected(made)]


def test_a_gzip_that_is_cut_or_damaged_is_told(tmp_path: Path):
    made = make_tars(tmp_path / "s", images=6, shards=1, suffix=".tar.gz")
    path = tmp_path / "s/train-0000.tar.gz"
    plan, data = make_plan(tmp_path / "s"), path.read_bytes()
    damaged = {
        "cut": data[: len(data) * 2 // 3],
        "checksum": data[:-8] + bytes([data[-8] ^ 1]) + data[-7:],
        "flipped": data[: len(data) // 2] + b"\0" * 64 + data[len(data) // 2 + 64 :],
        "no gzip": b"\x1f\x8b" + b"nothing",
    }
    for name, broken in damaged.items():
        path.write_bytes(broken)
        samples, failures = everything(plan)
        assert [f.key for f in failures if f.key == "train-0000"] == ["train-0000"], name
        assert len(samples) == 6 if name == "checksum" else len(samples) < 6, name
        if name != "flipped":  # there, garbage comes out before the checksum tells
            assert contents(samples) == expected(made)[: len(samples)], name
    path.write_bytes(damaged["cut"])
    assert everything(plan)[0], "two thirds of the file hold some samples"


def test_what_tarfile_takes_for_the_end_is_told(tmp_path: Path):
    a, b = ("a.png", image_bytes(0)), ("b.png", image_bytes(2))
    one, whole = tar_of(a), tar_of(a, b)
    at = whole.index(b"b.png")
    (tmp_path / "damaged.tar").write_bytes(whole[:at] + b"\xff" * 200 + whole[at + 200 :])
    (tmp_path / "joined.tar").write_bytes(one + tar_of(b))
    (tmp_path / "text.tar").write_bytes(b"no tar at all" * 100)
    samples, failures = everything(make_plan(tmp_path))
    assert [s.key for s in samples] == ["joined/a"]  # it was whole: its end mark was read
    reasons = {f.key: f.reason for f in failures}
    assert list(reasons) == ["damaged", "joined", "text"]
    assert f"byte {at}" in reasons["damaged"] and "a header is damaged" in reasons["damaged"]
    assert "joined tars" in reasons["joined"]
    assert "cannot be read as a tar" in reasons["text"]


def test_members_without_partners_and_keys_that_come_twice(tmp_path: Path):
    (tmp_path / "x.tar").write_bytes(
        tar_of(
            ("README", b"no sample"),
            ("__meta__", b"nor this"),
            ("a.png", image_bytes(0)),
            ("a.txt", b"first"),
            ("lonely.txt", b"text without a picture"),
            ("b.png", image_bytes(2)),
            ("b.png", image_bytes(4)),
            ("a.png", image_bytes(6)),
            ("sound.wav", sound_bytes(0)),
            ("c.JPG", image_bytes(1)),
            ("c.json", b"[1, 2]"),
            ("c.cls", b"7"),
            ("d.png", image_bytes(8)),
            ("d.json", b"{"),
            ("e.left.png", image_bytes(10)),
            ("e.right.png", image_bytes(12)),
        )
    )
    samples, failures = everything(make_plan(tmp_path, PlanSettings(modality="image")))
    assert contents(samples) == [
        ("x/a", image_bytes(0), "first"),
        ("x/b", image_bytes(2), None),
        ("x/c", image_bytes(1), None),
        ("x/e.left.png", image_bytes(10), None),
        ("x/e.right.png", image_bytes(12), None),
    ]
    assert samples[2].extra == {"json": [1, 2], "cls": 7}
    assert [(f.key, f.reason.split(":")[0]) for f in failures] == [
        ("x/lonely", "no image member, only .txt"),
        ("x/b", "duplicate key"),
        ("x/a", "duplicate key"),
        ("x/sound", "no image member, only .wav"),
        ("x/d", "its .json is no JSON (Expecting property name enclosed in double quotes"),
    ]
    chosen = make_plan(tmp_path, PlanSettings(extension="left.png"))
    assert [s.key for s in everything(chosen)[0]] == ["x/e"]


def test_tars_of_one_name_in_several_folders_do_not_share_keys(tmp_path: Path):
    for name, member in (("a.tar", "b/c.png"), ("a/b.tar", "c.png"), ("d/0.tar", "c.png"), ("e/0.tar.gz", "c.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        data = tar_of((member, image_bytes(0)))
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    samples, failures = everything(make_plan(tmp_path))
    assert [s.key for s in samples] == ["a.tar/b/c", "a/b.tar/c", "d/0.tar/c", "e/0.tar.gz/c"]
    assert not failures


NAMES = st.builds(
    lambda folder, base, extension: folder + base + extension,
    st.sampled_from(["", "x/", "x.y/", "__meta__/"]),
    st.sampled_from(["a", "b", "c d", "__k__", "été"]),
    st.sampled_from([".png", ".PNG", ".jpg", ".txt", ".left.png", "", ".npy"]),
)


@settings(max_examples=60, deadline=None)
@given(names=st.lists(NAMES, max_size=12))
def test_members_are_grouped_as_webdataset_groups_them(names: list[str], tmp_path_factory: pytest.TempPathFactory):
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    path = tmp_path_factory.mktemp("grouping") / "x.tar"
    path.write_bytes(tar_of(*((name, f"{i} {name}".encode()) for i, name in enumerate(names)), ("last.png", b"last")))
    with path.open("rb") as f:
        files = [dict(file, __url__="x") for file in tar_file_iterator(f)]
    doubled: list[Exception] = []
    groups = list(group_by_keys(files, handler=lambda e: doubled.append(e) or True))
    expected_samples, lonely, seen, again = [], [], set(), 0
    for group in groups:
        media = {e: d for e, d in group.items() if e.rpartition(".")[2] in ("png", "jpg")}
        if not media:
            lonely.append(f"x/{group['__key__']}")
        for extension, data in media.items():
            key = f"x/{group['__key__']}" + (f".{extension}" if len(media) > 1 else "")
            again += key in seen
            if key not in seen:
                expected_samples.append((key, data, group["txt"].decode() if "txt" in group else None))
            seen.add(key)
    samples, failures = everything(make_plan(path))
    assert contents(samples) == expected_samples
    assert [f.key for f in failures if f.reason.startswith("no image")] == lonely
    assert sum(f.reason.startswith("duplicate key") for f in failures) == len(doubled) + again


# ---- tables -----------------------------------------------------------------------------------------------------


def write_parquet(path: Path, rows: list[dict[str, Any]], schema: Any = None) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=4, compression="none")


def test_null_bytes_and_keys_of_a_table_fail_alone(tmp_path: Path):
    rows = make_rows("image", 6)
    rows[1]["image"] = None
    rows[2]["image"]["bytes"] = None
    rows[3]["id"] = None
    rows[4]["id"] = rows[0]["id"]
    rows[5]["image"]["bytes"] = b""
    write_parquet(tmp_path / "a.parquet", rows)
    samples, failures = everything(make_plan(tmp_path / "a.parquet", PlanSettings(key_column="id")))
    assert [(s.key, s.extra) for s in samples] == [("item-00000", {"number": 0, "path": "0000.png"})]
    assert [(f.key, f.reason.partition(" in")[0].partition(":")[0]) for f in failures] == [
        ("item-00001", "null"),
        ("item-00002", "null"),
        ("a#3", "no key"),
        ("item-00000", "duplicate key"),
        ("item-00005", "0 bytes"),
    ]
    assert "0002.png" in failures[1].reason


def test_a_damaged_parquet_file_loses_its_own_rows_only(tmp_path: Path):
    for name in ("a", "b", "c"):
        write_parquet(tmp_path / f"{name}.parquet", make_rows("audio", 8, struct=False))
    data = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(data[:-100])  # no footer
    plan = make_plan(tmp_path)
    samples, failures = everything(plan)
    assert [s.key for s in samples] == [f"{name}#{i}" for name in "ac" for i in range(8)]
    assert [f.key for f in failures] == ["b"]
    assert "b.parquet" in failures[0].reason
    (tmp_path / "b.parquet").write_bytes(data)
    plan = make_plan(tmp_path)
    (tmp_path / "b.parquet").write_bytes(data[:4] + b"\xff" * 16 + data[20:])  # the header of the first page
    samples, failures = everything(plan)
    assert [s.key for s in samples] == [f"{n}#{i}" for n in "abc" for i in range(8) if (n, i // 4) != ("b", 0)]
    assert [f.key for f in failures] == [f"b#{i}" for i in range(4)]
    (tmp_path / "b.parquet").unlink()
    samples, failures = everything(plan)
    assert [f.key for f in failures] == [f"b#{i}" for i in range(8)]
    assert len(samples) == 16


def test_row_groups_fill_shards_over_files(tmp_path: Path):
    for name in ("a", "b"):
        write_parquet(tmp_path / f"{name}.parquet", make_rows("image", 6))  # groups of 4 and 2
    plan = make_plan(tmp_path, PlanSettings(items_per_shard=6))
    assert [s.items for s in plan.shards] == [6, 6]
    assert [len(s.parts) for s in make_plan(tmp_path, PlanSettings(items_per_shard=9)).shards] == [1, 1]
    plan = make_plan(tmp_path, PlanSettings(items_per_shard=10))
    assert [s.items for s in plan.shards] == [10, 2]
    assert [len(s.parts) for s in plan.shards] == [2, 1]
    assert [s.key for s in everything(plan)[0]] == [f"{n}#{i}" for n in "ab" for i in range(6)]


def test_text_that_is_no_utf8_spoils_its_own_row(tmp_path: Path):
    import pyarrow as pa

    rows = make_rows("image", 3, struct=False)
    texts = pa.array([b"good", b"\xff\xff", b"fine"], pa.binary()).view(pa.string())
    table = pa.table({"image": [row["image"] for row in rows], "text": texts})
    import pyarrow.parquet as pq

    pq.write_table(table, tmp_path / "a.parquet")
    samples, failures = everything(make_plan(tmp_path))
    assert [(s.key, s.text) for s in samples] == [("a#0", "good"), ("a#2", "fine")]
    assert [f.key for f in failures] == ["a#1"]
    assert "utf-8" in failures[0].reason


def test_splits_of_a_data_set(tmp_path: Path):
    import datasets

    datasets.disable_progress_bars()
    both = datasets.DatasetDict(
        {name: datasets.Dataset.from_list(make_rows("image", n, 10 * n)) for name, n in (("train", 3), ("test", 2))}
    )
    both.save_to_disk(str(tmp_path / "d"))
    datasets.enable_progress_bars()
    samples, failures = everything(make_plan(tmp_path / "d"))
    assert [s.key for s in samples] == ["test#0", "test#1", "train#0", "train#1", "train#2"]
    assert [s.data for s in samples[:2]] == [image_bytes(20), image_bytes(21)]
    assert not failures
    train = make_plan(tmp_path / "d", PlanSettings(pattern="train"))
    assert [s.key for s in everything(train)[0]] == ["train#0", "train#1", "train#2"]
    data = next((tmp_path / "d/train").glob("*.arrow"))
    data.write_bytes(data.read_bytes()[:100])
    samples, failures = everything(train)
    assert [(f.key, "does not load" in f.reason) for f in failures] == [(f"train#{i}", True) for i in range(3)]
    assert not samples


def test_first_bytes_tell_the_modality_of_every_kind_we_make():
    assert {media_of_bytes(image_bytes(n)) for n in range(6)} == {"image"}
    assert {media_of_bytes(sound_bytes(n)) for n in range(6)} == {"audio"}
    others = (b"", None, b"\0" * 20, b"RIFF1234AVI ", b"%PDF-1.7", b"hello world!")
    assert {media_of_bytes(data) for data in others} == {None}


def test_values_become_plain_json():
    import datetime
    import decimal

    value = {"when": datetime.date(2026, 1, 2), "x": (1, float("inf")), "d": decimal.Decimal("1.5"), 3: b"\x01"}
    assert plain(value) == {"when": "2026-01-02", "x": [1, None], "d": "1.5", "3": "AQ=="}
