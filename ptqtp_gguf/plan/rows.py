"""Which tensor becomes what: the plan of a conversion, before a weight is read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ..codec import F32, TYPES, U8, scan
from ..errors import InputError, QuantizeError, RecipeError
from ..files import FLOAT_IDS, OutTensor, TensorInfo, align, type_name
from ..progress import Progress
from ..quantize import FLOOR, Method, beyond, to_float
from ..source import Imatrix, Importance, Source, looked_up, rows_together
from .budget import Effects, fit_budget, paced, spread
from .recipe import Choice, fall_back, require_importance
from .request import Request
from .roles import Role, role_of

QUICK = "quick"  # the effort that leaves types to the recipe
MOSTLY_BELOW = 0.5  # share of groups below the scales' range from which a tensor falls back


@dataclass
class PlanRow:
    """One tensor: what it is, what it becomes, why; after quantizing, its relative squared error."""

    tensor: TensorInfo
    choice: Choice
    role: Role
    rel_mse: float | None = None

    @property
    def out(self) -> OutTensor:
        return OutTensor(self.tensor.name, self.tensor.shape, self.choice.type)


def chooses_types(request: Request) -> bool:
    """Whether tensors get their types by what errors in them do, where that is known: for a budget, and for as many
    bytes as the default recipe takes."""
    o = request.options
    return o.has_target or (request.recipe.name == "default" and o.calibration.effort != QUICK)


def make_plan(
    source: Source,
    request: Request,
    header: int,
    progress: Progress,
    imatrix: Imatrix | None = None,
    effects: Effects | None = None,
) -> list[PlanRow]:
    """Decide on every tensor by its name and shape; with --target-bpw also by its error on a sample of its weights.

    header   bytes of the output's metadata, for the budget
    effects  what errors do to the model's output; then types are chosen by that, within the budget, or within the
             bytes that the recipe would take
    Raises RecipeError if nothing would become trit planes, the
    budget cannot be met, or a type wants importance that is not there; InputError for an imatrix of another model.
    """
    recipe = request.recipe
    if request.options.as_good_as and effects is None:
        raise RecipeError("--as-good-as wants text through the runtime: not with --effort best, --tune or --dry-run")
    target_bpw = _target(source, request, header, effects is not None)
    if imatrix:
        imatrix.check(source.tensors)
    of = functools.partial(imatrix.of, model=source.tensors) if imatrix else lambda t, target: None
    if target_bpw is None and not request.options.as_good_as:
        choices = recipe.plan(source.tensors)
    else:
        choices = _fitted(source, request, target_bpw or 0.0, header, progress, of, effects)
    require_importance(source.tensors, choices, lambda t, target: of(t, target) is not None, imatrix is not None)
    rows = [PlanRow(t, choices[t.name], role_of(t.name)) for t in source.tensors]
    for row in rows:
        if imatrix and (lack := imatrix.unweighted(row.tensor, row.choice.type, source.tensors)):
            row.choice = replace(row.choice, reason=f"{row.choice.reason}; {lack}")
    if target_bpw is not None and not any(r.choice.type in TYPES for r in rows):
        raise RecipeError(
            f"target of {target_bpw:g} bits per weight: so many leave nothing in {request.kind.name}; lower it, or "
            "use llama-quantize for a file of stock types"
        )
    require_planes(source, rows, request.kind.name)
    return rows


def _fitted(
    source: Source,
    request: Request,
    target: float,
    header: int,
    progress: Progress,
    of: Callable[[TensorInfo, int], Importance | None],
    effects: Effects | None,
) -> dict[str, Choice]:
    """The types that fit_budget chooses; where nobody gave a target, and it leaves nothing to our types or finds none,
    those of the recipe."""
    options, threads = request.options, request.options.threads
    seen = functools.cache(functools.partial(survey, source, threads=threads))
    try:
        choices = fit_budget(
            source.tensors,
            request.recipe,
            target,
            header,
            lambda t, n: sample(source, t, n),
            method=request.direct,
            threads=threads,
            alignment=source.alignment,
            progress=progress,
            takes=lambda t, kind: kind == t.type or not seen(t, group_of(kind)).misfit(kind),
            importance=effects.importance if effects else of,
            effects=effects,
            in_time=not options.has_target,
            stock=effects.stock(options.as_good_as) if effects and options.as_good_as else None,
        )
    except RecipeError:
        if options.has_target:
            raise
        return request.recipe.plan(source.tensors)
    if not options.has_target and not any(c.type in TYPES for c in choices.values()):
        return request.recipe.plan(source.tensors)
    return choices


def _target(source: Source, request: Request, header: int, known: bool) -> float | None:
    """Bits per weight of the whole file that the user or the default recipe means; None: the recipe says every type."""
    o, weights = request.options, sum(t.n_weights for t in source.tensors)
    if o.target_size:
        return 8 * o.target_size / max(1, weights)
    if o.target_bpw is not None or o.as_good_as or not known:
        return o.target_bpw
    choices = request.recipe.plan(source.tensors)
    size = header
    for t in source.tensors:
        kind = choices[t.name].type
        nbytes = align(OutTensor(t.name, t.shape, kind).nbytes, source.alignment)
        fixed = len(t.shape) < 2 or kind == t.type or looked_up(t, source.tensors)
        size += nbytes if fixed else paced(nbytes, kind)
    return 8 * size / max(1, weights)


def require_planes(source: Source, rows: list[PlanRow], type_name: str) -> None:
    """Raises RecipeError if no tensor is of one of our types: such a file would be no business of this program."""
    if any(r.choice.type in TYPES for r in rows):
        return
    first = next((r for r in rows if r.role is Role.BLOCK and r.choice.fallback), None)
    why = f"; {first.tensor.name}: {first.choice.reason}" if first else ""
    raise RecipeError(f"{source.path}: no tensor takes {type_name}{why}")


def sample(source: Source, t: TensorInfo, n: int) -> F32:
    """About n weights of a tensor in whole rows, from places spread evenly over it: float32 (R, C)."""
    wanted = spread(t.n_weights // t.shape[0], t.shape[0], n)
    parts: list[U8] = []
    first = 0
    for have in source.pieces(t):
        parts.append(have[wanted[(wanted >= first) & (wanted < first + len(have))] - first])
        first += len(have)
    return to_float(np.concatenate(parts), t.type)


def rows_per_piece(t: TensorInfo, target: int, method: Method, piece: int) -> int:
    """Rows that travel together: all of a matrix, where the method must see it whole."""
    if method.whole_matrix and target in TYPES:
        return t.shape[1]
    return rows_together(t.shape[0], piece)


class Below:
    """Counts, over a tensor's pieces, groups below the range of the scales."""

    def __init__(self, target: int) -> None:
        self.target, self.kind = target, TYPES.get(target)
        self.groups = self.below = 0

    def why(self, largest: float, groups: int, below: int) -> str | None:
        """Take one piece; the reason why the type cannot hold the tensor, if that is so already."""
        self.groups += groups
        self.below += below
        return beyond(self.target, largest)

    def why_at_end(self) -> str | None:
        if self.kind and self.groups and self.below > MOSTLY_BELOW * self.groups:
            return f"{self.below} of {self.groups} groups lie below the range of the scales of {self.kind.name}"
        return None


