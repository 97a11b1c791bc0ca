"""`mmtok encode` and `decode`: sizes come back, runs resume, bad input is one line."""

from __future__ import annotations

import os
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmtok.cli import main, paths
from mmtok.tokens import Tokens


def write_wav(path: Path, rate: int, channels: int, seconds: float) -> Path:
    time = np.arange(round(rate * seconds)) / rate
    x = np.stack([0.4 * np.sin(2 * np.pi * 220 * (c + 1) * time) for c in range(channels)], axis=1)
    with wave.open(str(path), "wb") as f:
        f.setnchannels(channels)
        f.setsampwidth(2)
        f.setframerate(rate)
        f.writeframes(np.rint(x * 32767).astype("<i2").tobytes())
    return path


def mmtok(*args: object) -> int:
    return main([str(a) for a in args])


# ----------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "I;16"])
@pytest.mark.parametrize("size", [(45, 31), (1, 1), (300, 7)])
def test_images_come_back_in_size_and_mode(tmp_path: Path, mode: str, size: tuple[int, int]):
    source, tokens, back = tmp_path / "in.png", tmp_path / "t.safetensors", tmp_path / "out.png"
    shape = (size[1], size[0], *{"RGB": (3,), "RGBA": (4,)}.get(mode, ()))
    top = 65535 if mode == "I;16" else 255
    array = np.linspace(0, top, int(np.prod(shape))).reshape(shape).astype(np.uint16 if top > 255 else np.uint8)
    Image.fromarray(array).save(source)
    assert mmtok("encode", source, "-o", tokens) == 0
    assert mmtok("decode", tokens, "-o", back) == 0
    with Image.open(source) as a, Image.open(back) as b:
        assert b.size == a.size == size
        assert b.mode == a.mode == mode


@pytest.mark.parametrize(("rate", "channels"), [(16000, 1), (16000, 2), (8000, 1), (44100, 2)])
@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_sounds_come_back_in_length_rate_and_channels(tmp_path: Path, rate: int, channels: int, suffix: str):
    soundfile = pytest.importorskip("soundfile")
    source = write_wav(tmp_path / "in.wav", rate, channels, 0.137)
    tokens, back = tmp_path / "t.safetensors", tmp_path / f"out{suffix}"
    assert mmtok("encode", source, "-o", tokens) == 0
    assert mmtok("decode", tokens, "-o", back) == 0
    a, b = soundfile.info(str(source)), soundfile.info(str(back))
    assert (b.frames, b.samplerate, b.channels) == (a.frames, rate, channels)


def test_one_file_tells_tokenizer_size_rate_tokens_bits_and_bytes(photo: Path, tmp_path: Path, capsys):
    out = tmp_path / "p.safetensors"
    assert mmtok("encode", photo, "-o", out) == 0
    text = capsys.readouterr().out
    assert "image tokenizer: image-tiny-8b (the first shipped one" in text
    for part in ("45 x 31 px", "2 levels x 16 positions = 32 tokens", "128 bits = 16 bytes", "0.0918 bpp"):
        assert part in text
    assert f"{out.stat().st_size} bytes in {out}" in text


def test_num_codebooks_and_num_tokens_are_prefixes(photo: Path, clip: Path, tmp_path: Path, capsys):
    for source, name in ((photo, "p"), (clip, "c")):
        whole, part = tmp_path / f"{name}.safetensors", tmp_path / f"{name}1.safetensors"
        assert mmtok("encode", source, "-o", whole) == 0
        assert mmtok("encode", source, "-o", part, "--num-codebooks", 1, "--num-tokens", 5) == 0
        a, b = Tokens.load(whole), Tokens.load(part)
        assert b.codes.shape == (1, 1, 5)
        assert bool((a.codes[:, :1, :5] == b.codes).all())
    text = capsys.readouterr().out
    assert "0.30 kbit/s" in text  # 6 bits at 50 Hz, of the tenth of a second that the five positions describe
    assert mmtok("decode", tmp_path / "p1.safetensors", "-o", tmp_path / "p1.png") == 0
    assert mmtok("encode", photo, "-o", tmp_path / "x.safetensors", "--num-codebooks", 3) == 2
    assert "expected 1..2" in capsys.readouterr().err


def test_a_tokenizer_can_be_named_and_decode_finds_it_again(photo: Path, tmp_path: Path, capsys):
    out = tmp_path / "p.safetensors"
    assert mmtok("encode", photo, "-o", out, "--tokenizer", "image-tiny-8b") == 0
    assert "the first shipped one" not in capsys.readouterr().out
    assert mmtok("decode", out, "-o", tmp_path / "p.png") == 0
    assert mmtok("decode", out, "-o", tmp_path / "q.png", "--tokenizer", "image-tiny-8b") == 0
    assert (tmp_path / "p.png").read_bytes() == (tmp_path / "q.png").read_bytes()


