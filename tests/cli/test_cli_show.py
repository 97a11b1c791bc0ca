"""`mmtok list` and `mmtok info`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tiny_tokenizers import TinyAudio

from mmtok import auto
from mmtok.audio.codec import AudioCodec
from mmtok.catalogue import LEGEND, Family, Taxonomy
from mmtok.cli import main

SOUND = Taxonomy("CNN/CNN", "T", "RVQ", "F", ("Rec", "VQ"), (), True, "S", "50", streamable=True)
PICTURE = Taxonomy("DCT/DCT", "P", "SQ", "A", (), (), False, "ND", "up to 4096", order="file")


@pytest.fixture(autouse=True)
def families(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family whose package is there and one whose is not, in place of all others."""
    module = ModuleType("tiny_families")
    sound = ("tinysound", "a sound of these tests", "audio", "any word", "tinysound:x", "pytest", "pip install pytest")
    picture = ("tinyjpeg", "a picture", "image", "quality 1..95", "tinyjpeg:50", "no-such-package", "pip install it")
    vars(module)["SOUND"] = Family(*sound, "MIT", "CC-BY-4.0", SOUND, lambda source: TinyAudio())
    vars(module)["PICTURE"] = Family(*picture, "BSD-3-Clause", "none needed", PICTURE, lambda source: TinyAudio())
    monkeypatch.setitem(sys.modules, "tiny_families", module)
    table = {"tinysound": "tiny_families:SOUND", "tinyjpeg": "tiny_families:PICTURE"}
    monkeypatch.setattr(auto, "_family_homes", lambda: table)


def plain(text: str) -> str:
    return " ".join(text.split())


def blocks(text: str) -> list[list[str]]:
    return [block.splitlines() for block in text.split("\n\n")]


def test_list_is_a_table_of_names_and_rates(capsys):
    assert main(["list"]) == 0
    head, audio, image = blocks(capsys.readouterr().out)[0]
    assert head.split()[:2] == ["name", "modality"]
    assert audio.split()[:2] == ["audio-tiny-16k", "audio"] and "64 + 2" in audio and "0.35 kbit/s" in audio
    assert image.split()[:2] == ["image-tiny-8b", "image"] and "2 x 16" in image and "16 bytes an image" in image


def test_list_takes_a_pattern_and_gives_json(capsys):
    assert main(["list", "audio*", "--json"]) == 0
    cards = json.loads(capsys.readouterr().out)
    assert list(cards) == ["audio-tiny-16k"] and cards["audio-tiny-16k"]["frame_rate"] == 50
    assert cards["audio-tiny-16k"]["taxonomy"] is None  # the class of these tests says nothing
    assert main(["list", "video*"]) == 2
    assert "there are: audio-tiny-16k, image-tiny-8b, tinyjpeg, tinysound" in capsys.readouterr().err


def test_list_shows_the_taxonomy_of_what_ships(capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(TinyAudio, "taxonomy", classmethod(lambda cls, config, spec: SOUND))
    assert main(["list", "audio*"]) == 0
    rates, (heading, head, row) = blocks(capsys.readouterr().out)
    assert len(rates) == 2 and "arXiv 2506.10274" in heading and "--legend" in heading
    columns = "architecture input quantization bitrate objective auxiliary joint domain streamable/order Hz/tokens"
    assert plain(head) == f"name {columns}"
    assert plain(row) == "audio-tiny-16k CNN/CNN T RVQ F Rec, VQ - y S y 50"
    assert main(["list", "audio*", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["audio-tiny-16k"]["taxonomy"] == SOUND.cells()


def test_list_shows_the_families_with_licences_and_taxonomy(capsys):
    assert main(["list", "tiny*"]) == 0
    names, licences, taxonomy = blocks(capsys.readouterr().out)
    (heading, head, jpeg, sound), (words, columns, second, first) = names, taxonomy
    assert "mmtok.load('<family>:" in heading and "arXiv 2506.10274" in words
    assert head.split()[:2] == ["family", "modality"] and columns.split()[:2] == ["name", "architecture"]
    assert plain(jpeg) == "tinyjpeg image no-such-package (not installed) quality 1..95"
    assert plain(sound) == f"tinysound audio pytest {pytest.__version__} any word"
    assert [plain(line) for line in licences[1:]] == [
        "family licence of the code of the weights",
        "tinyjpeg BSD-3-Clause none needed",
        "tinysound MIT CC-BY-4.0",
    ]
    assert plain(second) == "tinyjpeg DCT/DCT P SQ A - - n ND file up to 4096"
    assert plain(first) == "tinysound CNN/CNN T RVQ F Rec, VQ - y S y 50"
    assert main(["list", "*", "--json"]) == 0
    cards = json.loads(capsys.readouterr().out)
    assert list(cards) == ["audio-tiny-16k", "image-tiny-8b", "tinyjpeg", "tinysound"]
    assert cards["tinyjpeg"]["family"] is True and cards["tinyjpeg"]["installed"] is None
    assert cards["tinysound"]["taxonomy"] == SOUND.cells() and "family" not in cards["image-tiny-8b"]


def test_list_without_families_and_the_legend(capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(auto, "_family_homes", dict)
    assert main(["list"]) == 0
    assert len(blocks(capsys.readouterr().out)) == 1
    assert main(["list", "--legend"]) == 0
    assert capsys.readouterr().out == LEGEND


def test_info_of_a_family_and_of_a_tokenizer_of_it(capsys):
    assert main(["info", "tinyjpeg"]) == 0
    text = plain(capsys.readouterr().out)
    for words in ("source quality 1..95", "installed - install pip install it", "code BSD-3-Clause", "rate up to 4096"):
        assert words in text, words
    assert main(["info", "tinysound:some/folder.safetensors"]) == 0  # a source, not a file of tokens
    text = plain(capsys.readouterr().out)
    installed = f"package pytest installed {pytest.__version__}"
    for words in ("weights CC-BY-4.0", installed, "hop_length 320", "type audio-tiny", "objective Rec, VQ"):
        assert words in text, words
    assert main(["info", "tinysound:x", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["timing"] == {"hop_length": 320, "streams": False} and facts["taxonomy"] == SOUND.cells()
    assert facts["licences"] == {"code": "MIT", "weights": "CC-BY-4.0"} and facts["frame_rate"] == 50


def test_info_says_where_the_training_is_unknown(tmp_path: Path, capsys):
    codec = AudioCodec(strides=(8, 5), encoder_width=2, decoder_width=8, latent_dim=4, num_codebooks=1)
    for about, unknown in (({}, True), ({"objective": ["Rec"]}, False)):
        codec.about = about
        codec.save(tmp_path / "codec")
        assert main(["info", str(tmp_path / "codec")]) == 0
        assert ("of the published system" in capsys.readouterr().out) == unknown


def test_a_damaged_checkpoint_does_not_hide_the_others(shipped: Path, capsys):
    (shipped / "image-tiny-8b" / "config.json").write_text("{")
    assert main(["list"]) == 0
    _, audio, image = blocks(capsys.readouterr().out)[0]
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
