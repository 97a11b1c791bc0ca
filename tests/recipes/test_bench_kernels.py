"""recipes/bench_kernels.py: turns and ratios, our wrong answers are not timed, goals take the worst shape."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
sys.path.insert(0, str(RECIPES))

import bench_kernels  # noqa: E402
from benching import exact, memory, nearest, report  # noqa: E402
from benching.goals import GOALS_CPU, Goal, Results, judge_goals  # noqa: E402
from benching.protocol import (  # noqa: E402
    INSTALL,
    Contest,
    Contestant,
    CpuTimer,
    Inputs,
    Row,
    Run,
    Setting,
    UnavailableError,
    Verdict,
    calls_for,
    ceilings,
    floor_ms,
    measure,
    need,
)
from benching.table import all_contests, chosen  # noqa: E402

SMOKE = Setting(torch.device("cpu"), 0, smoke=True)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# ---- the protocol


class CountingTimer:
    """Instead of a clock: each call costs what the run's attribute says; remembers who ran on what."""

    least_rounds, least_ms, past_bytes = 2, 0.0, 0

    def __init__(self) -> None:
        self.turns: list[tuple[str, float]] = []

    def sample(self, run: Run, batches: Sequence[Inputs], calls: int) -> tuple[float, float]:
        self.turns.append((run.name, float(batches[0][0][0])))  # type: ignore[attr-defined]
        return run.cost, 10 * run.cost  # type: ignore[attr-defined]


def contestant(name: str, cost: float, ok: bool = True, ours: bool = False) -> Contestant:
    def build() -> Run:
        def run(x: Tensor) -> Tensor:
            return x + 1

        run.name, run.cost = name, cost  # type: ignore[attr-defined]
        return run

    return Contestant(
        name, build, lambda inputs, out: Verdict(ok, "" if ok else "it is wrong", 0 if ok else 7, 9), ours
    )


def contest(*contestants: Contestant, clock: str = "cpu") -> Contest:
    return Contest("group", "shape", lambda g: (torch.randn(3, generator=g),), contestants, clock=clock)


def test_ratios_are_by_round_and_turns_rotate_on_fresh_inputs():
    timer = CountingTimer()
    rows = measure(contest(contestant("a", 2.0, ours=True), contestant("b", 5.0)), SMOKE, timer, 4)
    assert rows[1].ratio == [2.5] * 4 and rows[1].median_ms == 5.0 and rows[1].wall_ms == [50.0] * 4
    timed = timer.turns[-8:]
    assert [name for name, _ in timed] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    firsts = [x for _, x in timed]
    assert all(firsts[i] == firsts[i + 1] for i in range(0, 8, 2)) and len(set(firsts)) == 4
    by_wall = measure(contest(contestant("a", 2.0, ours=True), clock="wall"), SMOKE, CountingTimer(), 2)
    assert by_wall[0].median_ms == 20.0


def test_ours_is_not_timed_when_it_is_wrong_and_a_competitor_is():
    timer = CountingTimer()
    both = contest(contestant("ours", 1.0, ok=False, ours=True), contestant("theirs", 1.0, ok=False))
    mine, theirs = measure(both, SMOKE, timer, 2)
    assert mine.failed and mine.status == "refused: it is wrong" and not mine.main_ms and not mine.ratio
    assert theirs.status == "not exact" and not theirs.failed and len(theirs.main_ms) == 2 and not theirs.ratio
    assert {name for name, _ in timer.turns} == {"theirs"}


