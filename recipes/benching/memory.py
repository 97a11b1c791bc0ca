"""How much memory one call takes beyond its inputs on a CPU, as the operating system sees it.

The timing process keeps freed memory, so it cannot tell. A fresh process is started whose malloc gives every block of
64 KiB and more back at once (MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_); there each contestant is called once to
warm up, the peak of the resident set is reset (/proc/self/clear_refs), and the call is repeated: peak minus before,
results included. That sees every allocator, also those of faiss and numba, but not what a contestant keeps for good.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benching.protocol import Inputs, Run, Setting, grad_mode
from benching.table import all_contests

GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"}
_START = "import sys; from benching.memory import probe; probe(sys.argv[1:])"


def resident() -> tuple[int, int]:
    """(now, peak) of the resident set in KiB."""
    status = Path("/proc/self/status").read_text("utf-8")
    found = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", status, re.M))
    return int(found["VmRSS"]), int(found["VmHWM"])


def extra_memory(
    names: Sequence[str], seed: int, smoke: bool, begun: Callable[[str], object] = lambda name: None
) -> dict[str, dict[str, float]]:
    """MiB of each contestant of the contests ``names``: contest -> contestant -> MiB.

    ``begun`` is told the name of each contest that begins.
    A contest during which the process dies (out of memory, say) has an entry without contestants; the rest goes on in
    a new process. Empty where there is no /proc/self/clear_refs.
    """
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return {}
    found: dict[str, dict[str, float]] = {}
    waiting = list(names)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | GIVES_BACK
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)  # it imports what this process does
    while waiting:
        command = [sys.executable, "-c", _START, str(seed), str(int(smoke)), *waiting]
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdout is not None
            for text in process.stdout:
                if not text.startswith('{"contest"'):
                    continue
                line = json.loads(text)
                if "mib" in line:
                    found[line["contest"]][line["contestant"]] = line["mib"]
                else:
                    found[line["contest"]] = {}
                    begun(line["contest"])
        before, waiting = waiting, [name for name in waiting if name not in found]
        if waiting == before:  # it died before the first contest: there is nothing to go on with
            break
    return found


def probe(arguments: list[str]) -> None:
    """The fresh process: a JSON line when a contest begins and one for each contestant."""
    torch.set_num_threads(1)
    seed, smoke, *names = arguments
    setting = Setting(torch.device("cpu"), int(seed), smoke == "1")
    builders = dict(all_contests(setting))
    for name in names:
        print(json.dumps({"contest": name}), flush=True)
        contest = builders[name]()
        if contest is None:
            continue
        inputs = contest.inputs(setting.generator(1))
        for contestant in contest.contestants:
            try:
                with grad_mode(contest):
                    run = contestant.build()
                    run(*inputs)
                    mib = call_peak(run, inputs)
            except Exception:  # the timing process says why
                continue
            print(json.dumps({"contest": name, "contestant": contestant.name, "mib": mib}), flush=True)


def call_peak(run: Run, inputs: Inputs) -> float:
    """Peak minus before of one call, in MiB; only right where malloc gives memory back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", "utf-8")  # the peak starts again at what is resident now
    before, _ = resident()
    output = run(*inputs)
    _, peak = resident()
    del output
    return round(max(0, peak - before) / 1024, 2)
