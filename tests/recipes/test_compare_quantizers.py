"""recipes/compare_quantizers.py: the figures by closed forms, every scheme of the zoo, and what it writes."""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
sys.path.insert(0, str(RECIPES))

import compare_quantizers as recipe  # noqa: E402

from mmtok.quantizers import QUANTIZERS, build_quantizer  # noqa: E402


def clips(dim: int, lengths: tuple[int, ...] = (40, 64, 33)) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    return [torch.randn(n, dim, generator=g) for n in lengths]


def test_every_type_of_the_zoo_is_compared_and_can_be_built():
    found = recipe.schemes(96, 10)
    # Nobody chooses the legacy one: claims_audio.py compares it with what replaced it.
    assert {config["type"] for config in found.values()} == set(QUANTIZERS) - {"rvq_legacy"}
    assert set(recipe.PREFIXES) <= set(found)
    for name, config in recipe.schemes(16, 3).items():
        quantizer = build_quantizer(config)
        assert max(recipe.PREFIXES.get(name, (1,))) <= quantizer.num_codebooks
        assert recipe.WINDOW % math.lcm(*quantizer.level_strides) == 0, "a group would cross the end of a window"


def test_score_of_a_quantizer_that_is_known():
    """1 bit a number, the sign: cells (-inf, 0) and (0, inf) with codes +-1 make the error a sum by hand."""
    quantizer = build_quantizer({"type": "per_dimension", "dim": 3, "bits": 1}).eval()
    quantizer.get_buffer("centroids").copy_(torch.tensor([-1.0, 1.0]).repeat(3, 1))
    z = clips(3)
    found = recipe.score(quantizer, z)
    expected = [float((torch.where(x > 0, 1.0, -1.0) - x).square().sum()) for x in z]
    assert found["error"] == pytest.approx(expected, rel=1e-5)
    rows = torch.cat(z)
    assert sum(found["energy"]) == pytest.approx(float((rows - rows.mean(0)).square().sum()), rel=1e-5)
    share = (rows > 0).double().mean(0)
    entropy = -(share * share.log2() + (1 - share) * (1 - share).log2()).sum()
    assert found["bits"] == 3
    assert found["entropy_bits"] == pytest.approx(float(entropy), rel=1e-5)
    assert (found["levels"], found["usage"], found["dead_share"]) == (3, 1.0, 0.0)
    assert recipe.score(quantizer, z, 2)["bits"] == 2


def test_a_level_with_a_stride_costs_a_share_of_its_bits():
    torch.manual_seed(0)
    config = {"type": "strided_rvq", "dim": 4, "level_strides": [4, 1], "codebook_size": 8, "codebook_dim": None}
    quantizer = build_quantizer(config | {"metric": "euclidean", "codebook": "ema"})
    z = clips(4)
    quantizer(z[1][None])
    found = recipe.score(quantizer.eval(), z)
    assert found["bits"] == 3 / 4 + 3
    codes = torch.cat([quantizer.encode(x[None])[0, 0, ::4] for x in z])
    assert len(codes) == 10 + 16 + 9
    p = torch.bincount(codes, minlength=8).double() / len(codes)
    first = float(torch.special.entr(p).sum()) / math.log(2)
    all_of_second = torch.cat([quantizer.encode(x[None])[0, 1] for x in z])
    p = torch.bincount(all_of_second, minlength=8).double() / len(all_of_second)
    second = float(torch.special.entr(p).sum()) / math.log(2)
    assert found["entropy_bits"] == pytest.approx(first / 4 + second, rel=1e-4)


def test_snr_interval_holds_the_mean_and_closes_when_clips_are_alike():
    energy, error = np.array([10.0, 30.0, 60.0]), np.array([1.0, 3.0, 6.0])
    assert recipe.snr_interval(error, energy) == pytest.approx({"mean": 10.0, "low": 10.0, "high": 10.0})
    wide = recipe.snr_interval(np.array([1.0, 9.0, 2.0]), energy)
    assert wide["mean"] == pytest.approx(10 * math.log10(100 / 12))
    assert 10 * math.log10(30 / 9) <= wide["low"] < wide["mean"] < wide["high"] <= 10 * math.log10(60 / 2)


