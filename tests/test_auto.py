"""Loading by name, folder and hub; every damaged checkpoint is refused with what is wrong and what to do."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

import mmtok
from mmtok import auto
from mmtok.audio.codec import AudioCodec
from mmtok.image.binary1d import Binary1D
from mmtok.quantizers.codebook import Codebook
from mmtok.tokenizer import CheckpointError, Tokenizer

NAMES = ["audio-codec-tiny", "image-binary1d-tiny"]


def tiny_audio() -> AudioCodec:
    torch.manual_seed(0)
    codec = AudioCodec(
        strides=(4, 5),
        encoder_width=2,
        decoder_width=8,
        latent_dim=4,
        num_codebooks=2,
        codebook_size=64,
        dilations=(1,),
    )
    codec.train()(torch.randn(8, 1, 2000))
    return codec.eval()


def tiny_image() -> Binary1D:
    torch.manual_seed(0)
    return Binary1D(
        num_tokens=4,
        num_bits=8,
        patch_size=4,
        encoder=(16, 1, 0),
        decoder=(16, 1, 1),
        head_dim=16,
        axes_dims=(4, 6, 6),
        quantizer={"bits_per_code": 4},
    ).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    for name, build in zip(NAMES, (tiny_audio, tiny_image), strict=True):
        tok: Tokenizer = build()
        tok.name = name
        tok.save(root / name)
    (root / NAMES[0] / "README.md").write_text("# A card\n")
    (root / "notes").mkdir()
    return root


@pytest.fixture
def shipped(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may damage."""
    root = tmp_path / "checkpoints"
    shutil.copytree(saved, root)
    monkeypatch.setattr(auto, "shipped_folder", lambda: root)
    return root


def test_names(shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert mmtok.available() == NAMES
    assert mmtok.available("audio*") == NAMES[:1] and mmtok.available("video*") == []
    monkeypatch.setattr(auto, "shipped_folder", lambda: tmp_path / "none")
    assert mmtok.available() == []


def test_the_shipped_folder_is_in_the_package_or_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(auto, "__file__", str(tmp_path / "mmtok" / "auto.py"))
    assert auto.shipped_folder() == tmp_path / "checkpoints"
    (tmp_path / "mmtok" / "checkpoints").mkdir(parents=True)
    assert auto.shipped_folder() == tmp_path / "mmtok" / "checkpoints"


def test_cards(shipped: Path):
    card = mmtok.card(NAMES[0])
    assert card["name"] == NAMES[0] and card["type"] == "codec" and card["modality"] == "audio"
    assert card["codebook_sizes"] == [64, 64] and card["num_codebooks"] == 2 and card["bits_per_position"] == 12
    assert card["frame_rate"] == 800 and card["bitrate_bps"] == 9600 and card["readme"] == "# A card\n"
    assert card["checkpoint_bytes"] == (shipped / NAMES[0] / "model.safetensors").stat().st_size
    assert card["fingerprint"] == mmtok.load(NAMES[0]).fingerprint and card["config"]["latent_dim"] == 4
    card = mmtok.card(str(shipped / NAMES[1]))  # a folder does as well
    assert card["num_tokens"] == 4 and card["bits_per_image"] == 32 and card["bytes_per_image"] == 4
    assert card["readme"] == "" and "bitrate_bps" not in card
    json.dumps(card)
    with pytest.raises(ValueError, match="unknown tokenizer 'x'"):
        mmtok.card("x")


def test_names_and_folders_load_the_same(shipped: Path):
    by_name, by_folder, by_text = (mmtok.load(n) for n in (NAMES[1], shipped / NAMES[1], str(shipped / NAMES[1])))
    assert by_name.spec == by_folder.spec == by_text.spec and by_name.name == NAMES[1] and not by_name.training
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(by_name.encode(x).codes, by_folder.encode(x).codes)


def test_unknown_names_get_a_hint(shipped: Path):
    with pytest.raises(ValueError, match="unknown tokenizer 'audio-codec-tine': did you mean 'audio-codec-tiny'") as e:
        mmtok.load("audio-codec-tine")
    assert "hf:org/repo" in str(e.value) and NAMES[1] in str(e.value)
    with pytest.raises(ValueError, match="unknown tokenizer 'zzz': expected one of"):
        mmtok.load("zzz")


@pytest.mark.parametrize("file", auto.FILES)
def test_missing_files(shipped: Path, file: str):
    (shipped / NAMES[0] / file).unlink()
    with pytest.raises(CheckpointError, match=f"is no checkpoint: {file} is missing; expected config"):
        mmtok.load(shipped / NAMES[0])
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        mmtok.load(shipped / "notes")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "7", "{}", '{"format": "mmtok-checkpoint-1"}', '{"format": "mmtok-checkpoint-9"}', "\xff"],
)
def test_damaged_configs(shipped: Path, text: str):
    (shipped / NAMES[0] / "config.json").write_bytes(text.encode("latin-1"))
    for read in (mmtok.load, mmtok.card):
        with pytest.raises(CheckpointError, match=r"is damaged|expected format 'mmtok-checkpoint-1'"):
            read(str(shipped / NAMES[0]))


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    for path, value in changes.items():
        place = config
        *parents, last = path.split("__")
        for parent in parents:
            place = place[parent]
        place[last] = value
    (folder / "config.json").write_text(json.dumps(config))


