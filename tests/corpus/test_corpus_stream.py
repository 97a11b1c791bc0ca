"""`mmtok.corpus.stream`: every item once over ranks, workers and resumptions, and batches that language models read."""

from __future__ import annotations

import functools
import itertools
import pickle
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mmtok.corpus.index import write_index
from mmtok.corpus.listing import Listing
from mmtok.corpus.plan import save_plan
from mmtok.corpus.records import INDEX, PLAN, SHARDS, InputShard, Plan, Row
from mmtok.corpus.shard_file import About, shard_path, write_done, write_shard
from mmtok.corpus.stream import EpochOrder, PackRows, RowBatch, TokenStream, collate, document_of, ids
from mmtok.lm.documents import pack_documents
from mmtok.tokens import Tokens, TokensError, TokenSpec
from mmtok.vocab import Vocab

SPEC = TokenSpec("audio-test", "audio", (300, 7), frame_rate=50.0, fingerprint="f00d")
SIZES = (5, 0, 3, 1, 9, 4)  # uneven, and an empty shard
ITEMS = sum(SIZES)
WORKERS = (0, 1, 2)


def make_row(shard: int, n: int) -> Row:
    generator = torch.Generator().manual_seed(100 * shard + n)
    T = 1 + (7 * shard + 3 * n) % 6
    codes = torch.stack([torch.randint(k, (T,), generator=generator) for k in SPEC.codebook_sizes])[None]
    side = {"num_samples": torch.tensor([320 * T - n]), "sample_rate": torch.tensor([16_000])}
    text = None if n % 3 == 2 else f"{shard}/{n}"
    return Row(f"{shard}/{n}", Tokens(codes, torch.tensor([T]), SPEC, side), text, {"words": f"w{n}"})


def keys_of(values: Any) -> list[str]:
    """Of rows or batches, in their order."""
    return [key for value in values for key in (value.keys if isinstance(value, RowBatch) else [value.key])]


def same_tokens(a: Tokens, b: Tokens) -> bool:
    sides = set(a.side) == set(b.side) and all(torch.equal(a.side[k], b.side[k]) for k in a.side)
    return a.spec == b.spec and torch.equal(a.codes, b.codes) and torch.equal(a.lengths, b.lengths) and sides


def write_corpus(out: Path, shards: list[list[Row]]) -> None:
    """A finished corpus with these rows; its plan is only what the index reads of one."""
    (out / SHARDS).mkdir(parents=True)
    planned = [InputShard(n, (), None, 0) for n in range(len(shards))]
    save_plan(Plan("folder", "made here", "audio", {}, planned, "", listing=Listing(0, "", memory=b"")), out / PLAN)
    for n, rows in enumerate(shards):
        write_done(write_shard(shard_path(out, n), rows, SPEC, About(n)), out)
    write_index(out)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus")
    write_corpus(out, [[make_row(shard, n) for n in range(size)] for shard, size in enumerate(SIZES)])
    return out


