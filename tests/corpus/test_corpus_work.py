"""The pure task: codes as one by one, bad files named, bytes that never differ, killed and resumed, memory bounded."""

from __future__ import annotations

import dataclasses
import errno
import io
import itertools
import os
import subprocess
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from corpus_fixtures import encodes, image_bytes, make_folder, samples_of, sound_bytes
from PIL import Image

from mmtok.audio.codec import AudioCodec
from mmtok.corpus import shard_file, work
from mmtok.corpus.decode_ahead import Decoder
from mmtok.corpus.plan import make_plan, save_plan
from mmtok.corpus.records import Failure, InputShard, Plan, PlanSettings, Sample, Task
from mmtok.corpus.shard_file import ShardFile, done_path, read_done, shard_path
from mmtok.corpus.work import StoppedError, Window, tokenize_shard, tokenizer_of
from mmtok.image.binary1d import Binary1D
from mmtok.layers.text import TextFeatures
from mmtok.tokenizer import ImageTokenizer, Tokenizer
from mmtok.tokens import Tokens, TokensError, TokenSpec

SOUNDS, PICTURES = 12, 18


CODEC = {"strides": (80, 2, 2), "encoder_width": 8, "decoder_width": 32, "latent_dim": 8, "front": "stft"}
CODEC |= {"num_codebooks": 3, "codebook_size": 16, "dilations": (1, 3), "kernel_size": 3}
BINARY = {
    "num_tokens": 6,
    "num_bits": 12,
    "patch_size": 4,
    "encoder": (16, 2, 1),
    "decoder": (16, 2, 1),
    "head_dim": 16,
}
BINARY |= {"axes_dims": (4, 6, 6), "rope": "rotary", "resize": "linear", "absolute_positions": True, "image_size": 24}


def saved(model: Tokenizer, folder: Path) -> Path:
    model.eval().save(folder)
    return folder


