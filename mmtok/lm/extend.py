"""Give a text model the ids of a `Vocab`: tokens in its tokenizer, rows in its matrices, a record in its config.

The record (``config.mmtok``) is plain JSON, so it travels with ``save_pretrained``; `load` and `saved_vocab` rebuild
the vocab from it and refuse tokenizers whose fingerprints are not the recorded ones.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmtok.lm.initialise import INITS, Donor, Rule, Source, Start
from mmtok.tokenizer import Tokenizer
from mmtok.tokens import TokensError, TokenSpec
from mmtok.vocab import Vocab

RECORD = "mmtok-vocab-1"


class Loaded(NamedTuple):
    """A model, its text tokenizer (None where the folder has none) and the vocab of its ids."""

    model: Any
    tokenizer: Any
    vocab: Vocab


class TextPart:
    """The text ids of a tokenizer that was extended since, as `Vocab` asks for them: ``len`` is their number alone."""

    def __init__(self, tokenizer: Any, size: int) -> None:
        self.tokenizer, self.size = tokenizer, size

    def __len__(self) -> int:
        return self.size

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Ids of ``text``; TokensError where it spells a token of the vocab, which only Tokens may become."""
        ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        if foreign := [i for i in ids if i >= self.size]:
            name = self.tokenizer.convert_ids_to_tokens(foreign[0])
            raise TokensError(
                f"text: expected words only, got {name!r}, which is a token of a picture or a sound; take it out of "
                f"the text {text[:40]!r}, or give the picture or sound itself"
            )
        return ids

    def decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)


