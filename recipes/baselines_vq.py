"""Train the plain VQ baselines that the shipped tokenizers are compared with at like bits (`bench_readme.py`).

Command:   python recipes/baselines_vq.py --data data --out runs/baselines_vq
           (several copies of the command share the work; --variants NAME ... takes some of them)
Data:      `python recipes/fetch_data.py --out data`; the training splits of the tokenizers that they stand beside.
Compared:  a convolutional VQGAN-like autoencoder (`mmtok.image.raster2d`, without its adversary) with codes in raster
           order, and a codec with one VQ level: what one would build without any of the papers' ideas.
             vq2d-128px-512B   16 x 16 positions of 2 residual codes of 256    beside image-binary1d-64x64
             vq2d-64px-768B    8 x 8 positions of 12 residual codes of 256     beside image-bridge-f8-16x6
             vq2d-64px-20B     4 x 4 positions of one code of 1,024            beside textok and dynamic
             vq2d-64px-16B     4 x 4 positions of one code of 256              beside image-causal1d-16x8
             vq1-16k-1kbps     100 codes of 1,024 a second                     beside two levels of audio-codec
Result:    OUT/NAME-s0/tokenizer; README's tables; recipes/LOG.md.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from imaging.grid import Training, Variant, arguments, train_all
from imaging.pictures import ASSETS, SquareBatches, captioned_pictures, packed_training_pictures

from mmtok.audio.codec import AudioCodec
from mmtok.data.packed import AudioBatches, ImageBatches, audio_reader, image_reader, pack
from mmtok.data.sources import find_sources
from mmtok.image.raster2d import Raster2D
from mmtok.losses.spectral import CompressedSpectrumLoss, MultiScaleMelLoss, MultiScaleSTFTLoss
from mmtok.training import AudioObjective, ImageObjective

RATE = 16000
RVQ: dict[str, Any] = {"type": "rvq", "dim": 32, "codebook_size": 256}
VARIANTS = (
    Variant(
        "vq2d-64px-16B",
        {"pictures": "captioned", "size": 64, "multipliers": [1, 2, 2, 2], "quantizer": {"codebook_size": 256}},
    ),
    Variant(
        "vq2d-64px-20B",
        {"pictures": "captioned", "size": 64, "multipliers": [1, 2, 2, 2], "quantizer": {"codebook_size": 1024}},
    ),
    Variant(
        "vq2d-64px-768B",
        {"pictures": "crops", "size": 64, "multipliers": [1, 2, 2], "quantizer": {**RVQ, "num_codebooks": 12}},
    ),
    Variant(
        "vq2d-128px-512B",
        {"pictures": "crops", "size": 128, "multipliers": [1, 2, 2], "quantizer": {**RVQ, "num_codebooks": 2}},
    ),
    Variant("vq1-16k-1kbps"),
)
# As audio_codec.py's, with half the hop and one level.
CODEC: dict[str, Any] = {
    "front": "stft",
    "strides": (80, 2),
    "encoder_width": 128,
    "decoder_width": 512,
    "latent_dim": 96,
    "kernel_size": 3,
    "num_codebooks": 1,
}
TINY_CODEC: dict[str, Any] = {"encoder_width": 4, "decoder_width": 32, "latent_dim": 16, "num_codebooks": 1}


def main() -> None:
    args = arguments(__doc__, "runs/baselines_vq", steps=1000, seeds=1)

    def speech(seed: int) -> Training:
        sources = find_sources(ASSETS if args.smoke else args.data, "audio")
        training = [s for s in sources if s.split == "train"] or sources
        packed = pack([s.path for s in training], args.cache / "speech", audio_reader(RATE))
        tokenizer = AudioCodec(sample_rate=RATE, **(TINY_CODEC if args.smoke else CODEC))
        objective = AudioObjective(
            MultiScaleMelLoss(RATE, floor=1e-3),
            MultiScaleSTFTLoss(floor=1e-4),
            CompressedSpectrumLoss(),
            mel_weight=1.0,
            spectrum_weight=30.0,
            wave_weight=5.0,
        )
        batches = AudioBatches(packed, 2 if args.smoke else 16, RATE, seed)
        compiled = () if args.smoke else (tokenizer.encoder, tokenizer.decoder)
        return Training(tokenizer, objective, batches, 1e-3, compiled, 2 if args.smoke else 40)

    def pictures(settings: dict[str, Any], seed: int) -> Training:
        size = settings["size"]
        if args.smoke:
            packed = pack([ASSETS / "chelsea.jpg"], args.cache, image_reader(384))
            batches: Any = ImageBatches(packed, args.batch, ((size, size),), seed)
        elif settings["pictures"] == "captioned":
            captioned = captioned_pictures(args.data, args.cache, size + size // 8)
            batches = SquareBatches(captioned, captioned.rows("train"), args.batch, size, seed)
        else:
            packed = packed_training_pictures(args.data, args.cache)
            batches = ImageBatches(packed, args.batch, ((size, size),), seed)
        quantizer = {"type": "vq", "dim": 32, **settings["quantizer"]}
        tokenizer = Raster2D(
            width=8 if args.smoke else 48, multipliers=settings["multipliers"], quantizer=quantizer, image_size=size
        )
        objective = ImageObjective(l2_weight=10.0, l1_weight=0.5)
        return Training(tokenizer, objective, batches, 1e-3, (), 1 if args.smoke else 24)

    def build(variant: Variant, seed: int, folder: Path) -> Training:
        del folder
        torch.manual_seed(seed)
        return pictures(variant.settings, seed) if variant.settings else speech(seed)

    for folder in train_all(VARIANTS, args, build).values():
        print(folder)


if __name__ == "__main__":
    main()
