"""`Tokens` and `TokenSpec`: what is legal, what is refused and how, and files that are exact or refused."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmtok.tokens import FORMAT, Tokens, TokensError, TokenSpec, smallest_uint, write_atomic


def spec_of(sizes: tuple[int, ...] = (16, 8), strides: tuple[int, ...] = (), fingerprint: str = "f") -> TokenSpec:
    return TokenSpec("tiny", "audio", sizes, strides, frame_rate=50.0, fingerprint=fingerprint)


def tokens_of(spec: TokenSpec, lengths: tuple[int, ...] = (5, 3), seed: int = 0) -> Tokens:
    rng = np.random.default_rng(seed)
    T = max(lengths, default=0)
    rows = [rng.integers(0, k, (len(lengths), T)) for k in spec.codebook_sizes]
    codes = torch.from_numpy(np.stack(rows, 1).astype(np.int64))
    codes *= (torch.arange(T) < torch.tensor(lengths, dtype=torch.int64)[:, None])[:, None]
    return Tokens(codes, torch.tensor(lengths, dtype=torch.int64), spec, {"num_samples": torch.tensor(lengths) * 320})


def assert_equal(a: Tokens, b: Tokens) -> None:
    assert a.spec == b.spec and torch.equal(a.codes, b.codes) and torch.equal(a.lengths, b.lengths)
    assert set(a.side) == set(b.side)
    for key, value in a.side.items():
        assert value.dtype == b.side[key].dtype and torch.equal(value, b.side[key])


@pytest.mark.parametrize(
    ("K", "dtype"),
    [(2, torch.uint8), (256, torch.uint8), (257, torch.uint16), (65536, torch.uint16), (65537, torch.uint32)],
)
def test_codes_are_stored_in_the_smallest_unsigned_integer(tmp_path: Path, K: int, dtype: torch.dtype):
    spec = spec_of((K, 2))
    tokens = Tokens(torch.tensor([[[0, K - 1], [1, 0]]]), torch.tensor([2]), spec)
    tokens.save(tmp_path / "t.safetensors")
    assert load_file(tmp_path / "t.safetensors")["codes"].dtype == dtype
    assert_equal(Tokens.load(tmp_path / "t.safetensors"), tokens)
    assert smallest_uint(2**32) is np.uint64


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_files_are_exact(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    sizes = tuple(data.draw(st.lists(st.sampled_from([2, 3, 255, 256, 257, 1024, 70_000]), min_size=1, max_size=4)))
    strides = tuple(data.draw(st.sampled_from([1, 2, 4])) for _ in sizes)
    lengths = tuple(data.draw(st.lists(st.integers(0, 9), max_size=4)))
    image = data.draw(st.booleans())
    spec = TokenSpec(
        data.draw(st.text(max_size=8)),
        "image" if image else "audio",
        sizes,
        strides,
        frame_rate=None if image else data.draw(st.floats(0.1, 1e4)),
        num_tokens=9 if image else None,
        conditions=tuple(data.draw(st.lists(st.sampled_from(["text", "size"]), max_size=2))),
        fingerprint="abc",
    )
    tokens = tokens_of(spec, lengths)
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float32, torch.bool, torch.uint16, torch.int64]))
    tokens.side["größe"] = torch.arange(len(lengths) * 2).reshape(len(lengths), 2).to(dtype)
    path = tmp_path_factory.mktemp("t") / "t.safetensors"
    tokens.save(path)
    assert_equal(Tokens.load(path), tokens)


def test_slices_of_a_batch_can_be_saved(tmp_path: Path):
    side = torch.arange(6).reshape(2, 3)
    tokens = tokens_of(spec_of())
    tokens.side |= {"a": side[:, :2], "b": side[:, 1:]}  # overlapping memory
    tokens[1].save(tmp_path / "t")
    assert_equal(Tokens.load(tmp_path / "t"), tokens[1])


def test_equal_tokens_give_equal_bytes(tmp_path: Path):
    for i in range(6):
        tokens_of(spec_of()).save(tmp_path / str(i))
    assert len({p.read_bytes() for p in tmp_path.iterdir()}) == 1


def test_positions_past_the_length_are_written_as_zero(tmp_path: Path):
    tokens = tokens_of(spec_of())
    tokens.codes[1, :, 3:] = 99  # means nothing, so it is no error
    tokens.save(tmp_path / "t")
    assert Tokens.load(tmp_path / "t").codes[1, :, 3:].abs().sum() == 0


def test_a_spec_is_checked():
    with pytest.raises(ValueError, match="'image' or 'audio', got 'video'"):
        TokenSpec("x", "video", (4,), num_tokens=1)
    for sizes in ((), (1,), (4, 0)):
        with pytest.raises(ValueError, match="at least one size >= 2"):
            spec_of(sizes)
    for strides in ((1,), (1, 0), (1, 1, 1)):
        with pytest.raises(ValueError, match="expected 2 values >= 1"):
            spec_of((4, 4), strides)
    for rate, count in ((None, None), (50.0, 4)):
        with pytest.raises(ValueError, match="exactly one of frame_rate"):
            TokenSpec("x", "audio", (4,), frame_rate=rate, num_tokens=count)
    with pytest.raises(TokensError, match=r"unknown fields.*colour"):
        TokenSpec.from_dict({**spec_of().to_dict(), "colour": 1})
    assert TokenSpec.from_dict(json.loads(json.dumps(spec_of((16, 8), (1, 2)).to_dict()))) == spec_of((16, 8), (1, 2))


def test_bits_follow_levels_strides_and_lengths():
    spec = spec_of((16, 8, 4), (1, 2, 4))
    assert spec.bits_per_position == 4 + 3 / 2 + 2 / 4
    assert spec.bitrate_bps == 50 * 6
    assert TokenSpec("x", "image", (4,), num_tokens=3).bitrate_bps is None
    bits = tokens_of(spec, (5, 4, 1, 0)).bits
    assert bits.dtype == torch.float64
    assert bits.tolist() == [5 * 4 + 3 * 3 + 2 * 2, 4 * 4 + 2 * 3 + 1 * 2, 4 + 3 + 2, 0]
    assert float(tokens_of(spec_of((1000,)), (7,)).bits) == pytest.approx(7 * math.log2(1000))


def test_keep_gives_prefixes():
    tokens = tokens_of(spec_of((16, 8, 4), (1, 2, 4)))
    some = tokens.keep(2, 4)
    assert torch.equal(some.codes, tokens.codes[:, :2, :4]) and some.lengths.tolist() == [4, 3]
    assert some.spec.codebook_sizes == (16, 8) and some.spec.level_strides == (1, 2)
    assert some.spec.fingerprint == tokens.spec.fingerprint and torch.equal(
        some.side["num_samples"], tokens.side["num_samples"]
    )
    assert_equal(tokens.keep(), tokens)
    assert_equal(tokens.keep(num_tokens=99), tokens)
    for q in (0, 4, -1):
        with pytest.raises(TokensError, match=rf"num_codebooks: expected 1\.\.3, got {q}"):
            tokens.keep(q)
        with pytest.raises(TokensError, match=rf"num_codebooks: expected 1\.\.3, got {q}"):
            tokens.spec.keep(q)
    with pytest.raises(TokensError, match="num_tokens: expected at least 1, got 0"):
        tokens.keep(num_tokens=0)


def test_items_and_slices():
    tokens = tokens_of(spec_of(), (5, 3, 0))
    assert tokens[1].codes.shape == (1, 2, 3) and tokens[-1].codes.shape == (1, 2, 0)
    assert torch.equal(tokens[np.arange(3)[1]].codes, tokens[1].codes)
    assert tokens[1:].lengths.tolist() == [3, 0] and tokens[1:].side["num_samples"].tolist() == [960, 0]
    assert len(tokens[3:]) == 0
    assert tokens.mask.sum(1).tolist() == [5, 3, 0]
    for i in (3, -4):
        with pytest.raises(IndexError, match=f"item {i} of a batch of 3"):
            tokens[i]
    assert len([t for t in tokens]) == 3  # noqa: C416 - iteration itself is the subject


def test_concat_pads_and_keeps_common_side_entries():
    a, b = tokens_of(spec_of(), (5,)), tokens_of(spec_of(), (2, 7), seed=1)
    b.side["extra"] = torch.zeros(2)
    both = Tokens.concat([a, b])
    assert both.codes.shape == (3, 2, 7) and both.lengths.tolist() == [5, 2, 7] and set(both.side) == {"num_samples"}
    assert_equal(both[0], a)
    assert torch.equal(both[2].codes, b[1].codes)
    with pytest.raises(TokensError, match="at least one"):
        Tokens.concat([])
    with pytest.raises(TokensError, match="one spec"):
        Tokens.concat([a, tokens_of(spec_of(fingerprint="g"))])


def test_concat_pads_side_entries_of_another_width():
    a, b = tokens_of(spec_of(), (5,)), tokens_of(spec_of(), (2, 7), seed=1)
    a.side["scale"], b.side["scale"] = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]])
    both = Tokens.concat([a, b])
    assert both.side["scale"].tolist() == [[1.0, 2.0], [3.0, 0.0], [4.0, 0.0]]
    a.side["grid"], b.side["grid"] = torch.ones(1, 2, 1), torch.ones(2, 1, 3)
    assert Tokens.concat([a, b]).side["grid"].tolist() == [
        [[1, 0, 0], [1, 0, 0]],
        [[1, 1, 1], [0, 0, 0]],
        [[1, 1, 1], [0, 0, 0]],
    ]


def test_malformed_codes_are_refused():
    spec, lengths = spec_of(), torch.tensor([2])
    for codes in (torch.zeros(1, 2, 2), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(1, 2, 2, dtype=torch.int32)):
        with pytest.raises(TokensError, match=r"expected int64 \(B, Q, T\)"):
            Tokens(codes, lengths, spec)
    good = torch.zeros(1, 2, 2, dtype=torch.int64)
    with pytest.raises(TokensError, match="expected Q = 2 levels of 'tiny', got 1"):
        Tokens(good[:, :1], lengths, spec)
    for bad in (torch.tensor([2, 2]), torch.tensor([2.0]), torch.tensor(2)):
        with pytest.raises(TokensError, match="lengths: expected int64 of shape"):
            Tokens(good, bad, spec)
    for bad in (3, -1):
        with pytest.raises(TokensError, match=rf"lengths: expected 0\.\.2, got {bad}"):
            Tokens(good, torch.tensor([bad]), spec)
    for side in ({"x": torch.zeros(2)}, {"x": torch.tensor(1)}, {"x": [1]}):
        with pytest.raises(TokensError, match=r"side\['x'\]: expected a tensor whose first axis is 1"):
            Tokens(good, lengths, spec, side)  # pyright: ignore[reportArgumentType]


def test_check_refuses_foreign_ids_and_names_the_code_out_of_range():
    spec = spec_of((16, 8))
    tokens = tokens_of(spec)
    tokens.check(spec)
    tokens.keep(1).check(spec)
    with pytest.raises(TokensError, match=r"ids of 'tiny' \(fingerprint f\), not of 'tiny' \(g\)"):
        tokens.check(spec_of((16, 8), fingerprint="g"))
    with pytest.raises(TokensError, match=r"prefix of \(16, 16\), got \(16, 8\)"):
        tokens.check(spec_of((16, 16)))
    with pytest.raises(TokensError, match=r"prefix of \(16,\), got \(16, 8\)"):
        tokens.check(spec_of((16,)))
    with pytest.raises(TokensError, match="strides"):
        tokens.check(spec_of((16, 8), (1, 2)))
    tokens.codes[1, 1, 2] = 8
    with pytest.raises(TokensError, match=r"item 1, level 1, position 2: expected 0\.\.7, got 8 \(1 such codes\)"):
        tokens.check(spec)
    tokens.codes[1, 1, 2], tokens.codes[0, 0, 4] = 0, -1
    with pytest.raises(TokensError, match="item 0, level 0, position 4"):
        tokens.check(spec)
    tokens.codes[0, 0, 4], tokens.codes[1, 0, 4] = 0, 99  # past the length of item 1
    tokens.check(spec)


def test_save_refuses_codes_out_of_range(tmp_path: Path):
    tokens = tokens_of(spec_of())
    tokens.codes[0, 0, 0] = 16
    with pytest.raises(TokensError, match="item 0, level 0, position 0"):
        tokens.save(tmp_path / "t")
    assert not list(tmp_path.iterdir())


def test_missing_and_broken_files(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no token file at"):
        Tokens.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no token file at"):
        Tokens.load(tmp_path)
    path = tmp_path / "t"
    tokens_of(spec_of()).save(path)
    data = path.read_bytes()
    for broken in (b"", data[:5], data[:40], data[:-1], data + b"x", b"hello world", b"\x00" * 64):
        path.write_bytes(broken)
        with pytest.raises(TokensError, match="not a readable safetensors file"):
            Tokens.load(path)
    for metadata in (None, {"mmtok": "{"}, {"mmtok": "[]"}, {"mmtok": "{}"}, {"format": FORMAT}):
        save_file({"weight": torch.zeros(2)}, path, metadata)
        with pytest.raises(TokensError, match="damaged token file") as error:
            Tokens.load(path)
        assert str(path) in str(error.value)


def test_every_single_byte_flip_of_the_header_is_read_or_refused(tmp_path: Path):
    """No flip gives anything but Tokens or TokensError: neither a crash nor another kind of error."""
    path = tmp_path / "t"
    tokens_of(spec_of()).save(path)
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    refused = 0
    for i in range(header):
        path.write_bytes(data[:i] + bytes([data[i] ^ 4]) + data[i + 1 :])
        try:
            Tokens.load(path)
        except TokensError:
            refused += 1
    assert refused > header // 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"codes": torch.zeros(2, 2, 5)}, "expected unsigned integers, got torch.float32"),
        ({"codes": torch.zeros(2, 3, 5, dtype=torch.uint8)}, "expected Q = 2"),
        ({"codes": torch.full((2, 2, 5), 200, dtype=torch.uint8)}, "item 0, level 0, position 0"),
        ({"codes": None}, "KeyError"),
        ({"lengths": torch.tensor([5, 9])}, r"expected 0\.\.5, got 5\.\.9"),
        ({"lengths": torch.tensor([5.0, 3.0])}, "lengths: expected int64"),
        ({"side.num_samples": torch.tensor([1])}, "first axis is 2"),
        ({"weights": torch.zeros(2)}, "unknown tensors"),
        ({"spec": "nonsense"}, "damaged"),
        ({"spec": [1]}, "damaged"),
        ({"spec": {"name": "x"}}, "damaged"),
        ({"spec": {**spec_of().to_dict(), "codebook_sizes": ["a"]}}, "damaged"),
        ({"spec": {**spec_of().to_dict(), "modality": "video"}}, "'video'"),
        ({"spec": {**spec_of().to_dict(), "new": 1}}, "another version"),
        ({"format": "mmtok-tokens-9"}, f"expected a token file of format '{FORMAT}', got 'mmtok-tokens-9'"),
        ({"spec": None}, "KeyError"),
    ],
)
def test_tampered_files_are_refused_with_their_path(tmp_path: Path, change: dict, words: str):
    path = tmp_path / "t.safetensors"
    tokens_of(spec_of()).save(path)
    with safe_open(str(path), framework="pt") as f:
        meta = json.loads(f.metadata()["mmtok"])
    tensors = load_file(path)
    for key, value in change.items():
        place = meta if key in ("spec", "format") else tensors
        place.pop(key, None)
        if value is not None:
            place[key] = value
    save_file(tensors, path, {"mmtok": json.dumps(meta)})
    with pytest.raises(TokensError, match=words) as error:
        Tokens.load(path)
    assert str(path) in str(error.value)


def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "t"
    old = tokens_of(spec_of())
    old.save(path)

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        tokens_of(spec_of(), (9,)).save(path)
    assert_equal(Tokens.load(path), old)
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="create it first"):
        write_atomic(tmp_path / "no" / "t", b"x")
    with pytest.raises(OSError, match="directory"):
        write_atomic(tmp_path, b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_an_empty_batch_goes_round(tmp_path: Path):
    empty = tokens_of(spec_of(), ())
    empty.save(tmp_path / "t")
    assert_equal(Tokens.load(tmp_path / "t"), empty)
    assert empty.bits.shape == (0,) and empty.mask.shape == (0, 0)