def test_who_cannot_run_has_a_row_that_says_why():
    def missing() -> Run:
        return need("surely_no_such_package_here")

    def broken() -> Run:
        raise RuntimeError("first line\nsecond line")

    def too_large(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("tried to allocate 69 GB")

    good = contestant("a", 1.0, ours=True)
    others = [Contestant(n, b, good.judge) for n, b in (("m", missing), ("b", broken), ("l", lambda: too_large))]
    rows = measure(contest(good, *others), SMOKE, CountingTimer(), 2)
    assert [row.status for row in rows] == ["ok", INSTALL, "failed: RuntimeError: first line", "out of memory"]
    assert not any(row.failed for row in rows) and len(rows[0].main_ms) == 2


def test_outputs_are_poisoned_before_the_check():
    buffer = torch.zeros(4, dtype=torch.int64)

    def run(x: Tensor) -> Tensor:
        buffer[:2] = 0  # the other half is only right while nobody touched it
        return buffer

    lazy = Contestant("lazy", lambda: run, lambda i, out: exact.judge_integers(torch.zeros(4), out), ours=True)
    (row,) = measure(contest(lazy), SMOKE, CpuTimer(), 2)
    assert row.failed and row.verdict is not None and row.verdict.wrong == 2


def test_inputs_and_gradients_survive_the_poison():
    x = torch.ones(2)
    leaf = torch.ones(2, requires_grad=True)
    from benching.protocol import poison

    poison([x.view(1, 2), (2 * leaf), x + 1], (x,))
    assert x.tolist() == [1, 1] and leaf.tolist() == [1, 1]
    out = torch.zeros(2)
    poison({"not": "a tensor"}, ())
    poison((out, torch.zeros(1, dtype=torch.bool)), ())
    assert out.isnan().all()


def test_short_calls_are_repeated_and_floors_take_the_longer_bound():
    assert calls_for(CpuTimer(), lambda x: x, (torch.zeros(1),), smoke=False) > 10
    assert calls_for(CpuTimer(), lambda x: x, (torch.zeros(1),), smoke=True) == 1
    rates = {"fp32_gemm_gflops": 2.0, "bf16_gemm_gflops": 12.0, "copy_gbytes": 1.0, "copy_cached_gbytes": 4.0}
    some = contest(contestant("a", 1.0))
    by_products = dataclasses.replace(some, flops=4e9, moved=1e9, scanned=3e9)
    assert floor_ms(by_products, rates, on_cuda=False) == 2000
    assert floor_ms(by_products, rates, on_cuda=True) == 1000
    assert floor_ms(by_products, rates | {"computed_scan_gelems": 2.0}, on_cuda=True) == 1500
    assert floor_ms(dataclasses.replace(some, flops=1e9, moved=8e9), rates, on_cuda=False) == 2000
    assert floor_ms(some, rates, on_cuda=False) is None
    assert all(value > 0 for value in ceilings(SMOKE, CpuTimer()).values())


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
def test_memory_of_a_call_is_its_peak_over_what_was_there():
    code = (
        "import torch; from benching.memory import call_peak\n"
        "held = torch.ones(4 << 20)\n"  # 16 MiB before
        "def run(x):\n    big = torch.ones(8 << 20)\n    del big\n    return torch.ones(1 << 20)\n"  # 32, then 4 MiB
        "print(call_peak(run, (held,)), call_peak(lambda x: x, (held,)))"
    )
    env = os.environ | memory.GIVES_BACK | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    large, nothing = map(float, done.stdout.split())
    assert 31 < large < 34 and nothing < 1


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
def test_memory_goes_on_after_a_contest_that_kills_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    child = (
        "import json, os, sys\n"
        "for name in sys.argv[3:]:\n"
        "    print(json.dumps({'contest': name}), flush=True)\n"
        "    if name == 'b': os.abort()\n"
        "    print(json.dumps({'contest': name, 'contestant': 'x', 'mib': 1.5}), flush=True)\n"
    )
    monkeypatch.setattr(memory, "_START", child)
    told: list[str] = []
    assert memory.extra_memory(["a", "b", "c"], 0, True, told.append) == {"a": {"x": 1.5}, "b": {}, "c": {"x": 1.5}}
    assert told == ["a", "b", "c"]
    monkeypatch.setattr(memory, "_START", "import os; os.abort()")
    assert memory.extra_memory(["a"], 0, True) == {}


# ---- the contests


def test_contests_have_the_names_under_which_they_are_chosen():
    for name, build in all_contests(SMOKE):
        try:
            made = build()
        except UnavailableError:  # DAC's weights come from transformers
            assert name.startswith("dac")
            continue
        assert made is None or (made.name == name and made.contestants[0].ours), name


def test_shapes_are_those_of_the_goals():
    names = [name for name, _ in all_contests(Setting(torch.device("cpu")))]
    assert sum(name.startswith("nearest/") for name in names) == 9
    assert {"rvq/4096x128x1024 Q32", "dac/N4096 1024-8-1024 K1024 Q9", "entropy/N256 D18"} <= set(names)
    groups = {name.partition("/")[0] for name in names}
    on_cuda = [name for name, _ in all_contests(Setting(torch.device("cuda")))]
    assert groups - {"threads"} == {name.partition("/")[0] for name in on_cuda}


def test_only_picks_groups_and_beginnings_and_names_what_it_does_not_know():
    assert list(chosen(SMOKE, ["rvq"])) == ["rvq/30x8x32 Q3"]
    assert list(chosen(SMOKE, ["nearest/70"])) == ["nearest/70x8x64"]
    assert chosen(SMOKE, ["exactness"]) == {} and len(chosen(SMOKE, None)) > 10
    with pytest.raises(ValueError, match="got nearst"):
        chosen(SMOKE, ["nearst"])


# ---- goals and report


def row(name: str, who: str, ours: bool, ratio: float, mib: float | None = None) -> Row:
    return Row(name, who, ours, main_ms=[1.0], wall_ms=[1.0], ratio=[ratio], extra_mib=mib, floor_ms=0.5)


ROWS = [
    row("nearest/9x8x32", "mmtok", True, 1.0, 3.0),
    row("nearest/9x8x32", "vector-quantize-pytorch, eval", False, 12.0),
    row("nearest/9x16x32", "mmtok", True, 1.0, 40.0),
    row("nearest/9x16x32", "vector-quantize-pytorch, eval", False, 9.0),
    row("nearest/9x128x32", "vector-quantize-pytorch, eval", False, 6.0),
]


def test_goals_look_at_the_worst_shape():
    found = {g["text"]: g for g in judge_goals(Results(ROWS, []), "cpu")}
    narrow = found["nearest code at D <= 16 over vector-quantize-pytorch"]
    assert (narrow["value"], narrow["where"], narrow["met"]) == (9.0, "nearest/9x16x32", False)
    assert found["nearest code at D = 128, 256 over vector-quantize-pytorch"]["met"] is True
    assert found["extra memory of nearest code at any K"]["value"] == 40.0
    assert found["wrong codes on any data set, any mode"]["met"] is None
    assert len(judge_goals(Results(ROWS, []), "cuda")) != len(GOALS_CPU)
    records = [{"name": "s", "rows": 9, "near_ties": 1, "wrong": {"mmtok": 0, "faiss": 5}}]
    wrong: Goal = next(g for g in GOALS_CPU if g.text.startswith("wrong codes"))
    assert list(wrong.value(Results([], records))) == [(0, "s, mmtok")]


def test_frames_other_than_those_of_transformers_are_read_from_the_note():
    dac = Row("dac/x", "mmtok module, encode", True, verdict=Verdict(True, "3 of 20 frames have other codes", 0, 20, 0))
    found = {g["text"]: g for g in judge_goals(Results([dac], []), "cpu")}
    goal = found["DAC frames with other codes than transformers"]
    assert (goal["value"], goal["met"]) == (3.0, False)


@pytest.mark.parametrize(
    ("x", "text"), [(0.0, "0"), (0.0123, "0.012"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1234"), (None, "")]
)
def test_numbers_have_three_digits(x: float | None, text: str):
    assert report.number(x) == text


def test_tables_show_status_share_and_missing_packages():
    rows = [
        dataclasses.replace(ROWS[0], verdict=Verdict(True, "", 0, 200, 4)),
        dataclasses.replace(ROWS[1], status="not exact", verdict=Verdict(False, "3 of 200 are wrong", 3, 200, 4)),
        Row("nearest/9x8x32", "faiss IndexFlatL2", False, INSTALL),
    ]
    lines = report.contest_table(rows, "codes").splitlines()
    assert lines[2] == "| mmtok | 1.00 | 1.00 | 1.00 (1.00 to 1.00) | 2.00 | 3.00 | 0 (0 %) | 4 |  |"
    assert "| 3 (1.5 %) | 4 | not exact; 3 of 200 are wrong |" in lines[3]
    assert lines[4].endswith(f"| {INSTALL} |")
    assert len({line.count(" | ") for line in lines[2:]}) == 1


def test_a_wrong_kernel_ends_the_command_with_code_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def off_by_one(z: Tensor, codebook: Tensor, metric: str = "euclidean") -> Tensor:
        return (torch.cdist(z, codebook).argmin(1) + 1) % len(codebook)

    def absent(module: str) -> None:
        raise UnavailableError(INSTALL)

    def no_plot(rows: Sequence[Row], title: str) -> bytes:
        raise ImportError("matplotlib")

    monkeypatch.setattr(nearest, "nearest_code", off_by_one)
    monkeypatch.setattr(nearest, "need", absent)
    monkeypatch.setattr(bench_kernels, "plot", no_plot)
    args = bench_kernels.parse(["--smoke", "--only", "nearest/70", "--out", str(tmp_path)])
    assert bench_kernels.main(args) == 1
    found = json.loads((tmp_path / "kernels-cpu.json").read_text())
    by_name = {r["contestant"]: r for r in found["rows"]}
    assert by_name["mmtok"]["status"].startswith("refused: 70 of 70") and by_name["mmtok"]["main_ms"] == []
    assert by_name["addmm+argmin"]["status"] == "ok" and len(by_name["addmm+argmin"]["main_ms"]) == 2
    assert by_name["faiss IndexFlatL2"]["status"] == INSTALL
    text = (tmp_path / "kernels-cpu.md").read_text()
    assert "refused: 70 of 70 rows" in text and INSTALL in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kernels-cpu.json", "kernels-cpu.md"]


def test_the_plot_is_a_picture_with_or_without_nearest_code():
    pytest.importorskip("matplotlib")
    other = [row("rvq/4x4x4 Q2", "mmtok", True, 1.0), row("rvq/4x4x4 Q2", "transformers EnCodec", False, 3.0)]
    for rows in (ROWS, other, ROWS + other):
        picture = report.plot(rows, "title")
        assert picture is not None and picture.startswith(b"\x89PNG")
    assert report.plot([], "title") is None


def test_the_plot_shows_the_slowest_package_and_the_fastest_other_way():
    names = {"mmtok": 1.0, "addmm": 2.0, "transformers EnCodec": 3.0, "vector-quantize-pytorch, eval": 5.0}
    rows = [row("rvq/a", who, who == "mmtok", ratio) for who, ratio in names.items()]
    rows += [row("rvq/a", "vector-quantize-pytorch, train", False, 9.0), row("b/c", "loop", False, 2.0)]
    ((package, fastest), (alone, twice)) = report._competitors(rows)
    assert (package.contestant, fastest.contestant) == ("vector-quantize-pytorch, eval", "addmm")
    assert alone is twice and alone.contestant == "loop"


@pytest.mark.parametrize(
    ("arguments", "kept", "restarts"),
    [([], False, True), ([], True, False), (["--device", "cuda"], False, False)],
)
def test_the_command_starts_again_so_that_freed_memory_is_kept(
    arguments: list[str], kept: bool, restarts: bool, monkeypatch: pytest.MonkeyPatch
):
    calls = []
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "execve", lambda *a: calls.append(a))
    monkeypatch.delenv("MALLOC_MMAP_MAX_", raising=False)
    if kept:
        monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    bench_kernels.keep_memory(bench_kernels.parse(arguments))
    assert len(calls) == restarts
    if restarts:
        assert calls[0][1][0] == sys.executable and calls[0][2]["MALLOC_MMAP_MAX_"] == "0"


@pytest.mark.parametrize(("arguments", "message"), [(["--rounds", "4"], "at least 5 on cpu, got 4")])
def test_too_few_rounds_are_refused(arguments: list[str], message: str, tmp_path: Path):
    with pytest.raises(SystemExit, match=message):
        bench_kernels.main(bench_kernels.parse([*arguments, "--out", str(tmp_path)]))


def test_implementations_are_those_that_force_accepts():
    assert "torch" in nearest.implementations(lambda: nearest.nearest_code(torch.zeros(2, 3), torch.ones(4, 3)))

    def refuse() -> object:
        raise ValueError("not here")

    assert nearest.implementations(refuse) == []
    ran: list[str] = []

    def which(x: Tensor) -> None:
        from mmtok.kernels.dispatch import choose

        ran.append(choose("test", ("torch", "reference")))

    forced: Callable = nearest.forced("reference", which)
    forced(torch.zeros(1))
    assert ran == ["reference"]
