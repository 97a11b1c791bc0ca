"""Test sets: what is taken is what the protocol says, the same everywhere; named sets are those of the model cards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from mmtok.bench.named_sets import NAMED
from mmtok.bench.sets import Settings, load_set
from mmtok.data.audio import read_audio, resample
from mmtok.data.images import read_image, write_image

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data"
fetched = pytest.mark.skipif(not (DATA / "images.jsonl").is_file(), reason="the fetched data is not in git")


def picture(path: Path, size: tuple[int, int] = (40, 30), seed: int = 0, alpha: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 4 if alpha else 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def sound(path: Path, seconds: float = 1.0, rate: int = 16000, channels: int = 1, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, (round(seconds * rate), channels))
    soundfile.write(path, noise, rate, subtype="PCM_16")
    return path


def test_a_folder_gives_its_pictures_in_order_with_texts_and_names_what_it_cannot_read(tmp_path: Path):
    for i, name in enumerate(("b.png", "a.png", "deep/c.png", ".hidden/d.png", "e.png")):
        picture(tmp_path / name, seed=i, alpha=name == "e.png")
    (tmp_path / "a.txt").write_text("a cat\non a mat\n")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "notes.md").write_text("x")
    found = load_set(tmp_path)
    assert [item.key for item in found.items] == ["a.png", "b.png", "deep/c.png", "e.png"]
    assert found.name == tmp_path.name and found.modality == "image"
    assert [item.text for item in found.items] == ["a cat on a mat", None, None, None]
    assert torch.equal(found.items[0].x, read_image(tmp_path / "a.png"))
    rgba = read_image(tmp_path / "e.png")
    white = rgba[:3] * rgba[3:] + (1 - rgba[3:])
    x = found.items[3].x
    assert x.shape == (3, 40, 30) and float((x - white).abs().max()) <= 0.5 / 255 + 1e-6
    assert torch.equal(x, (x * 255).round() / 255)  # 8-bit values
    assert [b["item"] for b in found.bad_files] == ["broken.png"] and "not a readable image" in found.bad_files[0][
        "reason"
    ]
    assert (found.protocol["count"], found.protocol["left_out"]) == (4, 1)
    assert found.protocol["size"] == "40 x 30" and found.protocol["crop"] == found.protocol["resize"] == "none"
    assert found.protocol["licences"] == ["not stated"] and found.protocol["split"] == "none"


def test_the_fingerprint_follows_contents_names_and_texts(tmp_path: Path):
    for i in range(3):
        picture(tmp_path / f"{i}.png", seed=i)
    first = load_set(tmp_path).protocol["fingerprint"]
    assert load_set(tmp_path).protocol["fingerprint"] == first
    moved = tmp_path.parent / "elsewhere"
    tmp_path.rename(moved)
    assert load_set(moved).protocol["fingerprint"] == first  # the place is not part of it
    assert load_set(moved, settings=Settings(crop="center", size=8)).protocol["fingerprint"] != first
    (moved / "1.txt").write_text("words")
    with_text = load_set(moved).protocol["fingerprint"]
    picture(moved / "2.png", seed=9)
    assert len({first, with_text, load_set(moved).protocol["fingerprint"]}) == 3


def test_every_nth_is_taken_and_said(tmp_path: Path):
    for i in range(10):
        picture(tmp_path / f"{i}.png", (8, 8), i)
    found = load_set(tmp_path, settings=Settings(items=3))
    assert [item.key for item in found.items] == ["0.png", "3.png", "6.png"]
    assert found.protocol["selection"] == "every 3. of 10, files sorted by path, first 3"
    assert load_set(tmp_path).protocol["selection"] == "all, files sorted by path"


def test_crop_and_resize_are_what_they_say(tmp_path: Path):
    path = picture(tmp_path / "a.png", (60, 40))
    whole = read_image(path)
    centre = load_set(path, settings=Settings(crop="center", size=20)).items[0].x
    assert torch.equal(centre, whole[:, 20:40, 10:30])
    crops = [load_set(path, settings=Settings(crop="random", size=20, seed=s)).items[0].x for s in (0, 0, 1)]
    assert torch.equal(crops[0], crops[1]) and not torch.equal(crops[0], crops[2])
    windows = whole.unfold(1, 20, 1).unfold(2, 20, 1)  # (3, rows, columns, 20, 20)
    assert bool((windows == crops[0][:, None, None]).all(-1).all(-1).all(0).any())
    small = load_set(path, settings=Settings(resize=20, crop="center", size=20))
    assert small.items[0].x.shape == (3, 20, 20)
    assert small.protocol["resize"] == "shorter side 20 px, antialiased bicubic"
    assert small.protocol["crop"] == "center 20 px"
    with pytest.raises(ValueError, match="expected at least 64 x 64 px for the crop, got 60 x 40; give resize too"):
        load_set(path, settings=Settings(crop="center", size=64))


def test_sounds_keep_their_rate_unless_told(tmp_path: Path):
    sound(tmp_path / "a.wav", 0.5, 16000, 2)
    sound(tmp_path / "b.wav", 0.3, 24000, 1, seed=1)
    own = load_set(str(tmp_path / "*.wav"))
    assert [(i.sample_rate, tuple(i.x.shape)) for i in own.items] == [(16000, (2, 8000)), (24000, (1, 7200))]
    assert own.protocol["sample_rate"] == [16000, 24000] and own.protocol["channels"] == [1, 2]
    assert own.protocol["resampler"] == "none" and own.protocol["seconds"] == pytest.approx(0.8)
    assert own.name == tmp_path.name
    alike = load_set(tmp_path, settings=Settings(seconds=0.25, sample_rate=8000, mono=True))
    assert [(i.sample_rate, tuple(i.x.shape)) for i in alike.items] == [(8000, (1, 2000))] * 2
    raw, rate = read_audio(tmp_path / "a.wav")
    assert torch.equal(alike.items[0].x, resample(raw[:, :4000].mean(0, keepdim=True), rate, 8000))
    assert alike.protocol["resampler"].startswith("torchaudio sinc_interp_kaiser, 64 zero crossings")
    assert alike.protocol["sample_rate"] == 8000 and alike.protocol["cut"] == "first 0.25 s"


def test_a_list_gives_splits_texts_and_labels(tmp_path: Path):
    rows = []
    for i, split in enumerate(("train", "test", "test", "val")):
        sound(tmp_path / f"s/{i}.wav", seed=i)
        row = {"path": f"s/{i}.wav", "split": split, "text": f"words {i}", "speaker": f"v{i % 2}", "language": "en"}
        rows.append(row | {"package": "p", "licence": "CC0", "kind": None})
    (tmp_path / "sounds.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = load_set(tmp_path)
    assert [i.key for i in found.items] == ["s/1.wav", "s/2.wav"] and found.items[0].text == "words 1"
    labels = {"speaker": "v1", "language": "en", "package": "p", "licence": "CC0"}
    assert dict(found.items[0].labels) == labels
    assert found.protocol["split"] == "test" and found.protocol["licences"] == ["CC0"]
    train = load_set(tmp_path / "sounds.jsonl", settings=Settings(split="train"))
    assert [i.key for i in train.items] == ["s/0.wav"] and train.protocol["split"] == "train"
    with pytest.raises(ValueError, match=r"no split 'dev': expected one of \['test', 'train', 'val'\]"):
        load_set(tmp_path, settings=Settings(split="dev"))
    named = load_set("sounds", tmp_path)
    assert [i.key for i in named.items] == ["s/1.wav", "s/2.wav"] and named.protocol["cut"] == "first 10 s"
    with pytest.raises(FileNotFoundError, match=r"no list of files at .*music\.jsonl"):
        load_set("music", tmp_path)


def test_a_folder_of_both_kinds_asks_which(tmp_path: Path):
    picture(tmp_path / "a.png")
    sound(tmp_path / "b.wav")
    with pytest.raises(ValueError, match="expected files of one kind, got 1 pictures and 1 sounds"):
        load_set(tmp_path)
    assert load_set(tmp_path, settings=Settings(modality="audio")).items[0].key == "b.wav"
    (tmp_path / "images.jsonl").write_text('{"path": "a.png", "split": "test"}\n')
    (tmp_path / "speech.jsonl").write_text('{"path": "b.wav", "split": "test"}\n')
    with pytest.raises(ValueError, match=r"expected one list in that folder, got 2; name one of .*images\.jsonl"):
        load_set(tmp_path)
    assert load_set(tmp_path / "images.jsonl").modality == "image"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": 0}, "items: expected 1 or more, got 0"),
        ({"crop": "left", "size": 3}, "crop: expected one of"),
        ({"crop": "center"}, "crop and size: expected both or neither"),
        ({"seconds": 0}, "seconds: expected more than 0"),
        ({"sample_rate": 5}, "sample_rate: expected whole Hz"),
        ({"modality": "video"}, "modality: expected image or audio"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        Settings(**change)


def test_nothing_to_read_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match="expected files of one kind, got 0 pictures and 0 sounds"):
        load_set(tmp_path)
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(
        ValueError, match=r"expected at least one readable item, got none of 1 files; the first: a\.png"
    ):
        load_set(tmp_path)
    with pytest.raises(ValueError, match=r"nowhere: expected one of .*builtin-image.*, or a folder, file or glob"):
        load_set("nowhere")
    with pytest.raises(FileNotFoundError, match="photos: it is cut from fetched data; give the data folder"):
        load_set("photos")
    with pytest.raises(ValueError, match="builtin-image: its protocol is fixed, resize was given"):
        load_set("builtin-image", settings=Settings(resize=64))


def test_what_ships_needs_no_data():
    tiles = load_set("builtin-image")
    photo = read_image(ROOT / "mmtok/assets/chelsea.jpg")
    assert len(tiles.items) == 6 and {tuple(i.x.shape) for i in tiles.items} == {(3, 128, 128)}
    assert torch.equal(tiles.items[4].x, photo[:, 128:256, 128:256])
    spoken = load_set("builtin-audio")
    item = spoken.items[0]
    assert item.sample_rate == 16000 and item.text is not None and item.text.startswith("unless to be rather cold")
    transcript = (ROOT / "mmtok/assets/ATTRIBUTION.md").read_text()
    assert item.text in transcript
    assert all(entry.modality in ("image", "audio") and "\n" not in entry.about for entry in NAMED.values())


# --- the protocols of the model cards --------------------------------------------------------------------------------


@pytest.fixture
def small_data(tmp_path: Path) -> Path:
    """A data folder like the fetched one, with pictures and sounds of noise."""
    rows = []
    sizes = [(200, 150), (140, 130), (100, 300), (500, 400)]
    for i, (split, kind) in enumerate([("test_photo", "photo")] * 4 + [("test_toon", "stamp")] * 2):
        path = picture(tmp_path / f"images/{i}.png", sizes[i % 4], i, alpha=kind == "stamp")
        rows.append({"path": path.relative_to(tmp_path).as_posix(), "split": split, "kind": kind, "text": f"thing {i}"})
    for i in range(40):
        path = picture(tmp_path / f"images/c{i}.png", (20 + i, 50), i, alpha=True)
        row = {"path": path.relative_to(tmp_path).as_posix(), "split": "train", "kind": "emoji", "text": f"caption {i}"}
        rows.append(row)
    (tmp_path / "images.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    rows = []
    for i in range(6):
        path = sound(tmp_path / f"speech/{i}.wav", 1 + i % 3, (16000, 22050)[i % 2], 1 + i % 2, seed=i)
        package = "asterisk-core-sounds-en-g722" if i < 5 else "pocketsphinx-testdata"
        row = {"path": path.relative_to(tmp_path).as_posix(), "split": "test", "package": package, "text": f"word {i}"}
        rows.append(row | {"speaker": "s"})
    (tmp_path / "speech.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory):
    """`recipes/imaging/pictures.py`, which cuts the crops and squares of the claims by itself, into caches."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))
    from imaging import pictures as module

    return module


