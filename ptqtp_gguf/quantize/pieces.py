"""A piece of a tensor, some whole rows, on its way from one type to another; decoding and checksums."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from ..codec import F32, MAX_LEVEL, SMALLEST_SCALE, TYPES, U8, native
from ..llamacpp import ggml
from ..source import Importance


class Encoded(NamedTuple):
    """A quantized piece and what was seen of its values."""

    data: U8  # packed rows (R, B); (R, 0) from a probe
    error: float = 0.0  # sum of (w - r)^2, r the reconstruction
    power: float = 0.0  # sum of w^2
    bad: int = -1  # index in the piece, row by row, of the first weight that is NaN or Inf; -1 = none
    largest: float = 0.0  # largest finite |w|; beyond the type's reach the data is worthless, as it is where bad >= 0
    groups: int = 0  # groups with a weight other than zero
    below: int = 0  # those of them whose weights all lie below 5 * 2^-15, about the reach of the smallest scale
    hash: int = 0  # checksum of the reconstruction (native/codec/hash.h), to be added over pieces mod 2^64
    moved: int = 0  # from a probe: bit t is set where iteration t of `paper` moved some scales by 1e-4 or more


MASK = (1 << 64) - 1  # checksums of pieces add up modulo 2^64
FLOOR = MAX_LEVEL * SMALLEST_SCALE  # a group whose largest weight is smaller lies below the scales' range


class Pending(Protocol):
    """A piece on its way."""

    def result(self) -> Encoded: ...


class Encoder(Protocol):
    """Encodes pieces; at most `depth` may be pending at a time, and they finish in order."""

    depth: int
    name: str

    def submit(
        self, raw: U8, source_type: int, target: int, method: str, first: int, importance: Importance | None = None
    ) -> Pending:
        """raw uint8 (R, bytes a row); first: index, in its tensor, of the piece's first weight; importance: the
        tensor's, for a type that uses one."""

    def close(self) -> None: ...


class Done:
    """A piece that is ready."""

    def __init__(self, encoded: Encoded) -> None:
        self._encoded = encoded

    def result(self) -> Encoded:
        return self._encoded


def to_float(raw: U8, type_id: int, threads: int = 0) -> F32:
    """uint8 (R, B) of any type -> float32 (R, C). Raises InputError for a type that nobody here decodes."""
    flat = native.to_float(type_id, raw, threads)
    if flat is not None:
        return flat.reshape(len(raw), -1)
    kind = TYPES.get(type_id)
    return native.dequantize(kind, raw) if kind else ggml.dequantize(type_id, raw, threads)


def checksum(data: U8, first_byte: int = 0, threads: int = 0) -> int:
    """64 bits over bytes and their place; of pieces that start at multiples of four bytes, the sum mod 2^64."""
    flat = data.reshape(-1)
    if flat.size % 4 or flat.ctypes.data % 4:
        flat = np.concatenate([flat, np.zeros(-flat.size % 4, np.uint8)])
    return native.float_hash(flat.view(np.float32), first_byte // 4, threads)
