"""TP2_1: w = s * (3*t1 + 2*t2), groups of 32, one 8-bit scale code a group; a block is one unit."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .arrays import F32, I8, U8
from .tensor_type import Scales, TensorType
from .unit import UNIT, UNIT_WORDS

# Digit d = 3*(t1+1) + (t2+1); level = 3*t1 + 2*t2 in units of the scale.
LEVELS = (-5, -3, -1, -2, 0, 2, 1, 3, 5)
MAX_LEVEL = 5
SMALLEST_SCALE = 2.0**-15  # code 0

LEVEL_OF_DIGIT = np.array(LEVELS, dtype=np.float32)
DIGIT_OF_LEVEL = np.array([LEVELS.index(v) if v in LEVELS else 255 for v in range(-5, 6)], dtype=np.uint8)


def scale_to_float(codes: U8) -> F32:
    """8-bit scale codes to float32: (1 + m/16) * 2**(e-15), c = 16*e + m. Any shape."""
    bits = (codes.astype(np.uint32) << np.uint32(19)) + np.uint32(112 << 23)
    return bits.view(np.float32)


def scale_from_float(s: F32) -> U8:
    """Nearest code, ties to the even code, clamped to 0..255. Any shape."""
    smallest = np.int64(112 << 23)
    bits = np.ascontiguousarray(s, dtype=np.float32).view(np.uint32).astype(np.int64) - smallest
    low, half = bits & ((1 << 19) - 1), 1 << 18
    code = bits >> 19
    code += (low > half) | ((low == half) & ((code & 1) == 1))
    return np.where(np.asarray(s) > 0, np.clip(code, 0, 255), 0).astype(np.uint8)


def digits_of_levels(levels: NDArray[np.signedinteger]) -> U8:
    """Levels -5, -3 .. 3, 5 -> digits. Any shape. Another value gives 255, which no packer takes."""
    digits: U8 = DIGIT_OF_LEVEL[levels.astype(np.intp) + MAX_LEVEL]
    return digits


def levels_of_digits(digits: U8) -> I8:
    """Digits 0..8 -> levels. Any shape."""
    return np.array(LEVELS, np.int8)[digits]


def _to_side(codes: Scales) -> U8:
    return codes.astype(np.uint8).reshape(-1)


def _from_side(side: U8, rows: int) -> Scales:
    return side.reshape(rows, -1)


def weights_of_levels(levels: I8, codes: Scales) -> F32:
    """Levels (R, C) and their scale codes (R, C/32) -> float32 (R, C)."""
    groups = levels.astype(np.float32).reshape(len(levels), -1, UNIT)
    return (scale_to_float(codes.astype(np.uint8))[..., None] * groups).reshape(levels.shape)


def _weights(digits: U8, codes: Scales) -> F32:
    return weights_of_levels(levels_of_digits(digits), codes)


TP2_1 = TensorType(
    id=251,
    name="TP2_1",
    since=1,
    block=UNIT,
    size=2 * UNIT_WORDS + 1 + 1,
    group=32,
    reach=MAX_LEVEL * 1.9375,
    planes=2,
    scale_dtype="uint8",
    scales=1,
    smallest_scale=SMALLEST_SCALE,
    levels=LEVELS,
    calibratable=True,
    q4_0_twin=True,
    to_side=_to_side,
    from_side=_from_side,
    weights=_weights,
    to_levels=levels_of_digits,
    from_levels=digits_of_levels,
)
