"""Small corpora to run, and what the tests of runs compare; as a script, the drivers that the tests kill.

``corpus_runs.py run SOURCE TOKENIZER OUT ENGINE WORKERS`` prints the summary and ends with its exit code;
``corpus_runs.py killing SOURCE TOKENIZER OUT KILLS SEED`` forks drivers and kills them at random moments.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from mmtok.corpus import attempts, pool
from mmtok.corpus.records import LOCK, LOG, PlanSettings, Task
from mmtok.corpus.run import tokenize_corpus
from mmtok.corpus.summary import Summary

ROOT = Path(__file__).resolve().parents[2]
ITEMS_PER_SHARD = 4
WAIT = 300.0  # seconds after which a test gives up: the machine may be busy


def save_codec(folder: Path, seed: int = 0) -> Path:
    """A codec of 64 samples a position with random weights."""
    from mmtok.audio.codec import AudioCodec

    torch.manual_seed(seed)
    sizes = {"encoder_width": 2, "decoder_width": 8, "latent_dim": 4, "num_codebooks": 3, "codebook_size": 16}
    model = AudioCodec(strides=(16, 2, 2), dilations=(1,), kernel_size=3, **sizes).eval()
    model.name = "audio-tiny"
    model.save(folder)
    return folder


def save_binary(folder: Path) -> Path:
    """An image tokenizer of 4 x 16 bits with random weights."""
    from mmtok.image.binary1d import Binary1D

    torch.manual_seed(0)
    blocks = {"encoder": (16, 1, 0), "decoder": (16, 1, 1), "head_dim": 8, "axes_dims": (4, 2, 2)}
    model = Binary1D(num_tokens=4, num_bits=16, patch_size=8, **blocks).eval()
    model.name = "image-tiny"
    model.save(folder)
    return folder


def run_here(source: Path, tokenizer: Path, out: Path, **changes: object) -> Summary:
    """In this process, which is the quickest for something small."""
    arguments: dict = {"engine": "accelerate", "plan_settings": PlanSettings(items_per_shard=ITEMS_PER_SHARD)}
    return tokenize_corpus(source, tokenizer, out, **(arguments | {"progress": False} | changes))


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a corpus but those that may differ between runs; hidden ones too: nothing may be left behind."""
    files = {p.relative_to(out).as_posix(): p for p in sorted(out.rglob("*")) if p.is_file()}
    return {name: p.read_bytes() for name, p in files.items() if name not in (LOG, LOCK)}


def assert_same(out: Path, expected: dict[str, bytes]) -> None:
    found = contents(out)
    assert sorted(found) == sorted(expected)
    different = [name for name in found if found[name] != expected[name]]
    assert different == [], different


def log_of(out: Path) -> list[dict]:
    """The lines of shards in the log."""
    lines = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
    return [line for line in lines if "shard" in line]


def start_driver(*arguments: object) -> subprocess.Popen:
    """This file as a script, in a process group of its own."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_until(condition, what: str) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, f"waited {WAIT:.0f} s in vain until {what}"
        time.sleep(0.02)


def serve_and_die(pipe, model_threads: int) -> None:
    """A worker that dies in the middle of shard 1, every time."""
    real = pool.attempt

    def deadly(task: Task, threads: int) -> attempts.Outcome:
        if task.shard == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(task, threads)

    pool.attempt = deadly
    SERVE(pipe, model_threads)


SERVE = pool._serve


def killing(source: Path, tokenizer: Path, out: Path, kills: int, seed: int) -> None:
    """Fork drivers, kill -9 each at a random moment, and go on in its folder until that is finished; then in another.

    ``OUT-undisturbed`` and ``OUT-0``, ``OUT-1`` ... are to be the same. Prints what ended each driver and what it left.
    Moments are seconds of the processor's time, since a busy machine stretches all others; whatever a run loads was
    loaded before the first fork, so that the moments fall on its work.
    """
    torch.set_num_threads(1)
    run_here(source, tokenizer, out.with_name(f"{out.name}-warm"))
    start = time.process_time()
    run_here(source, tokenizer, out.with_name(f"{out.name}-undisturbed"))
    spent, draw, killed, number = time.process_time() - start, random.Random(seed), 0, 0
    while True:
        now = out.with_name(f"{out.name}-{number}")
        if (pid := os.fork()) == 0:
            code = 1
            try:
                code = run_here(source, tokenizer, now).exit_code
            finally:
                os._exit(code)
        # What remains gets less with every kill: early moments (lock, plan) are drawn more often than late ones.
        moment = draw.choice((0.2, 0.5, 1.0)) * spent * draw.random() if killed < kills else math.inf
        while seconds_of(pid) < moment:
            time.sleep(0.0005)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        end = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else str(os.WEXITSTATUS(status))
        hidden = sorted(p.name for p in now.rglob(".*") if p.name != LOCK) if now.is_dir() else []
        line = {"out": now.name, "moment": moment / spent, "end": end, "hidden": hidden}
        print(json.dumps({**line, "shards": len(list(now.glob("shards/*.done.json")))}))
        killed += end == "SIGKILL"
        if end != "SIGKILL":
            number += 1
            if killed >= kills:
                return


def seconds_of(pid: int) -> float:
    """Processor time of all threads of a process; endless for one that has ended."""
    try:
        stats = [p.read_text() for p in Path(f"/proc/{pid}/task").glob("*/schedstat")]
        ended = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return math.inf
    return math.inf if ended else sum(int(text.split()[0]) for text in stats) / 1e9


def main(action: str, source: str, tokenizer: str, out: str, *more: str) -> int:
    if action == "killing":
        killing(Path(source), Path(tokenizer), Path(out), int(more[0]), int(more[1]))
        return 0
    changes = {"engine": more[0], "workers": int(more[1]), "progress": True}
    summary = run_here(Path(source), Path(tokenizer), Path(out), **changes)
    print(summary)
    return summary.exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
