"""Planes trained end to end against the original model."""

from __future__ import annotations

from .end_to_end import tune

__all__ = [
    "tune",
]
