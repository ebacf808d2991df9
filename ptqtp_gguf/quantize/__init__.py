"""Methods that turn weights into planes and scales, one module a method, behind one function.

    paper   PTQTP as published (arXiv 2509.16989, Algorithm 1); TP2_0
    search  the best planes without calibration; TP2_1 and TP2_0

Each module holds `reference`, clear numpy. The native core (native/quantize/quantize.c) does the same arithmetic in the
same order and is what `quantize` uses; the suite holds both together byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .. import native
from ..errors import QuantizeError
from ..format import TP2_0, TP2_1, TensorType
from ..packing import F32, U8
from . import paper, search

Reference = Callable[[TensorType, F32, "F32 | None"], U8]


@dataclass(frozen=True)
class Method:
    """What a method makes and takes, and its numpy reference."""

    name: str
    types: tuple[TensorType, ...]
    takes_importance: bool
    reference: Reference
    summary: str


METHODS = {
    m.name: m
    for m in (
        Method("search", (TP2_1, TP2_0), True, search.reference, "best planes without calibration"),
        Method("paper", (TP2_0,), False, paper.reference, "PTQTP exactly as published"),
    )
}


def find(name: str) -> Method:
    """The method called `name`. Raises QuantizeError with the known names."""
    try:
        return METHODS[name]
    except KeyError:
        raise QuantizeError(f"no method '{name}'; there are {', '.join(METHODS)}") from None


def require(method: Method, t: TensorType) -> None:
    """Raises QuantizeError unless the method makes the type."""
    if t not in method.types:
        made = ", ".join(m.name for m in method.types)
        raise QuantizeError(f"method {method.name} makes {made}, not {t.name}")


def quantize(
    t: TensorType,
    method: Method,
    weights: F32,
    importance: F32 | None = None,
    *,
    threads: int = 0,
    use_reference: bool = False,
) -> U8:
    """Quantize one matrix.

    weights     float32 (R, C), finite, C a multiple of t.block
    importance  float32 (C,) >= 0, weight of each input's squared error, or None: `search` for TP2_1 then lets large
                weights count more (search.py), all else weights none; ones are plain squared error
    threads     0 = all cores; the bytes do not depend on it
    returns     uint8 (R, C / t.block * t.size)
    Raises QuantizeError where the method does not make the type, or a value is NaN, Inf or out of the type's reach.
    """
    require(method, t)
    if importance is not None and not method.takes_importance:
        raise QuantizeError(f"method {method.name} takes no importance vector")
    weights = np.ascontiguousarray(weights, dtype=np.float32)
    if weights.ndim != 2 or weights.shape[1] % t.block:
        raise QuantizeError(f"weights of shape {weights.shape}; {t.name} needs rows of a multiple of {t.block}")
    if importance is not None:
        importance = np.ascontiguousarray(importance, dtype=np.float32)
        if importance.shape != weights.shape[1:]:
            raise QuantizeError(f"importance of shape {importance.shape} for rows of {weights.shape[1]}")
    if not use_reference:
        return native.quantize(t, method.name, weights, importance, threads)
    if not np.isfinite(weights).all():
        raise QuantizeError("value is not finite")
    return method.reference(t, weights, importance)