def extend(
    model: Any,
    tokenizer: Any,
    vocab: Vocab,
    init: str | Rule = "mean_covariance",
    sources: Mapping[str, Source] | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Make a causal LM and its tokenizer speak ``vocab``, in place.

    The tokenizer gets `Vocab.token_strings` as added tokens that are never split, normalised or stripped around; they
    are no "special" tokens, so ``decode(skip_special_tokens=True)`` keeps them. Both matrices get exactly
    ``vocab.size`` rows: rows that only padded the matrix beyond the text ids are new ids now, or gone. Rows of text ids
    stay as they are. New entries of a head's bias are the mean of the old. A tokenizer that has this vocab's tokens
    already (another model was extended with it) is left as it is. Where the vocab has more text ids than the tokenizer
    has, tokens ``<|unused_..|>`` fill the gap.

    Args:
        model: any causal LM of transformers. Extend before LoRA wraps it or an optimizer holds its parameters.
        tokenizer: its fast tokenizer, the one the vocab was built with; None for a vocab whose text is a number.
        vocab: ``vocab.text_size`` text ids, then the new ones.
        init: a key of `mmtok.lm.initialise.INITS`, or a rule: ``Projected("whitened")``, ``OMP(donor=...)``, or your
            own function ``Start -> (N, D)``.
        sources: for rules that read codebooks: {modality: tokenizer, or one (K, d) tensor a level}.
        generator: of the rule's draws (CPU); None = torch's own.

    Raises:
        ValueError: names or ids clash, the model lacks rows of text ids, or the rule cannot be carried out. Model and
            tokenizer are unchanged then. ImportError: transformers or tokenizers is missing.
    """
    if getattr(model.config, "mmtok", None) == record_of(vocab):
        raise ValueError(
            "model: expected one without this vocab, got one that was extended with it: its rows would be drawn anew; "
            "read its vocab with saved_vocab(model), or `del model.config.mmtok` to begin again"
        )
    embedding, head = _matrices(model)
    V, N = vocab.text_size, vocab.size - vocab.text_size
    if N == 0:
        raise ValueError("vocab: expected one with new ids, got text alone; build it with image= or audio=")
    if len(embedding.weight) < V:
        raise ValueError(
            f"model: expected a row for each of the {V} text ids, got {len(embedding.weight)}; "
            "model.resize_token_embeddings(len(tokenizer)) first, if the tokenizer was given tokens of its own"
        )
    if tokenizer is None and vocab.tokenizer is not None:
        raise ValueError("tokenizer: expected the one that the vocab reads text with, got None")
    names, missing = ([], []) if tokenizer is None else _names(tokenizer, vocab)
    rule = INITS[init]() if isinstance(init, str) and init in INITS else init
    if isinstance(rule, str):
        raise ValueError(f"init: expected one of {sorted(INITS)} or a rule of mmtok.lm.initialise, got {init!r}")
    tied = head.weight is embedding.weight
    rows = [
        _start_rows(rule, matrix.weight, is_head, model, vocab, sources, generator)
        for matrix, is_head in ([(embedding, False)] if tied else [(embedding, False), (head, True)])
    ]
    if missing:
        _add_tokens(tokenizer, missing, names, vocab)
    model.resize_token_embeddings(vocab.size, mean_resizing=False)
    embedding, head = _matrices(model)
    with torch.no_grad():
        embedding.weight[V:] = rows[0].to(embedding.weight)
        if head.weight is not embedding.weight:
            head.weight[V:] = rows[-1].to(head.weight)
        if getattr(head, "bias", None) is not None and V:
            head.bias[V:] = head.bias[:V].mean()
    model.config.mmtok = record_of(vocab)


def _matrices(model: Any) -> tuple[nn.Embedding, nn.Linear]:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or not isinstance(getattr(embedding, "weight", None), Tensor):
        raise ValueError(f"model: expected a causal LM with embeddings and a head, got {type(model).__name__}")
    if embedding.weight.is_meta or not embedding.weight.is_floating_point():
        raise ValueError(
            f"model: expected floating-point embeddings in memory, got {embedding.weight.dtype} on "
            f"{embedding.weight.device}; load it unquantised and without device_map='meta'"
        )
    return embedding, head


def _start_rows(
    rule: Rule,
    weight: Tensor,
    head: bool,
    model: Any,
    vocab: Vocab,
    sources: Mapping[str, Source] | None,
    generator: torch.Generator | None,
) -> Tensor:
    std = getattr(model.config.get_text_config(), "initializer_range", None)
    old = weight[: vocab.text_size].detach().cpu().float()
    start = Start(old, vocab, head, std, sources or {}, generator)
    rows, wanted = rule(start), (start.count, weight.shape[1])
    if not isinstance(rows, Tensor) or tuple(rows.shape) != wanted or not bool(rows.isfinite().all()):
        found = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise ValueError(f"init: expected finite rows {wanted}, got {found}; are the text rows finite?")
    return rows


def token_names(vocab: Vocab, known: Mapping[str, int]) -> list[str]:
    """A string for each new id, as `Vocab.token_strings`; a marker that text has already is named ``<|mm_..`` instead.

    Qwen's text tokenizers have ``<|image_pad|>``, LLaVA's ``<image>``, for other purposes.

    Args:
        known: the tokenizer's ``get_vocab()``.

    Raises:
        ValueError: codes are text ids already.
    """
    names = vocab.token_strings()
    lengths = [len(r) for r in list(vocab.ranges.values())[1:] for _ in r]
    for n, (name, length) in enumerate(zip(names, lengths, strict=True)):
        if known.get(name, vocab.text_size) < vocab.text_size:
            if length > 1:
                raise ValueError(
                    f"tokenizer: {name!r} is its id {known[name]}, a text id of this vocab: it was extended before; "
                    "rebuild its vocab by saved_vocab(model, tokenizer), or load the text tokenizer anew"
                )
            cut = next(i for i, c in enumerate(name) if c.isalpha())
            names[n] = f"{name[:cut]}mm_{name[cut:]}"
    return names


def _names(tokenizer: Any, vocab: Vocab) -> tuple[list[str], list[str]]:
    """Names of the new ids, and the strings to add: none where all are there."""
    known: dict[str, int] = tokenizer.get_vocab()
    names = token_names(vocab, known)
    if [known.get(name) for name in names] == list(range(vocab.text_size, vocab.size)):
        return names, []
    if taken := [name for name in names if name in known]:
        raise ValueError(
            f"tokenizer: {len(taken)} names of this vocab stand at other ids, {taken[0]!r} at {known[taken[0]]}: it "
            "was extended with another vocab; load the text tokenizer anew"
        )
    free = max(known.values(), default=-1) + 1
    if free > vocab.text_size:
        raise ValueError(
            f"tokenizer: its ids go up to {free - 1}, but the vocab begins its own at {vocab.text_size}; build it with "
            f"Vocab(text={free}, ...)"
        )
    gap = [f"<|unused_{n:05}|>" for n in range(vocab.text_size - free)]
    return names, [*gap, *names]


def _add_tokens(tokenizer: Any, strings: list[str], names: list[str], vocab: Vocab) -> None:
    added = package("tokenizers").AddedToken
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    tokenizer.add_tokens([added(s, **flags) for s in strings])
    _check_ids(tokenizer, names, vocab)


def _check_ids(tokenizer: Any, names: list[str], vocab: Vocab) -> None:
    found = tokenizer.convert_tokens_to_ids(names)
    wrong = [n for n, i in enumerate(found) if i != vocab.text_size + n][:1]
    if wrong:
        n = wrong[0]
        raise ValueError(
            f"tokenizer: expected {names[n]!r} to be id {vocab.text_size + n}, got {found[n]}; use the tokenizer that "
            "was extended with this vocab, or extend it"
        )


def check_tokenizer(tokenizer: Any, vocab: Vocab) -> None:
    """Raise ValueError unless the tokenizer's added tokens are the ids of ``vocab``."""
    _check_ids(tokenizer, token_names(vocab, tokenizer.get_vocab()), vocab)


def record_of(vocab: Vocab) -> dict[str, Any]:
    """What rebuilds the vocab, as plain JSON values: specs with fingerprints, layouts, ranges."""
    return {
        "format": RECORD,
        "size": vocab.size,
        "text_size": vocab.text_size,
        "layout": dict(vocab.layouts),
        "specs": {m: _plain(b.spec) for m, b in vocab.blocks.items()},
        "ranges": {name: [r.start, r.stop] for name, r in vocab.ranges.items()},
    }


def _plain(spec: TokenSpec) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in spec.to_dict().items()}


