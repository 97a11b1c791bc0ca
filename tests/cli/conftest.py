"""A folder of two shipped checkpoints for the commands to find, a photo and a clip."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_tokenizers import TinyAudio, TinyImage

from mmtok import auto


@pytest.fixture(autouse=True)
def shipped(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two saved tokenizers are all that is shipped; returns their folder."""
    root = tmp_path_factory.mktemp("shipped")
    monkeypatch.setattr(auto, "shipped_folder", lambda: root)
    for name, cls in (("audio-tiny-16k", TinyAudio), ("image-tiny-8b", TinyImage)):
        monkeypatch.setitem(auto.TOKENIZERS, cls.type_name, f"{cls.__module__}:{cls.__name__}")
        tokenizer = cls()
        tokenizer.name = name
        tokenizer.save(root / name)
    (root / "image-tiny-8b" / "README.md").write_text("# The card of the tiny one\n")
    x = torch.linspace(0, 1, 3 * 8 * 8).reshape(1, 3, 8, 8)
    golden = {"x": x, "codes": TinyImage().encode(x).codes}
    save_file(golden, root / "image-tiny-8b" / "golden.safetensors")
    return root


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    y, x = np.mgrid[:31, :45]
    Image.fromarray(np.stack([y * 8, x * 5, x + y], axis=-1).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.wav"
    x = 0.4 * np.sin(2 * np.pi * 220 * np.arange(4960) / 16000)
    with wave.open(str(path), "wb") as f:
        f.setnchannels(1)
        f.setsampwidth(2)
        f.setframerate(16000)
        f.writeframes(np.rint(x * 32767).astype("<i2").tobytes())
    return path
