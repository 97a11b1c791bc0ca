"""Run a test file as a script under Triton's interpreter, which must be chosen before a kernel is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def results_of(script: str, folder: Path) -> Any:
    """What ``script`` saves to the path it is given: every case in one process, since each start takes seconds."""
    out = folder / "results.pt"
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script, str(out)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)
