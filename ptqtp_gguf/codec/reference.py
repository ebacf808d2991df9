"""Digits and scales <-> bytes, for any type, in numpy: the readable reference of native/codec/codec.c.

Shapes: R rows, C weights a row; digits are uint8 (R, C) with values 0..8; scales have `TensorType.scale_shape`:
uint8 codes (R, C/32) for TP2_1, float16 (R, C/128, 2) for TP2_0. B is bytes a row.
"""

from __future__ import annotations

import numpy as np

from ..errors import InputError, QuantizeError
from .arrays import F32, U8
from .tensor_type import Scales, TensorType
from .unit import SIDE, UNIT, UNIT_BYTES, bad_units, pack_units, unpack_units


def row_bytes(t: TensorType, n: int) -> int:
    """Bytes of a row of n weights. Raises QuantizeError unless n is a multiple of the block."""
    if n % t.block:
        raise QuantizeError(f"rows of {n} weights; {t.name} needs a multiple of {t.block}")
    return n // t.block * t.size


def pack(t: TensorType, digits: U8, scales: Scales) -> U8:
    """digits (R, C) and scales -> bytes (R, B). Raises QuantizeError for a digit above 8 or a row of a broken block."""
    rows, cols = digits.shape
    nbytes = row_bytes(t, cols)
    return pack_units(digits.reshape(-1, UNIT), t.to_side(scales)).reshape(rows, nbytes)


def unpack(t: TensorType, data: U8) -> tuple[U8, Scales]:
    """bytes (R, B) -> digits (R, C) and scales. Any bytes give digits 0..8."""
    units = _units(t, data)
    return unpack_units(units).reshape(len(data), -1), t.from_side(units[:, SIDE], len(data))


def dequantize(t: TensorType, data: U8) -> F32:
    """bytes (R, B) -> float32 (R, C). Any bytes decode; `first_bad_block` tells those that no packer writes."""
    return t.weights(*unpack(t, data))


def first_bad_block(t: TensorType, data: U8) -> int | None:
    """Index of the first block with a word that no packer writes or a scale that is not finite, or None."""
    units = _units(t, data)
    blocks = bad_units(units).reshape(-1, t.block // UNIT).any(axis=1)
    if t.bad_scale:
        blocks |= t.bad_scale(units[:, SIDE])
    return int(blocks.argmax()) if blocks.any() else None


def _units(t: TensorType, data: U8) -> U8:
    if data.ndim != 2 or data.shape[1] % t.size:
        raise InputError(f"{t.name} data of shape {data.shape}: rows must be a multiple of {t.size} bytes")
    return np.ascontiguousarray(data).reshape(-1, UNIT_BYTES)
