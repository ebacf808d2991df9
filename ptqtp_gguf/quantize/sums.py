"""Sums in the order of the native core, so that both round alike.

A sum over a group runs in eight lanes: lane l adds elements l, l+8, l+16, ... in turn; the lanes are then joined by
halves. See the head of native/quantize/quantize.c.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T", np.float32, np.float64)

LANES = 8


def lane_sum(x: NDArray[T]) -> NDArray[T]:
    """x (..., G) with G a multiple of 8 -> (...,), in x's own precision."""
    lanes = x.reshape(*x.shape[:-1], -1, LANES)
    acc = lanes[..., 0, :] + lanes.dtype.type(0)  # the native sums start at 0, which turns -0 into +0
    for k in range(1, lanes.shape[-2]):
        acc += lanes[..., k, :]
    acc = acc[..., :4] + acc[..., 4:]
    acc = acc[..., :2] + acc[..., 2:]
    return acc[..., 0] + acc[..., 1]


def ordered_sum(x: NDArray[T]) -> NDArray[T]:
    """x (..., G) -> (...,), element after element, in x's own precision."""
    total: NDArray[T] = np.add.accumulate(x, axis=-1)[..., -1]
    return total
