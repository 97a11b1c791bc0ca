"""Packed sequences for language models: many documents in one row, each seeing itself only.

    packing = pack_documents(documents, length=2048, eos_id=2, pad_id=0)     # documents: lists of ids
    for batch in PackedBatches(PackedDocuments(packing), batch_size=8).loader(num_workers=2):   # packed_batches.py
        loss = model(**model_inputs(batch)).loss                             # any causal model of transformers

Which documents share a row is the only choice: best fit cuts no document that fits a row and wastes little room (arXiv
2404.10830).
"""

from __future__ import annotations

import dataclasses
import io
import json
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmtok.tokens import smallest_uint, write_atomic

if TYPE_CHECKING:
    import datasets

FORMAT = "mmtok-documents-1"
PADDING = -1  # the document number of padding
IGNORED = -100  # the label that losses leave out


@dataclasses.dataclass
class Packing:
    """Rows of ``length`` ids.

    Args:
        input_ids: (N, S) unsigned integers.
        document: (N, S) int64, which piece an id belongs to, numbered over all rows; PADDING at padding. A document
            that was split is several pieces, which do not see each other.
        pieces: (P, 2) int64, of each piece the number of its document (in the order given) and its first id in it.
        dropped: numbers of the documents that are in no row: empty ones, and longer ones where the policy says so.
        split: numbers of the documents that are several pieces.
    """

    input_ids: np.ndarray
    document: np.ndarray
    pieces: np.ndarray
    dropped: list[int] = dataclasses.field(default_factory=list)
    split: list[int] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def utilisation(self) -> float:
        """Share of ids that are not padding; 1.0 for no rows."""
        return float((self.document != PADDING).mean()) if self.document.size else 1.0

    def report(self) -> str:
        """One line: rows, documents, what was split or dropped, utilisation."""
        rows, length = self.input_ids.shape
        kept = len(np.unique(self.pieces[:, 0])) or len(np.unique(self.document[self.document != PADDING]))
        return (
            f"{kept} documents in {rows} rows of {length} ids, {self.utilisation:.1%} used; {len(self.split)} split "
            f"into {int(np.isin(self.pieces[:, 0], self.split).sum())} pieces, {len(self.dropped)} dropped"
        )

    def save(self, path: str | Path) -> None:
        """Write ``.safetensors``, or ``.npy`` with (2, N, S) int64 (ids, document numbers); aside, then renamed.

        The ``.npy`` file holds no ``pieces``, ``dropped`` and ``split``: training reads none of them.
        """
        from safetensors.numpy import save

        if Path(path).suffix == ".npy":
            data = io.BytesIO()
            np.save(data, np.stack([self.input_ids.astype(np.int64), self.document]))
            write_atomic(path, data.getvalue())
            return
        if Path(path).suffix != ".safetensors":
            raise ValueError(f"{path}: expected a name that ends in .safetensors or .npy")
        about = json.dumps({"format": FORMAT, "dropped": self.dropped, "split": self.split})
        tensors = {"input_ids": self.input_ids, "document": self.document, "pieces": self.pieces}
        write_atomic(path, save({k: np.ascontiguousarray(v) for k, v in tensors.items()}, metadata={"mmtok": about}))

    @classmethod
    def load(cls, path: str | Path) -> Packing:
        """Open what `save` wrote; the rows stay on disk (memory-mapped) until they are read."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no packed documents at {path}; Packing.save writes them")
        try:
            if path.suffix == ".npy":
                both = np.load(path, mmap_mode="r", allow_pickle=False)
                if both.ndim != 3 or len(both) != 2 or both.dtype.kind not in "iu":
                    raise ValueError(f"expected integers (2, N, S), got {both.dtype} {both.shape}")
                return cls(both[0], both[1], np.zeros((0, 2), np.int64))
            with path.open("rb") as f:
                size = int.from_bytes(f.read(8), "little")
                if not 0 < size <= path.stat().st_size - 8:
                    raise ValueError("no safetensors header")
                header = json.loads(f.read(size))
            about = json.loads(header.pop("__metadata__", {}).get("mmtok", "{}"))
            if about.get("format") != FORMAT:
                raise ValueError(f"expected format {FORMAT!r}, got {about.get('format')!r}")
            arrays = {name: _mapped(path, 8 + size, entry) for name, entry in header.items()}
            return cls(**arrays, dropped=about["dropped"], split=about["split"])
        except (KeyError, TypeError, ValueError) as e:
            raise ValueError(f"{path}: damaged file of packed documents ({e}); pack them again") from e


def _mapped(path: Path, base: int, entry: dict[str, Any]) -> np.ndarray:
    """One tensor of a safetensors file as a read-only map; ``entry`` is its line of the header."""
    kinds = {"U8": "u1", "U16": "<u2", "U32": "<u4", "U64": "<u8", "I64": "<i8"}
    shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
    dtype = np.dtype(kinds[entry["dtype"]])
    if stop - start != dtype.itemsize * int(np.prod(shape)) or base + stop > path.stat().st_size:
        raise ValueError("the data is shorter than its header says")
    if start == stop:  # nothing can be mapped
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype, "r", base + start, shape)


def pack_documents(
    documents: Iterable[Sequence[int] | np.ndarray | Tensor],
    length: int,
    eos_id: int | None = None,
    pad_id: int = 0,
    fit: str = "best",
    too_long: str = "refuse",
) -> Packing:
    """Documents -> rows of ``length`` ids, each document (or piece) whole in one row.

    Args:
        documents: flat sequences of ids; empty ones are left out and reported.
        length: S, ids in a row.
        eos_id: written after every document; None where they end themselves.
        pad_id: fills the rest of a row; its document number, not the id, marks it as padding.
        fit: ``best``: longest first, each into the fullest row that has room; ``greedy``: in the order given, into the
            row at hand, or a new one.
        too_long: what becomes of a document of more than ``length`` ids: ``refuse`` (ValueError), ``drop``, or
            ``split`` into pieces of ``length`` and a rest.

    Raises:
        ValueError: what does not fit, ids that are no integers >= 0, unknown policies.
    """
    if fit not in ("best", "greedy") or too_long not in ("refuse", "drop", "split"):
        raise ValueError(f"expected fit best|greedy and too_long refuse|drop|split, got {fit!r} and {too_long!r}")
    if length < 1 or pad_id < 0 or (eos_id is not None and eos_id < 0):
        raise ValueError(f"expected length >= 1, pad_id >= 0, eos_id >= 0, got {length}, {pad_id}, {eos_id}")
    chunks: list[np.ndarray] = []
    where: list[tuple[int, int]] = []  # document and first id of each chunk
    dropped, split = [], []
    for n, document in enumerate(documents):
        ids = _ids_of(document, n)
        if eos_id is not None and len(ids):
            ids = np.append(ids, eos_id)
        if len(ids) > length and too_long == "refuse":
            raise ValueError(
                f"document {n}: expected at most {length} ids (with eos), got {len(ids)}; give a larger length, or "
                "too_long='split' or 'drop'"
            )
        if not len(ids) or (len(ids) > length and too_long == "drop"):
            dropped.append(n)
            continue
        if len(ids) > length:
            split.append(n)
        for start in range(0, len(ids), length):
            chunks.append(ids[start : start + length])
            where.append((n, start))
    rows = _best_fit([len(c) for c in chunks], length) if fit == "best" else _greedy([len(c) for c in chunks], length)
    top = max((int(c.max()) for c in chunks), default=0)
    input_ids = np.full((len(rows), length), pad_id, smallest_uint(max(top, pad_id)))
    document = np.full((len(rows), length), PADDING, np.int64)
    for r, row in enumerate(rows):
        at = 0
        for piece in row:
            stop = at + len(chunks[piece])
            input_ids[r, at:stop], document[r, at:stop] = chunks[piece], piece
            at = stop
    return Packing(input_ids, document, np.array(where, np.int64).reshape(-1, 2), dropped, split)


def _ids_of(document: Sequence[int] | np.ndarray | Tensor, n: int) -> np.ndarray:
    array = np.asarray(document.tolist() if isinstance(document, Tensor) else document)
    if array.ndim != 1 or (len(array) and array.dtype.kind not in "iu"):
        raise ValueError(f"document {n}: expected a flat list of integer ids, got {array.dtype} {array.shape}")
    if len(array) and array.min() < 0:
        raise ValueError(f"document {n}: expected ids >= 0, got {array.min()} at position {int(array.argmin())}")
    return array.astype(np.int64)


def _greedy(sizes: Sequence[int], length: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room = 0
    for n, size in enumerate(sizes):
        if size > room:
            rows.append([])
            room = length
        rows[-1].append(n)
        room -= size
    return rows


def _best_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Best-fit decreasing, O(n log S): the rows are looked up by the room they have left."""
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of by_room, sorted
    for n in sorted(range(len(sizes)), key=lambda n: -sizes[n]):  # stable: equal sizes stay in their order
        at = bisect_left(rooms, sizes[n])
        if at == len(rooms):
            rows.append([])
            row, room = len(rows) - 1, length
        else:
            room = rooms[at]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        rows[row].append(n)
        if room := room - sizes[n]:
            if room not in by_room:
                by_room[room] = []
                insort(rooms, room)
            by_room[room].append(row)
    return rows


