"""House words: no catch-all files, no passed-through keywords, nothing left undone, one name for one thing."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from source_tree import ROOT, functions, python_files, short, tree

# What a subclass must write; a NotImplementedError anywhere else is something that was left undone.
ABSTRACT = {
    "mmtok/tokenizer.py": {
        "Tokenizer.base_spec",
        "Tokenizer.encode",
        "Tokenizer.decode",
        "ImageTokenizer.encode_pixels",
        "ImageTokenizer.decode_pixels",
        "AudioTokenizer.encode_samples",
        "AudioTokenizer.decode_samples",
    }
}
OTHER_NAMES = {"n_q": "num_codebooks", "cardinality": "codebook_size", "token_id": "code or id"}
THEIRS = {"eos_token_id", "pad_token_id", "bos_token_id"}  # transformers' own names of arguments and attributes
UNDONE = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")


def test_no_catch_all_files():
    names = {"utils", "util", "helpers", "helper", "misc", "common"}
    found = [short(p) for p in python_files("mmtok", "recipes", "tests") if p.stem in names or p.parent.name in names]
    assert not found, f"name these for what they do: {found}"


def test_public_functions_pass_no_keywords_through():
    found = []
    for path in python_files("mmtok"):
        for name, node in functions(path):
            public = not any(part.startswith("_") and not part.startswith("__") for part in name.split("."))
            if public and node.args.kwarg:
                found.append(f"{short(path)}:{node.lineno}: {name}(**{node.args.kwarg.arg})")
    assert not found, "name the parameters:\n" + "\n".join(found)


def undone_words(source: str) -> list[int]:
    """Lines whose comment or string says that something is still to do."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    kinds = (tokenize.COMMENT, tokenize.STRING)
    return [t.start[0] for t in tokens if t.type in kinds and UNDONE.search(t.string)]


def test_nothing_is_left_to_do():
    found = [
        f"{short(path)}:{line}"
        for path in python_files("mmtok", "recipes")
        for line in undone_words(path.read_text("utf-8"))
    ]
    assert not found, found


def not_implemented(path: Path) -> Iterator[str]:
    """Qualified names of functions that raise NotImplementedError."""
    for name, node in functions(path):
        for inner in ast.walk(node):
            if isinstance(inner, ast.Raise) and inner.exc and "NotImplementedError" in ast.unparse(inner.exc):
                yield name


def test_not_implemented_is_for_abstract_methods_only():
    found = {short(path): names for path in python_files("mmtok", "recipes") if (names := set(not_implemented(path)))}
    assert found == ABSTRACT


def is_empty(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A body of nothing but a docstring, ``pass`` or ``...``."""
    return all(
        isinstance(s, ast.Pass) or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)) for s in node.body
    )


def protocols(module: ast.Module) -> set[str]:
    """Names of the classes of a module that derive from Protocol."""
    classes = [n for n in ast.walk(module) if isinstance(n, ast.ClassDef)]
    return {c.name for c in classes if any("Protocol" in ast.unparse(b) for b in c.bases)}


def test_no_function_is_empty():
    """Empty bodies belong to protocols, abstract methods and overloads, and to callbacks inside a function."""
    found = []
    for path in python_files("mmtok", "recipes"):
        contracts, all_names = protocols(tree(path)), {name for name, _ in functions(path)}
        for name, node in functions(path):
            if name.rpartition(".")[0] in all_names:
                continue
            marks = " ".join(ast.unparse(d) for d in node.decorator_list)
            declared = "abstractmethod" in marks or "overload" in marks or contracts & set(name.split(".")[:-1])
            if is_empty(node) and not declared:
                found.append(f"{short(path)}:{node.lineno}: {name}")
    assert not found, "these do nothing:\n" + "\n".join(found)


def identifiers(module: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(module):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Name):
            yield line, node.id
        elif isinstance(node, ast.Attribute):
            yield line, node.attr
        elif isinstance(node, ast.arg) or (isinstance(node, ast.keyword) and node.arg):
            yield line, str(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield line, node.name


def other_names(module: ast.Module) -> list[tuple[int, str]]:
    """Identifiers that are, or contain as whole words, a name that has another one in this house."""
    pattern = re.compile("|".join(rf"(?:^|_){name}(?:$|_)" for name in OTHER_NAMES))
    return [(line, name) for line, name in identifiers(module) if name not in THEIRS and pattern.search(name)]


def test_one_name_for_one_thing():
    found = [
        f"{short(p)}:{line}: {name}" for p in python_files("mmtok", "recipes") for line, name in other_names(tree(p))
    ]
    assert not found, f"the house says {OTHER_NAMES}:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("def f(n_q): return x.cardinality", ["n_q", "cardinality"]),
        ("f(token_id=1); max_n_q = 2", ["token_id", "max_n_q"]),
        ("class Cardinality: pass\ntoken_ids = in_queue = 1", []),
    ],
)
def test_the_check_itself_sees_other_names(code: str, names: list[str]):
    assert sorted(name for _, name in other_names(ast.parse(code))) == sorted(names)


def test_the_checks_themselves_see_what_is_undone(tmp_path: Path):
    assert undone_words("x = 1  # TODO later\ny = 'FIXME'\nz = TODO_LIST\n") == [1, 2]
    bodies = {"...": True, "pass": True, '"""Says."""': True, "return 1": False, '"""Says."""\n    return 1': False}
    for body, empty in bodies.items():
        node = ast.parse(f"def f():\n    {body}\n").body[0]
        assert isinstance(node, ast.FunctionDef)
        assert is_empty(node) == empty, body
    assert protocols(ast.parse("class A(Protocol): ...\nclass B(A): ...")) == {"A"}
    file = tmp_path / "x.py"
    file.write_text("class A:\n    def f(self):\n        raise NotImplementedError\n")
    assert list(not_implemented(file)) == ["A.f"]
    assert (ROOT / "mmtok/tokenizer.py").is_file()