@pytest.fixture(scope="module")
def another_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same sizes."""
    out = tmp_path_factory.mktemp("another")
    write_corpus(out, [[make_row(shard + 1, n) for n in range(size)] for shard, size in enumerate(SIZES)])
    return out


def order_of(sizes: list[int], **options: Any) -> list[tuple[int, int]]:
    return EpochOrder(sizes, **options)[:]


EVERY = [f"{shard}/{n}" for shard, size in enumerate(SIZES) for n in range(size)]
sizes = st.lists(st.integers(0, 12), max_size=9)
counts = st.integers(1, 7)


@given(sizes, counts, counts, st.integers(0, 5), st.integers(0, 3), st.booleans())
@settings(max_examples=100, deadline=None)
def test_ranks_read_every_item_once(
    sizes: list[int], world: int, buffer: int, epoch: int, seed: int, shuffle: bool
) -> None:
    runs = [
        order_of(sizes, epoch=epoch, seed=seed, rank=r, world=world, shuffle=shuffle, buffer=buffer)
        for r in range(world)
    ]
    every = [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]
    assert sorted(itertools.chain(*runs)) == every
    assert max(map(len, runs)) - min(map(len, runs)) <= 1  # no rank starves
    if not shuffle:
        assert list(itertools.chain(*runs)) == every


@given(sizes, counts, counts, st.integers(0, 3), st.booleans())
@settings(max_examples=100, deadline=None)
def test_even_ranks_get_equally_many(sizes: list[int], world: int, buffer: int, epoch: int, shuffle: bool) -> None:
    runs = [
        order_of(sizes, epoch=epoch, rank=r, world=world, shuffle=shuffle, buffer=buffer, even=True)
        for r in range(world)
    ]
    total = sum(sizes)
    seen = Counter(itertools.chain(*runs))
    assert {len(run) for run in runs} == {-(-total // world)}
    assert set(seen) == {(shard, row) for shard, size in enumerate(sizes) for row in range(size)}
    assert sum(seen.values()) - total < world  # what comes twice
    if total >= world:
        assert max(seen.values(), default=0) <= 2


@given(sizes, counts, st.data())
@settings(max_examples=100, deadline=None)
def test_any_part_of_a_run_reads_the_same(sizes: list[int], buffer: int, data: st.DataObject) -> None:
    whole = order_of(sizes, epoch=1, rank=1, world=2, buffer=buffer)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    assert EpochOrder(sizes, 1, rank=1, world=2, buffer=buffer)[start:stop] == whole[start:stop]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=30), counts, st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_few_shards_are_open_at_a_time(sizes: list[int], buffer: int, world: int) -> None:
    for rank in range(world):
        run = [shard for shard, _ in order_of(sizes, epoch=0, rank=rank, world=world, buffer=buffer)]
        visits = [[i for i, s in enumerate(run) if s == shard] for shard in set(run)]
        spans = [(v[0], v[-1]) for v in visits]
        assert max((sum(a <= i <= b for a, b in spans) for i in range(len(run))), default=0) <= buffer
        whole = sum(len(v) == sizes[shard] for shard, v in zip(set(run), visits, strict=True))
        assert len(set(run)) - whole <= 2  # a rank shares no more than the two shards at the ends of its run


def test_shuffle_mixes_the_shards_of_the_buffer() -> None:
    order = EpochOrder([200] * 6, 0, buffer=3)[:]
    shards = [shard for shard, _ in order]
    assert len(set(shards[:600])) == 3  # three whole shards, then the other three
    assert all(50 < shards[:200].count(s) < 90 for s in set(shards[:600]))  # 66.7 expected, 6.7 standard deviations
    assert [row for _, row in order] != sorted(row for _, row in order)


def test_epochs_and_seeds_order_differently_and_repeatably(corpus: Path) -> None:
    stream = TokenStream(corpus, seed=3)
    epochs = [keys_of(stream) for _ in range(3)]
    assert all(sorted(e) == EVERY for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3
    assert [keys_of(TokenStream(corpus, seed=3)), keys_of(TokenStream(corpus, seed=4)) == epochs[0]] == [
        epochs[0],
        False,
    ]
    again = TokenStream(corpus, seed=3)
    again.set_epoch(2)
    assert keys_of(again) == epochs[2]
    assert keys_of(TokenStream(corpus, seed=3, epochs=3)) == epochs[0] + epochs[1] + epochs[2]
    endless = TokenStream(corpus, seed=3, epochs=None)
    assert keys_of(itertools.islice(endless, 2 * ITEMS + 3)) == (epochs[0] + epochs[1] + epochs[2])[: 2 * ITEMS + 3]
    with pytest.raises(TypeError, match="no length"):
        len(endless)


def test_unshuffled_is_the_order_of_the_corpus(corpus: Path) -> None:
    rows = list(TokenStream(corpus, shuffle=False))
    assert keys_of(rows) == EVERY
    for row in rows:
        expected = make_row(*map(int, row.key.split("/")))
        assert same_tokens(row.tokens, expected.tokens)
        assert (row.text, dict(row.extra)) == (expected.text, expected.extra)


@pytest.mark.parametrize("workers", WORKERS)
def test_ranks_and_workers_read_every_item_once_in_one_order(corpus: Path, workers: int) -> None:
    seen = []
    for rank in range(3):
        stream = TokenStream(corpus, batch=2, world=3, rank=rank, buffer=2)
        batches = list(stream.loader(workers))
        assert len(batches) == len(stream)
        assert keys_of(batches) == keys_of(TokenStream(corpus, batch=2, world=3, rank=rank, buffer=2))
        seen += keys_of(batches)
        assert stream.state_dict()["epoch"] == 1
    assert sorted(seen) == EVERY


def test_a_foreign_loader_reads_every_item_once_but_cannot_be_counted(corpus: Path) -> None:
    stream = TokenStream(corpus, batch=4)
    first = keys_of(DataLoader(stream, batch_size=None, num_workers=2))
    assert sorted(first) == EVERY
    with pytest.raises(ValueError, match=r"cannot count.*\.loader\(workers\)"):
        stream.state_dict()
    stream.set_epoch(1)
    assert keys_of(DataLoader(stream, batch_size=None, num_workers=2)) != first
    rows = DataLoader(TokenStream(corpus), batch_size=3, num_workers=2, collate_fn=collate)
    assert sorted(keys_of(rows)) == EVERY
    kept = DataLoader(TokenStream(corpus, batch=4), batch_size=None, num_workers=1, persistent_workers=True)
    assert keys_of(kept) != keys_of(kept)  # the workers themselves go on with the next epoch


@pytest.mark.parametrize(("before", "after"), [(0, 0), (0, 1), (1, 2), (2, 0)])
def test_killed_and_resumed_is_the_undisturbed_run(corpus: Path, before: int, after: int) -> None:
    whole = keys_of(TokenStream(corpus, batch=3, epochs=2, seed=1, buffer=2))
    for n in (5, 9):  # in the first epoch (8 batches) and in the second
        stream = TokenStream(corpus, batch=3, epochs=2, seed=1, buffer=2)
        loader = stream.loader(before)
        first = keys_of(next(loader) for _ in range(n))
        state = pickle.loads(pickle.dumps(stream.state_dict()))
        loader.close()  # with what the workers had read ahead
        resumed = TokenStream(corpus, batch=2, epochs=2, seed=1, buffer=2)  # of another batch size, even
        resumed.load_state_dict(state)
        assert first + keys_of(resumed.loader(after)) == whole
        assert resumed.state_dict()["epoch"] == 2


@given(st.integers(0, 2 * ITEMS), st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.booleans())
@settings(max_examples=20, deadline=None)
def test_resumed_anywhere_on_any_rank(corpus: Path, n: int, first: int, second: int, world: int, even: bool) -> None:
    def stream(batch: int, rank: int) -> TokenStream:
        return TokenStream(
            corpus, batch=batch, epochs=2, world=world, rank=rank, buffer=2, even=even, collate=keys_only
        )

    for rank in range(world):
        begun = stream(first, rank)
        head = list(itertools.chain(*itertools.islice(begun, min(n, len(begun)))))
        resumed = stream(second, rank)
        resumed.load_state_dict(begun.state_dict())
        assert head + list(itertools.chain(*resumed)) == list(itertools.chain(*stream(7, rank)))


def lengths_of(rows: list[Row]) -> np.ndarray:
    return np.array([int(row.tokens.lengths) for row in rows])


def keys_only(rows: list[Row]) -> list[str]:
    return [row.key for row in rows]


def test_iterating_again_goes_on(corpus: Path) -> None:
    stream = TokenStream(corpus)
    first = keys_of(itertools.islice(stream, 4))
    assert sorted(first + keys_of(stream)) == EVERY
    assert stream.state_dict() == {**TokenStream(corpus).state_dict(), "epoch": 1}


def test_foreign_states_are_refused(corpus: Path, another_corpus: Path) -> None:
    stream = TokenStream(corpus)
    state = stream.state_dict()
    for other in (
        TokenStream(another_corpus),
        TokenStream(corpus, seed=1),
        TokenStream(corpus, buffer=3),
        TokenStream(corpus, shuffle=False),
        TokenStream(corpus, world=2, rank=0),
        TokenStream(corpus, even=True),
    ):
        with pytest.raises(ValueError, match="in another order; build TokenStream as it was"):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"given in 0\.\.22"):
        stream.load_state_dict({**state, "given": 50})
    stream.load_state_dict(state)  # the others left no trace
    assert sorted(keys_of(stream)) == EVERY


def test_pickles_with_its_position(corpus: Path) -> None:
    stream = TokenStream(corpus, batch=4)
    first = keys_of(itertools.islice(stream, 2))
    copy = pickle.loads(pickle.dumps(stream))
    assert sorted(first + keys_of(copy)) == EVERY
    assert sorted(first + keys_of(stream)) == EVERY


def test_spawned_workers(corpus: Path) -> None:
    stream = TokenStream(corpus, batch=8)
    assert keys_of(stream.loader(1, start_method="spawn")) == keys_of(TokenStream(corpus, batch=8))


def test_collate_is_concat(corpus: Path) -> None:
    rows = list(TokenStream(corpus, shuffle=False))
    (batch,) = TokenStream(corpus, shuffle=False, batch=100)
    assert same_tokens(batch.tokens, Tokens.concat([row.tokens for row in rows]))
    assert batch.texts == [row.text for row in rows]
    assert batch.extra == [row.extra for row in rows]
    assert len(batch) == ITEMS
    with pytest.raises(TokensError, match="expected at least one Tokens"):
        collate([])


def test_documents(corpus: Path) -> None:
    vocab = Vocab(text=300, audio=SPEC)
    rows = [Row(row.key, row.tokens, None, {"ids": [1, 2]}) for row in TokenStream(corpus, shuffle=False)]
    assert ids(rows, vocab) == [vocab.pack([row.tokens]) for row in rows]
    row = rows[0]
    assert document_of(row, vocab, "{ids}<audio>") == vocab.pack([[1, 2], row.tokens])
    assert document_of(row, vocab, "<audio>{ids}", header=False) == vocab.pack([row.tokens, [1, 2]], header=False)
    for template, match in (("{text}<audio>", "0/0: expected a text .* {text}, got None"), ("<image>", "<audio>")):
        with pytest.raises(ValueError, match=match):
            document_of(row, vocab, template)
    with pytest.raises(TokensError, match="no audio ids"):
        document_of(row, Vocab(text=300, image=TokenSpec("i", "image", (4,), num_tokens=1)))


def test_texts_come_first_where_there_are_some(corpus: Path) -> None:
    vocab = Vocab(text=Letters(), audio=SPEC)
    rows = list(TokenStream(corpus, shuffle=False))
    assert {row.text is None for row in rows} == {True, False}
    assert ids(rows, vocab) == [vocab.pack([row.text or "", row.tokens]) for row in rows]
    assert document_of(rows[0], vocab, "say {words}: <audio>!") == vocab.pack(["say w0: ", rows[0].tokens, "!"])


class Letters:
    """The least tokenizer that `Vocab` takes."""

    def __len__(self) -> int:
        return 256

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int], **options: bool) -> str:
        return bytes(ids).decode()


@pytest.mark.parametrize("workers", [0, 2])
def test_packed_batches_train_a_language_model(corpus: Path, workers: int) -> None:
    vocab = Vocab(text=300, audio=SPEC)
    pack = PackRows(vocab, length=64, eos_id=0, template="<audio>")
    stream = TokenStream(corpus, batch=8, collate=pack)
    documents = {(*vocab.pack([make_row(*map(int, key.split("/"))).tokens]), 0) for key in EVERY}
    found: list[tuple[int, ...]] = []
    for batch in stream.loader(workers):
        assert {name: value.shape[1] for name, value in batch.items()} == dict.fromkeys(batch, 64)
        for row, document in zip(batch["input_ids"], batch["document"], strict=True):
            found += [tuple(row[document == d].tolist()) for d in document.unique() if d >= 0]
    assert len(found) == ITEMS
    assert set(found) == documents
    packing = pack_documents((document_of(row, vocab, "<audio>") for row in TokenStream(corpus)), 64, eos_id=0)
    assert len(packing.pieces) == ITEMS


def test_documents_that_are_dropped_leave_an_empty_batch(corpus: Path) -> None:
    pack = PackRows(Vocab(text=300, audio=SPEC), length=2, too_long="drop", template="<audio>")
    (batch,) = TokenStream(corpus, batch=100, collate=pack)
    assert {tuple(value.shape) for value in batch.values()} == {(0, 2)}


def test_ids_as_a_collate(corpus: Path) -> None:
    vocab = Vocab(text=300, audio=SPEC)
    collate_ids = functools.partial(ids, vocab=vocab, template="<audio>")
    plain = list(TokenStream(corpus, batch=5, collate=collate_ids))
    (lengths,) = TokenStream(corpus, batch=100, collate=lengths_of).loader(1)
    assert isinstance(lengths, np.ndarray)  # as it was made, with and without workers
    assert list(TokenStream(corpus, batch=5, collate=collate_ids).loader(1)) == plain
    assert sum(map(len, plain)) == ITEMS


def test_ranks_of_torch_distributed(corpus: Path, tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        stream = TokenStream(corpus)
    finally:
        torch.distributed.destroy_process_group()
    assert (stream.rank, stream.world) == (0, 1)


@pytest.mark.parametrize(
    "options",
    [{"world": 2}, {"rank": 0}, {"world": 2, "rank": 2}, {"buffer": 0}, {"batch": 0}, {"epochs": 0}, {"seed": -1}],
)
def test_bad_options(corpus: Path, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        TokenStream(corpus, **options)


def test_unfinished_corpus(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "copy")
    (tmp_path / "copy" / INDEX).unlink()
    with pytest.raises(ValueError, match="unfinished"):
        TokenStream(tmp_path / "copy")
    with pytest.raises(FileNotFoundError, match="no corpus at"):
        TokenStream(tmp_path)


def test_duplicate_keys_come_once(tmp_path: Path) -> None:
    rows = [[make_row(0, 0), make_row(0, 1)], [make_row(0, 1), make_row(1, 0), make_row(0, 0)], [make_row(2, 0)]]
    write_corpus(tmp_path, rows)
    assert keys_of(TokenStream(tmp_path, shuffle=False)) == ["0/0", "0/1", "1/0", "2/0"]
    assert sorted(keys_of(TokenStream(tmp_path))) == ["0/0", "0/1", "1/0", "2/0"]


def test_bad_epoch(corpus: Path) -> None:
    with pytest.raises(ValueError, match="epoch: expected at least 0"):
        TokenStream(corpus).set_epoch(-1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("sizes", [(), (0, 0)])
def test_an_empty_corpus_ends_at_once(tmp_path: Path, sizes: tuple[int, ...], workers: int) -> None:
    write_corpus(tmp_path, [[] for _ in sizes])
    stream = TokenStream(tmp_path, epochs=None, batch=2, even=True)
    assert list(stream.loader(workers)) == []