def test_changed_configs(shipped: Path):
    folder = shipped / NAMES[0]
    original = (folder / "config.json").read_text()
    change_config(folder, type="mystery")
    with pytest.raises(ValueError, match=r"unknown type 'mystery'; expected one of \['binary1d', .*'codec'"):
        mmtok.load(folder)
    (folder / "config.json").write_text(original)
    for value in ("os:system", 3, ["codec"]):  # never a path into other modules
        change_config(folder, type=value)
        with pytest.raises(ValueError, match="unknown type" if isinstance(value, str) else "is damaged"):
            mmtok.load(folder)
    (folder / "config.json").write_text(original)
    for change in (
        {"config__causal": True},
        {"config__latent_dim": 10**12},
        {"config__strides": [0, 5]},
        {"config__new": 1},
        {"spec__fingerprint": "0" * 16},
    ):
        change_config(folder, **change)
        with pytest.raises(CheckpointError, match=r"expected fingerprint [0-9a-f]{16}, got [0-9a-f]{16}"):
            mmtok.load(folder)
        (folder / "config.json").write_text(original)
    for change in (
        {"spec__codebook_sizes": []},
        {"spec__modality": "x"},
        {"spec__extra": 1},
        {"spec": 3},
        {"config": []},
    ):
        change_config(folder, **change)
        with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
            mmtok.load(folder)
        (folder / "config.json").write_text(original)
    assert mmtok.load(folder).name == NAMES[0]


def resign(folder: Path) -> None:
    """Give a changed checkpoint a valid fingerprint, as another version of the code would have written it."""
    config = json.loads((folder / "config.json").read_text())
    found = auto.fingerprint_of(config["type"], config["config"], load_file(folder / "model.safetensors"))
    change_config(folder, spec__fingerprint=found)


def test_checkpoints_of_another_version_of_the_class(shipped: Path):
    folder = shipped / NAMES[0]
    originals = {f: (folder / f).read_bytes() for f in auto.FILES}
    for change in (
        {"config__new": 1},
        {"config__strides": [0, 5]},
        {"config__latent_dim": -4},
        {"config__latent_dim": 8},
    ):
        change_config(folder, **change)
        resign(folder)
        with pytest.raises(CheckpointError, match=r"do not fit AudioCodec: .*restore the files"):
            mmtok.load(folder)
        (folder / "config.json").write_bytes(originals["config.json"])
    weights = load_file(folder / "model.safetensors")
    key = next(iter(weights))
    for changed in ({k: v for k, v in weights.items() if k != key}, {**weights, "surplus": torch.zeros(1)}):
        save_file(changed, folder / "model.safetensors")
        resign(folder)
        with pytest.raises(CheckpointError, match=r"missing weights \[.*unexpected \["):
            mmtok.load(folder)
        for f, data in originals.items():
            (folder / f).write_bytes(data)


