"""How contestants are run against each other: build, check, alternate round by round, compare by the round.

All contestants of a contest live in one process and take turns inside each round, so that a busy neighbour or a clock
that steps down hits all of them alike; what is compared is the ratio of times of the same round. Times are of the
whole process, not of the calling thread: a contestant that hands its work to other threads is charged for it.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

Inputs = tuple[Tensor, ...]
Run = Callable[..., Any]
INSTALL = "not installed: pip install 'mmtok[bench]'"


class UnavailableError(Exception):
    """Why a contestant does not run here; shown in its row."""


def need(module: str) -> Any:
    """The imported ``module``, or `UnavailableError` with the line that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        missing = (e.name or module).partition(".")[0]
        if missing == module.partition(".")[0]:
            raise UnavailableError(INSTALL) from e
        raise UnavailableError(f"cannot be imported: {e}") from e


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all contests of a run share."""

    device: torch.device
    seed: int = 0
    smoke: bool = False

    def generator(self, stream: int = 0) -> torch.Generator:
        """Random numbers of their own for each ``stream``; the run's seed picks the family."""
        return torch.Generator(self.device).manual_seed(1_000_003 * self.seed + stream)

    def randn(self, *shape: int, stream: int = 0) -> Tensor:
        return torch.randn(shape, device=self.device, generator=self.generator(stream))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the check found. ``wrong`` of ``total`` items differ from fp64; ``near_ties`` fp32 alone cannot decide."""

    ok: bool
    note: str = ""
    wrong: int | None = None
    total: int | None = None
    near_ties: int | None = None


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One way of doing the contest's work.

    Args:
        name: for the tables. build: imports what it needs and returns the call to time, `run(*inputs)`.
        judge: (inputs, output) -> Verdict. ours: a failed check then stops the timing and fails the command.
        stateful: the call changes what the next call computes, so it is checked by its first call only.
    """

    name: str
    build: Callable[[], Run]
    judge: Callable[[Inputs, Any], Verdict]
    ours: bool = False
    stateful: bool = False


@dataclasses.dataclass(frozen=True)
class Contest:
    """One op at one shape.

    Args:
        group, shape: its name is group/shape. inputs: fresh random inputs from a generator.
        contestants: ours come first; the times of the others are divided by those of the first of ours that is timed.
        flops: of the necessary products. moved: bytes that must be read and written. scanned: scores to be compared.
            These give the floor.
        clock: ``cpu`` (time of the process) or ``wall`` (for contestants that differ in their threads).
        gradient: whether the calls need autograd. items: what the check counts. note: one line under the heading.
    """

    group: str
    shape: str
    inputs: Callable[[torch.Generator], Inputs]
    contestants: Sequence[Contestant]
    flops: float = 0.0
    moved: float = 0.0
    scanned: float = 0.0
    clock: str = "cpu"
    gradient: bool = False
    items: str = "codes"
    note: str = ""

    @property
    def name(self) -> str:
        return f"{self.group}/{self.shape}"


@dataclasses.dataclass
class Row:
    """The result of one contestant; ``status`` is ``ok``, ``not exact``, ``refused: ...`` or why it did not run."""

    contest: str
    contestant: str
    ours: bool
    status: str = "ok"
    verdict: Verdict | None = None
    main_ms: list[float] = dataclasses.field(default_factory=list)  # one a round, by the contest's clock
    wall_ms: list[float] = dataclasses.field(default_factory=list)
    ratio: list[float] = dataclasses.field(default_factory=list)  # time over that of our first timed one, by round
    calls_a_round: int = 0
    floor_ms: float | None = None
    extra_mib: float | None = None

    @property
    def median_ms(self) -> float | None:
        return statistics.median(self.main_ms) if self.main_ms else None

    @property
    def over_floor(self) -> float | None:
        return self.median_ms / self.floor_ms if self.median_ms is not None and self.floor_ms else None

    @property
    def failed(self) -> bool:
        """One of ours that gave a wrong answer or no answer."""
        return self.ours and self.status.startswith(("refused", "failed"))


class Timer(Protocol):
    """Measures calls on one kind of device."""

    least_rounds: int
    least_ms: float  # a sample is at least so long: short calls are repeated
    past_bytes: int  # inputs rotate over more than this, the cache that would else hold them

    def sample(self, run: Run, batches: Sequence[Inputs], calls: int) -> tuple[float, float]:
        """(milliseconds of the device's clock, of the wall) for one call, averaged over ``calls`` rotating calls."""
        ...