def same(found, expected) -> None:
    assert len(found.items) == len(expected)
    for item, x in zip(found.items, expected, strict=True):
        assert torch.equal(item.reference, x)


def test_named_sets_are_the_held_out_pictures_of_the_claims(small_data: Path, pictures):
    cache = Path("cache")
    crops = pictures.held_out_crops(small_data, cache, "test_photo", 64, per_picture=4)
    same(load_set("crops-64", small_data), list(crops))
    captioned = pictures.captioned_pictures(small_data, cache, 64)
    rows = captioned.rows("test")
    found = load_set("captioned", small_data)
    same(found, list(captioned.images(rows, 64)))
    assert [i.text for i in found.items] == [captioned.captions()[i] for i in rows]
    assert {tuple(i.x.shape) for i in found.items} == {(3, 224, 224)}


def test_a_bad_picture_draws_no_crop(small_data: Path):
    whole = load_set("photos", small_data)
    (small_data / "images/1.png").write_bytes(b"x")
    found = load_set("photos", small_data)
    assert [b["item"] for b in found.bad_files] == ["images/1.png"] and found.protocol["left_out"] == 1
    assert [i.key for i in found.items] == [f"images/{i}.png#0" for i in (0, 2, 3)]
    assert torch.equal(found.items[0].x, whole.items[0].x)
    assert [i.key for i in load_set("photos", small_data, Settings(items=2)).items] == [
        "images/0.png#0",
        "images/2.png#0",
    ]


@fetched
def test_the_fetched_speech_is_all_there():
    found = load_set("speech", DATA)
    assert len(found.items) == 45 and found.protocol["left_out"] == 0 and found.protocol["texts"] == 45


def test_items_are_read_when_they_are_asked_for(tmp_path: Path):
    path = tmp_path / "a.png"
    write_image(path, torch.zeros(3, 8, 8))
    found = load_set(tmp_path)
    write_image(path, torch.ones(3, 8, 8))
    assert float(found.items[0].x.min()) == 1.0 and len(found.items[:1]) == 1
