"""A run that was cut off and continued is the run that was not: weights, averages, codebooks, optimizers, log."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_runs
import torch
from safetensors import safe_open
from torch import Tensor

from mmtok.training import AudioObjective, ImageObjective, train
from mmtok.training.state import load_state


class KilledError(Exception):
    pass


def killed_at(batches: tiny_runs.Batches, index: int) -> tiny_runs.Batches:
    def until(i: int, rank: int) -> dict[str, Tensor]:
        if i == index:
            raise KilledError
        return batches(i, rank)

    return until


def rows(folder: Path) -> list[dict]:
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "items_per_second"} for row in found]


def state(folder: Path) -> dict[str, Tensor]:
    with safe_open(str(folder / "state.safetensors"), framework="pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 - safe_open is no mapping


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


KINDS = {
    "codec": (tiny_runs.codec, tiny_runs.sound_objective, tiny_runs.sounds()),
    "binary": (tiny_runs.binary, tiny_runs.picture_objective, tiny_runs.pictures()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_six_steps_equal_three_resume_and_three(kind: str, tmp_path: Path):
    make, make_objective, batches = KINDS[kind]

    def validate(model: torch.nn.Module) -> dict[str, float]:
        return {"weight": float(next(model.parameters()).sum()), "draw": float(torch.rand(()))}

    def run(out: str, source: tiny_runs.Batches) -> dict[str, Tensor]:
        tokenizer, objective = make(), make_objective()
        config = tiny_runs.settings(tmp_path / out, validate_every=3)
        train(tokenizer, objective, source, config, validate)
        return tiny_runs.network_state(tokenizer, objective)

    whole = run("whole", batches)
    with pytest.raises(KilledError):
        run("cut", killed_at(batches, 5))  # steps 4 and 5 are done, logged, and lost
    assert [r["step"] for r in rows(tmp_path / "cut")] == [1, 2, 3, 3, 4, 5]
    resumed = run("cut", batches)

    assert_equal(whole, resumed)
    stored = state(tmp_path / "whole")
    assert_equal(stored, state(tmp_path / "cut"))
    assert {k.split(".")[0] for k in stored} == {"module", "average", "optimizer"}
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")
    assert [(r["step"], r["kind"]) for r in rows(tmp_path / "cut") if r["kind"] == "validate"] == [
        (3, "validate"),
        (6, "validate"),
    ]
    if kind == "codec":
        assert any(k.endswith("books.2.codebook_sum") for k in stored)
        assert {"adversarial", "feature_matching", "discriminator"} <= rows(tmp_path / "cut")[-2].keys()


def test_saving_and_validating_leave_no_mark_on_the_run(tmp_path: Path):
    finals = []
    for out, every in (("often", 1), ("once", 100)):
        tokenizer, objective = tiny_runs.codec(), tiny_runs.sound_objective()

        def validate(model: torch.nn.Module, every: int = every) -> dict[str, float]:
            model.save(tmp_path / f"half{every}", torch.float16)  # type: ignore[operator] - rounds the model in place
            return {"draw": float(torch.rand(()))}

        config = tiny_runs.settings(tmp_path / out, save_every=every, validate_every=every)
        train(tokenizer, objective, tiny_runs.sounds(), config, validate)
        finals.append(tiny_runs.network_state(tokenizer, objective))
    assert_equal(*finals)


def test_resume_of_a_finished_run_and_a_fresh_start(tmp_path: Path):
    config = tiny_runs.settings(tmp_path, 2)
    first = train(tiny_runs.plain(), ImageObjective(), tiny_runs.pictures(), config)
    again = train(tiny_runs.plain(), ImageObjective(), killed_at(tiny_runs.pictures(), 0), config)  # reads no batch
    assert_equal(first.state_dict(), again.state_dict())
    assert json.loads((tmp_path / "progress.json").read_text()) == {"step": 2, "steps": 2}

    fresh = tiny_runs.settings(tmp_path, 2, resume=False)
    with pytest.raises(KilledError):
        train(tiny_runs.plain(), ImageObjective(), killed_at(tiny_runs.pictures(), 1), fresh)
    assert [r["step"] for r in rows(tmp_path)] == [1]


def test_a_run_killed_before_its_first_save_starts_a_new_log(tmp_path: Path):
    config = tiny_runs.settings(tmp_path, 3)
    with pytest.raises(KilledError):
        train(tiny_runs.plain(), ImageObjective(), killed_at(tiny_runs.pictures(), 2), config)
    assert len(rows(tmp_path)) == 2
    with (tmp_path / "log.jsonl").open("a") as f:
        f.write('{"step": 3, "kind": "tr')  # the row that the kill tore
    train(tiny_runs.plain(), ImageObjective(), tiny_runs.pictures(), config)
    assert [r["step"] for r in rows(tmp_path)] == [1, 2, 3]


def test_the_averaged_weights_are_what_is_kept(tmp_path: Path):
    tokenizer = train(tiny_runs.plain(), ImageObjective(), tiny_runs.pictures(), tiny_runs.settings(tmp_path, 4))
    stored = state(tmp_path)
    with safe_open(str(tmp_path / "tokenizer" / "model.safetensors"), framework="pt") as f:
        kept = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 - safe_open is no mapping
    for key, value in tokenizer.state_dict().items():
        assert torch.equal(value, stored[f"average.{key}"]), key
        assert torch.equal(value, kept[key]), key
        assert not torch.equal(value, stored[f"module.tokenizer.{key}"]), key
    assert not tokenizer.training


# ---- refused states ----


def test_truncated_state_is_refused_with_the_remedy(tmp_path: Path):
    config = tiny_runs.settings(tmp_path, 1)
    train(tiny_runs.plain(), ImageObjective(), tiny_runs.pictures(), config)
    file = tmp_path / "state.safetensors"
    whole = file.read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"state\.safetensors is damaged .*delete it to start again"):
            train(tiny_runs.plain(), ImageObjective(), tiny_runs.pictures(), config)


def test_state_of_another_format_is_refused(tmp_path: Path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "state.safetensors", {"format": "something-else"})
    with pytest.raises(ValueError, match="expected format 'mmtok-training-1', got 'something-else'; delete it"):
        train(tiny_runs.plain(), ImageObjective(), tiny_runs.pictures(), tiny_runs.settings(tmp_path, 1))


@pytest.mark.parametrize("changes", [{"seed": 1}, {"steps": 3}])
def test_state_of_other_settings_is_refused(changes: dict, tmp_path: Path):
    train(tiny_runs.plain(), ImageObjective(), tiny_runs.pictures(), tiny_runs.settings(tmp_path, 1))
    other = tiny_runs.settings(tmp_path, **({"steps": 1} | changes))
    with pytest.raises(ValueError, match=r"(?s)other settings; use another --out, or delete it.*stored:.*this run:"):
        train(tiny_runs.plain(), ImageObjective(), tiny_runs.pictures(), other)


def test_state_with_another_discriminator_is_refused_before_anything_changes(tmp_path: Path):
    config = tiny_runs.settings(tmp_path, 1)
    train(tiny_runs.plain(), tiny_runs.picture_objective(), tiny_runs.pictures(), config)
    tokenizer = tiny_runs.plain()
    before = {k: v.clone() for k, v in tokenizer.state_dict().items()}
    with pytest.raises(ValueError, match=r"other networks .*module\.discriminator.*use another --out, or delete it"):
        train(tokenizer, ImageObjective(), tiny_runs.pictures(), config)
    assert_equal(before, tokenizer.state_dict())

    plain_config = tiny_runs.settings(tmp_path / "plain", 1)
    train(tiny_runs.plain(), ImageObjective(), tiny_runs.pictures(), plain_config)
    with pytest.raises(ValueError, match=r"other networks .*got no such tensor"):
        train(tiny_runs.plain(), tiny_runs.picture_objective(), tiny_runs.pictures(), plain_config)


def test_a_codec_refuses_the_state_of_another_codec(tmp_path: Path):
    objective = AudioObjective(None, wave_weight=1.0)
    train(tiny_runs.codec(), objective, tiny_runs.sounds(), tiny_runs.settings(tmp_path, 1))
    with pytest.raises(ValueError, match="other settings"):
        train(tiny_runs.codec(dropout=0.25), objective, tiny_runs.sounds(), tiny_runs.settings(tmp_path, 1))


@pytest.mark.slow
def test_kill_in_the_middle_of_a_save_leaves_a_state_that_loads(tmp_path: Path):
    script = [sys.executable, str(Path(tiny_runs.__file__)), "endless", str(tmp_path)]
    root = str(Path(__file__).resolve().parents[2])
    env = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    deadline = time.monotonic() + 120
    with subprocess.Popen(script, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            while process.poll() is None and time.monotonic() < deadline:
                if (tmp_path / "state.safetensors").is_file() and any(tmp_path.glob(".state.safetensors.*")):
                    break  # a second state is being written at this moment
                time.sleep(0.001)
        finally:
            process.send_signal(signal.SIGKILL)
        errors = process.communicate()[1]
    assert any(tmp_path.glob(".state.safetensors.*")), f"was not killed while it wrote: {errors[-2000:]}"
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]

    tokenizer = tiny_runs.Binary1D(num_tokens=4, num_bits=16, encoder=(384, 1, 0), decoder=(384, 1, 1))
    identity = {"type": "binary1d", "config": tokenizer.config, "seed": 0, "steps": 100_000}
    average = {k: torch.zeros_like(p) for k, p in tokenizer.named_parameters()}
    optimizer = torch.optim.AdamW(tokenizer.parameters())
    done = load_state(
        tmp_path / "state.safetensors", {"tokenizer": tokenizer}, {"tokenizer": optimizer}, average, identity
    )
    assert steps[-1] - 1 <= done <= steps[-1]
    assert all(bool(v.isfinite().all()) for v in (*average.values(), *tokenizer.parameters()))
    assert len(optimizer.state_dict()["state"]) == len(list(tokenizer.parameters()))
