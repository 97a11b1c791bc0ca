"""How the rows of new ids start: rules that read the rows a model already has, the codebooks, or another model.

A rule is a frozen dataclass that is called with a `Start` (one matrix of the model) and gives one row for each id of
the vocab from ``text_size`` on. All of it is computed on the CPU in float32, whatever the model's device and type.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmtok.lm.pursuit import combine
from mmtok.tokenizer import Tokenizer
from mmtok.vocab import Vocab
from mmtok.vocab.block import Block

Source = Tokenizer | Sequence[Tensor]
CHUNK = 8192  # rows that are converted or decoded at once


@dataclasses.dataclass(frozen=True)
class Start:
    """One matrix of a model whose rows from ``vocab.text_size`` on are to be filled.

    Args:
        old: (V, D) fp32 on the CPU, the rows of the text ids; rows that only padded the matrix are not among them.
        vocab: whose new ids.
        head: whether this is the output matrix of a model that has one of its own (untied), or its input embedding.
        std: the standard deviation with which the model was initialised (``config.initializer_range``), if it says so.
        sources: where the codes' own vectors come from: {modality: tokenizer, or one (K, d) tensor a level}.
        generator: of the random draws, on the CPU.
    """

    old: Tensor
    vocab: Vocab
    head: bool = False
    std: float | None = None
    sources: Mapping[str, Source] = dataclasses.field(default_factory=dict)
    generator: torch.Generator | None = None

    @property
    def count(self) -> int:
        """N, the number of new ids."""
        return self.vocab.size - self.vocab.text_size

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def old_rows(self, least: int) -> Tensor:
        """The text rows; ValueError where there are fewer than ``least``."""
        if len(self.old) < least:
            raise ValueError(
                f"init: expected at least {least} text ids whose rows the new ones follow, got {len(self.old)}; use "
                "init='normal' for a model that starts from nothing"
            )
        return self.old


Rule = Callable[[Start], Tensor]


def mean_row(rows: Tensor) -> Tensor:
    """Mean (D,) of rows (V, D), in fp64 though never all of them are at once."""
    return torch.stack([part.double().sum(0) for part in rows.split(CHUNK)]).sum(0) / len(rows)


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of rows (V, D), divided by V, in fp64."""
    mean = mean_row(rows)
    cov = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for part in rows.split(CHUNK):
        centred = part.double() - mean
        cov += centred.T @ centred
    return mean, cov / len(rows)


def root(cov: Tensor) -> Tensor:
    """The symmetric square root (D, D) of a covariance, which may be of low rank (fewer rows than dimensions)."""
    values, vectors = torch.linalg.eigh(cov)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def gaussian_rows(start: Start, count: int, scale: float) -> Tensor:
    """(count, D) draws from a Gaussian with the mean and ``scale`` times the covariance of the text rows."""
    mean, cov = moments(start.old_rows(2))
    half = (root(cov) * scale**0.5).float()
    out = torch.empty(count, len(mean))
    for at in range(0, count, CHUNK):
        n = min(CHUNK, count - at)
        out[at : at + n] = start.randn(n, len(mean)) @ half + mean.float()
    return out


@dataclasses.dataclass(frozen=True)
class MeanCovariance:
    """Draws from a Gaussian with the mean and covariance of the text rows.

    Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models"
    (nlp.stanford.edu/~johnhew/vocab-expansion.html): new ids are then about as likely as an average old one, so the
    text model's predictions hardly change, which draws of norm unlike the old rows' do not give.

    Args:
        scale: of the covariance; small ones (transformers takes 1e-9) put all new rows next to the mean.
    """

    scale: float = 1.0

    def __call__(self, start: Start) -> Tensor:
        return gaussian_rows(start, start.count, _not_negative(self.scale))


@dataclasses.dataclass(frozen=True)
class Mean:
    """The mean of the text rows, for all new ids alike (Hewitt 2021).

    With a tied or untied head the new ids start with equal logits, and only training tells them apart.
    """

    def __call__(self, start: Start) -> Tensor:
        return mean_row(start.old_rows(1)).float().expand(start.count, -1).clone()


@dataclasses.dataclass(frozen=True)
class Normal:
    """The model's own initialisation: a Gaussian of mean 0 and one standard deviation, independent of the old rows.

    Args:
        std: None = ``config.initializer_range`` of the model.
    """

    std: float | None = None

    def __call__(self, start: Start) -> Tensor:
        std = start.std if self.std is None else self.std
        if std is None:
            raise ValueError("init: this model's config has no initializer_range; use init=Normal(std=0.02)")
        return start.randn(start.count, start.old.shape[1]) * _not_negative(std)


