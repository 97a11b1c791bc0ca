"""Imports go strictly downward, and what is heavy or optional is imported where it is used."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import source_tree
from source_tree import PACKAGE, ROOT, python_files, short, tracked_files, tree

# A part imports parts of lower ranks and its own folder only. A new part gets its line here.
RANKS = {
    "tokens": 0,
    "catalogue": 0,
    "kernels": 0,
    "layers": 1,
    "vocab": 1,
    "data": 1,
    "metrics": 1,
    "quantizers": 2,
    "tokenizer": 3,
    "losses": 3,
    "grid": 4,
    "image": 5,
    "audio": 5,
    "wrappers": 5,
    "auto": 6,
    "training": 7,
    "lm": 7,
    "bench": 8,
    "corpus": 8,
    "cli": 9,
    "__init__": 9,
}
# Optional, or slow to import, or both: only inside functions.
INSIDE_FUNCTIONS = {
    *("torchaudio", "torchvision", "triton", "soundfile", "pesq", "pystoi", "transformers", "tokenizers", "PIL", "av"),
    *("torchmetrics", "timm", "huggingface_hub", "scipy", "matplotlib", "pandas", "skimage"),
    *("numba", "llvmlite", "faiss", "vector_quantize_pytorch", "faster_whisper", "jiwer", "pocketsphinx"),
    *("snac", "speechtokenizer", "diffusers", "pycodec2", "datasets", "peft"),
    *("speechmos", "distillmos", "onnxruntime", "librosa", "mir_eval", "ray", "pyarrow", "webdataset"),
}
# Compiled kernels live in a folder of their own, imported when such a kernel runs.
COMPILED = {"triton": {"triton"}, "numba": {"numba", "llvmlite"}}


def part_of(path: Path) -> str:
    """``mmtok/data/audio.py`` -> ``data``, ``mmtok/tokens.py`` -> ``tokens``."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_parts(path: Path, node: ast.AST) -> Iterator[str]:
    """Parts of mmtok that an import statement names; other packages give nothing."""
    names: list[str] = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = path.relative_to(ROOT).with_suffix("").parts[: -node.level]
            base = ".".join([*package, *([base] if base else [])])
        names = [f"{base}.{alias.name}" for alias in node.names]
    for name in names:
        head, *rest = name.split(".")
        if head == "mmtok":
            yield rest[0] if rest and rest[0] in RANKS else "__init__"


def wrong_imports(path: Path, module: ast.Module) -> list[str]:
    own = part_of(path)
    wrong = []
    for node in ast.walk(module):
        for other in imported_parts(path, node):
            if other != own and RANKS[other] >= RANKS[own]:
                line = getattr(node, "lineno", 0)
                wrong.append(f"{short(path)}:{line}: {own} ({RANKS[own]}) imports {other} ({RANKS[other]})")
    return wrong


