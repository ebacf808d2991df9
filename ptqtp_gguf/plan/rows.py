"""Which tensor becomes what: the plan of a conversion, before a weight is read."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np

from ..codec import F32, TYPES, U8, scan
from ..errors import InputError, RecipeError
from ..files import FLOAT_IDS, OutTensor, TensorInfo
from ..progress import Progress
from ..quantize import FLOOR, Method, to_float
from ..source import Imatrix, Source, rows_together
from .budget import fit_budget, spread
from .recipe import Choice, fall_back, require_importance
from .request import Request
from .roles import Role, role_of

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


def make_plan(
    source: Source, request: Request, header: int, progress: Progress, imatrix: Imatrix | None = None
) -> list[PlanRow]:
    """Decide on every tensor by its name and shape; with --target-bpw also by its error on a sample of its weights.

    header: bytes of the output's metadata, for the budget. Raises RecipeError if nothing would become trit planes, the
    budget cannot be met, or a type wants importance that is not there; InputError for an imatrix of another model.
    """
    recipe, target_bpw, threads = request.recipe, request.options.target_bpw, request.options.threads
    if imatrix:
        imatrix.check(source.tensors)
    of = functools.partial(imatrix.of, model=source.tensors) if imatrix else lambda t, target: None
    if target_bpw is None:
        choices = recipe.plan(source.tensors)
    else:
        choices = fit_budget(
            source.tensors,
            recipe,
            target_bpw,
            header,
            lambda t, n: sample(source, t, n),
            method=request.direct,
            threads=threads,
            alignment=source.alignment,
            progress=progress,
            takes=lambda t, kind: kind not in TYPES or _look(source, t, kind, threads) is None,
            importance=of,
        )
    require_importance(source.tensors, choices, lambda t, target: of(t, target) is not None, imatrix is not None)
    rows = [PlanRow(t, choices[t.name], role_of(t.name)) for t in source.tensors]
    for row in rows:
        if imatrix and (lack := imatrix.unweighted(row.tensor, row.choice.type, source.tensors)):
            row.choice = replace(row.choice, reason=f"{row.choice.reason}; {lack}")
    if target_bpw is not None and not any(r.choice.type in TYPES for r in rows):
        raise RecipeError(
            f"--target-bpw {target_bpw:g}: so many bits leave nothing in {request.kind.name}; lower the target, or use "
            "llama-quantize for a file of stock types"
        )
    require_planes(source, rows, request.kind.name)
    return rows


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
        self.kind = TYPES.get(target)
        self.groups = self.below = 0

    def why(self, largest: float, groups: int, below: int) -> str | None:
        """Take one piece; the reason why the type cannot hold the tensor, if that is so already."""
        if self.kind is None:
            return None
        self.groups += groups
        self.below += below
        if largest > self.kind.reach:
            return f"largest weight {largest:.4g}; {self.kind.name} reaches {self.kind.reach:.4g}"
        return None

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


def check_values(source: Source, rows: list[PlanRow], threads: int, progress: Progress) -> None:
    """Look at every weight before anything is written, and let tensors fall back now. Raises InputError."""
    total, done = sum(r.tensor.n_weights for r in rows), 0
    for row in rows:
        t = row.tensor
        progress("checking", done, total, t.name)
        if t.type in FLOAT_IDS or row.choice.type != t.type:
            if why := _look(source, t, row.choice.type, threads):
                row.choice = fall_back(t, why)
        done += t.n_weights
    progress("checking", total, total, "")


def _look(source: Source, t: TensorInfo, target: int, threads: int) -> str | None:
    """Why the values of a tensor do not fit the target, or None. Raises InputError for one that is not finite."""
    below, first = Below(target), 0
    group = below.kind.group if below.kind else 32
    for raw in source.pieces(t):
        w = to_float(raw, t.type, threads)
        seen = scan(w.reshape(-1), group, FLOOR, threads)
        if seen.bad >= 0:
            raise not_finite(source, t, raw, first, seen.bad)
        if why := below.why(seen.largest, seen.groups, seen.below):
            return why
        first += w.size
    return below.why_at_end()