@dataclasses.dataclass(frozen=True)
class Projected:
    """Codes start as their codebook vectors, mapped to the width of the model; markers and bytes as `MeanCovariance`.

    Codes that are near in the tokenizer are then near in the model. Each level has a random map of its own, since a
    vector of a later level is a residual and means something else; each level's rows have the mean of the text rows
    and, after one factor, the sum of their variances.

    Args:
        method: ``orthonormal``: x R, R (d, D) random with orthonormal rows (columns where d > D): distances keep their
            proportions. ``whitened``: x is whitened along its principal axes, goes through such an R and then through
            the square root of the text rows' covariance, so that the codes lie where text rows do.
        scale: of the variance.
    """

    method: str = "orthonormal"
    scale: float = 1.0

    def __call__(self, start: Start) -> Tensor:
        if self.method not in ("orthonormal", "whitened"):
            raise ValueError(f"method: expected 'orthonormal' or 'whitened', got {self.method!r}")
        vectors = {m: code_vectors(start, m) for m in start.vocab.blocks}
        mean, cov = moments(start.old_rows(2))
        out = gaussian_rows(start, start.count, _not_negative(self.scale))
        half = root(cov).float() if self.method == "whitened" else None
        for modality, levels in vectors.items():
            for q, (ids, x) in enumerate(zip(start.vocab.blocks[modality].levels, levels, strict=True)):
                y = self._map(start, x, half)
                power = y.double().square().sum(1).mean()
                if not power > 0:
                    raise ValueError(
                        f"init: all {len(x)} vectors of {modality} level {q} are equal, so there is nothing to "
                        "project; is the tokenizer trained? init='mean_covariance' needs no codebook"
                    )
                factor = (self.scale * cov.trace() / power).sqrt()
                at = ids.start - start.vocab.text_size
                out[at : at + len(ids)] = (mean + factor * y).float()
        return out

    def _map(self, start: Start, x: Tensor, half: Tensor | None) -> Tensor:
        """Vectors (K, d) of one level -> (K, D), centred."""
        D = start.old.shape[1]
        mean, cov = moments(x)
        x = (x.double() - mean).float()
        if half is None:
            return x @ orthonormal(start, x.shape[1], D)
        values, axes = torch.linalg.eigh(cov)
        keep = (values > 1e-6 * values[-1]).nonzero()[:, 0][-D:]  # ascending order: the D largest that are not noise
        white = x @ (axes[:, keep] / values[keep].sqrt()).float()  # (K, r)
        return white @ orthonormal(start, len(keep), D) @ half


def orthonormal(start: Start, d: int, D: int) -> Tensor:
    """(d, D) random, with orthonormal rows, or orthonormal columns where d > D."""
    basis = torch.linalg.qr(start.randn(max(d, D), min(d, D)))[0]
    return basis if d > D else basis.T


def code_vectors(start: Start, modality: str) -> list[Tensor]:
    """The vector of each code of a modality: one (K, d) fp32 a level.

    From a tokenizer, the vector of a code of level q is what decoding it adds: decode(0 .. 0 code) - decode(0 .. 0)
    over q + 1 and q levels, which for residual codes is the codebook's own row.

    Raises:
        ValueError: no source for the modality, another tokenizer's, one without a quantizer, or wrong shapes.
    """
    block = start.vocab.blocks[modality]
    sizes = [len(ids) for ids in block.levels]
    if modality not in start.sources:
        raise ValueError(
            f"sources: this init reads the codebooks, expected sources={{{modality!r}: tokenizer}}, got "
            f"{sorted(start.sources)}"
        )
    source: Any = start.sources[modality]
    levels = _decoded_codes(source, block) if isinstance(source, Tokenizer) else [v.float().cpu() for v in source]
    shapes = [tuple(v.shape) for v in levels]
    if any(v.ndim != 2 for v in levels) or [len(v) for v in levels] != sizes or len({s[1] for s in shapes}) > 1:
        raise ValueError(f"sources[{modality!r}]: expected (K, d) with K = {sizes} for the levels, got {shapes}")
    if not all(bool(v.isfinite().all()) for v in levels):
        raise ValueError(f"sources[{modality!r}]: expected finite codebook vectors, got NaN or infinity")
    return levels


@torch.no_grad()
def _decoded_codes(tokenizer: Tokenizer, block: Block) -> list[Tensor]:
    spec, decode = block.spec, getattr(getattr(tokenizer, "quantizer", None), "decode", None)
    if tokenizer.spec.fingerprint != spec.fingerprint:
        raise ValueError(
            f"sources[{spec.modality!r}]: expected the tokenizer of the vocab, {spec.name!r} (fingerprint "
            f"{spec.fingerprint or 'none'}), got {tokenizer.name!r} ({tokenizer.fingerprint})"
        )
    if decode is None or [len(ids) for ids in block.levels] != list(spec.codebook_sizes):
        raise ValueError(
            f"sources[{spec.modality!r}]: {tokenizer.name!r} has no quantizer whose codes decode one by one; pass the "
            f"vectors themselves, one (K, d) tensor a level, or use init='mean_covariance'"
        )
    out = []
    for q, ids in enumerate(block.levels):
        rows = []
        for part in torch.arange(len(ids), device=tokenizer.device).split(CHUNK):
            codes = torch.zeros(len(part), q + 1, 1, dtype=torch.int64, device=part.device)
            codes[:, q, 0] = part
            rows.append(decode(codes)[:, 0] - (decode(codes[:1, :q])[:, 0] if q else 0.0))
        out.append(torch.cat(rows).float().cpu())
    return out


