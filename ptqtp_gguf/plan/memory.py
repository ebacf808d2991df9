"""How much memory a conversion takes, and how large its pieces may be within a limit.

Measured figures: docs/results/convert.md.
"""

from __future__ import annotations

from ..errors import OutputError
from ..quantize import Method
from ..source import PIECE, Source, StreamSource
from .rows import PlanRow, rows_per_piece

BASE = 100 << 20  # Python, numpy, gguf-py, rich, the tokenizer's metadata
CONVERTER = 500 << 20  # the converter's process: torch, transformers
CONVERTER_PER_WEIGHT = 8  # of the largest tensor, where its rows are put in another order: twice as float32
PER_WEIGHT = 28  # of a piece: read ahead, in work, as float32, encoded, written behind
SMALLEST = 1 << 16  # weights a piece


def memory_need(rows: list[PlanRow], method: Method, piece: int, source: Source) -> int:
    """Bytes at the peak, all processes together, roughly and rather too many."""
    largest = max((_weights(r, method, piece) for r in rows), default=0)
    need = BASE + PER_WEIGHT * largest
    if isinstance(source, StreamSource):
        need += CONVERTER + CONVERTER_PER_WEIGHT * max(r.tensor.n_weights for r in rows)
    return need


def _weights(row: PlanRow, method: Method, piece: int) -> int:
    t = row.tensor
    return min(t.n_weights, t.shape[0] * rows_per_piece(t, row.choice.type, method, piece))


def piece_for(rows: list[PlanRow], method: Method, limit: int, source: Source) -> int:
    """Weights a piece. limit in bytes, 0 = none. Raises OutputError where nothing fits into the limit."""
    piece = PIECE
    while limit and piece > SMALLEST and memory_need(rows, method, piece, source) > limit:
        piece //= 2
    need = memory_need(rows, method, piece, source)
    if limit and need > limit:
        why = "reading a checkpoint takes llama.cpp's converter; " if isinstance(source, StreamSource) else ""
        why += f"method {method.name} takes whole matrices; " if method.whole_matrix else ""
        raise OutputError(
            f"--max-memory {limit / 1e6:.0f} MB: at least {need / 1e6:.0f} MB are needed; {why}raise the limit"
        )
    return piece
