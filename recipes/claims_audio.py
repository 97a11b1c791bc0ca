"""Claims about X-Codec: what the semantic branch buys at like bits, and what its released training loses.

Command:   python recipes/claims_audio.py --data data --results recipes/results
Claim 1:   X-Codec (arXiv 2408.17175): semantic features before the quantizer and a semantic loss after it lower the
           word error rate of decoded speech and make codes easier to read. `semantic` against its twin `acoustic`: the
           same data, batches, steps, seeds and bits, without teacher, semantic encoder, decoder and loss.
Claim 2:   the released training's faults (quantizers/rvq_legacy.py; one clip a batch). `faithful` keeps them all,
           `faithful-whole` reads the whole batch, `fixed` has none, `fixed-quick` none and a shorter memory. A small
           acoustic codec of 4 levels of 256 codes.
Data:      training split of `python recipes/fetch_data.py --out data`; scored on its test split (an English voice and
           readers that no training saw), recognised by the networks of `fetch_data.py --helpers`.
Scores:    PESQ-wb, STOI, SI-SDR, mel distance (45 clips: the benchmark's set `speech`); word error rate of Whisper
           base and of pocketsphinx on English prompts of four words or more; accuracy of a linear probe for the phone
           of a frame (pocketsphinx's alignment), from the codes of level 1 and of all levels. 95 % bootstrap over
           clips and seeds.
Hardware:  two CPU cores, one training on each (`--only train` in two shells shares the grid).
Result:    recipes/results/claim-xcodec.json, claim-xcodec-presets.json, recipes/LOG.md.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from hearing.models import RATE, seeded, small_xcodec, training_of, training_speech
from hearing.page import write_page
from hearing.scores import (
    Spoken,
    english_prompts,
    phones_of,
    probe_scores,
    signal_scores,
    speech_clips,
    use_of,
    word_scores,
)
from imaging.grid import Training, Variant, arguments, scores_of, train_all
from imaging.report import interval, write_claim

import mmtok
from mmtok.audio.xcodec import XCodec, quantizer_preset
from mmtok.bench.recognition import Recogniser, SphinxRecogniser, WhisperRecogniser, join_whisper
from mmtok.data.audio import read_audio, resample
from mmtok.data.sources import find_sources
from mmtok.tokenizer import AudioTokenizer, Tokenizer

BRANCHES = [Variant("semantic", {"semantic": True}), Variant("acoustic", {"semantic": False})]
# 3 clips of 2 s are 300 vectors for 256 codes, as the released loop's 8 x 1 clip of 3 s are 1200 for 1024.
TRAINING_PRESETS = [
    Variant("faithful", {"preset": "faithful", "clips": 3}),
    Variant("faithful-whole", {"preset": "faithful", "clips": 24}),
    Variant("fixed", {"preset": "fixed", "clips": 24}),
    # The same with the released speed of forgetting, two updates of 0.99 a step, and its threshold of 2 of 9.4 uses.
    Variant("fixed-quick", {"preset": "fixed", "clips": 24, "decay": 0.98, "dead_code_threshold": 0.2}),
]
PRESET_SHAPE = {"front": "stft", "strides": (80, 2, 2), "kernel_size": 3, "encoder_width": 32, "decoder_width": 128}


FEW = 2  # levels of the low bitrate at which speech is scored as well
PRESET_STEPS = 250
SIGNAL_COLUMNS = {
    "pesq_wb": ("PESQ-wb", 2),
    "stoi": ("STOI", 3),
    "si_sdr": ("SI-SDR dB", 1),
    "si_sdr_aligned": ("aligned SI-SDR dB", 1),
    "mel_distance": ("mel distance", 2),
}
BRANCH_COLUMNS = {
    "whisper-base": ("WER % Whisper base", 1),
    "pocketsphinx": ("WER % pocketsphinx", 1),
    "probe1": ("phone accuracy %, level 1", 1),
    "probe": ("phone accuracy %, all levels", 1),
    **SIGNAL_COLUMNS,
    "whisper-base, 1 kbit/s": ("WER % Whisper base, 1 kbit/s", 1),
    "pesq_wb, 1 kbit/s": ("PESQ-wb, 1 kbit/s", 2),
    "stoi, 1 kbit/s": ("STOI, 1 kbit/s", 3),
}
PRESET_COLUMNS = {
    "usage": ("codes used %", 1),
    "perplexity": ("perplexity of 256", 1),
    "perplexity4": ("perplexity, level 4", 1),
    **SIGNAL_COLUMNS,
}


class Material:
    """What is listened to, by whom; read once."""

    def __init__(self, data: Path, cache: Path, smoke: bool):
        self.recognisers: list[Recogniser] = []
        if smoke:
            x, rate = read_audio(next((Path(mmtok.__file__).parent / "assets").glob("*.flac")))
            clip = resample(x.mean(0, keepdim=True), rate, RATE)[:, : 2 * RATE]
            self.clips, self.readers = [clip], Spoken([clip], ["the packaged clip"])
            self.prompts, self.heard, self.phones = Spoken([], []), Spoken([], []), None
            return
        self.clips = speech_clips(data)
        self.prompts = english_prompts(data)
        self.heard = self.prompts.part(4)
        self.phones = phones_of(self.prompts, 320, cache)
        books = [s for s in find_sources(data, "audio") if s.package == "pocketsphinx-testdata"]
        sounds = [read_audio(s.path) for s in books]
        self.readers = Spoken(
            [resample(x.mean(0, keepdim=True), r, RATE)[:, : 3 * RATE] for x, r in sounds],
            [s.text or "" for s in books],
        ).part(5)
        self.recognisers = [WhisperRecogniser(join_whisper(data / "helpers")), SphinxRecogniser()]

    def notes(self) -> dict[str, Any]:
        """Word error rates of the originals, and how much was scored."""
        originals = word_scores(None, self.heard, 0, self.recognisers) if self.recognisers else {}
        return {
            "originals": {name: interval(torch.tensor(v)[None].numpy()) for name, v in originals.items()},
            "clips_recognised": len(self.heard.clips),
            "clips_aligned": 0 if self.phones is None else sum(int(v[0]) >= 0 for v in self.phones.labels),
        }

    def branch_scores(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """All scores of one codec at all levels, and at the first `FEW`."""
        assert isinstance(tokenizer, AudioTokenizer)
        Q = tokenizer.spec.num_codebooks
        found = {"count": len(self.clips), "bits": tokenizer.spec.bitrate_bps, **use_of(tokenizer, self.clips)}
        for n, suffix in ((Q, ""), (FEW, ", 1 kbit/s")):
            found |= {f"{k}{suffix}": v for k, v in signal_scores(tokenizer, self.clips, n).items()}
            recognisers = self.recognisers if n == Q else self.recognisers[:1]  # the other takes long over bad sound
            found |= {f"{k}{suffix}": v for k, v in word_scores(tokenizer, self.heard, n, recognisers).items()}
        if self.phones is not None:
            probed = probe_scores(tokenizer, self.prompts, self.phones, (1, Q))
            found |= {"probe1": probed[1], "probe": probed[Q]}
        return found

    def preset_scores(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Codebook use and signal metrics."""
        assert isinstance(tokenizer, AudioTokenizer)
        Q = tokenizer.spec.num_codebooks
        use = use_of(tokenizer, self.clips)
        return {
            "count": len(self.clips),
            "bits": tokenizer.spec.bitrate_bps,
            "usage": 100 * sum(use["usage"]) / Q,
            "perplexity": sum(use["perplexity"]) / Q,
            "perplexity4": use["perplexity"][-1],
            "levels": use,
            **signal_scores(tokenizer, self.clips, Q),
        }


