"""What a trit-plane type is: ids, digits, scales, bytes; and the one ctypes door to native/."""

from __future__ import annotations

from . import native
from .arrays import F32, F64, I8, I32, I64, U8
from .native import scan
from .planes import TritPlanes
from .reference import dequantize, pack, unpack
from .tensor_type import TensorType
from .tp2_0 import T1_OF_DIGIT, T2_OF_DIGIT, TP2_0
from .tp2_1 import (
    LEVELS,
    MAX_LEVEL,
    SMALLEST_SCALE,
    TP2_1,
    digits_of_levels,
    scale_from_float,
    scale_to_float,
    weights_of_levels,
)
from .tp2_2 import CHAIN, THIRD_OF_SUM, TP2_2
from .types import BY_NAME, DEFAULT, FILE_TYPE, FORMAT_VERSION, TYPES, Key, format_version
from .unit import SIDE, UNIT, UNIT_BYTES

__all__ = [
    "BY_NAME",
    "CHAIN",
    "DEFAULT",
    "F32",
    "F64",
    "FILE_TYPE",
    "FORMAT_VERSION",
    "I8",
    "I32",
    "I64",
    "LEVELS",
    "MAX_LEVEL",
    "SIDE",
    "SMALLEST_SCALE",
    "T1_OF_DIGIT",
    "T2_OF_DIGIT",
    "THIRD_OF_SUM",
    "TP2_0",
    "TP2_1",
    "TP2_2",
    "TYPES",
    "U8",
    "UNIT",
    "UNIT_BYTES",
    "Key",
    "TensorType",
    "TritPlanes",
    "dequantize",
    "digits_of_levels",
    "format_version",
    "native",
    "pack",
    "scale_from_float",
    "scale_to_float",
    "scan",
    "unpack",
    "weights_of_levels",
]
