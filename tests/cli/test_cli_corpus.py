"""`mmtok corpus` and its actions, on small folders and two tokenizers whose codes can be worked out by hand."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[1] / "corpus"))

from corpus_fixtures import Made, make_folder, make_tars
from tiny_tokenizers import TinyImage

from mmtok.cli import main
from mmtok.corpus.index import Corpus
from mmtok.corpus.lock import FolderLock

# One process, which is the quickest and the only one that knows the tiny tokenizers.
HERE = ["--engine", "accelerate", "--items-per-shard", 4, "--quiet"]
IMAGES, AUDIO = ["--tokenizer", "image-tiny-8b"], ["--tokenizer", "audio-tiny-16k"]


def corpus(*args: object) -> int:
    return main(["corpus", *map(str, args)])


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("places")


@pytest.fixture(scope="module")
def made(places: Path) -> list[Made]:
    """``photos``: 9 pictures with texts, and a file that is none."""
    found = make_folder(places / "photos", images=9)
    (places / "photos" / "image" / "0" / "zz.png").write_bytes(b"no picture")
    return found


@pytest.fixture
def photos(places: Path, made: list[Made]) -> Path:
    return places / "photos"


@pytest.fixture
def kept(places: Path, photos: Path, capsys: pytest.CaptureFixture) -> Path:
    """The corpus of ``photos``; made once, for tests that only read."""
    if not (places / "kept").is_dir():
        assert corpus("tokenize", photos, *IMAGES, "--out", places / "kept", *HERE) == 0
        capsys.readouterr()
    return places / "kept"


@pytest.fixture
def copy(kept: Path, tmp_path: Path) -> Path:
    shutil.copytree(kept, tmp_path / "copy")
    return tmp_path / "copy"


def shapes_of(page: str) -> list[tuple[int, int]]:
    """(width, height) of every picture in a page."""
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(data))).size for data in found]


# ---- tokenize, plan ----


def test_tokenize_tells_what_is_there_and_what_comes_next_and_then_resumes(photos, made, tmp_path, capsys):
    out = tmp_path / "corpus"
    assert corpus("tokenize", photos, *IMAGES, "--out", out, *HERE) == 0
    said = capsys.readouterr().out
    assert "begun before" not in said
    assert re.search(r"^items +9 in 3 of 3 shards, ", said, re.MULTILINE)
    assert re.search(r"^an item +128\.0 bits of codes, ", said, re.MULTILINE)  # 16 positions of 2 levels of 4 bits
    assert re.search(r"^this run +3 shards in [\d.]+ s: [\d.,]+ items/s, .* Mpx, .* a second$", said, re.MULTILINE)
    assert re.search(r"^time +\d+% of the workers' time in the model$", said, re.MULTILINE)
    assert re.search(r"^padding +0\.0%", said, re.MULTILINE)
    assert f"failures  1, each with its reason in {out / 'failures.jsonl'}\n  image/0/zz: " in said
    assert said.endswith(f"  mmtok corpus sample {out} --out sample.html\n")
    rows = list(Corpus(out))
    assert [r.key for r in rows] == [m.key for m in made] and [r.text for r in rows] == [m.text for m in made]
    pixels = np.asarray(Image.open(io.BytesIO(made[0].data)).convert("RGB"), np.float32).transpose(2, 0, 1) / 255
    assert torch.equal(rows[0].tokens.codes, TinyImage().encode(torch.from_numpy(pixels)[None]).codes)

    (out / "shards" / "00001.done.json").unlink()  # as if killed before it
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("shards/*")}
    assert corpus("tokenize", photos, *IMAGES, "--out", out, *HERE) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{out} was begun before: 2 shards of it done, not made again.\n")
    assert "this run  1 shard in " in said
    changed = {p.name for p in out.glob("shards/*") if p.stat().st_mtime_ns != before.get(p.name)}
    assert changed == {"00001.safetensors", "00001.done.json"}


def test_levels_and_tokens_reach_the_codes(photos, tmp_path):
    out = tmp_path / "corpus"
    assert corpus("tokenize", photos, *IMAGES, "--out", out, *HERE, "--levels", 1, "--tokens", 8) == 0
    assert {tuple(r.tokens.codes.shape) for r in Corpus(out)} == {(1, 1, 8)}


def test_a_tokenizer_in_a_folder_with_the_local_engine(tmp_path, capsys):
    """A worker is a process of its own, which finds only what is installed."""
    from corpus_runs import save_binary

    make_folder(tmp_path / "photos", images=2)
    tokenizer, out = save_binary(tmp_path / "binary"), tmp_path / "corpus"
    assert corpus("tokenize", tmp_path / "photos", "--tokenizer", tokenizer, "--out", out, "--workers", 1) == 0
    told = capsys.readouterr()
    assert "1 of 1 shards, " in told.err  # the progress
    sample = told.out.splitlines()[-1].split()[1:]
    assert sample == ["corpus", "sample", str(out), "--out", "sample.html", "--tokenizer", str(tokenizer)]
    assert main([*sample[:4], str(tmp_path / "page.html")]) == 2
    assert f"{out}: give its tokenizer 'image-tiny' by --tokenizer DIR" in capsys.readouterr().err
    assert main([*sample[:4], str(tmp_path / "page.html"), *sample[5:]]) == 0


def test_missing_shards_are_told_and_code_1(tmp_path, monkeypatch, capsys):
    from mmtok.corpus import attempts

    make_folder(tmp_path / "photos", images=9)
    (tmp_path / "photos" / "image" / "0" / "0003.jpg").write_bytes(b"no picture")
    real = attempts.tokenize_shard

    def failing(task):
        if task.shard == 1:
            raise OSError("the cable is out")
        return real(task)

    monkeypatch.setattr(attempts, "tokenize_shard", failing)
    out = tmp_path / "corpus"
    assert corpus("tokenize", tmp_path / "photos", *IMAGES, "--out", out, *HERE) == 1
    said = capsys.readouterr().out
    assert "in 2 of 3 shards" in said and "missing   shard 00001: OSError: the cable is out" in said
    assert "failures  1, each with its reason in failures.jsonl, once every shard is there\n  image/0/0003: " in said
    assert said.endswith("unfinished: 1 shard left; the same command goes on where this one stopped\n")
    assert corpus("verify", out) == 1
    assert "1 shard is missing (00001)" in capsys.readouterr().out
    assert corpus("stats", out) == 0
    assert "2, 1 missing" in capsys.readouterr().out


def test_dry_run_and_plan_write_nothing(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = sorted(photos.rglob("*"))
    assert corpus("tokenize", photos, *IMAGES, "--out", "corpus", *HERE, "--dry-run") == 0
    said = capsys.readouterr().out
    assert re.search(r"^items +10, in 3 shards$", said, re.MULTILINE) and "nothing was written" in said
    assert re.search(r"^tokenizer +image-tiny-8b, fingerprint \w+$", said, re.MULTILINE)
    assert corpus("plan", photos, "--items-per-shard", 5, "--pattern", "image/0/*") == 0
    assert re.search(r"^items +4, in 1 shard$", capsys.readouterr().out, re.MULTILINE)
    assert sorted(photos.rglob("*")) == before and list(tmp_path.iterdir()) == []


def test_dry_run_of_a_begun_corpus_says_so(photos, kept, capsys):
    before = {p: p.stat().st_mtime_ns for p in kept.rglob("*")}
    assert corpus("tokenize", photos, *IMAGES, "--out", kept, *HERE, "--dry-run") == 0
    assert f"{kept} was begun before: 3 shards of it done" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in kept.rglob("*")} == before


# ---- stats, verify ----


def test_stats_as_text_and_json(kept, capsys):
    assert corpus("stats", kept) == 0
    assert "image-tiny-8b" in (text := capsys.readouterr().out) and "failures" in text and "perplexity" in text
    assert corpus("stats", kept, "--json", "--all") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["items"], found["codes"], found["bits"], found["failures"]) == (9, 9 * 32, 9 * 128, 1)
    assert [level["counted"] for level in found["levels"]] == [144, 144]


def test_verify_finds_a_flipped_byte(copy, capsys):
    assert corpus("verify", copy) == 0
    assert capsys.readouterr().out == f"{copy}: all well (3 shards: checksums, contents, index, keys)\n"
    shard = copy / "shards" / "00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert corpus("verify", copy) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{shard}: expected the checksum ") and said[-1] == f"{copy}: {len(said) - 1} problems"


# ---- sample ----


def test_the_sample_page_holds_originals_and_decoded_pictures(kept, made, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert corpus("sample", kept, "--out", page, "--items", 3, "--seed", 5) == 0
    said, text = capsys.readouterr().out, page.read_text()
    assert said == f"3 items of 9, decoded by image-tiny-8b\npage: {page}\n"
    keys = [m.key for m in made if f"<h2>{m.key}</h2>" in text]
    assert len(keys) == 3
    chosen = [m for m in made if m.key in keys]
    assert all(m.text in text for m in chosen if m.text)
    sizes = [Image.open(io.BytesIO(m.data)).size for m in chosen]
    # Of each item: original, decoded, difference, then the map of 16 codes on 2 levels of 16 px.
    assert shapes_of(text) == [size for s in sizes for size in (s, s, s, (16, 32))]
    picture = re.findall(r'src="data:image/png;base64,([^"]+)"', text)[0]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))))
    assert (shown == np.asarray(Image.open(io.BytesIO(chosen[0].data)).convert("RGB"))).all()
    assert corpus("sample", kept, "--out", page, "--items", 3, "--seed", 5) == 0
    assert page.read_text() == text
    assert corpus("sample", kept, "--out", page, "--items", 3, "--seed", 6) == 0
    assert page.read_text() != text
    assert corpus("sample", kept, "--out", page, "--items", 100, "--decoded-only") == 0
    assert "9 items of 9, decoded by image-tiny-8b, 9 of them without the original (not asked for)" in (
        capsys.readouterr().out
    )
    assert len(shapes_of(page.read_text())) == 2 * 9  # decoded, and the map


def test_the_sample_page_of_sounds_even_without_their_source(tmp_path, capsys):
    made = make_tars(tmp_path / "tars", sounds=4)
    out, page = tmp_path / "corpus", tmp_path / "page.html"
    assert corpus("tokenize", tmp_path / "tars", *AUDIO, "--out", out, *HERE) == 0
    for kept_source in (True, False):
        if not kept_source:
            os.rename(tmp_path / "tars", tmp_path / "elsewhere")
        capsys.readouterr()
        assert corpus("sample", out, "--out", page) == 0
        text = page.read_text()
        assert all(f"<h2>{m.key}</h2>" in text for m in made)
        players = [base64.b64decode(d) for d in re.findall(r'src="data:audio/wav;base64,([^"]+)"', text)]
        assert len(players) == (8 if kept_source else 4) and all(p[:4] == b"RIFF" for p in players)
        lengths = {int(r.tokens.side["num_samples"]) * int(r.tokens.side["channels"]) for r in Corpus(out)}
        assert {(len(p) - 44) // 2 for p in players} == lengths  # 16 bits a sample behind the header
        assert text.count("No original: ") == (0 if kept_source else 4)
    assert "4 of them without the original" in capsys.readouterr().out


def test_sample_refuses_another_tokenizer(kept, tmp_path, capsys):
    other = TinyImage()
    other.name = "image-other"
    with torch.no_grad():
        other.one.fill_(0.5)
    other.save(tmp_path / "other")
    assert corpus("sample", kept, "--out", tmp_path / "page.html", "--tokenizer", tmp_path / "other") == 2
    assert f"{kept} was made by image-tiny-8b with the fingerprint " in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


# ---- wrong inputs ----


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["tokenize", "nowhere", *IMAGES, "--out", "o"], "nowhere"),
        (["tokenize", "PHOTOS", "--tokenizer", "no-such", "--out", "o"], "unknown tokenizer 'no-such'"),
        (["tokenize", "PHOTOS", "--tokenizer", "jpeg", "--out", "o"], "jpeg is a family: name one of it"),
        (["tokenize", "PHOTOS", *AUDIO, "--out", "o"], "expected at least one sound"),
        (["tokenize", "PHOTOS", *AUDIO, "--out", "o", "--dry-run"], "expected at least one sound"),
        (["tokenize", "PHOTOS", *IMAGES, "--out", "o", "--modality", "audio", "--dry-run"], "--modality audio"),
        (["tokenize", "PHOTOS", *IMAGES, "--out", "o", "--levels", "3"], "expected 1..2"),
        (["tokenize", "PHOTOS", *IMAGES, "--out", "o", "--text"], "takes no text"),
        (["tokenize", "PHOTOS", *IMAGES, "--out", "o", "--device", "nonsense"], "--device nonsense"),
        (["tokenize", "PHOTOS", *IMAGES, "--out", "o", "--workers", "0"], "workers: expected at least 1"),
        (["tokenize", "PHOTOS", *IMAGES, "--out", "o", "--items-per-shard", "0"], "items_per_shard: expected 1"),
        (["tokenize", "PHOTOS", *IMAGES, "--out", "o", "--address", "auto"], "are for --engine ray"),
        (["tokenize", "PHOTOS", *IMAGES, "--out", "o", "--engine", "accelerate", "--workers", "2"], "leave it out"),
        (["tokenize", "PHOTOS", *IMAGES, "--out", "PHOTOS", "--engine", "accelerate"], "new or empty folder"),
        (["tokenize", "PHOTOS", *AUDIO, "--out", "KEPT", "--engine", "accelerate"], "begun with other settings"),
        (["tokenize", "PHOTOS", *IMAGES, "--out", "KEPT", "--levels", "1"], "num_codebooks None then, 1 now"),
        (["plan", "PHOTOS", "--key-column", "id"], "key_column"),
        (["plan", "nowhere"], "nowhere"),
        (["stats", "nowhere"], "no corpus at nowhere"),
        (["verify", "nowhere"], "no corpus at nowhere"),
        (["sample", "nowhere", "--out", "page.html"], "no corpus at nowhere"),
        (["sample", "KEPT", "--out", "no/page.html"], "cannot write"),
        (["sample", "KEPT", "--out", "page.html", "--items", "0"], "expected at least 1 to show"),
    ],
)
def test_bad_input_is_one_line_and_code_2(args, words, photos, kept, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert corpus(*[{"PHOTOS": photos, "KEPT": kept}.get(a, a) for a in args]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and len(told.splitlines()) == 1 and words in told


def test_a_folder_that_another_run_writes_to_is_refused(photos, copy, capsys):
    with FolderLock(copy):
        assert corpus("tokenize", photos, *IMAGES, "--out", copy, *HERE) == 2
    assert "another run (pid" in capsys.readouterr().err


@pytest.mark.parametrize("action", ["", "tokenize", "plan", "stats", "verify", "sample"])
def test_every_action_has_help(action, capsys):
    with pytest.raises(SystemExit) as e:
        corpus(*[action] * bool(action), "--help")
    assert e.value.code == 0
    said = capsys.readouterr().out
    assert all(len(line) <= 120 for line in said.splitlines())
    if action in ("", "tokenize", "verify"):
        assert "exit codes: 0 " in said
