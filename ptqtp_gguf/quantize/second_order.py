"""Second-order quantization on the CPU, in numpy and the native core: K-best GPTQ, then group descent.

The error of a row is e H eT, e = w - q, H = sum of x xT over the inputs. As quantize/gptq.py, but no inverse is formed.
With H = V VT, V upper, the best values of a block of columns B, given the errors E of all columns before it, are

    w_B + (E V_FB) inv(V_BB),

F the columns before. The block's own feedback is U_BB = inv(V_BB), a block of the U with inv(H) = UT U. This is LDLQ's
form of GPTQ (QuIP, arXiv 2307.13304, section 3): one Cholesky factor, and products of E with panels of V.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..codec import F32, I8, I64, TP2_1, U8, TensorType, native, weights_of_levels
from ..errors import QuantizeError
from .gptq import WINDOWS

G = TP2_1.group
BLOCK = 4 * G  # columns that the inner loops take together
MAX_DAMP = 1.0


@dataclass(frozen=True)
class SecondOrder:
    """shrink: share of H that is put on its diagonal alone, None = by the number of tokens; damp: added to the
    diagonal, relative to its mean; passes of descent; window: scale codes tried on either side, None = the type's."""

    shrink: float | None = None
    damp: float = 0.01
    passes: int = 1
    window: int | None = None


class Levels(NamedTuple):
    """A matrix of a type with levels: w = scale(code) * level."""

    levels: I8  # (R, C)
    codes: U8  # (R, C/32)

    def weights(self) -> F32:
        """float32 (R, C)."""
        return weights_of_levels(self.levels, self.codes)


def shrinkage(cols: int, tokens: int) -> float:
    """Share of H to put on its diagonal: few tokens say little of how inputs go together."""
    return min(max(cols / (cols + tokens) + 0.1, 0.1), 0.5)


def prepared(h: F32, tokens: int, how: SecondOrder) -> F32:
    """H (C, C), scaled to a mean diagonal of 1, shrunk and damped; a new array.

    Inputs that are never there get the mean diagonal, so that the rounding of their weights is plain. Raises
    QuantizeError where H is not finite or all zero.
    """
    diagonal = h.diagonal().astype(np.float64)
    mean = float(diagonal.mean())
    if not (np.isfinite(mean) and mean > 0):
        raise QuantizeError("second moments are not finite or all zero")
    r = shrinkage(len(h), tokens) if how.shrink is None else how.shrink
    out = h * np.float32((1 - r) / mean)
    scaled = (diagonal / mean).astype(np.float32)
    scaled[diagonal <= 0] = 1
    np.fill_diagonal(out, scaled + np.float32(how.damp))
    if not (np.isfinite(out.min()) and np.isfinite(out.max())):
        raise QuantizeError("second moments are not finite")
    return out


def factor(h: F32) -> F32:
    """The upper V with H = V VT; where H is singular in float32, that of H with more on its diagonal.

    Panel by panel from the right, which is a product of matrices mostly: ten times as fast as numpy's Cholesky.
    """
    extra = 0.0
    while True:
        try:
            return _factored(h)
        except np.linalg.LinAlgError:
            if extra >= MAX_DAMP:
                raise QuantizeError("second moments are singular") from None
            more = min(max(4 * extra, 1e-2), MAX_DAMP)
            h = h.copy()
            np.fill_diagonal(h, h.diagonal() + np.float32(more - extra))
            extra = more


def _factored(h: F32) -> F32:
    v = np.zeros_like(h)
    for b in range(len(h), 0, -BLOCK):
        a = max(0, b - BLOCK)
        panel = h[:b, a:b] - v[:b, b:] @ v[a:b, b:].T
        own = np.linalg.cholesky(panel[a:][::-1, ::-1].astype(np.float64))[::-1, ::-1]
        v[a:b, a:b] = own
        v[:a, a:b] = panel[:a] @ np.linalg.inv(own).T.astype(np.float32)
    if not np.isfinite(v).all():
        raise np.linalg.LinAlgError
    return v


def calibrate(kind: TensorType, w: F32, h: F32, v: F32, how: SecondOrder | None = None, threads: int = 0) -> Levels:
    """Quantize one matrix.

    w  float32 (R, C), C a multiple of 32, finite and within the reach of the type
    h  float32 (C, C) of `prepared`, v its `factor`, both with columns in the order of `chain_order`, as w is
    """
    how = how or SecondOrder()
    window = WINDOWS[kind.id] if how.window is None else how.window
    found = _gptq(kind, w, v, window, threads)
    for _ in range(how.passes):
        _descend(kind, w, h, found, window, threads)
    return found


def chain_order(kind: TensorType, cols: int) -> I64:
    """Which column stands where, so that each group follows its type's chain; int64 (C,)."""
    chain = np.array(kind.chain or range(G))
    order: I64 = (np.arange(0, cols, G)[:, None] + chain).reshape(-1)
    return order


def _at(a: NDArray[Any], col: int = 0, row: int = 0) -> tuple[int, int]:
    return a.ctypes.data + row * a.strides[0] + col * a.itemsize, a.strides[0] // a.itemsize


def _gptq(kind: TensorType, w: F32, v: F32, window: int, threads: int) -> Levels:
    rows, cols = w.shape
    found = Levels(np.zeros((rows, cols), np.int8), np.zeros((rows, cols // G), np.uint8))
    error = np.zeros_like(w)
    for a in range(0, cols, BLOCK):
        b = min(a + BLOCK, cols)
        n = b - a
        u = np.ascontiguousarray(np.triu(np.linalg.inv(v[a:b, a:b].astype(np.float64))), np.float32)
        now = np.ascontiguousarray(w[:, a:b])
        if a:
            now += (error[:, :a] @ v[:a, a:b]) @ u
        moved = np.empty((rows, n), np.float32)
        native.gptq_block(
            kind,
            rows,
            n,
            _at(now),
            _at(u),
            _at(found.levels, a),
            _at(found.codes, a // G),
            _at(moved),
            window,
            threads,
        )
        error[:, a:b] = w[:, a:b] - weights_of_levels(found.levels[:, a:b], found.codes[:, a // G : b // G])
    return found


def _descend(kind: TensorType, w: F32, h: F32, found: Levels, window: int, threads: int) -> None:
    """One sweep of coordinate descent, in place; the error never grows."""
    rows, cols = w.shape
    error = w - found.weights()
    for a in range(0, cols, BLOCK):
        b = min(a + BLOCK, cols)
        r = error @ h[:, a:b]
        delta = np.empty((rows, b - a), np.float32)
        block = np.ascontiguousarray(h[a:b, a:b])
        native.cd_block(
            kind,
            rows,
            b - a,
            _at(r),
            _at(block),
            _at(found.levels, a),
            _at(found.codes, a // G),
            _at(delta),
            window,
            threads,
        )
        error[:, a:b] -= delta
