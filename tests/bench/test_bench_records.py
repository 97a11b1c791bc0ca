"""JSON lines of a run: results that keep their numbers exactly, files that a kill cut short, the compact form."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_runs import result, spread, write_run

from mmtok.bench.compare import diff
from mmtok.bench.records import (
    Result,
    append_line,
    read_lines,
    read_results,
    result_line,
    result_of,
    write_compact,
)
from mmtok.bench.tables import make_tables, render


def through_json(found: Result) -> Result:
    return result_of(json.loads(json.dumps(result_line(found), allow_nan=False)))


# ---- one result ----


def test_a_result_needs_a_value_or_a_reason_and_not_both():
    with pytest.raises(ValueError, match="psnr: expected a value or a reason"):
        result(value=None)
    with pytest.raises(ValueError, match="psnr: expected a value or a reason"):
        result(value=1.0, not_run="no package")
    with pytest.raises(ValueError, match="expected the direction higher, lower or neither, got 'up'"):
        result(direction="up")


@settings(deadline=None)
@given(st.floats(allow_nan=False), st.floats(allow_nan=False) | st.none())
def test_numbers_come_back_exactly(value, low):
    found = result(value=value, low=low)
    again = through_json(found)
    assert again == found and again.key == ("reconstruction", "a", "photos", "psnr")


def test_what_json_has_no_number_for_is_a_word():
    line = result_line(result(value=math.inf, low=-math.inf, high=math.nan))
    assert (line["value"], line["low"], line["high"]) == ("inf", "-inf", "nan")
    again = result_of(line)
    assert again.value == math.inf and again.low == -math.inf and math.isnan(again.high or 0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({**result_line(result()), "colour": 1}, r"expected the fields .* got \['colour'\] too; written by a later"),
        ({k: v for k, v in result_line(result()).items() if k != "unit"}, "unit"),
        ({**result_line(result()), "value": None}, "expected a value or a reason"),
        ({**result_line(result()), "value": "much"}, "could not convert"),
    ],
)
def test_bad_lines_are_named(line: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        result_of(line)


# ---- files of lines ----


@pytest.mark.parametrize("torn", [b"", b'{"a": 3', b'{"a": 3}', b"\xc3"])
def test_a_line_that_a_kill_cut_short_is_not_read_and_goes_with_the_next_one(tmp_path: Path, torn: bytes):
    path = tmp_path / "items.jsonl"
    append_line(path, {"a": 1})
    append_line(path, {"a": 2, "text": "é\n"})
    with path.open("ab") as f:
        f.write(torn)
    before = list(read_lines(path))
    append_line(path, {"a": 4})
    assert before == [{"a": 1}, {"a": 2, "text": "é\n"}]
    assert list(read_lines(path)) == [*before, {"a": 4}] and path.read_bytes().count(b"\n") == 3


def test_a_first_line_that_was_cut_short_leaves_nothing(tmp_path: Path):
    path = tmp_path / "items.jsonl"
    path.write_bytes(b'{"a"')
    assert list(read_lines(path)) == []
    append_line(path, {"b": 1})
    assert path.read_bytes() == b'{"b": 1}\n'


def test_a_value_that_json_lacks_is_refused_and_leaves_the_file_alone(tmp_path: Path):
    path = tmp_path / "items.jsonl"
    append_line(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        append_line(path, {"a": math.inf})
    assert list(read_lines(path)) == [{"a": 1}]


def test_missing_and_damaged_files_are_named(tmp_path: Path):
    assert list(read_lines(tmp_path / "none.jsonl")) == []
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: expected JSON"):
        list(read_lines(tmp_path / "bad.jsonl"))
    (tmp_path / "list.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match=r"list\.jsonl, line 1: expected an object, got list"):
        list(read_lines(tmp_path / "list.jsonl"))


def test_of_one_key_the_last_result_counts(tmp_path: Path):
    write_run(tmp_path / "run", [result(value=1.0), result("b", value=2.0), result(value=3.0)])
    found = read_results(tmp_path / "run")
    assert {r.contender: r.value for r in found} == {"a": 3.0, "b": 2.0}
    assert read_results(tmp_path / "run" / "results.jsonl") == found
    with pytest.raises(FileNotFoundError, match="no results there; run `mmtok bench"):
        read_results(tmp_path / "none")
    (tmp_path / "run" / "results.jsonl").write_text('{"part": "reconstruction"}\n')
    with pytest.raises(ValueError, match=r"results\.jsonl, line 1: result: "):
        read_results(tmp_path / "run")


# ---- the compact form ----


def full_results() -> list[Result]:
    """Two contenders on two sets, with protocols as a run has them: much in common, little of their own."""
    found = []
    for name in ("a", "b"):
        own = {"contender": {"tokenizer": name, "fingerprint": name * 16, "sizes": "8 x 1024", "text": False}}
        for test_set in ("photos", "stamps"):
            here = {"set": {"set": test_set, "crop": "random 128 px", "count": 60}, "seed": 0, **own}
            for i, metric in enumerate(("psnr", "ssim", "lpips")):
                scorer = {"scorer": {"name": metric, "backend": "made up", "settings": {"size": [128, 128]}}}
                more = {"unscored": {"too small": i}} if i else {}
                about: dict[str, Any] = {"test_set": test_set, "protocol": {**here, **scorer, **more}}
                value = 20.0 + i + spread(0.1, 3, i)[0]
                found.append(result(name, metric, value, low=value - 1, high=math.inf, count=60, **about))
            no_value: dict[str, Any] = {"test_set": test_set, "protocol": here, "not_run": "no network; fetch it"}
            found.append(result(name, "fd", None, **no_value))
    return found


def test_the_compact_form_gives_the_very_results(tmp_path: Path):
    results, path = full_results(), tmp_path / "bench.jsonl"
    write_compact(path, results)
    assert read_results(path) == results
    run = write_run(tmp_path / "run", results)
    assert path.stat().st_size < 0.6 * (run / "results.jsonl").stat().st_size
    again = tmp_path / "again.jsonl"
    write_compact(again, read_results(path))
    assert again.read_bytes() == path.read_bytes(), "what is read and written again is the same file"


def test_a_changed_number_changes_one_line_of_the_compact_form(tmp_path: Path):
    results = full_results()
    write_compact(tmp_path / "a.jsonl", results)
    results[3] = dataclasses.replace(results[3], not_run="something else")
    write_compact(tmp_path / "b.jsonl", results)
    a, b = ((tmp_path / name).read_text().splitlines() for name in ("a.jsonl", "b.jsonl"))
    assert len(a) == len(b) and sum(x != y for x, y in zip(a, b, strict=True)) == 1


def test_diff_and_table_read_the_compact_form(tmp_path: Path):
    results = full_results()
    run = write_run(tmp_path / "run", results)
    write_compact(tmp_path / "bench.jsonl", results)
    assert {c.verdict for c in diff(tmp_path / "bench.jsonl", run)} == {"equal", "not run"}
    assert render(make_tables(read_results(tmp_path / "bench.jsonl"))) == render(make_tables(read_results(run)))


def test_a_compact_file_without_its_shared_part_is_refused(tmp_path: Path):
    path = tmp_path / "bench.jsonl"
    write_compact(path, full_results())
    lines = path.read_text().splitlines(keepends=True)
    assert "protocol" in lines[0] and "metric" not in lines[0]
    path.write_text("".join(lines[1:]))
    with pytest.raises(ValueError, match=r"bench\.jsonl, line \d+: its protocol has the part .* restore the file"):
        read_results(path)


protocols = st.dictionaries(
    st.sampled_from("abcdef"),
    st.none() | st.booleans() | st.integers(0, 3) | st.sampled_from(["", "x" * 40]) | st.lists(st.integers(0, 2)),
)


@settings(deadline=None)
@given(st.lists(protocols, max_size=6))
def test_any_protocols_come_back(tmp_path_factory: pytest.TempPathFactory, found: list[dict[str, Any]]):
    path = tmp_path_factory.mktemp("compact") / "bench.jsonl"
    results = [result("a", f"m{i}", float(i), protocol=p) for i, p in enumerate(found)]
    write_compact(path, results)
    assert read_results(path) == results
    assert [type(v) for r in read_results(path) for _, v in sorted(r.protocol.items())] == [
        type(v) for r in results for _, v in sorted(r.protocol.items())
    ], "True is not 1"