def document_mask(document: Tensor) -> Tensor:
    """Who sees whom: document numbers (B, S) -> (B, 1, S, S) bool, true where row i may attend to column j.

    A position sees itself and the earlier ones of its own document. Padding sees padding, so that no row of the softmax
    is empty (which gives NaN). What ``scaled_dot_product_attention`` takes as ``attn_mask``.
    """
    S = document.shape[1]
    causal = torch.ones(S, S, dtype=torch.bool, device=document.device).tril()
    return ((document[:, :, None] == document[:, None, :]) & causal)[:, None]  # (B, 1, S, S)


def position_ids(document: Tensor) -> Tensor:
    """(..., S) document numbers -> (..., S) int64 positions that begin at 0 in every run of one number."""
    t = torch.arange(document.shape[-1], device=document.device).expand(document.shape)
    begins = torch.ones_like(document, dtype=torch.bool)
    begins[..., 1:] = document[..., 1:] != document[..., :-1]
    return t - torch.where(begins, t, 0).cummax(-1).values


def model_inputs(batch: dict[str, Tensor], attention: str = "sdpa") -> dict[str, Any]:
    """The keyword arguments for a causal model of transformers: ``model(**model_inputs(batch)).loss``.

    Args:
        batch: what `PackedDocuments` gives, collated: ``input_ids``, ``position_ids``, ``labels``, ``document``.
        attention: ``sdpa``: with `document_mask` as 4-d ``attention_mask``. ``eager``: the same, additive (this
            attention adds what it is given, so that true would count as one). ``positions``: no mask; transformers
            finds the documents where positions begin anew, for every attention, flash attention's as well.

    ``use_cache`` is False: with a cache transformers does not look at positions, and documents would see each other.
    """
    if attention not in ("sdpa", "eager", "positions"):
        raise ValueError(f"attention: expected 'sdpa', 'eager' or 'positions', got {attention!r}")
    out: dict[str, Any] = {name: batch[name] for name in ("input_ids", "position_ids", "labels")}
    out["use_cache"] = False
    if attention == "positions":
        return out
    mask = document_mask(batch["document"])
    if attention == "eager":
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)
    return out | {"attention_mask": mask}


