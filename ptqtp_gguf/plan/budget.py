"""A type for each tensor so that the whole file meets a budget in bits per weight.

Each tensor that the recipe quantizes is tried on a sample of its rows in every type of a ladder; then bytes go where
they take away the most error, the largest drop per byte first. Unlike a recipe, this knows the tensors; what passes
through them it knows only from an imatrix, by which errors are weighted then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil, floor, isfinite
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..codec import BY_NAME, DEFAULT, F32, TYPES, TensorType, native
from ..errors import QuantizeError, RecipeError, RuntimeMissing
from ..files import DEFAULT_ALIGNMENT, F16_ID, FLOAT_IDS, GGML_TYPES, TYPE_IDS, TensorInfo, align, row_size, type_name
from ..llamacpp import ggml
from ..quantize import methods
from ..source import Importance, looked_up
from .recipe import KEEP, Choice, Recipe, Rule, choose, rule_for
from .roles import Model

# Time to read a matrix of the type from memory and multiply, by that of as many bytes of TP2_2, Q4_0 or Q8_0, which are
# as fast as memory on 2 cores of Zen 5 (docs/results/calibration.md). A type that is not here counts as SLOW.
PACE = {"TP2_2": 1.0, "TP2_1": 1.0, "TP2_0": 1.0, "Q8_0": 1.0, "Q4_0": 1.0, "Q4_K": 1.1, "IQ4_NL": 1.0, "F16": 1.0}
SLOW = 1.6
SAMPLE = 1 << 16  # weights of a tensor that its errors are measured on
# After the trit planes; of each rung the first type whose blocks fit the rows and that can be written here.
LADDER = (("Q4_K", "Q4_0"), ("Q5_K", "Q5_0"), ("Q6_K",), ("Q8_0",))

Sample = Callable[[TensorInfo, int], F32]


class Effects(Protocol):
    """What errors do to the model's output, as calibration has found it (calibrate/seen.py).

    ours: how the error of our types shrinks by second-order quantization
    """

    ours: float

    def worth(self, t: TensorInfo) -> float:
        """KL divergence of the model for a relative squared error of 1 in the outputs of a matrix."""

    def importance(self, t: TensorInfo, kind: int) -> Importance | None:
        """Mean square of each input."""

    def stock(self, name: str) -> dict[str, int]:
        """Types by tensor of the file that llama-quantize makes as `name`, such as Q4_K_M."""

    def power(self, t: TensorInfo, expert: int, w: F32) -> float | None:
        """Energy of the outputs of rows w (R, C), in the unit of `importance`; None where inputs were not seen."""


@dataclass(frozen=True)
class Option:
    """What a tensor may become.

    nbytes    in the file; of a type whose kernels are slow, as many as it would be read by a fast one in that time
    error     what its error does
    relative  its squared error by that of what it stands for
    """

    type: int
    nbytes: int
    error: float
    relative: float = 0.0


def fit_budget(
    tensors: Sequence[TensorInfo],
    recipe: Recipe,
    target: float,
    header_bytes: int,
    sample: Sample,
    *,
    method: methods.Method = methods.DEFAULT_METHOD,
    threads: int = 0,
    alignment: int = DEFAULT_ALIGNMENT,
    takes: Callable[[TensorInfo, int], bool] = lambda t, type_id: True,
    importance: Callable[[TensorInfo, int], Importance | None] = lambda t, type_id: None,
    effects: Effects | None = None,
    in_time: bool = False,
    stock: Mapping[str, int] | None = None,
    progress: Callable[[str, int, int, str], None] = lambda stage, done, total, detail: None,
) -> dict[str, Choice]:
    """Choose every tensor's type so that the file has at most `target` bits per weight; name -> choice.

    recipe        bound; says what is quantized and which trit-plane types are tried. What it keeps, gives a float type,
                  or has from --tensor-type stays so
    target        8 * bytes of the whole file / weights of all tensors, as `inspect` counts
    header_bytes  what stands before the tensor data, padded
    sample        sample(tensor, n) -> float32 (r, C): rows spread evenly over the tensor, about n weights; see `spread`
    method        how trit planes are made
    takes         takes(tensor, type id): whether the tensor's values fit the type, where more is known than the sample
    importance    importance(tensor, type id): what its inputs count; errors and weights are weighted by it
    effects       then the sum over tensors of (relative squared error of outputs x what it is worth) is made small, to
                  second order the KL divergence; else that of (relative squared error x weights)
    in_time       `target` counts bytes by the time that they take (PACE), but for an embedding that is looked up in
    stock         types of another file, by name: then the smallest file whose error is no larger than that one's, and
                  `target` is not looked at
    Without `effects` a bit is worth the same everywhere. (Every tensor counted alike whatever its size starves the
    embedding: KLD .44 against .27, SmolLM2-135M at 4.66 bits.) The result is the optimum for the bytes that the steps
    up to the first that does not fit take; what is left then is filled with later steps. It never gets worse with a
    larger target, and does not depend on threads.
    Raises RecipeError for a target that cannot be reached, QuantizeError for a value that is not finite, RuntimeMissing
    for a pinned type that cannot be written here.
    """
    if stock is None and (not isfinite(target) or target <= 0):
        raise RecipeError(f"target of {target} bits per weight; give a number above 0")
    recipe.check_overrides(tensors)
    named = [BY_NAME[r.target] for r in recipe.rules if r.target in BY_NAME and not r.override]
    ours = list(dict.fromkeys(named or [DEFAULT]))
    for kind in ours:
        methods.require(method, kind)
    model, weights = Model(tensors), sum(t.n_weights for t in tensors)
    chosen: dict[str, Choice] = {}
    free: list[tuple[TensorInfo, list[Option]]] = []
    goal = 0.0
    for i, t in enumerate(tensors):
        progress("measuring", i, len(tensors), t.name)
        if _is_free(rule_for(t, recipe.rules, model)):
            other = (stock or {}).get(t.name)
            ladder = _ladder(t, ours) if other is None else [*_ladder(t, ours), other]
            fitting = list(dict.fromkeys(k for k in ladder if takes(t, k)))
            options = _measure(t, fitting, sample, method, threads, alignment, importance(t, ours[0].id), effects)
            goal += sum(o.error for o in options if o.type == other)
            if in_time and not looked_up(t, tensors):
                options = [replace(o, nbytes=paced(o.nbytes, o.type)) for o in options]
            free.append((t, options or [Option(t.type, align(t.nbytes, alignment), 0.0)]))
        else:
            chosen[t.name] = choose(t, recipe.rules, model)
            if chosen[t.name].type not in TYPES and chosen[t.name].type != t.type:
                ggml.require(chosen[t.name].type)
    progress("measuring", len(tensors), len(tensors), "")
    fixed = header_bytes + sum(_nbytes(t, chosen[t.name].type, alignment) for t in tensors if t.name in chosen)
    room = floor(Fraction(target) * weights / 8) - fixed
    free.sort(key=lambda item: item[0].name)  # ties go by name, whatever the order in the file
    steps = [hull(options) for _, options in free]
    least = sum(s[0].nbytes for s in steps)
    if stock is not None:
        room = _room_for(steps, goal)
        target = 8 * (room + fixed) / max(1, weights)
    if least > room:
        bpw = ceil(8000 * (least + fixed) / weights) / 1000 if weights else 0.0
        raise RecipeError(
            f"target of {target:g} bits per weight: the smallest that this recipe reaches is {bpw:.3f}; "
            "raise the target, or keep and name fewer tensors"
        )
    for (t, _), s, k in zip(free, steps, spend(steps, room), strict=True):
        chosen[t.name] = _choice(t, s, k, target)
    return {t.name: chosen[t.name] for t in tensors}


def _room_for(steps: Sequence[Sequence[Option]], goal: float) -> int:
    """The least bytes for which the error is at most `goal`; for all that there is where none are enough."""
    low, high = (sum(s[k].nbytes for s in steps) for k in (0, -1))
    while low < high:
        middle = (low + high) // 2
        error = sum(s[k].error for s, k in zip(steps, spend(steps, middle), strict=True))
        low, high = (low, middle) if error <= goal else (middle + 1, high)
    return low


def paced(nbytes: int, type_id: int) -> int:
    """Bytes by the time that they take; see PACE."""
    return round(nbytes * PACE.get(type_name(type_id), SLOW))


def spread(rows: int, cols: int, n: int) -> NDArray[np.int64]:
    """Indices of about n / cols rows, at least one, spread evenly over `rows`."""
    count = min(rows, max(1, round(n / cols)))
    return (np.arange(count, dtype=np.int64) * 2 + 1) * rows // (2 * count)


def hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull of error over bytes: ascending bytes, falling error and falling gain.

    options  at least one; of two with equal bytes the better, or the smaller type id, counts
    """
    found: list[Option] = []
    for o in sorted(options, key=lambda o: (o.nbytes, o.error, o.type)):
        if found and o.error >= found[-1].error:
            continue
        while len(found) > 1 and _gain(found[-2], found[-1]) <= _gain(found[-1], o):
            found.pop()
        found.append(o)
    return found


