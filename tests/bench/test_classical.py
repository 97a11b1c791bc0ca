"""Rows of classical codecs: byte targets are kept, more bytes are better, what was spent and scored is said."""

import math

import pytest
import torch

from mmtok.bench.classical import ROW_CODECS, classical_image_rows, fit_image, opus_rows
from mmtok.wrappers.classical_images import encode_image, image_codec

RATE = 16000


def picture(height: int = 64, width: int = 48) -> torch.Tensor:
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    waves = 0.5 + 0.4 * torch.sin(25 * x * y + 9 * x)
    return torch.stack([x, waves, ((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.1).float()])


def voice(samples: int = 24000, rate: int = RATE) -> torch.Tensor:
    t = torch.arange(samples, dtype=torch.float64) / rate
    phase = 2 * math.pi * (120 * t + 3 * torch.sin(2 * math.pi * 1.5 * t))
    buzz = sum(torch.sin(k * phase) / k for k in range(1, 12))
    return (0.2 * buzz * (0.1 + torch.sin(2 * math.pi * 2 * t).abs())).float()[None]


@pytest.mark.parametrize("codec", ROW_CODECS)
def test_the_largest_file_within_the_target_is_found(codec):
    x = picture(32, 32)
    low, high = image_codec(codec).settings[0], image_codec(codec).settings[-1]
    # A few qualities stand for all: none of them may fit the target and yet be larger than what was found.
    sizes = [len(encode_image(x, codec, q)) for q in range(low, high + 1, 9)]
    target = sorted(sizes)[len(sizes) // 2] + 3
    quality, data = fit_image(x, codec, target)
    assert len(data) <= target and data == encode_image(x, codec, quality)
    assert len(data) >= 0.97 * max(size for size in sizes if size <= target)


def test_an_unreachable_target_gives_the_smallest_file_and_says_so():
    x = picture()
    for row in classical_image_rows([x], 10, progress=False):
        assert row["reached"] == 0 and row["bytes"] > 10 and row["target_bytes"] == 10
        assert row["bytes"] == len(fit_image(x, row["codec"], 10)[1])
        assert row["quality"] == image_codec(row["codec"]).settings[0]


def test_rows_keep_the_target_and_improve_with_bytes():
    images = [picture(), picture(40, 64)]
    small, large = (classical_image_rows(images, target, progress=False) for target in (900, 3000))
    for a, b in zip(small, large, strict=True):
        assert a["codec"] == b["codec"] and a["images"] == a["reached"] == 2
        assert a["bytes_max"] <= 900 and b["bytes_max"] <= 3000 and a["bytes"] < b["bytes"]
        assert a["psnr_db"] < b["psnr_db"] and a["ssim"] < b["ssim"] <= 1
        assert a["bpp"] == pytest.approx(8 * 2 * a["bytes"] / (64 * 48 + 40 * 64))
    assert [row["codec"] for row in small] == list(ROW_CODECS)


def test_an_exact_image_is_counted_and_not_averaged():
    flat = torch.full((3, 16, 16), 128 / 255)
    row = next(r for r in classical_image_rows([flat], 10_000, progress=False) if r["codec"] == "jpeg")
    assert row["exact"] == 1 and row["psnr_db"] is None  # infinite decibels would make every mean infinite


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: classical_image_rows([], 512), "expected at least one"),
        (lambda: classical_image_rows([picture()], 0, False), "target_bytes: expected at least 1"),
        (lambda: fit_image(picture(), "png", 50), "codec: expected one of"),
        (lambda: fit_image(picture(), "jpeg2000", 50), "codec: expected one of"),
        (lambda: classical_image_rows([picture() * 255], 512, False), r"finite values in \[0,1\]"),
    ],
)
def test_bad_image_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


pytest_av = pytest.mark.skipif(
    not __import__("importlib").util.find_spec("av"), reason="Opus needs the extra 'data' (PyAV)"
)


@pytest_av
def test_opus_rows_say_what_was_spent_and_scored():
    pytest.importorskip("pesq")
    clips = [voice(), voice(20000), torch.zeros(1, 8000)]
    low, high = (opus_rows(clips, RATE, b, frames_ms=(20,), progress=False)[0] for b in (6000, 24000))
    assert low["clips"] == 3 and low["seconds"] == 52000 / RATE
    for row in (low, high):
        assert row["file_bps"] > row["payload_bps"] > 0 and row["file_bytes_per_s"] == row["file_bps"] / 8
        for name in ("pesq_wb", "stoi", "si_sdr_aligned", "delay_samples"):
            assert row[f"{name}_clips"] == 2  # silence has no score, and no made-up one
        assert len(row["unscored"]) == 3 and all(text.startswith("clip 2: ") for text in row["unscored"])
        assert abs(row["delay_samples"]) < 8
    assert low["payload_bps"] < high["payload_bps"]
    assert low["pesq_wb"] < high["pesq_wb"] and low["si_sdr_aligned"] < high["si_sdr_aligned"]


@pytest_av
def test_opus_rows_without_any_score_hold_none():
    row = opus_rows([torch.zeros(1, 4000)], frames_ms=(60,), progress=False)[0]
    assert row["pesq_wb"] is None and row["pesq_wb_clips"] == 0 and row["payload_bps"] > 0


@pytest_av
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: opus_rows([]), "expected at least one"),
        (lambda: opus_rows([voice()], 24000), "expected 16000 Hz"),
        (lambda: opus_rows([voice().repeat(2, 1)]), "mix channels down"),
        (lambda: opus_rows([voice()], frames_ms=(30,), progress=False), "frame_ms: expected one of"),
        (lambda: opus_rows([voice() * 100], progress=False), r"finite samples in \[-1,1\]"),
    ],
)
def test_bad_sound_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
