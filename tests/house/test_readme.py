"""README runs: every Python block, and the `mmtok` lines of shell blocks under ``<!-- run -->``, in their order.

All of them share one folder, in which photo.jpg, speech.flac and a folder recordings lie, as a reader would have them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from source_tree import PACKAGE, ROOT

SHELLS = ("bash", "sh", "shell", "console")
LANGUAGES = ("python", *SHELLS)
RUN_MARK = "<!-- run -->"


class Block(NamedTuple):
    language: str
    line: int
    marked: bool
    code: str


def blocks(text: str) -> list[Block]:
    """Fenced blocks; ``marked`` when the last line with text before the block is the mark."""
    found: list[Block] = []
    language, start, body, before, marked = None, 0, [], "", False
    for number, line in enumerate(text.splitlines(), 1):
        if language is None and (fence := re.match(r"```(\S*)", line)):
            language, start, body, marked = fence[1].lower(), number, [], before.strip() == RUN_MARK
        elif language is not None and line.startswith("```"):
            found.append(Block(language, start, marked, "\n".join(body) + "\n"))
            language, before = None, ""
        elif language is not None:
            body.append(line)
        elif line.strip():
            before = line
    assert language is None, f"the block that line {start} opens never ends"
    return found


def commands(code: str) -> list[str]:
    """The lines that start with ``mmtok``, after a prompt or not, with their continuations."""
    joined = re.sub(r"\s*\\\n\s*", " ", code)
    lines = [line.removeprefix("$ ") for line in joined.splitlines()]
    return [line for line in lines if line.startswith("mmtok ")]


def readme() -> list[Block]:
    return blocks((ROOT / "README.md").read_text("utf-8"))


def environment(folder: Path) -> dict[str, str]:
    """The repository importable, and a command ``mmtok`` that is this interpreter's."""
    command = folder / "bin" / "mmtok"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mmtok.cli "$@"\n')
    command.chmod(0o755)
    paths = {"PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return os.environ | paths


def make_llama(folder: Path) -> None:
    """A tiny language model with its tokenizer, for the blocks that have one of the reader's own."""
    import tokenizers
    import transformers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def run(command: list[str], folder: Path, env: dict[str, str], what: str) -> None:
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"README.md, {what}:\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"


def test_readme_has_code_to_run():
    found = readme()
    assert any(b.language == "python" for b in found), "README.md has no ```python block"
    assert any(b.marked and b.language in SHELLS and commands(b.code) for b in found), (
        f"README.md has no shell block under {RUN_MARK} with a line that starts with `mmtok `"
    )
    unknown = [b.line for b in found if b.marked and b.language not in LANGUAGES]
    assert not unknown, f"blocks at lines {unknown} are marked to run, but in no language that can"


@pytest.mark.slow
def test_readme_code_runs(tmp_path: Path):
    work = tmp_path / "work"
    work.mkdir()
    shutil.copyfile(PACKAGE / "assets" / "chelsea.jpg", work / "photo.jpg")
    shutil.copyfile(PACKAGE / "assets" / "speech.flac", work / "speech.flac")
    (work / "recordings").mkdir()
    shutil.copyfile(PACKAGE / "assets" / "speech.flac", work / "recordings" / "speech.flac")
    (work / "recordings" / "speech.txt").write_text("a transcript")
    make_llama(work / "my-llama")
    env, ran = environment(tmp_path), 0
    for block in readme():
        if block.language == "python":
            run([sys.executable, "-c", block.code], work, env, f"the Python block at line {block.line}")
            ran += 1
        elif block.marked and block.language in SHELLS:
            for line in commands(block.code):
                run(["sh", "-c", line], work, env, f"`{line}` below line {block.line}")
                ran += 1
    assert ran > 0


# ---- the reading itself ----

EXAMPLE = f"""
```python
a = 1
```
text
{RUN_MARK}

```sh
$ mmtok list   # all
pip install x
mmtok encode a.jpg \\
  -o b
```
```bash
mmtok demo
```
"""


def test_blocks_are_found_with_their_language_and_mark():
    found = blocks(EXAMPLE)
    assert [(b.language, b.marked) for b in found] == [("python", False), ("sh", True), ("bash", False)]
    assert found[0].code == "a = 1\n"
    assert found[0].line == 2
    assert commands(found[1].code) == ["mmtok list   # all", "mmtok encode a.jpg -o b"]


def test_an_open_block_is_an_error():
    with pytest.raises(AssertionError, match="line 2 opens never ends"):
        blocks("x\n```python\na = 1\n")


def test_a_failing_block_fails_the_test(tmp_path: Path):
    env = environment(tmp_path)
    run(["sh", "-c", "command -v mmtok"], tmp_path, env, "nothing")
    with pytest.raises(AssertionError, match=r"(?s)README\.md, the block:.*ZeroDivisionError"):
        run([sys.executable, "-c", "1 / 0"], tmp_path, env, "the block")
