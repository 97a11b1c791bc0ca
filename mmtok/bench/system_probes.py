"""Measurements for the part `systems`: which weights are read, how much arithmetic, memory and waiting there is."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import gc
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from mmtok.bench.contenders import Contender, open_contenders
from mmtok.bench.records import Item
from mmtok.kernels import dispatch
from mmtok.tokenizer import TRAINING_STATE
from mmtok.tokens import Tokens

_MEMORY_TIMEOUT = 900  # seconds


def machine() -> dict[str, Any]:
    """What a timing depends on beside the tokenizer: processor, threads, accelerator, torch."""
    processor = platform.processor() or platform.machine()
    facts = Path("/proc/cpuinfo")
    if facts.is_file():
        names = [line.partition(":")[2].strip() for line in facts.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    found = {"machine": f"{processor}, {os.cpu_count()} processors, {platform.system()}"}
    found |= {"accelerator": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return found | {"threads": torch.get_num_threads(), "torch": torch.__version__}


def sounds_or_pictures(contender: Contender, items: Sequence[Item]) -> Tokens:
    """All ``items`` encoded in one call, at the contender's rate."""
    text = [item.text for item in items] if contender.with_text else None
    return contender.tokenizer.encode(
        [item.x for item in items],
        sample_rate=items[0].sample_rate,
        text=text,
        num_codebooks=contender.num_codebooks,
        num_tokens=contender.num_tokens,
    )


def given_back(contender: Contender, tokens: Tokens, items: Sequence[Item]) -> Tensor | list[Tensor]:
    """All ``tokens`` decoded in one call, each at its own size; noise, if any, is the same every time."""
    text = [item.text for item in items] if contender.with_text else None
    generator = torch.Generator(device=contender.tokenizer.device).manual_seed(0)
    return contender.tokenizer.decode(tokens, text=text, generator=generator)


def wait(contender: Contender) -> None:
    """Until the device has done what it was given."""
    if contender.tokenizer.device.type == "cuda":
        torch.cuda.synchronize(contender.tokenizer.device)


# ---- weights and arithmetic


@dataclasses.dataclass(frozen=True)
class Weights:
    """Numbers that inference reads, parameters and codebooks.

    Args:
        total: of the tokenizer's own. external: of frozen networks that its config names and its checkpoint leaves out.
    """

    total: int
    external: int


def weights(contender: Contender) -> Weights:
    """Count them; statistics that only training reads are left out, shared ones count once."""
    external = contender.tokenizer.external_prefixes()
    sizes = {True: 0, False: 0}
    for key, (_, size) in _tensors(contender).items():
        sizes[key.startswith(external)] += size
    return Weights(sizes[False], sizes[True])


def _tensors(contender: Contender) -> dict[str, tuple[int, int]]:
    """Name -> (address, numbers) of each floating tensor of the state, shared ones once."""
    found: dict[str, tuple[int, int]] = {}
    addresses = set()
    for key, value in contender.tokenizer.state_dict().items():
        address = value.untyped_storage().data_ptr()
        if key.endswith(TRAINING_STATE) or not value.is_floating_point() or (address, value.numel()) in addresses:
            continue
        addresses.add((address, value.numel()))
        found[key] = (address, value.numel())
    return found


