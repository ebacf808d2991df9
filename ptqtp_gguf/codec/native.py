"""The only door to native/: the shared library, through ctypes.

The library is built with the package (CMakeLists.txt) and lies in ptqtp_gguf/_native. The calls release the GIL.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import OutOfReach, QuantizeError, RuntimeMissing
from .arrays import F32, I8, U8
from .tensor_type import TensorType
from .types import TYPES
from .unit import UNIT_BYTES

_OK = 0
_TOO_LARGE = 8


class _Kernel(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("type", ctypes.c_int),
        ("dot", ctypes.CFUNCTYPE(ctypes.c_float, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)),
        ("supported", ctypes.CFUNCTYPE(ctypes.c_bool)),
    )


class _Type(ctypes.Structure):  # struct ptqtp_type_traits, without its functions
    _fields_ = (
        ("type", ctypes.c_int),
        ("since", ctypes.c_int),
        ("planes", ctypes.c_int),
        ("name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("size", ctypes.c_size_t),
        ("scale_size", ctypes.c_size_t),
        ("reach", ctypes.c_float),
        ("panels", ctypes.c_bool),
        ("functions", ctypes.c_void_p * 4),
    )


class _Method(ctypes.Structure):  # struct ptqtp_method_traits
    _fields_ = (
        ("method", ctypes.c_int),
        ("name", ctypes.c_char_p),
        ("whole_matrix", ctypes.c_bool),
        ("importance", ctypes.c_bool),
    )


class TypeRow(NamedTuple):
    """A row of the C table of types (native/codec/types.c). Sizes in weights and bytes, as in TensorType."""

    id: int
    name: str
    since: int
    block: int
    group: int
    size: int
    planes: int
    scale_size: int  # bytes of scales a group
    reach: float


class MethodRow(NamedTuple):
    """A row of the C table of methods (native/quantize/methods.c)."""

    id: int
    name: str
    whole_matrix: bool
    takes_importance: bool
    types: tuple[int, ...]  # ids of the types that it makes


class _Stats(ctypes.Structure):
    _fields_ = (("error", ctypes.c_double), ("power", ctypes.c_double), ("hash", ctypes.c_uint64))


class _Scan(ctypes.Structure):
    _fields_ = (
        ("bad", ctypes.c_int64),
        ("largest", ctypes.c_float),
        ("groups", ctypes.c_int64),
        ("below", ctypes.c_int64),
    )


class Stats(NamedTuple):
    """What quantizing did to a piece of a tensor."""

    error: float  # sum of (w - r)^2, r the quantizer's own reconstruction, before packing
    power: float  # sum of w^2
    hash: int  # float_hash of r


class Scan(NamedTuple):
    """What a piece of a tensor holds."""

    bad: int  # index of the first NaN or Inf, or -1
    largest: float  # largest |x| of the finite ones
    groups: int  # groups with any finite weight that is not 0
    below: int  # those of them whose largest |x| is below the floor


def library_path() -> Path:
    """Where the library must lie. Raises RuntimeMissing if it does not, or on a big-endian machine."""
    if sys.byteorder != "little":
        raise RuntimeMissing("ptqtp-gguf runs on little-endian machines only; this one is big-endian")
    suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    path = Path(__file__).parents[1] / "_native" / f"libptqtp{suffix}"
    if not path.is_file():
        raise RuntimeMissing(f"native library {path} is missing; install the package with 'pip install .' or 'make'")
    return path


@functools.cache
def _lib() -> ctypes.CDLL:
    lib = ctypes.CDLL(str(library_path()))
    p, i, i64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    lib.ptqtp_status_text.argtypes, lib.ptqtp_status_text.restype = [i], ctypes.c_char_p
    lib.ptqtp_type_size.argtypes, lib.ptqtp_type_size.restype = [i], ctypes.c_size_t
    lib.ptqtp_block_size.argtypes, lib.ptqtp_block_size.restype = [i], i64
    lib.ptqtp_type_table.argtypes = lib.ptqtp_method_table.argtypes = [ctypes.POINTER(i)]
    lib.ptqtp_type_table.restype, lib.ptqtp_method_table.restype = ctypes.POINTER(_Type), ctypes.POINTER(_Method)
    lib.ptqtp_method_makes.argtypes, lib.ptqtp_method_makes.restype = [i, i], ctypes.c_bool
    for t in TYPES.values():
        for what in ("pack", "unpack"):
            getattr(lib, f"ptqtp_{what}_{t.name.lower()}").argtypes = [p, p, p, i64]
        dequantize = getattr(lib, f"ptqtp_dequantize_{t.name.lower()}")
        dequantize.argtypes, dequantize.restype = [p, p, i64], None
    lib.ptqtp_validate.argtypes = [i, p, ctypes.c_size_t, ctypes.POINTER(i64)]
    u64, f = ctypes.c_uint64, ctypes.c_float
    lib.ptqtp_quantize_stats.argtypes = [i, i, p, p, p, i64, i64, u64, i, ctypes.POINTER(_Stats)]
    lib.ptqtp_check.argtypes = [i, p, i64, u64, i, ctypes.POINTER(u64), ctypes.POINTER(i64)]
    lib.ptqtp_to_float.argtypes = lib.ptqtp_from_float.argtypes = [i, p, p, i64, i]
    lib.ptqtp_scan.argtypes = [p, i64, i64, f, i, ctypes.POINTER(_Scan)]
    lib.ptqtp_read_sum.argtypes, lib.ptqtp_read_sum.restype = [p, ctypes.c_size_t], u64
    lib.ptqtp_nearest_levels.argtypes = [p, p, i64, i]
    lib.ptqtp_levels_of_digits.argtypes = lib.ptqtp_digits_of_levels.argtypes = [i, p, p, i64, i]
    lib.ptqtp_count_words.argtypes = [p, i64, i, p, p]
    lib.ptqtp_count_third.argtypes = [p, i64, i, p]
    lib.ptqtp_hash.argtypes, lib.ptqtp_hash.restype = [p, i64, u64, i], u64
    matrices = (p, i64) * 5
    lib.ptqtp_gptq_block.argtypes = lib.ptqtp_cd_block.argtypes = [i, i64, i64, *matrices, i, i]
    lib.ptqtp_kernels.argtypes = [ctypes.POINTER(i)]
    lib.ptqtp_kernels.restype = ctypes.POINTER(_Kernel)
    lib.ptqtp_kernel_for.argtypes, lib.ptqtp_kernel_for.restype = [i], ctypes.POINTER(_Kernel)
    return lib


def _check(status: int, what: str) -> None:
    if status != _OK:
        kind = OutOfReach if status == _TOO_LARGE else QuantizeError
        raise kind(f"{what}: {_lib().ptqtp_status_text(status).decode()}")


def _ptr(a: NDArray[np.generic] | None) -> int | None:
    return None if a is None else a.ctypes.data


def types() -> list[TypeRow]:
    """The library's own table of types, by id."""
    count = ctypes.c_int()
    table = _lib().ptqtp_type_table(ctypes.byref(count))
    rows = [table[i] for i in range(count.value)]
    return [
        TypeRow(r.type, r.name.decode(), r.since, r.block, r.group, r.size, r.planes, r.scale_size, r.reach)
        for r in rows
    ]


