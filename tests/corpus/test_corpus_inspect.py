"""`stats` counts what is there, `verify` finds what is wrong and says what to do."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from mmtok.corpus import inspect as inspect_module
from mmtok.corpus.index import write_index
from mmtok.corpus.inspect import stats, stats_text, verify
from mmtok.corpus.records import Failure, Row
from mmtok.corpus.shard_file import About, done_path, read_done, shard_path, write_done, write_shard
from mmtok.metrics.codes import token_statistics
from mmtok.tokens import Tokens, TokenSpec

SPEC = TokenSpec("tiny", "audio", (1000, 2**40, 4), (1, 1, 2), frame_rate=50.0, fingerprint="f")
ITEMS = 30


def row_of(shard: int, n: int) -> Row:
    rng = np.random.default_rng([shard, n])
    T = 2 * int(rng.integers(1, 20))
    levels = [rng.integers(0, 40, T), rng.integers(0, 9, T) << 36, np.repeat(rng.integers(0, 3, T // 2), 2)]
    tokens = Tokens(torch.from_numpy(np.stack(levels))[None], torch.tensor([T]), SPEC)
    return Row(f"{shard}/{n}", tokens, "words" if n % 3 == 0 else None)


def rows_of(shard: int) -> list[Row]:
    return [row_of(shard, n) for n in range(ITEMS)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An indexed corpus of three shards, each with two failures."""
    out = tmp_path_factory.mktemp("whole") / "out"
    out.mkdir()
    (out / "plan.json").write_text(json.dumps({"shards": [[[], ITEMS + 2, 1]] * 3}))
    for s in range(3):
        failures = [Failure(f"{s}/x{n}", f"{s}/x{n}: cannot decode '/data/{n}.wav' at byte {s}", s) for n in range(2)]
        write_done(write_shard(shard_path(out, s), rows_of(s), SPEC, About(s, failures)), out)
    write_index(out)
    return out


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "out"))


def test_stats_are_those_of_the_codes(whole: Path):
    found = stats(whole)
    tokens = Tokens.concat([r.tokens for s in range(3) for r in rows_of(s)])
    expected = token_statistics(tokens)
    for q, level in enumerate(found["levels"]):
        assert level["counted"] == int(expected.samples[q])
        assert level["usage"] == pytest.approx(float(expected.usage[q]))
        assert level["entropy_bits"] == pytest.approx(float(expected.entropy_bits[q]))
        assert level["perplexity"] == pytest.approx(float(expected.perplexity[q]))
    assert found["bits"] == pytest.approx(float(tokens.bits.sum()))
    assert found["entropy_bits"] == pytest.approx(float((expected.samples * expected.entropy_bits).sum()))
    each = tokens.lengths.numpy() * 5 // 2  # two levels at every position, one at every other
    assert found["quantiles"]["0.5"] == np.median(each) and found["quantiles"]["1.0"] == each.max()
    assert (found["items"], found["failures"], found["shards"], found["missing"]) == (90, 6, 3, 0)
    assert found["codes"] == each.sum() and found["text_share"] == pytest.approx(1 / 3)
    size = sum(shard_path(whole, s).stat().st_size for s in range(3))
    assert found["bytes"] == size and found["overhead"] == pytest.approx(size * 8 / found["bits"] - 1)
    assert found["reasons"] == {"…: cannot decode … at byte …": 6}
    json.dumps(found, allow_nan=False)


