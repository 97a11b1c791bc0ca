"""`mmtok demo`: the whole round on the shipped photo and sentence, or on the user's own files."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import soundfile
from PIL import Image

from mmtok import auto
from mmtok.cli import demo, main
from mmtok.cli.files import same_tokens
from mmtok.tokens import Tokens
from mmtok.vocab import Vocab

FILES = ["audio.safetensors", "audio.wav", "ids.json", "image.png", "image.safetensors", "report.html"]


def test_the_demo_writes_a_report_and_what_it_is_made_of(tmp_path: Path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == FILES
    text = capsys.readouterr().out
    assert str(out / "report.html") in text
    assert len(re.findall(r"\.\.\. \d+\.\d\d s$", text, re.MULTILINE)) >= 9, "every step tells its seconds"
    for words in ("chelsea.jpg: image-tiny-8b, 451 x 300 px", "psnr", "speech.flac: audio-tiny-16k, 5.30 s", "stoi"):
        assert words in text
    with Image.open(out / "image.png") as im:
        assert im.size == (451, 300)
    info = soundfile.info(str(out / "audio.wav"))
    assert (info.frames, info.samplerate, info.channels) == (84800, 16000, 1)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<audio") == 2 and page.count("<img") == 7 and "://" not in page
    assert "unless to be rather cold hearted" in page and "Stéfan van der Walt" in page

    image, audio = auto.load("image-tiny-8b"), auto.load("audio-tiny-16k")
    vocab = Vocab(text=demo.ByteText(), image=image.spec, audio=audio.spec)
    parts = vocab.unpack(json.loads((out / "ids.json").read_text()))
    assert parts[0] == "a photo of " and parts[2] == " that sounds like "
    for part, name in ((parts[1], "image"), (parts[3], "audio")):
        assert isinstance(part, Tokens)
        assert same_tokens(part, Tokens.load(out / f"{name}.safetensors"))


def test_the_users_own_files(photo: Path, clip: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    args = ["demo", "--out", str(tmp_path / "d"), "--image", str(photo), "--audio", str(clip), "--open"]
    assert main(args) == 0
    text = capsys.readouterr().out
    assert "photo.png: image-tiny-8b, 45 x 31 px" in text
    assert "stoi not run (" in text, "a clip of 0.31 s is too short for STOI, and the demo says so"
    assert opened == [(tmp_path / "d" / "report.html").resolve().as_uri()]


def test_a_missing_extra_is_not_run_with_its_command(photo: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pystoi", None)  # what import finds where it is not installed
    assert main(["demo", "--out", str(tmp_path / "d"), "--image", str(photo)]) == 0
    text = capsys.readouterr().out
    assert "stoi not run (" in text and "mmtok[audio-metrics]" in text


def test_bad_files_and_folders_are_one_line(photo: Path, tmp_path: Path, capsys):
    (tmp_path / "empty.wav").touch()
    for args, words in (
        (["--image", "gone.png"], "no such file: gone.png"),
        (["--audio", str(tmp_path / "empty.wav")], "empty.wav is empty"),
        (["--audio", str(photo)], "not a readable audio file"),
        (["--out", str(tmp_path / "no" / "demo")], "does not exist"),
        (["--out", str(photo)], "it is a file"),
    ):
        assert main(["demo", "--out", str(tmp_path / "d"), *args]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ") and words in line


def test_a_changed_code_would_be_noticed():
    tokens = auto.load("image-tiny-8b").encode(demo.PHOTO)
    other = Tokens(tokens.codes.clone(), tokens.lengths, tokens.spec, tokens.side)
    demo.refuse_difference(["a", tokens], ["a", other])
    other.codes[0, 0, 0] ^= 1
    for got in (["a", other], ["b", tokens], ["a"], [tokens, "a"]):
        with pytest.raises(RuntimeError, match="please report"):
            demo.refuse_difference(["a", tokens], got)


def test_the_byte_text_tokenizer_is_utf8():
    text = "héllo, 世界"
    ids = demo.ByteText().encode(text)
    assert demo.ByteText().decode(ids) == text and max(ids) < len(demo.ByteText())


def test_the_shipped_files_are_small_and_attributed():
    notes = (demo.ASSETS / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for path in (demo.PHOTO, demo.SPEECH):
        assert f"`{path.name}`" in notes
    assert demo.PHOTO.stat().st_size <= 60_000
    assert "unless to be rather cold hearted and rather selfish is to be ill disposed" in notes
    assert "://" not in notes
