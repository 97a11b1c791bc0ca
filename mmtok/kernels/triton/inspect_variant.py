"""Compile a kernel configuration for a GPU that need not be here, and read what the assembler made of it.

The registers, the stack and the shared memory come from the compiled binary, the instructions from its disassembly,
both by the tools inside the triton package. A stack, or a load or store of local memory, means that registers spilled.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import os
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import mmtok.kernels.triton as package
from mmtok.kernels.triton.variant import Variant

# Shared memory that one program may use on each architecture (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10}
MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA"}
REGISTER_LIMIT = 255


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What one variant became on one architecture.

    Args:
        architecture: 80 for sm_80, 90 for sm_90. registers: of one thread. stack: bytes of one thread.
        shared: bytes of one program. local_accesses: instructions that read or write local memory.
        matrix_instructions: HMMA on sm_80, HGMMA on sm_90.
    """

    variant: Variant
    architecture: int
    registers: int
    stack: int
    shared: int
    local_accesses: int
    matrix_instructions: int

    def faults(self) -> list[str]:
        """What is wrong with it, in words; empty for a variant that may be shipped."""
        found = []
        if self.stack or self.local_accesses:
            found.append(f"spills: {self.stack} bytes of stack, {self.local_accesses} local loads and stores")
        if self.registers > REGISTER_LIMIT:
            found.append(f"{self.registers} registers, at most {REGISTER_LIMIT}")
        if self.shared > SHARED_LIMIT[self.architecture]:
            found.append(f"{self.shared} bytes of shared memory, at most {SHARED_LIMIT[self.architecture]}")
        if self.variant.matrix_unit and not self.matrix_instructions:
            found.append(f"no {MATRIX_INSTRUCTION[self.architecture]} instruction")
        return found


def all_variants() -> list[Variant]:
    """The VARIANTS of every module of this folder that has kernels."""
    found: list[Variant] = []
    for module in pkgutil.iter_modules(package.__path__):
        found += getattr(importlib.import_module(f"{package.__name__}.{module.name}"), "VARIANTS", [])
    return found


def compile_variants(variants: Sequence[Variant], architectures: Sequence[int] = (80, 90)) -> Iterator[Compiled]:
    """Compile each variant for each of the architectures that it is meant for; nothing stays on disk.

    Raises:
        RuntimeError: this process runs triton's interpreter, under which nothing can be compiled.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("expected a process without TRITON_INTERPRET, which replaces the compiler; unset it")
    with tempfile.TemporaryDirectory() as folder, _cache_in(Path(folder)), ThreadPoolExecutor(1) as disassembler:
        waiting: Future[Compiled] | None = None  # read by another process while the next one is compiled
        pairs = [(v, a) for v, a in itertools.product(variants, architectures) if a in v.architectures]
        for number, (variant, architecture) in enumerate(pairs):
            binary = Path(folder) / f"{number}.cubin"
            shared = _compile(variant, architecture, binary)
            reading = disassembler.submit(_read, variant, architecture, binary, shared)
            if waiting is not None:
                yield waiting.result()
            waiting = reading
        if waiting is not None:
            yield waiting.result()


def _compile(variant: Variant, architecture: int, binary: Path) -> int:
    """Write the compiled code to ``binary``; the bytes of shared memory of one program."""
    names = list(variant.signature)
    source = ASTSource(
        fn=variant.kernel,
        signature=variant.signature,
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    binary.write_bytes(compiled.asm["cubin"])
    return int(compiled.metadata.shared)


def _read(variant: Variant, architecture: int, binary: Path, shared: int) -> Compiled:
    usage = _tool("cuobjdump", "-res-usage", str(binary))
    resources = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if resources is None:
        raise RuntimeError(f"expected REG and STACK in what cuobjdump prints, got {usage[-300:]!r}")
    code = _tool("nvdisasm", "-c", "-ndf", str(binary))  # instructions alone, no analysis of branches: half the time
    if not re.search(r"\bEXIT\b", code):
        raise RuntimeError(f"expected the instructions of {variant.name} from nvdisasm, got {code[:300]!r}")
    return Compiled(
        variant,
        architecture,
        registers=int(resources[1]),
        stack=int(resources[2]),
        shared=shared,
        local_accesses=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        matrix_instructions=len(re.findall(rf"\b{MATRIX_INSTRUCTION[architecture]}\b", code)),
    )


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True)
    return done.stdout


@contextmanager
def _cache_in(folder: Path) -> Iterator[None]:
    """Triton's cache goes below ``folder``."""
    before = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")
    try:
        yield
    finally:
        os.environ.pop("TRITON_CACHE_DIR")
        if before is not None:
            os.environ["TRITON_CACHE_DIR"] = before
