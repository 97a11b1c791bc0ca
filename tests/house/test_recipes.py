"""Every recipe runs with ``--smoke``, tells its flags, and keeps the flags that all trainings share."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from source_tree import ROOT, tree

RECIPES = sorted((ROOT / "recipes").glob("*.py"))
TRAINING_FLAGS = {"--data", "--out", "--steps", "--resume", "--smoke", "--seed"}


def flags(path: Path) -> list[str]:
    """First arguments of all ``add_argument`` calls that start with two dashes."""
    if any(isinstance(n, ast.ImportFrom) and n.module == "imaging.grid" for n in ast.walk(tree(path))):
        return [*CLAIM_FLAGS]
    calls = [n for n in ast.walk(tree(path)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
    names = [a.value for c in calls if c.func.attr == "add_argument" for a in c.args if isinstance(a, ast.Constant)]  # type: ignore[attr-defined]
    return [name for name in names if isinstance(name, str) and name.startswith("--")]


def trains(path: Path) -> bool:
    return any(isinstance(n, ast.ImportFrom) and n.module == "mmtok.training" for n in ast.walk(tree(path)))


CLAIM_FLAGS: list[str] = []
CLAIM_FLAGS.extend(flags(ROOT / "recipes" / "imaging" / "grid.py"))  # what all recipes of a grid share


def run_python(folder: Path, *arguments: str) -> str:
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(arguments)}:\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_there_are_recipes_that_train():
    assert sum(trains(path) for path in RECIPES) >= 2


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_has_the_common_flags_and_says_how_it_is_run(path: Path):
    own = flags(path)
    assert "--smoke" in own
    if trains(path):
        assert set(own) >= TRAINING_FLAGS
    header = ast.get_docstring(tree(path)) or ""
    assert f"recipes/{path.name}" in header, "the header states the command"


HELP_OF_EACH = """
import contextlib, io, json, runpy, sys
from pathlib import Path

texts = {}
for path in sys.argv[1:]:
    sys.argv[:], shown = [path, "--help"], io.StringIO()
    sys.path[0] = str(Path(path).parent)
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        runpy.run_path(path, run_name="__main__")
    texts[path] = shown.getvalue()
print(json.dumps(texts))
"""


@pytest.mark.slow
def test_help_names_every_flag(tmp_path: Path):
    shown = json.loads(run_python(tmp_path, "-c", HELP_OF_EACH, *map(str, RECIPES)))
    for path in RECIPES:
        assert flags(path)
        assert [flag for flag in flags(path) if flag not in shown[str(path)]] == [], path.name


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_runs_with_smoke(path: Path, tmp_path: Path):
    out = tmp_path / "out"
    run_python(tmp_path, str(path), "--smoke", *(["--out", str(out)] if "--out" in flags(path) else []))
    if trains(path):
        runs = [out] if (out / "log.jsonl").is_file() else sorted(p.parent for p in out.glob("*/finished.json"))
        assert runs
        for run in runs:
            assert (run / "tokenizer" / "model.safetensors").is_file()
            assert (run / "log.jsonl").read_text().count("\n") >= 1
        assert [p.name for p in tmp_path.iterdir()] == ["out"], "writes only below --out"
