"""Constrained decoding: a logits processor with which every generation is a document that `Vocab.unpack` reads.

`DocumentLogits` goes into ``model.generate(logits_processor=[...])`` of transformers and needs nothing of it;
`allowed_mask` is the same for one sequence; `generate` packs the usual call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmtok.lm.rows import Bounds, Row, Rules, open_from
from mmtok.tokens import Tokens, TokensError
from mmtok.vocab.salvage import SalvageReport
from mmtok.vocab.vocab import Vocab

MASKS = 256  # kept at most, (V,) bool each


class DocumentLogits:
    """A logits processor that lets a model write nothing but documents: any generation unpacks.

    One state a row moves on by the ids that are new; rows may change places (beam search), end at different times, and
    begin with different padding. A row whose ids do not continue what was seen is read again from its start. One
    object serves one call of ``generate``: use a new one, or `reset`, for the next. Masks are cached by
    what is allowed, so a step costs little Python a row and one masked fill.

    Args:
        vocab: whose documents. Ids of the model past ``vocab.size`` (a padded embedding) are never allowed but as eos.
        prompt_length: leading ids of each row, padding included, that are the prompt; 0: what the first call shows. A
            prompt must be the beginning of a document, with headers or without, and may end inside a segment, which
            generation then goes on with. Nothing in it ends a document.
        header: as in `Grammar`, for the segments that are generated; False is what a model wants that generates codes.
            A header that is generated holds the number of levels and sizes (any values), but neither a length nor
            named tensors.
        num_codebooks: levels of a segment without header, {modality: count}; a modality not named may have any number.
        modality: the first thing that is generated is a segment of this modality; anything may follow it.
        lengths: {modality: (least, most)} positions of a segment, None = open. Without an entry a sound may have any
            number, and a picture has exactly ``spec.num_tokens``: pass (1, None) for tokenizers of dynamic length or of
            grids, where that is only the largest number.
        eos_id: what ends a row: ids of text, or past the vocab; allowed only where the document is complete. After it
            a row is left alone (transformers pads it). A segment's end marker is possible too: it ends the row there.
        max_length: ids of a row in all, prompt and padding included (``prompt + max_new_tokens``): a segment opens only
            where it can still close, and closes before the room runs out, with all levels of all its positions.
        pad_id: what fills rows from the left. Only needed where it is no id of text; a leading run of it is skipped.

    Raises:
        ValueError: arguments that do not fit the vocab; on a call also TokensError for a prompt that is no beginning of
            a document, and ValueError for scores of fewer ids than the vocab and where max_length leaves no way out.
    """

    def __init__(
        self,
        vocab: Vocab,
        prompt_length: int = 0,
        header: bool | None = False,
        num_codebooks: Mapping[str, int] | None = None,
        modality: str | None = None,
        lengths: Bounds | None = None,
        eos_id: int | Sequence[int] | None = None,
        max_length: int | None = None,
        pad_id: int | None = None,
    ) -> None:
        if prompt_length < 0:
            raise ValueError(f"prompt_length: expected an integer >= 0, got {prompt_length}")
        self.vocab, self.prompt_length, self.pad_id = vocab, prompt_length, pad_id
        self.rules = Rules(vocab, header, num_codebooks, modality, lengths, eos_id, max_length)
        self._masks: dict[tuple, Tensor] = {}
        self.reset()

    def reset(self) -> None:
        """Forget the rows: the next call begins another generation."""
        self._rows: list[Row] = []
        self._known: Tensor | None = None  # (B, S), the ids that the rows have read
        self._prompts: Tensor | None = None  # (B, P), those that were prompts

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, S) ids and (B, V) scores -> (B, V) scores of the same dtype, -inf where an id may not follow."""
        V = scores.shape[1]
        if self.vocab.size > V:
            raise ValueError(
                f"scores: expected at least {self.vocab.size} ids, got {V}; resize the model with mmtok.lm.extend"
            )
        self._follow(input_ids)
        masks = [self._mask(row, V, scores.device) for row in self._rows]
        forbidden = masks[0][None] if all(m is masks[0] for m in masks) else torch.stack(masks)  # (1 or B, V)
        out = scores.masked_fill(forbidden | scores.isnan(), float("-inf"))
        # an earlier processor may have left nothing of what is allowed: then all of that is as good
        lost = (out.amax(1, keepdim=True) == float("-inf")) & ~forbidden
        return out.masked_fill(lost, 0.0)

    def allowed(self, input_ids: Tensor) -> Tensor:
        """(B, vocab.size) bool for ids (B, S): what may follow each row."""
        self._follow(input_ids)
        masks = [~self._forbidden(row.allowed(), self.vocab.size, torch.device("cpu")) for row in self._rows]
        return torch.stack(masks) if masks else torch.zeros(0, self.vocab.size, dtype=torch.bool)

    def _follow(self, input_ids: Tensor) -> None:
        """Bring the rows to (B, S) ids."""
        if input_ids.ndim != 2 or not len(input_ids):
            raise ValueError(f"input_ids: expected (B, S) with B >= 1, got {tuple(input_ids.shape)}")
        parents = self._parents(input_ids)
        if parents is None:
            self._begin(input_ids)
        else:
            assert self._known is not None
            new, rows = input_ids[:, self._known.shape[1] :].tolist(), []
            for b, parent in enumerate(parents):
                if parent < 0:  # of the same prompt, another way on
                    rows.append(self._read(input_ids[b].tolist(), self._prompt_of(input_ids)))
                    continue
                rows.append(self._rows[parent].fork() if parents.count(parent) > 1 else self._rows[parent])
                for i in new[b]:
                    rows[-1].push(i)
            self._rows = rows
        self._known = input_ids.clone()  # beam search writes into its own

    def _prompt_of(self, input_ids: Tensor) -> int:
        if self.prompt_length:
            return self.prompt_length
        return input_ids.shape[1] if self._prompts is None else self._prompts.shape[1]

    def _parents(self, input_ids: Tensor) -> list[int] | None:
        """For each row the known one that it continues, -1 where it only shares the prompt; None: all is new."""
        known, prompts = self._known, self._prompts
        if known is None or prompts is None or known.device != input_ids.device:
            return None
        B, S0, P = len(input_ids), known.shape[1], prompts.shape[1]
        if input_ids.shape[1] < P:
            return None
        parents = [-1] * B
        if input_ids.shape[1] >= S0:
            head = input_ids[:, :S0]
            if len(known) == B:
                if torch.equal(head, known):
                    return list(range(B))
                same = (head == known).all(1).tolist()
                parents = [b if same[b] else -1 for b in range(B)]
            for b in range(B):
                if parents[b] < 0:
                    parents[b] = _first((known == head[b]).all(1))
        for b in range(B):
            if parents[b] < 0 and _first((prompts == input_ids[b, :P]).all(1)) < 0:
                return None
        return parents

    def _begin(self, input_ids: Tensor) -> None:
        self._prompts = None
        P = self._prompt_of(input_ids)
        if input_ids.shape[1] < P:
            raise ValueError(f"prompt_length: expected at most the {input_ids.shape[1]} ids of a row, got {P}")
        self._prompts = input_ids[:, :P].clone()
        self._rows, seen = [], {}
        for b, ids in enumerate(input_ids.tolist()):
            if (row := seen.get(tuple(ids))) is None:
                try:
                    row = seen[tuple(ids)] = self._read(ids, P)
                except TokensError as e:
                    raise TokensError(f"row {b} of the prompts: {e}") from e
                self._rows.append(row)
            else:
                self._rows.append(row.fork())

    def _read(self, ids: list[int], P: int) -> Row:
        """The row of ids whose first P are the prompt."""
        first = 0
        while self.pad_id is not None and first < P and ids[first] == self.pad_id:
            first += 1
        start = first + open_from(self.vocab, ids[first:P])
        self.vocab.unpack(ids[first:start])  # the closed part, at once
        row = Row(self.rules, start)
        row.resume(ids[start:P])
        for i in ids[P:]:
            row.push(i)
        return row

    def _mask(self, row: Row, V: int, device: torch.device) -> Tensor:
        if row.done or row.dead:
            return self._forbidden(None, V, device)
        return self._forbidden(row.allowed(), V, device)

    def _forbidden(self, allowed: list[range] | None, V: int, device: torch.device) -> Tensor:
        """(V,) bool, true outside of ``allowed``; None: nowhere."""
        key = (V, device, None if allowed is None else tuple(allowed))
        if (mask := self._masks.pop(key, None)) is None:
            mask = torch.full((V,), allowed is not None)
            for r in allowed or ():
                mask[r.start : r.stop] = False
            mask = mask.to(device)
            if len(self._masks) >= MASKS:
                del self._masks[next(iter(self._masks))]  # the one not used for longest
        self._masks[key] = mask
        return mask


