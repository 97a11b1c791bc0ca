"""`mmtok bench` and its actions, on two tiny tokenizers and what ships with mmtok."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmtok.bench.records import Result, append_line, read_lines, read_results, result_line
from mmtok.bench.run_folder import FORMAT
from mmtok.cli import main
from mmtok.cli.bench import _left_out

QUICK = ["--scorers", "image_signal,stoi"]


def row(metric: str = "psnr", value: float | None = 20.0, **more) -> Result:
    plain = {"part": "reconstruction", "contender": "a", "test_set": "photos", "unit": "dB", "direction": "higher"}
    return Result(metric=metric, value=value, **{**plain, "protocol": {"set": {"fingerprint": "f"}}, **more})


def folder_of(path: Path, *results: Result) -> Path:
    path.mkdir()
    for r in results:
        append_line(path / "results.jsonl", result_line(r))
    return path


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept") / "run"


def bench(*args: object) -> int:
    return main(["bench", *map(str, args)])


def test_pictures_and_sounds_in_one_run_then_resumed(kept, capsys):
    names = ["image-tiny-8b#levels=1,2", "audio-tiny-16k", "jpeg#bytes=2000"]
    assert bench(*names, "--out", kept, *QUICK) == 0
    said = capsys.readouterr().out
    assert "reconstruction, builtin-image (6 items" in said and "reconstruction, builtin-audio (1 items" in said
    assert str(kept / "results.jsonl") in said and (kept / "report.html").stat().st_size > 10_000
    assert "holds a run already" not in said
    found = {(r.contender, r.metric): r for r in read_results(kept)}
    one, two = (found[f"image-tiny-8b#levels={n}", "psnr"].value for n in (1, 2))
    assert one is not None and two is not None and one < two  # the second level is the low four bits
    assert found["image-tiny-8b#levels=2", "bits_per_item"].value == 128
    assert ("audio-tiny-16k", "stoi") in found and ("audio-tiny-16k", "psnr") not in found
    assert {p.name for p in (kept / "plots").iterdir()} == {
        f"builtin-image-{m}.{form}" for m in ("psnr", "ssim") for form in ("svg", "png")
    }
    before = list(read_lines(kept / "items.jsonl")), read_results(kept)
    assert bench(*names, "--out", kept, *QUICK) == 0
    said = capsys.readouterr().out
    assert f"{kept} holds a run already: {len(before[0])} trials of items are there" in said
    assert (list(read_lines(kept / "items.jsonl")), read_results(kept)) == before


def test_table_and_report_of_that_run(kept, tmp_path, capsys):
    if not kept.is_dir():
        bench("image-tiny-8b#levels=1,2", "jpeg#bytes=2000", "--out", kept, *QUICK)
        capsys.readouterr()
    assert bench("table", kept, "--measures", "psnr,ssim", "--set", "builtin-image") == 0
    text = capsys.readouterr().out
    assert text.startswith("| builtin-image | PSNR (dB) ↑ | SSIM ↑ |") and "| image-tiny-8b#levels=2 |" in text
    assert bench("table", kept, "--format", "latex", "--out", tmp_path / "t.tex") == 0
    assert r"\begin{tabular}" in (tmp_path / "t.tex").read_text()
    assert bench("table", kept, "--format", "csv") == 0
    capsys.readouterr()
    assert bench("report", kept, "-o", tmp_path / "page.html") == 0
    assert "<!doctype html>" in (tmp_path / "page.html").read_text().lower()[:200]
    assert bench("diff", kept, kept, "--fail-on-worse") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.split(",")[0].endswith(" equal")


def test_files_that_cannot_be_read_are_named_after_the_numbers(photo, tmp_path, capsys):
    data = tmp_path / "mixed"
    data.mkdir()
    (data / "good.png").write_bytes(Path(photo).read_bytes())
    for name in "abcde":
        (data / f"{name}.png").write_bytes(b"")
    assert bench("jpeg#bytes=2000", "--data", data, "--out", tmp_path / "run", *QUICK) == 0
    said = capsys.readouterr().out
    assert "left out 5 of mixed, cannot be read:\n  a.png: " in said and "a.png is empty (0 bytes)" in said
    assert "c.png: " in said and "d.png" not in said
    assert f"and 2 more in {tmp_path / 'run' / 'run.json'}" in said


def test_what_a_contender_refused_is_named_after_the_numbers(tmp_path):
    items = [{"item": f"{n}.png", "reason": "too small"} for n in range(4)]
    (tmp_path / "run.json").write_text(
        json.dumps({"format": FORMAT, "bad_files": {}, "refused": {"a": {"photos": items}}})
    )
    lines = _left_out(tmp_path)
    assert lines[:2] == ["left out 4 of photos, refused by a:", "  0.png: too small"] and len(lines) == 4
    assert lines[3] == f"  2.png: too small, and 1 more in {tmp_path / 'run.json'}"


def test_a_folder_of_pictures_and_sounds_is_a_set_each(photo, clip, tmp_path, capsys):
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(photo.parent / f"{i}.png")
    out, page = tmp_path / "out" / "run", tmp_path / "page.html"
    more = ["--size", 24, "--items", 3, "--seconds", 0.2, "--report", page]
    assert bench("image-tiny-8b", "audio-tiny-16k", "--data", photo.parent, "--out", out, *QUICK, *more) == 0
    name = photo.parent.name
    results = {r.test_set: r for r in read_results(out) if r.metric == "bits_per_item"}
    assert set(results) == {f"{name}-audio", f"{name}-image"}
    assert results[f"{name}-image"].protocol["set"]["crop"] == "center 24 px"
    assert results[f"{name}-audio"].protocol["set"]["cut"] == "first 0.2 s"
    assert page.is_file() and not (out / "report.html").exists()
    assert "plots    none: every contender of a set has the same rate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["no-such-name"], "no-such-name"),
        (["image-tiny-8b#levels=3"], "expected 1..2 levels, got 3"),
        (["image-tiny-8b", "image-tiny-8b"], "expected each once"),
        (["image-tiny-8b", "--data", "nowhere"], "--data: expected a folder"),
        (["image-tiny-8b", "--sets", "nowhere"], "nowhere: expected one of"),
        (["image-tiny-8b", "--sets", "builtin-audio"], "builtin-audio"),
        (["image-tiny-8b", "--crop", "random"], "crop and size: expected both"),
        (["image-tiny-8b", "--parts", "reconstrution"], "parts: expected some of"),
        (["image-tiny-8b", "--parts", ","], "--parts: expected names"),
        (["image-tiny-8b", "--scorers", "psnr"], "scorer: expected one of"),
        (["image-tiny-8b", "--option", "steps=3"], "--option: expected PART.KEY=VALUE"),
        (["image-tiny-8b", "--report", "nowhere/page.html"], "cannot write"),
    ],
)
def test_bad_input_is_one_line_and_code_2(args, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert bench(*args, "--out", "run") == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and len(told.splitlines()) == 1 and words in told


@pytest.mark.parametrize("action", ["diff", "table", "report", "sets", "scorers"])
def test_every_action_has_its_own_help(action, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench(action, "--help")
    assert stopped.value.code == 0 and capsys.readouterr().out.startswith(f"usage: mmtok bench {action}")


def test_the_help_teaches(capsys):
    with pytest.raises(SystemExit):
        bench("--help")
    text = capsys.readouterr().out
    for word in ("#levels=2,4,8", "jpeg#bytes=512", "mmtok bench diff", "mmtok bench scorers", "exit codes"):
        assert word in text
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "mmtok bench NAME" in capsys.readouterr().out


def test_diff_tells_worse_from_chance_and_from_another_protocol(tmp_path, capsys):
    other = {"set": {"fingerprint": "g"}}
    old = folder_of(
        tmp_path / "old", row(low=19.0, high=21.0), row("ssim", 0.9, low=0.5, high=0.95), row("x", 1.0), row("same")
    )
    new = folder_of(
        tmp_path / "new",
        row(value=15.0, low=14.0, high=16.0),
        row("ssim", 0.8, low=0.4, high=0.95),
        row("x", 2.0, protocol=other),
        row("same"),
    )
    assert bench("diff", old, new) == 0
    text = capsys.readouterr().out
    head, worse, method, chance, incomparable = text.splitlines()[:5]
    assert head.split() == ["contender", "set", "metric", "old", "new", "change", "verdict"]
    assert worse.split() == ["a", "photos", "psnr", "20", "15", "-5", "dB", "[-6.41,", "-3.59]", "worse"]
    assert method.strip() == "(from the two intervals)" and chance.endswith("within chance")
    assert incomparable.endswith("not comparable: set.fingerprint f -> g")
    assert text.splitlines()[-1] == "1 worse, 1 within chance, 1 equal, 1 not comparable"
    assert bench("diff", old, new, "--fail-on-worse") == 1
    assert bench("diff", new, old, "--fail-on-worse") == 0
    assert bench("diff", old, new, "--fail-on-worse", "--only", "/ssim$") == 0
    capsys.readouterr()
    assert bench("diff", old, new, "--json") == 0
    found = {c["metric"]: c for c in json.loads(capsys.readouterr().out)}
    assert found["psnr"]["change"] == -5 and found["psnr"]["low"] == pytest.approx(-5 - math.sqrt(2))
    assert found["x"]["differs"] == {"set.fingerprint": ["f", "g"]}
    assert bench("diff", old, tmp_path / "nowhere") == 2
    assert "no results there" in capsys.readouterr().err


def test_sets_and_scorers_say_what_there_is(capsys, monkeypatch):
    assert bench("sets") == 0
    assert "builtin-image" in capsys.readouterr().out
    assert bench("sets", "--json") == 0
    assert json.loads(capsys.readouterr().out)["builtin-audio"]["needs_data"] is False
    keep = {"image_signal": "mmtok.bench.image_scorers:image_signal", "gone": "no_such_module:x"}
    monkeypatch.setattr("mmtok.bench.scorers.SCORERS", keep)
    assert bench("scorers") == 0
    text = capsys.readouterr().out
    assert "image_signal (image, torchmetrics" in text and "psnr in dB, higher is better" in text
    assert "gone: not here\n  No module named 'no_such_module'" in text and "1 of 2 scorers are here" in text
    assert bench("scorers", "--json") == 0
    assert json.loads(capsys.readouterr().out)["gone"]["here"] is False


def test_options_of_parts_are_numbers_or_words():
    from mmtok.cli.bench import _part_options

    given = ["language.steps=300", "language.kind=small", "tokens.law_seconds=0.5"]
    assert _part_options(given) == {"language": {"steps": 300, "kind": "small"}, "tokens": {"law_seconds": 0.5}}


def test_without_out_the_run_lies_beside_the_page_or_in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["bench", "jpeg:30", "--data", "builtin-image", "--scorers", "image_signal"]
    assert main([*command, "--report", "page.html"]) == 0
    assert (tmp_path / "page.html").is_file() and (tmp_path / "page-run" / "results.jsonl").is_file()
    assert main(command) == 0
    assert (tmp_path / "mmtok-bench" / "report.html").is_file()


def test_data_is_a_folder_or_a_named_set(capsys):
    assert main(["bench", "jpeg:30", "--data", "no-such-set"]) == 2
    assert "a folder or a set" in capsys.readouterr().err
