"""Quality and speed of one file: scoring, generation, rounds, intervals."""

from __future__ import annotations

from . import machine
from .generation import Generation, generate
from .quality import Evaluation, evaluate
from .rounds import File, Round
from .scoring import Quality
from .speed import Bench, bench
from .text import load_text, open_files

__all__ = [
    "Bench",
    "Evaluation",
    "File",
    "Generation",
    "Quality",
    "Round",
    "bench",
    "evaluate",
    "generate",
    "load_text",
    "machine",
    "open_files",
]
