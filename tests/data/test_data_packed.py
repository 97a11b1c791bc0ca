"""Packed training data: read once, reused, and batches that are a pure function of seed, index and rank."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mmtok.data.audio import write_audio
from mmtok.data.images import write_image
from mmtok.data.packed import AudioBatches, ImageBatches, audio_reader, image_reader, pack, random_crop


def pictures(folder: Path, count: int = 4) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{i}.png" for i in range(count)]
    for i, p in enumerate(paths):
        write_image(p, torch.rand(3, 20 + i, 30, generator=torch.Generator().manual_seed(i)))
    return paths


def test_a_second_call_reads_no_file_again(tmp_path: Path):
    paths, calls = pictures(tmp_path / "in"), []

    def read(path: Path) -> np.ndarray:
        calls.append(path)
        return image_reader(64)(path)

    first = pack(paths, tmp_path / "cache", read)
    again = pack(paths, tmp_path / "cache", read)
    assert len(calls) == 4 and len(first) == len(again) == 4
    for i, p in enumerate(paths):
        want = image_reader(64)(p)
        assert want.shape == (20 + i, 30, 3) and want.dtype == np.uint8
        assert np.array_equal(first[i], want) and np.array_equal(again[i], want)
    assert len(pack(paths[:2], tmp_path / "cache", read)) == 2 and len(calls) == 6  # another list, another pack
    assert pack(paths, tmp_path / "cache", read, [1, 2, 3, 4]).weights.tolist() == [1, 2, 3, 4]
    assert pack(paths, tmp_path / "cache", read, np.array([1.0, 2, 3, 4])).weights.tolist() == [1, 2, 3, 4]
    assert not [p for p in (tmp_path / "cache").iterdir() if p.name.startswith(".")]  # nothing half done is left


def test_another_size_is_packed_again(tmp_path: Path):
    paths = pictures(tmp_path / "in", 1)
    assert pack(paths, tmp_path / "cache", image_reader(64))[0].shape == (20, 30, 3)
    assert pack(paths, tmp_path / "cache", image_reader(15))[0].shape == (10, 15, 3)
    assert pack(paths, tmp_path / "cache", image_reader(15))[0].shape == (10, 15, 3)


def test_a_pack_without_settings_is_still_opened(tmp_path: Path):
    """Packs written before the settings were stored."""
    paths = pictures(tmp_path / "in", 1)
    pack(paths, tmp_path / "cache", image_reader(64))
    (index,) = (tmp_path / "cache").glob("*.npz")
    table = dict(np.load(index))
    del table["settings"]
    np.savez(index, **table)
    paths[0].unlink()
    assert pack(paths, tmp_path / "cache", image_reader(64))[0].shape == (20, 30, 3)


def test_unreadable_files_are_listed(tmp_path: Path):
    paths = pictures(tmp_path / "in", 2)
    paths[0].write_text("no picture")
    paths.append(tmp_path / "none.png")
    packed = pack(paths, tmp_path / "cache", image_reader(64), [1, 2, 3])
    assert len(packed) == 1 and packed.weights.tolist() == [2]
    (failures,) = (tmp_path / "cache").glob("*.failures.json")
    listed = json.loads(failures.read_text())
    assert set(listed) == {str(paths[0]), str(paths[2])} and "not a readable image" in listed[str(paths[0])]
    with pytest.raises(ValueError, match=r"none of 1 files could be read.*not a readable image"):
        pack(paths[:1], tmp_path / "cache", image_reader(64))
    with pytest.raises(ValueError, match="none of 0 files"):
        pack([], tmp_path / "cache", image_reader(64))


def test_one_type_a_pack(tmp_path: Path):
    types = iter([np.uint8, np.int16])
    with pytest.raises(TypeError, match="the reader gave int16 after uint8"):
        pack(["a", "b"], tmp_path, lambda p: np.zeros(3, next(types)))


def test_transparency_gets_a_flat_colour_by_name(tmp_path: Path):
    colours = set()
    for i in range(12):
        write_image(tmp_path / f"{i}.png", torch.zeros(4, 2, 2))
        x = image_reader(8)(tmp_path / f"{i}.png")
        assert np.array_equal(x, image_reader(8)(tmp_path / f"{i}.png")) and (x == x[0, 0]).all()
        colours.add(tuple(x[0, 0].tolist()))
    assert (255, 255, 255) in colours and len(colours) > 3


def test_image_batches_are_a_pure_function_of_seed_index_and_rank(tmp_path: Path):
    packed = pack(pictures(tmp_path / "in"), tmp_path / "cache", image_reader(64))
    sizes = ((16, 16), (8, 24))
    batches, other = ImageBatches(packed, 3, sizes, seed=5), ImageBatches(packed, 3, sizes, seed=6)
    shapes = set()
    for index in range(8):
        x = batches(index)["x"]
        assert torch.equal(x, ImageBatches(packed, 3, sizes, seed=5)(index)["x"])
        assert x.shape == batches(index, 1)["x"].shape and not torch.equal(x, batches(index, 1)["x"])
        assert 0 <= float(x.min()) <= float(x.max()) <= 1 and x.shape[:2] == (3, 3)
        shapes.add(tuple(x.shape[2:]))
        y = other(index)["x"]
        assert y.shape != x.shape or not torch.equal(x, y)
    assert shapes == set(sizes)
    assert not torch.equal(ImageBatches(packed, 3, seed=5)(0)["x"], ImageBatches(packed, 3, seed=5)(1)["x"])


def test_weights_steer_the_sampling(tmp_path: Path):
    packed = pack(pictures(tmp_path / "in"), tmp_path / "cache", image_reader(64), [0, 0, 1, 0])
    picture = packed[2].transpose(2, 0, 1) / 255
    x = ImageBatches(packed, 8, ((4, 4),))(0)["x"]
    assert x.mean() == pytest.approx(picture.mean(), abs=0.06)
    assert packed.weights.tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (64, 64), (500, 7)])
def test_crops_of_every_shape(shape: tuple[int, int]):
    rng = np.random.default_rng(0)
    x = random_crop(np.full((*shape, 3), 128, np.uint8), (16, 24), rng)
    assert x.shape == (3, 16, 24) and torch.allclose(x, torch.tensor(128 / 255), atol=1e-5)


def clips(folder: Path) -> list[Path]:
    for name, channels, rate, L in (("a", 1, 16000, 900), ("b", 2, 8000, 1000), ("c", 1, 44100, 3000)):
        x = 0.1 * torch.randn(channels, L, generator=torch.Generator().manual_seed(L))
        write_audio(folder / f"{name}.wav", x, rate)
    return sorted(folder.glob("*.wav"))


def test_audio_batches(tmp_path: Path):
    paths = clips(tmp_path)
    packed = pack(paths, tmp_path / "cache", audio_reader(16000))
    assert [p.shape for p in (packed[0], packed[1], packed[2])] == [(900,), (2000,), (1089,)]
    assert packed.data.dtype == np.int16
    assert pack(paths, tmp_path / "cache", audio_reader(8000))[0].shape == (450,)
    packed = pack(paths, tmp_path / "cache", audio_reader(16000))
    batches = AudioBatches(packed, 4, 1500, seed=1)
    x = batches(3)["x"]
    assert x.shape == (4, 1, 1500) and torch.equal(x, AudioBatches(packed, 4, 1500, seed=1)(3)["x"])
    assert not torch.equal(x, batches(4)["x"]) and not torch.equal(x, batches(3, rank=1)["x"])
    only = AudioBatches(pack(paths[:1], tmp_path / "cache", audio_reader(16000)), 2, 1000, gain_db=(0.0, 0.0))(0)["x"]
    want = torch.from_numpy(packed[0].astype(np.float32) / 32768)
    assert torch.equal(only[0, 0, :900], want) and only[:, :, 900:].abs().max() == 0  # short clips are padded
    loud = AudioBatches(packed, 2, 500, gain_db=(60.0, 60.0))(0)["x"]
    assert loud.abs().max() == 1
