"""Quantizers: vectors (B, T, D) to integer codes (B, Q, T) and back, one interface for all of them."""

from __future__ import annotations

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


__all__ = [
    "QUANTIZERS",
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
]
