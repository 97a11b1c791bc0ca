"""Shard files: bit packing is exact, rows come back as they were, bytes are the same, damage is told."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save

from mmtok.corpus import shard_file
from mmtok.corpus.packing import FEW, SPARE, choose_packing, groups_of, pack_bits, stream_bytes, unpack_bits, width_of
from mmtok.corpus.records import Done, Failure, Row
from mmtok.corpus.shard_columns import json_bytes
from mmtok.corpus.shard_file import (
    About,
    ShardFile,
    done_path,
    read_done,
    sha256_of,
    shard_path,
    write_done,
    write_shard,
)
from mmtok.tokens import Tokens, TokensError, TokenSpec

KEYS = ["a", "日本/犬 🐕", "naïve café", "line\u2028end", "no\udcff utf-8", "", "x" * 300]


def spec_of(sizes: Sequence[int] = (1024, 1024), strides: Sequence[int] = (), fingerprint: str = "f") -> TokenSpec:
    return TokenSpec("tiny", "audio", tuple(sizes), tuple(strides), frame_rate=50.0, fingerprint=fingerprint)


def codes_of(spec: TokenSpec, T: int, rng: np.random.Generator) -> torch.Tensor:
    """(1, Q, T) random codes, strided levels repeating theirs."""
    out = np.empty((1, spec.num_codebooks, T), np.int64)
    for q, (k, s) in enumerate(zip(spec.codebook_sizes, spec.level_strides, strict=True)):
        out[0, q] = np.repeat(rng.integers(0, min(k, 2**63), -(-T // s), dtype=np.uint64).astype(np.int64), s)[:T]
    return torch.from_numpy(out)


def row_of(key: str, spec: TokenSpec, T: int, side: dict | None = None, **more: Any) -> Row:
    rng = np.random.default_rng(T + len(key))
    return Row(key, Tokens(codes_of(spec, T, rng), torch.tensor([T]), spec, side or {}), **more)


def assert_same(a: Row, b: Row) -> None:
    assert (a.key, a.text, dict(a.extra)) == (b.key, b.text, dict(b.extra))
    x, y = a.tokens[0], b.tokens[0]
    assert x.spec == y.spec and torch.equal(x.codes, y.codes) and torch.equal(x.lengths, y.lengths)
    assert x.side.keys() == y.side.keys()
    for name, value in x.side.items():
        assert value.dtype == y.side[name].dtype and value.shape == y.side[name].shape
        assert torch.equal(value.flatten().view(torch.uint8), y.side[name].flatten().view(torch.uint8))


@settings(deadline=None, max_examples=60)
@given(width=st.integers(1, 64), data=st.data())
def test_packing_is_exact_and_little_endian(width: int, data: st.DataObject):
    codes = np.array(data.draw(st.lists(st.integers(0, 2**width - 1), max_size=40)), np.uint64)
    stream = pack_bits(codes, width)
    assert len(stream) == stream_bytes(len(codes), width) and not stream[-SPARE:].any()
    number = sum(int(c) << (n * width) for n, c in enumerate(codes))
    assert int.from_bytes(stream.tobytes(), "little") == number
    start = data.draw(st.integers(0, len(codes)))
    count = data.draw(st.integers(0, len(codes) - start))
    assert np.array_equal(unpack_bits(stream, width, start, count), codes[start : start + count])


@pytest.mark.parametrize("width", [1, 7, 9, 10, 25, 26, 57, 58, 63, 64])
def test_long_streams_unpack_as_short_ones_do(width: int):
    rng = np.random.default_rng(width)
    codes = rng.integers(0, 2**width - 1, 40_000, np.uint64, endpoint=True)  # more than one round of blocks
    stream = pack_bits(codes, width)
    assert np.array_equal(unpack_bits(stream, width), codes)
    for start, count in [(0, FEW), (3, FEW + 5), (8, 36_000), (4099, FEW - 1), (40_000, 0)]:
        assert np.array_equal(unpack_bits(stream, width, start, count), codes[start : start + count])


def test_the_packing_follows_from_the_spec_alone():
    assert [width_of(k) for k in (2, 3, 4, 5, 256, 257, 1024, 2**63, 2**64)] == [1, 2, 2, 3, 8, 9, 10, 63, 64]
    chosen = {k: choose_packing(spec_of([k])) for k in (16, 200, 256, 1024, 2**14, 2**15, 2**16, 2**18, 2**60)}
    assert chosen == dict.fromkeys((16, 1024, 2**14, 2**18), "bits") | dict.fromkeys(
        (200, 256, 2**15, 2**16, 2**60), "ints"
    )
    # Levels of 8 and 10 bits save 6 of 24; where the narrow one counts for a 64th only, 8.2 of 8.25 is not worth it.
    assert choose_packing(spec_of([256, 1024])) == "bits"
    assert choose_packing(spec_of([256, 1024], [1, 64])) == "ints"
    assert choose_packing(spec_of([1024]), "ints") == "ints" and choose_packing(spec_of([256]), "bits") == "bits"
    with pytest.raises(ValueError, match="packing: expected one of auto, ints, bits, got 'zip'"):
        choose_packing(spec_of(), "zip")
    groups = groups_of(spec_of([64, 1024, 60], [4, 2, 1]), "bits")
    assert [(g.levels, g.strides, g.width) for g in groups] == [((0, 2), (4, 1), 6), ((1,), (2,), 10)]
    assert groups[0].counts(np.array([0, 1, 5], np.uint8)).tolist() == [0, 2, 7]


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_rows_come_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    sizes = data.draw(st.lists(st.sampled_from([2, 5, 256, 1000, 1024, 65536, 2**40, 2**63]), min_size=1, max_size=4))
    spec = spec_of(sizes, [data.draw(st.sampled_from([1, 2, 3])) for _ in sizes])
    extra = st.one_of(st.just({}), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2))
    text = st.one_of(st.none(), st.text(max_size=8))
    rows = [
        row_of(key, spec, data.draw(st.integers(0, 9)), text=data.draw(text), extra=data.draw(extra))
        for key in data.draw(st.permutations(KEYS))[: data.draw(st.integers(0, 4))]
    ]
    path = tmp_path_factory.mktemp("s") / "00003.safetensors"
    packing = data.draw(st.sampled_from(["auto", "ints", "bits"]))
    done = write_shard(path, iter(rows), spec, About(3, packing=packing))
    shard = ShardFile(path, verify=True, spec=spec)
    assert len(shard) == len(rows) == done.items
    assert shard.keys == [r.key for r in rows] and shard.texts == [r.text for r in rows]
    assert shard.num_texts == sum(r.text is not None for r in rows)
    for expected, got in zip(rows, shard, strict=True):
        assert_same(expected, got)
    for i, codes in enumerate(shard.block(0, len(rows))):
        assert torch.equal(codes, rows[i].tokens.codes[0]) and torch.equal(codes, shard.codes(i - len(rows)))
    levels = [-(-int(r.tokens.lengths[0]) // s) for r in rows for s in spec.level_strides]
    assert done.codes == sum(levels) and done.positions == sum(int(r.tokens.lengths[0]) for r in rows)


def test_every_type_and_shape_of_side_values_comes_back(tmp_path: Path):
    spec = spec_of()
    wide = {
        str(t): torch.tensor([[1, 0, 1]]).to(t)
        for t in (torch.bool, torch.uint8, torch.int8, torch.int16, torch.float16, torch.bfloat16, torch.float64)
    }
    sides = [
        {"num_samples": torch.tensor([n]), "sample_rate": torch.tensor([48_000]), "below": torch.tensor([-n])}
        | {"scale": torch.rand(1, n), "grid": torch.full((1, n, 2), n), "large": torch.tensor([2**40])}
        | {"nan": torch.tensor([float("nan")])}
        | wide
        | ({"sometimes": torch.tensor([n])} if n % 2 else {})
        for n in range(4)
    ]
    rows = [row_of(str(n), spec, n + 1, side) for n, side in enumerate(sides)]
    write_shard(tmp_path / "00000.safetensors", rows, spec, About(0))
    shard = ShardFile(tmp_path / "00000.safetensors")
    for expected, got in zip(rows, shard, strict=True):
        assert_same(expected, got)
    stored = load_file(shard.path)
    assert stored["side.sample_rate"].dtype == torch.uint16 and stored["side.num_samples"].dtype == torch.uint8
    rates = shard.side("sample_rate")
    assert rates is not None and torch.equal(rates, torch.full((4,), 48_000))
    assert shard.side("scale") is None and shard.side("sometimes") is None and shard.side("nothing") is None
    value = shard[1].tokens.side["torch.float64"]
    value += 1  # its own memory: the file stands
    assert torch.equal(shard[1].tokens.side["torch.float64"], wide["torch.float64"])


@pytest.mark.parametrize("differ", [torch.tensor([1.5]), torch.tensor([[1]])])
def test_side_values_of_several_types_are_refused(tmp_path: Path, differ: torch.Tensor):
    spec = spec_of()
    rows = [row_of("a", spec, 2, {"x": torch.tensor([1])}), row_of("b", spec, 2, {"x": differ})]
    with pytest.raises(ValueError, match=r"side\['x'\]: expected one type and number of axes"):
        write_shard(tmp_path / "s", rows, spec, About(0))
    strange = [row_of("a", spec, 1, {"x": torch.ones(1, dtype=torch.complex128)})]
    with pytest.raises(ValueError, match=r"expected types that safetensors has, got .*complex128"):
        write_shard(tmp_path / "s", strange, spec, About(0))
    assert not list(tmp_path.iterdir())


def test_anybody_can_read_it(tmp_path: Path):
    """As the metadata say, with safetensors and nothing of ours."""
    spec = spec_of([1024, 1024], [2, 1])
    rows = [row_of(key, spec, T, text=f"text {T}") for key, T in (("one", 5), ("two", 0), ("three", 8))]
    write_shard(tmp_path / "s.safetensors", rows, spec, About(7, plan="abc"))
    with safe_open(tmp_path / "s.safetensors", "np") as f:
        about = json.loads(f.metadata()["mmtok"])
        lengths, stream = f.get_tensor("lengths"), f.get_tensor("codes")
        keys, sizes = f.get_tensor("key.bytes").tobytes().decode(), f.get_tensor("key.lengths")
    assert (about["schema"], about["tokenizer"], about["spec"]["fingerprint"]) == (1, "tiny", "f")
    assert (about["items"], about["positions"], about["codes"], about["bits"]) == (3, 13, 20, 200.0)
    assert (about["shard"], about["plan"], about["packing"]) == (7, "abc", "bits")
    assert about["streams"] == [{"tensor": "codes", "levels": [0, 1], "strides": [2, 1], "width": 10}]
    assert "codes holds ceil(lengths[i] / stride) codes of item i" in about["read"]
    assert keys == "onetwothree" and sizes.tolist() == [3, 3, 5] and lengths.tolist() == [5, 0, 8]
    bits = np.unpackbits(stream, bitorder="little")[: 20 * 10].reshape(20, 10)
    found = (bits * (1 << np.arange(10))).sum(1).tolist()
    assert found == [c for r in rows for c in [*r.tokens.codes[0, 0, ::2].tolist(), *r.tokens.codes[0, 1].tolist()]]


def test_the_same_rows_give_the_same_bytes(tmp_path: Path):
    spec = spec_of([1024, 16, 300])
    for name in "ab":
        side = {k: torch.tensor([3]) for k in ("z", "y", "x")}
        rows = (row_of(k, spec, n, side, text=k, extra={"b": 1, "a": [k]}) for n, k in enumerate(KEYS))
        done = write_shard(tmp_path / name, rows, spec, About(0))
        assert done.sha256 == sha256_of(tmp_path / name) and done.bytes == (tmp_path / name).stat().st_size
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    codes = codes_of(spec, 4, np.random.default_rng(0))
    padded = Tokens(torch.nn.functional.pad(codes, (0, 9), value=7), torch.tensor([4]), spec)
    for name, tokens in (("a", padded), ("b", Tokens(codes, torch.tensor([4]), spec))):
        write_shard(tmp_path / name, [Row("k", tokens)], spec, About(0))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()  # what is past the length means nothing


def test_an_empty_shard_is_a_shard(tmp_path: Path):
    done = write_shard(tmp_path / "00000.safetensors", [], spec_of(), About(0))
    assert (done.items, done.codes, done.first_key) == (0, 0, None)
    shard = ShardFile(tmp_path / "00000.safetensors", verify=True)
    assert len(shard) == 0 and list(shard) == [] and shard.keys == [] and shard.block(0, 0) == []
    with pytest.raises(IndexError, match="item 0 of a shard of 0"):
        shard[0]


def test_what_does_not_belong_is_refused(tmp_path: Path):
    spec, path = spec_of([1024, 4], [1, 2]), tmp_path / "s"
    good = row_of("good", spec, 4)
    two = Row("two", Tokens.concat([good.tokens, good.tokens]))
    other = row_of("other", spec_of([1024, 4], [1, 2], "g"), 4)
    large, torn = row_of("large", spec, 4), row_of("torn", spec, 4)
    large.tokens.codes[0, 1, :2] = 4
    torn.tokens.codes[0, 1] = torch.tensor([0, 1, 2, 2])
    for bad, words in (
        (two, "'two': expected one item of .*, got 2 of"),
        (other, "'other': expected one item"),
        (large, r"'large': expected codes in 0\.\.3 on level 1, got .*4"),
        (torn, "'torn': expected level 1 to repeat each code 2 times"),
    ):
        with pytest.raises(TokensError, match=words):
            write_shard(path, [good, bad], spec, About(0))
    with pytest.raises(ValueError, match="'good': extra: Out of range float"):
        write_shard(path, [Row("good", good.tokens, extra={"x": float("nan")})], spec, About(0))
    with pytest.raises(ValueError, match="'good': extra: expected plain JSON values"):
        write_shard(path, [Row("good", good.tokens, extra={"x": {1}})], spec, About(0))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shard_file.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_shard(tmp_path / "shards" / "s", [row_of("a", spec_of(), 4)], spec_of(), About(0))
    assert not list((tmp_path / "shards").iterdir())


def test_damage_is_told(tmp_path: Path):
    spec = spec_of([1000, 1000])
    path = shard_path(tmp_path, 0)
    done = write_shard(path, [row_of(f"key {n}", spec, 40) for n in range(20)], spec, About(0))
    write_done(done, tmp_path)
    data = path.read_bytes()
    with pytest.raises(FileNotFoundError, match="no shard at"):
        ShardFile(shard_path(tmp_path, 1))
    for cut in (0, 5, 60, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError, match=r"no whole safetensors file .* only this shard is made anew"):
            ShardFile(path)
    flipped = bytearray(data)
    path.write_bytes(data)
    flipped[data.index(load_file(path)["codes"].numpy().tobytes()) + 100] ^= 4
    path.write_bytes(flipped)
    assert len(ShardFile(path)) == 20  # opening is quick and reads no codes
    with pytest.raises(ValueError, match=r"its checksum is .*, its done-marker says .* made anew"):
        ShardFile(path, verify=True)
    done_path(tmp_path, 0).unlink()
    tensors = load_file(path)
    tensors["codes"][500:525] = 255  # the codes 400..419, in the sixth item, are now 1023 of 1000
    with safe_open(path, "pt") as f:
        path.write_bytes(save(tensors, f.metadata()))
    with pytest.raises(ValueError, match=r"item 5 \('key 5'\) has the code 1023 on level 0, of 1000"):
        ShardFile(path, verify=True)


def rewritten(path: Path, change: dict[str, Any], drop: str = "") -> None:
    """The shard with other metadata, or without a tensor."""
    with safe_open(path, "pt") as f:
        about, tensors = json.loads(f.metadata()["mmtok"]), {k: f.get_tensor(k).clone() for k in f.keys() if k != drop}  # noqa: SIM118
    path.write_bytes(save(tensors, {"mmtok": json.dumps(about | change)}))


@pytest.mark.parametrize(
    ("change", "drop", "words"),
    [
        ({"schema": 2}, "", "expected schema 1, got 2; read it with the mmtok that wrote it"),
        ({"format": "other"}, "", "expected a shard of the format 'mmtok-corpus-shard', got 'other'"),
        ({"items": 4}, "", "damaged shard .expected 4 lengths, got 3"),
        ({"packing": "ints"}, "", "damaged shard .codes: expected 24 of uint16"),
        ({}, "codes", "damaged shard .*codes"),
        ({}, "key.bytes", "damaged shard .it has no keys"),
        ({}, "side.x", "damaged shard .*side.x"),
        ({"spec": {"name": "n"}}, "", "damaged metadata"),
    ],
)
def test_foreign_and_incomplete_files_are_refused(tmp_path: Path, change: dict, drop: str, words: str):
    path = tmp_path / "s.safetensors"
    write_shard(path, [row_of(k, spec_of(), 4, {"x": torch.ones(1)}) for k in "abc"], spec_of(), About(0))
    rewritten(path, change, drop)
    with pytest.raises(ValueError, match=words):
        ShardFile(path)


def test_another_tokenizers_shard_is_refused(tmp_path: Path):
    path = tmp_path / "s.safetensors"
    write_shard(path, [row_of("a", spec_of(), 4)], spec_of(), About(0))
    with pytest.raises(TokensError, match=r"expected codes of 'tiny' \(fingerprint g, .*got 'tiny' \(fingerprint f, "):
        ShardFile(path, spec=spec_of(fingerprint="g"))
    path.write_bytes(save({"x": torch.ones(2)}))
    with pytest.raises(ValueError, match=r"expected a shard of the format .*, got None"):
        ShardFile(path)


def test_done_markers(tmp_path: Path):
    failures = (Failure("no\udcff utf-8", "truncated “file”", 4), Failure("b", "empty", 4))
    done = Done(4, "0" * 64, 10, 2, failures, 20, 10, 0.1 + 0.2, "日本")
    shard_path(tmp_path, 4).parent.mkdir()
    assert read_done(tmp_path, 4) is None
    write_done(done, tmp_path)
    assert read_done(tmp_path, 4) == done
    assert done_path(tmp_path, 4).name == "00004.done.json" and shard_path("x", 123456).name == "123456.safetensors"
    done_path(tmp_path, 4).rename(done_path(tmp_path, 5))
    with pytest.raises(ValueError, match="expected the marker of shard 5, got that of 4"):
        read_done(tmp_path, 5)
    for damaged, words in (
        (b'{"shard": 5', "is damaged"),
        (b'{"shard": 5}', "expected a done-marker"),
        (b"[]", "marker"),
    ):
        done_path(tmp_path, 5).write_bytes(damaged)
        with pytest.raises(ValueError, match=words):
            read_done(tmp_path, 5)
    assert json_bytes({"ä": [1, None]}) == '{"ä":[1,null]}'.encode()
