"""The recipes of whole corpora: what they count, what they make of it on paper, and that they run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from mmtok.corpus.index import Corpus

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "recipes"))

import bench_corpus  # noqa: E402 - after the path
import corpus_data  # noqa: E402
from corpora.memory import lasting  # noqa: E402
from corpora.paper import Constants, constants_of, paper_calculation  # noqa: E402

MEASURED = {"items_a_second": {"corpus_cpu": 4.0}, "items": 10, "bytes_an_item": 100.0, "header_bytes_a_shard": 2000.0}
MEASURED |= {"nominal_bytes_an_item": 80.0, "index_bytes_a_shard": 50.0}


def test_on_paper_everything_is_in_proportion():
    pictures = Constants(100.0, 2000.0, 80.0, 50.0, core_seconds=0.36, flops=3.6e12)
    sound = Constants(500.0, 1000.0, 400.0, 50.0, core_seconds=1.0, flops=1e12, seconds_of_sound=3.6)
    images, hours = paper_calculation(pictures, sound, items_per_shard=10_000, tflops=50)
    assert images["items"] == hours["items"] == 10**9  # clips of 3.6 s
    assert images["shards"] == 100_000 and images["shards_bytes"] == 1e9 * 100 + 100_000 * 2000
    assert images["nominal_bytes"] == 8e10
    assert images["index_bytes"] == 1e9 * (8 + 4 + 4 + 2) + 100_000 * 50  # hash, item, shard, row
    assert images["cpu_core_hours"] == pytest.approx(100_000)
    assert images["gpu_hours"] == pytest.approx(3.6e21 / 5e13 / 3600)
    assert hours["gpu_hours"] == pytest.approx(1e21 / 5e13 / 3600)
    with pytest.raises(ValueError, match="expected constants of a corpus of sound"):
        paper_calculation(pictures, pictures)


def test_operations_of_a_clip_go_with_its_length():
    counted = {"flops": 6e9, "amount": 3.0, "files": 2.0}
    assert constants_of({**MEASURED, "seconds_of_sound": None, "flops": counted}).flops == pytest.approx(2e9)
    found = constants_of({**MEASURED, "seconds_of_sound": 50.0, "flops": counted})  # 2e9 a second, 5 s a clip
    assert found.flops == pytest.approx(1e10) and found.seconds_of_sound == 5.0


def test_operations_are_counted_and_so_is_the_sound(tmp_path: Path):
    def encode(path: Path) -> SimpleNamespace:
        torch.ones(24, 8) @ torch.ones(8, 4)
        return SimpleNamespace(side={"num_samples": torch.tensor([24_000]), "sample_rate": torch.tensor([16_000])})

    found = bench_corpus.flops_of(SimpleNamespace(encode=encode), [tmp_path / "a", tmp_path / "b"])
    assert found == {"flops": 2 * (2 * 24 * 8 * 4), "amount": 3.0, "files": 2.0}


def test_memory_is_told_of_runs_that_last_and_kept_by_one_that_was_resumed(tmp_path: Path):
    found = {"mean_mib": 1234.4, "slope_mib_a_minute": -3.2, "seconds": 30.0}
    assert lasting(found) is found and lasting({**found, "seconds": 29.0}) is None and lasting(None) is None
    assert corpus_data._memory(found) == "1,234, -3" and corpus_data._memory(None) == "too short"
    assert corpus_data._former(tmp_path, "speech") is None
    row = {"name": "speech", "memory": found}
    (tmp_path / corpus_data.FIGURES).write_text(json.dumps({"corpora": [row]}))
    assert corpus_data._former(tmp_path, "speech") == found and corpus_data._former(tmp_path, "sounds") is None


@pytest.mark.slow
def test_the_bench_runs_and_writes_its_part_of_a_page(tmp_path: Path):
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- results:corpus-cost -->\n<!-- /results:corpus-cost -->\nafter\n")
    recipe = [sys.executable, ROOT / "recipes" / "bench_corpus.py", "--smoke", "--readme", page]
    # Apart: WebDataset leaves files open, which is an error here.
    subprocess.run([*recipe, "--out", tmp_path / "out", "--results", tmp_path], check=True, capture_output=True)
    run = json.loads((tmp_path / "bench-corpus.json").read_text())
    assert [c["items"] for c in run["cases"].values()] == [8, 8, 8] and not (tmp_path / "out").exists()
    assert (
        run["cases"]["speech"]["flops"]["flops"] > 1e6 and run["cases"]["pictures, no network"]["flops"]["flops"] == 0
    )
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "| a million hours of sound |" in text
    assert "TokenStream" in text and "smoke run" in (tmp_path / "bench-corpus.md").read_text()


@pytest.mark.slow
def test_everything_that_was_fetched_becomes_tokens_and_a_table(tmp_path: Path, monkeypatch):
    data, out, page = tmp_path / "data", tmp_path / "out", tmp_path / "README.md"
    clip = 0.4 * np.sin(2 * np.pi * 220 * np.arange(4960) / 16_000)
    lists: dict[str, list[dict[str, str]]] = {"images": [], "speech": [], "sounds": []}
    for name in lists:
        (data / name).mkdir(parents=True)
        for n in range(3):
            path = data / name / f"{n}{'.png' if name == 'images' else '.wav'}"
            if name == "images":
                Image.fromarray(np.full((40, 40 + n, 3), 60 * n, np.uint8)).save(path)
            else:
                soundfile.write(path, clip, 16_000)
            lists[name].append({"path": f"{name}/{path.name}", "text": f"{name} {n}"})
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lists[name]))
    (data / "sounds" / "2.wav").write_bytes(b"broken")
    argv = ["corpus_data.py", "--data", data, "--out", out, "--results", tmp_path, "--readme", page]
    monkeypatch.setattr(sys, "argv", [str(a) for a in argv])
    page.write_text("no marks")
    with pytest.raises(ValueError, match="expected the marks <!-- results:corpus -->"):
        corpus_data.main()
    page.write_text("<!-- results:corpus -->\n<!-- /results:corpus -->\n")
    corpus_data.main()
    text = page.read_text()
    found = {c["name"]: c for c in json.loads((tmp_path / "corpus-data.json").read_text())["corpora"]}
    assert [(c["items"], c["failures"]) for c in found.values()] == [(3, 0), (3, 0), (2, 1)]
    assert found["pictures"]["text_share"] == 1 and found["pictures"]["pixels"] == 40 * (40 + 41 + 42)
    assert {r.text for r in Corpus(out / "speech")} == {"speech 0", "speech 1", "speech 2"}
    assert "| pictures |" in text and "Failed: 1 of sounds, such as sounds/2.wav is not" in text
    times = found["speech"]["times"]
    corpus_data.main()  # what is done is not made again, and the figures stay
    again = json.loads((tmp_path / "corpus-data.json").read_text())["corpora"]
    assert again[1]["times"] == times and page.read_text() == text
