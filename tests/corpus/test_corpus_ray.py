"""Ray as the engine: the same bytes, tasks whose process is killed, a driver that is killed."""

from __future__ import annotations

import logging
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from corpus_runs import assert_same, log_of, run_here, start_driver, wait_until

from mmtok.corpus.engines import RaySettings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]
SOUNDS, SHARDS = 36, 9


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray")
    ray.init(
        "local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
        object_store_memory=2**27,
    )  # fmt: skip
    yield
    ray.shutdown()


def markers(out: Path) -> int:
    return len(list(out.glob("shards/*.done.json")))


def at_work() -> list[psutil.Process]:
    """Processes of Ray below this one that have a task: Ray names them after it."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any("ray::attempt" in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_tasks_give_the_same_bytes_also_where_their_process_is_killed(cluster, codec, source, expected, tmp_path):
    """Two of the processes at work are killed at random moments, from outside; Ray starts their tasks again."""
    out, draw, killed, over = tmp_path / "corpus", random.Random(3), [], threading.Event()

    def kill() -> None:
        while len(killed) < 2 and not over.is_set():
            workers = at_work()
            if workers and markers(out) >= len(killed):
                time.sleep(draw.random() * 0.1)
                victim = draw.choice(workers)
                if victim.is_running() and victim in at_work():
                    os.kill(victim.pid, signal.SIGKILL)
                    killed.append(victim.pid)
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        summary = run_here(source, codec, out, engine="ray", workers=2)
    finally:
        over.set()
        killer.join()
    assert len(killed) == 2
    assert (summary.exit_code, summary.made) == (0, SHARDS)
    assert_same(out, expected)
    assert os.getpid() not in {int(line["worker"].split(":")[1]) for line in log_of(out)}


def test_a_tokenizer_that_no_task_can_load_ends_the_run(cluster, codec, source, tmp_path):
    """What a task raises comes back as its reason, from a process that does not share memory with this one."""
    import shutil

    model, out = tmp_path / "model", tmp_path / "corpus"
    shutil.copytree(codec, model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])  # the settings are read here, the weights by the tasks
    summary = run_here(source, model, out, engine="ray", workers=2)
    assert summary.exit_code == 1 and summary.done == 0
    assert "CheckpointError" in (summary.stopped or "") and "model.safetensors is damaged" in (summary.stopped or "")
    assert 1 <= len(summary.missing) <= 2  # those at work; no other one is tried


def test_a_killed_driver_takes_its_ray_along_and_another_goes_on(cluster, codec, source, expected, tmp_path):
    out = tmp_path / "corpus"
    driver = start_driver("run", source, codec, out, "ray", 1)
    wait_until(lambda: markers(out) >= 1 or driver.poll() is not None, "a shard is done")
    below = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGKILL)
    told, _ = driver.communicate()
    assert markers(out) < SHARDS and not (out / "index.json").exists(), told
    _, alive = psutil.wait_procs(below, timeout=120)
    assert not alive, f"outlived their driver: {alive}"
    assert run_here(source, codec, out, engine="ray", workers=2).exit_code == 0
    assert_same(out, expected)


def test_no_ray_at_an_address_is_told(codec, source, tmp_path, monkeypatch):
    import ray

    def nobody(*arguments: object, **settings: object) -> None:
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", nobody)
    with pytest.raises(ValueError, match=r"no Ray at 'node-1:6379' \(nobody answers\); start it by `ray start --head`"):
        run_here(source, codec, tmp_path / "corpus", engine="ray", ray=RaySettings("node-1:6379"))
    assert (tmp_path / "corpus" / ".lock").stat().st_size == 0  # given back


def test_a_ray_that_is_slow_to_start_is_tried_again_and_then_told(codec, source, tmp_path, monkeypatch):
    import ray

    starts = []

    def slow(*arguments: object, **settings: object) -> None:
        starts.append(arguments)
        raise Exception("The current node timed out\nduring startup")  # as Ray itself does

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "init", slow)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(TimeoutError, match=r"at 'local' \(Exception: The current .* during startup\); try"):
        run_here(source, codec, tmp_path / "corpus", engine="ray")
    assert len(starts) == 3
    with pytest.raises(TimeoutError, match="did not start at 'node-1:6379'"):
        run_here(source, codec, tmp_path / "corpus", engine="ray", ray=RaySettings("node-1:6379"))
    assert len(starts) == 4  # somebody else's is not ours to start


@pytest.mark.parametrize(
    ("second", "words"), [(ConnectionError("gone"), "no Ray at 'local'"), (ValueError("bad address"), "^bad address$")]
)
def test_what_no_second_try_would_mend_is_told_at_once(second, words, codec, source, tmp_path, monkeypatch):
    import ray

    errors = [Exception("timed out"), second]  # the first try is only slow

    def start(*arguments: object, **settings: object) -> None:
        raise errors.pop(0)

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "init", start)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ValueError, match=words):
        run_here(source, codec, tmp_path / "corpus", engine="ray")
    assert not errors
