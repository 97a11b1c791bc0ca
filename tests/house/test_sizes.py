"""Nothing grows past what one can read: files, functions, constructors."""

from __future__ import annotations

import ast

import pytest
from source_tree import functions, python_files, short

FILE_LINES = 600
FUNCTION_LINES = 120
CONSTRUCTOR_PARAMETERS = 14
EVERYWHERE = ("mmtok", "recipes", "tests")


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Parameters without self."""
    a = node.args
    return len(a.posonlyargs) + len(a.args) + len(a.kwonlyargs) + bool(a.vararg) + bool(a.kwarg) - 1


def test_files_are_short():
    sizes = {short(p): len(p.read_text("utf-8").splitlines()) for p in python_files(*EVERYWHERE)}
    long = {name: n for name, n in sizes.items() if n > FILE_LINES}
    assert not long, f"more than {FILE_LINES} lines; split them: {long}"


def test_functions_are_short():
    long = {}
    for path in python_files(*EVERYWHERE):
        for name, node in functions(path):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES:
                long[f"{short(path)}:{name}"] = lines
    assert not long, f"more than {FUNCTION_LINES} lines; split them: {long}"


def test_constructors_take_few_parameters():
    counts = {}
    for path in python_files("mmtok", "recipes"):
        for name, node in functions(path):
            if node.name == "__init__":
                counts[f"{short(path)}:{name}"] = parameters(node)
    assert len(counts) > 20
    many = {name: n for name, n in counts.items() if n > CONSTRUCTOR_PARAMETERS}
    assert not many, f"more than {CONSTRUCTOR_PARAMETERS} parameters: {many}"


@pytest.mark.parametrize(
    ("signature", "count"), [("self", 0), ("self, a, b=1", 2), ("self, a, /, *rest, c, **more", 4)]
)
def test_parameters_are_counted_without_self(signature: str, count: int):
    node = ast.parse(f"def __init__({signature}): ...").body[0]
    assert isinstance(node, ast.FunctionDef)
    assert parameters(node) == count
