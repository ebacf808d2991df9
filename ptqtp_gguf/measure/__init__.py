"""Quality and speed of one file: scoring, generation, rounds, intervals."""

from __future__ import annotations

from . import machine
from .generation import Agreement, Cloze, Generation, generate
from .logits import TOKENS, Likeness, against_checkpoint
from .perplexity_tool import evaluate_by_tool
from .quality import Evaluation, evaluate
from .rounds import File, Round
from .scoring import Quality
from .speed import Bench, Ratio, Speed, bench
from .text import load_text, open_files, whole

__all__ = [
    "TOKENS",
    "Agreement",
    "Bench",
    "Cloze",
    "Evaluation",
    "File",
    "Generation",
    "Likeness",
    "Quality",
    "Ratio",
    "Round",
    "Speed",
    "against_checkpoint",
    "bench",
    "evaluate",
    "evaluate_by_tool",
    "generate",
    "load_text",
    "machine",
    "open_files",
    "whole",
]
