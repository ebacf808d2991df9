"""Planes by calibration and tuning, made before a conversion takes them up: the stages of its method, one by one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from ..calibrate import PlaneStore, Seen, Work, planned
from ..codec import TensorType
from ..errors import OutputError, PtqtpError
from ..plan import PlanRow, Request
from ..progress import Progress
from ..source import Source, fingerprint


class Uncalibrated(Exception):
    """A calibration that nobody asked for cannot be done; the text says why."""


PACKAGE = __package__.rpartition(".")[0]


@contextmanager
def prepared(
    source: Source, out: Path, rows: list[PlanRow], request: Request, progress: Progress, seen: Seen | None = None
) -> Iterator[PlaneStore]:
    """Run the stages of the request's method that are not done yet. Resumable.

    Yields the store with the planes; its notes tell what did not go as it should.
    Raises CalibrationError, QuantizeError, TuneError, OutputError, ResumeError.
    """
    kinds = planned(rows, request)
    options = request.calibration.decisive() | {"--type": request.kind.name, "method": request.method.name}
    job = {**fingerprint(source, options), "tensors": _named(kinds)}
    with PlaneStore(out, job, request.kind, request.options.restart, kinds) as store:
        todo = [stage for stage in request.method.stages if not store.ended(stage)]
        if todo:
            work = _work(source, rows, request, store, progress, seen)
            for stage in todo:
                _run(stage, work)
                store.end_stage(stage)
        yield store


def _work(
    source: Source, rows: list[PlanRow], request: Request, store: PlaneStore, progress: Progress, seen: Seen | None
) -> Work:
    with optional(request.calibration.by_default):
        return Work(source, rows, request, store, progress, seen)


def _run(stage: str, work: Work) -> None:
    with optional(work.how.by_default):
        stage_of(stage)(work)


@contextmanager
def optional(by_default: bool) -> Iterator[None]:
    """Errors of a calibration that nobody asked for, ours or not, as Uncalibrated; but for those of writing."""
    try:
        yield
    except (OutputError, OSError):
        raise
    except Exception as e:
        if not by_default:
            raise
        text = str(e) if isinstance(e, PtqtpError) else f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        raise Uncalibrated(text) from e


def stage_of(name: str) -> Callable[[Work], None]:
    """The function `run` of a stage, a module below the package: "calibrate.run", "tune.run"."""
    run: Callable[[Work], None] = import_module(f"{PACKAGE}.{name}").run
    return run


def _named(kinds: dict[str, TensorType]) -> str:
    names = "\n".join(f"{kind.name} {name}" for name, kind in kinds.items())
    return hashlib.sha256(names.encode()).hexdigest()