@pytest.fixture(scope="module")
def codec(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return saved(AudioCodec(**CODEC), tmp_path_factory.mktemp("codec"))


@pytest.fixture(scope="module")
def binary(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return saved(Binary1D(**BINARY, quantizer={"bits_per_code": 4}), tmp_path_factory.mktemp("binary"))


@dataclasses.dataclass
class Bench:
    """A task over samples in memory, and what it is made of."""

    task: Task
    samples: list[Sample | Failure]

    def work(self, window: Window | None = None, **changes: object) -> work.Worked:
        return tokenize_shard(dataclasses.replace(self.task, **changes), window=window)

    @property
    def shard(self) -> ShardFile:
        return ShardFile(shard_path(self.task.out, 0), verify=True)

    def written(self) -> dict[str, bytes]:
        folder = shard_path(self.task.out, 0).parent
        return {p.name: p.read_bytes() for p in folder.iterdir()} if folder.is_dir() else {}


Make = Callable[..., Bench]


@pytest.fixture
def bench(monkeypatch, tmp_path) -> Make:
    """Makes benches; their samples are given to `tokenize_shard` in place of a source's."""
    numbers = itertools.count()

    def make(folder: Path, samples: list[Sample | Failure], modality: str) -> Bench:
        plan = Plan("folder", "made", modality, {}, [InputShard(0, [], len(samples), 0)], "0123456789abcdef")
        monkeypatch.setattr(work, "plan_of", lambda task: plan)
        monkeypatch.setattr(work, "read_samples", lambda plan, shard: (s for s in samples))
        out = tmp_path / f"out{next(numbers)}"
        fingerprint = work.auto.load(folder).fingerprint
        task = Task(str(folder), fingerprint, "plan.json", 0, str(out), batch_seconds=2.0, batch_pixels=24 * 24 * 6)
        return Bench(task, samples)

    return make


def alone(tokenizer: Tokenizer, samples: list[Sample | Failure], folder: Path) -> list[Tokens]:
    return [tokenizer.encode(next(folder.glob(f"{int(s.key[1:])}.*"))) for s in samples]


def assert_same(a: Tokens, b: Tokens) -> None:
    assert a.spec == b.spec and torch.equal(a.codes, b.codes) and torch.equal(a.lengths, b.lengths)
    assert a.side.keys() == b.side.keys()
    for key, value in a.side.items():
        assert value.dtype == b.side[key].dtype and torch.equal(value, b.side[key]), key


@pytest.fixture
def sounds(bench, codec, tmp_path) -> Bench:
    return bench(codec, samples_of("audio", SOUNDS, tmp_path), "audio")


@pytest.fixture
def pictures(bench, binary, tmp_path) -> Bench:
    return bench(binary, samples_of("image", PICTURES, tmp_path), "image")


@pytest.mark.parametrize("name", ["sounds", "pictures"])
def test_rows_are_those_of_items_one_by_one_in_their_order(name, request, tmp_path):
    made: Bench = request.getfixturevalue(name)
    done = made.work().done
    assert (done.items, done.failures) == (len(made.samples), ()) and 0 <= done.padding < 0.2
    expected = alone(tokenizer_of(made.task), made.samples, tmp_path)
    for row, sample, tokens in zip(made.shard, made.samples, expected, strict=True):
        assert (row.key, row.text, row.extra) == (sample.key, sample.text, dict(sample.extra))
        assert_same(row.tokens, tokens)
    assert read_done(made.task.out, 0) == done


@pytest.mark.parametrize("name", ["sounds", "pictures"])
def test_neither_batches_nor_threads_nor_windows_change_a_byte(name, request, tmp_path):
    made: Bench = request.getfixturevalue(name)
    first, files = made.work(), None
    for k, (window, changes) in enumerate(
        [
            (None, {}),
            (None, {"threads": 3}),
            (Window(items=3), {"threads": 2}),
            (Window(bytes=1), {}),
            (None, {"batch_seconds": 0.001, "batch_pixels": 1}),
            (None, {"batch_seconds": 60.0, "batch_pixels": 2**22, "padding": 0.9}),
        ]
    ):
        out = str(tmp_path / f"again{k}")
        done = made.work(window, out=out, **changes).done
        assert dataclasses.replace(done, padding=first.done.padding) == first.done
        files = files or Path(made.task.out, "shards", "00000.safetensors").read_bytes()
        assert Path(out, "shards", "00000.safetensors").read_bytes() == files
        if k < 2:  # the same batches: the marker is the same too
            assert done == first.done


def test_the_order_of_the_samples_changes_no_codes(sounds, tmp_path):
    sounds.work()
    before = {row.key: row.tokens for row in sounds.shard}
    sounds.samples.reverse()
    sounds.work(out=str(tmp_path / "turned"))
    turned = ShardFile(shard_path(tmp_path / "turned", 0))
    assert turned.keys == [s.key for s in sounds.samples]
    for row in turned:
        assert_same(row.tokens, before[row.key])


def test_prefixes_are_those_of_encode(sounds, tmp_path):
    sounds.work(num_codebooks=2, num_tokens=5)
    tokenizer = tokenizer_of(sounds.task)
    for row, whole in zip(sounds.shard, alone(tokenizer, sounds.samples, tmp_path), strict=True):
        assert_same(row.tokens, whole.keep(2, 5))


def test_a_real_source_gives_the_same_as_its_files(binary, tmp_path):
    made = make_folder(tmp_path / "data", images=7)
    plan = make_plan(str(tmp_path / "data"), PlanSettings(items_per_shard=4))
    (tmp_path / "out").mkdir()
    save_plan(plan, tmp_path / "out" / "plan.json")
    tokenizer = work.auto.load(binary)
    rows = []
    for shard in plan.shards:
        task = Task(
            str(binary), tokenizer.fingerprint, str(tmp_path / "out/plan.json"), shard.number, str(tmp_path / "out")
        )
        assert tokenize_shard(task).done.failures == ()
        rows += list(ShardFile(shard_path(tmp_path / "out", shard.number)))
    assert [(r.key, r.text) for r in rows] == [(m.key, m.text) for m in made]
    for row, m in zip(rows, made, strict=True):
        assert_same(row.tokens, tokenizer.encode(tmp_path / "data" / m.name))


def png(im: Image.Image) -> bytes:
    out = io.BytesIO()
    im.save(out, "PNG")
    return out.getvalue()


def test_pictures_of_one_working_size_share_a_batch(bench, binary, monkeypatch):
    sides = (30, 40, 50, 60)
    made = bench(binary, [Sample(f"s{n}", png(Image.new("RGB", (n, n), (n, 9, 9)))) for n in sides], "image")
    sizes = encodes(monkeypatch, tokenizer_of(made.task))
    made.work()
    assert sizes == [4]
    assert [int(row.tokens.side["height"]) for row in made.shard] == list(sides)


def test_deep_grey_and_transparent_pictures_keep_their_side(bench, binary, tmp_path):
    rng = np.random.default_rng(0)
    kinds = {
        "deep": Image.fromarray(rng.integers(0, 65536, (40, 30)).astype(np.uint16)),
        "clear": Image.fromarray(rng.integers(0, 256, (20, 24, 4)).astype(np.uint8)),
        "clear-large": Image.fromarray(rng.integers(0, 256, (50, 24, 4)).astype(np.uint8)),
        "grey": Image.fromarray(rng.integers(0, 256, (33, 24)).astype(np.uint8)),
    }
    samples = []
    for key, im in kinds.items():
        im.save(tmp_path / f"{key}.png")
        samples.append(Sample(key, (tmp_path / f"{key}.png").read_bytes()))
    made = bench(binary, samples, "image")
    made.work()
    for row in made.shard:
        assert_same(row.tokens, tokenizer_of(made.task).encode(tmp_path / f"{row.key}.png"))


def test_sound_that_overshoots_when_resampled_is_as_one_by_one(bench, codec, tmp_path):
    square = np.where(np.arange(4410) // 37 % 2, 1.99, -1.99).astype(np.float32)
    soundfile.write(tmp_path / "loud.wav", square, 44100, subtype="FLOAT")
    made = bench(codec, [Sample("loud", (tmp_path / "loud.wav").read_bytes()), Sample("x", sound_bytes(1))], "audio")
    assert made.work().done.failures == ()
    tokenizer = tokenizer_of(made.task)
    x = Decoder(tokenizer, False)(made.samples[0])
    assert x.sample_rate == 44100, "the filter did not overshoot: the test shows nothing"
    assert_same(made.shard[0].tokens, tokenizer.encode(tmp_path / "loud.wav"))


def wav(x: np.ndarray) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, x, 16000, format="WAV", subtype="FLOAT")
    return out.getvalue()


def test_bad_sounds_are_failures_in_one_line_and_the_others_stay(sounds, tmp_path):
    sounds.work()
    good = {row.key: row.tokens for row in sounds.shard}
    nan = np.zeros(800, np.float32)
    nan[3] = np.nan
    (tmp_path / "cut.flac").write_bytes(sound_bytes(1)[:60])
    bad = {
        "empty": (Sample("empty", b""), "is empty"),
        "noise": (Sample("noise", bytes(range(256)) * 8), "not a readable audio file"),
        "cut": (Sample("cut", path=tmp_path / "cut.flac"), "cut.flac is not a readable audio file"),
        "nan": (Sample("nan", wav(nan)), "NaN or infinity"),
        "wide": (Sample("wide", wav(np.zeros((100, 40), np.float32))), "C <= 32, got shape (40, 100)"),
        "loud": (Sample("loud", wav(np.full(100, 9.0, np.float32))), "a peak of 9"),
        "silent": (Sample("silent", wav(np.zeros((0, 1), np.float32))), "0 samples"),
        "gone": (Sample("gone", path=tmp_path / "gone.wav"), "gone.wav"),
        "nothing": (Sample("nothing"), "neither data nor path"),
        "extra": (Sample("extra", sound_bytes(3), extra={"x": float("nan")}), "JSON"),
        "source": (Failure("source", "the tar ends here", 0), "the tar ends here"),
    }
    for place, (sample, _) in zip(range(0, 100, 2), bad.values(), strict=False):
        sounds.samples.insert(place, sample)
    done = sounds.work(Window(items=5), out=str(tmp_path / "mixed"), threads=2).done
    assert [f.key for f in done.failures] == list(bad)
    for failure in done.failures:
        assert bad[failure.key][1] in failure.reason and failure.shard == 0
        assert "\n" not in failure.reason and "0x" not in failure.reason
    rows = list(ShardFile(shard_path(tmp_path / "mixed", 0), verify=True))
    assert [r.key for r in rows] == [s.key for s in sounds.samples if s.key not in bad]
    for row in rows:
        assert_same(row.tokens, good[row.key])


def test_bad_pictures_are_failures_in_one_line(bench, binary, monkeypatch):
    monkeypatch.setattr("mmtok.data.images.MAX_PIXELS", 2000)
    data = [
        Sample("good", image_bytes(0), text="a"),
        Sample("cut", image_bytes(2)[:200]),
        Sample("text", b"no picture"),
    ]
    data += [Sample("empty", b""), Sample("huge", png(Image.new("L", (60, 40))))]
    made = bench(binary, data, "image")
    done = made.work().done
    words = ["not a readable image", "of no known format", "is empty", "60 x 40 px is above"]
    assert [f.key for f in done.failures] == [s.key for s in data[1:]]
    for failure, word in zip(done.failures, words, strict=True):
        assert word in failure.reason and "0x" not in failure.reason
    assert done.items == 1 and made.shard.texts == ["a"]


def test_a_shard_of_bad_files_only_is_an_empty_shard(bench, binary):
    made = bench(binary, [Sample("a", b""), Sample("b", b"x")], "image")
    done = made.work().done
    assert (done.items, len(done.failures), done.padding, done.first_key) == (0, 2, 0.0, None)
    assert len(made.shard) == 0 and made.work().done == done


@pytest.mark.parametrize("error", [ValueError("no\nsuch sound"), RuntimeError("out of memory"), IndexError()])
def test_an_item_that_the_model_refuses_costs_only_itself(sounds, monkeypatch, error, tmp_path):
    sounds.work()
    good = {row.key: row.tokens for row in sounds.shard}
    tokenizer = tokenizer_of(sounds.task)
    bad = Decoder(tokenizer, False)(sounds.samples[5]).x
    sizes = encodes(monkeypatch, tokenizer, lambda x: error if any(torch.equal(i, bad) for i in x) else None)
    done = sounds.work(out=str(tmp_path / "other"), batch_seconds=60.0, padding=0.9).done
    expected = {ValueError: "no such sound", RuntimeError: "RuntimeError: out of memory", IndexError: "IndexError"}
    assert done.failures == (Failure("k05", expected[type(error)], 0),)
    assert max(sizes) > 1 and sizes.count(1) >= 2
    rows = list(ShardFile(shard_path(tmp_path / "other", 0)))
    assert len(rows) == len(good) - 1
    for row in rows:
        assert_same(row.tokens, good[row.key])


@pytest.mark.parametrize("error", [ImportError("no package"), torch.AcceleratorError("device lost")])
def test_what_meets_every_item_ends_the_task_and_writes_nothing(pictures, monkeypatch, error):
    encodes(monkeypatch, tokenizer_of(pictures.task), lambda x: error)
    with pytest.raises(type(error)):
        pictures.work()
    assert pictures.written() == {} and not reading_threads()


def test_no_file_handles_left_is_no_fault_of_the_file(pictures, monkeypatch):
    monkeypatch.setattr("mmtok.data.images.read_picture", lambda path: raising(OSError(errno.EMFILE, "Too many files")))
    with pytest.raises(OSError, match="Too many files"):
        pictures.work()
    assert pictures.written() == {}


def test_side_values_of_several_numbers_do_not_tell_of_the_batch(sounds, monkeypatch, tmp_path):
    tokenizer = tokenizer_of(sounds.task)
    real = type(tokenizer).encode

    def encode(x, *more):
        tokens = real(tokenizer, x, *more)
        scale = [torch.arange(1.0, int(n) + 1) for n in tokens.lengths]
        tokens.side["scale"] = torch.nn.utils.rnn.pad_sequence(scale, batch_first=True, padding_value=1.0)
        return tokens

    monkeypatch.setattr(tokenizer, "encode", encode)
    done = sounds.work(padding=0.9).done
    for row in sounds.shard:
        assert row.tokens.side["scale"].shape == (1, int(row.tokens.lengths))
    assert done.items == SOUNDS and done.padding < 0.1  # whole hops only: every item alone


class Captioned(ImageTokenizer):
    """Four codes: the length of the text, 0 without one."""

    type_name = "image-captioned"

    def base_spec(self) -> TokenSpec:
        return TokenSpec(self.name, "image", (64,), num_tokens=4, conditions=("text",))

    def text_features(self, text: object, count: int) -> TextFeatures | None:
        if text is None:
            return None
        assert isinstance(text, list) and len(text) == count
        lengths = torch.tensor([[[float(len(t))]] for t in text])
        return TextFeatures(lengths, torch.ones(count, 1, dtype=torch.bool))

    def encode_pixels(self, x, num_codebooks, num_tokens, text):
        length = torch.zeros(len(x)) if text is None else text.states[:, 0, 0]
        return length.long()[:, None, None].expand(-1, 1, 4), torch.full((len(x),), 4)


def test_texts_reach_tokenizers_that_read_them_and_only_when_asked(bench, binary, monkeypatch, tmp_path):
    tokenizer = Captioned({}).eval()
    monkeypatch.setattr(work.auto, "load", lambda name, device="cpu": tokenizer)
    made = bench(Path("captioned"), samples_of("image", 6, tmp_path), "image")
    made.work(text=True)
    assert [int(r.tokens.codes[0, 0, 0]) for r in made.shard] == [len(s.text or "") for s in made.samples]
    made.work(text=False, out=str(tmp_path / "plain"))
    plain = ShardFile(shard_path(tmp_path / "plain", 0))
    assert [int(r.tokens.codes[0, 0, 0]) for r in plain] == [0] * 6
    assert plain.texts == made.shard.texts == [s.text for s in made.samples]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"fingerprint": "0" * 16}, ValueError, "has changed since the run began: expected fingerprint 0000"),
        ({"text": True}, ValueError, "takes no text"),
        ({"num_codebooks": 9}, TokensError, "expected 1..3, got 9"),
        ({"num_tokens": 0}, ValueError, "num_tokens: expected at least 1"),
        ({"threads": 0}, ValueError, "threads: expected at least 1"),
        ({"batch_seconds": 0.0}, ValueError, "batch_seconds"),
        ({"padding": 1.0}, ValueError, "padding"),
        ({"shard": 4}, ValueError, "the shards 0..0, none of number 4"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(sounds, changes, error, words):
    with pytest.raises(error, match=words):
        sounds.work(**changes)
    assert sounds.written() == {}


def test_a_tokenizer_of_the_other_modality_is_refused(bench, codec, tmp_path):
    with pytest.raises(ValueError, match="takes audio, the plan of made holds image"):
        bench(codec, samples_of("image", 1, tmp_path), "image").work()


def test_a_done_shard_is_returned_as_it_is_and_a_tokenizer_loaded_once(sounds, monkeypatch, tmp_path):
    first = sounds.work()
    monkeypatch.setattr(work.auto, "load", lambda *a, **k: pytest.fail("loaded again"))
    sounds.work(out=str(tmp_path / "second"))
    stamp = shard_path(sounds.task.out, 0).stat().st_mtime_ns
    monkeypatch.setattr(work, "plan_of", lambda task: pytest.fail("read again"))
    second = sounds.work()
    assert second.done == first.done and second.seconds["model"] == 0
    assert shard_path(sounds.task.out, 0).stat().st_mtime_ns == stamp


@pytest.mark.parametrize("damage", ["shard cut", "shard gone", "shard changed", "marker cut", "marker gone", "asides"])
def test_whatever_is_damaged_is_made_again_with_the_same_bytes(pictures, damage):
    done, files = pictures.work().done, pictures.written()
    shard, marker = shard_path(pictures.task.out, 0), done_path(pictures.task.out, 0)
    if damage == "shard cut":
        shard.write_bytes(files[shard.name][:-7])
    elif damage == "shard changed":
        shard.write_bytes(files[shard.name][:-1] + b"\xff")
    elif damage == "shard gone":
        shard.unlink()
    elif damage == "marker cut":
        marker.write_bytes(files[marker.name][:-9])
    else:
        marker.unlink()
    if damage == "asides":
        (shard.parent / f".{shard.name}.a1b2").write_bytes(b"half")
        (shard.parent / f".{marker.name}.a1b2").write_bytes(b"half")
    assert pictures.work().done == done
    assert pictures.written() == files


class Killed(BaseException):
    """As a signal that ends the process."""


@pytest.mark.parametrize("step", ["reading", "model", "shard", "replace 1", "marker", "replace 2"])
def test_killed_at_any_step_and_run_again_gives_the_same_bytes(pictures, monkeypatch, step, tmp_path):
    pictures.work(out=str(tmp_path / "undisturbed"))
    expected = {p.name: p.read_bytes() for p in (tmp_path / "undisturbed/shards").iterdir()}
    with monkeypatch.context() as m:
        if step == "reading":
            m.setattr(work, "read_samples", lambda plan, shard: killed_after(pictures.samples, 9))
        elif step == "model":
            calls = itertools.count()
            encodes(m, tokenizer_of(pictures.task), lambda x: Killed() if next(calls) == 2 else None)
        elif step == "marker":
            m.setattr(work, "write_done", killed)
        elif step == "shard":
            m.setattr(shard_file, "_write_aside", killed)
        else:
            real, calls, last = os.replace, itertools.count(1), int(step[-1])
            m.setattr(os, "replace", lambda a, b: killed() if next(calls) == last else real(a, b))
        with pytest.raises(Killed):
            pictures.work()
    found = pictures.written()
    left = {"00000.safetensors"} if step in ("marker", "replace 2") else set()
    assert set(found) == left and all(found[name] == expected[name] for name in found)
    assert not reading_threads()
    pictures.work()
    assert pictures.written() == expected


def raising(e: BaseException) -> None:
    raise e


def killed(*args: object) -> None:
    raise Killed


def killed_after(samples: list, count: int) -> Iterator:
    yield from samples[:count]
    raise Killed


def test_a_full_disk_is_one_clear_error_and_nothing_stays(pictures, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(os, "fsync", lambda handle: raising(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(OSError, match=r"no room to write .*00000.safetensors \(\d+ bytes are free there\)") as e:
            pictures.work()
    assert e.value.errno == errno.ENOSPC
    assert pictures.written() == {}
    assert pictures.work().done.items == PICTURES


def test_a_disk_that_is_really_full(pictures, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system of 8 KiB needs rights that this user lacks")
    try:
        (small / "filling").write_bytes(bytes(4096))
        pictures.samples[0] = dataclasses.replace(pictures.samples[0], text="more than a page" * 999)
        with pytest.raises(OSError, match=r"no room to write .*\(\d+ bytes are free there\)"):
            pictures.work(out=str(small))
        assert [p.name for p in small.rglob("*") if p.is_file()] == ["filling"]
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_stopping_writes_nothing_and_progress_tells_all(sounds, pictures):
    seen: list[tuple[int, int]] = []
    with pytest.raises(StoppedError, match="run again"):
        tokenize_shard(pictures.task, lambda items, size: seen.append((items, size)), lambda: len(seen) >= 2)
    assert len(seen) == 2 and pictures.written() == {} and not reading_threads()
    seen.clear()
    pictures.samples[3] = Sample("empty", b"", text="x")
    worked = tokenize_shard(pictures.task, lambda items, size: seen.append((items, size)))
    assert sum(items for items, _ in seen) == PICTURES
    assert sum(size for _, size in seen) == sum(len(image_bytes(n)) for n in range(PICTURES) if n != 3)
    parts = worked.seconds
    assert set(parts) == {"load", "wait", "model", "write", "total"}
    assert parts["model"] > 0 and parts["write"] > 0
    assert sum(parts[k] for k in ("load", "wait", "model", "write")) <= parts["total"]


def reading_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("mmtok-")]


@pytest.mark.parametrize(
    ("window", "threads", "most"), [(Window(items=3), 1, 6), (Window(items=3), 2, 6), (Window(bytes=1), 2, 5)]
)
def test_so_many_decoded_items_are_alive_at_most(pictures, monkeypatch, window, threads, most):
    alive, highest, lock = set(), 0, threading.RLock()
    real = Decoder.__call__

    def counted(self, sample):
        nonlocal highest
        ready = real(self, sample)
        with lock:
            alive.add(sample.key)
            weakref.finalize(ready.x, alive.discard, sample.key)
            highest = max(highest, len(alive))
        return ready

    monkeypatch.setattr(Decoder, "__call__", counted)
    pictures.work(window, threads=threads)
    assert 1 < highest <= most and not alive


@pytest.mark.parametrize(
    ("modality", "windows"), [("image", [8, 10, 12, 10]), ("audio", [8, 16, 16]), ("most", [8, 9, 9, 9, 5])]
)
def test_windows_grow_by_what_decoding_costs_beside_a_network(
    modality, windows, bench, codec, binary, tmp_path, monkeypatch
):
    """Pictures' slowly, or the model would wait while twice as many are decoded; never beyond the most."""
    seen: list[int] = []
    kept = work.ShardWork._work_off

    def counted(self: work.ShardWork, waiting: dict) -> Iterator:
        seen.append(len(waiting))
        return kept(self, waiting)

    monkeypatch.setattr(work.ShardWork, "_work_off", counted)
    found, folder = ("audio", codec) if modality == "audio" else ("image", binary)
    samples = samples_of(found, 40, tmp_path)
    bench(folder, samples, found).work(Window(items=9) if modality == "most" else None)
    assert seen == windows


def test_decoding_goes_on_while_the_model_works(pictures, monkeypatch):
    # The first batch waits until a picture of the next window is decoded, which only another thread can do.
    ahead = threading.Event()
    real = Decoder.__call__

    def decode(self, sample):
        if sample.key == "k05":
            ahead.set()
        return real(self, sample)

    monkeypatch.setattr(Decoder, "__call__", decode)
    waits: list[bool] = []
    encodes(monkeypatch, tokenizer_of(pictures.task), lambda x: waits.append(ahead.wait(10)))
    pictures.work(Window(items=4))
    assert waits[0]
