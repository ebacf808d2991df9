"""The only door to native/: the shared library, through ctypes.

The library is built with the package (CMakeLists.txt) and lies in ptqtp_gguf/_native. The calls release the GIL.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import format as fmt
from .errors import QuantizeError, RuntimeMissing
from .packing import F32, U8

_METHODS = {"paper": 0, "search": 1}
_OK = 0


class _Kernel(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("type", ctypes.c_int),
        ("dot", ctypes.CFUNCTYPE(ctypes.c_float, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)),
        ("supported", ctypes.CFUNCTYPE(ctypes.c_bool)),
    )


def library_path() -> Path:
    """Where the library must lie. Raises RuntimeMissing if it does not, or on a big-endian machine."""
    if sys.byteorder != "little":
        raise RuntimeMissing("ptqtp-gguf runs on little-endian machines only; this one is big-endian")
    suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    path = Path(__file__).parent / "_native" / f"libptqtp{suffix}"
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
    for name in ("ptqtp_pack_tp2_1", "ptqtp_pack_tp2_0", "ptqtp_unpack_tp2_1", "ptqtp_unpack_tp2_0"):
        getattr(lib, name).argtypes = [p, p, p, i64]
    for name in ("ptqtp_dequantize_tp2_1", "ptqtp_dequantize_tp2_0"):
        getattr(lib, name).argtypes, getattr(lib, name).restype = [p, p, i64], None
    lib.ptqtp_validate.argtypes = [i, p, ctypes.c_size_t, ctypes.POINTER(i64)]
    lib.ptqtp_quantize_parallel.argtypes = [i, i, p, p, p, i64, i64, i]
    lib.ptqtp_kernels.argtypes = [ctypes.POINTER(i)]
    lib.ptqtp_kernels.restype = ctypes.POINTER(_Kernel)
    lib.ptqtp_kernel_for.argtypes, lib.ptqtp_kernel_for.restype = [i], ctypes.POINTER(_Kernel)
    return lib


def _check(status: int, what: str) -> None:
    if status != _OK:
        raise QuantizeError(f"{what}: {_lib().ptqtp_status_text(status).decode()}")


def _ptr(a: NDArray[np.generic] | None) -> int | None:
    return None if a is None else a.ctypes.data


def sizes(t: fmt.TensorType) -> tuple[int, int]:
    """Block in weights and size in bytes, as the library has them."""
    return _lib().ptqtp_block_size(t.id), _lib().ptqtp_type_size(t.id)


def quantize(t: fmt.TensorType, method: str, weights: F32, importance: F32 | None = None, threads: int = 0) -> U8:
    """weights float32 (R, C) contiguous, importance (C,) or None -> uint8 rows. See quantize.quantize."""
    rows, cols = weights.shape
    if cols % t.block:
        raise QuantizeError(f"rows of {cols} weights; {t.name} needs a multiple of {t.block}")
    out = np.empty((rows, cols // t.block * t.size), np.uint8)
    status = _lib().ptqtp_quantize_parallel(
        t.id, _METHODS[method], _ptr(weights), _ptr(importance), _ptr(out), rows, cols, threads
    )
    _check(status, f"{method} to {t.name}")
    return out


def dequantize(t: fmt.TensorType, data: U8) -> F32:
    """uint8 (R, B) -> float32 (R, C)."""
    data = np.ascontiguousarray(data)
    out = np.empty((data.shape[0], data.shape[1] // t.size * t.block), np.float32)
    getattr(_lib(), f"ptqtp_dequantize_{t.name.lower()}")(_ptr(data), _ptr(out), out.size)
    return out


def first_bad_block(t: fmt.TensorType, data: U8) -> int | None:
    """Index of the first block that no packer writes; None if all are good. data: uint8, any shape, whole blocks."""
    data = np.ascontiguousarray(data)
    bad = ctypes.c_int64(-1)
    status = _lib().ptqtp_validate(t.id, _ptr(data), data.nbytes, ctypes.byref(bad))
    if status != _OK and bad.value < 0:
        _check(status, t.name)
    return None if status == _OK else bad.value


def pack(t: fmt.TensorType, digits: U8, scales: NDArray[np.generic]) -> U8:
    """digits uint8 (R, C); scales uint8 (R, C/32) codes for TP2_1, fp16 (R, C/128, 2) for TP2_0 -> bytes."""
    digits, scales = np.ascontiguousarray(digits), np.ascontiguousarray(scales)
    rows, cols = digits.shape
    out = np.empty((rows, cols // t.block * t.size), np.uint8)
    _check(
        getattr(_lib(), f"ptqtp_pack_{t.name.lower()}")(_ptr(digits), _ptr(scales), _ptr(out), digits.size),
        f"packing {t.name}",
    )
    return out


def unpack(t: fmt.TensorType, data: U8) -> tuple[U8, NDArray[np.generic]]:
    """The inverse of `pack`."""
    data = np.ascontiguousarray(data)
    rows = data.shape[0]
    digits = np.empty((rows, data.shape[1] // t.size * t.block), np.uint8)
    groups = digits.shape[1] // t.group
    scales: NDArray[np.generic] = (
        np.empty((rows, groups), np.uint8) if t.id == fmt.TP2_1.id else np.empty((rows, groups, 2), np.float16)
    )
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


def kernel_for(t: fmt.TensorType) -> str | None:
    """Name of the kernel in use for the type; None where PTQTP_KERNEL names none that runs here."""
    kernel = _lib().ptqtp_kernel_for(t.id)
    return kernel.contents.name.decode() if kernel else None
