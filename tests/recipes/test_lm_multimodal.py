"""The language model recipe: a killed training goes on with the same numbers; a local model is taken, with LoRA."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "recipes"))
transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")

from speaking.learning import Settings, packed_rows, small_llama, text_tokenizer, train  # noqa: E402

SETTINGS = Settings(steps=6, batch_size=2, length=32, save_every=3, warmup=2)


def rows() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = [torch.randint(1, 50, (n,), generator=generator).tolist() for n in (5, 20, 31, 9, 12, 30, 40)]
    return packed_rows(found, 32, 0)


def trained(out: Path, stop_at: int | None = None) -> dict[str, torch.Tensor]:
    model = small_llama(50, 64, 1, seed=1)

    def validate(model) -> dict[str, float]:
        raise KeyboardInterrupt

    if stop_at is None:
        train(model, rows(), SETTINGS, out)
    else:
        with pytest.raises(KeyboardInterrupt):
            train(model, rows(), SETTINGS, out, validate=validate, at=(stop_at,))
    return {k: v.clone() for k, v in model.state_dict().items()}


def test_a_killed_run_goes_on_with_the_same_numbers(tmp_path: Path):
    whole = trained(tmp_path / "whole")
    half = trained(tmp_path / "killed", stop_at=4)  # after the state of step 3 was written
    (tmp_path / "killed" / "state").rename(
        tmp_path / "killed" / "state.former"
    )  # as a kill between two renames leaves it
    resumed = trained(tmp_path / "killed")
    assert any(not torch.equal(half[k], v) for k, v in whole.items())
    assert all(torch.equal(resumed[k], v) for k, v in whole.items())
    logs = [
        [json.loads(line) for line in (tmp_path / n / "log.jsonl").read_text().splitlines()]
        for n in ("whole", "killed")
    ]
    assert [row["loss"] for row in logs[0]] == [row["loss"] for row in logs[1]]
    with pytest.raises(ValueError, match="take another --out"):
        train(small_llama(50, 64, 1, seed=1), rows(), Settings(steps=7, batch_size=2, length=32), tmp_path / "whole")


def test_documents_that_do_not_fit_are_left_out_and_said(capsys):
    found = rows()
    assert "1 dropped" in capsys.readouterr().out and int((found["document"] >= 0).sum()) == 5 + 20 + 31 + 9 + 12 + 30


@pytest.mark.slow
def test_a_local_model_is_taken_and_trained_by_lora(tmp_path: Path):
    texts = ["a cat that purrs", "a part of the cat", "piece one"]
    tokenizer = text_tokenizer(texts, 300)
    tokenizer.save_pretrained(tmp_path / "llama")
    small_llama(len(tokenizer), 64, 1, seed=0).save_pretrained(tmp_path / "llama")
    command = [sys.executable, str(ROOT / "recipes" / "lm_multimodal.py"), "--smoke", "--out", str(tmp_path / "out")]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--lm", str(tmp_path / "llama"), "--lora", "4"], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    scores = json.loads((tmp_path / "out" / "lm-multimodal.json").read_text())
    assert scores["valid"]["image constrained"] == scores["valid"]["audio constrained"] == 1.0
    assert set(scores["inits"]) == {"mean_covariance", "projected", "mean", "normal"}
    assert not (tmp_path / "out" / "text").exists()
    page = (tmp_path / "out" / "lm-multimodal.html").read_text()
    assert page.count("<audio") >= 2 and "drawn:" in page and "transcripts written" in page
