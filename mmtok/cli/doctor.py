"""`mmtok doctor`: find what is broken in this installation and name the command that mends it."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmtok.tokenizer import Tokenizer

# The bounds of pyproject.toml and the set of constraints.txt; a test holds them equal. They stand here because doctor
# must also work where mmtok runs from a source tree, without installed metadata.
REQUIRED = {
    "torch": ("2.11", "2.15"),
    "torchvision": ("0.26", "0.30"),
    "torchaudio": ("2.11", "2.15"),
    "timm": ("1.0.20", "2"),
    "einops": ("0.8", "1"),
    "accelerate": ("1.10", "2"),
    "safetensors": ("0.6", "1"),
    "numpy": ("1.26", "3"),
    "pillow": ("11.3", "14"),
    "soundfile": ("0.13", "1"),
    "tqdm": ("4.66", "5"),
    "torchmetrics": ("1.8", "2"),
}
EXTRAS = {
    "fast": ("numba",),
    "audio-metrics": ("pesq", "pystoi"),
    "judges": ("speechmos", "distillmos", "onnxruntime", "librosa", "requests"),
    "lm": ("transformers", "tokenizers", "datasets", "peft"),
    "data": ("av",),
    "codecs": ("transformers", "diffusers", "snac", "speechtokenizer", "pycodec2"),
    "corpus": ("ray", "pyarrow", "datasets"),
    "bench": ("vector-quantize-pytorch", "transformers", "faiss-cpu", "matplotlib"),
}
TESTED = {"torch": "2.11.0", "torchvision": "0.26.0", "torchaudio": "2.11.0"}
PYTHON = "3.10"
# Import names where they differ from the package's.
MODULES = {"pillow": "PIL", "vector-quantize-pytorch": "vector_quantize_pytorch", "faiss-cpu": "faiss"}
# Its __init__ imports a trainer that needs packages it does not declare; the wrapper imports the model alone.
NOT_IMPORTED = ("speechtokenizer",)
TIMEOUT_S = 120
GOLDEN_MISS = 0.02
PIP = "python -m pip install"

PROBE = """
import json, sys
import torch
cuda = torch.cuda.is_available()
print(json.dumps({
    "built for CUDA": torch.version.cuda,
    "device": torch.cuda.get_device_name(0) if cuda else None,
    "capability": list(torch.cuda.get_device_capability(0)) if cuda else None,
    "threads": torch.get_num_threads(),
}))
"""


@dataclass(frozen=True)
class Finding:
    """One line of the report: ``level`` is ok, note (works without) or broken; ``mend`` is a command, or empty."""

    level: str
    what: str
    detail: str
    mend: str = ""


def add(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    commands.add_parser(
        "doctor",
        help="check this installation and name the command that mends it",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Check python, torch and its companions (each is imported in a process of its own), the optional extras,\n"
            "the CPU and GPU, and that every shipped checkpoint reproduces its golden codes."
        ),
        epilog="exit code: 0 when all works, 1 when something is broken\n\nexample:\n  mmtok doctor",
    ).set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the findings; 1 if one of them is broken."""
    print("importing each package in a process of its own, up to a minute on a slow machine ...", flush=True)
    findings = diagnose(*installed())
    torch_works = not any(f.level == "broken" and f.what.startswith("torch") for f in findings)
    findings += [processor(), *accelerator(torch_works)]
    if torch_works:
        findings += checkpoints()
    else:
        findings.append(Finding("note", "checkpoints", "not checked, because torch does not work"))
    for finding in findings:
        print(f"{finding.level:<7} {finding.what:<28} {finding.detail}")
        if finding.mend:
            print(f"{'':<7} mend: {finding.mend}")
    broken = sum(f.level == "broken" for f in findings)
    print(f"{broken} broken; mend the first one, then run mmtok doctor again" if broken else "all works")
    return 1 if broken else 0