# ------------------------------------------------------------------------------------------------------------ folders


@pytest.fixture
def corpus(tmp_path: Path, photo: Path, clip: Path) -> Path:
    root = tmp_path / "corpus"
    (root / "deep" / "er").mkdir(parents=True)
    photo.rename(root / "photo.png")
    clip.rename(root / "deep" / "er" / "clip.WAV")
    Image.new("RGB", (9, 5), "red").save(root / "deep" / "same.png")
    Image.new("RGB", (9, 5), "blue").save(root / "deep" / "same.jpg")
    (root / "notes.txt").write_text("no picture")
    (root / ".hidden.png").write_text("no picture")
    return root


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_a_folder_keeps_names_and_structure_and_comes_back(corpus: Path, tmp_path: Path, capsys):
    out, back = tmp_path / "tokens", tmp_path / "back"
    assert mmtok("encode", corpus, "-o", out) == 0
    assert names(out) == [
        "deep/er/clip.safetensors",
        "deep/same.jpg.safetensors",
        "deep/same.png.safetensors",
        "photo.safetensors",
    ]
    text = capsys.readouterr().out
    assert "4 written, 0 skipped" in text and "1 other files passed over: 1 .txt" in text
    assert mmtok("decode", out, "-o", back) == 0
    assert names(back) == ["deep/er/clip.wav", "deep/same.jpg.png", "deep/same.png.png", "photo.png"]
    with Image.open(back / "photo.png") as im:
        assert im.size == (45, 31)


def test_a_second_run_resumes(corpus: Path, tmp_path: Path, capsys):
    out = tmp_path / "tokens"
    assert mmtok("encode", corpus, "-o", out) == 0
    times = {name: (out / name).stat().st_mtime_ns for name in names(out)}
    (out / "photo.safetensors").unlink()
    capsys.readouterr()
    assert mmtok("encode", corpus, "-o", out) == 0
    assert "1 written, 3 skipped because they are there (--overwrite writes them again)" in capsys.readouterr().out
    again = {name: (out / name).stat().st_mtime_ns for name in names(out)}
    assert [n for n in names(out) if again[n] != times[n]] == ["photo.safetensors"]
    assert mmtok("encode", corpus, "-o", out, "--overwrite") == 0
    assert "4 written, 0 skipped" in capsys.readouterr().out


def test_a_second_run_at_another_rate_mixes_nothing(corpus: Path, tmp_path: Path, capsys):
    out = tmp_path / "tokens"
    assert mmtok("encode", corpus, "-o", out) == 0
    assert mmtok("encode", corpus, "-o", out, "--num-codebooks", 1) == 1
    text = capsys.readouterr().err
    assert text.count("it has 2 levels") == 4 and "--overwrite" in text
    assert mmtok("encode", corpus, "-o", out, "--num-codebooks", 1, "--overwrite") == 0
    assert Tokens.load(out / "photo.safetensors").spec.num_codebooks == 1


