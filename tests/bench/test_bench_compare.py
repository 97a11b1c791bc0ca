"""Two runs side by side: what counts as a change, and what is never compared."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from synthetic_runs import SET, psnr_lines, psnr_run, result, spread, write_run

from mmtok.bench.compare import VERDICTS, conditions, diff, field_group, fields


def verdicts(changes) -> dict[str, str]:
    return {c.key[3]: c.verdict for c in changes}


def test_a_run_equals_itself(tmp_path):
    run = psnr_run(tmp_path / "a", {"a": spread(25)})
    assert {c.verdict for c in diff(run, run)} == {"equal"}
    assert {c.verdict for c in diff(run / "results.jsonl", run)} == {"equal"}


def test_pairing_finds_what_intervals_cannot(tmp_path):
    items = spread(25, 80)
    noise = np.random.default_rng(4).normal(-0.2, 0.2, 80)
    a, b = psnr_run(tmp_path / "a", {"a": items}), psnr_run(tmp_path / "b", {"a": items + noise})
    paired = {c.key[3]: c for c in diff(a, b)}["psnr"]
    assert (paired.verdict, paired.method) == ("worse", "paired, 80 items")
    assert paired.change == pytest.approx(noise.mean())
    (b / "items.jsonl").unlink()
    alone = {c.key[3]: c for c in diff(a, b)}["psnr"]
    assert (alone.verdict, alone.method) == ("within chance", "from the two intervals")
    assert alone.low is not None and alone.high is not None and alone.high - alone.low > 1
    assert verdicts(diff(b, a))["psnr"] == "within chance"


def test_intervals_of_independent_estimates_add_in_squares(tmp_path):
    a = write_run(tmp_path / "a", [result(value=10.0, low=7.0, high=13.0, count=9)])
    b = write_run(tmp_path / "b", [result(value=20.0, low=16.0, high=24.0, count=9)])
    (found,) = diff(a, b)
    assert (found.change, found.low, found.high) == (10, 10 - math.hypot(4, 3), 10 + math.hypot(4, 3))
    assert found.verdict == "better"
    (back,) = diff(b, a)
    assert (back.change, back.low, back.high, back.verdict) == (-10, -15, -5, "worse")


@pytest.mark.parametrize(("direction", "verdict"), [("higher", "better"), ("lower", "worse"), ("neither", "changed")])
def test_the_direction_says_what_is_better(tmp_path, direction, verdict):
    runs = [
        write_run(tmp_path / n, [result(value=v, low=v - 1, high=v + 1, direction=direction)])
        for n, v in (("a", 1.0), ("b", 9.0))
    ]
    assert diff(*runs)[0].verdict == verdict


@pytest.mark.parametrize(
    ("field", "value"),
    [("crop", "random"), ("resampler", "soxr"), ("backend", "other"), ("set_fingerprint", "1e1e"), ("smoke", True)],
)
def test_another_protocol_is_never_compared(tmp_path, field, value):
    a = psnr_run(tmp_path / "a", {"a": spread(25)})
    b = psnr_run(tmp_path / "b", {"a": spread(35)}, {**SET, field: value})
    found = {c.key[3]: c for c in diff(a, b)}["psnr"]
    assert (found.verdict, found.change, found.low) == ("not comparable", None, None)
    assert found.differs == {field: (SET.get(field), value)}
    assert (found.old, found.new) == pytest.approx((25, 35))


def test_another_rate_under_one_label_is_not_comparable(tmp_path):
    runs = [
        write_run(tmp_path / n, [result(protocol={**SET, "bitrate_bps": bps})]) for n, bps in (("a", 4000), ("b", 2000))
    ]
    assert diff(*runs)[0].differs == {"bitrate_bps": (4000, 2000)}


def test_new_weights_and_machines_are_compared_and_told(tmp_path):
    protocols = [
        {**SET, "tokenizer": "t", "fingerprint": print_, "device": device, "mmtok": version}
        for print_, device, version in (("aa", "cpu", "1"), ("bb", "cuda", "2"))
    ]
    runs = [
        write_run(tmp_path / n, [result(value=v, low=v - 1, high=v + 1, protocol=p)])
        for n, v, p in zip("ab", (1.0, 9.0), protocols, strict=True)
    ]
    (found,) = diff(*runs)
    assert found.verdict == "better"
    assert set(found.also) == {"tokenizer_fingerprint", "device", "mmtok"}
    timed = [
        write_run(tmp_path / f"s{n}", [result(part="systems", protocol=p)])
        for n, p in zip("ab", protocols, strict=True)
    ]
    assert set(diff(*timed)[0].differs) == {"device", "mmtok"}  # seconds belong to a machine


def test_a_plain_fingerprint_is_the_tokenizers_where_there_is_one():
    assert fields(result(protocol={"fingerprint": "x"})) == {"set_fingerprint": "x"}
    of_both = {"tokenizer": "t", "fingerprint": "x", "set_fingerprint": "y"}
    assert fields(result(protocol=of_both))["tokenizer_fingerprint"] == "x"
    assert fields(result(protocol=of_both))["set_fingerprint"] == "y"


def test_the_runs_record_tells_other_items_apart(tmp_path):
    bare = {"set": "photos", "tokenizer": "t", "fingerprint": "x"}
    runs = []
    for name, print_ in (("a", "one"), ("b", "two")):
        runs.append(psnr_run(tmp_path / name, {"t": spread(25)}, bare))
        (runs[-1] / "run.json").write_text(json.dumps({"sets": {"photos": {"fingerprint": print_}}}))
    assert verdicts(diff(*runs))["psnr"] == "not comparable"
    (runs[1] / "run.json").write_text(json.dumps({"sets": {"photos": {"fingerprint": "one"}}}))
    assert verdicts(diff(*runs))["psnr"] == "equal"
    (runs[1] / "run.json").write_text("{")
    with pytest.raises(ValueError, match="restore the file"):
        diff(*runs)


def test_nested_protocols_are_compared_by_place():
    nested = {"set": {"crop": "x", "fingerprint": "s"}, "contender": {"fingerprint": "c"}, "scorer": {"version": "1"}}
    found = conditions(result(protocol={**nested, "unscored": {"silent": 3}}))
    assert found == {"set.crop": "x", "set.fingerprint": "s", "scorer.version": "1"}
    assert field_group("unscored") == "counting" and field_group("settings.layer") == "measurement"


def test_missing_new_and_not_run_numbers(tmp_path):
    a = write_run(tmp_path / "a", [result("x"), result("y"), result("z", value=None, not_run="no package")])
    b = write_run(tmp_path / "b", [result("x"), result("w"), result("z")])
    found = {c.key[1]: c for c in diff(a, b)}
    assert {k: c.verdict for k, c in found.items()} == {"x": "equal", "y": "missing", "z": "not run", "w": "new"}
    assert found["z"].why == "old: no package" and (found["y"].old, found["y"].new) == (20.0, None)
    assert {c.verdict for c in found.values()} <= set(VERDICTS)


def test_numbers_without_intervals(tmp_path):
    a = write_run(tmp_path / "a", [result("x"), result("y", value=math.inf), result("z", value=math.inf)])
    b = write_run(tmp_path / "b", [result("x", value=21.0), result("y", value=math.inf), result("z", value=30.0)])
    found = diff(a, b)
    assert [c.verdict for c in found] == ["no interval", "equal", "no interval"]
    assert json.dumps([c.to_dict() for c in found], allow_nan=False)


def test_numbers_of_sets_and_of_other_parts_are_not_paired(tmp_path):
    of_set = {**SET, "summary": "set"}
    found = []
    for name, value in (("a", 1.0), ("b", 2.0)):
        results = [
            result(metric="fd[x]", value=value, protocol=of_set),
            result(metric="bits_per_item", value=value, part="tokens", protocol={**SET, "summary": "mean"}),
        ]
        found.append(write_run(tmp_path / name, results, psnr_lines([20, 21])))
    assert [(c.verdict, c.change, c.method) for c in diff(*found)] == [("no interval", 1.0, "")] * 2


def test_only_takes_a_regular_expression(tmp_path):
    run = psnr_run(tmp_path / "a", {"a#levels=2": spread(25), "b": spread(26)})
    assert [c.key[1:] for c in diff(run, run, only="a#.*/psnr$")] == [("a#levels=2", "photos", "psnr")]
    with pytest.raises(ValueError, match="expected a regular expression"):
        diff(run, run, only="(")
    with pytest.raises(ValueError, match="no part/contender/set/metric"):
        diff(run, run, only="nothing like it")
    with pytest.raises(FileNotFoundError, match="no results there"):
        diff(run, tmp_path / "nowhere")
