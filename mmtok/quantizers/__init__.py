"""Quantizers: vectors (B, T, D) to integer codes (B, Q, T) and back, one interface for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmtok.quantizers.base import Quantized, Quantizer
from mmtok.quantizers.binary import BinaryQuantizer, BinarySphericalQuantizer, LookupFreeQuantizer
from mmtok.quantizers.codebook import Codebook
from mmtok.quantizers.fsq import FiniteScalarQuantizer
from mmtok.quantizers.grouped import GroupedResidualVectorQuantizer
from mmtok.quantizers.per_dimension import PerDimensionQuantizer
from mmtok.quantizers.product import ProductQuantizer
from mmtok.quantizers.random_projection import RandomProjectionQuantizer
from mmtok.quantizers.rfsq import ResidualFiniteScalarQuantizer
from mmtok.quantizers.rvq import ResidualVectorQuantizer
from mmtok.quantizers.rvq_legacy import LegacyResidualVectorQuantizer
from mmtok.quantizers.simvq import SimVectorQuantizer
from mmtok.quantizers.split import SplitResidualVectorQuantizer
from mmtok.quantizers.strided import StridedResidualVectorQuantizer
from mmtok.quantizers.vq import VectorQuantizer

QUANTIZERS: dict[str, type[Quantizer]] = {
    "vq": VectorQuantizer,
    "rvq": ResidualVectorQuantizer,
    "rvq_legacy": LegacyResidualVectorQuantizer,
    "grouped_rvq": GroupedResidualVectorQuantizer,
    "split_rvq": SplitResidualVectorQuantizer,
    "strided_rvq": StridedResidualVectorQuantizer,
    "fsq": FiniteScalarQuantizer,
    "binary": BinaryQuantizer,
    "rfsq": ResidualFiniteScalarQuantizer,
    "lfq": LookupFreeQuantizer,
    "bsq": BinarySphericalQuantizer,
    "simvq": SimVectorQuantizer,
    "random_projection": RandomProjectionQuantizer,
    "pq": ProductQuantizer,
    "per_dimension": PerDimensionQuantizer,
}
# Each type's word in the survey's column of quantizers (`mmtok.catalogue`), and of objectives.
TAXONOMY: dict[str, tuple[str, tuple[str, ...]]] = {
    "vq": ("SVQ", ("VQ",)),
    "rvq": ("RVQ", ("VQ",)),
    "rvq_legacy": ("RVQ", ("VQ",)),
    "grouped_rvq": ("GVQ", ("VQ",)),
    "split_rvq": ("RVQ", ("VQ",)),
    "strided_rvq": ("MSRVQ", ("VQ",)),
    "fsq": ("FSQ", ()),
    "binary": ("BQ", ("VQ", "Ent")),
    "rfsq": ("RVQ+FSQ", ()),
    "lfq": ("BQ", ("VQ", "Ent")),
    "bsq": ("BQ", ("VQ", "Ent")),
    "simvq": ("SVQ", ("VQ",)),
    "random_projection": ("PQ", ()),  # as the survey has BEST-RQ
    "pq": ("PQ", ("VQ",)),
    "per_dimension": ("PDQ", ()),
}


def build_quantizer(config: dict) -> Quantizer:
    """The quantizer that ``config`` describes: {"type": a key of QUANTIZERS, and its constructor's arguments}.

    Raises:
        ValueError: unknown type, or arguments that its constructor does not have or misses.
    """
    arguments = dict(config)
    name = arguments.pop("type", None)
    if name not in QUANTIZERS:
        raise ValueError(f"type: expected one of {', '.join(QUANTIZERS)}, got {name!r}")
    try:
        return QUANTIZERS[name](**arguments)
    except TypeError as e:
        raise ValueError(f"cannot build quantizer {name!r} from {sorted(arguments)}: {e}") from e


def taxonomy_of(config: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The words of a quantizer's config for `mmtok.catalogue.Taxonomy`: its quantization, and what it minimises.

    A binary quantizer has the terms that its weights leave: a pull to the bits (``VQ``) and an entropy (``Ent``).

    Raises:
        ValueError: unknown type.
    """
    name = config.get("type")
    if name not in TAXONOMY:
        raise ValueError(f"type: expected one of {', '.join(TAXONOMY)}, got {name!r}")
    word, losses = TAXONOMY[name]
    if word == "BQ":
        entropy = config.get("entropy_weight")
        if entropy is None:  # of `BinaryQuantizer`: the scheme of Instella-T2I has no entropy, the others have
            entropy = float(name != "binary" or config.get("kind", "bernoulli") != "bernoulli")
        weights = {"VQ": config.get("commitment_weight", 0.25), "Ent": entropy}
        losses = tuple(loss for loss in losses if weights[loss] > 0)
    return word, losses


__all__ = [
    "QUANTIZERS",
    "TAXONOMY",
    "BinaryQuantizer",
    "BinarySphericalQuantizer",
    "Codebook",
    "FiniteScalarQuantizer",
    "GroupedResidualVectorQuantizer",
    "LegacyResidualVectorQuantizer",
    "LookupFreeQuantizer",
    "PerDimensionQuantizer",
    "ProductQuantizer",
    "Quantized",
    "Quantizer",
    "RandomProjectionQuantizer",
    "ResidualFiniteScalarQuantizer",
    "ResidualVectorQuantizer",
    "SimVectorQuantizer",
    "SplitResidualVectorQuantizer",
    "StridedResidualVectorQuantizer",
    "VectorQuantizer",
    "build_quantizer",
    "taxonomy_of",
]
