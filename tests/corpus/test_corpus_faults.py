"""Faults for real: workers and drivers killed at random moments, a full disk; then the bytes of no fault at all."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import active_children
from pathlib import Path

import psutil
import pytest
from corpus_runs import (
    assert_same,
    log_of,
    run_here,
    serve_and_die,
    start_driver,
    wait_until,
)

from mmtok.corpus import attempts, pool
from mmtok.corpus.index import Corpus

SOUNDS, SHARDS = 36, 9


def markers(out: Path) -> int:
    return len(list(out.glob("shards/*.done.json")))


def assert_every_key_once(out: Path) -> None:
    keys = [row.key for row in Corpus(out)]
    assert len(keys) == len(set(keys)) == SOUNDS


@pytest.mark.slow
def test_workers_killed_at_random_moments_lose_nothing(codec: Path, source: Path, expected: dict, tmp_path: Path):
    out, draw, killed, over = tmp_path / "corpus", random.Random(5), [], threading.Event()

    def kill() -> None:
        while len(killed) < 2 and not over.is_set():
            workers = [p for p in active_children() if p.name == "mmtok corpus worker" and p.pid not in killed]
            if workers and markers(out) >= len(killed):
                time.sleep(draw.random() * 0.1)
                victim = draw.choice(workers)
                os.kill(victim.pid or 0, signal.SIGKILL)
                killed.append(victim.pid)
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        summary = run_here(source, codec, out, engine="local", workers=2)
    finally:
        over.set()
        killer.join()
    assert len(killed) == 2
    assert (summary.exit_code, summary.done, summary.made) == (0, SHARDS, SHARDS)
    assert_same(out, expected)
    assert_every_key_once(out)
    assert max(line["attempts"] for line in log_of(out)) >= 2
    assert len(log_of(out)) == SHARDS and not active_children()


@pytest.mark.slow
def test_a_shard_that_kills_its_worker_every_time_is_given_up(codec, source, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "_serve", serve_and_die)
    monkeypatch.setattr(attempts, "RETRIES", 1)
    summary = run_here(source, codec, tmp_path / "corpus", engine="local")
    assert (summary.exit_code, summary.done) == (1, SHARDS - 1)
    assert dict(summary.missing) == {1: "the worker died (SIGKILL)"}
    assert {line["shard"]: line["attempts"] for line in log_of(tmp_path / "corpus")}[1] == 2
    assert run_here(source, codec, tmp_path / "corpus").made == 1
    assert_same(tmp_path / "corpus", expected)


@pytest.mark.slow
def test_drivers_killed_at_random_moments_lose_nothing(codec: Path, source: Path, expected: dict, tmp_path: Path):
    """Twenty kills, each in a forked driver that begins where the one before was killed."""
    driver = start_driver("killing", source, codec, tmp_path / "corpus", 20, 11)
    told, _ = driver.communicate(timeout=600)
    assert driver.returncode == 0, told
    lines = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    assert sum(line["end"] == "SIGKILL" for line in lines) == 20
    assert sum(0 < line["shards"] < SHARDS for line in lines) >= 3, told  # in the middle of the work
    finished = {line["out"] for line in lines if line["end"] == "0"}
    assert finished == {line["out"] for line in lines}
    for name in (*finished, "corpus-undisturbed"):
        assert_same(tmp_path / name, expected)
        assert_every_key_once(tmp_path / name)


@pytest.mark.slow
def test_a_killed_driver_takes_its_workers_along_and_another_goes_on(codec, source, expected, tmp_path):
    out = tmp_path / "corpus"
    driver = start_driver("run", source, codec, out, "local", 2)
    wait_until(lambda: markers(out) >= 2 or driver.poll() is not None, "two shards are done")
    workers = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    assert len(workers) >= 2
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive, "workers outlived their driver"
    assert markers(out) < SHARDS and not (out / "index.json").exists()
    # The lock went with the process; Ctrl-C, sent to all of them, lets the workers finish.
    driver = start_driver("run", source, codec, out, "local", 1)
    before = markers(out)
    wait_until(lambda: markers(out) > before or driver.poll() is not None, "another shard is done")
    os.killpg(driver.pid, signal.SIGINT)
    told, _ = driver.communicate(timeout=300)
    assert driver.returncode == 130, told
    assert "the same command goes on where this one stopped" in told and "Traceback" not in told
    assert before < markers(out) < SHARDS
    assert run_here(source, codec, out).exit_code == 0
    assert_same(out, expected)
    assert_every_key_once(out)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount here; a full disk is also simulated in test_corpus_run.py")
    if done.returncode:
        pytest.skip(f"not permitted to mount a small disk: {done.stderr.strip()}; see also test_corpus_run.py")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs is Linux")
def test_a_full_disk_ends_the_run_and_room_lets_it_go_on(codec: Path, source: Path, expected: dict, small_disk: Path):
    free = os.statvfs(small_disk)
    needed = sum(-(-len(data) // free.f_bsize) for data in expected.values()) * free.f_bsize
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"\0" * (free.f_bavail * free.f_bsize - needed // 2))
    out = small_disk / "corpus"
    summary = run_here(source, codec, out)
    assert summary.exit_code == 1 and 0 < summary.done < SHARDS
    assert "No space left" in (summary.stopped or "") or "no room to write" in (summary.stopped or "")
    assert not [p for p in out.rglob(".*") if p.name != ".lock"], "something half written was left"
    again = run_here(source, codec, out)
    assert again.exit_code == 1 and again.done >= summary.done
    ballast.unlink()
    assert run_here(source, codec, out).exit_code == 0
    assert_same(out, expected)
    assert_every_key_once(out)