def diagnose(versions: Mapping[str, str | None], import_errors: Mapping[str, str]) -> list[Finding]:
    """Findings from what is installed; pure.

    Args:
        versions: package name -> version, absent or None where it is not installed; ``python`` and ``avif`` (Pillow's
            AVIF codec) are keys too.
        import_errors: package name -> last line of the error, for packages that are installed but do not import.
    """
    python = versions.get("python") or platform.python_version()
    findings = [
        Finding("ok", "python", python)
        if _number(python) >= _number(PYTHON)
        else Finding("broken", "python", f"{python}; mmtok needs >= {PYTHON}", f"python{PYTHON} -m venv .venv")
    ]
    trio, trio_findings = _torch_set(versions, import_errors)
    findings += trio_findings
    for package, (low, high) in REQUIRED.items():
        if package not in trio:
            findings.append(_package(package, versions.get(package), low, high, import_errors.get(package)))
    if versions.get("pillow") and "pillow" not in import_errors:
        avif = versions.get("avif")
        mend = "" if avif else f'{PIP} --force-reinstall --only-binary :all: "{_bounds("pillow")}"'
        detail = avif or "this Pillow has no AVIF codec: .avif files cannot be read"
        findings.append(Finding("ok" if avif else "note", "AVIF in pillow", detail, mend))
    if "triton" in import_errors:
        findings.append(Finding("broken", "triton", import_errors["triton"], f"{PIP} --force-reinstall triton"))
    else:
        findings.append(Finding("ok", "triton", versions.get("triton") or "not installed; only a CUDA device uses it"))
    for extra, packages in EXTRAS.items():
        missing = [p for p in packages if not versions.get(p)]
        failing = [f"{p}: {import_errors[p]}" for p in packages if p in import_errors]
        if failing:
            finding = Finding(
                "broken", f"extra {extra}", "; ".join(failing), f"{PIP} --force-reinstall 'mmtok[{extra}]'"
            )
        elif missing:
            finding = Finding(
                "note", f"extra {extra}", f"not installed: {', '.join(missing)}", f"{PIP} 'mmtok[{extra}]'"
            )
        else:
            finding = Finding("ok", f"extra {extra}", ", ".join(f"{p} {versions[p]}" for p in packages))
        findings.append(finding)
    return findings


def _torch_set(versions: Mapping[str, str | None], errors: Mapping[str, str]) -> tuple[set[str], list[Finding]]:
    """The packages spoken for, and findings, when torch, torchvision and torchaudio are installed but do not fit."""
    torch, vision, audio = (versions.get(p) for p in TESTED)
    mend = f"{PIP} " + " ".join(f'"{p}=={v}"' for p, v in TESTED.items())
    named = ", ".join(f"{p} {versions[p]}" for p in TESTED if versions.get(p))
    if not torch:
        return set(), []
    audio_error = errors.get("torchaudio", "")
    cuda_clash = "different CUDA versions" in audio_error
    # torchaudio 2.11 is its last release; it is built for CUDA 13.0, and torch is built for 13.2 from 2.15 on.
    if audio and (cuda_clash or (_number(torch) >= (2, 15) and _number(audio) < (2, 15))):
        why = audio_error or "torchaudio raises RuntimeError at import: compiled with different CUDA versions"
        return set(TESTED), [Finding("broken", "torch + torchaudio", f"{named} do not work together: {why}", mend)]
    # torchvision's operators are compiled against one torch: 0.26 for 2.11, 0.27 for 2.12 and so on.
    if vision and _number(torch)[0] == 2 and _number(vision)[:2] != (0, _number(torch)[1] + 15):
        wanted = f"0.{_number(torch)[1] + 15}"
        detail = f"{named}: torch {torch} needs torchvision {wanted}"
        if "torchvision" in errors:
            detail += f" ({errors['torchvision']})"
        return set(TESTED), [Finding("broken", "torch + torchvision", detail, mend)]
    if "torch" in errors:
        return set(TESTED), [Finding("broken", "torch", f"{named}: {errors['torch']}", f"{mend} --force-reinstall")]
    return set(), []


def _package(package: str, version: str | None, low: str, high: str, error: str | None) -> Finding:
    if not version:
        return Finding("broken", package, "not installed", f'{PIP} "{_bounds(package)}"')
    if error:
        return Finding("broken", package, f"{version}: {error}", f'{PIP} --force-reinstall "{_bounds(package)}"')
    if not _number(low) <= _number(version) < _number(high):
        return Finding("broken", package, f"{version}; mmtok needs >= {low}, < {high}", f'{PIP} "{_bounds(package)}"')
    return Finding("ok", package, version)


def _bounds(package: str) -> str:
    low, high = REQUIRED[package]
    return f"{package}>={low},<{high}"


def _number(version: str) -> tuple[int, ...]:
    """The numeric head of a version: "2.15.0+cu132" is (2, 15, 0), "2.15.0rc1" too."""
    head = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in head.group().split(".")) if head else ()