def allowed_mask(
    vocab: Vocab,
    ids: Sequence[int],
    prompt_length: int = 0,
    header: bool | None = False,
    num_codebooks: Mapping[str, int] | None = None,
    modality: str | None = None,
    lengths: Bounds | None = None,
    max_length: int | None = None,
) -> Tensor:
    """(vocab.size,) bool: the ids that may follow ``ids``; the options are those of `DocumentLogits`.

    For a loop of one's own, and for loss masks. Reads all ids at each call: hold a `DocumentLogits` and use its
    ``allowed`` while generating.
    """
    end = None if vocab.text_size else vocab.size  # past the mask: where nothing is allowed, the document must end
    processor = DocumentLogits(vocab, prompt_length, header, num_codebooks, modality, lengths, end, max_length)
    return processor.allowed(torch.tensor([list(ids)], dtype=torch.int64))[0]


@dataclasses.dataclass(frozen=True)
class Generation:
    """What a model wrote after one prompt.

    Args:
        ids: the new ids, without the end of sequence and the padding behind it.
        parts: texts and Tokens, as `Vocab.unpack` gives them. Where the prompt ended inside a segment, the first part
            is the whole segment, the prompt's codes too.
        report: what had to be dropped to read them; nothing where the decoding was constrained.
    """

    ids: list[int]
    parts: list[str | list[int] | Tokens]
    report: SalvageReport


