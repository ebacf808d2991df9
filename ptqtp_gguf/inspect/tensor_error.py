"""How far one version of a tensor is from another, both decoded: verify and diff measure by it."""

from __future__ import annotations

import functools
import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from ..codec import U8
from ..errors import InputError
from ..files import GGML_TYPES, TensorInfo
from ..quantize import to_float
from ..source import Source, rows_together

PIECE = 1 << 18  # weights that a thread decodes at a time: both versions stay in its cache


class Distance(NamedTuple):
    """Two versions of a tensor, or of many. Weights that are not finite give NaN or Inf."""

    error: float  # sum of (a - b)^2
    power: float  # sum of b^2, b being the reference
    largest: float  # largest |a - b|
    identical: bool  # same type, same bytes

    @property
    def rel_mse(self) -> float:
        """Sum of squared differences over the reference's sum of squares; where that is 0, the former alone."""
        return self.error / self.power if self.power else self.error

    def plus(self, other: Distance) -> Distance:
        """Of the weights of both."""
        return Distance(
            self.error + other.error,
            self.power + other.power,
            math.nan if math.isnan(self.largest + other.largest) else max(self.largest, other.largest),
            self.identical and other.identical,
        )


NONE = Distance(0.0, 0.0, 0.0, True)


@functools.cache
def decodable(type_id: int) -> bool:
    """Whether weights of the type can be decoded here."""
    try:
        to_float(np.zeros((1, GGML_TYPES[type_id][2]), np.uint8), type_id, 1)
    except InputError:
        return False
    return True


class Meter:
    """Measures tensors on threads; the results do not depend on their number. Use as a context manager.

    threads: 0 = all cores. Memory: some MB a thread, whatever the tensor.
    """

    def __init__(self, threads: int = 0) -> None:
        threads = threads or os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(threads, "distance")
        self._ahead = threads + 2

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def distance(self, a: Source, t: TensorInfo, b: Source, reference: TensorInfo) -> Distance:
        """Distance of a's tensor t to b's tensor `reference`, of the same shape.

        Raises InputError where a file cannot be read, or for a type that cannot be decoded (see `decodable`).
        """
        same = t.type == reference.type
        return self._over(a, t, b, reference, lambda x, y: _measure(x, t.type, y, reference.type, same))

    def identical(self, a: Source, t: TensorInfo, b: Source, other: TensorInfo) -> bool:
        """Whether both have the same type and bytes, of any type. Raises InputError where a file cannot be read."""
        if (t.type, t.shape) != (other.type, other.shape):
            return False
        found = self._over(a, t, b, other, lambda x, y: NONE._replace(identical=bool(np.array_equal(x, y))))
        return found.identical

    def _over(
        self, a: Source, t: TensorInfo, b: Source, other: TensorInfo, measure: Callable[[U8, U8], Distance]
    ) -> Distance:
        """The sum over pieces, in their order. One thread reads, since a source may come in order only."""
        rows = rows_together(t.shape[0], PIECE)
        total = NONE
        for found in self._ordered(
            self._pool.submit(measure, x, y) for x, y in zip(a.pieces(t, rows), b.pieces(other, rows), strict=True)
        ):
            total = total.plus(found)
        return total

    def _ordered(self, jobs: Iterator[Future[Distance]]) -> Iterator[Distance]:
        """Results in the order of the jobs, a few of which are begun ahead."""
        waiting: deque[Future[Distance]] = deque()
        for job in jobs:
            waiting.append(job)
            if len(waiting) > self._ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _measure(x: U8, kind: int, y: U8, reference: int, same: bool) -> Distance:
    with np.errstate(all="ignore"):  # Inf and NaN of a damaged file come out as NaN
        w = to_float(y, reference, 1)
        power = float(np.vdot(w, w))
        if same and np.array_equal(x, y):
            return Distance(0.0, power, 0.0, True)
        d = to_float(x, kind, 1) - w
        return Distance(float(np.vdot(d, d)), power, max(float(d.max()), -float(d.min())), False)
