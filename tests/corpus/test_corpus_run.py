"""A run: what it writes and tells, what it refuses, how it goes on, and what shards that fail do to it."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from corpus_fixtures import add_member, item_bytes, make_folder
from corpus_runs import ROOT, assert_same, contents, log_of, run_here, save_binary, save_codec

from mmtok.corpus import attempts, lock, pool, run
from mmtok.corpus.index import Corpus
from mmtok.corpus.lock import FolderLock
from mmtok.corpus.progress import Progress
from mmtok.corpus.records import PlanSettings, Task
from mmtok.corpus.run import tokenize_corpus
from mmtok.corpus.shard_file import done_path, shard_path
from mmtok.corpus.summary import Summary
from mmtok.corpus.work import Worked, tokenize_shard

SOUNDS, SHARDS = 10, 3


@pytest.fixture(scope="module")
def undisturbed(codec: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    out = tmp_path_factory.mktemp("corpora") / "undisturbed"
    return out, run_here(source, codec, out)


@pytest.fixture
def copy(undisturbed: tuple[Path, Summary], tmp_path: Path) -> Path:
    """A finished corpus that a test may change."""
    shutil.copytree(undisturbed[0], tmp_path / "corpus")
    return tmp_path / "corpus"


# ---- what a run writes and tells ----


def test_every_item_is_there_and_the_summary_says_what(undisturbed: tuple[Path, Summary], source: Path):
    out, summary = undisturbed
    corpus = Corpus(out)
    assert sorted(corpus.key(i) for i in range(len(corpus))) == sorted(
        p.relative_to(source).with_suffix("").as_posix() for p in source.rglob("*") if p.suffix in (".wav", ".flac")
    )
    assert (summary.items, summary.failures, summary.shards, summary.done, summary.made) == (SOUNDS, 0, 3, 3, 3)
    assert summary.made_items == SOUNDS
    assert summary.exit_code == 0 and not summary.missing and summary.stopped is None
    seconds = sum(int(r.tokens.side["num_samples"]) / int(r.tokens.side["sample_rate"]) for r in corpus)
    assert summary.amount == pytest.approx(seconds)
    assert summary.positions == sum(int(r.tokens.lengths[0]) for r in corpus)
    assert summary.bytes == sum(p.stat().st_size for p in out.glob("shards/*.safetensors"))
    assert summary.share_in_model is not None and 0 < summary.share_in_model < 1 and 0 <= summary.padding < 0.5
    assert f"{SOUNDS} items, 0 failures, 3 of 3 shards" in str(summary)
    lines = log_of(out)
    assert [line["shard"] for line in lines] == [0, 1, 2]
    assert sum(line["items"] for line in lines) == SOUNDS
    assert all(line["took"] >= line["seconds"]["model"] > 0 and str(os.getpid()) in line["worker"] for line in lines)


def test_a_finished_corpus_is_left_as_it_is(copy: Path, codec: Path, source: Path):
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*") if p.is_file() and p.name not in ("log.jsonl", ".lock")}
    summary = run_here(source, codec, copy)
    assert (summary.made, summary.items, summary.exit_code, summary.share_in_model) == (0, SOUNDS, 0, None)
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_the_packing_changes_the_bytes_and_no_code(copy: Path, codec: Path, source: Path, tmp_path: Path):
    rows = {}
    for packing in ("bits", "ints"):
        out = tmp_path / packing
        assert run_here(source, codec, out, packing=packing).items == SOUNDS
        assert json.loads((out / "index.json").read_bytes())["packing"] == packing
        rows[packing] = {row.key: row.tokens.codes for row in Corpus(out)}
    before = {row.key: row.tokens.codes for row in Corpus(copy)}
    assert before.keys() == rows["bits"].keys() == rows["ints"].keys()
    for key, codes in before.items():
        assert torch.equal(codes, rows["bits"][key]) and torch.equal(codes, rows["ints"][key])
    sizes = {p: sum(f.stat().st_size for f in (tmp_path / p).glob("shards/*.safetensors")) for p in rows}
    assert sizes["bits"] < sizes["ints"]  # codes of 4 bits


@pytest.mark.parametrize("damage", ["marker", "shard", "short", "index", "half", "marker-damaged"])
def test_what_is_missing_is_made_again(damage: str, copy: Path, codec: Path, source: Path, undisturbed):
    if damage == "marker":
        done_path(copy, 1).unlink()
    elif damage == "marker-damaged":
        done_path(copy, 1).write_text("{")
    elif damage == "shard":
        shard_path(copy, 2).unlink()
    elif damage == "short":
        os.truncate(shard_path(copy, 0), 100)
    elif damage == "index":
        (copy / "index.json").unlink()
    else:
        done_path(copy, 0).unlink()
        (copy / "shards" / ".00000.safetensors.x1").write_bytes(b"half")
        (copy / ".index.json.x2").write_bytes(b"half")
    summary = run_here(source, codec, copy)
    assert summary.made == (0 if damage == "index" else 1)
    assert_same(copy, contents(undisturbed[0]))


def test_plan_and_settings_are_written_before_any_work(
    codec: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen = []

    def look(task: Task) -> Worked:
        seen.append(sorted(p.name for p in tmp_path.joinpath("corpus").iterdir()))
        return tokenize_shard(task)

    monkeypatch.setattr(attempts, "tokenize_shard", look)
    run_here(source, codec, tmp_path / "corpus")
    assert len(seen) == SHARDS and {".lock", "plan.json", "run.json"} <= set(seen[0])
    about = json.loads((tmp_path / "corpus" / "run.json").read_text())
    assert about["tokenizer"] == "audio-tiny" and len(about["fingerprint"]) > 8 and about["schema"] == 1
    assert about["settings"]["device"] == "cpu" and about["settings"]["model_threads"] == 1


def test_bad_items_are_listed_and_the_rest_is_there(tmp_path: Path):
    """A tar that breaks off, a picture that is none, a link to nothing, keys that come twice in a tar and in two."""
    import tarfile

    source, tokenizer = tmp_path / "tars", save_binary(tmp_path / "binary")
    source.mkdir()
    for number in range(3):
        with tarfile.open(source / f"train-{number}.tar", "w") as tar:
            for n in range(4):
                add_member(tar, f"{n:04d}.png", item_bytes("image", 2 * n))
            if number == 1:
                add_member(tar, "0002.png", item_bytes("image", 90))  # again
                add_member(tar, "0009.png", b"no picture")
    whole = (source / "train-2.tar").read_bytes()
    (source / "train-2.tar").write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "corpus"
    summary = run_here(source, tokenizer, out)
    failures = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert summary.exit_code == 0 and summary.failures == len(failures) >= 3 and summary.unit == "Mpx"
    keys = [r.key for r in Corpus(out)]
    assert len(set(keys)) == len(keys) == summary.items
    assert {f"train-{t}/{n:04d}" for t in (0, 1) for n in range(4)} <= set(keys)
    assert any(k.startswith("train-2/") for k in keys) and len(keys) < 12
    told = {f["key"]: f["reason"] for f in failures}
    assert "duplicate" in told["train-1/0002"] and told["train-1/0009"]
    assert any(key.startswith("train-2") for key in told)
    again = run_here(source, tokenizer, tmp_path / "again")
    assert_same(tmp_path / "again", contents(out))
    assert again.failures == summary.failures


def test_files_that_cannot_be_read_are_listed(codec: Path, source: Path, tmp_path: Path):
    folder = tmp_path / "sounds"
    shutil.copytree(source, folder)
    good = len([p for p in folder.rglob("*") if p.suffix in (".wav", ".flac")])
    (folder / "noise.wav").write_bytes(os.urandom(999))
    (folder / "nothing.flac").write_bytes(b"")
    (folder / "link.wav").symlink_to(tmp_path / "nowhere.wav")
    summary = run_here(folder, codec, tmp_path / "corpus")
    failures = [json.loads(x) for x in (tmp_path / "corpus" / "failures.jsonl").read_text().splitlines()]
    assert (summary.items, summary.failures, summary.exit_code) == (good, 3, 0)
    assert sorted(f["key"] for f in failures) == ["link", "noise", "nothing"]
    assert all(f["reason"] for f in failures)


# ---- engines give the same bytes ----


def test_a_worker_process_gives_the_same_bytes(codec: Path, source: Path, tmp_path: Path, undisturbed):
    summary = run_here(source, codec, tmp_path / "corpus", engine="local", workers=1)
    assert (summary.exit_code, summary.made) == (0, SHARDS)
    assert_same(tmp_path / "corpus", contents(undisturbed[0]))
    workers = {line["worker"] for line in log_of(tmp_path / "corpus")}
    assert len(workers) == 1 and f"{socket.gethostname()}:{os.getpid()}" not in workers


@pytest.mark.slow
def test_ranks_of_accelerate_give_the_same_bytes(codec: Path, source: Path, tmp_path: Path, undisturbed):
    """Its torchrun branch starts two processes without a GPU too, see tests/training/test_training_ranks.py."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    options = ["--num_processes", "2", "--mixed_precision", "no", "--dynamo_backend", "no"]
    options += ["--main_process_port", str(port)]
    script = [str(ROOT / "tests/corpus/corpus_runs.py"), "run", str(source), str(codec), str(tmp_path / "corpus")]
    env = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [*launcher, *options, *script, "accelerate", "1"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(f"{SOUNDS} items, 0 failures, 3 of 3 shards") == 2  # both know
    assert_same(tmp_path / "corpus", contents(undisturbed[0]))
    assert len({line["worker"] for line in log_of(tmp_path / "corpus")}) == 2
    # Bad news of rank 0 ends the other rank too, instead of leaving it to wait.
    command[-3] = str(source)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0 and "expected a new or empty folder" in done.stderr


# ---- what is refused ----


def test_another_tokenizer_is_refused(copy: Path, source: Path, tmp_path: Path, codec: Path):
    other = save_codec(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"was begun with other settings: fingerprint '\w+' then, '\w+' now") as e:
        run_here(source, other, copy)
    assert json.loads((codec / "config.json").read_text())["spec"]["fingerprint"] in str(e.value)
    assert json.loads((other / "config.json").read_text())["spec"]["fingerprint"] in str(e.value)
    with pytest.raises(ValueError, match="tokenizer 'audio-tiny' then, 'image-tiny' now"):
        run_here(source, save_binary(tmp_path / "binary"), copy)


def test_a_tokenizer_that_changes_during_a_run_ends_it(codec: Path, source: Path, tmp_path: Path, undisturbed):
    """Weights replaced between two shards: the next process to load them refuses, and not shard by shard."""
    model, out = tmp_path / "model", tmp_path / "corpus"
    shutil.copytree(codec, model)
    real = run.Progress.add

    def replace(self: Progress, items: int, amount: float, failures: int) -> None:
        real(self, items, amount, failures)
        shutil.rmtree(model)
        save_codec(model, seed=1)
        from mmtok.corpus import work

        work._LOADED.clear()  # as in a process that has not loaded it yet

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Progress, "add", replace)
        summary = run_here(source, model, out)
    assert (summary.exit_code, summary.done, list(summary.missing)) == (1, 1, [1])
    assert "has changed since the run began" in (summary.stopped or "") and not (out / "index.json").exists()
    with pytest.raises(ValueError, match="fingerprint"):
        run_here(source, model, out)
    shutil.rmtree(model)
    shutil.copytree(codec, model)
    run_here(source, model, out)
    assert_same(out, contents(undisturbed[0]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_codebooks": 2}, "num_codebooks None then, 2 now"),
        ({"batch_seconds": 5.0}, "batch_seconds 60.0 then, 5.0 now"),
        ({"packing": "ints"}, "packing 'auto' then, 'ints' now"),
        ({"model_threads": 2}, "model_threads 1 then, 2 now"),
        ({"device": "cuda"}, "device 'cpu' then, 'cuda' now"),
        ({"plan_settings": PlanSettings(items_per_shard=5)}, "items_per_shard 4 then, 5 now"),
    ],
)
def test_other_settings_are_refused(changes: dict, words: str, copy: Path, codec: Path, source: Path):
    before = contents(copy)
    with pytest.raises(ValueError, match=words):
        run_here(source, codec, copy, **changes)
    assert_same(copy, before)