def installed() -> tuple[dict[str, str | None], dict[str, str]]:
    """What `diagnose` takes, of the running interpreter; imports nothing in this process."""
    optional = [p for packages in EXTRAS.values() for p in packages]
    packages = [*REQUIRED, "triton", *optional]
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    present = [p for p in dict.fromkeys(packages) if versions[p] and p not in NOT_IMPORTED]
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        results = pool.map(lambda p: run_python(f"import {MODULES.get(p, p)}"), present)
        errors = {package: error for package, (_, error) in zip(present, results, strict=True) if error}
    if versions["pillow"] and "pillow" not in errors:
        out, _ = run_python("from PIL import features; print(features.version('avif') or '')")
        versions["avif"] = out or None
    return versions, errors


def run_python(code: str, timeout_s: float = TIMEOUT_S) -> tuple[str, str]:
    """Run ``code`` in a fresh interpreter; its standard output, and the last line of its error or ""."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return "", f"no answer within {timeout_s:g} s"
    if done.returncode == 0:
        return done.stdout.strip(), ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return "", lines[-1] if lines else f"the interpreter ended with code {done.returncode}"


def processor() -> Finding:
    """Cores and the instructions that make bfloat16 fast."""
    flags: set[str] = set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        match = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
        flags = set(match.group(1).split()) if match else set()
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "bf16", "sve")
    found = [name for name in wanted if name in flags]
    described = ", ".join(found) or "no vector instructions known"
    return Finding("ok", "processor", f"{platform.machine()}, {os.cpu_count()} cores, {described}")


def accelerator(torch_works: bool) -> list[Finding]:
    """The CUDA device as torch sees it."""
    if not torch_works:
        return []
    out, error = run_python(PROBE)
    if error:
        return [Finding("broken", "CUDA", error, "nvidia-smi")]
    facts = json.loads(out.splitlines()[-1])
    if facts["device"] is None:
        return [Finding("ok", "CUDA", f"no device (torch built for CUDA {facts['built for CUDA'] or 'none'})")]
    major, minor = facts["capability"]
    return [Finding("ok", "CUDA", f"{facts['device']}, sm_{major}{minor}, CUDA {facts['built for CUDA']}")]


def checkpoints() -> list[Finding]:
    """Every shipped checkpoint, loaded (which compares its fingerprint) and asked for its golden codes."""
    from mmtok import auto

    folder = auto.shipped_folder()
    names = auto.available()
    if not names:
        return [Finding("broken", "checkpoints", f"none in {folder}", f"restore {folder}, or install mmtok again")]
    findings = []
    for name in names:
        try:
            tokenizer = auto.load(name)
            level, detail = golden(tokenizer, folder / name / "golden.safetensors")
        except (ValueError, OSError, ImportError, RuntimeError) as e:
            level, detail = "broken", " ".join(str(e).split())
        mend = f"restore {folder / name} (from the repository or the wheel)" if level == "broken" else ""
        findings.append(Finding(level, name, detail, mend))
    return findings


def golden(tokenizer: Tokenizer, path: Path) -> tuple[str, str]:
    """Level and detail: does the checkpoint give on this machine the codes that it gave where it was made?

    The file holds ``x``, one input (C, H, W) or (C, L) as `encode` takes it, and its ``codes`` (1, Q, T); sound is at
    ``sample_rate`` (1,) in Hz, or at the tokenizer's own where that entry is missing.
    """
    from safetensors.torch import load_file

    name = f"fingerprint {tokenizer.fingerprint}"
    if not path.is_file():
        return "note", f"{name}, no {path.name} to compare with"
    arrays = load_file(path)
    if missing := {"x", "codes"} - arrays.keys():
        return "broken", f"{path.name} lacks {', '.join(sorted(missing))}"
    rate = int(arrays["sample_rate"]) if "sample_rate" in arrays else getattr(tokenizer, "sample_rate", None)
    expected, found = arrays["codes"].long(), tokenizer.encode(arrays["x"], sample_rate=rate).codes
    if found.shape != expected.shape:
        return "broken", f"expected golden codes of shape {tuple(expected.shape)}, got {tuple(found.shape)}"
    share = float((found != expected).double().mean())
    # Another CPU rounds in another order, which turns a code here and there; a wrong model turns most of them.
    return "ok" if share <= GOLDEN_MISS else "broken", f"{name}, {share:.2%} of its golden codes differ"
