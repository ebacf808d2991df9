"""How the digits and scales of trit-plane tensors are distributed: by tensor, by role, over a whole file.

A word of five digits has one of 65536 values, so words are counted, and decoded once they are counted: a file is read
about as fast as the counting goes, and memory is that of a piece. The third trits of TP2_2 depend on neighbours in
other words: those are decoded. Scales of all types are fp16 values without loss (docs/format.md), so they are counted
as such. Their histogram has four bins an octave, which are four neighbouring 8-bit codes each: the edges are
(1 + m/4) * 2^e.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..codec import SIDE, TP2_1, TP2_2, TYPES, U8, UNIT, UNIT_BYTES, native, pack, scale_to_float
from ..files import ReadAhead, TensorInfo
from ..plan import Role, role_of
from ..progress import Progress, no_progress
from ..source import GgufSource, Source, rows_together

DIGIT_VALUES = tuple(range(-4, 5))  # digit - 4 = 3*t1 + t2
TRIT_VALUES = (-1, 0, 1)
BINS_AN_OCTAVE = 4
FINITE_HALVES = 0x7C00  # fp16 magnitudes by their bits: 0, the finite ones in order, then Inf and NaN
PIECE = 1 << 24  # weights read at a time
_WORDS = 1 << 16
_SHIFT = 21  # of a float32's bits: exponent and two bits of the mantissa are left

_HALVES = np.arange(FINITE_HALVES, dtype=np.uint16).view(np.float16).astype(np.float32)
_BIN_OF_HALF = (_HALVES.view(np.uint32) >> _SHIFT).astype(np.int64)  # of zero: 0
_HALF_OF_CODE = scale_to_float(np.arange(256, dtype=np.uint8)).astype(np.float16).view(np.uint16)
_EMPTY = pack(TP2_1, np.full((1, UNIT), 4, np.uint8), np.zeros((1, 1), np.uint8))  # code 0, all digits 4; of TP2_2 too


@functools.cache
def _digits_of_words(places: int) -> NDArray[np.float64]:
    """(9, 65536): how often each digit stands in the first `places` of a word. Floats are exact here, and faster."""
    words, out = np.arange(_WORDS), np.zeros((9, _WORDS))
    for _ in range(places):
        words *= 9
        out[words >> 16, np.arange(_WORDS)] += 1
        words &= 0xFFFF
    return out


@dataclass(frozen=True)
class PlaneStatistics:
    """Digits and scales of some weights. A group is empty if it is all zero; its scale is not counted."""

    digits: tuple[int, ...]  # how often each of 0..8 stands; DIGIT_VALUES are what they mean
    third: tuple[int, ...]  # of the weights of TP2_2, how often the third trit is -1, 0, 1; () where there are none
    scales: tuple[int, ...]  # |scale|: two a group for TP2_0, one for the others; one entry a bin
    edges: tuple[float, ...]  # one more than bins; a bin holds its lower edge
    smallest: float  # of the scales; this and the next two NaN where none is counted
    median: float
    largest: float
    empty: int  # scales of 0, and the codes of all-zero groups
    damaged: int  # scales that are Inf or NaN

    @property
    def weights(self) -> int:
        return sum(self.digits)

    @property
    def zero_share(self) -> tuple[float, ...]:
        """Share of zeros in plane 1 and in plane 2; then in plane 3, where there is one."""
        n = max(1, self.weights)
        stored = sum(self.digits[3:6]) / n, sum(self.digits[1::3]) / n
        return (*stored, self.third[1] / sum(self.third)) if self.third else stored

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """For JSON: digits and scales, as a report has them."""
        none = not self.scales
        third = {"third": {"values": list(TRIT_VALUES), "counts": list(self.third)}} if self.third else {}
        return {
            "digits": {
                "values": list(DIGIT_VALUES),
                "counts": list(self.digits),
                "zero_share": [round(s, 6) for s in self.zero_share],
            },
            **third,
            "scales": {
                "edges": list(self.edges),
                "counts": list(self.scales),
                "min": None if none else self.smallest,
                "median": None if none else self.median,
                "max": None if none else self.largest,
                "empty": self.empty,
                "damaged": self.damaged,
            },
        }


class _Count:
    """Adds up pieces."""

    def __init__(self) -> None:
        self.five, self.last = np.zeros(_WORDS, np.uint64), np.zeros(_WORDS, np.uint64)
        self.third = np.zeros(3, np.int64)
        self.halves = np.zeros(1 << 15, np.int64)  # scales, by the bits of their magnitude

    def add(self, other: _Count) -> None:
        self.five += other.five
        self.last += other.last
        self.third += other.third
        self.halves += other.halves

    def take(self, data: U8, type_id: int, threads: int) -> None:
        """data: uint8, any shape, contiguous, whole blocks."""
        native.count_words(data, self.five, self.last, threads)
        if type_id == TP2_2.id:
            self.third += native.count_third(data, threads)
        units = data.reshape(-1, UNIT_BYTES)
        sides = units[:, SIDE]
        if TYPES[type_id].scale_dtype == "uint8":
            codes = np.bincount(sides, minlength=256)
            if codes[0]:
                empty = int((units[sides == 0] == _EMPTY).all(axis=1).sum())
                codes[0] -= empty
                self.halves[0] += empty
            self.halves[_HALF_OF_CODE] += codes
        else:
            bits = np.ascontiguousarray(sides).view("<u2") & 0x7FFF
            self.halves += np.bincount(bits, minlength=1 << 15)

    def statistics(self) -> PlaneStatistics:
        places = ((5, self.five), (2, self.last))  # einsum: BLAS would wake its threads for this
        digits = sum(np.einsum("dw,w->d", _digits_of_words(n), counts.astype(float)) for n, counts in places)
        counts = self.halves[1:FINITE_HALVES]
        used = np.flatnonzero(counts) + 1
        bins: list[int] = []
        edges: list[float] = []
        low = median = high = math.nan
        if used.size:
            first, last = _BIN_OF_HALF[used[0]], _BIN_OF_HALF[used[-1]]
            bins = np.bincount(_BIN_OF_HALF[used] - first, counts[used - 1]).astype(np.int64).tolist()
            edges = (np.arange(first, last + 2, dtype=np.uint32) << _SHIFT).view(np.float32).tolist()
            middle = 1 + np.searchsorted(np.cumsum(counts), (counts.sum() + 1) // 2)
            low, median, high = (float(_HALVES[i]) for i in (used[0], middle, used[-1]))
        empty, damaged = int(self.halves[0]), int(self.halves[FINITE_HALVES:].sum())
        counted = tuple(int(n) for n in digits)
        third = tuple(self.third.tolist()) if self.third.any() else ()
        return PlaneStatistics(counted, third, tuple(bins), tuple(edges), low, median, high, empty, damaged)


@dataclass(frozen=True)
class Statistics:
    """Of a file: by tensor name, by role, and of all. Only trit-plane tensors; `total` is None if there are none."""

    tensors: dict[str, PlaneStatistics]
    roles: dict[Role, PlaneStatistics]
    total: PlaneStatistics | None

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "total": None if self.total is None else self.total.as_dict(),
            "roles": {role.value: s.as_dict() for role, s in self.roles.items()},
            "tensors": {name: s.as_dict() for name, s in self.tensors.items()},
        }


def plane_statistics(path: Path, progress: Progress = no_progress, threads: int = 0) -> Statistics:
    """Count digits and scales of a GGUF file, or of all parts of a split one. threads: 0 = all cores.

    Raises InputError if it is damaged, or cannot be read.
    """
    with GgufSource(path) as source:
        return count_planes(source, progress, threads)


def count_planes(source: Source, progress: Progress = no_progress, threads: int = 0) -> Statistics:
    """`plane_statistics` of an open source."""
    total, done = sum(t.n_weights for t in source.tensors if t.type in TYPES), 0
    found: dict[str, PlaneStatistics] = {}
    roles: dict[Role, _Count] = {}
    count, left = _Count(), 0
    with ReadAhead(_pieces(source)) as pieces:
        for t, piece in pieces:
            if not left:
                progress("counting", done, total, t.name)
                count, left = _Count(), t.nbytes
            count.take(piece, t.type, threads)
            left -= piece.nbytes
            if not left:
                found[t.name] = count.statistics()
                roles.setdefault(role_of(t.name), _Count()).add(count)
                done += t.n_weights
    progress("counting", total, total, "")
    whole = _Count()
    for count in roles.values():
        whole.add(count)
    by_role = {role: roles[role].statistics() for role in Role if role in roles}
    return Statistics(found, by_role, whole.statistics() if found else None)


def _pieces(source: Source) -> Generator[tuple[TensorInfo, U8], None, None]:
    for t in source.tensors:
        if t.type in TYPES:
            for piece in source.pieces(t, rows_together(t.shape[0], PIECE)):
                yield t, piece
