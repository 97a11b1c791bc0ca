"""The index of a corpus: random access equals what was written, duplicates are told, workers read the same."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mmtok.corpus import index as index_module
from mmtok.corpus.index import Corpus, build_index, write_index
from mmtok.corpus.records import Failure, Row
from mmtok.corpus.shard_file import About, done_path, shard_path, write_done, write_shard
from mmtok.tokens import Tokens, TokenSpec

SPEC = TokenSpec("tiny", "audio", (1024, 1024), frame_rate=50.0, fingerprint="f")
KEYS = [["a/0", "a/1", "犬"], [], ["b/0", "a/1", "b/1", "b/1"], ["c/0", "犬", "c\udcff"]]
FAILED = {0: [Failure("bad", "not a sound", 0)], 3: [Failure("worse", "truncated", 3), Failure("x", "empty", 3)]}
ORDER = [(0, 0), (0, 1), (0, 2), (2, 0), (2, 2), (3, 0), (3, 2)]  # where the items of the index are


def row_of(key: str, n: int, spec: TokenSpec = SPEC) -> Row:
    rng = np.random.default_rng(n)
    codes = torch.from_numpy(rng.integers(0, 1024, (1, spec.num_codebooks, n + 2)))
    side = {"num_samples": torch.tensor([320 * n + 7]), "sample_rate": torch.tensor([16000 if n % 2 else 44100])}
    return Row(key, Tokens(codes, torch.tensor([n + 2]), spec, side), f"text {n}" if n % 2 else None, {"n": n})


def make_corpus(out: Path, keys: Sequence[Sequence[str]] = KEYS, done: Sequence[int] | None = None) -> list[list[Row]]:
    """A folder with a plan, shards and markers; returns the rows of each shard."""
    out.mkdir(exist_ok=True)
    rows = [[row_of(key, 10 * s + n) for n, key in enumerate(part)] for s, part in enumerate(keys)]
    counts = [len(part) + len(FAILED.get(s, ())) for s, part in enumerate(keys)]
    (out / "plan.json").write_text(json.dumps({"shards": [[[{}], n if s else None, 1] for s, n in enumerate(counts)]}))
    for s in range(len(keys)) if done is None else done:
        write_done(write_shard(shard_path(out, s), rows[s], SPEC, About(s, FAILED.get(s, ()))), out)
    return rows


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, list[Row]]:
    """An indexed corpus and the rows that its index must have, in order."""
    rows = make_corpus(tmp_path / "out")
    write_index(tmp_path / "out")
    return tmp_path / "out", [rows[s][n] for s, n in ORDER]


def assert_same(a: Row, b: Row) -> None:
    assert (a.key, a.text, dict(a.extra)) == (b.key, b.text, dict(b.extra))
    assert torch.equal(a.tokens.codes, b.tokens.codes) and a.tokens.spec == b.tokens.spec
    assert a.tokens.side.keys() == b.tokens.side.keys()
    assert all(torch.equal(v, b.tokens.side[k]) for k, v in a.tokens.side.items())


def test_random_access_equals_what_was_written(made: tuple[Path, list[Row]]):
    out, rows = made
    corpus = Corpus(out)
    assert len(corpus) == len(rows) and corpus.spec == SPEC
    for i in np.random.default_rng(0).permutation(len(rows)):
        assert_same(corpus[i], rows[i])
        assert_same(corpus[int(i) - len(rows)], rows[i])
        assert_same(corpus[rows[i].key], rows[i])
        assert corpus.locate(i) == ORDER[i] and corpus.find(rows[i].key) == i and rows[i].key in corpus
        assert torch.equal(corpus.tokens(i).codes, rows[i].tokens.codes) and corpus.key(i) == rows[i].key
        assert torch.equal(corpus.codes(i), rows[i].tokens.codes[0])
    for part in (slice(None), slice(1, 4), slice(None, None, -2), slice(9, 12)):
        assert [r.key for r in corpus[part]] == [r.key for r in rows[part]]
    assert [r.key for r in corpus] == [r.key for r in rows]
    assert "no such" not in corpus and 3 not in corpus
    with pytest.raises(KeyError, match=r"'bad' is no key of .*failures.jsonl"):
        corpus["bad"]
    for i in (len(rows), -len(rows) - 1):
        with pytest.raises(IndexError, match=f"item {i} of a corpus of 7"):
            corpus[i]


def test_failures_are_merged_and_duplicates_among_them(made: tuple[Path, list[Row]]):
    out, _ = made
    lines = [json.loads(line) for line in (out / "failures.jsonl").read_text("utf-8").splitlines()]
    assert [(x["shard"], x["key"], x["reason"]) for x in lines] == [
        (0, "bad", "not a sound"),
        (2, "a/1", "duplicate key, also in shard 0"),
        (2, "b/1", "duplicate key, also in shard 2"),
        (3, "worse", "truncated"),
        (3, "x", "empty"),
        (3, "犬", "duplicate key, also in shard 0"),
    ]


def test_index_json_says_what_is_there(made: tuple[Path, list[Row]]):
    out, rows = made
    about = json.loads((out / "index.json").read_text())
    assert (about["schema"], about["tokenizer"], about["fingerprint"]) == (1, "tiny", "f")
    assert TokenSpec.from_dict(about["spec"]) == SPEC and about["packing"] == "bits"
    seconds = sum(int(r.tokens.side["num_samples"]) / int(r.tokens.side["sample_rate"]) for r in rows)
    positions = sum(int(r.tokens.lengths) for r in rows)
    sizes = [shard_path(out, s).stat().st_size for s in range(4)]
    assert about["totals"] == {
        "items": 7,
        "positions": positions,
        "codes": 2 * positions,
        "bits": 20.0 * positions,
        "bytes": sum(sizes),
        "failures": 6,
        "seconds": pytest.approx(seconds, rel=1e-12),
    }
    for n, shard in enumerate(about["shards"]):
        data = (out / shard["name"]).read_bytes()
        assert (shard["number"], shard["items"], shard["bytes"]) == (n, len(KEYS[n]), len(data))
        assert shard["sha256"] == hashlib.sha256(data).hexdigest()
    table = (out / "index.safetensors").read_bytes()
    assert about["table"] == {"name": "index.safetensors", "sha256": hashlib.sha256(table).hexdigest()}


def test_the_index_is_a_function_of_the_shards(made: tuple[Path, list[Row]], tmp_path: Path):
    out, _ = made
    names = ("index.json", "index.safetensors", "failures.jsonl")
    before = [(out / n).read_bytes() for n in names]
    write_index(out)
    make_corpus(tmp_path / "again", done=[3, 1, 0, 2])  # shards done in another order, in another folder
    write_index(tmp_path / "again")
    for folder in (out, tmp_path / "again"):
        assert [(folder / n).read_bytes() for n in names] == before
    assert sorted(p.name for p in out.iterdir()) == sorted([*names, "plan.json", "shards"])


def test_pictures_are_counted_in_pixels(tmp_path: Path):
    spec = TokenSpec("pictures", "image", (256,), num_tokens=4)
    side = {"height": torch.tensor([30_000]), "width": torch.tensor([50_000])}
    row = Row("k", Tokens(torch.ones(1, 1, 4, dtype=torch.int64), torch.tensor([4]), spec, side))
    (tmp_path / "plan.json").write_text('{"shards": [[[], 1, 1]]}')
    write_done(write_shard(shard_path(tmp_path, 0), [row], spec, About(0)), tmp_path)
    totals = build_index(tmp_path).about["totals"]
    assert totals["pixels"] == 1_500_000_000 and "seconds" not in totals


def test_keys_of_one_hash_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(index_module, "key_hash", lambda key: ord(key[0]))
    make_corpus(tmp_path)
    write_index(tmp_path)
    corpus = Corpus(tmp_path)
    assert len(corpus) == 7 and len(build_index(tmp_path).failures) == 6
    assert [corpus.locate(corpus.find(key)) for key in ("a/0", "a/1", "b/1", "c/0", "c\udcff")] == [
        (0, 0),
        (0, 1),
        (2, 2),
        (3, 0),
        (3, 2),
    ]
    assert "a/2" not in corpus


def test_an_unfinished_corpus_is_refused_or_read_in_part(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no corpus at .*plan.json is missing"):
        Corpus(tmp_path)
    rows = make_corpus(tmp_path, done=[2])
    words = r"is unfinished: 3 shards are missing \(00000, 00001, 00003\); run `mmtok corpus tokenize` again"
    with pytest.raises(ValueError, match=words):
        write_index(tmp_path)
    with pytest.raises(ValueError, match=words):
        Corpus(tmp_path)
    partial = Corpus(tmp_path, partial=True)
    assert [r.key for r in partial] == ["b/0", "a/1", "b/1"]
    assert_same(partial["a/1"], rows[2][1])
    copy = pickle.dumps(partial)
    make_corpus(tmp_path)
    assert len(pickle.loads(copy)) == 3  # as it was when it was opened: workers must agree
    with pytest.raises(ValueError, match="its index is missing; run"):
        Corpus(tmp_path)
    done_path(tmp_path, 1).unlink()
    with pytest.raises(ValueError, match=r"1 shard is missing \(00001\)"):
        write_index(tmp_path)


def test_nothing_done_yet_reads_as_empty(tmp_path: Path):
    make_corpus(tmp_path, done=[])
    corpus = Corpus(tmp_path, partial=True)
    assert len(corpus) == 0 and corpus.spec is None and "a/0" not in corpus and corpus[:] == []


def test_damaged_or_foreign_indexes_are_refused(made: tuple[Path, list[Row]]):
    out, _ = made
    text, table = (out / "index.json").read_text(), (out / "index.safetensors").read_bytes()
    (out / "index.safetensors").write_bytes(table[:-9])
    with pytest.raises(ValueError, match=r"index.safetensors is damaged .*delete it and run"):
        Corpus(out)
    (out / "index.safetensors").write_bytes(table)
    for bad, words in (
        (text.replace('"schema": 1', '"schema": 9'), "expected format 'mmtok-corpus' and schema 1, got"),
        (text[:50], "index.json is damaged"),
        (text.replace('"items": 7', '"items": 8'), "expected 8 items"),
    ):
        (out / "index.json").write_text(bad)
        with pytest.raises(ValueError, match=words):
            Corpus(out)
    (out / "index.json").write_text(text)
    corpus = Corpus(out)
    write_shard(shard_path(out, 0), [row_of("a/0", 3)], SPEC, About(0))
    with pytest.raises(ValueError, match=r"expected \d+ bytes as the corpus says, got \d+; `mmtok corpus verify"):
        corpus[0]
    make_corpus(out)
    marker = done_path(out, 0)
    marker.write_text(marker.read_text().replace('"items":3', '"items":4'))
    with pytest.raises(ValueError, match="expected 4 items as its done-marker says, got 3"):
        build_index(out)


def test_two_tokenizers_are_no_corpus(tmp_path: Path):
    make_corpus(tmp_path)
    other = TokenSpec("tiny", "audio", (1024, 1024), frame_rate=50.0, fingerprint="g")
    rows = [row_of(str(n), n, other) for n in range(4)]
    write_done(write_shard(shard_path(tmp_path, 2), rows, other, About(2)), tmp_path)
    with pytest.raises(ValueError, match=r"expected codes of 'tiny' \(fingerprint f, .*fingerprint g"):
        write_index(tmp_path)
    make_corpus(tmp_path)
    write_done(write_shard(shard_path(tmp_path, 2), [row_of("k", 1)], SPEC, About(2, packing="ints")), tmp_path)
    with pytest.raises(ValueError, match="expected the packing 'bits' of the shards before"):
        write_index(tmp_path)


def test_few_shards_are_open(made: tuple[Path, list[Row]]):
    out, rows = made
    corpus = Corpus(out, keep_open=2)
    opened: list[int] = []
    for i in (0, 5, 1, 6, 2, 4, 0):  # shards 0 3 0 3 0 2 0
        before = set(corpus._shards._open)
        assert_same(corpus[i], rows[i])
        opened += sorted(set(corpus._shards._open) - before)
        assert len(corpus._shards) <= 2
    assert opened == [0, 3, 2]  # shard 3 had to go for 2, and 0 was never opened again
    assert corpus.shard(3).keys == KEYS[3]


def test_pickles_are_small_and_notice_a_change(made: tuple[Path, list[Row]]):
    out, rows = made
    corpus = Corpus(out)
    corpus[0]
    data = pickle.dumps(corpus)
    copy = pickle.loads(data)
    assert len(data) < 4000 and len(copy._shards) == 0
    assert_same(copy[6], rows[6])
    make_corpus(out, [["a"], [], [], []])
    write_index(out)
    with pytest.raises(ValueError, match="the corpus was changed after it was opened"):
        pickle.loads(data)


def test_dataloader_workers_read_the_corpus(made: tuple[Path, list[Row]]):
    out, rows = made
    corpus = Corpus(out)
    corpus[0]  # open before the fork
    loader = DataLoader(corpus, batch_size=2, num_workers=2, collate_fn=list)  # type: ignore[arg-type]
    found = [row for batch in loader for row in batch]
    assert len(found) == len(rows)
    for a, b in zip(found, rows, strict=True):
        assert_same(a, b)
