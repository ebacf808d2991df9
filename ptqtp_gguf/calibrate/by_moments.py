"""Planes from second moments that the runtime gathered: second order where it pays on held-out text, else search.

The moments are those of the unquantized model, so matrices do not depend on one another. Each one's planes by search
stand beside those of second order, and on inputs of held-out windows the better ones are kept.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from ..codec import F32, TensorType
from ..errors import CalibrationError, QuantizeError
from ..quantize import second_order
from .moments import Input, Moments
from .seen import Seen
from .work import FEW, MIN_TOKENS, Work


def by_moments(work: Work, seen: Seen) -> None:
    """Leave planes of every matrix whose inputs were seen in the store. Raises CalibrationError, OutputError."""
    _Planes(work, seen.moments).make()


class _Planes:
    """All matrices, one distinct input after the other."""

    def __init__(self, work: Work, moments: Moments) -> None:
        self.work, self.moments = work, moments
        self.how = work.how.second_order
        self.kept: Counter[str] = Counter()  # why search was kept, and of how many matrices
        self.matrices = 0  # that were made, experts one by one

    def make(self) -> None:
        work, seen = self.work, set[str]()
        total = sum(t.n_weights for t in work.tensors.values())
        done = 0
        for of in self.moments:
            names = [n for n in of.tensors if n in work.tensors and n not in seen]
            seen.update(names)
            weights = sum(work.tensors[n].n_weights for n in names)
            if names:
                work.progress("quantizing by moments", done, total, names[0])
            if not all(work.store.has(n) for n in names):
                for kind in {work.kinds[n].id: work.kinds[n] for n in names}.values():
                    self._matrices(of, [n for n in names if work.kinds[n] == kind], kind)
            done += weights
        work.progress("quantizing by moments", total, total, "")
        for why, n in self.kept.items():
            work.store.say(f"{n} of {self.matrices} matrices by search: {why}")

    def _matrices(self, of: Input, names: list[str], kind: TensorType) -> None:
        """Matrices of one input and type, whole tensors; those that do not fit their type are left."""
        work = self.work
        todo = {n: work.weights(work.tensors[n]) for n in names}
        todo = {n: w for n, w in todo.items() if work.fits(n, w)}
        if not todo:
            return
        if len(of.counts) == 1:
            self._put(list(todo), self._best(of, 0, list(todo.values()), kind))
            return
        experts = len(of.counts)
        for n, w in todo.items():
            if len(w) % experts:
                raise CalibrationError(f"tensor {n}: {len(w)} rows for {experts} experts of the moments")
        split = [np.split(w, experts) for w in todo.values()]
        made = [self._best(of, e, [parts[e] for parts in split], kind) for e in range(experts)]
        few = [e for e in range(experts) if self.moments.tokens(of, e) < MIN_TOKENS]
        for n, parts in zip(todo, zip(*made, strict=True), strict=True):
            self._put([n], [second_order.Levels(*map(np.concatenate, zip(*parts, strict=True)))])
            work.say_experts(n, few, FEW)

    def _put(self, names: list[str], found: list[second_order.Levels]) -> None:
        for n, levels in zip(names, found, strict=True):
            self.work.store.put(self.work.tensors[n], levels.levels, levels.codes)

    def _best(self, of: Input, expert: int, weights: list[F32], kind: TensorType) -> list[second_order.Levels]:
        """Planes of matrices with one input: of each the better of second order and search."""
        self.matrices += len(weights)
        searched = [second_order.Levels(*self.work.searched_as(kind, w)) for w in weights]
        if self.moments.tokens(of, expert) < MIN_TOKENS:
            if len(of.counts) == 1:
                self.kept[FEW] += len(weights)
            return searched
        try:
            found = self._second_order(of, expert, np.concatenate(weights), kind)
        except QuantizeError as e:
            self.kept[str(e)] += len(weights)
            return searched
        cuts = np.cumsum([len(w) for w in weights])[:-1].tolist()
        split = [second_order.Levels(*p) for p in zip(*(np.split(part, cuts) for part in found), strict=True)]
        held = self.moments.rows(of, expert, held=True)
        if not len(held) or not np.isfinite(held).all():
            return split
        best = []
        for w, a, b in zip(weights, split, searched, strict=True):
            better = _error(w, a, held) < _error(w, b, held)
            self.kept["no worse on held-out text"] += not better
            best.append(a if better else b)
        self.kept += Counter()  # drops zeros
        return best

    def _second_order(self, of: Input, expert: int, w: F32, kind: TensorType) -> second_order.Levels:
        """Raises QuantizeError where the moments are of no use."""
        h = self.moments.second(of, expert)
        if h.shape[0] != w.shape[1]:
            raise CalibrationError(f"{of.tensors[0]}: moments of {h.shape[0]} inputs for rows of {w.shape[1]}")
        order = second_order.chain_order(kind, len(h))
        h = second_order.prepared(h.take(order, 0).take(order, 1), self.moments.tokens(of, expert), self.how)
        v = second_order.factor(h)
        made = second_order.calibrate(kind, w[:, order], h, v, self.how, self.work.options.threads)
        levels = np.empty_like(made.levels)
        levels[:, order] = made.levels
        return second_order.Levels(levels, made.codes)


def _error(w: F32, planes: second_order.Levels, x: F32) -> float:
    """Squared error of the outputs for inputs x (T, C)."""
    e = (w - planes.weights()) @ x.T
    return float(np.vdot(e, e))