def not_finite(source: Source, t: TensorInfo, raw: U8, first: int, bad: int) -> InputError:
    """The error for a value that is not finite: piece raw (R, B), whose first weight has the index first."""
    value = to_float(raw, t.type).reshape(-1)[bad]
    row, col = divmod(first + bad, t.shape[0])
    return InputError(
        f"{source.path}: tensor {t.name} holds {value} at row {row}, column {col}; the checkpoint is damaged"
    )


def check_values(
    source: Source,
    rows: list[PlanRow],
    threads: int,
    progress: Progress,
    pinned: frozenset[str] = frozenset(),
) -> None:
    """Look at every weight before anything is written, and let tensors fall back now.

    pinned: see `settle`. Raises InputError for a value that is not finite, QuantizeError for one that does not fit.
    """
    total, done = sum(r.tensor.n_weights for r in rows), 0
    for row in rows:
        t = row.tensor
        progress("checking", done, total, t.name)
        if t.type in FLOAT_IDS or row.choice.type != t.type:
            found = survey(source, t, group_of(row.choice.type), threads)
            while why := found.misfit(row.choice.type):
                settle(row, why, found.largest, pinned)
        done += t.n_weights
    progress("checking", total, total, "")


def settle(row: PlanRow, why: str, largest: float, pinned: frozenset[str]) -> None:
    """Give the tensor the next type that holds it, with the reason.

    why, largest  why its values do not fit, and the largest |weight| seen
    pinned        names of tensors whose stock type is the user's own word: they raise QuantizeError
    """
    kind = row.choice.type
    choice = fall_back(row.tensor, why, kind, largest)
    if row.tensor.name in pinned and kind not in TYPES and not row.choice.fallback:
        raise QuantizeError(
            f"tensor {row.tensor.name}: {why}; give {type_name(choice.type)} in --tensor-type, which holds it"
        )
    row.choice = choice


@dataclass(frozen=True)
class Survey:
    """What was seen of all weights of a tensor: the largest |weight|, groups, and groups below the scales' range."""

    largest: float
    groups: int
    below: int

    def misfit(self, target: int) -> str | None:
        """Why they do not fit a type whose groups were looked at, or None."""
        below = Below(target)
        return below.why(self.largest, self.groups, self.below) or below.why_at_end()


def group_of(target: int) -> int:
    """Weights that share a scale in one of our types; of the others nothing depends on it."""
    return TYPES[target].group if target in TYPES else 32


def survey(source: Source, t: TensorInfo, group: int, threads: int = 0) -> Survey:
    """Look at every weight of a tensor. Raises InputError for one that is not finite."""
    largest, groups, below, first = 0.0, 0, 0, 0
    for raw in source.pieces(t):
        w = to_float(raw, t.type, threads)
        seen = scan(w.reshape(-1), group, FLOOR, threads)
        if seen.bad >= 0:
            raise not_finite(source, t, raw, first, seen.bad)
        largest, groups, below = max(largest, seen.largest), groups + seen.groups, below + seen.below
        first += w.size
    return Survey(largest, groups, below)
