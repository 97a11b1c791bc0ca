"""recipes/fetch_data.py without a network: tiny archives are built here and stand in for the packages."""

import gzip
import io
import json
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
sys.path.insert(0, str(RECIPES))

import fetch_data  # noqa: E402
from fetching import clients, formats, sources  # noqa: E402
from fetching.clients import Archive, FetchError  # noqa: E402
from fetching.sources import Item, Source  # noqa: E402
from fetching.table import SOURCES  # noqa: E402


def picture(seed: int, size: int = 240, alpha: int = 255) -> bytes:
    """A PNG of smooth random colours: many shades, like a photograph."""
    coarse = np.random.default_rng(seed).integers(0, 255, (9, 9, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).convert("RGBA")
    image.putalpha(alpha)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def tgz(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def rcc(tree: dict, version: int, pack: bool) -> bytes:
    """A Qt binary resource of nested dicts, written level by level as Qt's compiler does."""
    names, blobs, nodes = b"", b"", []
    queue = [("", tree)]
    while queue:
        name, value = queue.pop(0)
        offset = len(names)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
        if isinstance(value, dict):
            first = len(nodes) + len(queue) + 1
            nodes.append(struct.pack(">IHII", offset, 2, len(value), first))
            queue += list(value.items())
        else:
            content = struct.pack(">I", len(value)) + zlib.compress(value) if pack else value
            nodes.append(struct.pack(">IHHHI", offset, int(pack), 0, 0, len(blobs)))
            blobs += struct.pack(">I", len(content)) + content
    if version > 1:
        nodes = [node + struct.pack(">Q", 0) for node in nodes]
    start = 20 if version < 3 else 24
    tree_bytes = b"".join(nodes)
    places = (start, start + len(tree_bytes), start + len(tree_bytes) + len(blobs))
    flags = struct.pack(">I", 0) if version == 3 else b""
    return b"qres" + struct.pack(">4I", version, *places) + flags + tree_bytes + blobs + names


# ---- formats ----


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("pack", [False, True])
def test_rcc_round_trip(version, pack):
    tree = {"app": {"pictures": {"a.webp": b"first" * 40, "é.webp": b""}, "note.txt": b"x"}, "top.txt": b"yy"}
    found = dict(formats.rcc_members(rcc(tree, version, pack)))
    assert found == {
        "app/pictures/a.webp": b"first" * 40,
        "app/pictures/é.webp": b"",
        "app/note.txt": b"x",
        "top.txt": b"yy",
    }


def test_rcc_refuses_other_data():
    with pytest.raises(ValueError, match="magic"):
        list(formats.rcc_members(b"PK\x03\x04" + bytes(40)))
    with pytest.raises(ValueError, match="format 9"):
        list(formats.rcc_members(b"qres" + struct.pack(">4I", 9, 20, 20, 20)))


def test_members_of_tgz_and_wheel(tmp_path):
    files = {"package/a.txt": b"a", "package/b.png": b"b"}
    archive = tgz(tmp_path / "x.tgz", files)
    assert dict(formats.members(archive, lambda name: name.endswith(".png"))) == {"package/b.png": b"b"}
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
    assert dict(formats.members(tmp_path / "x.whl", lambda name: True)) == files


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not on this machine")
def test_members_of_deb(tmp_path):
    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN/control").write_text(
        "Package: tiny\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: d\n"
    )
    (root / "usr/share/tiny").mkdir(parents=True)
    (root / "usr/share/tiny/a.ogg").write_bytes(b"sound" * 1000)
    (root / "usr/share/tiny/link.ogg").symlink_to("a.ogg")
    subprocess.run(["dpkg-deb", "--build", str(root), str(tmp_path / "tiny.deb")], check=True, capture_output=True)
    found = dict(formats.members(tmp_path / "tiny.deb", lambda name: name.endswith(".ogg")))
    assert found == {"usr/share/tiny/a.ogg": b"sound" * 1000}
    (tmp_path / "bad.deb").write_bytes(b"nothing")
    with pytest.raises(FetchError, match=r"bad\.deb"):
        list(formats.members(tmp_path / "bad.deb", lambda name: True))


@pytest.mark.parametrize("name", ["../up.txt", "/abs.txt", "a/../../b"])
def test_members_that_would_leave_the_folder_are_refused(tmp_path, name):
    with pytest.raises(FetchError, match="unsafe"):
        list(formats.members(tgz(tmp_path / "x.tgz", {name: b"x"}), lambda name: True))


def test_damaged_archive_is_a_one_line_error(tmp_path):
    path = tgz(tmp_path / "x.tgz", {"a": b"a" * 5000})
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(FetchError, match="damaged"):
        list(formats.members(path, lambda name: True))


def test_licence_is_that_of_the_last_matching_rule():
    text = (
        "Format: x\n\nFiles: *\nCopyright: a\nLicense: GPL-3+\n\n"
        "Files: pics/fish1.jpg\n       pics/fish2.png\nCopyright: b\nLicense: CC-BY-2.0\n\nLicense: GPL-3+\n text\n"
    )
    rules = formats.copyright_rules(text)
    assert formats.licence_of(rules, "pics/fish2.webp", "none") == "CC-BY-2.0"
    assert formats.licence_of(rules, "pics/fish3.webp", "none") == "GPL-3+"
    assert formats.licence_of([], "pics/fish3.webp", "none") == "none"
    assert formats.copyright_rules("This package was debianized by A.\n\nCopyright: GPL\n") == []


def test_lua_dialogue_pairs_lines_with_their_translation():
    text = (
        '-- dialogId("no", "f", "comment")\n'
        'dialogId("a-1", "font_big", "He said \\"no\\".")\ndialogStr("Řekl \\"ne\\".")\n\n'
        'dialogId("a-2", "font_small", "Not translated.")\n'
    )
    assert formats.lua_dialogue(text) == {
        "a-1": ("font_big", 'He said "no".', 'Řekl "ne".'),
        "a-2": ("font_small", "Not translated.", None),
    }


def test_prompt_list_leaves_tones_without_words():
    text = "\ufeff; a comment: here\n\nbeep: [a tone]\ndigits/1: one: two\nboth: Hello [click]  there\n"
    assert formats.prompt_list(text) == {"beep": None, "digits/1": "one: two", "both": "Hello there"}


def test_g722_is_decoded_at_16_khz(tmp_path):
    pytest.importorskip("av")
    (tmp_path / "a.g722").write_bytes(bytes([0xFA]) * 8000)  # 64 kbit/s: 8,000 bytes are one second
    samples, rate = formats.read_sound(tmp_path / "a.g722")
    assert (rate, samples.dtype) == (16000, np.float32)
    assert abs(len(samples) - 16000) <= 64


# ---- splits and the table ----


def test_splits_depend_on_the_name_only():
    assert sources.share("mmtok") == pytest.approx(0.51179, abs=1e-5)  # pinned: a change would move test files
    splits = [sources.split_of(f"set/{number}.png") for number in range(4000)]
    assert set(splits) == {"train", "val"}
    assert 0.04 < splits.count("val") / 4000 < 0.06


def test_stamp_versions_share_a_split(tmp_path):
    folder = tmp_path / "tuxpaint-stamps-default" / sources.TUX
    folder.mkdir(parents=True)
    for number in range(150):
        for ending in ("", "_mirror", "_2"):
            (folder / f"thing{chr(97 + number % 26)}{'x' * (number // 26)}{ending}.png").touch()
    source = next(source for source in SOURCES if source.name == "tuxpaint")
    by_stem = {}
    for item in sources.pick_tux_images(source, tmp_path):
        by_stem.setdefault(item.file.stem.split("_")[0], set()).add(item.split)
    assert all(len(splits) == 1 for splits in by_stem.values())
    assert {"train", "test_toon"} <= set.union(*by_stem.values())


def test_table_is_pinned_and_names_no_address_or_machine_path():
    assert len({source.name for source in SOURCES}) == len(SOURCES)
    for archive in (archive for source in SOURCES for archive in source.archives):
        if archive.client == "apt":
            assert archive.version is None
        else:
            assert archive.version
            assert re.fullmatch(r"[0-9a-f]{64}", archive.sha256)
    for path in [RECIPES / "fetch_data.py", *(RECIPES / "fetching").glob("*.py")]:
        assert not re.search(r"https?://|index-url|/(work|home|root|tmp)/", path.read_text("utf-8")), path


def test_choose():
    assert not any(source.optional for source in fetch_data.choose(None))
    assert [source.name for source in fetch_data.choose(["mvtb-data"])] == ["mvtb"]
    assert {source.modality for source in fetch_data.choose(["music"])} == {"music"}
    with pytest.raises(FetchError, match="nosuch"):
        fetch_data.choose(["nosuch"])


# ---- clients ----


def test_missing_client_is_named():
    with pytest.raises(FetchError, match="no-such-client"):
        clients.run_client(["no-such-client", "x"])


def test_failing_client_gives_one_line():
    with pytest.raises(FetchError) as caught:
        clients.run_client([sys.executable, "-c", "import sys; sys.exit('ERROR: no such package\\nmore')"])
    assert "no such package" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_apt_index_is_refreshed_once(monkeypatch):
    calls = []

    def answer(command, cwd=None):
        calls.append(command[:2])
        return "Package: a\nVersion: 1:2-3\nSHA256: abc\n" if ["apt-get", "update"] in calls else ""

    monkeypatch.setattr(clients, "run_client", answer)
    assert clients.apt_index("a")["Version"] == "1:2-3"
    assert calls == [["apt-cache", "show"], ["apt-get", "update"], ["apt-cache", "show"]]


def test_checksum_mismatch_removes_the_file(tmp_path, monkeypatch):
    def download(archive, version, folder):
        return tgz(folder / "other.tgz", {"a": b"a"})

    monkeypatch.setattr(clients, "download", download)
    with pytest.raises(FetchError, match="checksum mismatch for `toy`"):
        clients.obtain(Archive("npm", "toy", 1, "1.0", "0" * 64), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


# ---- whole runs ----


def pick_all(source, work):
    for path, relative in sources.files(work, "toy", r"\.(png|wav)$"):
        yield Item(path, relative, "photo", sources.split_of(relative), "a caption", language="xx", speaker="someone")


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A one-package table; returns (output folder, source, list of downloads)."""
    files = {f"package/{number}.png": picture(number) for number in range(6)}
    files |= {"package/same.png": files["package/0.png"], "package/small.png": picture(9, 60)}
    files |= {"package/clear.png": picture(10, alpha=0), "package/broken.png": b"not a picture"}
    files |= {"package/LICENSE": b"MIT", "package/list.txt.gz": gzip.compress(b"a: b")}
    archive_file = tgz(tmp_path / "toy.tgz", files)
    archive = Archive("npm", "toy", 0.1, "1.0", clients.sha256_of(archive_file))
    downloads = []

    def download(archive, version, folder):
        downloads.append(archive.name)
        return Path(shutil.copy(archive_file, folder))

    source = Source("toy", "images", "toys", "MIT", (archive,), r"\.png$|\.txt\.gz$", pick_all)
    monkeypatch.setattr(clients, "download", download)
    monkeypatch.setattr(fetch_data, "SOURCES", (source,))
    return tmp_path / "data", source, downloads


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_run_writes_rows_files_and_attribution(toy, capsys):
    out, _, downloads = toy
    assert fetch_data.main(["--out", str(out)]) == 0
    rows = read_rows(out / "images.jsonl")
    assert len(rows) == 6
    assert set(rows[0]) == {"path", "package", "licence", "kind", "split", "text", "width", "height"}
    for row in rows:
        with Image.open(out / row["path"]) as image:
            assert image.size == (row["width"], row["height"]) == (240, 240)
    marker = json.loads((out / ".done/toy.json").read_text())
    assert marker["dropped"] == {"unreadable": 1, "not opaque": 1, "duplicate": 1, "too small": 1}
    assert marker["packages"][0]["sha256"] in (out / "ATTRIBUTION.md").read_text()
    assert (out / "licences/toy/LICENSE").read_text() == "MIT"
    assert (out / ".gitignore").read_text() == "*\n"
    assert not (out / ".archives").exists()
    assert fetch_data.main(["--out", str(out)]) == 0  # finished: nothing is downloaded again
    assert downloads == ["toy"]
    assert "1 were there already" in capsys.readouterr().out


def test_killed_run_goes_on(toy, monkeypatch):
    out, _, downloads = toy
    measured = []
    whole = fetch_data.measure_image

    def killed(item, coloured=False):
        measured.append(item)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return whole(item, coloured)

    monkeypatch.setattr(fetch_data, "measure_image", killed)
    assert fetch_data.main(["--out", str(out)]) == 130
    assert not (out / ".done").exists()
    assert not (out / "images").exists()  # a half-filled set never shows
    monkeypatch.setattr(fetch_data, "measure_image", whole)
    assert fetch_data.main(["--out", str(out)]) == 0
    assert len(read_rows(out / "images.jsonl")) == 6
    assert downloads == ["toy"]  # the archive of the killed run was whole and is used


def test_new_revision_and_lost_files_are_redone(toy, monkeypatch):
    out, source, downloads = toy
    assert fetch_data.main(["--out", str(out)]) == 0
    shutil.rmtree(out / "images")
    assert fetch_data.finished(source, out) is None
    assert fetch_data.main(["--out", str(out)]) == 0
    newer = Source(**{**vars(source), "revision": 2})
    monkeypatch.setattr(fetch_data, "SOURCES", (newer,))
    assert fetch_data.main(["--out", str(out)]) == 0
    assert downloads == ["toy"] * 3


def test_failed_set_does_not_stop_the_others(toy, monkeypatch, capsys):
    out, source, _ = toy
    bad = Source("bad", "images", "x", "MIT", (Archive("npm", "bad", 0.1, "1", "0" * 64),), r"png", pick_all)
    monkeypatch.setattr(fetch_data, "SOURCES", (bad, source))
    assert fetch_data.main(["--out", str(out)]) == 1
    assert "error: bad: checksum mismatch" in capsys.readouterr().err
    assert len(read_rows(out / "images.jsonl")) == 6


def test_full_disk_is_said_before_anything_is_downloaded(toy, monkeypatch, capsys):
    out, _, downloads = toy
    monkeypatch.setattr(fetch_data.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    assert fetch_data.main(["--out", str(out)]) == 1
    assert "free some room" in capsys.readouterr().err
    assert downloads == []


def test_second_run_in_the_same_folder_is_refused(toy, capsys):
    import fcntl

    out, _, _ = toy
    out.mkdir()
    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert fetch_data.main(["--out", str(out)]) == 1
    assert "another run" in capsys.readouterr().err


def test_speech_is_measured_and_converted(tmp_path):
    import soundfile

    tone = np.sin(np.arange(16000) * 0.1).astype(np.float32) * 0.3
    cases = {"good": tone, "short": tone[:3000], "silent": tone * 0}
    items = []
    for name, samples in cases.items():
        path = tmp_path / f"{name}.wav"
        soundfile.write(path, samples, 16000)
        items.append(Item(path, f"{name}.wav", "speech", "train", "words", None, "xx", "someone"))
    source = Source("s", "speech", "x", "MIT", (Archive("apt", "s", 1),), "", pick_all, synthesis=True)
    rows, dropped = fetch_data.store(source, items, tmp_path / "made", lambda: None)
    assert dropped == {"too short": 1, "silent": 1}
    assert rows == [
        {
            "path": "speech/s/good.flac",
            "package": "s",
            "licence": "MIT",
            "language": "xx",
            "speaker": "someone",
            "split": "train",
            "text": "words",
            "seconds": 1.0,
        }
    ]
    assert soundfile.info(tmp_path / "made/good.flac").samplerate == 16000


def test_training_copies_of_test_pictures_are_left_out(tmp_path):
    rows = []
    for name, split, size in (
        ("a", "test_photo", 240),
        ("a", "train", 300),
        ("b", "train", 240),
        ("a", "test_style", 240),
    ):
        path = tmp_path / f"{name}{split}{size}.png"
        path.write_bytes(picture(ord(name), size))
        rows.append({"split": split, **fetch_data.measure_image(Item(path, path.name, "photo", split))})
    kept, copies = fetch_data.without_copies(rows)
    assert copies == 1
    assert [row["split"] for row in kept] == ["test_photo", "train", "test_style"]
    assert "look" not in kept[0]


def test_colour_is_asked_for_where_a_set_wants_it(tmp_path):
    path = tmp_path / "line.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (120, 120), dtype=np.uint8)).save(path)
    assert fetch_data.measure_image(Item(path, "line.png", "art", "train"))["width"] == 120
    with pytest.raises(fetch_data.RejectedError, match="gray"):
        fetch_data.measure_image(Item(path, "line.png", "art", "train"), coloured=True)


def test_smoke_and_list_need_no_network(tmp_path):
    for arguments in (["--smoke", "--out", str(tmp_path)], ["--list"]):
        done = subprocess.run(
            [sys.executable, str(RECIPES / "fetch_data.py"), *arguments], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "smoke/images.jsonl").exists()
    assert not (tmp_path / "images.jsonl").exists()
