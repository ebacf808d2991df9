"""What the inputs of each matrix are: text, the model run layer by layer, second moments, and planes from them."""

from __future__ import annotations

from . import mapping, texts
from .model import quiet
from .run import ENDS
from .seen import Effects, Seen, moments_folder, remove_moments
from .store import PlaneStore, planes_folder, remove_planes
from .work import HELD_OUT, Work, goes_in_order, planned, require_checkpoint, rows_in

__all__ = [
    "ENDS",
    "HELD_OUT",
    "Effects",
    "PlaneStore",
    "Seen",
    "Work",
    "goes_in_order",
    "mapping",
    "moments_folder",
    "planes_folder",
    "planned",
    "quiet",
    "remove_moments",
    "remove_planes",
    "require_checkpoint",
    "rows_in",
    "texts",
]