def top_level(module: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported: not in functions, not under TYPE_CHECKING."""
    waiting: list[ast.AST] = list(module.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.stmt):
            yield node
        waiting.extend(ast.iter_child_nodes(node))


def imported_packages(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and not node.level:
        return {(node.module or "").split(".")[0]}
    return set()


def test_every_part_has_a_rank():
    parts = {part_of(p) for p in python_files("mmtok")}
    assert parts <= RANKS.keys(), f"give these a rank in RANKS: {sorted(parts - RANKS.keys())}"


def test_imports_go_strictly_downward():
    wrong = [line for path in python_files("mmtok") for line in wrong_imports(path, tree(path))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("file", "code", "refused"),
    [
        ("image/x.py", "from mmtok.audio.codec import AudioCodec", True),
        ("image/x.py", "def f():\n    import mmtok.audio.codec", True),
        ("image/x.py", "from ..audio import codec", True),
        ("image/x.py", "from mmtok import audio", True),
        ("training/x.py", "from mmtok.bench import report", True),
        ("quantizers/x.py", "import mmtok", True),
        ("tokens.py", "from mmtok.kernels import nearest_code", True),
        (
            "image/x.py",
            "from mmtok.image import binary1d\nfrom . import binary1d\nimport torch, mmtok.tokenizer",
            False,
        ),
        ("training/x.py", "from mmtok.auto import load", False),
        ("cli/x.py", "from mmtok.lm import extend", False),
    ],
)
def test_the_check_itself_sees_wrong_imports(file: str, code: str, refused: bool):
    assert bool(wrong_imports(PACKAGE / file, ast.parse(code))) == refused


@pytest.mark.parametrize("compiler", COMPILED)
def test_only_compiled_kernels_import_their_compiler(compiler):
    folder = PACKAGE / "kernels" / compiler
    assert python_files(f"mmtok/kernels/{compiler}")
    for path in python_files("mmtok", "recipes"):
        if folder in path.parents:
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.stmt) and COMPILED[compiler] & imported_packages(node):
                pytest.fail(f"{short(path)}:{node.lineno} imports {compiler}: only kernels/{compiler} does")


def test_what_numba_keeps_on_disk_is_whole_in_its_file():
    """numba compiles again when a function's own file changes: what it took from another file would stay as it was."""
    seen = 0
    for path in python_files("mmtok/kernels/numba"):
        module = tree(path)
        names = {node.name for node in module.body if isinstance(node, ast.FunctionDef) and node.decorator_list}
        if not names or path.stem == "compiling":
            continue
        seen += 1
        for node in ast.walk(module):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mmtok."):
                assert node.module == "mmtok.kernels.numba.compiling", (
                    f"{short(path)} compiles and imports {node.module}"
                )
    assert seen >= 2


def test_heavy_packages_are_imported_inside_functions():
    wrong = []
    for path in python_files("mmtok"):
        allowed = next((COMPILED[c] for c in COMPILED if PACKAGE / "kernels" / c in path.parents), set())
        for node in top_level(tree(path)):
            found = imported_packages(node) & INSIDE_FUNCTIONS - allowed
            wrong += [f"{short(path)}:{node.lineno}: {name}" for name in sorted(found)]
    assert not wrong, "import these inside the functions that use them:\n" + "\n".join(wrong)


def test_top_level_means_what_runs_at_import():
    code = """
if TYPE_CHECKING:
    import a
else:
    import b
try:
    import c
except ImportError:
    import d
class E:
    import e
    def f(self):
        import f
"""
    names = set().union(*(imported_packages(node) for node in top_level(ast.parse(code))))
    assert names == {"b", "c", "d", "e"}


def test_importing_the_library_loads_nothing_heavy():
    """``import mmtok`` does not even load torch; loading a tokenizer's code loads no optional package."""
    code = "import json, sys\nseen = {}\n"
    for module in (
        "mmtok",
        "mmtok.auto",
        "mmtok.tokenizer",
        "mmtok.vocab",
        "mmtok.image.binary1d",
        "mmtok.audio.codec",
    ):
        code += f"import {module}\nseen[{module!r}] = sorted({{m.partition('.')[0] for m in sys.modules}})\n"
    done = subprocess.run([sys.executable, "-c", code + "print(json.dumps(seen))"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    seen: dict[str, list[str]] = json.loads(done.stdout)
    optional = INSIDE_FUNCTIONS - {"triton"}  # torch looks for triton by itself
    for module, loaded in seen.items():
        assert not optional & set(loaded), f"import {module} loads {sorted(optional & set(loaded))}"
    assert not {"torch", "numpy"} & set(seen["mmtok"])
    assert "torch" in seen["mmtok.audio.codec"]


def test_every_source_file_travels_with_a_clone():
    """No pattern of .gitignore swallows a folder of the package."""
    lost = set(python_files("mmtok", "recipes", "tests")) - set(tracked_files())
    assert not lost, f"git ignores {sorted(short(p) for p in lost)}: anchor the pattern in .gitignore with a slash"


def test_every_folder_of_the_package_is_installed():
    """Where pyproject.toml lists packages by name, none is forgotten: an editable install would not show it."""
    settings = (ROOT / "pyproject.toml").read_text("utf-8")
    listed = source_tree.listed_packages(settings)
    folders = {".".join(p.parent.relative_to(ROOT).parts) for p in python_files("mmtok")}
    assert listed is None or folders <= listed, f"pyproject.toml does not list {sorted(folders - (listed or set()))}"
