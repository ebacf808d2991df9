"""Weights to convert, wherever they are: checkpoint, hub or GGUF, an importance matrix; and what identifies them."""

from __future__ import annotations

from . import checkpoint, hub
from .base import PIECE, SPLIT_KEYS, Source, rows_together
from .checkpoint import Checkpoint, stamp, transformers_reason
from .converter import StreamSource
from .gguf import GgufSource, part_path, stem_of
from .identity import changed_option, fingerprint
from .imatrix import Imatrix, Importance, looked_up, uses_importance
from .kinds import show
from .opening import local, open_source
from .settings import HINT, notes

__all__ = [
    "HINT",
    "PIECE",
    "SPLIT_KEYS",
    "Checkpoint",
    "GgufSource",
    "Imatrix",
    "Importance",
    "Source",
    "StreamSource",
    "changed_option",
    "checkpoint",
    "fingerprint",
    "hub",
    "local",
    "looked_up",
    "notes",
    "open_source",
    "part_path",
    "rows_together",
    "show",
    "stamp",
    "stem_of",
    "transformers_reason",
    "uses_importance",
]