def preset_codec(settings: dict[str, Any], smoke: bool) -> XCodec:
    """A small acoustic codec whose quantizer learns as the preset says, but for further settings."""
    numbers: dict[str, Any] = {"dim": 64, "num_codebooks": 4, "codebook_size": 256}
    if smoke:
        numbers = {"dim": 16, "num_codebooks": 2, "codebook_size": 16}
    numbers |= {k: v for k, v in settings.items() if k not in ("preset", "clips")}
    return XCodec(**PRESET_SHAPE, acoustic_dim=64, quantizer=quantizer_preset(settings["preset"], numbers))


def main() -> None:
    args = arguments(__doc__, "runs/claims_audio", steps=900)

    def build(variant: Variant, seed: int, folder: Path) -> Training:
        del folder
        packed = training_speech(args.data, args.cache, args.smoke)  # read anew, from what was packed the first time
        seeded(seed)
        if "preset" in variant.settings:
            codec = preset_codec(variant.settings, args.smoke)
            training = training_of(codec, packed, variant.settings["clips"], 2.0, seed, args.smoke)
            training.steps = min(args.steps, PRESET_STEPS)
            training.codebook_batches = 0 if variant.settings["preset"] == "faithful" else training.codebook_batches
            return training
        codec = small_xcodec(variant.settings["semantic"], args.smoke)
        return training_of(codec, packed, 8, 2.0, seed, args.smoke)

    done = train_all([*BRANCHES, *TRAINING_PRESETS], args, build)
    if args.only == "train":
        return
    material = Material(args.data, args.out / "cache", args.smoke)
    rows: dict[str, list[dict[str, Any]]] = {}
    for (name, _), folder in sorted(done.items()):
        score = material.branch_scores if name in {v.name for v in BRANCHES} else material.preset_scores
        rows.setdefault(name, []).append(scores_of(folder, score))
    args.batch = 8
    branches = {v.name: rows[v.name] for v in BRANCHES if v.name in rows}
    if branches:
        write_claim("claim-xcodec", branches, args, "acoustic", BRANCH_COLUMNS, material.notes(), unit="clip")
    if len(branches) == len(BRANCHES):
        codecs = {v.name: mmtok.load(done[v.name, args.seed]) for v in BRANCHES}
        page = (args.results or args.out) / "claim-xcodec.html"
        write_page(page, codecs, material.readers, branches, FEW)
        print(f"listen: {page}")
    presets = {v.name: rows[v.name] for v in TRAINING_PRESETS if v.name in rows}
    if presets:
        args.steps = min(args.steps, PRESET_STEPS)
        write_claim("claim-xcodec-presets", presets, args, "faithful", PRESET_COLUMNS, unit="clip")


if __name__ == "__main__":
    main()