@pytest.mark.parametrize("name", NAMES)
def test_damaged_weights(shipped: Path, name: str):
    path = shipped / name / "model.safetensors"
    data = path.read_bytes()
    for broken in (b"", data[:7], data[: len(data) // 2], data[:-1], b"not weights" * 9):
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged .*restore the file"):
            mmtok.load(name)
    for i in (len(data) - 1, len(data) - 777):  # one bit of one weight
        path.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        with pytest.raises(CheckpointError, match=r"expected fingerprint [0-9a-f]{16}, got [0-9a-f]{16}"):
            mmtok.load(name)
    weights = load_file(path) if path.write_bytes(data) else {}
    key = sorted(weights)[0]
    weights[key].view(-1)[0] += 1e-3
    save_file(weights, path)
    with pytest.raises(CheckpointError, match="weights or config were changed"):
        mmtok.load(name)


def test_the_hub_cache(shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache = tmp_path / "hub"
    snapshot = cache / "models--org--tok" / "snapshots" / ("a" * 40)
    shutil.copytree(shipped / NAMES[1], snapshot)
    (cache / "models--org--tok" / "refs").mkdir()
    (cache / "models--org--tok" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert mmtok.load("hf:org/tok").spec == mmtok.load(NAMES[1]).spec
    assert mmtok.card("hf:org/tok")["folder"] == str(snapshot)
    start = time.monotonic()
    with pytest.raises(
        ValueError, match=r"hf:org/other is neither in the local cache nor reachable .*load it by its path"
    ):
        mmtok.load("hf:org/other")
    for name in ("hf:", "hf:a/b/c", "hf:org/to k", "hf:../x"):
        with pytest.raises(ValueError, match=r"expected hf:org/repo"):
            mmtok.load(name)
    assert time.monotonic() - start < 5


def test_a_loaded_codebook_learns_on(shipped: Path):
    """The checkpoint has no training statistics; with zeros the first step would overwrite nearly every code."""
    assert not [k for k in load_file(shipped / NAMES[0] / "model.safetensors") if "cluster_size" in k or "_sum" in k]
    codec = mmtok.load(NAMES[0])
    books = [m for m in codec.modules() if isinstance(m, Codebook)]
    assert len(books) == 2
    for book in books:
        assert torch.equal(book.cluster_size, torch.ones(64)) and torch.equal(book.codebook_sum, book.codebook)
    before = [b.codebook.clone() for b in books]
    codec.train()(torch.randn(1, 1, 200))  # 10 frames: most of the 64 codes stay unused
    for book, old in zip(books, before, strict=True):
        kept = (book.codebook - old).norm(dim=1) < 1e-5
        assert 50 <= int(kept.sum()) < 64  # the used ones moved a little
        assert float((book.codebook - old).norm(dim=1).max()) < 0.2 * float(old.norm(dim=1).mean())


def test_statistics_that_are_there_are_left_alone(shipped: Path):
    codec = mmtok.load(NAMES[0])
    book = next(m for m in codec.modules() if isinstance(m, Codebook))
    book.cluster_size.fill_(7)
    auto.revive_training_state(codec, [])
    assert book.cluster_size.unique().tolist() == [7]


def test_a_family_misspelt_is_named():
    for wrong, right in (("JPEG:50", "jpeg:50"), ("encodecs:a/b", "encodec:a/b"), ("x-codec2:a/b", "xcodec2:a/b")):
        with pytest.raises(ValueError, match=f"did you mean '{right}'"):
            mmtok.load(wrong)


def test_installed_packages_add_families(monkeypatch):
    """By an entry point; a name of mmtok's own cannot be taken."""
    import importlib.metadata

    entries = importlib.metadata.EntryPoints(
        importlib.metadata.EntryPoint(name, "mmtok.wrappers.classical_images:WEBP", "mmtok.families")
        for name in ("theirs", "jpeg")
    )
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: entries)
    assert mmtok.families("theirs")["theirs"].name == "webp" and mmtok.families()["jpeg"].name == "jpeg"
    assert mmtok.load("theirs:50").spec.name == "webp:50"
