"""Every shipped kernel configuration compiles for sm_80 and sm_90 without a GPU, and fits there without spilling."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton has no package for this platform")

from mmtok.kernels.triton.inspect_variant import Compiled, all_variants
from mmtok.kernels.triton.variant import Variant

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "mmtok" / "kernels" / "triton"
ARCHITECTURES = (80, 90)
COMPILE = """
import dataclasses, json, sys
from mmtok.kernels.triton.inspect_variant import all_variants, compile_variants
for c in compile_variants(all_variants(), json.loads(sys.argv[1])):
    print(json.dumps([c.variant.name, c.architecture, c.faults()]))
"""


def launched_kernels(paths: list[Path]) -> set[str]:
    """Names of the ``triton.jit`` functions of these files that no other such function calls."""
    jitted, called = set(), set()
    for path in paths:
        for f in ast.parse(path.read_text("utf-8")).body:
            if isinstance(f, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in f.decorator_list):
                jitted.add(f.name)
                called |= {n.id for n in ast.walk(f) if isinstance(n, ast.Name)}
    return jitted - called


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], list[str]]:
    """What is wrong with each variant on each architecture, from a process without the interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path_factory.mktemp("home"))}
    command = [sys.executable, "-c", COMPILE, json.dumps(ARCHITECTURES)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {(name, architecture): found for name, architecture, found in rows}


def test_names_are_unique():
    names = [variant.name for variant in all_variants()]
    assert len(set(names)) == len(names) > 20


def test_every_kernel_has_a_variant():
    compiled = {variant.kernel.fn.__name__ for variant in all_variants()}
    launched = launched_kernels(sorted(FOLDER.glob("*.py")))
    assert len(launched) > 5 and not launched - compiled


def test_signatures_and_constants_name_the_kernel_arguments_in_order():
    for variant in all_variants():
        assert list(variant.signature) == variant.kernel.arg_names, variant.name
        constants = {name for name, kind in variant.signature.items() if kind == "constexpr"}
        assert constants == set(variant.constants), variant.name
        assert set(variant.aligned) <= set(variant.signature) - constants, variant.name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "architecture"),
    [pytest.param(v, a, id=f"{v.name}-{a}") for v in all_variants() for a in v.architectures],
)
def test_compiles_without_spills(faults: dict, variant: Variant, architecture: int):
    assert faults[variant.name, architecture] == []


def test_the_check_itself_sees_what_is_wrong():
    variant = Variant("x", None, {}, {}, 4, 1, matrix_unit=True)
    good = Compiled(variant, 90, registers=255, stack=0, shared=1000, local_accesses=0, matrix_instructions=3)
    assert good.faults() == []
    bad = Compiled(variant, 80, registers=256, stack=8, shared=170_000, local_accesses=2, matrix_instructions=0)
    found = " / ".join(bad.faults())
    for word in ("8 bytes of stack, 2 local", "256 registers", "170000 bytes of shared memory", "no HMMA"):
        assert word in found