def test_bad_files_are_told_at_the_end_and_the_others_written(corpus: Path, tmp_path: Path, capsys):
    (corpus / "empty.png").touch()
    (corpus / "text.jpg").write_text("hello")
    out = tmp_path / "tokens"
    assert mmtok("encode", corpus, tmp_path / "gone.png", "-o", out) == 1
    captured = capsys.readouterr()
    assert "4 written, 0 skipped because they are there, 3 failed" in captured.out
    failed = [line for line in captured.err.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 3
    assert "empty.png is empty" in failed[0] and "text.jpg" in failed[1] and "gone.png" in failed[2]
    assert len([n for n in names(out) if n.endswith(".safetensors")]) == 4
    assert "Traceback" not in captured.err


def test_several_folders_keep_their_names(corpus: Path, tmp_path: Path):
    other = tmp_path / "other"
    other.mkdir()
    Image.new("L", (4, 4)).save(other / "photo.png")
    assert mmtok("encode", corpus, other, "-o", tmp_path / "tokens") == 0
    assert "other/photo.safetensors" in names(tmp_path / "tokens")
    assert "corpus/photo.safetensors" in names(tmp_path / "tokens")


def test_a_named_tokenizer_passes_the_other_modality_over(corpus: Path, tmp_path: Path, capsys):
    assert mmtok("encode", corpus, "-o", tmp_path / "tokens", "--tokenizer", "audio-tiny-16k") == 0
    assert names(tmp_path / "tokens") == ["deep/er/clip.safetensors"]
    assert "2 .png" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------- bad input


def fails(capsys, *args: object) -> str:
    """The one line on standard error of a command that ends with code 2."""
    capsys.readouterr()
    assert mmtok(*args) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def test_bad_inputs_of_encode(tmp_path: Path, clip: Path, capsys):
    out = tmp_path / "t.safetensors"
    (tmp_path / "empty.png").touch()
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.png").write_text("this is no picture")
    (tmp_path / "text.wav").write_text("this is no sound")
    (tmp_path / "notes.txt").write_text("hello")
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    write_wav(tmp_path / "nothing.wav", 16000, 1, 0)
    (tmp_path / "folder").mkdir()
    for name, words in {
        "gone.png": ["gone.png", "no such file"],
        "empty.png": ["empty.png", "empty"],
        "empty.wav": ["empty.wav", "empty"],
        "text.png": ["text.png", "not a readable image"],
        "text.wav": ["text.wav", "not a readable audio"],
        "cut.png": ["cut.png", "not a readable image"],
        "nothing.wav": ["nothing.wav", "0 samples"],
        "notes.txt": ["notes.txt", "expected", ".png", "'.txt'"],
        "folder": ["nothing to do", "folder"],
    }.items():
        line = fails(capsys, "encode", tmp_path / name, "-o", out)
        assert all(word in line for word in words), line
        assert not out.exists()
    line = fails(capsys, "encode", clip, "-o", out, "--tokenizer", "image-tiny-8b")
    assert "clip.wav" in line and ".png" in line
    assert "cuda:99" in fails(capsys, "encode", clip, "-o", out, "--device", "cuda:99")
    assert "warp" in fails(capsys, "encode", clip, "-o", out, "--device", "warp")
    assert "takes no text" in fails(capsys, "encode", clip, "-o", out, "--text", "hello")


def test_an_unknown_tokenizer_is_answered_with_a_near_name(clip: Path, tmp_path: Path, capsys):
    out = tmp_path / "t.safetensors"
    line = fails(capsys, "encode", clip, "-o", out, "--tokenizer", "audio-tiny-16")
    assert "audio-tiny-16" in line and "did you mean" in line and "audio-tiny-16k" in line


def test_bad_outputs(photo: Path, tmp_path: Path, capsys):
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    assert "it is a folder" in fails(capsys, "encode", photo, "-o", folder)
    line = fails(capsys, "encode", photo, "-o", tmp_path / "no" / "t.safetensors")
    assert "does not exist" in line and "create it" in line
    assert "does not exist" in fails(capsys, "encode", photo, "-o", tmp_path / "no" / "folder")
    assert ".safetensors" in fails(capsys, "encode", photo, "-o", tmp_path / "t.png")
    (tmp_path / "file").write_text("x")
    assert "it is a file" in fails(capsys, "encode", photo, "-o", tmp_path / "file")
    assert "does not exist" in fails(capsys, "encode", photo, "-o", tmp_path / "file" / "t.safetensors")
    assert "expected a folder for 2 inputs" in fails(capsys, "encode", photo, photo, "-o", tmp_path / "t.safetensors")
    assert "would both be written" in fails(capsys, "encode", photo, photo, "-o", tmp_path / "twice")


def test_an_output_folder_that_cannot_be_written(photo: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    locked = tmp_path / "locked"
    locked.mkdir()
    monkeypatch.setattr(paths.os, "access", lambda path, mode: Path(path) != locked)  # root may write anywhere
    assert "not writable" in fails(capsys, "encode", photo, "-o", locked / "t.safetensors")
    assert "not writable" in fails(capsys, "encode", photo, "-o", locked)
    monkeypatch.undo()


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a file system that refuses files")
def test_a_system_that_refuses_the_file(photo: Path, capsys):
    assert "/proc" in fails(capsys, "encode", photo, "-o", "/proc/t.safetensors")


def test_an_output_that_holds_something_else_is_kept(photo: Path, tmp_path: Path, capsys):
    out = tmp_path / "t.safetensors"
    assert mmtok("encode", photo, "-o", out) == 0
    assert mmtok("encode", photo, "-o", out) == 0, "the same again is no conflict"
    old = out.read_bytes()
    Image.new("RGB", (8, 8), "white").save(photo)
    assert "--overwrite" in fails(capsys, "encode", photo, "-o", out)
    assert out.read_bytes() == old
    assert mmtok("encode", photo, "-o", out, "--overwrite") == 0
    assert out.read_bytes() != old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photo.png", "t.safetensors"]


def test_bad_inputs_of_decode(photo: Path, clip: Path, tmp_path: Path, capsys):
    p, c, out = tmp_path / "p.safetensors", tmp_path / "c.safetensors", tmp_path / "out.png"
    assert mmtok("encode", photo, "-o", p) == 0
    assert mmtok("encode", clip, "-o", c) == 0
    assert "no such file" in fails(capsys, "decode", tmp_path / "gone.safetensors", "-o", out)
    assert "expected -o with one of .flac, .ogg, .wav" in fails(capsys, "decode", c, "-o", out)
    assert "expected -o with one of" in fails(capsys, "decode", p, "-o", tmp_path / "out.wav")
    assert "expected a name that ends in" in fails(capsys, "decode", p, "-o", tmp_path / "out.xyz")
    line = fails(capsys, "decode", p, "-o", out, "--tokenizer", "audio-tiny-16k")
    assert "image-tiny-8b" in line and "not of 'audio-tiny-16k'" in line
    bad = tmp_path / "bad.safetensors"
    bad.touch()
    assert "empty" in fails(capsys, "decode", bad, "-o", out)
    bad.write_bytes(p.read_bytes()[:-9])
    assert "not a readable safetensors file" in fails(capsys, "decode", bad, "-o", out)
    bad.write_bytes(b"\0" * 100)
    assert "not a readable safetensors file" in fails(capsys, "decode", bad, "-o", out)
    bad.write_bytes(p.read_bytes().replace(b"image-tiny-8b", b"image-tiny-8x"))
    assert "--tokenizer DIR" in fails(capsys, "decode", bad, "-o", out)
    both = Tokens.concat([Tokens.load(p), Tokens.load(p)])
    both.save(bad)
    assert "a batch of 2" in fails(capsys, "decode", bad, "-o", out)
    assert not out.exists()


def test_a_code_out_of_range_is_refused(photo: Path, tmp_path: Path, capsys):
    p = tmp_path / "p.safetensors"
    assert mmtok("encode", photo, "-o", p) == 0
    data = bytearray(p.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    codes = Tokens.load(p).codes.numpy().astype(np.uint8).tobytes()
    data[data.index(codes, start)] = 200
    p.write_bytes(bytes(data))
    line = fails(capsys, "decode", p, "-o", tmp_path / "p.png")
    assert "code out of range" in line and "200" in line


def test_tokens_of_other_weights_are_refused(photo: Path, tmp_path: Path, capsys):
    p = tmp_path / "p.safetensors"
    assert mmtok("encode", photo, "-o", p) == 0
    tokens = Tokens.load(p)
    p.write_bytes(p.read_bytes().replace(tokens.spec.fingerprint.encode(), b"0" * 16))
    assert "fingerprint 0000000000000000" in fails(capsys, "decode", p, "-o", tmp_path / "p.png")


# ------------------------------------------------------------------------------------------------------------ command


def test_help_teaches_and_is_quick_because_torch_stays_out():
    code = "import sys, mmtok.cli\ntry: mmtok.cli.main(['encode', '-h'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "mmtok encode photo.jpg -o p.safetensors" in done.stdout
    assert done.stdout.strip().endswith("False")


def test_no_command_and_wrong_options_are_code_2(capsys):
    for args in ([], ["encode"], ["fly"]):
        with pytest.raises(SystemExit) as e:
            main(args)
        assert e.value.code == 2
    assert "usage: mmtok" in capsys.readouterr().err


def test_traceback_is_there_when_asked_for(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        mmtok("--traceback", "encode", tmp_path / "gone.png", "-o", tmp_path / "t.safetensors")


def test_interrupting_is_code_130(monkeypatch: pytest.MonkeyPatch, photo: Path, tmp_path: Path, capsys):
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mmtok.cli.files.settle", interrupt)
    assert mmtok("encode", photo, "-o", tmp_path / "t.safetensors") == 130
    assert "interrupted" in capsys.readouterr().err


def test_one_failure_of_torch_does_not_end_a_run(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    real = paths.settle

    def out_of_memory(out: Path, *args) -> None:
        if out.name == "photo.safetensors":
            raise RuntimeError("out of memory")
        real(out, *args)

    monkeypatch.setattr("mmtok.cli.files.settle", out_of_memory)
    assert mmtok("encode", corpus, "-o", tmp_path / "tokens") == 1
    captured = capsys.readouterr()
    assert "3 written" in captured.out and "photo.png: out of memory" in captured.err