class PackedDocuments(Dataset):
    """Map-style dataset of packed rows; reads in any order, from memory or from a file that stays on disk.

    Args:
        packing: what `pack_documents` made, or the path of what `Packing.save` wrote.
        learn_first: False: the first id of a document is no target, since what stands before it is another document.

    An item is ``input_ids``, ``position_ids`` (0 at each document's first id), ``labels`` (IGNORED at padding) and
    ``document`` (PADDING there), each (S,) int64. Labels stand at their own position, as transformers wants them.
    """

    def __init__(self, packing: Packing | str | Path, learn_first: bool = False) -> None:
        self.packing = packing if isinstance(packing, Packing) else Packing.load(packing)
        self.path = None if isinstance(packing, Packing) else Path(packing)
        self.learn_first = learn_first

    def __len__(self) -> int:
        return len(self.packing)

    def __getstate__(self) -> dict[str, Any]:
        """For workers that are not forked: the path, not the file's content."""
        return self.__dict__ | ({"packing": None} if self.path else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.path:
            self.packing = Packing.load(self.path)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = torch.from_numpy(self.packing.input_ids[i].astype(np.int64))
        document = torch.from_numpy(self.packing.document[i].astype(np.int64))
        positions = position_ids(document)
        ignored = document == PADDING
        if not self.learn_first:
            ignored = ignored | (positions == 0)
        return {
            "input_ids": ids,
            "position_ids": positions,
            "labels": ids.masked_fill(ignored, IGNORED),
            "document": document,
        }


def to_hf_dataset(rows: PackedDocuments) -> datasets.Dataset:
    """A Hugging Face dataset with the columns ``input_ids``, ``position_ids``, ``labels`` and ``document``.

    In memory; ``save_to_disk`` and ``datasets.load_from_disk`` keep it. ImportError without datasets.
    """
    try:
        import datasets
    except ImportError as e:
        raise ImportError("to_hf_dataset needs the datasets package: pip install 'mmtok[lm]'") from e
    names = ("input_ids", "position_ids", "labels", "document")
    S = rows.packing.input_ids.shape[1]
    items = [rows[i] for i in range(len(rows))]
    columns = {n: np.stack([r[n].numpy() for r in items]) if items else np.zeros((0, S), np.int64) for n in names}
    feature = datasets.List(datasets.Value("int64"), length=S)
    return datasets.Dataset.from_dict(columns, features=datasets.Features(dict.fromkeys(names, feature)))
