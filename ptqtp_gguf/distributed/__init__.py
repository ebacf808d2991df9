"""The same conversion on torchrun's ranks."""

from __future__ import annotations

from . import ranks
from .run import convert_on_ranks

__all__ = [
    "convert_on_ranks",
    "ranks",
]
