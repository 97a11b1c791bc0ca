"""`mmtok list` and `mmtok info`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from mmtok.audio.codec import AudioCodec
from mmtok.cli import main


def test_list_is_a_table_of_names_and_rates(capsys):
    assert main(["list"]) == 0
    head, audio, image = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["name", "modality"]
    assert audio.split()[:2] == ["audio-tiny-16k", "audio"] and "64 + 2" in audio and "0.35 kbit/s" in audio
    assert image.split()[:2] == ["image-tiny-8b", "image"] and "2 x 16" in image and "16 bytes an image" in image


def test_list_takes_a_pattern_and_gives_json(capsys):
    assert main(["list", "audio*", "--json"]) == 0
    cards = json.loads(capsys.readouterr().out)
    assert list(cards) == ["audio-tiny-16k"] and cards["audio-tiny-16k"]["frame_rate"] == 50
    assert main(["list", "video*"]) == 2
    assert "there are: audio-tiny-16k, image-tiny-8b" in capsys.readouterr().err


def test_a_damaged_checkpoint_does_not_hide_the_others(shipped: Path, capsys):
    (shipped / "image-tiny-8b" / "config.json").write_text("{")
    assert main(["list"]) == 0
    _, audio, image = capsys.readouterr().out.splitlines()
    assert audio.startswith("audio-tiny-16k  audio")
    assert image.startswith("image-tiny-8b") and "damaged" in image


def test_info_of_a_tokenizer_by_name_and_by_folder(shipped: Path, capsys):
    assert main(["info", "image-tiny-8b"]) == 0
    by_name = capsys.readouterr().out
    assert "codebook_sizes" in by_name and "16, 16" in by_name and by_name.endswith("# The card of the tiny one\n")
    assert main(["info", str(shipped / "image-tiny-8b")]) == 0
    assert capsys.readouterr().out == by_name
    assert main(["info", "image-tiny-8b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["modality"] == "image"


def test_info_of_a_causal_codec_shows_its_latency_and_receptive_field(tmp_path: Path, capsys):
    for causal, waits in ((True, {"encoder": 440, "decoder": 120}), (False, None)):
        codec = AudioCodec(
            strides=(80, 2, 2), encoder_width=4, decoder_width=16, latent_dim=4, front="stft", causal=causal
        )
        folder = str(tmp_path / f"causal-{causal}")
        codec.save(folder)
        assert main(["info", folder, "--json"]) == 0
        timing = json.loads(capsys.readouterr().out)["timing"]
        assert timing["streams"] == causal and timing["hop_length"] == 320 and timing.get("latency_samples") == waits
        assert timing["receptive_field"]["decoder_frames"] == list(codec.decoder_field)
        assert main(["info", folder]) == 0
        assert ("latency_seconds" in capsys.readouterr().out) == causal


def test_info_of_audio_without_a_stream_or_without_weights_that_load(shipped: Path, capsys):
    assert main(["info", "audio-tiny-16k", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["timing"] == {"hop_length": 320, "streams": False}
    (shipped / "audio-tiny-16k" / "model.safetensors").write_bytes(b"no weights")
    assert main(["info", "audio-tiny-16k"]) == 0
    assert "model.safetensors" in capsys.readouterr().out


def test_info_of_a_token_file(photo: Path, tmp_path: Path, capsys):
    path = tmp_path / "p.safetensors"
    assert main(["encode", str(photo), "-o", str(path)]) == 0
    capsys.readouterr()
    assert main(["info", str(path)]) == 0
    text = capsys.readouterr().out
    assert "image-tiny-8b, 45 x 31 px" in text and "bit_depth" in text
    assert main(["info", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["file_bytes"] == path.stat().st_size and facts["bits"] == [128.0]
    assert facts["side"]["width"] == [45] and facts["spec"]["codebook_sizes"] == [16, 16]


def test_info_of_nothing_known_is_one_line(tmp_path: Path, capsys):
    (tmp_path / "bad.safetensors").write_bytes(b"no tokens")
    (tmp_path / "folder").mkdir()
    for what, words in (
        ("image-tiny-8", "did you mean 'image-tiny-8b'"),
        (str(tmp_path / "gone.safetensors"), "no such file"),
        (str(tmp_path / "bad.safetensors"), "not a readable safetensors file"),
        (str(tmp_path / "folder"), "config.json is missing"),
    ):
        assert main(["info", what]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ") and words in line


def test_a_reader_that_goes_away_is_no_error():
    code = (
        "import mmtok.auto as auto, mmtok.cli, sys\n"
        "auto.available = lambda pattern: ['x']\n"
        "auto.card = lambda name: {'name': 'x', 'damaged': 'y' * 100000}\n"
        "sys.exit(mmtok.cli.main(['list']))"
    )
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as gone:
        done = subprocess.run([sys.executable, "-c", code], stdout=gone, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