class _Reads(TorchDispatchMode):
    """Notes which storages are an operand of anything."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs or {})):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                self.seen.add(leaf.untyped_storage().data_ptr())
        return func(*args, **(kwargs or {}))


@dataclasses.dataclass(frozen=True)
class Work:
    """What one call takes.

    Args:
        flops: floating-point operations of products (two a multiply-add).
        weights: numbers of the weights that it reads.
    """

    flops: int
    weights: int


def work_of(contender: Contender, call: Callable[[], object]) -> Work:
    """Count the arithmetic of ``call`` and the weights that it reads; ``call`` must have run before.

    Counted are matrix products, convolutions, attention, LSTMs, pairwise distances and searches of the nearest code (as
    a product with the whole codebook); element-wise operations, small searches, norms, Fourier transforms and what runs
    outside torch are not.
    """
    reads, counter = _Reads(), FlopCounterMode(display=False, custom_mapping=_formulas())
    fast = torch.backends.mha.get_fastpath_enabled()
    threads = torch.get_num_threads()
    torch.backends.mha.set_fastpath_enabled(False)  # a fused layer is no product that the counter knows
    torch.set_num_threads(1)  # a mode sees its own thread only
    # The counter hooks into autograd, which it takes to be on for whatever has a parameter behind it.
    trained = [p for p in contender.tokenizer.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        with dispatch.force("torch"), counter, reads:
            call()
    finally:
        for p in trained:
            p.requires_grad_(True)
        torch.set_num_threads(threads)
        torch.backends.mha.set_fastpath_enabled(fast)
    read = sum(size for address, size in _tensors(contender).values() if address in reads.seen)
    return Work(int(counter.get_total_flops()), read)


def _formulas() -> dict[Any, Any]:
    """Operators that `FlopCounterMode` has no formula for, in torch 2.11; each gets shapes."""

    def attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def lstm(x: Any, *weights: Any, out_shape: Any = None, **kwargs: Any) -> int:
        steps = math.prod(x[:-1])
        return 2 * steps * sum(math.prod(w) for w in weights[:2])

    def distances(first: Any, second: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return 2 * math.prod(first) * second[-2]

    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten.mkldnn_rnn_layer: lstm,
        aten._cdist_forward: distances,
    }


# ---- memory


class MemoryNotMeasuredError(RuntimeError):
    """The reason why, and what to do."""


def peak_memory(contender: Contender, item: Item, helpers: Path | None = None) -> dict[str, float]:
    """Bytes above what the loaded tokenizer holds, at most, while one item is encoded, and decoded; and ``load``.

    On CUDA by the allocator, in this process. On a CPU by the resident set of a fresh process, which opens the
    contender by its source or label, runs once to warm up, gives freed memory back to the system, and runs again.
    ``helpers`` is the folder in which it finds a text encoder.

    Raises:
        MemoryNotMeasuredError: no ``/proc``, or a label that a fresh process cannot open.
    """
    if contender.tokenizer.device.type == "cuda":
        return _cuda_memory(contender, item)
    if not Path("/proc/self/clear_refs").exists():
        raise MemoryNotMeasuredError("the resident set is read from Linux's /proc, which this system has not")
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        save_file({"x": item.x.contiguous()}, Path(folder) / "item.safetensors")
        about: dict[str, Any] = {
            "source": contender.source or contender.label,
            "sample_rate": item.sample_rate,
            "text": item.text,
        }
        about |= {"threads": torch.get_num_threads(), "helpers": None if helpers is None else str(helpers)}
        (Path(folder) / "item.json").write_text(json.dumps(about))
        code = "import sys; from mmtok.bench.system_probes import measure_here; measure_here(sys.argv[1])"
        # Large blocks are mapped and unmapped one by one, so that what is freed is not counted as held.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        command = [sys.executable, "-W", "ignore", "-c", code, folder]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_MEMORY_TIMEOUT)
        except subprocess.TimeoutExpired as e:
            raise MemoryNotMeasuredError(f"a fresh process took more than {_MEMORY_TIMEOUT} s; shorten the item") from e
        result = Path(folder) / "memory.json"
        if done.returncode or not result.is_file():
            said = (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
            raise MemoryNotMeasuredError(f"a fresh process could not measure {about['source']!r}: {said}")
        return json.loads(result.read_text())


def measure_here(folder: str) -> None:
    """What the fresh process of `peak_memory` does; writes ``memory.json`` into ``folder``."""
    from safetensors.torch import load_file

    about = json.loads((Path(folder) / "item.json").read_text())
    item = Item("item", load_file(Path(folder) / "item.safetensors")["x"], about["sample_rate"], about["text"])
    torch.set_num_threads(about["threads"])
    before = _resident("VmRSS")
    helpers = None if about["helpers"] is None else Path(about["helpers"])
    (contender,) = open_contenders([about["source"]], helpers=helpers)
    loaded = _resident("VmRSS")
    tokens = contender.encode(item)  # the first run also brings in libraries
    found = {"load": float(loaded - before), "encode": _peak_of(lambda: contender.encode(item))}
    if not contender.tokenizer.encode_only:
        contender.decode(tokens, item)
        found["decode"] = _peak_of(lambda: contender.decode(tokens, item))
    (Path(folder) / "memory.json").write_text(json.dumps(found))


def _peak_of(call: Callable[[], object]) -> float:
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another libc: what it keeps stays in the baseline
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = _resident("VmRSS")
    call()
    return float(max(0, _resident("VmHWM") - before))


def _resident(field: str) -> int:
    """Bytes that ``/proc/self/status`` states."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _cuda_memory(contender: Contender, item: Item) -> dict[str, float]:
    device = contender.tokenizer.device

    def peak(call: Callable[[], object]) -> float:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device) - before)

    held = (*contender.tokenizer.parameters(), *contender.tokenizer.buffers())
    tokens = contender.encode(item)
    found = {"load": float(sum(t.numel() * t.element_size() for t in held))}
    found["encode"] = peak(lambda: contender.encode(item))
    if not contender.tokenizer.encode_only:
        contender.decode(tokens, item)
        found["decode"] = peak(lambda: contender.decode(tokens, item))
    return found


# ---- streams


@dataclasses.dataclass
class Streamed:
    """Seconds of one sound through both streamers: of each push, and until the first tokens and the first sound."""

    encode: list[float] = dataclasses.field(default_factory=list)
    decode: list[float] = dataclasses.field(default_factory=list)
    packet: float | None = None
    sound: float | None = None


def stream_once(contender: Contender, x: Tensor, chunk_ms: int) -> Streamed:
    """Push ``x`` (1, L) at the model's rate in pieces of ``chunk_ms``, and what comes out into the decoder."""
    tokenizer: Any = contender.tokenizer
    encoder, decoder = tokenizer.streamer(contender.num_codebooks), tokenizer.decode_streamer()
    run, step = Streamed(), round(tokenizer.sample_rate * chunk_ms / 1000)
    for begin in range(0, x.shape[1], step):
        piece = x[:, begin : begin + step]
        heard = (begin + piece.shape[1]) / tokenizer.sample_rate
        spent, tokens = _clocked(contender, functools.partial(encoder.push, piece, tokenizer.sample_rate))
        run.encode.append(spent)
        if tokens is None:
            continue
        run.packet = run.packet or heard + spent
        more, y = _clocked(contender, functools.partial(decoder.push, tokens))
        run.decode.append(more)
        if y.shape[-1]:
            run.sound = run.sound or heard + spent + more
    return run


def _clocked(contender: Contender, call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    found = call()
    wait(contender)
    return time.perf_counter() - started, found
