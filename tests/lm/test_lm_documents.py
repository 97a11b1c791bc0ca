"""Packing keeps every id once and in order, masks isolate documents, ranks and workers share without loss."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, default_collate

from mmtok.lm.documents import (
    IGNORED,
    PADDING,
    PackedDocuments,
    Packing,
    document_mask,
    model_inputs,
    pack_documents,
    position_ids,
    to_hf_dataset,
)
from mmtok.lm.packed_batches import PackedBatches
from mmtok.lm.token_folder import TokenFolder
from mmtok.tokens import Tokens, TokensError, TokenSpec
from mmtok.vocab import Vocab

QUICK = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
DOCUMENTS = st.lists(st.lists(st.integers(0, 70_000), max_size=25), max_size=25)


def rebuilt(packing: Packing) -> dict[int, list[int]]:
    """The documents again, from ids, document numbers and pieces."""
    rows: dict[int, list[int]] = {}
    for ids, numbers in zip(packing.input_ids.tolist(), packing.document.tolist(), strict=True):
        for i, n in zip(ids, numbers, strict=True):
            if n != PADDING:
                rows.setdefault(n, []).append(i)
    out: dict[int, list[int]] = {}
    for piece, (document, start) in enumerate(packing.pieces.tolist()):
        assert start == len(out.setdefault(document, []))
        out[document] += rows.pop(piece)
    assert not rows
    return out


# ----------------------------------------------------------------------------------------------------------- packing


@QUICK
@given(
    documents=DOCUMENTS,
    length=st.integers(1, 30),
    fit=st.sampled_from(["best", "greedy"]),
    eos=st.sampled_from([None, 2]),
    too_long=st.sampled_from(["split", "drop"]),
    pad=st.sampled_from([0, 9]),
)
def test_every_id_occurs_once_and_in_order(documents, length, fit, eos, too_long, pad):
    packing = pack_documents(documents, length, eos, pad, fit, too_long)
    want = {n: d + ([] if eos is None else [eos]) for n, d in enumerate(documents) if d}
    long = [n for n, d in want.items() if len(d) > length]
    if too_long == "drop":
        want = {n: d for n, d in want.items() if n not in long}
    assert rebuilt(packing) == want
    assert packing.dropped == [n for n in range(len(documents)) if n not in want]
    assert packing.split == (long if too_long == "split" else [])
    assert packing.input_ids.shape == packing.document.shape == (len(packing), length)
    assert (packing.input_ids[packing.document == PADDING] == pad).all()
    used = sum(map(len, want.values()))
    assert packing.utilisation == (used / packing.document.size if used else 1.0)
    for numbers in packing.document:  # runs of one number, then padding up to the end
        runs = [n for n, _ in itertools.groupby(numbers.tolist())]
        assert len(set(runs)) == len(runs) and PADDING not in runs[:-1] and runs[0] != PADDING
    if fit == "greedy":
        assert (np.diff(packing.document[packing.document != PADDING]) >= 0).all()


@QUICK
@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=40))
def test_best_fit_is_what_the_slow_loop_does(sizes):
    packing = pack_documents([[n] * size for n, size in enumerate(sizes)], 20)
    rows: list[list[int]] = []
    for n in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        rooms = [20 - sum(sizes[m] for m in row) for row in rows]
        fitting = [room for room in rooms if room >= sizes[n]]
        if fitting:
            rows[rooms.index(min(fitting))].append(n)
        else:
            rows.append([n])
    filled = sorted(sum(sizes[m] for m in row) for row in rows)
    assert sorted((packing.document != PADDING).sum(1).tolist()) == filled
    assert len(packing) <= len(pack_documents([[0] * s for s in sizes], 20, fit="greedy"))


def test_ids_take_the_smallest_integers_and_the_report_counts():
    packing = pack_documents([[1] * 7, [], [70_000] * 2, [3] * 12], 5, eos_id=2, fit="greedy", too_long="split")
    assert packing.input_ids.dtype == np.uint32 and pack_documents([[255]], 2).input_ids.dtype == np.uint8
    assert packing.report() == (f"3 documents in 6 rows of 5 ids, {24 / 30:.1%} used; 2 split into 5 pieces, 1 dropped")


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        ([[1, 2, 3]], {"length": 2}, "document 0: expected at most 2 ids .* got 3"),
        ([[1, 2]], {"length": 2, "eos_id": 0}, "got 3; give a larger length, or too_long='split'"),
        ([[1], [[1]]], {"length": 2}, "document 1: expected a flat list of integer ids"),
        ([[1], [0.5]], {"length": 2}, "document 1: expected a flat list of integer ids, got float64"),
        ([[1, -3]], {"length": 2}, "document 0: expected ids >= 0, got -3 at position 1"),
        ([], {"length": 0}, "expected length >= 1"),
        ([], {"length": 1, "fit": "first"}, "fit best|greedy"),
        ([], {"length": 1, "too_long": "cut"}, "refuse|drop|split"),
    ],
)
def test_what_cannot_be_packed_is_named(documents, options, message):
    with pytest.raises(ValueError, match=message):
        pack_documents(documents, **options)


# ------------------------------------------------------------------------------------------------- masks and positions


@QUICK
@given(st.lists(st.lists(st.sampled_from([PADDING, 0, 1, 2]), min_size=6, max_size=6), min_size=1, max_size=3))
def test_mask_and_positions_are_those_of_the_slow_loop(rows):
    document = torch.tensor(rows)
    mask, positions = document_mask(document), position_ids(document)
    assert mask.shape == (len(rows), 1, 6, 6) and mask.dtype == torch.bool
    for b, row in enumerate(rows):
        at = 0
        for i in range(6):
            at = at + 1 if i and row[i] == row[i - 1] else 0
            assert positions[b, i] == at
            for j in range(6):
                assert bool(mask[b, 0, i, j]) == (j <= i and row[i] == row[j])


def test_items_have_positions_labels_and_numbers():
    rows = PackedDocuments(pack_documents([[5, 6, 7], [8, 9]], 7, eos_id=2, fit="greedy"))
    item = rows[0]
    assert item["input_ids"].tolist() == [5, 6, 7, 2, 8, 9, 2] and item["document"].tolist() == [0] * 4 + [1] * 3
    assert item["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert item["labels"].tolist() == [IGNORED, 6, 7, 2, IGNORED, 9, 2]
    padded = PackedDocuments(pack_documents([[5, 6]], 4, pad_id=5), learn_first=True)[0]
    assert padded["labels"].tolist() == [5, 6, IGNORED, IGNORED] and padded["position_ids"].tolist() == [0, 1, 0, 1]
    assert all(v.dtype == torch.int64 for v in padded.values())


def tiny_llama(attention: str) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attn_implementation=attention,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("implementation", "attention"),
    [("sdpa", "sdpa"), ("eager", "eager"), ("sdpa", "positions"), ("eager", "positions"), ("sdpa", "eager")],
)
def test_packed_logits_are_those_of_each_document_alone(implementation, attention):
    model = tiny_llama(implementation)
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 50, n).tolist() for n in (9, 1, 5, 3, 7, 1)]
    rows = PackedDocuments(pack_documents(documents, 16))
    batch = default_collate([rows[i] for i in range(len(rows))])
    inputs = model_inputs(batch, attention)
    assert ("attention_mask" in inputs) == (attention != "positions")
    with torch.no_grad():
        out = model(**inputs)
        assert torch.isfinite(out.logits).all()
        losses, targets = 0.0, 0
        for n, document in enumerate(documents):
            ids = torch.tensor([document])
            alone = model(input_ids=ids, labels=ids)
            torch.testing.assert_close(out.logits[batch["document"] == n], alone.logits[0], atol=1e-5, rtol=1e-4)
            if len(document) > 1:  # a loss over no targets is NaN
                losses, targets = losses + float(alone.loss) * (len(document) - 1), targets + len(document) - 1
    assert float(out.loss) == pytest.approx(losses / targets, rel=1e-4)
    assert targets == int((batch["labels"][:, 1:] != IGNORED).sum())


def test_without_isolation_the_logits_would_differ():
    with pytest.raises(ValueError, match="'sdpa', 'eager' or 'positions', got 'flash'"):
        model_inputs({}, "flash")
    model = tiny_llama("sdpa")
    rows = PackedDocuments(pack_documents([[1, 2, 3, 4], [5, 6, 7]], 7))
    batch = default_collate([rows[0]])
    with torch.no_grad():
        isolated = model(**model_inputs(batch)).logits
        mixed = model(input_ids=batch["input_ids"]).logits
    assert (isolated - mixed)[0, 4:].abs().max() > 1e-3


# -------------------------------------------------------------------------------------------------- files and datasets


def some_rows(count: int = 23, length: int = 6, seed: int = 0) -> Packing:
    rng = np.random.default_rng(seed)
    return pack_documents([rng.integers(0, 300, length) for _ in range(count)], length)


@pytest.mark.parametrize("name", ["rows.safetensors", "rows.npy"])
def test_files_give_the_rows_back_without_being_read(tmp_path, name):
    packing = pack_documents([[1] * 7, [], [70_000] * 2, [3]], 5, eos_id=2, too_long="split")
    packing.save(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    rows = PackedDocuments(tmp_path / name)
    loaded = rows.packing
    assert isinstance(loaded.input_ids, np.memmap) or isinstance(loaded.input_ids.base, np.memmap)
    assert np.array_equal(loaded.input_ids, packing.input_ids) and np.array_equal(loaded.document, packing.document)
    if name.endswith("safetensors"):
        assert (loaded.dropped, loaded.split, loaded.report()) == (packing.dropped, packing.split, packing.report())
        assert rebuilt(loaded) == rebuilt(packing)
    else:
        assert "4 documents in 3 rows" in loaded.report()
    other = pickle.loads(pickle.dumps(rows))
    assert len(pickle.dumps(rows)) < 1000  # a worker gets the path, not the rows
    for i in range(len(packing)):
        for key, value in PackedDocuments(packing)[i].items():
            assert torch.equal(rows[i][key], value) and torch.equal(other[i][key], value)


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "rows.safetensors"
    packing = some_rows()
    packing.save(path)
    data = path.read_bytes()
    for broken in (data[:-5], data[:40], b"", b"\xff" * 100):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="damaged file of packed documents"):
            Packing.load(path)
    np.save(tmp_path / "x.npy", np.zeros((3, 2, 2)))
    with pytest.raises(ValueError, match=r"expected integers \(2, N, S\), got float64"):
        Packing.load(tmp_path / "x.npy")
    with pytest.raises(FileNotFoundError, match="no packed documents"):
        Packing.load(tmp_path / "none.npy")
    with pytest.raises(ValueError, match=r"\.safetensors or \.npy"):
        packing.save(tmp_path / "rows.bin")
    pack_documents([], 4).save(path)
    assert len(PackedDocuments(path)) == 0 and Packing.load(path).utilisation == 1.0


def test_hugging_face_dataset_keeps_its_columns_on_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = PackedDocuments(some_rows())
    to_hf_dataset(rows).save_to_disk(str(tmp_path / "hf"))
    loaded = datasets.load_from_disk(str(tmp_path / "hf")).with_format("torch")
    assert set(loaded.column_names) == {"input_ids", "position_ids", "labels", "document"}
    assert len(loaded) == len(rows)
    for i in range(len(rows)):
        for key, value in rows[i].items():
            assert torch.equal(loaded[i][key], value)
    assert len(to_hf_dataset(PackedDocuments(pack_documents([], 4)))) == 0


# -------------------------------------------------------------------------------------------- ranks, workers, resuming


def seen(batches) -> list[int]:
    """The first document number of each row: rows here hold one document each."""
    return [int(row[0]) for batch in batches for row in batch["document"]]


@QUICK
@given(
    count=st.integers(0, 30),
    batch_size=st.integers(1, 5),
    world=st.integers(1, 4),
    shuffle=st.booleans(),
    epoch=st.integers(0, 2),
    even=st.booleans(),
)
def test_ranks_partition_an_epoch(count, batch_size, world, shuffle, epoch, even):
    rows = PackedDocuments(some_rows(count, 2))
    ranks = [PackedBatches(rows, batch_size, 5, r, world, shuffle, even) for r in range(world)]
    parts = []
    for one in ranks:
        one.epoch = epoch
        batches = list(one)
        assert len(batches) == len(one) and one.epoch == epoch + 1
        parts.append([len(b["input_ids"]) for b in batches])
        one.epoch = epoch
    numbers = [n for one in ranks for n in seen(one)]
    assert len(set(numbers)) == len(numbers)
    if even:
        assert all(part == [batch_size] * len(parts[0]) for part in parts)
        assert count - len(numbers) < world * batch_size
    else:
        assert sorted(numbers) == list(range(count))


def test_epochs_are_shuffled_differently_and_reproducibly():
    rows = PackedDocuments(some_rows())
    stream = PackedBatches(rows, 4, seed=3)
    first, second = seen(stream), seen(stream)
    assert sorted(first) == sorted(second) == list(range(23)) and first != second
    assert seen(PackedBatches(rows, 4, seed=3)) == first != seen(PackedBatches(rows, 4, seed=4))
    assert seen(PackedBatches(rows, 4, shuffle=False)) == list(range(23))


@QUICK
@given(stop=st.integers(0, 20), batch_size=st.integers(1, 4), rank=st.integers(0, 1), shuffle=st.booleans())
def test_a_resumed_run_reads_what_the_uninterrupted_one_reads(stop, batch_size, rank, shuffle):
    rows = PackedDocuments(some_rows(9, 2))

    def make() -> PackedBatches:
        return PackedBatches(rows, batch_size, 1, rank, 2, shuffle)

    def endless(stream: PackedBatches):
        while True:
            yield from stream

    total = [seen([b]) for b in itertools.islice(endless(make()), 20)]
    before = make()
    head = [seen([b]) for b in itertools.islice(endless(before), stop)]
    state = json.loads(json.dumps(before.state_dict()))
    after = make()
    after.load_state_dict(state)
    tail = [seen([b]) for b in itertools.islice(endless(after), 20 - stop)]
    assert head + tail == total


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_workers_change_nothing_and_are_counted(tmp_path):
    some_rows(21, 2).save(tmp_path / "rows.safetensors")
    rows = PackedDocuments(tmp_path / "rows.safetensors")
    want = [seen([b]) for b in PackedBatches(rows, 4, 2)]
    stream = PackedBatches(rows, 4, 2)
    got = [seen([b]) for b in itertools.islice(stream.loader(num_workers=2), 2)]
    state = stream.state_dict()
    assert (state["epoch"], state["batch"]) == (0, 2)  # not what the workers had read ahead
    resumed = PackedBatches(rows, 4, 2)
    resumed.load_state_dict(state)
    assert got + [seen([b]) for b in resumed.loader(num_workers=2)] == want
    assert resumed.state_dict()["epoch"] == 1 and resumed.state_dict()["batch"] == 0
    assert [seen([b]) for b in PackedBatches(rows, 4, 2).loader()] == want
    plain = PackedBatches(rows, 4, 2)
    assert [seen([b]) for b in DataLoader(plain, batch_size=None, num_workers=2)] == want
    with pytest.raises(ValueError, match=r"iterate \.loader\(num_workers\)"):
        plain.state_dict()
    plain.load_state_dict(state)
    assert plain.state_dict() == state


def test_a_state_of_another_order_is_refused():
    rows = PackedDocuments(some_rows())
    state = PackedBatches(rows, 4).state_dict()
    for other in (PackedBatches(rows, 5), PackedBatches(rows, 4, seed=1), PackedBatches(rows, 4, 0, 1, 2)):
        with pytest.raises(ValueError, match="another order"):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="0 <= rank < world_size"):
        PackedBatches(rows, 4, rank=1)


# ------------------------------------------------------------------------------------------------------- token folders


class ByteTokenizer:
    def __len__(self) -> int:
        return 256

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: list[int]) -> str:
        return bytes(token_ids).decode("utf-8", "replace")


IMAGE = TokenSpec("i", "image", (16,), (), None, 4, (), "i")
AUDIO = TokenSpec("a", "audio", (8, 8), (), 50.0, None, (), "a")


def tokens_of(spec: TokenSpec, T: int, seed: int) -> Tokens:
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 8, (1, spec.num_codebooks, T)))
    return Tokens(codes, torch.tensor([T]), spec, {"height": torch.tensor([seed])})


@pytest.fixture
def corpus(tmp_path):
    """Two pictures with texts beside them, one without, and two sounds."""
    folder = tmp_path / "tokens"
    (folder / "birds").mkdir(parents=True)
    for n, name in enumerate(["b", "birds/a", "birds/naked"]):
        tokens_of(IMAGE, 4, n).save(folder / f"{name}.safetensors")
    (folder / "b.txt").write_text("a bee\n", "utf-8")
    (folder / "birds" / "a.txt").write_text(" an auk, größer", "utf-8")
    (folder / "birds" / ".hidden.safetensors").write_bytes(b"")
    (tmp_path / "sounds").mkdir()
    for n, name in enumerate(["one.safetensors", "two.flac.safetensors"]):
        tokens_of(AUDIO, 3 + n, n).save(tmp_path / "sounds" / name)
    return tmp_path


def vocab_of(**layout: str) -> Vocab:
    return Vocab(text=ByteTokenizer(), image=IMAGE, audio=AUDIO, layout=layout)


def test_texts_beside_the_token_files(corpus):
    vocab = vocab_of()
    folder = TokenFolder(corpus / "tokens", vocab, "{text}: <image>.", missing="skip")
    assert len(folder) == 2 and "birds/naked" in folder.skipped[0] and "'text'" in folder.skipped[0]
    words = [("a bee", 0), ("an auk, größer", 1)]
    for ids, (text, seed) in zip(folder, words, strict=True):
        parts = vocab.unpack(ids)
        assert [parts[0], parts[2]] == [f"{text}: ", "."]
        assert torch.equal(parts[1].codes, tokens_of(IMAGE, 4, seed).codes) and int(parts[1].side["height"]) == seed
    assert folder[1] == list(folder)[1]
    bare = TokenFolder(corpus / "tokens", vocab, "<image>", header=False)
    assert len(bare) == 3 and all(len(ids) == 6 for ids in bare)
    with pytest.raises(ValueError, match=r"record 2: .*missing='skip'"):
        TokenFolder(corpus / "tokens", vocab, "<image>{text}")


def test_records_of_a_jsonl_file_and_two_modalities(corpus):
    lines = [
        {"path": "one.wav", "text": "eins\u2028zwei", "split": "train"},
        {"path": "two.flac", "text": "two", "split": "test"},
        {"path": "three.flac", "text": "three", "split": "train"},
    ]
    file = corpus / "speech.jsonl"
    file.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines), "utf-8")
    vocab = vocab_of(audio="delay")
    folder = TokenFolder(corpus / "sounds", vocab, "<audio>{text}", file, missing="skip")
    assert [vocab.unpack(ids)[1] for ids in folder] == ["eins\u2028zwei", "two"]
    assert len(folder.skipped) == 1 and "three.flac" in folder.skipped[0]
    train = TokenFolder(
        corpus / "sounds",
        vocab,
        "{split}<audio>",
        file,
        select=lambda r: r["path"] == "one.wav",
        change={"audio": lambda t: t.keep(num_codebooks=1)},
    )
    assert len(train) == 1 and vocab.unpack(train[0])[1].codes.shape == (1, 1, 3)
    both = [{"image": "tokens/b.png", "audio": "sounds/one.safetensors", "words": [65, 66]}]
    parts = vocab.unpack(TokenFolder(corpus, vocab, "<image>{words}<audio>", both)[0])
    assert parts[0].spec == IMAGE and parts[1] == "AB" and parts[2].spec == AUDIO


def test_folders_are_packed_like_any_documents(corpus):
    vocab = vocab_of()
    folder = TokenFolder(corpus / "tokens", vocab, "{text}<image>", missing="skip", header=False)
    packing = pack_documents(folder, 64, eos_id=0)
    assert rebuilt(packing) == {n: [*ids, 0] for n, ids in enumerate(folder)}
    assert packing.utilisation == pytest.approx(sum(len(d) + 1 for d in folder) / 64)
    assert copy.copy(folder)[0] == folder[0] and math.isfinite(packing.utilisation)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "{text}"}, "expected at least one of"),
        ({"template": "<image>", "missing": "ignore"}, "'refuse' or 'skip'"),
        ({"template": "<image>", "records": [{"path": "zebra.png"}]}, "record 0: no token file for <image>.*zebra.png"),
        ({"template": "<image>", "records": [{}]}, "record 0: no token file"),
        ({"template": "<image>{n}", "records": [{"path": "b", "n": 3}]}, "as 'n', got 3"),
    ],
)
def test_what_a_folder_cannot_give_is_named(corpus, options, message):
    with pytest.raises(ValueError, match=message):
        TokenFolder(corpus / "tokens", vocab_of(), **options)


def test_wrong_files_are_named_when_read(corpus):
    vocab = vocab_of()
    with pytest.raises(TokensError, match=r"b\.safetensors: expected one audio for <audio>, got 1 of image"):
        TokenFolder(corpus / "tokens", vocab, "<audio>", [{"path": "b"}])[0]
    two = Tokens.concat([tokens_of(IMAGE, 4, 0), tokens_of(IMAGE, 4, 1)])
    two.save(corpus / "tokens" / "b.safetensors")
    with pytest.raises(TokensError, match=r"got 2 of image.*save tokens\[i\]"):
        TokenFolder(corpus / "tokens", vocab, "<image>", [{"path": "b"}])[0]
    alien = TokenSpec("i", "image", (16,), (), None, 4, (), "other")
    tokens_of(alien, 4, 0).save(corpus / "tokens" / "b.safetensors")
    with pytest.raises(TokensError, match=r"document 0 \(\{'path': 'b'\}\): .*fingerprint"):
        TokenFolder(corpus / "tokens", vocab, "<image>", [{"path": "b"}])[0]
    with pytest.raises(FileNotFoundError, match="no folder"):
        TokenFolder(corpus / "nothing", vocab, "<image>")
    (corpus / "bad.jsonl").write_text('{"path": "b"}\nnot json\n')
    with pytest.raises(ValueError, match="line 2: expected a JSON object, got 'not json'"):
        TokenFolder(corpus / "tokens", vocab, "<image>", corpus / "bad.jsonl")
