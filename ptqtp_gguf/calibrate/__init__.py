"""What the inputs of each matrix are: text, the model run layer by layer, second moments, and planes from them."""

from __future__ import annotations

from . import mapping, texts
from .model import explained, quiet, whole_model
from .run import ENDS
from .seen import Effects, Seen, moments_folder, remove_moments
from .store import STOPPED, PlaneStore, holds_planes, planes_folder, remove_planes
from .work import HELD_OUT, Work, goes_in_order, planned, require_checkpoint, rows_in

__all__ = [
    "ENDS",
    "HELD_OUT",
    "STOPPED",
    "Effects",
    "PlaneStore",
    "Seen",
    "Work",
    "explained",
    "goes_in_order",
    "holds_planes",
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
    "whole_model",
]