def _gain(a: Option, b: Option) -> float:
    """Error that a step from a to b takes away, per byte."""
    return (a.error - b.error) / (b.nbytes - a.nbytes)


def spend(steps: Sequence[Sequence[Option]], room: int) -> list[int]:
    """Index of the option of each tensor that uses at most `room` bytes in all, which must suffice for every first one.

    steps  per tensor the options of `hull`
    Takes the step with the largest gain per byte, ties by order, as long as there is room; a tensor that cannot take
    its next step stays where it is.
    """
    room -= sum(s[0].nbytes for s in steps)
    assert room >= 0
    order = sorted((-_gain(s[k - 1], s[k]), i, k) for i, s in enumerate(steps) for k in range(1, len(s)))
    at = [0] * len(steps)
    for _, i, k in order:
        cost = steps[i][k].nbytes - steps[i][k - 1].nbytes
        if at[i] == k - 1 and cost <= room:
            at[i], room = k, room - cost
    return at


def _is_free(rule: Rule | None) -> bool:
    """Whether the budget decides: the recipe quantizes the tensor, and the user has not named its type."""
    return rule is not None and not rule.override and rule.target != KEEP and TYPE_IDS.get(rule.target) not in FLOAT_IDS


def _ladder(t: TensorInfo, ours: Sequence[TensorType]) -> list[int]:
    """Type ids that the tensor's rows fit into and that can be written here, ours first; then its own, or F16.

    Ours all, since of equal bytes the hull takes the least error: so TP2_2 where a recipe names TP2_1 too.
    """
    rungs = [*([kind.id] for kind in ours), *([TYPE_IDS[name] for name in rung] for rung in LADDER)]
    fitting = [[k for k in rung if t.shape[0] % GGML_TYPES[k][1] == 0 and _writable(k)] for rung in rungs]
    found = [rung[0] for rung in fitting if rung]
    last = F16_ID if t.type_name in ("F32", "F64") else t.type
    return [k for k in found if _nbytes(t, k, 1) < _nbytes(t, last, 1)] + [last]


