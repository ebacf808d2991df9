"""The methods that turn weights into planes and scales: one row each, and what the rest of the program asks of them.

    search      the best planes without calibration; TP2_2, TP2_1 and TP2_0
    paper       PTQTP as published (arXiv 2509.16989, Algorithm 1); TP2_0
    calibrated  second order: errors weighed by the inputs that text gives each matrix; TP2_2, TP2_1
    tuned       calibrated, then trained end to end against the original model; TP2_2, TP2_1

A data-free method is a module here with `reference`, clear numpy, and a twin in the native core (native/quantize/) that
does the same arithmetic in the same order: the suite holds both together byte for byte.

A method that looks at the model has stages instead: modules with a function `run(work)` that leaves better planes in
the store than it found (calibrate/work.py). A new stage is one file and a row here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..codec import F32, TP2_0, TP2_1, TP2_2, TYPES, U8, TensorType, native
from ..errors import QuantizeError
from . import paper, search

Reference = Callable[[TensorType, F32, "F32 | None"], U8]


@dataclass(frozen=True)
class Method:
    """What a method makes, what it takes, and where it is.

    types             what it makes
    takes_importance  whether squared errors can be weighed by an importance (--imatrix)
    whole_matrix      whether it looks at a whole matrix at once, so that pieces are whole tensors
    reference         its numpy reference; None for a method with stages
    stages            modules below ptqtp_gguf with `run(work)`, in order, e.g. "calibrate.run"
    trains_vectors    whether norms and biases may differ from the source's afterwards
    rest              the data-free method of the tensors that the stages leave; "" for a data-free method
    """

    name: str
    summary: str
    types: tuple[TensorType, ...]
    takes_importance: bool
    whole_matrix: bool = False
    reference: Reference | None = None
    stages: tuple[str, ...] = ()
    trains_vectors: bool = False
    rest: str = ""

    @property
    def learns(self) -> bool:
        """Whether it learns from text."""
        return bool(self.stages)

    @property
    def tunes(self) -> bool:
        """Whether one of its stages is end-to-end tuning, which wants windows of its own and planes of both ends."""
        return "tune.run" in self.stages


_CALIBRATABLE = tuple(t for t in TYPES.values() if t.calibratable)

METHODS = {
    m.name: m
    for m in (
        Method(
            "search",
            "best planes without calibration",
            (TP2_2, TP2_1, TP2_0),
            takes_importance=True,
            reference=search.reference,
        ),
        Method(
            "paper",
            "PTQTP exactly as published",
            (TP2_0,),
            takes_importance=False,
            whole_matrix=True,
            reference=paper.reference,
        ),
        Method(
            "calibrated",
            "second order, from text",
            _CALIBRATABLE,
            takes_importance=True,
            stages=("calibrate.run",),
            rest="search",
        ),
        Method(
            "tuned",
            "calibrated, then trained end to end",
            _CALIBRATABLE,
            takes_importance=True,
            stages=("calibrate.run", "tune.run"),
            trains_vectors=True,
            rest="search",
        ),
    )
}
DEFAULT_METHOD = METHODS["search"]  # data-free


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


def direct(method: Method) -> Method:
    """The data-free method behind a method: itself, or that of the tensors which its stages leave."""
    return METHODS[method.rest] if method.rest else method


def quantize(
    t: TensorType,
    method: Method,
    weights: F32,
    importance: F32 | None = None,
    *,
    threads: int = 0,
    use_reference: bool = False,
) -> U8:
    """Quantize one matrix by a data-free method.

    weights     float32 (R, C), finite, C a multiple of t.block
    importance  float32 (C,) >= 0, weight of each input's squared error, or None: `search` then lets large weights count
                more (search.py), but for TP2_0, and all else weights none; ones are plain squared error
    threads     0 = all cores; the bytes do not depend on it
    returns     uint8 (R, C / t.block * t.size)
    Raises QuantizeError where the method does not make the type, or a value is NaN, Inf or out of the type's reach.
    """
    require(method, t)
    if method.reference is None:
        raise QuantizeError(f"method {method.name} looks at the model; a matrix alone is quantized by {method.rest}")
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
