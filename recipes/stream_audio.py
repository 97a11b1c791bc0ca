"""Push a long sound in pieces through the encoder and the decoder of a causal tokenizer, and check it against offline.

Command:   python recipes/stream_audio.py --tokenizer NAME --data data --seconds 3600 --out stream.json
Data:      `python recipes/fetch_data.py --out data`, or any folder of audio, or one file; repeated as often as needed.
Prints:    algorithmic latency, real-time factor and peak memory of both directions, codes that differ from offline and
           the largest difference of the sound. Fails where a code differs or the sound does by more than 1e-5.
Result:    of the shipped causal codec: recipes/LOG.md. `--smoke` streams the packaged clip through a tiny random codec.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import mmtok
from mmtok.audio.codec import AudioCodec
from mmtok.audio.stream import StreamingTokenizer
from mmtok.data.audio import read_audio, resample
from mmtok.data.sources import find_sources

ASSETS = Path(__file__).resolve().parents[1] / "mmtok" / "assets"
WARM_SECONDS = 10.0  # after which memory should have reached its peak
LONGEST = 0.5  # seconds of a random piece


def clips(data: Path, rate: int) -> Iterator[Tensor]:
    """Mono clips (1, n) at ``rate``, one file after the other, for ever."""
    paths = [data] if data.is_file() else [s.path for s in find_sources(data, "audio")]
    while True:
        for path in paths:
            x, own = read_audio(path)
            yield resample(x.mean(0, keepdim=True), own, rate)


def pieces(data: Path, rate: int, length: int, size: int, generator: np.random.Generator) -> Iterator[Tensor]:
    """``length`` samples in pieces of ``size``; 0: of random sizes, from one sample to half a second."""
    source, waiting, given = clips(data, rate), torch.zeros(1, 0), 0
    while given < length:
        n = size or int(np.exp(generator.uniform(0, np.log(LONGEST * rate))))
        n = min(max(1, n), length - given)
        while waiting.shape[1] < n:
            waiting = torch.cat([waiting, next(source)], 1)
        yield waiting[:, :n]
        waiting, given = waiting[:, n:].clone(), given + n


def peak_mib() -> float:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="a causal audio tokenizer: name or folder")
    parser.add_argument("--data", default="data", help="a file, or a folder of audio")
    parser.add_argument("--out", help="file for the measurements as JSON")
    parser.add_argument("--seconds", type=float, default=600.0, help="length of the stream")
    parser.add_argument("--piece", type=int, default=0, help="samples a piece; 0 = random, 1 sample to half a second")
    parser.add_argument("--compare", type=float, default=60.0, help="seconds from the beginning to check with offline")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="twelve seconds of the packaged clip, a tiny random codec")
    args = parser.parse_args()
    if args.smoke:
        torch.manual_seed(args.seed)
        sizes: dict[str, Any] = {
            "encoder_width": 8,
            "decoder_width": 32,
            "latent_dim": 8,
            "codebook_size": 16,
            "dilations": (1,),
        }
        tok: object = AudioCodec(strides=(80, 2, 2), kernel_size=3, front="stft", causal=True, **sizes).eval()
        args.data, args.seconds, args.compare = ASSETS, 12.0, 3.0
    elif args.tokenizer is None:
        parser.error("--tokenizer: expected the name or folder of a causal audio tokenizer (mmtok list, mmtok info)")
    else:
        tok = mmtok.load(args.tokenizer)
    if not isinstance(tok, StreamingTokenizer):
        parser.error(f"--tokenizer: {args.tokenizer} does not stream; mmtok info says which do")

    rate, length = tok.sample_rate, round(args.seconds * tok.sample_rate)
    checked = min(length, round(args.compare * rate))
    encoder, decoder = tok.streamer(), tok.decode_streamer()
    heard: list[Tensor] = []  # the beginning of the input and of the output, and its codes
    said: list[Tensor] = []
    codes: list[Tensor] = []
    early = 0.0
    with tqdm(total=length / rate, unit="s", unit_scale=True) as bar:
        for x in pieces(Path(args.data), rate, length, args.piece, np.random.default_rng(args.seed)):
            if encoder.samples_in < checked:
                heard.append(x)
            tokens = encoder.push(x)
            if tokens is not None:
                y = decoder.push(tokens)
                if decoder.samples_out - y.shape[1] < checked:
                    codes.append(tokens.codes[0])
                    said.append(y)
            if not early and encoder.seconds_in >= min(WARM_SECONDS, 0.5 * length / rate):
                early = peak_mib()
            bar.update(x.shape[1] / rate)
        tokens = encoder.flush()
        said += [] if tokens is None else [decoder.push(tokens)]
        codes += [] if tokens is None else [tokens.codes[0]]
        said.append(decoder.flush())
        late = peak_mib()

    whole = tok.encode(torch.cat(heard, 1)[:, :checked], rate)
    # The last frames of a beginning that was cut out lack what came after it; all before are those of the stream.
    frames, samples = int(whole.lengths[0]), checked
    if checked < length:
        frames = (checked - tok.encode_lookahead) // tok.hop_length
        samples = frames * tok.hop_length - tok.decode_lookahead
    streamed = torch.cat(codes, 1)[:, :frames]
    offline = tok.decode(whole)
    assert isinstance(offline, Tensor)
    result = {
        "tokenizer": tok.name if args.smoke else args.tokenizer,
        "seconds": length / rate,
        "piece": args.piece or "random",
        "latency_samples": {"encoder": encoder.latency_samples, "decoder": decoder.latency_samples},
        "latency_seconds": encoder.latency_seconds + decoder.latency_seconds,
        "real_time_factor": {"encoder": encoder.real_time_factor, "decoder": decoder.real_time_factor},
        "peak_mib": {"early": early, "late": late},
        "compared_seconds": samples / rate,
        "codes_that_differ": int((streamed != whole.codes[0, :, :frames]).sum()),
        "codes_compared": streamed.numel(),
        "largest_difference": float((torch.cat(said, 1)[:, :samples] - offline[0, :, :samples]).abs().max()),
        "exact_length": decoder.samples_out == length,
    }
    print(json.dumps(result, indent=2))
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=2) + "\n")
    equal = not result["codes_that_differ"] and result["largest_difference"] <= 1e-5 and result["exact_length"]
    print("the stream equals offline" if equal else "the stream differs from offline")
    return 0 if equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
