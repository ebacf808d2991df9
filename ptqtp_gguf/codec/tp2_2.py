"""TP2_2: w = s * (3*t1 + 2*t2 + p), groups of 32, one 8-bit scale code a group; a block is one unit, as of TP2_1.

The third trit p is not stored. It follows from the second trits of the two weights before, in the order of CHAIN, by a
ternary convolutional code: p = t2[-1] + t2[-2] mod 3, as -1, 0 or 1. Before the first weight stand -t2 of the last two:
the chain closes with its sign changed, so that no two units with the same scale hold the same levels.
Trellis-coded quantization: Marcellin and Fischer, IEEE Trans. Commun. 38(1), 1990; its closed form: tail-biting codes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .arrays import F32, I8, I64, U8
from .tensor_type import Scales, TensorType
from .tp2_1 import SMALLEST_SCALE, TP2_1, weights_of_levels
from .unit import UNIT, UNIT_WORDS

MAX_LEVEL = 6

# Weight at each place of the chain. A SIMD kernel decodes the unit as eight vectors, a row's four weights a lane: the
# chain takes byte 0 of all eight, then byte 1, and so on.
QUADS = np.array([*range(12), *range(14, 26), 26, 28, 27, 29, 30, 12, 31, 13]).reshape(8, 4)
CHAIN = QUADS.T.reshape(-1)

THIRD_OF_SUM = np.array([1, -1, 0, 1, -1])  # of a sum -2..2


def _lap(levels: I64, before2: I64, before: I64) -> tuple[I64, I64]:
    """levels (U, 32) along the chain, trits (U,) before its first weight -> trits t1, t2 (U, 32); t1 may be out of
    range, where no digits give the levels."""
    t1, t2 = np.empty_like(levels), np.empty_like(levels)
    for c in range(UNIT):
        p = THIRD_OF_SUM[before + before2 + 2]
        t2[:, c] = (p - levels[:, c] + 1) % 3 - 1  # level = 2*t2 + p = p - t2 mod 3
        t1[:, c] = (levels[:, c] - p - 2 * t2[:, c]) // 3
        before2, before = before, t2[:, c]
    return t1, t2


def levels_of_digits(digits: U8) -> I8:
    """Digits 0..8 (R, C), C a multiple of 32 -> levels -6..6."""
    units = digits.reshape(-1, UNIT)[:, CHAIN].astype(np.int64)
    t1, t2 = units // 3 - 1, units % 3 - 1
    before = np.concatenate([-t2[:, -2:], t2], axis=1)
    out = np.empty(units.shape, np.int8)
    out[:, CHAIN] = 3 * t1 + 2 * t2 + THIRD_OF_SUM[before[:, :-2] + before[:, 1:-1] + 2]
    return out.reshape(digits.shape)


def digits_of_levels(levels: NDArray[np.signedinteger]) -> U8:
    """The inverse, unique where it exists. Units whose levels no digits give become 255, which no packer takes.

    A lap from start S ends in S + E, E being the end of one from zero (the trits are linear in S, with a period of 8).
    It must end in -S, so S = E.
    """
    units = levels.reshape(-1, UNIT)[:, CHAIN].astype(np.int64)
    zero = np.zeros(len(units), np.int64)
    _, t2 = _lap(units, zero, zero)
    start2, start = t2[:, -2], t2[:, -1]
    t1, t2 = _lap(units, start2, start)
    good = (np.abs(t1) <= 1).all(axis=1) & (t2[:, -2] == -start2) & (t2[:, -1] == -start)
    out = np.empty(units.shape, np.uint8)
    out[:, CHAIN] = np.where(good[:, None], 3 * (t1 + 1) + t2 + 1, 255)
    return out.reshape(levels.shape)


def _weights(digits: U8, codes: Scales) -> F32:
    return weights_of_levels(levels_of_digits(digits), codes)


TP2_2 = TensorType(
    id=252,
    name="TP2_2",
    since=2,
    block=UNIT,
    size=2 * UNIT_WORDS + 1 + 1,
    group=UNIT,
    reach=MAX_LEVEL * 1.9375,
    planes=2,
    scale_dtype="uint8",
    scales=1,
    smallest_scale=SMALLEST_SCALE,
    levels=tuple(range(-MAX_LEVEL, MAX_LEVEL + 1)),
    calibratable=True,
    q4_0_twin=True,
    to_side=TP2_1.to_side,
    from_side=TP2_1.from_side,
    weights=_weights,
    to_levels=levels_of_digits,
    from_levels=digits_of_levels,
    chain=tuple(CHAIN.tolist()),
)
