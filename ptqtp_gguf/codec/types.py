"""The tensor types: ids, sizes, digits, scale code, metadata keys. The one home of the layout in Python.

Its twins are native/ptqtp.h (C) and GGML_QUANT_SIZES of gguf-py; a test holds the three together.
The byte picture stands in docs/format.md and in native/ptqtp.h.
"""

from __future__ import annotations

from dataclasses import dataclass

FORMAT_VERSION = 1

UNIT = 32  # weights a unit
UNIT_WORDS = 6  # uint16 words of five digits a unit; a remainder byte holds the last two
UNIT_BYTES = 2 * UNIT_WORDS + 1 + 1  # words, side byte (scale), remainder byte
POW5 = 9**5
POW2 = 9**2

# Weight index, inside the unit, of digit k of word j (word 6 is the remainder byte).
PAIR01 = [(2 * j, 2 * j + 1) for j in range(UNIT_WORDS + 1)]
PAIR23 = [(14 + 2 * j, 15 + 2 * j) for j in range(UNIT_WORDS)]
LAST = [26 + j for j in range(UNIT_WORDS)]

# Digit d = 3*(t1+1) + (t2+1); level = 3*t1 + 2*t2 in units of the TP2_1 scale.
LEVELS = (-5, -3, -1, -2, 0, 2, 1, 3, 5)
MAX_LEVEL = 5


@dataclass(frozen=True)
class TensorType:
    """One custom ggml type. Sizes in bytes, `block` and `group` in weights."""

    id: int
    name: str
    block: int
    size: int
    group: int
    reach: float  # largest |weight|

    @property
    def bpw(self) -> float:
        """Bits per weight."""
        return 8 * self.size / self.block


TP2_0 = TensorType(
    id=250, name="TP2_0", block=4 * UNIT, size=4 * (2 * UNIT_WORDS + 1) + 2 * 2, group=128, reach=32768.0
)
TP2_1 = TensorType(id=251, name="TP2_1", block=UNIT, size=2 * UNIT_WORDS + 1 + 1, group=32, reach=5 * 1.9375)
TYPES = {t.id: t for t in (TP2_0, TP2_1)}
BY_NAME = {t.name: t for t in TYPES.values()}

# general.file_type of a file whose block matrices are of the type: the type's own id, named by the patched runtime.
FILE_TYPE = {t.name: t.id for t in TYPES.values()}

SMALLEST_SCALE = 2.0**-15  # of TP2_1; code 0


class Key:
    """Metadata keys that a file with our tensors carries."""

    FORMAT_VERSION = "ptqtp.format_version"
    TYPE_IDS = "ptqtp.type_ids"
    GROUP_SIZE = "ptqtp.group_size"
    METHOD = "ptqtp.method"
    VERSION = "ptqtp.version"
    RECIPE = "ptqtp.recipe"
    CALIBRATION = "ptqtp.calibration"
    SOURCE_TYPE = "ptqtp.source_type"
    SOURCE_HASH = "ptqtp.source_hash"
    TENSOR_HASHES = "ptqtp.tensor_hashes"