@torch.no_grad()
def generate(
    model: Any,
    vocab: Vocab,
    prompt_ids: Sequence[Sequence[int]],
    max_new_tokens: int,
    constrained: bool = True,
    header: bool | None = False,
    num_codebooks: Mapping[str, int] | None = None,
    modality: str | None = None,
    one_segment: bool = False,
    lengths: Bounds | None = None,
    eos_id: int | Sequence[int] | None = None,
    pad_id: int | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    num_beams: int = 1,
    guidance_scale: float = 1.0,
    negative_prompt_ids: Sequence[int] | None = None,
    streamer: Any = None,
) -> list[Generation]:
    """Continue each prompt with a causal model of transformers, and read what it wrote.

    Args:
        model: with ``generate``, its head of at least ``vocab.size`` ids (`mmtok.lm.extend`).
        prompt_ids: a list of prompts; shorter ones are padded on the left and masked.
        constrained: with `DocumentLogits`, and the prompts must be beginnings of documents; else the model writes what
            it likes, and `Vocab.salvage` reads it.
        header, num_codebooks, modality, lengths: as in `DocumentLogits` (only where constrained).
        one_segment: stop at the end of the first segment of ``modality``.
        eos_id: None = that of ``model.generation_config``.
        pad_id: None = the first eos, or 0.
        top_k: None = all ids.
        guidance_scale: of classifier-free guidance (arXiv 2306.17806, equation 7; 1 = none), against
            ``negative_prompt_ids`` (None: the last id of the prompt alone).
        streamer: of transformers, or `mmtok.lm.streaming.PlayIds`; for one prompt without beams.

    Returns:
        A `Generation` for each prompt.

    Raises:
        ValueError: prompts that are no list of lists of ids, one_segment without modality, and as `DocumentLogits`.
    """
    rows = [list(ids) if isinstance(ids, Sequence) and not isinstance(ids, str) else None for ids in prompt_ids]
    prompts = [row for row in rows if row]
    if not prompts or len(prompts) < len(rows):
        raise ValueError("prompt_ids: expected a list of prompts, each a list of at least one id; write [ids] for one")
    if one_segment and modality is None:
        raise ValueError("one_segment: expected a modality whose segment it is, got modality=None")
    config_eos = getattr(model.generation_config, "eos_token_id", None)
    given = config_eos if eos_id is None else eos_id
    eos = [] if given is None else [given] if isinstance(given, int) else list(given)
    eos += [vocab.blocks[modality].end] if one_segment and modality in vocab.blocks else []
    pad = pad_id if pad_id is not None else eos[0] if eos else 0
    S = max(map(len, prompts))
    ids = torch.tensor([[pad] * (S - len(row)) + row for row in prompts], device=model.device)
    mask = torch.tensor([[0] * (S - len(row)) + [1] * len(row) for row in prompts], device=model.device)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": do_sample}
    if do_sample:
        options |= {"temperature": temperature, "top_k": top_k or 0, "top_p": top_p}
    if guidance_scale != 1.0:
        options["guidance_scale"] = guidance_scale
        if negative_prompt_ids is not None:
            options["negative_prompt_ids"] = torch.tensor([list(negative_prompt_ids)] * len(ids), device=model.device)
    if constrained:
        limit = S + max_new_tokens
        rules = DocumentLogits(vocab, S, header, num_codebooks, modality, lengths, eos, limit, pad)
        options["logits_processor"] = [rules]
    if streamer is not None:
        options["streamer"] = streamer
    out = model.generate(ids, attention_mask=mask, eos_token_id=eos or None, pad_token_id=pad, **options)
    return [
        _generation(vocab, prompt, row[S:], eos, constrained, num_codebooks)
        for prompt, row in zip(prompts, out.tolist(), strict=True)
    ]


def _generation(
    vocab: Vocab,
    prompt: list[int],
    new: list[int],
    eos: list[int],
    constrained: bool,
    num_codebooks: Mapping[str, int] | None,
) -> Generation:
    end = next((n for n, i in enumerate(new) if i in eos), len(new))
    ends = {block.end for block in vocab.blocks.values()}
    new = new[: end + (end < len(new) and new[end] in ends)]  # an end marker is a part of its segment
    document = prompt[open_from(vocab, prompt) :] + new
    if constrained:
        return Generation(new, vocab.unpack(document), SalvageReport())
    saved = vocab.salvage(document, num_codebooks=num_codebooks)
    return Generation(new, saved.parts, saved.report)


def _first(true: Tensor) -> int:
    found = true.nonzero()
    return int(found[0]) if len(found) else -1