@functools.cache
def methods() -> dict[str, MethodRow]:
    """The library's own table of methods, by name."""
    lib, count = _lib(), ctypes.c_int()
    table = lib.ptqtp_method_table(ctypes.byref(count))
    found = {}
    for r in (table[i] for i in range(count.value)):
        made = tuple(t for t in TYPES if lib.ptqtp_method_makes(r.method, t))
        found[r.name.decode()] = MethodRow(r.method, r.name.decode(), r.whole_matrix, r.importance, made)
    return found


def quantize(t: TensorType, method: str, weights: F32, importance: F32 | None = None, threads: int = 0) -> U8:
    """weights float32 (R, C) contiguous, importance (C,) or None -> uint8 rows. See quantize.quantize."""
    return _quantize(t, method, weights, importance, threads, 0, None)


def quantize_stats(
    t: TensorType, method: str, weights: F32, importance: F32 | None = None, threads: int = 0, first: int = 0
) -> tuple[U8, Stats]:
    """`quantize`, and what it did to the weights. first: index of the first weight in its tensor."""
    stats = _Stats()
    out = _quantize(t, method, weights, importance, threads, first, stats)
    return out, Stats(stats.error, stats.power, stats.hash)


def _quantize(
    t: TensorType, method: str, weights: F32, importance: F32 | None, threads: int, first: int, stats: _Stats | None
) -> U8:
    rows, cols = weights.shape
    if cols % t.block:
        raise QuantizeError(f"rows of {cols} weights; {t.name} needs a multiple of {t.block}")
    out = np.empty((rows, cols // t.block * t.size), np.uint8)
    status = _lib().ptqtp_quantize_stats(
        t.id,
        methods()[method].id,
        _ptr(weights),
        _ptr(importance),
        _ptr(out),
        rows,
        cols,
        first,
        threads,
        None if stats is None else ctypes.byref(stats),
    )
    _check(status, f"{method} to {t.name}")
    return out


def dequantize(t: TensorType, data: U8) -> F32:
    """uint8 (R, B) -> float32 (R, C)."""
    data = np.ascontiguousarray(data)
    out = np.empty((data.shape[0], data.shape[1] // t.size * t.block), np.float32)
    getattr(_lib(), f"ptqtp_dequantize_{t.name.lower()}")(_ptr(data), _ptr(out), out.size)
    return out


def first_bad_block(t: TensorType, data: U8) -> int | None:
    """Index of the first block that no packer writes; None if all are good. data: uint8, any shape, whole blocks."""
    data = np.ascontiguousarray(data)
    bad = ctypes.c_int64(-1)
    status = _lib().ptqtp_validate(t.id, _ptr(data), data.nbytes, ctypes.byref(bad))
    if status != _OK and bad.value < 0:
        _check(status, t.name)
    return None if status == _OK else bad.value


def check(t: TensorType, data: U8, first: int = 0, threads: int = 0) -> tuple[int | None, int]:
    """The first bad block or None, and float_hash of the weights, by the library's second decoder, which shares nothing
    with the codec. data: uint8, any shape, contiguous, whole blocks. Raises QuantizeError where they are not whole."""
    if data.nbytes % t.size:
        raise QuantizeError(f"{data.nbytes} bytes of {t.name}; blocks have {t.size}")
    data = np.ascontiguousarray(data)
    sum_, bad = ctypes.c_uint64(), ctypes.c_int64(-1)
    _lib().ptqtp_check(t.id, _ptr(data), data.nbytes // t.size, first, threads, ctypes.byref(sum_), ctypes.byref(bad))
    return (None if bad.value < 0 else bad.value), sum_.value


def float_hash(x: F32, first: int = 0, threads: int = 0) -> int:
    """64-bit checksum of float32 bits and places, x[0] having the index `first`; that of a whole is the sum mod 2**64
    of those of its pieces."""
    x = np.ascontiguousarray(x, np.float32)
    return int(_lib().ptqtp_hash(_ptr(x), x.size, first, threads))


def read_sum(data: U8) -> int:
    """Sum mod 2**64 of the 64-bit words of uint8 (N,), contiguous, as fast as one thread can read memory."""
    return int(_lib().ptqtp_read_sum(_ptr(np.ascontiguousarray(data)), data.nbytes))


_TO_FLOAT = {0: (1, 4), 1: (1, 2), 8: (32, 34), 30: (1, 2)}  # weights and bytes a block of ggml's F32, F16, Q8_0, BF16


def to_float(type_id: int, data: U8, threads: int = 0, out: F32 | None = None) -> F32 | None:
    """uint8, any shape, contiguous, of ggml's F32 (0), F16 (1), Q8_0 (8) or BF16 (30) -> float32 (N,); None for another
    type. out: where to put them, float32 contiguous, at least N. Raises QuantizeError unless the blocks are whole."""
    if type_id not in _TO_FLOAT:
        return None
    block, size = _TO_FLOAT[type_id]
    if data.nbytes % size:
        raise QuantizeError(f"{data.nbytes} bytes of ggml type {type_id}; blocks have {size}")
    data = np.ascontiguousarray(data)
    n = data.nbytes // size * block
    out = np.empty(n, np.float32) if out is None else out[:n]
    if out.size != n or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise QuantizeError(f"output of {out.size} {out.dtype}; {n} contiguous float32 are needed")
    _check(_lib().ptqtp_to_float(type_id, _ptr(data), _ptr(out), n, threads), f"ggml type {type_id}")
    return out


def _from_float(type_id: int, x: F32, threads: int) -> U8:
    """float32 (R, C) -> uint8 rows of ggml's F16, Q8_0 or BF16."""
    block, size = _TO_FLOAT[type_id]
    x = np.ascontiguousarray(x, np.float32)
    rows, cols = x.shape
    if cols % block:
        raise QuantizeError(f"rows of {cols} weights; ggml type {type_id} needs a multiple of {block}")
    out = np.empty((rows, cols // block * size), np.uint8)
    _check(_lib().ptqtp_from_float(type_id, _ptr(x), _ptr(out), x.size, threads), f"ggml type {type_id}")
    return out


def to_q8_0(x: F32, threads: int = 0) -> U8:
    """float32 (R, C), finite -> uint8 (R, C/32*34), the bytes of gguf-py."""
    return _from_float(8, x, threads)


def to_bf16(x: F32, threads: int = 0) -> U8:
    """float32 (R, C) -> uint8 (R, 2*C), bf16 to nearest even."""
    return _from_float(30, x, threads)


def scan(x: F32, group: int, floor: float, threads: int = 0) -> Scan:
    """Looks through float32 (N,), contiguous, in groups of `group`; a last one may be shorter."""
    x = np.ascontiguousarray(x, np.float32)
    found = _Scan()
    _check(_lib().ptqtp_scan(_ptr(x), x.size, group, floor, threads, ctypes.byref(found)), "scan")
    return Scan(found.bad, found.largest, found.groups, found.below)


def count_words(units: U8, five: NDArray[np.uint64], last: NDArray[np.uint64], threads: int = 0) -> None:
    """Counts words of trit-plane data of any type. units: uint8, any shape, contiguous, whole units of 14 bytes.

    five, last: uint64 (65536,), added to: how many of words 0..5 of the units, and of words 6 (side + 256*r), have each
    value. Raises QuantizeError where the units are not whole.
    """
    if units.nbytes % UNIT_BYTES:
        raise QuantizeError(f"{units.nbytes} bytes; units have {UNIT_BYTES}")
    for counts in (five, last):
        if counts.shape != (1 << 16,) or counts.dtype != np.uint64 or not counts.flags.c_contiguous:
            raise QuantizeError(f"counts of {counts.shape} {counts.dtype}; 65536 contiguous uint64 are needed")
    units = np.ascontiguousarray(units)
    status = _lib().ptqtp_count_words(_ptr(units), units.nbytes // UNIT_BYTES, threads, _ptr(five), _ptr(last))
    _check(status, "counting words")


def count_third(units: U8, threads: int = 0) -> NDArray[np.int64]:
    """How many weights of TP2_2 data have the third trit -1, 0, 1: (3,). units: uint8, any shape, whole units of 14
    bytes. Raises QuantizeError where they are not whole."""
    if units.nbytes % UNIT_BYTES:
        raise QuantizeError(f"{units.nbytes} bytes; units have {UNIT_BYTES}")
    units, counts = np.ascontiguousarray(units), np.zeros(3, np.uint64)
    status = _lib().ptqtp_count_third(_ptr(units), units.nbytes // UNIT_BYTES, threads, _ptr(counts))
    _check(status, "counting third trits")
    return counts.astype(np.int64)


def _whole_units(t: TensorType, a: NDArray[np.generic], dtype: str) -> None:
    if not t.levels or a.ndim == 0 or a.shape[-1] % t.block or a.dtype != dtype:
        needs = f"{dtype}, rows a multiple of {t.block}" if t.levels else "a type with levels"
        raise QuantizeError(f"{t.name} of {a.shape} {a.dtype}; {needs} is needed")


def levels_of_digits(t: TensorType, digits: U8, threads: int = 0) -> I8:
    """digits uint8 (..., C), 0..8, C whole blocks -> levels int8 of the same shape, as `TensorType.to_levels`. Raises
    QuantizeError for another digit, dtype or size, and for a type without levels."""
    _whole_units(t, digits, "uint8")
    digits, out = np.ascontiguousarray(digits), np.empty(digits.shape, np.int8)
    status = _lib().ptqtp_levels_of_digits(t.id, _ptr(digits), _ptr(out), out.size, threads)
    _check(status, f"levels of {t.name}")
    return out


def digits_of_levels(t: TensorType, levels: I8, threads: int = 0) -> U8:
    """The inverse, as `TensorType.from_levels`. levels int8 (..., C). What no digits give becomes 255, which no packer
    takes: a level of TP2_1 by itself, of TP2_2 the whole unit."""
    _whole_units(t, levels, "int8")
    levels, out = np.ascontiguousarray(levels), np.empty(levels.shape, np.uint8)
    status = _lib().ptqtp_digits_of_levels(t.id, _ptr(levels), _ptr(out), out.size, threads)
    _check(status, f"digits of {t.name}")
    return out


def nearest_levels(values: int, levels: int, n: int, threads: int = 0) -> None:
    """The levels that a TP2_2 matrix can hold nearest to n values in units of their scale, group by group of 32.

    values, levels: addresses of n contiguous float32, finite, and of n int8 that are written. Raises QuantizeError
    unless n is a multiple of 32.
    """
    _check(_lib().ptqtp_nearest_levels(values, levels, n, threads), "nearest levels")


Matrix = tuple[int, int]  # address of the first element, elements from row to row; rows are contiguous


def gptq_block(
    t: TensorType,
    rows: int,
    cols: int,
    w: Matrix,
    u: Matrix,
    levels: Matrix,
    codes: Matrix,
    err: Matrix,
    window: int = 2,
    threads: int = 0,
) -> None:
    """GPTQ with feedback over one block of columns, in place, as gptq_block of quantize/gptq_reference.py.

    t       TP2_1 or TP2_2; the latter's columns in the order of its chain within each group, w, u and levels alike
    w       float32 (rows, cols), cols a multiple of 32 and at most 256
    u       float32 (cols, cols), this block of the upper U with inv(H) = U^T U; only its upper triangle is read
    levels  int8 (rows, cols), codes uint8 (rows, cols/32), err float32 (rows, cols): written
    window  scale codes tried to each side, 0..255
    Any memory of the CPU will do (numpy's, torch's); buffers may not overlap. Raises QuantizeError for another type,
    and where a size, the window or the distance between rows is out of bounds.
    """
    status = _lib().ptqtp_gptq_block(t.id, rows, cols, *w, *u, *levels, *codes, *err, window, threads)
    _check(status, f"GPTQ block of {t.name}, {rows} x {cols}, window {window}")


def cd_block(
    t: TensorType,
    rows: int,
    cols: int,
    r: Matrix,
    h: Matrix,
    levels: Matrix,
    codes: Matrix,
    delta: Matrix,
    window: int = 2,
    threads: int = 0,
) -> None:
    """A sweep of descent over one block of columns, in place, as cd_block of quantize/gptq_reference.py.

    r       float32 (rows, cols), these columns of (W - levels * scales) H; cols a multiple of 32 and at most 256
    h       float32 (cols, cols), this block of H, symmetric; only its upper triangle is read
    levels  int8 (rows, cols), codes uint8 (rows, cols/32): read and written
    delta   float32 (rows, cols), the change of levels * scales: written
    The rest as for gptq_block.
    """
    status = _lib().ptqtp_cd_block(t.id, rows, cols, *r, *h, *levels, *codes, *delta, window, threads)
    _check(status, f"descent on a block of {t.name}, {rows} x {cols}, window {window}")


def pack(t: TensorType, digits: U8, scales: NDArray[np.generic]) -> U8:
    """digits uint8 (R, C); scales of `TensorType.scale_shape` and `scale_dtype` -> bytes uint8 (R, B)."""
    digits, scales = np.ascontiguousarray(digits), np.ascontiguousarray(scales)
    rows, cols = digits.shape
    out = np.empty((rows, cols // t.block * t.size), np.uint8)
    _check(
        getattr(_lib(), f"ptqtp_pack_{t.name.lower()}")(_ptr(digits), _ptr(scales), _ptr(out), digits.size),
        f"packing {t.name}",
    )
    return out


def unpack(t: TensorType, data: U8) -> tuple[U8, NDArray[np.generic]]:
    """The inverse of `pack`."""
    data = np.ascontiguousarray(data)
    rows = data.shape[0]
    digits = np.empty((rows, data.shape[1] // t.size * t.block), np.uint8)
    scales: NDArray[np.generic] = np.empty(t.scale_shape(*digits.shape), t.scale_dtype)
    _check(
        getattr(_lib(), f"ptqtp_unpack_{t.name.lower()}")(_ptr(data), _ptr(digits), _ptr(scales), digits.size),
        f"unpacking {t.name}",
    )
    return digits, scales


def scale_from_float(s: float) -> int:
    """Nearest TP2_1 scale code."""
    lib = _lib()
    lib.ptqtp_scale_from_float.argtypes, lib.ptqtp_scale_from_float.restype = [ctypes.c_float], ctypes.c_uint8
    return int(lib.ptqtp_scale_from_float(s))


def kernels() -> list[tuple[str, int, bool]]:
    """(name, type id, runs on this CPU) of every dot-product kernel in the library, best first."""
    count = ctypes.c_int()
    table = _lib().ptqtp_kernels(ctypes.byref(count))
    return [(table[k].name.decode(), table[k].type, bool(table[k].supported())) for k in range(count.value)]


def kernel_for(t: TensorType) -> str | None:
    """Name of the kernel in use for the type; None where PTQTP_KERNEL names none that runs here."""
    kernel = _lib().ptqtp_kernel_for(t.id)
    return kernel.contents.name.decode() if kernel else None
