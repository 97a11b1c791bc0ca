"""`MultimodalProcessor`: texts with pictures and sounds -> ids, mask and labels of a language model, and back."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtok.auto import available, card
from mmtok.auto import load as load_tokenizer
from mmtok.data.audio import Sound
from mmtok.data.images import Picture
from mmtok.lm.chat import PLAIN_TEMPLATE, flat_message, unused
from mmtok.lm.extend import TextPart, check_source, check_tokenizer, package, record_of, token_names, vocab_of
from mmtok.lm.media import shown, tokens_for
from mmtok.tokenizer import Tokenizer
from mmtok.tokens import Tokens, write_atomic
from mmtok.vocab import Vocab
from mmtok.vocab.salvage import SalvageReport

FILE = "mmtok_processor.json"
FORMAT = "mmtok-processor-1"
IGNORED = -100  # a label that the loss of transformers leaves out

Spans = str | Sequence[tuple[int, int]] | None
Mark = tuple[int, int, Tokens]  # first and past-the-last character of a placeholder, and what stands there


@dataclasses.dataclass
class Decoded:
    """What a sequence of ids says.

    Args:
        parts: in their order, str, and `Picture` and `Sound` (or Tokens, where decoding was not asked for or failed).
        report: what of a damaged sequence was dropped; ``report.ok`` where nothing was.
        failed: place in ``parts`` -> why its Tokens could not be decoded.
    """

    parts: list[str | Tokens | Picture | Sound]
    report: SalvageReport
    failed: dict[int, str]


class MultimodalProcessor:
    """Texts with the placeholders ``<image>`` and ``<audio>``, pictures and sounds -> what a causal LM takes.

    Args:
        tokenizer: the text tokenizer, extended by `mmtok.lm.extend.extend` or not: text is read in the same way.
        vocab: whose ids.
        image, audio: the mmtok tokenizers, or their names for `mmtok.load`; without one, only Tokens can be given.

    Raises:
        ValueError: a tokenizer that is not the vocab's.
    """

    def __init__(
        self, tokenizer: Any, vocab: Vocab, image: Tokenizer | str | None = None, audio: Tokenizer | str | None = None
    ) -> None:
        self.tokenizer, self.vocab = tokenizer, vocab
        self.tokenizers: dict[str, Tokenizer] = {}
        self.names: dict[str, str] = {}
        for modality, given in (("image", image), ("audio", audio)):
            if given is not None:
                found = load_tokenizer(given) if isinstance(given, str) else given
                check_source(vocab, modality, found)
                self.tokenizers[modality] = found
                self.names[modality] = given if isinstance(given, str) else found.name
        if not vocab.blocks:
            raise ValueError("vocab: expected one with new ids, got text alone; build it with image= or audio=")
        if not tokenizer.get_vocab().keys().isdisjoint(token_names(vocab, tokenizer.get_vocab())):
            check_tokenizer(tokenizer, vocab)
        self._text = TextPart(tokenizer, vocab.text_size)
        self._plain = vocab_of(record_of(vocab))  # its texts are ids: special tokens can be told from words
        self._placeholder = re.compile("|".join(f"<{m}>" for m in vocab.blocks))

    def __call__(
        self,
        text: str | Sequence[str],
        images: Any = None,
        audio: Any = None,
        sampling_rate: int | None = None,
        padding: bool = True,
        header: bool = True,
        labels: Any = None,
        add_special_tokens: bool = False,
        return_tensors: str | None = "pt",
    ) -> dict[str, Any]:
        """Ids of one text or of a batch, always with a batch axis.

        Args:
            text: each ``<image>`` and ``<audio>`` in it takes the next picture or sound.
            images, audio: paths, PIL images, arrays, tensors or Tokens: one, a list for the whole batch in reading
                order, or a list with one list a text.
            sampling_rate: Hz of the sounds that are arrays.
            padding: to the longest, on ``tokenizer.padding_side``; False = unequal lengths are refused as tensors.
            header: whether segments say their size and length; see `Vocab.pack`.
            labels: None = none; ``"all"`` = every id is learned; or spans ``[(start, stop), ...]`` of characters of the
                text (a list of such lists for a batch): ids outside get -100. A placeholder inside a span is learned
                with all its codes, a text token if its last character is inside. The ids do not depend on the labels.
            add_special_tokens: also what the tokenizer puts around a text (``<s>``); an end token is learned where the
                end of the text is.
            return_tensors: ``"pt"``, or None for lists.

        Returns:
            ``input_ids`` and ``attention_mask`` (B, S) int64, and ``labels`` (B, S) where asked for.

        Raises:
            ValueError: counts that do not match the placeholders, spans outside the text or through a placeholder, text
                that spells an id of the vocab, or input that a tokenizer refuses.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if not texts or not all(isinstance(t, str) for t in texts):
            raise ValueError(f"text: expected a string or a list of at least one, got {text!r}")
        found = [[(m.start(), m.end(), m[0][1:-1]) for m in self._placeholder.finditer(t)] for t in texts]
        media = {}
        for modality, given in (("image", images), ("audio", audio)):
            counts = [sum(kind == modality for _, _, kind in places) for places in found]
            media[modality] = iter(self._tokens(given, modality, counts, sampling_rate))
        marks = [[(start, stop, next(media[kind])) for start, stop, kind in places] for places in found]
        shared = isinstance(text, str) or labels is None or isinstance(labels, str)
        spans = [labels] * len(texts) if shared else list(labels or ())
        if len(spans) != len(texts):
            raise ValueError(f"labels: expected spans for each of {len(texts)} texts, got {len(spans)}")
        before, after = self._around() if add_special_tokens else ([], [])
        rows = []
        for t, m, s in zip(texts, marks, spans, strict=True):
            ids, learned = self._document(t, m, s, header)
            end = s is not None and (s == "all" or any(stop == len(t) for _, stop in s))
            rows.append(([*before, *ids, *after], [s == "all"] * len(before) + learned + [end] * len(after)))
        return self._batch(rows, padding, labels is not None, return_tensors)

    def apply_chat_template(
        self,
        messages: Sequence[Any],
        images: Any = None,
        audio: Any = None,
        sampling_rate: int | None = None,
        add_generation_prompt: bool = False,
        padding: bool = True,
        header: bool = True,
        labels: str | None = None,
        return_tensors: str | None = "pt",
    ) -> dict[str, Any]:
        """Ids of a conversation (a list of messages) or of a batch of them, by the tokenizer's own template.

        A message is ``{"role": ..., "content": str or parts}``, a part ``{"type": "text", "text": ...}``,
        ``{"type": "image", "image": x}`` or ``{"type": "audio", "audio": x}``; ``path`` instead is a path, and a part
        with neither takes the next of ``images`` or ``audio``. In chats, text is text: ``<image>`` in it is no
        placeholder. A tokenizer without template gets `mmtok.lm.chat.PLAIN_TEMPLATE`.

        Args:
            labels: ``"assistant"`` = what the assistant says is learned, ``"all"``, or None. The others as `__call__`.
        """
        chats = [list(messages)] if messages and isinstance(messages[0], Mapping) else [list(c) for c in messages]
        if not chats or not all(chats):
            raise ValueError("messages: expected a list of messages, or a list of such lists, got an empty one")
        if labels not in (None, "all", "assistant"):
            raise ValueError(f"labels: expected None, 'all' or 'assistant', got {labels!r}")
        sentinel = unused(json.dumps(chats, default=str))
        asked: dict[str, list[list[int]]] = {m: [[] for _ in chats] for m in ("image", "audio")}  # parts without data
        items: list[tuple[str, Any]] = []
        flat = [[flat_message(m, sentinel, items, n, asked) for m in chat] for n, chat in enumerate(chats)]
        tokens: dict[int, Tokens] = {}
        for modality, given in (("image", images), ("audio", audio)):
            late = self._tokens(given, modality, [len(a) for a in asked[modality]], sampling_rate)
            tokens |= dict(zip([n for a in asked[modality] for n in a], late, strict=True))
            own = [n for n, (kind, x) in enumerate(items) if kind == modality and x is not None]
            mine = self._tokens([items[n][1] for n in own], modality, [len(own)], sampling_rate)
            tokens |= dict(zip(own, mine, strict=True))
        rows, seen = [], []
        for chat in flat:
            text = self._render(chat, add_generation_prompt)
            places = list(re.finditer(re.escape(sentinel) + r"(\d+);", text))
            seen += [int(m[1]) for m in places]
            marks = [(m.start(), m.end(), tokens[int(m[1])]) for m in places]
            spans = self._said(chat, text) if labels == "assistant" else labels
            rows.append(self._document(text, marks, spans, header))
        if sorted(seen) != list(range(len(items))):
            raise ValueError(
                f"chat template: expected each of {len(items)} pictures and sounds once, got {len(seen)}: the template "
                "drops or repeats messages; set tokenizer.chat_template to one that shows them all"
            )
        return self._batch(rows, padding, labels is not None, return_tensors)

    def decode(self, ids: Sequence[int] | Tensor, decode: bool = True, skip_special_tokens: bool = True) -> Decoded:
        """What ids (S,) say: texts, and pictures and sounds.

        Any ids are read, a model's too: damage is dropped by `Vocab.salvage` and stands in the report.

        Args:
            ids: of one sequence.
            decode: False leaves Tokens as they are.
            skip_special_tokens: leave the text tokenizer's special tokens (padding, ``</s>``) out of the texts.
        """
        salvaged = self._plain.salvage(ids.tolist() if isinstance(ids, Tensor) else list(ids))
        parts: list[str | Tokens | Picture | Sound] = []
        failed: dict[int, str] = {}
        for part in salvaged.parts:
            if not isinstance(part, Tokens):
                text = self.tokenizer.decode(
                    part, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
                )
                parts += [text] if text else []
                continue
            tokenizer = self.tokenizers.get(part.spec.modality)
            if not decode or tokenizer is None:
                if decode:
                    failed[len(parts)] = f"no {part.spec.modality} tokenizer was given"
                parts.append(part)
                continue
            try:
                parts.append(shown(tokenizer, part))
            except ValueError as e:  # the header or the codes of a model may be legal and yet describe nothing
                failed[len(parts)] = str(e)
                parts.append(part)
        return Decoded(parts, salvaged.report, failed)

    def batch_decode(
        self, ids: Sequence[Sequence[int]] | Tensor, decode: bool = True, skip_special_tokens: bool = True
    ) -> list[Decoded]:
        """`decode` of each row of ids (B, S)."""
        return [self.decode(row, decode, skip_special_tokens) for row in ids]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what rebuilds the processor: the text tokenizer, the vocab, the names of the mmtok tokenizers.

        One of ours whose name is not a shipped one is saved whole, in the folders ``image`` and ``audio``.
        """
        folder = Path(folder)
        self.tokenizer.save_pretrained(folder)
        named = {}
        for modality, tokenizer in self.tokenizers.items():
            name = self.names[modality]
            named[modality] = {"name": name, "folder": None}
            shipped = name in available() and card(name)["fingerprint"] == tokenizer.fingerprint
            if not shipped and not tokenizer.type_name.startswith("wrapper:"):
                tokenizer.save(folder / modality)
                named[modality]["folder"] = modality
        about = {"format": FORMAT, "vocab": record_of(self.vocab), "tokenizers": named}
        write_atomic(folder / FILE, (json.dumps(about, indent=2) + "\n").encode())

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        image: Tokenizer | str | None = None,
        audio: Tokenizer | str | None = None,
        device: str | torch.device = "cpu",
    ) -> MultimodalProcessor:
        """Read what `save_pretrained` wrote.

        Args:
            folder: a folder, which may also hold the model.
            image, audio: instead of the recorded ones, e.g. where another package's weights lie here; checked.
            device: where recorded tokenizers go.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise FileNotFoundError(f"no {FILE} in {folder}; MultimodalProcessor.save_pretrained writes one")
        about = json.loads(path.read_text())
        if about.get("format") != FORMAT:
            raise ValueError(f"{path}: expected format {FORMAT!r}, got {about.get('format')!r}")
        tokenizer = package("transformers").AutoTokenizer.from_pretrained(folder)
        found: dict[str, Tokenizer | str | None] = {"image": image, "audio": audio}
        named = {m: n for m, n in about["tokenizers"].items() if found[m] is None}
        for modality, entry in named.items():
            place = entry["name"] if entry["folder"] is None else Path(folder) / entry["folder"]
            try:
                found[modality] = load_tokenizer(place, device)
            except ValueError as e:
                raise ValueError(
                    f"{path}: the {modality} tokenizer {entry['name']!r} is not here ({e}); pass "
                    f"{modality}=mmtok.load(...)"
                ) from e
        out = cls(tokenizer, vocab_of(about["vocab"], tokenizer), found["image"], found["audio"])
        out.names |= {m: n["name"] for m, n in named.items()}
        return out

    def _tokens(self, given: Any, modality: str, counts: list[int], rate: int | None) -> list[Tokens]:
        return tokens_for(given, modality, counts, self.vocab, self.tokenizers.get(modality), rate)

    def _document(self, text: str, marks: Sequence[Mark], spans: Spans, header: bool) -> tuple[list[int], list[bool]]:
        """Ids of a text with what stands at its marks, and which of them are learned."""
        if isinstance(spans, str) and spans != "all":
            raise ValueError(f"labels: expected 'all' or spans (start, stop) of the text, got {spans!r}")
        whole = [(0, len(text))] if spans == "all" else [] if spans is None else [tuple(s) for s in spans]
        for span in whole:
            if len(span) != 2 or not 0 <= span[0] <= span[1] <= len(text):
                raise ValueError(
                    f"labels: expected 'all' or spans (start, stop) within the text's 0..{len(text)}, got {spans!r}"
                )
        ids: list[int] = []
        learned: list[bool] = []
        at = 0
        for start, stop, tokens in [*marks, (len(text), len(text), None)]:
            for i, last in self._text_ids(text, at, start, bool(whole)):
                ids.append(i)
                learned.append(any(a <= last < b for a, b in whole))
            if tokens is not None:
                segment = self.vocab.pack([tokens], header)
                ids += segment
                inside = [a <= start and stop <= b for a, b in whole]
                if cut := [s for s in whole if start < s[0] < stop or start < s[1] < stop]:
                    raise ValueError(f"labels: the span {cut[0]} cuts the placeholder at {start}..{stop}")
                learned += [any(inside)] * len(segment)
            at = stop
        return ids, learned

    def _text_ids(self, text: str, start: int, stop: int, places: bool) -> Iterator[tuple[int, int]]:
        """Ids of ``text[start:stop]``, each with the place of its last character in ``text``."""
        part = text[start:stop]
        if not part:
            return
        ids = self._text.encode(part)
        if not places:
            yield from ((i, 0) for i in ids)
            return
        found = self.tokenizer(part, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        for i, (a, b) in zip(ids, found, strict=True):
            yield i, start + (b - 1 if b > a else a)

    def _around(self) -> tuple[list[int], list[int]]:
        """The ids that the tokenizer puts before and after a text."""
        inner = self.tokenizer.encode("a", add_special_tokens=False)
        outer = self.tokenizer.encode("a", add_special_tokens=True)
        n = next(n for n in range(len(outer)) if outer[n : n + len(inner)] == inner)
        return outer[:n], outer[n + len(inner) :]

    def _render(self, chat: list[dict[str, Any]], prompt: bool) -> str:
        template = self.tokenizer.chat_template or PLAIN_TEMPLATE
        return self.tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=prompt, chat_template=template
        )

    def _said(self, chat: list[dict[str, Any]], text: str) -> list[tuple[int, int]]:
        """Spans of ``text`` that the assistant says: from where a prompt would end to the end of its message."""
        spans = []
        for n, message in enumerate(chat):
            if message["role"] != "assistant":
                continue
            before = self._render(chat[:n], True) if n else ""
            after = self._render(chat[: n + 1], False)
            if not text.startswith(before) or not text.startswith(after):
                raise ValueError(
                    "labels='assistant': this chat template writes earlier messages differently once later ones stand "
                    "there, so what was said cannot be told; use __call__ with spans of the rendered text"
                )
            spans.append((len(before), len(after)))
        return spans

    def _batch(
        self, rows: list[tuple[list[int], list[bool]]], padding: bool, labels: bool, return_tensors: str | None
    ) -> dict[str, Any]:
        if return_tensors not in ("pt", None):
            raise ValueError(f"return_tensors: expected 'pt' or None, got {return_tensors!r}")
        longest = max(len(ids) for ids, _ in rows)
        if not padding and return_tensors and any(len(ids) < longest for ids, _ in rows):
            raise ValueError("padding=False: expected texts of one length, got several; use padding=True")
        filler = self.tokenizer.pad_token or self.tokenizer.eos_token  # nothing reads it where the mask is 0
        pad = 0 if filler is None else self.tokenizer.convert_tokens_to_ids(filler)
        left = self.tokenizer.padding_side == "left"
        out: dict[str, Any] = {"input_ids": [], "attention_mask": []} | ({"labels": []} if labels else {})
        for ids, learned in rows:
            gap = longest - len(ids) if padding else 0
            columns = {"input_ids": (ids, pad), "attention_mask": ([1] * len(ids), 0)}
            if labels:
                targets = [i if yes else IGNORED for i, yes in zip(ids, learned, strict=True)]
                columns["labels"] = (targets, IGNORED)
            for name, (values, blank) in columns.items():
                out[name].append([blank] * gap + values if left else values + [blank] * gap)
        return {k: torch.tensor(v, dtype=torch.int64) for k, v in out.items()} if return_tensors else out
