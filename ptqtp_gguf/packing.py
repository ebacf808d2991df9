"""Digits and scales <-> bytes, in numpy: the readable reference of native/codec/codec.c.

A unit holds 32 weights in 14 bytes:

    byte   0 1   2 3   4 5   6 7   8 9  10 11   12     13
         [ q0  | q1  | q2  | q3  | q4  | q5  | side | r ]      q: little-endian uint16, r: uint8

q_j = ceil(N * 65536 / 9**5), N = its five base-9 digits, most significant first; r = ceil(N * 256 / 81), two digits.
Example: digits of word 0 (weights 0, 1, 14, 15, 26) = 8, 0, 4, 4, 1 -> N = 8*6561 + 0*729 + 4*81 + 4*9 + 1 = 52849
-> q0 = ceil(52849 * 65536 / 59049) = 58655 = 0xe51f -> bytes 1f e5. Back: 58655*9 = 8*65536 + 3607: digit 8, and so on.

Shapes: R rows, C weights a row; arrays of digits are uint8 (R, C) with values 0..8.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import format as fmt
from .errors import InputError, QuantizeError

U8 = NDArray[np.uint8]
U16 = NDArray[np.uint16]
F32 = NDArray[np.float32]

LEVEL_OF_DIGIT = np.array(fmt.LEVELS, dtype=np.float32)
DIGIT_OF_LEVEL = np.array([fmt.LEVELS.index(v) if v in fmt.LEVELS else 255 for v in range(-5, 6)], dtype=np.uint8)
T1_OF_DIGIT = np.arange(9) // 3 - 1
T2_OF_DIGIT = np.arange(9) % 3 - 1

_WORD_SLOTS = np.array(
    [[*fmt.PAIR01[j], *fmt.PAIR23[j], fmt.LAST[j]] for j in range(fmt.UNIT_WORDS)]
)  # (6, 5) weight index
_REST_SLOTS = np.array(fmt.PAIR01[fmt.UNIT_WORDS])  # (2,)


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
    digits: U8 = DIGIT_OF_LEVEL[levels.astype(np.intp) + fmt.MAX_LEVEL]
    return digits


def _pack_units(digits: U8, side: U8) -> U8:
    """digits (U, 32), side (U,) -> bytes (U, 14)."""
    if digits.size and digits.max() > 8:
        raise QuantizeError(f"digit {digits.max()} above 8")
    powers = 9 ** np.arange(4, -1, -1)
    n = digits[:, _WORD_SLOTS].astype(np.int64) @ powers  # (U, 6)
    words = -(-n * 65536 // fmt.POW5)
    rest = digits[:, _REST_SLOTS].astype(np.int64) @ powers[3:]
    out = np.empty((len(digits), fmt.UNIT_BYTES), np.uint8)
    out[:, 0:12] = words.astype("<u2").view(np.uint8)
    out[:, 12] = side
    out[:, 13] = -(-rest * 256 // fmt.POW2)
    return out


def _unpack_units(units: U8) -> U8:
    """bytes (U, 14) -> digits (U, 32). Any bytes give digits 0..8."""
    words = np.ascontiguousarray(units).view("<u2").astype(np.uint32)  # (U, 7); the last is side + 256*r
    digits = np.empty((len(units), fmt.UNIT), np.uint8)
    for k in range(5):
        words *= 9
        d = words >> 16
        words &= 0xFFFF
        if k < 4:
            slots = (fmt.PAIR01, fmt.PAIR23)[k // 2]
            digits[:, [s[k % 2] for s in slots]] = d[:, : len(slots)]
        else:
            digits[:, fmt.LAST] = d[:, : fmt.UNIT_WORDS]
    return digits


def row_bytes(t: fmt.TensorType, n: int) -> int:
    """Bytes of a row of n weights. Raises QuantizeError unless n is a multiple of the block."""
    if n % t.block:
        raise QuantizeError(f"rows of {n} weights; {t.name} needs a multiple of {t.block}")
    return n // t.block * t.size


def pack_tp2_1(digits: U8, codes: U8) -> U8:
    """digits (R, C), scale codes uint8 (R, C/32) -> bytes (R, C/32*14)."""
    rows, cols = digits.shape
    nbytes = row_bytes(fmt.TP2_1, cols)
    return _pack_units(digits.reshape(-1, fmt.UNIT), codes.reshape(-1)).reshape(rows, nbytes)


def pack_tp2_0(digits: U8, alphas: NDArray[np.float16]) -> U8:
    """digits (R, C), scales fp16 (R, C/128, 2) -> bytes (R, C/128*56). The fp16 bytes are the four side bytes."""
    rows, cols = digits.shape
    nbytes = row_bytes(fmt.TP2_0, cols)
    side = np.ascontiguousarray(alphas.astype("<f2")).view(np.uint8).reshape(-1)
    return _pack_units(digits.reshape(-1, fmt.UNIT), side).reshape(rows, nbytes)


def unpack_tp2_1(data: U8) -> tuple[U8, U8]:
    """bytes (R, B) -> digits (R, C), scale codes (R, C/32)."""
    units = _units(fmt.TP2_1, data)
    return _unpack_units(units).reshape(len(data), -1), units[:, 12].reshape(len(data), -1)


def unpack_tp2_0(data: U8) -> tuple[U8, NDArray[np.float16]]:
    """bytes (R, B) -> digits (R, C), scales fp16 (R, C/128, 2)."""
    units = _units(fmt.TP2_0, data)
    alphas = np.ascontiguousarray(units[:, 12]).view("<f2").astype(np.float16)
    return _unpack_units(units).reshape(len(data), -1), alphas.reshape(len(data), -1, 2)


def _units(t: fmt.TensorType, data: U8) -> U8:
    if data.ndim != 2 or data.shape[1] % t.size:
        raise InputError(f"{t.name} data of shape {data.shape}: rows must be a multiple of {t.size} bytes")
    return np.ascontiguousarray(data).reshape(-1, fmt.UNIT_BYTES)


def dequantize(t: fmt.TensorType, data: U8) -> F32:
    """bytes (R, B) -> float32 (R, C). Any bytes decode; `first_bad_block` tells those that no packer writes."""
    if t.id == fmt.TP2_1.id:
        digits, codes = unpack_tp2_1(data)
        levels = LEVEL_OF_DIGIT[digits].reshape(len(data), -1, fmt.UNIT)
        return (scale_to_float(codes)[..., None] * levels).reshape(digits.shape)
    digits, alphas = unpack_tp2_0(data)
    a = alphas.astype(np.float32)[..., None]
    shape = (len(data), -1, fmt.TP2_0.block)
    t1 = T1_OF_DIGIT[digits].astype(np.float32).reshape(shape)
    t2 = T2_OF_DIGIT[digits].astype(np.float32).reshape(shape)
    return (a[:, :, 0] * t1 + a[:, :, 1] * t2).reshape(digits.shape)


def first_bad_block(t: fmt.TensorType, data: U8) -> int | None:
    """Index of the first block with a word that no packer writes or a scale that is not finite, or None."""
    units = _units(t, data)
    words = np.ascontiguousarray(units[:, :12]).view("<u2").astype(np.int64)
    n = words * fmt.POW5 >> 16
    bad = (-(-n * 65536 // fmt.POW5) != words).any(axis=1)
    rest = units[:, 13].astype(np.int64)
    bad |= -(-(rest * fmt.POW2 >> 8) * 256 // fmt.POW2) != rest
    per_block = t.block // fmt.UNIT
    blocks: NDArray[Any] = bad.reshape(-1, per_block).any(axis=1)
    if t.id == fmt.TP2_0.id:
        alphas = np.ascontiguousarray(units[:, 12]).view("<u2").reshape(-1, 2)
        blocks |= ((alphas & 0x7C00) == 0x7C00).any(axis=1)
    return int(blocks.argmax()) if blocks.any() else None