def _writable(type_id: int) -> bool:
    if type_id not in TYPES:
        try:
            ggml.require(type_id)
        except RuntimeMissing:
            return False
    return True


def _nbytes(t: TensorInfo, type_id: int, alignment: int) -> int:
    return align(t.n_weights // t.shape[0] * row_size(type_id, t.shape[0]), alignment)


def _measure(
    t: TensorInfo,
    ladder: list[int],
    sample: Sample,
    method: methods.Method,
    threads: int,
    alignment: int,
    importance: Importance | None,
    effects: Effects | None,
) -> list[Option]:
    """The options of one tensor. A type that cannot hold the sample is none."""
    w = sample(t, SAMPLE)
    runs: list[tuple[slice, F32 | None]] = [(slice(0, len(w)), None)]
    if importance:
        runs = list(importance.split(spread(t.n_weights // t.shape[0], t.shape[0], SAMPLE)))
    power = sum(_weighed(w[rows], h) for rows, h in runs)
    worth, ours = (effects.worth(t), effects.ours) if effects else (float(t.n_weights), 1.0)
    seen = [effects.power(t, e, w[rows]) for e, (rows, _) in _by_expert(importance, t, runs)] if effects else [None]
    if all(p is not None for p in seen):
        power = sum(p for p in seen if p is not None)
    else:
        ours = 1.0  # no second order where inputs are not known
    if not isfinite(power):
        raise QuantizeError(f"tensor {t.name}: a value is not finite; the checkpoint is damaged")
    options = []
    for kind in ladder:
        if kind == t.type:
            error = 0.0
        else:
            try:
                error = sum(_squared_error(w[rows], h, kind, method, threads) for rows, h in runs)
            except QuantizeError:
                continue
        relative = error * (ours if kind in TYPES else 1) / power if power else 0.0
        options.append(Option(kind, _nbytes(t, kind, alignment), relative * worth, relative))
    return options


def _by_expert(
    importance: Importance | None, t: TensorInfo, runs: list[tuple[slice, F32 | None]]
) -> list[tuple[int, tuple[slice, F32 | None]]]:
    """Each run of rows with the expert that it belongs to."""
    if importance is None:
        return [(0, run) for run in runs]
    rows = spread(t.n_weights // t.shape[0], t.shape[0], SAMPLE)
    return [(int(rows[run[0].start] // importance.rows), run) for run in runs]


def _weighed(x: F32, importance: F32 | None) -> float:
    """The sum of squares of x (R, C), weighted by the importance (C,) of its columns."""
    squares = np.square(x, dtype=np.float64)
    return float(squares.sum() if importance is None else (squares @ importance.astype(np.float64)).sum())


def _squared_error(w: F32, importance: F32 | None, kind: int, method: methods.Method, threads: int) -> float:
    if kind in TYPES:
        ours = TYPES[kind]
        back = native.dequantize(ours, methods.quantize(ours, method, w, importance, threads=threads))
    else:
        used = importance if kind in ggml.USES_IMPORTANCE else None
        back = ggml.dequantize(kind, ggml.quantize(kind, w, used, threads), threads)
    return _weighed(back - w, importance)


def _choice(t: TensorInfo, steps: list[Option], k: int, target: float) -> Choice:
    """The choice of option k, with its neighbour in the reason."""

    def told(o: Option) -> str:
        return f"{o.relative:.2g} at {8 * GGML_TYPES[o.type][2] / GGML_TYPES[o.type][1]:.3g} bits"

    near = k + 1 if k + 1 < len(steps) else k - 1
    other = f", {told(steps[near])}" if len(steps) > 1 else f"; only {type_name(steps[k].type)} fits"
    return Choice(steps[k].type, f"budget {target:.2f}: error {told(steps[k])}{other}")
