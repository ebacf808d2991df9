"""What the inputs of each matrix are: text, the model run layer by layer, second moments, and planes from them."""

from __future__ import annotations

from . import mapping, texts
from .model import quiet
from .run import ENDS
from .store import PlaneStore, planes_folder, remove_planes
from .work import HELD_OUT, Work, planned, rows_in

__all__ = [
    "ENDS",
    "HELD_OUT",
    "PlaneStore",
    "Work",
    "mapping",
    "planes_folder",
    "planned",
    "quiet",
    "remove_planes",
    "rows_in",
    "texts",
]
