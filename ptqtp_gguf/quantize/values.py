"""What values a type can hold, and whether bytes of it decode to finite numbers, by a look at their scales alone."""

from __future__ import annotations

import numpy as np

from ..codec import TYPES, U8
from ..files import GGML_TYPES, TYPE_IDS
from ..llamacpp import ggml

CHUNK = 1 << 18  # bytes looked at together, which stay in the cache

# numbers of one float: as what to read them, and the bits of the exponent, all set in Inf and NaN
_FLOATS = {
    TYPE_IDS["F64"]: ("<u8", 0x7FF0000000000000),
    TYPE_IDS["F32"]: ("<u4", 0x7F800000),
    TYPE_IDS["F16"]: ("<u2", 0x7C00),
    TYPE_IDS["BF16"]: ("<u2", 0x7F80),
}


def _fp16(*offsets: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    return tuple(((at + 1, 0x7C),) for at in offsets)


# Blocks as in ggml-common.h: groups of (byte, mask). Where all masked bits of a group are set, a scale is Inf or NaN,
# and so is every weight of the block. Types that are not here have scales that are finite whatever their bits are.
_SCALES = {
    **dict.fromkeys(("Q1_0", "Q2_0", "Q4_0", "Q5_0", "Q8_0", "IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S"), _fp16(0)),
    **dict.fromkeys(("IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"), _fp16(0)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q8_1", "Q4_K", "Q5_K"), _fp16(0, 2)),
    "Q2_K": _fp16(80, 82),
    "Q3_K": _fp16(108),
    "Q6_K": _fp16(208),
    "TQ1_0": _fp16(52),
    "TQ2_0": _fp16(64),
    "Q8_K": (((3, 0x7F), (2, 0x80)),),  # a float
    "IQ1_M": (((55, 0x70), (53, 0xC0)),),  # an fp16 in the upper four bits of each of four words
    "MXFP4": (((0, 0xFC),),),  # a power of two; of these, what is not finite depends on the weights
}


def reach(type_id: int) -> float:
    """Largest |weight| that the type is asked to hold; inf where it holds every float32."""
    kind = TYPES.get(type_id)
    return kind.reach if kind else ggml.reach(type_id)


def beyond(type_id: int, largest: float) -> str | None:
    """Why a type cannot hold weights up to `largest`, or None."""
    kind = TYPES.get(type_id)
    if kind is None:
        return ggml.beyond(type_id, largest)
    return None if largest <= kind.reach else f"largest weight {largest:.4g}; {kind.name} reaches {kind.reach:.4g}"


def first_not_finite(type_id: int, data: U8) -> int:
    """Index of the first weight that is Inf or NaN in stock bytes; -1: none is. data: uint8, any shape, contiguous,
    whole blocks. Trit planes have a check of their own (native.check)."""
    name, block, size = GGML_TYPES[type_id]
    flat = data.reshape(-1)
    step = max(1, CHUNK // size) * size
    for at in range(0, flat.size, step):
        found = _first(type_id, name, flat[at : at + step].reshape(-1, size))
        if found >= 0:
            return (at // size + found) * block
    return -1


def _first(type_id: int, name: str, blocks: U8) -> int:
    """Index of the first block (N, size) that is not finite, or -1."""
    if type_id in _FLOATS:
        kind, mask = _FLOATS[type_id]
        bits = blocks.reshape(-1).view(kind) & np.array(mask, kind)
        return int(np.argmax(bits == mask)) if bits.max(initial=0) == mask else -1
    bad = np.zeros(len(blocks), bool)
    for group in _SCALES.get(name, ()):
        bad |= np.logical_and.reduce([blocks[:, at] & mask == mask for at, mask in group])
    if name == "MXFP4" and bad.any():
        bad[bad] = ~np.isfinite(ggml.dequantize(type_id, blocks[bad])).all(1)
    return int(np.argmax(bad)) if bad.any() else -1
