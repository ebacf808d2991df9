"""Stock ggml types: float32 to bytes and back, through the library that the patched runtime ships.

The bytes are those of llama-quantize of the same build. Without the runtime gguf-py serves the types that it can
write, with the same bytes. Unlike ours, ggml's quantizers are only as reproducible as the build: another compiler or
CPU family may contract a*b+c and move a rounding.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ..codec import F32, TYPES, U8
from ..errors import OutOfReach, QuantizeError, RuntimeMissing
from ..files import BF16_ID, F16_ID, F32_ID, GGML_TYPES, Q8_0_ID, TYPE_IDS, quantize_plain, type_name
from ..files import dequantize as dequantize_python
from . import install

# What llama-quantize writes, where this gguf-py knows the type; ours stand apart (native/).
WRITABLE = frozenset(
    TYPE_IDS[name]
    for name in (
        *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
        *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
        *("TQ1_0", "TQ2_0", "MXFP4", "NVFP4", "Q1_0"),
    )
    if name in TYPE_IDS
)
# Without importance ggml aborts at some of these, and llama-quantize refuses all: the result would be garbage.
NEEDS_IMPORTANCE = frozenset(TYPE_IDS[name] for name in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"))
# Its quantizers look at the importance; the others ignore it.
USES_IMPORTANCE = NEEDS_IMPORTANCE | frozenset(
    TYPE_IDS[name]
    for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ3_S", "IQ4_NL", "IQ4_XS")
)
_BY_PYTHON = frozenset(
    TYPE_IDS[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "TQ1_0", "TQ2_0", "MXFP4")
)
_ALWAYS_BY_PYTHON = frozenset((F32_ID, F16_ID, BF16_ID))

FP16 = 65504.0  # the largest number of fp16, in which most types have their scales
REACH = {  # largest |weight|; of the others FP16: some could hold more, but ggml's quantizers abort the process there
    F32_ID: math.inf,
    TYPE_IDS["F64"]: math.inf,
    BF16_ID: float.fromhex("0x1.fefffep+127"),  # what is larger rounds to infinity
    Q8_0_ID: 127 * FP16,
    TYPE_IDS.get("NVFP4", -1): 6 * 448.0,  # what is larger is cut: scales are ue4m3
}
CHUNK = 1 << 15  # weights a call: small enough to share rows evenly and to let Ctrl-C through


def reach(type_id: int) -> float:
    """Largest |weight| that the type is asked to hold; inf where it holds every float32."""
    return REACH.get(type_id, FP16)


def beyond(type_id: int, largest: float) -> str | None:
    """Why a type cannot hold weights up to `largest`, or None."""
    most = reach(type_id)
    return None if largest <= most else f"largest weight {largest:.4g}; {type_name(type_id)} reaches {most:g}"


def require(type_id: int, weighted: bool = False) -> None:
    """Raise RuntimeMissing or QuantizeError unless `quantize` can write the type here. weighted: by an importance."""
    if type_id not in WRITABLE:
        raise QuantizeError(f"no weights can be written as {type_name(type_id)}")
    if type_id not in _BY_PYTHON or (weighted and type_id in USES_IMPORTANCE):
        try:
            _library(type_id)
        except RuntimeMissing as e:
            raise RuntimeMissing(f"{type_name(type_id)} is quantized by the patched runtime: {e}") from None


def quantize(type_id: int, weights: F32, importance: F32 | None = None, threads: int = 0) -> U8:
    """Quantize one matrix to a stock ggml type.

    type_id     a member of WRITABLE
    weights     float32 (R, C), finite, C a multiple of the type's block, none beyond its `reach`
    importance  float32 (C,) >= 0, weight of each input's squared error, or None; NEEDS_IMPORTANCE want one
    threads     0 = all cores; the bytes do not depend on it
    returns     uint8 (R, C / block * bytes a block)
    Raises OutOfReach for weights that are too large, QuantizeError for arguments or values that the type does not take
    otherwise, RuntimeMissing where only the patched runtime can write it.
    """
    require(type_id, importance is not None)
    name, block, size = GGML_TYPES[type_id]
    weights = np.ascontiguousarray(weights, dtype=np.float32)
    if weights.ndim != 2 or weights.shape[1] % block:
        raise QuantizeError(f"weights of shape {weights.shape}; {name} needs rows of a multiple of {block}")
    largest = max(abs(float(weights.max(initial=0.0))), abs(float(weights.min(initial=0.0))))  # NaN comes through
    if not np.isfinite(largest):
        raise QuantizeError(f"value is not finite; {name} holds numbers only")
    if why := beyond(type_id, largest):
        raise OutOfReach(f"{why}; {'BF16' if largest <= reach(BF16_ID) else 'F32'} holds it")
    if importance is not None:
        importance = np.ascontiguousarray(importance, dtype=np.float32)
        if importance.shape != weights.shape[1:]:
            raise QuantizeError(f"importance of shape {importance.shape} for rows of {weights.shape[1]}")
        if not np.isfinite(importance).all() or (importance < 0).any():
            raise QuantizeError("importance must be finite and not negative")
        importance = tamed(importance)
    elif type_id in NEEDS_IMPORTANCE:
        raise QuantizeError(f"{name} needs an importance matrix; IQ3_S does without")
    if type_id in _ALWAYS_BY_PYTHON:
        return quantize_plain(weights, type_id)
    try:
        lib = _library(type_id)
    except RuntimeMissing:
        return quantize_plain(weights, type_id)

    rows, cols = weights.shape
    out = np.empty((rows, cols // block * size), np.uint8)
    lib.ggml_quantize_init(type_id)
    table = None if importance is None else importance.ctypes.data

    def some(first: int, count: int) -> None:
        src, dst = weights[first:].ctypes.data, out[first:].ctypes.data
        nbytes = lib.ggml_quantize_chunk(type_id, src, dst, 0, count, cols, table)
        if not lib.ggml_validate_row_data(type_id, dst, nbytes):
            raise OutOfReach(f"{name} cannot hold these weights: a scale is out of its range")

    _share(some, rows, cols, threads)
    return out


def tamed(importance: F32) -> F32:
    """(C,) -> the same shares with a largest value near 1 where it is far from that: sums overflow, ggml may abort.

    Only by a power of two, which the result does not depend on.
    """
    largest = float(importance.max(initial=0.0))
    if largest == 0 or 2.0**-20 < largest < 2.0**20:
        return importance
    return np.ldexp(importance, -int(np.frexp(largest)[1]))


def dequantize(type_id: int, data: U8, threads: int = 0) -> F32:
    """uint8 (R, B) of any stock type -> float32 (R, C); without the runtime by gguf-py, which is slower.

    Raises QuantizeError unless rows are whole blocks, InputError for a type that cannot be decoded.
    """
    name, block, size = GGML_TYPES[type_id]
    if data.ndim != 2 or data.shape[1] % size:
        raise QuantizeError(f"bytes of shape {data.shape}; rows of {name} are a multiple of {size}")
    try:
        to_float = None if type_id in _ALWAYS_BY_PYTHON or type_id in TYPES else _decoder(type_id)
    except RuntimeMissing:
        to_float = None
    if not to_float:
        return dequantize_python(data, type_id, "tensor data")
    decode = to_float
    data = np.ascontiguousarray(data)
    rows, cols = data.shape[0], data.shape[1] // size * block
    out = np.empty((rows, cols), np.float32)

    def some(first: int, count: int) -> None:
        decode(data[first:].ctypes.data, out[first:].ctypes.data, count * cols)

    _share(some, rows, cols, threads)
    return out


def _library(type_id: int) -> Any:
    """The library, after a look that it and gguf-py mean the same type. Raises RuntimeMissing."""
    lib = install.ggml_library()
    traits = lib.ggml_get_type_traits(type_id).contents
    if (traits.blck_size, traits.type_size) != GGML_TYPES[type_id][1:]:
        raise RuntimeMissing(
            f"the runtime has {type_name(type_id)} as {traits.blck_size} weights in {traits.type_size} bytes, "
            f"gguf-py as {GGML_TYPES[type_id][1]} in {GGML_TYPES[type_id][2]}; {install.HOW_TO_BUILD}"
        )
    return lib


def _decoder(type_id: int) -> Callable[[int, int, int], None] | None:
    """ggml's to_float(bytes, floats, weights) of the type, or None if it has none. Raises RuntimeMissing."""
    decoder = _library(type_id).ggml_get_type_traits(type_id).contents.to_float
    return decoder or None


def _share(some: Callable[[int, int], None], rows: int, cols: int, threads: int) -> None:
    """Call some(first row, rows) for all rows, a few at a time, on threads."""
    step = max(1, CHUNK // max(cols, 1))
    starts = range(0, rows, step)
    threads = min(threads or os.cpu_count() or 1, len(starts))
    if threads <= 1:
        for first in starts:
            some(first, min(step, rows - first))
        return
    with ThreadPoolExecutor(threads) as pool:
        try:
            for _ in pool.map(lambda first: some(first, min(step, rows - first)), starts):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