@pytest.mark.parametrize("name", ["vq (gradient)", "simvq", "pq, 8 groups", "rvq (EMA)", "random_projection"])
def test_after_training_the_error_is_below_that_of_the_mean(name: str):
    torch.manual_seed(0)
    windows = torch.stack(clips(8, (recipe.WINDOW,) * 12))
    quantizer = build_quantizer(recipe.schemes(8, 4)[name])
    assert recipe.train(quantizer, windows, steps=40, batch=4, lr=1e-2, seed=0)
    found = recipe.score(quantizer, list(windows))
    assert not quantizer.training
    assert sum(found["error"]) < 0.95 * sum(found["energy"])


def test_training_learns_the_parameters_and_draws_by_its_seed():
    windows, ends = torch.stack(clips(8, (recipe.WINDOW,) * 12)), []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        quantizer = build_quantizer({"type": "fsq", "dim": 8, "levels": [4, 4, 4]})
        before = sum(recipe.score(quantizer, list(windows))["error"])
        recipe.train(quantizer, windows, steps=20, batch=4, lr=1e-2, seed=seed)
        ends.append(sum(recipe.score(quantizer, list(windows))["error"]))
        assert ends[-1] < before
    assert ends[0] == ends[1] != ends[2]


def test_a_training_that_diverges_starts_again_at_a_third_of_the_rate():
    windows = torch.stack(clips(8, (recipe.WINDOW,) * 12))
    args = argparse.Namespace(steps=20, batch=4, lr=30.0)
    config = {"type": "fsq", "dim": 8, "levels": [4, 4, 4]}
    quantizer, facts = recipe.train_stably(config, windows, args, seed=0)
    assert facts["lr"] < 30.0
    assert sum(recipe.score(quantizer, list(windows))["error"]) < 10 * float(windows.square().sum())
    row = recipe.summarise("x", config, [recipe.score(quantizer, list(windows)) | facts])
    assert "(diverged; at mean rate" in recipe.table([row], 30.0)
    assert "diverged" not in recipe.table([row], facts["lr"])


def test_mean_over_seeds_is_of_the_errors():
    runs = [{"bits": 3.0, "error": [1.0, 2.0], "energy": [10.0, 20.0]}, {"bits": 3.0, "error": [3.0, 6.0]}]
    runs[1]["energy"] = [10.0, 20.0]
    row = recipe.summarise("x", {}, runs)
    assert row["snr_db"]["mean"] == pytest.approx(10 * math.log10(30 / 6))
    assert row["snr_db_by_seed"] == pytest.approx([10.0, 10 * math.log10(30 / 9)])


def test_smoke_writes_rows_with_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    threads = torch.get_num_threads()
    try:
        recipe.main(["--smoke", "--out", str(tmp_path), "--only", "fsq", "rvq (EMA)"])
    finally:
        torch.set_num_threads(threads)
    found = json.loads((tmp_path / "quantizers-latents.json").read_text())
    assert found["command"].endswith("--only fsq rvq (EMA)") and found["codec"]["name"] == recipe.CODEC
    names = [row["name"] for row in found["rows"]]
    assert names[0].startswith("for reference") and names[1] == "fsq" and len(names) == 6
    by_levels = [row["snr_db"]["mean"] for row in found["rows"] if row["name"].startswith("rvq")]
    assert by_levels[1] < by_levels[2] < by_levels[3] < by_levels[0], "each level takes away error"
    assert (tmp_path / "quantizers-latents.md").read_text().count("\n| ") == len(names) + 2
    assert capsys.readouterr().out.count("| fsq |") == 2, "as it is found, and in the table"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["quantizers-latents.json", "quantizers-latents.md"]