@dataclasses.dataclass(frozen=True)
class Donor:
    """Another model that has rows for the same new ids; `mmtok.lm.extend.donor_of` makes one from a model.

    Args:
        embeddings: (V', D') its input embeddings; rows ``text_size`` .. ``text_size + N - 1`` are the new ids'.
        text_size: its first new id.
        shared: (M, 2) int64, pairs of a text id here and the id of the same text token in the donor: the anchors.
        head: (V', D') its output matrix; None = tied to its embeddings.
    """

    embeddings: Tensor
    text_size: int
    shared: Tensor
    head: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Anchors:
    """Rows that some new ids already have, e.g. from a model with the smaller codebook of the same latent space.

    Args:
        ids: (M,) int64, ids of the vocab. embeddings: (M, D) their rows. head: as that, of an untied head.
    """

    ids: Tensor
    embeddings: Tensor
    head: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class OMP:
    """Transplanted rows: a new id's vector in a donor space is written as a sparse combination of anchors, and the
    same weights combine the anchors' rows in this model (arXiv 2506.06607, by orthogonal matching pursuit).

    Exactly one of the two is given, since a rule cannot make anchors:

    * ``donor``: the space is the donor's embedding, the anchors are the text tokens that both models have. All new ids
      are transplanted, markers too. An untied head here is filled from the donor's head (or tied embedding).
    * ``anchors``: the space is the codebook (``sources``), the anchors are the codes that have rows already, of the
      same modality; they keep theirs. Markers and bytes that are not among them start as `MeanCovariance`.

    Args:
        k: anchors of one combination; the paper finds 64 enough.
    """

    donor: Donor | None = None
    anchors: Anchors | None = None
    k: int = 64

    def __call__(self, start: Start) -> Tensor:
        if (self.donor is None) == (self.anchors is None):
            raise ValueError(
                "init: omp needs exactly one of OMP(donor=donor_of(model, tokenizer, vocab)), a model that has rows "
                "for these ids, and OMP(anchors=Anchors(ids, rows)), codes that have rows; where neither exists use "
                "'mean_covariance' or 'projected'"
            )
        if self.k < 1:
            raise ValueError(f"k: expected at least 1 anchor, got {self.k}")
        if self.donor is not None:
            return self._from_donor(start, self.donor)
        assert self.anchors
        return self._from_anchors(start, self.anchors)

    def _from_donor(self, start: Start, donor: Donor) -> Tensor:
        space = donor.head if start.head and donor.head is not None else donor.embeddings
        pairs, first, N = donor.shared.cpu(), donor.text_size, start.count
        if len(space) < first + N:
            raise ValueError(f"donor: expected rows for ids {first}..{first + N - 1}, got {len(space)} rows")
        legal = torch.tensor([len(start.old), first])
        if pairs.ndim != 2 or pairs.shape[1] != 2 or not len(pairs) or bool(((pairs < 0) | (pairs >= legal)).any()):
            raise ValueError(
                f"donor.shared: expected pairs (M, 2), M >= 1, of a text id here (0..{len(start.old) - 1}) and in the "
                f"donor (0..{first - 1}), got shape {tuple(pairs.shape)}; without shared tokens nothing can be "
                "transplanted"
            )
        new = space[first : first + N].detach().float()
        atoms = space[pairs[:, 1].to(space.device)].detach().float()
        return combine(new, atoms, start.old[pairs[:, 0]], self.k)

    def _from_anchors(self, start: Start, anchors: Anchors) -> Tensor:
        vocab, ids = start.vocab, anchors.ids.cpu()
        known = (anchors.head if start.head and anchors.head is not None else anchors.embeddings).detach().cpu().float()
        wanted = (len(ids), start.old.shape[1])
        if ids.ndim != 1 or known.shape != wanted or bool(((ids < vocab.text_size) | (ids >= vocab.size)).any()):
            raise ValueError(
                f"anchors: expected ids (M,) in {vocab.text_size}..{vocab.size - 1} and rows {wanted}, got "
                f"{tuple(ids.shape)} and {tuple(known.shape)}"
            )
        out = gaussian_rows(start, start.count, 1.0)
        for modality, block in vocab.blocks.items():
            vectors = torch.cat(code_vectors(start, modality))  # (K summed over the levels, d)
            mine = torch.cat([torch.arange(r.start, r.stop) for r in block.levels])
            at = torch.searchsorted(mine, ids).clamp(max=len(mine) - 1)
            here = mine[at] == ids
            if not bool(here.any()):
                raise ValueError(
                    f"anchors: none of the {len(ids)} ids is an {modality} code, so no {modality} row can be combined; "
                    "add some, or fill them by 'projected' or 'mean_covariance'"
                )
            out[mine - vocab.text_size] = combine(vectors, vectors[at[here]], known[here], self.k)
        out[ids - vocab.text_size] = known
        return out


def _not_negative(value: float) -> float:
    if not value >= 0:
        raise ValueError(f"expected a scale >= 0, got {value}")
    return value


INITS: dict[str, Callable[[], Rule]] = {
    "mean_covariance": MeanCovariance,
    "mean": Mean,
    "normal": Normal,
    "projected": Projected,
    "omp": OMP,
}
