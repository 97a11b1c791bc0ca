"""What the claim recipes share: splits by caption, paired intervals, the README's table, retrieval by a linear map."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "recipes"))

from imaging import features, grid, pictures, readme, report  # noqa: E402 - after the path

RESULTS = ROOT / "recipes" / "results"


def test_captions_that_differ_in_marks_only_are_in_one_split():
    texts = [f"thing number {i}" for i in range(3000)]
    splits = [pictures.caption_split(t) for t in texts]
    assert splits == [pictures.caption_split(t.upper() + "!") for t in texts]
    shares = {s: splits.count(s) / 3000 for s in ("train", "val", "test")}
    assert abs(shares["test"] - 0.1) < 0.02 and abs(shares["val"] - 0.1) < 0.02


def test_a_picture_becomes_a_square_without_being_stretched():
    picture = np.zeros((10, 30, 3), np.uint8)
    picture[:, :, 0] = 200
    square = pictures.square(picture, 60)
    assert square.shape == (60, 60, 3) and np.abs(square[..., 0].astype(int) - 200).max() <= 1
    tall = np.zeros((40, 10, 3), np.uint8)
    tall[20, 5] = 255
    bright = np.argwhere(pictures.square(tall, 80)[..., 0] > 60)
    assert abs(bright[:, 0].mean() - 41) < 2 and abs(bright[:, 1].mean() - 41) < 2  # doubled, in the middle


def test_batches_are_a_function_of_seed_and_index_and_carry_the_right_rows():
    pixels = np.stack([np.full((8, 8, 3), v, np.uint8) for v in (0, 50, 100, 150)])
    captioned = pictures.Captioned(pixels, ["a"] * 4, [Path("x")] * 4, ["train"] * 4, ["drawing"] * 4)
    extra = {"label": torch.tensor([0, 50, 100, 150])}
    batches = pictures.SquareBatches(captioned, np.array([1, 3]), 16, 6, seed=3, extra=extra)
    first, again = batches(7), batches(7)
    assert torch.equal(first["x"], again["x"]) and first["x"].shape == (16, 3, 6, 6)
    assert torch.equal((first["x"][:, 0, 0, 0] * 255).round().long(), first["label"])
    assert set(first["label"].tolist()) == {50, 150}
    assert not torch.equal(batches(8)["label"], first["label"])


def test_paired_differences_and_their_interval():
    rng = np.random.default_rng(0)
    base = [{"psnr": list(rng.normal(20, 5, 200)), "frechet": 10.0} for _ in range(3)]
    better = [{"psnr": [v + 1 for v in row["psnr"]], "frechet": 8.0 + i} for i, row in enumerate(base)]
    gap = report.differences({"a": better, "b": base}, "b", ["psnr", "frechet"])["a"]
    assert gap["psnr"]["mean"] == pytest.approx(1) and gap["psnr"]["high"] - gap["psnr"]["low"] < 1e-9
    assert gap["frechet"]["each"] == [-2.0, -1.0, 0.0] and gap["frechet"]["mean"] == pytest.approx(-1)
    alone = report.interval(np.array([row["psnr"] for row in base]))
    assert alone["low"] < 20 < alone["high"] and alone["high"] - alone["low"] > 0.5


def test_a_code_model_finds_structure_and_frequencies_do_not():
    torch.manual_seed(0)
    start = torch.randint(0, 8, (600, 1))
    codes = (start + torch.arange(6)) % 8  # every code follows from the one before
    bits = features.bits_per_image(codes[:500], codes[500:550], codes[550:], 8, seed=0, steps=200)
    plain = features.unigram_bits(codes[:500], codes[550:], 8)
    assert abs(float(np.mean(plain)) - 18) < 0.5  # 6 codes of 3 bits
    assert float(np.mean(bits)) < 6


def test_ridge_finds_a_linear_map():
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) + 3
    w = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    mx, my, matrix = features.ridge(x, x @ w + 1, weight=1e-6)
    torch.testing.assert_close(((x.double() - mx) @ matrix + my).float(), x @ w + 1, atol=1e-3, rtol=0)


def test_another_process_holding_a_run_is_seen(tmp_path: Path):
    with grid.claimed(tmp_path) as mine:
        assert mine
        with grid.claimed(tmp_path) as again:
            assert not again
    with grid.claimed(tmp_path) as free:
        assert free


def test_unknown_variants_are_refused():
    args = argparse.Namespace(variants=["x"], seed=0, seeds=1, out=Path("nowhere"))
    with pytest.raises(SystemExit, match="expected names among"):
        grid.train_all([grid.Variant("a")], args, lambda v, s, f: pytest.fail("must not train"))


def test_the_readme_has_the_stored_results():
    text = (ROOT / "README.md").read_text()
    assert readme.claims_table(RESULTS) in text


@pytest.mark.parametrize("file", sorted(RESULTS.glob("claim-*.json")), ids=lambda p: p.stem)
def test_stored_claims_have_a_baseline_and_a_count(file: Path):
    result = json.loads(file.read_text())
    enough = 40 if file.stem.startswith("claim-xcodec") else 100  # clips of seconds, pictures
    assert result["count"] >= enough and result["baseline"] in result["variants"]
    for scores in result["variants"].values():
        assert scores["seeds"] >= 1
        assert any("low" in v for v in scores.values() if isinstance(v, dict)), "no interval"
