"""Two processes under accelerate's launcher: one codebook, one set of weights, those of one process with both batches.

`accelerate launch --cpu --num_processes 2` starts one process unless an mpirun is configured (accelerate 1.15). Its
torchrun branch, ``--multi_gpu``, starts two, which join by gloo where there is no GPU.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file
from torch import Tensor

from mmtok.training import train


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """The weights that each of two processes ended with; the trainings are `tiny_runs.ranks`."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    options = ["--num_processes", "2", "--mixed_precision", "no", "--dynamo_backend", "no"]
    options += ["--main_process_port", str(port)]
    script = [tiny_runs.__file__, "ranks", str(folder)]
    root = str(Path(__file__).resolve().parents[2])
    env = os.environ | {"PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launcher + options + script, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [load_file(folder / f"rank{rank}.safetensors") for rank in range(2)]


@pytest.mark.slow
def test_both_ranks_end_with_the_same_codebooks_and_weights(launched: list[dict[str, Tensor]]):
    first, second = launched
    assert int(first.pop("num_processes")) == int(second.pop("num_processes")) == 2
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    assert all(bool((v == 5).all()) for k, v in first.items() if k.startswith("start."))
    books = [k for k in first if k.endswith(".codebook")]
    assert len(books) == 6  # two trainings of three levels
    fresh = tiny_runs.codec().state_dict()
    assert all(not torch.equal(first[k], fresh[k.split(".", 2)[2]]) for k in books)


@pytest.mark.slow
def test_two_ranks_equal_one_process_with_the_joined_batch(launched: list[dict[str, Tensor]], tmp_path: Path):
    """Codec without quantizer dropout (its draws are per rank), losses that are means, discriminator from step 2 on."""
    tokenizer, objective = tiny_runs.codec(0.0), tiny_runs.sound_objective(tiny_runs.RANK_STEPS // 2)
    train(tokenizer, objective, tiny_runs.joined(tiny_runs.sounds()), tiny_runs.rank_settings(tmp_path))
    start = tiny_runs.network_state(tiny_runs.codec(0.0), tiny_runs.sound_objective())
    moved = 0
    for key, value in tiny_runs.network_state(tokenizer, objective).items():
        torch.testing.assert_close(launched[0][f"exact.{key}"], value, rtol=2e-3, atol=2e-4, msg=key)
        moved += value.is_floating_point() and bool((value - start[key]).abs().max() > 2e-3)
    assert moved > 20


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    train(tiny_runs.plain(), tiny_runs.ImageObjective(), tiny_runs.pictures(), tiny_runs.settings(tmp_path, 1))
    monkeypatch.setenv("WORLD_SIZE", "2")  # too late: accelerate is set up for one process by now
    with pytest.raises(ValueError, match=r"expected 2 processes .* got 1: .* ACCELERATE_USE_CPU=true"):
        train(tiny_runs.plain(), tiny_runs.ImageObjective(), tiny_runs.pictures(), tiny_runs.settings(tmp_path, 2))
