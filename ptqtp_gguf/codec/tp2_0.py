"""TP2_0: w = a1*t1 + a2*t2, groups of 128, two fp16 scales a group; a block is four units."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .arrays import F32, U8
from .tensor_type import Scales, TensorType
from .unit import UNIT, UNIT_WORDS

GROUP = 4 * UNIT

# Digit d = 3*(t1+1) + (t2+1).
T1_OF_DIGIT = np.arange(9) // 3 - 1
T2_OF_DIGIT = np.arange(9) % 3 - 1


def _to_side(alphas: Scales) -> U8:
    """The bytes of the two fp16 numbers are the side bytes of the four units."""
    return np.ascontiguousarray(alphas.astype("<f2")).view(np.uint8).reshape(-1)


def _from_side(side: U8, rows: int) -> Scales:
    return np.ascontiguousarray(side).view("<f2").astype(np.float16).reshape(rows, -1, 2)


def _weights(digits: U8, alphas: Scales) -> F32:
    a = alphas.astype(np.float32)[..., None]
    shape = (len(digits), -1, GROUP)
    t1 = T1_OF_DIGIT[digits].astype(np.float32).reshape(shape)
    t2 = T2_OF_DIGIT[digits].astype(np.float32).reshape(shape)
    return (a[:, :, 0] * t1 + a[:, :, 1] * t2).reshape(digits.shape)


def _bad_scale(side: U8) -> NDArray[np.bool_]:
    """Inf and NaN have all bits of the exponent set."""
    alphas = np.ascontiguousarray(side).view("<u2").reshape(-1, 2)
    bad: NDArray[np.bool_] = ((alphas & 0x7C00) == 0x7C00).any(axis=1)
    return bad


TP2_0 = TensorType(
    id=250,
    name="TP2_0",
    since=1,
    block=GROUP,
    size=4 * (2 * UNIT_WORDS + 1) + 2 * 2,
    group=GROUP,
    reach=32768.0,
    planes=2,
    scale_dtype="float16",
    scales=2,
    smallest_scale=0.0,
    levels=(),
    calibratable=False,
    q4_0_twin=False,
    to_side=_to_side,
    from_side=_from_side,
    weights=_weights,
    bad_scale=_bad_scale,
)
