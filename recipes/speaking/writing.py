"""Letting the model write, freely and under the grammar: how many documents are valid, and a page of samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mmtok.bench.report import ImageSection, Section, SoundsSection, TableSection, write_report
from mmtok.data.audio import resample
from mmtok.tokens import Tokens, TokensError
from mmtok.vocab import Vocab
from speaking.learning import TASKS, prompt
from speaking.pairs import Pairs

SOUND_SECONDS = 5.0


@dataclass
class Writer:
    """A model with what it needs to write documents of one vocab.

    Args:
        num_codebooks: levels of each modality's segments.
    """

    model: Any
    vocab: Vocab
    eos: int
    num_codebooks: dict[str, int]
    temperature: float = 0.9
    top_k: int = 60

    @torch.no_grad()
    def continue_from(
        self, beginning: Sequence[int], most: int, constrained: bool, modality: str | None = None, seed: int = 0
    ) -> list[int]:
        """The ids that the model writes after ``beginning``, at most ``most``."""
        from mmtok.lm.decoding import DocumentLogits

        torch.manual_seed(seed)
        processors = []
        if constrained:
            processors.append(
                DocumentLogits(
                    self.vocab,
                    prompt_length=len(beginning),
                    header=False,
                    num_codebooks=self.num_codebooks,
                    modality=modality,
                    eos_id=self.eos,
                    max_length=len(beginning) + most,
                )
            )
        ids = torch.tensor([list(beginning)], device=next(self.model.parameters()).device)
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=most,
            do_sample=True,
            temperature=self.temperature,
            top_k=self.top_k,
            eos_token_id=self.eos,
            pad_token_id=self.eos,
            logits_processor=processors,
        )
        written = out[0, len(beginning) :].tolist()
        return written[: written.index(self.eos)] if self.eos in written else written

    def parts(self, ids: Sequence[int]) -> list[Any] | None:
        """The segments of what was written; None where it is no valid document."""
        try:
            return self.vocab.unpack(list(ids))
        except TokensError:
            return None

    def media(self, task: str, text: str, constrained: bool, most: int, seed: int) -> Tokens | None:
        """The picture or the speech of a text; None where the model wrote something else."""
        beginning = self.vocab.pack([prompt(task, text)])
        modality = TASKS[task]
        parts = self.parts(self.continue_from(beginning, most, constrained, modality if constrained else None, seed))
        found = [p for p in parts or [] if isinstance(p, Tokens) and p.spec.modality == modality]
        return found[0] if parts is not None and len(found) == 1 and int(found[0].lengths[0]) else None

    def text_of(self, item: Tokens, seed: int = 0, most: int = 60) -> str:
        """What the model says of a picture or of speech."""
        ids = self.continue_from(self.vocab.pack([item], header=False), most, True, None, seed)
        return "".join(p for p in self.parts(ids) or [] if isinstance(p, str))


def validity(writer: Writer, pairs: dict[str, Pairs], split: str, most: int, limits: dict[str, int]) -> dict[str, Any]:
    """The share of texts that become exactly one valid item of the right kind, freely and under the grammar."""
    found: dict[str, Any] = {}
    for task, modality in TASKS.items():
        own = pairs[modality]
        rows = own.rows(split)[:most]
        for way, constrained in (("free", False), ("constrained", True)):
            good = [
                writer.media(task, own.texts[i], constrained, limits[modality], seed=i) is not None
                for i in tqdm(rows, desc=f"{modality}, {way}", mininterval=2)
            ]
            found[f"{modality} {way}"] = float(np.mean(good))
    return found


def write_page(
    path: Path, writer: Writer, pairs: dict[str, Pairs], image: Any, audio: Any, scores: list[list[str]], count: int
) -> dict[str, list[tuple[str, str]]]:
    """Samples on held-out texts, pictures and recordings; returns the texts that were written beside the true ones."""
    sections: list[Section] = [TableSection("What it knows, on held-out pairs", scores[1:], scores[0])]
    said: dict[str, list[tuple[str, str]]] = {}
    for task, modality in TASKS.items():
        own = pairs[modality]
        rows = own.rows("test")[:count]
        limit = {"image": 80, "audio": int(SOUND_SECONDS * 50 * writer.num_codebooks["audio"])}[modality]
        for i in rows:
            made = writer.media(task, own.texts[i], True, limit, seed=i)
            if made is None:
                continue
            if modality == "image":
                truth, drawn = (image.decode(t, size=(96, 96))[0] for t in (own.tokens[i], made))
                sections.append(
                    ImageSection(
                        f"drawn: {own.texts[i]}",
                        truth.numpy(),
                        drawn.numpy(),
                        "left: decode of the true codes",
                        gain=1.0,
                    )
                )
            else:
                heard = [("decode of the true codes", own.tokens[i]), ("spoken by the model", made)]
                sounds = [(name, audio.decode(t)[0].numpy()) for name, t in heard]
                rate = int(own.tokens[i].side["sample_rate"][0])  # at which the true one comes back
                true = resample(torch.from_numpy(sounds[0][1]), rate, audio.sample_rate).numpy()
                sounds = [(sounds[0][0], true), sounds[1]]
                longest = max(y.shape[1] for _, y in sounds)
                sounds = [(name, np.pad(y, ((0, 0), (0, longest - y.shape[1])))) for name, y in sounds]
                sections.append(SoundsSection(f"said: {own.texts[i]}", sounds, audio.sample_rate))
        said[modality] = [(own.texts[i], writer.text_of(own.tokens[i], seed=i)) for i in rows]
        kind = {"image": "captions written of pictures", "audio": "transcripts written of speech"}[modality]
        sections.append(TableSection(kind, [list(pair) for pair in said[modality]], ["true", "written"]))
    write_report(path, "A small language model that reads and writes text, pictures and speech", sections)
    return said
