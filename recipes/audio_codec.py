"""Train the 16 kHz RVQ speech codec: 50 Hz, 8 levels of 1024 codes, 4 kbit/s, DAC / SEANet blocks with Snake.

Command:   python recipes/audio_codec.py --data data --out runs/audio_codec --steps 2000 --compile
           python recipes/audio_codec.py --data data --causal --out runs/audio_causal --steps 1200 --compile
           python recipes/audio_codec.py --data my_recordings --init audio-causal-16k-4kbps --lr 3e-4    # fine-tune
Data:      `python recipes/fetch_data.py --out data` (human and synthesised speech), or any folder of audio.
Result:    see recipes/LOG.md and checkpoints/audio-codec-16k-4kbps/README.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import mmtok
from mmtok.audio.codec import AudioCodec
from mmtok.data.audio import read_audio, resample
from mmtok.data.packed import AudioBatches, audio_reader, pack
from mmtok.data.sources import find_sources
from mmtok.losses.discriminators import MultiPeriodDiscriminator, MultiScaleSTFTDiscriminator
from mmtok.losses.spectral import CompressedSpectrumLoss, MultiScaleMelLoss, MultiScaleSTFTLoss
from mmtok.losses.spectral_discriminators import JoinedDiscriminator
from mmtok.metrics import METRICS
from mmtok.training import AudioObjective, TrainConfig, train
from mmtok.training.objective import Adversary

# Blocks of DAC on a short-time Fourier transform: on one CPU core it trains on 20 seconds of speech a second where
# front="samples" trains on 8, and reaches a lower mel distance in fewer steps (LOG.md, 2026-11-21).
SMALL = {
    "front": "stft",
    "strides": (80, 2, 2),
    "encoder_width": 128,
    "decoder_width": 512,
    "latent_dim": 96,
    "kernel_size": 3,
    "quantizer_dropout": 0.25,
}
CAUSAL = {**SMALL, "encoder_width": 96, "decoder_width": 384, "causal": True}
TINY = {"encoder_width": 4, "decoder_width": 32, "latent_dim": 16, "num_codebooks": 2, "codebook_size": 16}
ASSETS = Path(__file__).resolve().parents[1] / "mmtok" / "assets"


def discriminators(width: int) -> torch.nn.Module:
    """Multi-period and multi-scale STFT discriminators side by side."""
    periods = MultiPeriodDiscriminator(widths=(width, 4 * width, 8 * width))
    return JoinedDiscriminator([periods, MultiScaleSTFTDiscriminator(n_ffts=(1024, 512, 256), width=width)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data", help="folder with speech.jsonl, or any folder of audio")
    parser.add_argument("--out", default="runs/audio_codec", help="folder of log, state and weights")
    parser.add_argument("--cache", type=Path, help="decoded training speech (default: OUT/cache)")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=16, help="clips of one second a step on one process")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--init", help="go on from this tokenizer's weights: a folder or a shipped name")
    parser.add_argument("--causal", action="store_true", help="a model that streams: look-ahead of 15 ms, no more")
    parser.add_argument("--gan-start", type=int, default=None, help="step from which discriminators take part")
    parser.add_argument("--compile", action="store_true", help="torch.compile the convolution stacks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True, help="continue from --out")
    parser.add_argument("--smoke", action="store_true", help="a few steps of a tiny model on the packaged clip")
    args = parser.parse_args()

    sources = find_sources(ASSETS if args.smoke else args.data, "audio")
    training = [s for s in sources if s.split == "train"] or sources
    validation = ([s for s in sources if s.split == "val"] or training)[:: max(1, len(sources) // 200)][:12]
    rate = 16000
    packed = pack([s.path for s in training], args.cache or Path(args.out) / "cache", audio_reader(rate))
    clips = [resample(x.mean(0, keepdim=True), r, rate) for x, r in (read_audio(s.path) for s in validation)]
    clips = [c for c in clips if c.shape[1] > rate and c.abs().max() > 0.01]

    torch.manual_seed(args.seed)
    tokenizer = AudioCodec(sample_rate=rate, **(TINY if args.smoke else CAUSAL if args.causal else SMALL))
    if args.init:
        tokenizer = mmtok.load(args.init)
        if not isinstance(tokenizer, AudioCodec):
            raise SystemExit(f"--init: expected a codec, got {tokenizer.type_name!r}")
    if args.compile:
        tokenizer.encoder.compile(dynamic=False)
        tokenizer.decoder.compile(dynamic=False)
    config = TrainConfig(
        out=Path(args.out),
        steps=min(args.steps, 3) if args.smoke else args.steps,
        lr=args.lr,
        seed=args.seed,
        warmup=2 if args.smoke else 200,
        codebook_batches=0 if args.init else 2 if args.smoke else 40,
        resume=args.resume,
    )

    def validate(model: torch.nn.Module) -> dict[str, float]:
        scores: dict[str, list[float]] = {"stoi": [], "pesq_wb": [], "mel_distance": []}
        with torch.compiler.set_stance("force_eager"):  # every clip has its own length
            for clip in clips:
                x_hat = tokenizer.decode(tokenizer.encode(clip, sample_rate=rate))
                assert isinstance(x_hat, torch.Tensor)
                for name, values in scores.items():
                    try:
                        values.append(float(METRICS[name].function(clip[None], x_hat, rate)))
                    except (ImportError, ValueError):
                        continue  # without the extra, or a clip too short for this metric
        return {k: sum(v) / len(v) for k, v in scores.items() if v}

    adversary = None
    if args.gan_start is not None or args.smoke:
        adversary = Adversary(discriminators(2 if args.smoke else 16), "least_squares", start=args.gan_start or 0)
    objective = AudioObjective(
        # Floors near what can be heard: the usual ones ask for the noise 100 dB below speech, which a short run cannot.
        MultiScaleMelLoss(rate, floor=1e-3),
        MultiScaleSTFTLoss(floor=1e-4),
        CompressedSpectrumLoss(),
        mel_weight=1.0,
        spectrum_weight=30.0,
        wave_weight=5.0,
        adversary=adversary,
    )
    batches = AudioBatches(packed, 2 if args.smoke else args.batch, rate, args.seed)
    train(tokenizer, objective, batches, config, validate)
    print(f"weights: {config.out / 'tokenizer'}; log: {config.out / 'log.jsonl'}")


if __name__ == "__main__":
    main()
