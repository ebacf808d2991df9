"""The list of tensor types, and the metadata keys of a file that holds them. The one home of the layout in Python.

Its twins are native/codec/types.c (C) and GGML_QUANT_SIZES of gguf-py; a test holds the three together.
The byte picture stands in docs/format.md, codec/unit.py and native/ptqtp.h.
"""

from __future__ import annotations

from collections.abc import Iterable

from .tensor_type import TensorType
from .tp2_0 import TP2_0
from .tp2_1 import TP2_1
from .tp2_2 import TP2_2

FORMAT_VERSION = 2  # the newest that is read; a file says the version that its types need

TYPES: dict[int, TensorType] = {t.id: t for t in (TP2_0, TP2_1, TP2_2)}
BY_NAME = {t.name: t for t in TYPES.values()}
DEFAULT = TP2_2  # of block matrices

# general.file_type of a file whose block matrices are of the type: the type's own id, named by the patched runtime.
FILE_TYPE = {t.name: t.id for t in TYPES.values()}


def format_version(types: Iterable[TensorType]) -> int:
    """Of a file that holds these types: the newest that one of them needs, 1 for none."""
    return max((t.since for t in types), default=1)


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
