"""What a trit-plane tensor type is: a row of numbers, and the functions that read and write its units.

A new type is a module beside this one (tp2_1.py shows how), a row in types.TYPES, and its twin in native/codec/types.c.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .arrays import F32, I8, U8

Scales = NDArray[np.generic]


@dataclass(frozen=True)
class TensorType:
    """One custom ggml type.

    id, name        of the ggml type; part of the file format
    since           format version that brought it
    block, size     weights a block; bytes a block
    group           weights that share their scales
    reach           largest |weight|
    planes          trit planes that are stored
    scale_dtype     numpy's name of a stored scale: "uint8" = 8-bit code, "float16"
    scales          stored scales a group
    smallest_scale  of a group that is not all zero; 0 = no bound
    levels          the levels in units of the group's one scale, in any order; () where each plane has its own scale
    calibratable    whether calibration and tuning make its planes: levels and one code a group
    q4_0_twin       whether a group is exactly a block of Q4_0
    to_side         scales (R, C/group[, scales]) -> side bytes uint8 (U,), one a unit
    from_side       the inverse, for R rows: side bytes uint8 (U,), R -> scales
    weights         digits uint8 (R, C), scales -> float32 (R, C)
    to_levels       digits uint8 (R, C) -> levels int8 (R, C); None without levels
    from_levels     the inverse; another level gives 255, which no packer takes
    chain           weights of a unit in the order in which a computed trit follows from those before; () = none is
    bad_scale       side bytes uint8 (U,) -> bool (blocks,): a scale that is not finite; None where every byte is one
    """

    id: int
    name: str
    since: int
    block: int
    size: int
    group: int
    reach: float
    planes: int
    scale_dtype: str
    scales: int
    smallest_scale: float
    levels: tuple[int, ...]
    calibratable: bool
    q4_0_twin: bool
    to_side: Callable[[Scales], U8] = field(compare=False, repr=False)
    from_side: Callable[[U8, int], Scales] = field(compare=False, repr=False)
    weights: Callable[[U8, Scales], F32] = field(compare=False, repr=False)
    to_levels: Callable[[U8], I8] | None = field(default=None, compare=False, repr=False)
    from_levels: Callable[[NDArray[np.signedinteger]], U8] | None = field(default=None, compare=False, repr=False)
    bad_scale: Callable[[U8], NDArray[np.bool_]] | None = field(default=None, compare=False, repr=False)
    chain: tuple[int, ...] = field(default=(), repr=False)

    @property
    def bpw(self) -> float:
        """Bits per weight."""
        return 8 * self.size / self.block

    @property
    def max_level(self) -> int:
        """Largest level, 0 without levels."""
        return max(self.levels, default=0)

    def scale_shape(self, rows: int, cols: int) -> tuple[int, ...]:
        """Shape of the stored scales of a matrix (rows, cols)."""
        return (rows, cols // self.group) if self.scales == 1 else (rows, cols // self.group, self.scales)
