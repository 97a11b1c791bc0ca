"""Train an X-Codec: 16 kHz speech, 50 Hz, 8 levels of 1024 codes, 4 kbit/s, with a frozen speech teacher.

Command:   python recipes/audio_xcodec.py --data data --out runs/audio_xcodec --steps 900
           python recipes/audio_xcodec.py --data my_recordings --init audio-xcodec-16k-4kbps --lr 3e-4   # fine-tune
           python recipes/audio_xcodec.py --data data --teacher ~/hubert-base-ls960 --size published --gan-start 0
Data:      `python recipes/fetch_data.py --out data` (human and synthesised speech), or any folder of audio.
Teacher:   the shipped Whisper tiny encoder; --teacher takes a folder of HuBERT, WavLM or wav2vec 2.0 (transformers);
           --teacher none is the twin without a semantic branch.
Losses:    mel, STFT, compressed spectrum and waveform for --size small; --size published with X-Codec's own: STFT over
           the full band and six sub-bands, LSGAN of mel discriminators, feature matching 20, semantic 100.
Result:    see recipes/claims_audio.py (the same training, compared over seeds), recipes/LOG.md and
           checkpoints/audio-xcodec-16k-4kbps/README.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from hearing.models import ASSETS, RATE, seeded, small_xcodec, training_of, training_speech

import mmtok
from mmtok.audio.xcodec import PRESETS, XCodec, quantizer_preset
from mmtok.data.audio import read_audio, resample
from mmtok.data.sources import find_sources
from mmtok.losses.xcodec import xcodec_losses
from mmtok.metrics import METRICS
from mmtok.training import AudioObjective, TrainConfig, train
from mmtok.training.objective import Adversary


def build(args: argparse.Namespace) -> XCodec:
    """The codec that the flags describe, or the one to go on with."""
    if args.init is not None:
        found = mmtok.load(args.init)
        if not isinstance(found, XCodec):
            raise SystemExit(f"--init: expected an xcodec, got {found.type_name!r}")
        return found
    teacher = {"whisper": {"type": "whisper"}, "none": None}.get(args.teacher, {"type": "hf", "folder": args.teacher})
    if args.size == "small" and args.teacher in ("whisper", "none"):
        return small_xcodec(teacher is not None, args.smoke, args.preset)
    if args.smoke:
        raise SystemExit("--smoke: expected --size small and the teachers whisper or none, which need no files")
    return XCodec(semantic=teacher, quantizer=quantizer_preset(args.preset))


def published_objective(gan_start: int | None, semantic: bool) -> AudioObjective:
    """X-Codec's own losses and weights (its code; the paper leaves the weights out)."""
    full, subband, discriminator = xcodec_losses(RATE)
    adversary = None
    if gan_start is not None:
        adversary = Adversary(discriminator, "least_squares", 1.0, 20.0, start=gan_start)
    weights = {"semantic": 100.0} if semantic else None
    return AudioObjective(None, full, subband=subband, adversary=adversary, aux_weights=weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data", help="folder with speech.jsonl, or any folder of audio")
    parser.add_argument("--out", type=Path, default=Path("runs/audio_xcodec"), help="folder of log, state and weights")
    parser.add_argument("--cache", type=Path, help="decoded training speech (default: OUT/cache)")
    parser.add_argument("--steps", type=int, default=900, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=8, help="clips a step on one process")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a clip")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate; published 2e-4")
    parser.add_argument("--teacher", default="whisper", help="whisper, none, or a folder of HuBERT, WavLM, wav2vec 2.0")
    parser.add_argument("--init", help="go on from this tokenizer's weights instead: a folder or a shipped name")
    parser.add_argument("--size", choices=("small", "published"), default="small", help="small: a CPU can train it")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="fixed", help="how the quantizer learns")
    parser.add_argument("--gan-start", type=int, help="step from which discriminators take part (published size)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True, help="continue from --out")
    parser.add_argument("--smoke", action="store_true", help="a few steps of a tiny model on the packaged clip")
    args = parser.parse_args()

    packed = training_speech(args.data, args.cache or args.out / "cache", args.smoke)
    sources = find_sources(ASSETS if args.smoke else args.data, "audio")
    held = ([s for s in sources if s.split == "val"] or sources)[:: max(1, len(sources) // 200)][:12]
    clips = [resample(x.mean(0, keepdim=True), r, RATE) for x, r in (read_audio(s.path) for s in held)]
    clips = [c for c in clips if c.shape[1] > RATE and c.abs().max() > 0.01]

    seeded(args.seed)
    tokenizer = build(args)
    training = training_of(tokenizer, packed, args.batch, args.seconds, args.seed, args.smoke)
    objective = training.objective
    if args.size == "published":
        objective = published_objective(args.gan_start, tokenizer.teacher is not None)
    for module in training.compiled:
        module.compile(dynamic=False)

    def validate(model: torch.nn.Module) -> dict[str, float]:
        del model  # the loop has put the averaged weights into the tokenizer
        scores: dict[str, list[float]] = {"stoi": [], "pesq_wb": [], "mel_distance": []}
        with torch.compiler.set_stance("force_eager"):  # every clip has its own length
            for clip in clips:
                x_hat = tokenizer.decode(tokenizer.encode(clip, sample_rate=RATE))
                assert isinstance(x_hat, torch.Tensor)
                for name, values in scores.items():
                    try:
                        values.append(float(METRICS[name].function(clip[None], x_hat, RATE)))
                    except (ImportError, ValueError):
                        continue  # without the extra, or a clip too short for this metric
        return {k: sum(v) / len(v) for k, v in scores.items() if v}

    config = TrainConfig(
        out=args.out,
        steps=min(args.steps, 3) if args.smoke else args.steps,
        lr=args.lr,
        betas=(0.9, 0.99),
        seed=args.seed,
        warmup=2 if args.smoke else 100,
        ema=0.995,
        codebook_batches=0 if args.init else training.codebook_batches,
        resume=args.resume,
        bf16=not args.smoke,
    )
    train(tokenizer, objective, training.batches, config, validate)
    print(f"weights: {config.out / 'tokenizer'}; log: {config.out / 'log.jsonl'}")


if __name__ == "__main__":
    main()
