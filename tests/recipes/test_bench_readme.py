"""README's result tables and the model cards' scores: what stands in a cell, what is said below, what stays."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import pytest

import mmtok
from mmtok.bench.records import Result, write_compact
from mmtok.bench.run import PART, PARTS
from mmtok.bench.tables import ORIGINAL
from mmtok.image.raster2d import Raster2D

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "recipes"))

import bench_readme  # noqa: E402 - after the path
import ship  # noqa: E402
from comparing import runs, tables  # noqa: E402
from comparing.tables import KBPS, TOKENS, Column, Table  # noqa: E402

CODEC = "audio-codec-16k-4kbps#levels={}"


def made_up(contender: str, metric: str, value: float | None, test_set: str = "speech", **more: Any) -> Result:
    plain: dict[str, Any] = {"part": "reconstruction", "unit": "1", "direction": "higher", "count": 45}
    return Result(contender=contender, test_set=test_set, metric=metric, value=value, **{**plain, **more})


def test_a_field_without_end_is_the_whole_and_a_reason_is_told_without_its_remedy():
    endless = made_up("a", "field", math.inf, unit="samples")
    assert tables._text(endless, Column("field", "field", 0)) == "whole"
    assert tables._text(dataclasses.replace(endless, unit="dB"), Column("field", "field", 0)) == "inf"
    lacks = made_up("codec#levels=2", "latency", None, not_run="codec is not causal: it looks ahead; use encode")
    assert tables._brief(lacks) == "it is not causal"


SPEECH = Table(
    "speech",
    ("speech",),
    ("speech",),
    (
        KBPS,
        Column("coded", "entropy_coded_bitrate_bps", 2, TOKENS, scale=1e-3, brackets=False),
        Column("PESQ", "pesq_wb", 2),
        Column("WER %", "wer", 1, scale=100, original=True),
        Column("MOS", "distillmos", 2, original=True),
    ),
)


def speech_results() -> list[Result]:
    found = []
    for levels in (8, 2):
        name = CODEC.format(levels)
        found += [
            made_up(name, "bitrate_bps", 500.0 * levels, low=490.0 * levels, high=510.0 * levels),
            made_up(name, "entropy_coded_bitrate_bps", 461.0 * levels, part="tokens"),
            made_up(name, "wer", 0.123, low=0.1, high=0.15),
            made_up(name, "distillmos", None, not_run="no network; fetch it"),
        ]
    unscored = {"unscored": {"too short": 2}}
    found.append(made_up(CODEC.format(8), "pesq_wb", 1.789, low=1.75, high=1.82, protocol=unscored))
    found.append(made_up(CODEC.format(2), "pesq_wb", None, not_run="no item has a value: silence"))
    found += [made_up(ORIGINAL, "wer", 0.05), made_up(ORIGINAL, "pesq_wb", 4.64)]
    return found


def test_a_table_has_scaled_numbers_intervals_the_originals_and_every_reason():
    assert tables.table_text(SPEECH, {"speech": speech_results()}) == (
        "| speech | kbit/s | coded | PESQ | WER % |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| **audio-codec-16k-4kbps**, 8 levels | 4.0 | 3.69 | 1.79 [1.75, 1.82] | 12.3 [10.0, 15.0] |\n"
        "| **audio-codec-16k-4kbps**, 2 levels | 1.0 | 0.92 | not run | 12.3 [10.0, 15.0] |\n"
        "| the untouched items | - | - | - | 5.0 |\n\n"
        "Items without a value, in no mean (too short): PESQ of 2 items of audio-codec-16k-4kbps, 8 levels.\n\n"
        "Not run (no network): MOS.\n\n"
        "Not run (no item has a value): PESQ of audio-codec-16k-4kbps, 2 levels."
    )


def test_nothing_measured_gives_no_table_and_a_forgotten_measure_is_named():
    assert tables.table_text(SPEECH, {"speech": []}) == "" == tables.block_text([SPEECH], {})
    assert tables.unmeasured(SPEECH, {"speech": []}) == []
    results = [r for r in speech_results() if r.metric != "wer"]
    assert tables.unmeasured(SPEECH, {"speech": results}) == ["WER %"]
    assert tables.unmeasured(SPEECH, {"speech": speech_results()}) == []  # MOS has a reason


def test_pictures_above_their_bytes_are_counted_below_the_table():
    above = {"contender": {"above_target": 31}}
    results = [made_up("jpeg#bytes=512", "bits_per_item", 4264.0, "photos", protocol=above, count=75)]
    text = tables.block_text(tables.BLOCKS["results:image"], {"photos": results})
    assert "| JPEG, at most 512 bytes | 533 |" in text
    assert "Pictures whose smallest file is larger: bytes of 31 of 75 of JPEG, at most 512 bytes." in text


def test_rows_of_probes_are_joined_over_runs_and_the_continuous_ones_stand_once():
    probe: dict[str, Any] = {"part": "probes", "test_set": "subject", "metric": "accuracy[linear]"}
    found = {
        name: [
            made_up(runs.RUNS[name].studied[0], value=20.0, **probe),
            made_up("continuous[pixels 8x8]", value=30.0, **probe),
        ]
        for name in ("photos", "crops")
    }
    text = tables.block_text(tables.BLOCKS["results:probes"], found)
    assert text.splitlines()[2:] == [
        "| **image-binary1d-64x64** | 20.0 |",
        "| **image-bridge-f8-16x6** | 20.0 |",
        "| pixels 8x8, no tokenizer | 30.0 |",
    ]


def test_every_checkpoint_is_in_a_run_and_labels_are_those_of_the_contenders():
    assert {spelled.partition("#")[0] for run in runs.RUNS.values() for spelled in run.shipped} == set(
        mmtok.available()
    )
    assert {runs.run_of(name) for name in mmtok.available()} == set(runs.RUNS)
    spelled = dataclasses.replace(runs.RUNS["photos"], shipped=("image-binary1d-64x64#tokens=64,8",), baselines=())
    found, missing = runs.opened(spelled, Path("none"), "cpu", None)
    assert [c.label for c in found] == runs.labels_of(spelled) and not missing
    for run in runs.RUNS.values():
        assert set(run.studied) <= set(runs.labels_of(run))


def test_columns_ask_for_parts_that_exist():
    for table in (t for block in tables.BLOCKS.values() for t in block):
        assert {c.part for c in table.columns} <= {PART, *PARTS} and set(table.runs) <= set(runs.RUNS)
        assert len({(c.part, c.sets, c.metric) for c in table.columns}) == len(table.columns)


def test_a_missing_baseline_names_the_command_and_an_unfinished_one_is_missing(tmp_path: Path):
    run = dataclasses.replace(runs.RUNS["photos"], shipped=(), classical=())
    found, missing = runs.opened(run, tmp_path, "cpu", None)
    assert not found and "python recipes/baselines_vq.py" in missing[0] and "--variants vq2d-128px-512B" in missing[0]
    folder = tmp_path / "vq2d-128px-512B-s0"
    quantizer = {"type": "vq", "dim": 4, "codebook_size": 8}
    Raster2D(width=8, multipliers=[1, 1], quantizer=quantizer, image_size=16).save(folder / "tokenizer")
    assert len(runs.opened(run, tmp_path, "cpu", None)[1]) == 1
    (folder / "finished.json").write_text("{}")
    (contender,), missing = runs.opened(run, tmp_path, "cpu", None)
    assert contender.label == contender.protocol()["tokenizer"] == "vq2d-128px-512B" and not missing


def test_readme_gets_what_was_run_and_keeps_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench_readme, "claims_table", lambda _: "claims")
    write_compact(runs.stored_path(tmp_path, "speech"), speech_results())
    marks = [*tables.BLOCKS, "results:claims"]
    readme = tmp_path / "README.md"
    readme.write_text("".join(f"text\n<!-- {m} -->\nold {m}\n<!-- /{m} -->\n" for m in marks))
    bench_readme.write_tables(tmp_path, readme)
    text = readme.read_text()
    assert "old results:audio\n" not in text and "| 4.0 | 3.69 | 1.79 [1.75, 1.82] |" in text
    assert "old results:image\n" in text and "old results:probes\n" in text and "\nclaims\n" in text
    again = text
    bench_readme.write_tables(tmp_path, readme)
    assert readme.read_text() == again
    page = (tmp_path / "bench-speech.md").read_text()
    assert "## reconstruction" in page and "## tokens" in page and "1.789" in page


# ---- model cards ----


def card_results(name: str, fingerprint: str) -> list[Result]:
    label, test_set = ship.full_rate(name), runs.RUNS[runs.run_of(name)].sets[0]
    of = {"protocol": {"contender": {"fingerprint": fingerprint}}}
    found = [made_up(label, "psnr", 12.3456, test_set, low=12.0, high=12.5, **of)]
    if name.startswith("audio"):
        found.append(made_up(label, "delay", -3.0, test_set, **of))
    for q in range(mmtok.card(name)["num_codebooks"]):
        found.append(made_up(label, f"usage[{q}]", 84.67, test_set, part="tokens", count=12029))
        found.append(made_up(label, f"perplexity[{q}]", 422.91, test_set, part="tokens"))
    return found


@pytest.mark.parametrize("name", ["image-causal1d-16x8", "audio-causal-16k-4kbps"])
def test_a_card_gets_new_scores_and_keeps_all_else(name: str):
    card = (ROOT / "checkpoints" / name / "README.md").read_text()
    results = card_results(name, mmtok.card(name)["fingerprint"])
    ship.require_these_weights(name, results, Path("x"))
    found = ship.with_scores(card, name, results)
    assert "84.7" in found and "422.9" in found and "on 12029 positions" in found
    assert f"`recipes/results/bench-{runs.run_of(name)}.jsonl`" in found
    assert ("12.35 [12.00, 12.50]" in found) == name.startswith("image")
    assert ("Reconstructions are -3 samples late" in found) == name.startswith("audio")

    def others(text: str) -> list[str]:
        before, rest = text.split("## Scores\n")
        return [x for x in before.splitlines() if not x.startswith(ship.DELAY)] + rest.split("## Data\n")[
            1
        ].splitlines()

    assert others(found) == others(card)
    assert ship.with_scores(found, name, results) == found


def test_scores_of_other_weights_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    name = "image-binary1d-64x64"
    with pytest.raises(SystemExit, match=r"expected results of image-binary1d-64x64 \w+, got \['0000'\]"):
        ship.require_these_weights(name, card_results(name, "0000"), Path("x"))
    monkeypatch.setattr(ship, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match=r"bench-speech\.jsonl is missing; `python recipes/bench_readme\.py"):
        ship.rewrite_cards()