def vocab_of(record: Any, tokenizer: Any = None) -> Vocab:
    """The vocab of a record; texts are str where a tokenizer is given, else lists of ids.

    Raises:
        ValueError: no such record, one of another version, or a tokenizer with other ids.
    """
    if not isinstance(record, Mapping) or record.get("format") != RECORD:
        found = record.get("format") if isinstance(record, Mapping) else record
        raise ValueError(f"expected a record of format {RECORD!r}, got {found!r}; mmtok.lm.extend writes one")
    size = record["text_size"]
    specs = {m: TokenSpec.from_dict(s) for m, s in record["specs"].items()}
    text = size if tokenizer is None else TextPart(tokenizer, size)
    vocab = Vocab(text, specs.get("image"), specs.get("audio"), dict(record["layout"]))
    if record_of(vocab)["ranges"] != record["ranges"] or vocab.size != record["size"]:
        raise ValueError(
            f"the record's id ranges {record['ranges']} are not those that this version of mmtok gives, "
            f"{record_of(vocab)['ranges']}; use the version that wrote it"
        )
    return vocab


def saved_vocab(
    model: Any,
    tokenizer: Any = None,
    image: Tokenizer | TokenSpec | None = None,
    audio: Tokenizer | TokenSpec | None = None,
) -> Vocab:
    """The vocab that a model was extended with.

    Args:
        model: the model, or its config.
        tokenizer: the extended text tokenizer; checked. None = texts are lists of ids.
        image, audio: what you mean to encode and decode with; checked. None = not checked.

    Raises:
        ValueError: the model was not extended, or the tokenizer has other ids. TokensError: another fingerprint.
    """
    config = getattr(model, "config", model)
    vocab = vocab_of(getattr(config, "mmtok", None), tokenizer)
    if tokenizer is not None:
        check_tokenizer(tokenizer, vocab)
    check_source(vocab, "image", image)
    check_source(vocab, "audio", audio)
    return vocab


def check_source(vocab: Vocab, modality: str, source: Tokenizer | TokenSpec | None) -> None:
    """Raise TokensError unless ``source`` is the tokenizer of the vocab's modality; None passes."""
    if source is None:
        return
    spec = source.spec if isinstance(source, Tokenizer) else source
    if modality not in vocab.blocks:
        raise TokensError(f"{modality}: this vocab has no {modality} ids, got {spec.name!r}; leave it out")
    mine = vocab.blocks[modality].spec
    if spec.fingerprint != mine.fingerprint or spec.codebook_sizes[: mine.num_codebooks] != mine.codebook_sizes:
        raise TokensError(
            f"{modality}: expected the tokenizer that the vocab was built with, {mine.name!r} (fingerprint "
            f"{mine.fingerprint or 'none'}, codebooks {mine.codebook_sizes}), got {spec.name!r} "
            f"({spec.fingerprint or 'none'}, {spec.codebook_sizes}): its codes mean something else"
        )


def load(
    folder: str | Path,
    image: Tokenizer | TokenSpec | None = None,
    audio: Tokenizer | TokenSpec | None = None,
) -> Loaded:
    """A model that was extended and saved, with its text tokenizer and its vocab; arguments as `saved_vocab`."""
    transformers = package("transformers")
    has_text = any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    config = transformers.AutoConfig.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder) if has_text else None
    vocab = saved_vocab(config, tokenizer, image, audio)  # before the weights are read
    return Loaded(transformers.AutoModelForCausalLM.from_pretrained(folder), tokenizer, vocab)


def donor_of(model: Any, tokenizer: Any, vocab: Vocab) -> Donor:
    """The `Donor` for `OMP`: a model that was extended with the same new ids, over its own text tokenizer.

    Anchors are the text tokens of one spelling in both tokenizers.

    Raises:
        ValueError: the donor's ids are of other tokenizers or layouts, or ``vocab`` has no text tokenizer.
    """
    theirs = saved_vocab(model, tokenizer)
    specs = {m: b.spec for m, b in vocab.blocks.items()}
    if {m: b.spec for m, b in theirs.blocks.items()} != specs:
        raise ValueError(f"donor: expected a model extended with the same tokenizers, {vocab!r}, got {theirs!r}")
    if vocab.tokenizer is None:
        raise ValueError("donor: expected a vocab with a text tokenizer, whose tokens are compared, got a number")
    text: Any = vocab.tokenizer
    here = getattr(text, "tokenizer", text).get_vocab()
    there = tokenizer.get_vocab()
    pairs = sorted((i, there[s]) for s, i in here.items() if s in there)
    pairs = [(i, j) for i, j in pairs if i < vocab.text_size and j < theirs.text_size]
    embedding, head = _matrices(model)
    own = None if head.weight is embedding.weight else head.weight.detach()
    return Donor(embedding.weight.detach(), theirs.text_size, torch.tensor(pairs).reshape(-1, 2), own)


def package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise ImportError(f"mmtok.lm needs the package {name!r}: pip install 'mmtok[lm]'") from e
