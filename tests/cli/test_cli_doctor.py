"""`mmtok doctor`: broken sets are named with the command that mends them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_tokenizers import TinyAudio

from mmtok.cli import doctor, main

ROOT = Path(__file__).parents[2]
WHOLE = {
    "python": "3.11.7",
    "torch": "2.11.0+cu130",
    "torchvision": "0.26.0",
    "torchaudio": "2.11.0",
    "timm": "1.0.24",
    "einops": "0.8.1",
    "accelerate": "1.12.0",
    "safetensors": "0.6.2",
    "numpy": "2.4.6",
    "pillow": "13.0.0",
    "avif": "1.3.0",
    "soundfile": "0.14.0",
    "tqdm": "4.67.1",
    "torchmetrics": "1.9.0",
    "triton": "3.6.0",
    "pesq": "0.0.4",
    "pystoi": "0.4.1",
    "numba": "0.68.1",
}
MEND = 'python -m pip install "torch==2.11.0" "torchvision==0.26.0" "torchaudio==2.11.0"'


def broken(findings: list[doctor.Finding]) -> list[doctor.Finding]:
    return [f for f in findings if f.level == "broken"]


def test_a_whole_set_has_nothing_broken_and_names_the_missing_extras():
    findings = doctor.diagnose(WHOLE, {})
    assert broken(findings) == []
    notes = {f.what: f.mend for f in findings if f.level == "note"}
    assert notes == {
        "extra judges": "python -m pip install 'mmtok[judges]'",
        "extra lm": "python -m pip install 'mmtok[lm]'",
        "extra data": "python -m pip install 'mmtok[data]'",
        "extra codecs": "python -m pip install 'mmtok[codecs]'",
        "extra corpus": "python -m pip install 'mmtok[corpus]'",
        "extra bench": "python -m pip install 'mmtok[bench]'",
    }


@pytest.mark.parametrize("error", [{}, {"torchaudio": "RuntimeError: Detected ... different CUDA versions."}])
def test_torch_2_15_with_torchaudio_2_11_is_named_with_its_mend(error: dict[str, str]):
    versions = WHOLE | {"torch": "2.15.0+cu132", "torchvision": "0.30.0"}
    (finding,) = broken(doctor.diagnose(versions, error))
    assert finding.what == "torch + torchaudio"
    assert "2.15.0+cu132" in finding.detail and "CUDA versions" in finding.detail
    assert finding.mend == MEND


def test_torch_2_14_with_torchaudio_2_11_works():
    assert broken(doctor.diagnose(WHOLE | {"torch": "2.14.1", "torchvision": "0.29.0"}, {})) == []


def test_a_torchvision_of_another_torch_is_named():
    errors = {"torchvision": "RuntimeError: operator torchvision::nms does not exist"}
    (finding,) = broken(doctor.diagnose(WHOLE | {"torchvision": "0.28.0"}, errors))
    assert finding.what == "torch + torchvision"
    assert "0.26" in finding.detail and "nms" in finding.detail
    assert finding.mend == MEND


def test_a_torch_that_does_not_import_is_reported_once():
    errors = dict.fromkeys(("torch", "torchvision", "torchaudio"), "ImportError: libcudart.so.13")
    (finding,) = broken(doctor.diagnose(WHOLE, errors))
    assert finding.what == "torch" and "libcudart" in finding.detail and MEND in finding.mend


@pytest.mark.parametrize(
    ("versions", "errors", "what", "words"),
    [
        ({"numpy": "1.24.0"}, {}, "numpy", ["1.24.0", ">= 1.26"]),
        ({"timm": None}, {}, "timm", ["not installed"]),
        ({"python": "3.9.2"}, {}, "python", ["3.9.2", ">= 3.10"]),
        ({}, {"soundfile": "OSError: sndfile library not found"}, "soundfile", ["sndfile"]),
        ({}, {"pesq": "ImportError: numpy.core"}, "extra audio-metrics", ["pesq", "numpy.core"]),
        ({}, {"triton": "ImportError: no libtriton"}, "triton", ["libtriton"]),
        ({"torch": "2.10.0", "torchvision": "0.25.0"}, {}, "torch", ["2.10.0", ">= 2.11"]),
    ],
)
def test_one_broken_part_is_one_finding_with_a_mend(versions: dict, errors: dict, what: str, words: list[str]):
    found = broken(doctor.diagnose(WHOLE | versions, errors))
    (finding,) = [f for f in found if f.what == what]
    assert all(word in finding.detail for word in words)
    assert finding.mend


def test_a_pillow_without_avif_is_a_note():
    (finding,) = [f for f in doctor.diagnose(WHOLE | {"avif": None}, {}) if f.what == "AVIF in pillow"]
    assert finding.level == "note" and "pillow>=" in finding.mend


def test_the_tables_are_those_of_pyproject_and_constraints():
    text = (ROOT / "pyproject.toml").read_text()
    core = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert core is not None
    bounds = {n: (low, high) for n, low, high in re.findall(r'"([\w-]+)>=([\d.]+),<([\d.]+)"', core.group(1))}
    assert bounds == doctor.REQUIRED
    for extra, packages in doctor.EXTRAS.items():
        line = re.search(rf"^{extra} = \[(.*)\]", text, re.MULTILINE)
        assert line is not None
        assert tuple(re.findall(r'"([\w-]+)>=', line.group(1))) == packages
    assert f'requires-python = ">={doctor.PYTHON}"' in text
    constraints = dict(re.findall(r"^(\w+)==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert constraints == doctor.TESTED


def test_a_probe_gives_the_last_line_of_the_error_and_gives_up_after_its_time():
    assert doctor.run_python("print(1 + 1)") == ("2", "")
    assert doctor.run_python("raise RuntimeError('two CUDA versions')") == ("", "RuntimeError: two CUDA versions")
    assert doctor.run_python("import time; time.sleep(60)", timeout_s=0.2) == ("", "no answer within 0.2 s")


def test_the_processor_line_counts_cores():
    assert "cores" in doctor.processor().detail


def test_a_broken_set_ends_with_code_1_and_a_whole_one_with_0(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(doctor, "installed", lambda: (WHOLE | {"torch": "2.15.0", "torchvision": "0.30.0"}, {}))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert MEND in out and "1 broken" in out and "not checked, because torch does not work" in out
    monkeypatch.setattr(doctor, "installed", lambda: (WHOLE, {}))
    monkeypatch.setattr(doctor, "accelerator", lambda torch_works: [])
    monkeypatch.setattr(doctor, "checkpoints", lambda: [doctor.Finding("ok", "image-x", "fine")])
    assert main(["doctor"]) == 0
    assert "all works" in capsys.readouterr().out


def test_checkpoints_are_loaded_and_their_golden_codes_compared(shipped: Path):
    audio, image = doctor.checkpoints()
    assert (audio.level, audio.what) == ("note", "audio-tiny-16k") and "no golden.safetensors" in audio.detail
    assert (image.level, image.what) == ("ok", "image-tiny-8b") and "0.00% of its golden codes differ" in image.detail
    x = (torch.linspace(-1, 1, 640)[None] * 32767).to(torch.int16)
    codes = TinyAudio().encode(x, sample_rate=16000).codes.to(torch.int32)
    save_file({"x": x, "codes": codes}, shipped / "audio-tiny-16k" / "golden.safetensors")
    assert doctor.checkpoints()[0].level == "ok"
    path = shipped / "image-tiny-8b" / "golden.safetensors"
    arrays = load_file(path)
    for changed, words in (
        (arrays | {"codes": (arrays["codes"] + 1) % 16}, "100.00% of its golden codes differ"),
        (arrays | {"codes": arrays["codes"][:, :1].contiguous()}, "expected golden codes of shape"),
        ({"x": arrays["x"]}, "lacks codes"),
    ):
        save_file(changed, path)
        finding = doctor.checkpoints()[1]
        assert finding.level == "broken" and words in finding.detail and str(shipped) in finding.mend


def test_a_damaged_checkpoint_is_found(shipped: Path, capsys):
    weights = shipped / "image-tiny-8b" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    finding = doctor.checkpoints()[1]
    assert finding.level == "broken" and "fingerprint" in finding.detail
    weights.unlink()
    assert "model.safetensors is missing" in doctor.checkpoints()[1].detail


def test_no_checkpoints_at_all_are_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("mmtok.auto.shipped_folder", lambda: tmp_path)
    (finding,) = doctor.checkpoints()
    assert finding.level == "broken" and str(tmp_path) in finding.detail