def test_settings_that_are_left_out_are_those_of_the_first_run(copy: Path, codec: Path, source: Path, undisturbed):
    done_path(copy, 2).unlink()
    assert run_here(source, codec, copy, plan_settings=None).exit_code == 0
    assert_same(copy, contents(undisturbed[0]))


def test_a_source_that_changed_is_refused(copy: Path, codec: Path, source: Path, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(source, other)
    with pytest.raises(ValueError, match=f"source '{source}' then, '{other}' now"):
        run_here(other, codec, copy)
    begun = tmp_path / "begun"
    run_here(other, codec, begun)
    (other / "new.wav").write_bytes(item_bytes("audio", 2))
    with pytest.raises(ValueError, match=r"has changed since .* was begun: new.wav is new; restore it"):
        run_here(other, codec, begun)


def test_bad_arguments_are_refused_before_anything_is_written(codec: Path, source: Path, tmp_path: Path):
    out = tmp_path / "corpus"
    for changes, words in (
        ({"engine": "spark"}, "engine: expected one of local, accelerate, ray, got 'spark'"),
        ({"workers": 0}, "workers: expected at least 1, got 0"),
        ({"device": "gpu7"}, "device: expected cpu, cuda or cuda:1, got 'gpu7'"),
        ({"num_codebooks": 4}, r"num_codebooks: expected 1..3 for .*, got 4"),
        ({"num_tokens": 0}, "num_tokens: expected at least 1, got 0"),
        ({"text": True}, "takes no text; leave it out"),
        ({"packing": "zip"}, "packing: expected one of auto, ints, bits, got 'zip'"),
    ):
        with pytest.raises(ValueError, match=words):
            run_here(source, codec, out, **changes)
        assert not out.exists()
    with pytest.raises(ValueError, match="tokenizer: opus is a family: name one of it, opus:SOURCE"):
        run_here(source, Path("opus"), out)
    with pytest.raises(ValueError, match="the tokenizer takes audio, the plan is to hold image"):
        run_here(source, codec, out, plan_settings=PlanSettings(modality="image"))
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("all of it")
    with pytest.raises(ValueError, match=r"expected a new or empty folder, or a corpus, got thesis.tex; choose"):
        run_here(source, codec, full)
    assert [p.name for p in full.iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match="expected a folder, got a file"):
        run_here(source, codec, full / "thesis.tex")


def test_two_runs_into_one_folder_are_refused(copy: Path, codec: Path, source: Path):
    with FolderLock(copy):
        with pytest.raises(ValueError, match=rf"another run \(pid {os.getpid()} on .*\) writes here; wait for it"):
            run_here(source, codec, copy)
        assert (copy / ".lock").stat().st_size > 0
    assert (copy / ".lock").stat().st_size == 0
    assert run_here(source, codec, copy).exit_code == 0


def test_the_lock_of_another_machine_counts_while_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def write(**changes: object) -> None:
        holder = {"pid": 7, "host": "node-9", "machine": "other", "time": time.time() - 100}
        (tmp_path / ".lock").write_text(json.dumps(holder | changes))

    write()
    with pytest.raises(ValueError, match=r"pid 7 on node-9.*last sign of life is 10\d s old; after 300 s it counts as"):
        FolderLock(tmp_path).__enter__()
    write(time=time.time() - 301)
    with FolderLock(tmp_path, beat=0.05):
        first = json.loads((tmp_path / ".lock").read_text())
        assert first["pid"] == os.getpid() and first["time"] > time.time() - 60
        deadline = time.monotonic() + 60
        while json.loads((tmp_path / ".lock").read_text() or "{}").get("time", 0) <= first["time"]:
            assert time.monotonic() < deadline, "no sign of life"
            time.sleep(0.01)
    # A file system without locks: on this machine the process itself is asked for.
    monkeypatch.setattr(lock, "_flock", lambda file: None)
    write(machine=lock._machine(), pid=os.getppid())
    with pytest.raises(ValueError, match="another run"):
        FolderLock(tmp_path).__enter__()
    gone = subprocess.Popen(["true"])
    gone.wait()
    write(machine=lock._machine(), pid=gone.pid)
    with FolderLock(tmp_path):
        pass
    (tmp_path / ".lock").write_text('{"pid": 1')  # killed while it wrote
    with FolderLock(tmp_path):
        pass


# ---- shards that fail ----


def failing(error: Exception, shard: int, times: int = 99):
    """`tokenize_shard`, but for one shard, which raises ``error`` the first ``times`` times."""
    tried: list[int] = []

    def work(task: Task) -> Worked:
        tried.append(task.shard)
        if task.shard == shard and tried.count(shard) <= times:
            raise error
        return tokenize_shard(task)

    return work, tried


def test_a_shard_that_fails_is_tried_again(codec, source, tmp_path, monkeypatch, undisturbed):
    work, tried = failing(OSError(errno.EIO, "the network file system hiccups"), 1, times=2)
    monkeypatch.setattr(attempts, "tokenize_shard", work)
    assert run_here(source, codec, tmp_path / "corpus").exit_code == 0
    assert tried == [0, 1, 1, 1, 2]
    assert [line["attempts"] for line in log_of(tmp_path / "corpus")] == [1, 3, 1]
    assert_same(tmp_path / "corpus", contents(undisturbed[0]))


def test_a_shard_that_always_fails_is_listed_and_the_rest_is_done(codec, source, tmp_path, monkeypatch, undisturbed):
    out = tmp_path / "corpus"
    work, tried = failing(RuntimeError("out of\nmemory"), 1)
    with monkeypatch.context() as patch:
        patch.setattr(attempts, "tokenize_shard", work)
        summary = run_here(source, codec, out)
    assert tried == [0, 1, 1, 1, 1, 2]
    assert (summary.exit_code, summary.done, dict(summary.missing)) == (1, 2, {1: "RuntimeError: out of memory"})
    assert "shard 00001 is missing: RuntimeError: out of memory" in str(summary)
    assert not (out / "index.json").exists() and log_of(out)[1]["reason"] == "RuntimeError: out of memory"
    assert run_here(source, codec, out).exit_code == 0
    assert_same(out, contents(undisturbed[0]))


def test_a_full_disk_ends_the_run_at_once(codec, source, tmp_path, monkeypatch):
    work, tried = failing(OSError(errno.ENOSPC, "no room"), 1)
    monkeypatch.setattr(attempts, "tokenize_shard", work)
    summary = run_here(source, codec, tmp_path / "corpus")
    assert tried == [0, 1] and summary.exit_code == 1 and "no room" in (summary.stopped or "")
    assert "the same command goes on where this one stopped" in str(summary)


def test_a_run_in_which_nothing_succeeds_ends(codec, tmp_path, monkeypatch):
    make_folder(tmp_path / "sounds", sounds=6)

    def work(task: Task) -> Worked:
        raise RuntimeError("a bug")

    monkeypatch.setattr(attempts, "tokenize_shard", work)
    settings = PlanSettings(items_per_shard=1)
    summary = run_here(tmp_path / "sounds", codec, tmp_path / "corpus", plan_settings=settings)
    assert (summary.shards, len(summary.missing), summary.stopped) == (6, 3, "RuntimeError: a bug")


def test_workers_that_die_before_they_begin_end_the_run(codec, source, tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "_serve", os._exit)  # called with a pipe, it fails
    summary = run_here(source, codec, tmp_path / "corpus", engine="local")
    assert summary.exit_code == 1 and "workers die before they begin (exit code 1)" in (summary.stopped or "")
    assert "__main__" in (summary.stopped or "")


def test_ctrl_c_finishes_the_shard_at_work(codec, source, tmp_path, monkeypatch, undisturbed, capfd):
    def work(task: Task) -> Worked:
        if task.shard == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return tokenize_shard(task)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(attempts, "tokenize_shard", work)
        summary = run_here(source, codec, tmp_path / "corpus")
    assert (summary.exit_code, summary.done, summary.interrupted) == (130, 2, True)
    assert "stopped: interrupted; the same command goes on" in str(summary)
    assert "Ctrl-C again abandons them" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
    run_here(source, codec, tmp_path / "corpus")
    assert_same(tmp_path / "corpus", contents(undisturbed[0]))


def test_ctrl_c_twice_abandons_the_shard_at_work(codec, source, tmp_path, monkeypatch, undisturbed):
    def work(task: Task) -> Worked:
        if task.shard == 1:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        return tokenize_shard(task)

    with monkeypatch.context() as patch:
        patch.setattr(attempts, "tokenize_shard", work)
        summary = run_here(source, codec, tmp_path / "corpus")
    assert (summary.exit_code, summary.done) == (130, 1)
    run_here(source, codec, tmp_path / "corpus")
    assert_same(tmp_path / "corpus", contents(undisturbed[0]))


def test_a_run_outside_the_main_thread(codec, source, tmp_path, undisturbed):
    """Where no signal can be handled."""
    found: list[Summary] = []
    thread = threading.Thread(target=lambda: found.append(run_here(source, codec, tmp_path / "corpus")))
    thread.start()
    thread.join()
    assert found[0].exit_code == 0
    assert_same(tmp_path / "corpus", contents(undisturbed[0]))


# ---- what is shown ----


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_lines_without_a_terminal_and_a_bar_on_one(codec: Path, source: Path, tmp_path: Path):
    plain, bar = io.StringIO(), Terminal()
    for stream in (plain, bar):
        tokenize_corpus(source, codec, tmp_path / type(stream).__name__, engine="accelerate", stream=stream)
    assert plain.getvalue().startswith("1 of 1 shards, ") and "\r" not in plain.getvalue()
    assert "items/s" in plain.getvalue() and "s of sound/s, 0 failed" in plain.getvalue()
    assert "\r" in bar.getvalue() and "1/1" in bar.getvalue() and "items/s" in bar.getvalue()


def test_progress_counts_what_was_ready_and_guesses_the_rest():
    stream = io.StringIO()
    shown = Progress(10, 4, "Mpx", stream, every=0.0)
    shown.start -= 10  # seconds ago
    shown.add(20, 5.0, 1)
    shown.say("a word")
    shown.add(20, 5.0, 0)
    shown.close()
    first, word, second, last = stream.getvalue().splitlines()
    assert first.startswith("5 of 10 shards, 2.0 items/s, 0.50 Mpx/s, 1 failed, about 00:5")
    assert word == "a word" and second.startswith("6 of 10 shards, 4.0 items/s") and last.startswith("6 of 10")