class CpuTimer:
    least_rounds, least_ms, past_bytes = 5, 5.0, 8 << 20

    def sample(self, run: Run, batches: Sequence[Inputs], calls: int) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        for i in range(calls):
            run(*batches[i % len(batches)])
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        return 1000 * cpu / calls, 1000 * wall / calls


class CudaTimer:
    least_rounds, least_ms, past_bytes = 30, 2.0, 100 << 20  # an H100 has 50 MB of L2

    def sample(self, run: Run, batches: Sequence[Inputs], calls: int) -> tuple[float, float]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        wall = time.perf_counter()
        start.record()
        for i in range(calls):
            run(*batches[i % len(batches)])
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / calls, 1000 * (time.perf_counter() - wall) / calls


def timer_for(device: torch.device) -> Timer:
    return CudaTimer() if device.type == "cuda" else CpuTimer()


def tensors_in(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for item in output:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            yield from tensors_in(getattr(output, field.name))


@torch.no_grad()
def poison(output: Any, inputs: Inputs) -> None:
    """Overwrite an output before it is freed: the next call likely gets the same memory and must write all of it."""
    kept = {t.untyped_storage().data_ptr() for t in inputs}
    for t in tensors_in(output):
        if t.numel() and t.untyped_storage().data_ptr() not in kept and not t.requires_grad and t.grad_fn is None:
            t.detach().fill_(math.nan if t.is_floating_point() else (True if t.dtype == torch.bool else -1))


def check(contestant: Contestant, run: Run, inputs: Inputs) -> Verdict:
    """The verdict of a call on poisoned memory, or of the first call where a call changes the next."""
    output = run(*inputs)
    if not contestant.stateful:
        poison(output, inputs)
        del output
        output = run(*inputs)
    return contestant.judge(inputs, output)


@contextmanager
def grad_mode(contest: Contest) -> Iterator[None]:
    with torch.set_grad_enabled(contest.gradient):
        yield


def explain(e: BaseException) -> str:
    """The status of a contestant that could not be built, checked or timed."""
    if isinstance(e, UnavailableError):
        return str(e)
    if isinstance(e, torch.OutOfMemoryError | MemoryError) or "alloc" in str(e)[:200].lower():
        return "out of memory"
    first = (str(e).strip().splitlines() or [""])[0]
    return f"failed: {type(e).__name__}: {first[:160]}"


def build_and_check(contest: Contest, setting: Setting) -> tuple[list[Row], list[Run | None]]:
    """Rows with verdicts, and the calls of those that may be timed (None for the others)."""
    inputs = contest.inputs(setting.generator(1))
    rows, runs = [], []
    for contestant in contest.contestants:
        row, run = Row(contest.name, contestant.name, contestant.ours), None
        try:
            run = contestant.build()
            row.verdict = check(contestant, run, inputs)
        except Exception as e:  # whatever a competitor raises is its row, not the end of the run
            row.status, run = explain(e), None
            if setting.device.type == "cuda":
                torch.cuda.empty_cache()  # what it had allocated until memory ran out
        else:
            if not row.verdict.ok:
                row.status = f"refused: {row.verdict.note}" if contestant.ours else "not exact"
                run = None if contestant.ours else run
        rows.append(row)
        runs.append(run)
    return rows, runs


def measure(contest: Contest, setting: Setting, timer: Timer, rounds: int) -> list[Row]:
    """Check all contestants, then time those that may be timed, in ``rounds`` alternating rounds."""
    with grad_mode(contest):
        rows, runs = build_and_check(contest, setting)
        live = [i for i, run in enumerate(runs) if run is not None]
        first = contest.inputs(setting.generator(2))
        size = sum(t.numel() * t.element_size() for t in first)
        calls = {}
        for i in list(live):
            try:
                calls[i] = calls_for(timer, runs[i], first, setting.smoke)
            except Exception as e:
                rows[i].status = explain(e)
                live.remove(i)
        copies = max(1, min(64, timer.past_bytes // max(1, size) + 1, max(calls.values(), default=1)))
        for r in range(rounds):
            generator = setting.generator(100 + r)
            batches = [contest.inputs(generator) for _ in range(copies)]
            turn = r % max(1, len(live))
            for i in live[turn:] + live[:turn]:
                run = runs[i]
                assert run is not None
                main, wall = timer.sample(run, batches, calls[i])
                rows[i].main_ms.append(wall if contest.clock == "wall" else main)
                rows[i].wall_ms.append(wall)
        base = next((rows[i].main_ms for i in live if rows[i].ours), None)
        for i in live:
            rows[i].calls_a_round = calls[i]
            if base:
                rows[i].ratio = [a / b for a, b in zip(rows[i].main_ms, base, strict=True)]
            if setting.device.type == "cuda":
                rows[i].extra_mib = extra_memory_cuda(runs[i], first)
    return rows


def extra_memory_cuda(run: Run | None, inputs: Inputs) -> float:
    """MiB that one call holds at most beyond what was allocated before it."""
    assert run is not None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = run(*inputs)
    torch.cuda.synchronize()
    del output
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def calls_for(timer: Timer, run: Run | None, inputs: Inputs, smoke: bool) -> int:
    """Warm up, and how many calls make one sample long enough."""
    assert run is not None
    timer.sample(run, [inputs], 1)
    _, wall = timer.sample(run, [inputs], 1)
    return 1 if smoke else max(1, min(1000, math.ceil(timer.least_ms / max(wall, 1e-3))))


def ceilings(setting: Setting, timer: Timer) -> dict[str, float]:
    """What this machine reaches here and now, best of repeats.

    Returns:
        ``fp32_gemm_gflops``, ``bf16_gemm_gflops``; ``copy_gbytes`` (read + written, larger than the caches) and
        ``copy_cached_gbytes`` (1 MiB); ``row_min_gelems``, ``row_argmin_gelems``, ``row_amin_gelems`` (over blocks of
        512 x 1024 on a CPU, 8192 x 1024 on CUDA). On CUDA also ``computed_scan_gelems``, not measured: what 128 lanes
        a multiprocessor compare with a running minimum in registers at 3 operations a score.
    """
    on_cuda = setting.device.type == "cuda"
    n, big, height = (128, 1 << 18, 64) if setting.smoke else (8192, 1 << 28, 8192) if on_cuda else (2048, 1 << 26, 512)

    def best(run: Run, *inputs: Tensor) -> float:
        calls = calls_for(timer, run, inputs, setting.smoke)
        return min(timer.sample(run, [inputs], calls)[0] for _ in range(2 if setting.smoke else 7)) / 1000

    found = {}
    a, b = setting.randn(n, n, stream=3), setting.randn(n, n, stream=4)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        x, y = a.to(dtype), b.to(dtype)
        out = torch.empty_like(x)
        found[f"{name}_gemm_gflops"] = 2 * n**3 / best(lambda x, y, o=out: torch.mm(x, y, out=o), x, y) / 1e9
    for name, size in (("copy", big), ("copy_cached", 1 << 18)):
        x = torch.zeros(size, device=setting.device)
        out = torch.empty_like(x)
        found[f"{name}_gbytes"] = 8 * size / best(lambda x, o=out: o.copy_(x), x) / 1e9
    x = setting.randn(height, 1024, stream=5)
    for name, run in (("min", lambda x: x.min(1)), ("argmin", lambda x: x.argmin(1)), ("amin", lambda x: x.amin(1))):
        found[f"row_{name}_gelems"] = x.numel() / best(run, x) / 1e9
    if on_cuda:
        device = torch.cuda.get_device_properties(setting.device)
        clock = getattr(device, "clock_rate", None)  # kHz
        if clock:
            found["computed_scan_gelems"] = device.multi_processor_count * 128 * clock * 1e3 / 3 / 1e9
    return found


def floor_ms(contest: Contest, found: dict[str, float], on_cuda: bool) -> float | None:
    """The longest of products, bytes at the better copy rate, and, on CUDA, comparisons.

    The products run at the fp32 GEMM rate; on CUDA at a third of the bf16 rate if that is more, since three bf16
    products (high high, high low, low high) give fp32-grade scores on the tensor cores.
    """
    if not contest.flops and not contest.moved:
        return None
    gemm = found["fp32_gemm_gflops"]
    gemm = max(gemm, found["bf16_gemm_gflops"] / 3) if on_cuda else gemm
    copy = max(found["copy_gbytes"], found["copy_cached_gbytes"])
    scan = found.get("computed_scan_gelems", math.inf)
    return 1000 * max(contest.flops / gemm, contest.moved / copy, contest.scanned / scan) / 1e9
