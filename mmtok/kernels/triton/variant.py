"""What a shipped kernel configuration is, so that a machine without a GPU can compile every one of them."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kernel with one set of compile-time values, as some public call launches it.

    Args:
        name: for tables and test ids, for example ``nearest_code/small_width``.
        kernel: the ``triton.jit`` function.
        signature: argument name -> triton type (``*fp32``, ``*i64``, ``i32``, ``fp32``, ``constexpr``), in the order of
            the kernel's arguments.
        constants: values of the constexpr arguments.
        num_warps, num_stages: launch options.
        matrix_unit: whether the compiled code must hold a tensor-core instruction.
        architectures: where it is launched, and so must compile: 80 for sm_80, 90 for sm_90.
        aligned: names of pointer and integer arguments that the launcher guarantees to be divisible by 16.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    matrix_unit: bool = False
    aligned: tuple[str, ...] = ()
    architectures: tuple[int, ...] = (80, 90)
