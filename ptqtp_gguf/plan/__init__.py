"""What the user asked for, what each tensor becomes and why, and how large the pieces are."""

from __future__ import annotations

from .flags import OUTPUT, PANELS, flags_of
from .memory import memory_need, piece_for
from .options import (
    DEFAULT_EFFORT,
    METHOD_NAMES,
    TOKENS_CPU,
    TOKENS_GPU,
    TOKENS_OF,
    Calibration,
    Options,
)
from .recipe import SHIPPED, Choice, Recipe, fall_back
from .request import Request
from .roles import Role, layer_of, role_of
from .rows import (
    Below,
    PlanRow,
    check_values,
    chooses_types,
    make_plan,
    not_finite,
    require_planes,
    rows_per_piece,
    settle,
)
from .tuning import TuneSettings

__all__ = [
    "DEFAULT_EFFORT",
    "METHOD_NAMES",
    "OUTPUT",
    "PANELS",
    "SHIPPED",
    "TOKENS_CPU",
    "TOKENS_GPU",
    "TOKENS_OF",
    "Below",
    "Calibration",
    "Choice",
    "Options",
    "PlanRow",
    "Recipe",
    "Request",
    "Role",
    "TuneSettings",
    "check_values",
    "chooses_types",
    "fall_back",
    "flags_of",
    "layer_of",
    "make_plan",
    "memory_need",
    "not_finite",
    "piece_for",
    "require_planes",
    "role_of",
    "rows_per_piece",
    "settle",
]