def test_a_bounded_sample_counts_some_of_every_shard(whole: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inspect_module, "READ_ITEMS", 5)
    monkeypatch.setattr(inspect_module, "COLLECTED", 50)
    everything = stats(whole, max_codes=None)
    some = stats(whole, max_codes=everything["codes"] // 3)
    share = some["levels"][0]["counted"] / everything["levels"][0]["counted"]
    assert 0.2 < share < 0.5
    assert [s["levels"][1]["counted"] for s in (everything, some)] == [50, 50]  # a level too large for a table
    assert some["quantiles"] == everything["quantiles"] and some["bits"] == everything["bits"]


def test_stats_of_a_corpus_under_way(out: Path):
    (out / "index.json").unlink()
    done_path(out, 1).unlink()
    found = stats(out)
    assert (found["shards"], found["missing"], found["items"], found["failures"]) == (2, 1, 60, 4)
    for s in (0, 2):
        done_path(out, s).unlink()
    nothing = stats(out)
    assert (nothing["items"], nothing["levels"], nothing["quantiles"]) == (0, [], {})
    assert "nothing is done yet" in stats_text(nothing)


def test_the_text_has_the_figures(whole: Path):
    found = stats(whole)
    text = stats_text(found)
    for words in ("tiny", "90", "33.3% of the items", "4.00%", "1,000", f"{found['overhead']:+.1%}", "6  …: cannot"):
        assert words in text
    assert f"{found['levels'][2]['entropy_bits']:.3f}" in text and math.log2(1000) == pytest.approx(9.966, abs=1e-3)
    assert "9.966" in text and max(map(len, text.splitlines())) <= 120


def test_a_whole_corpus_has_no_problems(whole: Path):
    seen: list[tuple[int, int]] = []
    assert verify(whole, lambda done, planned: seen.append((done, planned))) == []
    assert seen == [(1, 3), (2, 3), (3, 3)]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def remarked(out: Path, number: int, **change: object) -> None:
    marker = json.loads(done_path(out, number).read_text())
    done_path(out, number).write_text(json.dumps(marker | change))


def rewrite(out: Path, rows: list[Row], failures: int = 2) -> None:
    told = [Failure(f"1/x{n}", "bad", 1) for n in range(failures)]
    write_done(write_shard(shard_path(out, 1), rows, SPEC, About(1, told)), out)


def damage_table(out: Path) -> None:
    table = load_file(out / "index.safetensors")
    table["row"] = table["row"][::-1].copy()
    save_file(table, out / "index.safetensors")


def add_duplicate(out: Path) -> None:
    rewrite(out, [*rows_of(1)[:-1], row_of(0, 3)])


DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "flipped byte": (
        lambda out: flip(shard_path(out, 1), -50),
        [
            r"00001.safetensors: expected the checksum .*, got .*; delete 00001.safetensors and 00001.done.json, then",
            "index.json was not compared",
        ],
    ),
    "truncated": (
        lambda out: shard_path(out, 1).write_bytes(shard_path(out, 1).read_bytes()[:-1]),
        [r"00001.safetensors: expected \d+ bytes as its done-marker says, got \d+", "not compared"],
    ),
    "no shard": (lambda out: shard_path(out, 1).unlink(), ["00001.safetensors is missing, though", "not compared"]),
    "no marker": (
        lambda out: done_path(out, 1).unlink(),
        [r"is unfinished: 1 shard is missing \(00001\)", "index.json is there, though shards are missing; delete it"],
    ),
    "damaged marker": (
        lambda out: done_path(out, 1).write_text("{"),
        [r"00001.done.json is damaged .*; delete it", "not compared"],
    ),
    "marker of other counts": (
        lambda out: remarked(out, 1, positions=7, first_key="z"),
        ["its done-marker says positions = 7, the file has", "first_key = 'z', the file has '1/0'", "not compared"],
    ),
    "a lost item": (
        lambda out: rewrite(out, rows_of(1)[:-1]),
        ["expected 32 samples as planned, got 29 items and 2 failures", "not compared"],
    ),
    "another shard than indexed": (
        lambda out: rewrite(out, [*rows_of(1)[:-1], row_of(9, 9)]),
        [
            "failures.jsonl is not what the shards say",
            r"index.safetensors is not .*\(other hash, item\)",
            r"index.json is not what the shards say \(other .*shards\); delete index.json, then run",
        ],
    ),
    "a duplicate key": (
        add_duplicate,
        ["failures.jsonl is not", "index.safetensors is not", r"index.json is not .*\(other totals, shards\)"],
    ),
    "damaged index": (damage_table, [r"index.safetensors is not what the shards say \(other row\)"]),
    "no index": (lambda out: (out / "index.json").unlink(), ["index.json is missing; run"]),
    "no failures": (lambda out: (out / "failures.jsonl").unlink(), ["failures.jsonl is missing; delete index.json"]),
    "strays": (
        lambda out: [(out / "shards" / n).touch() for n in (".00001.safetensors.ab12", "00003.safetensors")],
        [r"\.00001.safetensors.ab12 belongs to no planned shard; delete it", "00003.safetensors belongs to no planned"],
    ),
    "damaged plan": (lambda out: (out / "plan.json").write_text("{}"), ["plan.json is damaged .*; restore it"]),
}


@pytest.mark.parametrize("what", list(DAMAGE))
def test_verify_tells_what_is_wrong(out: Path, what: str):
    damage, words = DAMAGE[what]
    damage(out)
    problems = verify(out)
    assert len(problems) == len(words), problems
    for problem, expected in zip(problems, words, strict=True):
        assert re.search(expected, problem), problem


def test_another_tokenizers_shard_and_codes_out_of_range_are_told(out: Path):
    other = dataclasses.replace(SPEC, fingerprint="g")
    rows = [dataclasses.replace(r, tokens=dataclasses.replace(r.tokens, spec=other)) for r in rows_of(1)]
    write_done(write_shard(shard_path(out, 1), rows, other, About(1)), out)
    narrow = dataclasses.replace(SPEC, codebook_sizes=(1000, 2**40, 3))
    rows = [dataclasses.replace(r, tokens=dataclasses.replace(r.tokens, spec=narrow)) for r in rows_of(2)]
    write_done(write_shard(shard_path(out, 2), rows, narrow, About(2)), out)
    problems = verify(out)
    assert "fingerprint g" in problems[0] and "codebooks (1000, 1099511627776, 3)" in problems[1]
    done = read_done(out, 0)
    assert done is not None and len(problems) == 3


def test_the_remedy_works(out: Path):
    before = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    failures = read_done(out, 1).failures  # type: ignore[union-attr]
    flip(shard_path(out, 1), -50)
    assert verify(out)
    for path in (shard_path(out, 1), done_path(out, 1)):
        path.unlink()
    write_done(write_shard(shard_path(out, 1), rows_of(1), SPEC, About(1, failures)), out)
    write_index(out)
    assert verify(out) == []
    assert {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_no_corpus_is_no_finding(tmp_path: Path):
    for look in (verify, stats):
        with pytest.raises(FileNotFoundError, match="no corpus at"):
            look(tmp_path)
