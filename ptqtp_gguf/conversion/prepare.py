"""Planes by calibration and tuning, made before a conversion takes them up: the stages of its method, one by one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from ..calibrate import PlaneStore, Work
from ..codec import TP2_1
from ..plan import Options, PlanRow
from ..progress import Progress
from ..source import Source, fingerprint

PACKAGE = __package__.rpartition(".")[0]


@contextmanager
def prepared(
    source: Source, out: Path, rows: list[PlanRow], options: Options, progress: Progress
) -> Iterator[PlaneStore]:
    """Calibrate, and tune, as the options say. Resumable. The store's notes tell what did not go as it should.

    Raises CalibrationError, QuantizeError, TuneError, OutputError,
    ResumeError.
    """
    how = options.calibration
    job = {**fingerprint(source, how.decisive()), "tensors": _named(rows)}
    with PlaneStore(out, job, options.restart) as store:
        if not store.marked("tuned" if how.tune else "calibrated"):
            work = Work(source, rows, options, store, progress)
            for stage in ("calibrate.run", "tune.run") if how.tune else ("calibrate.run",):
                import_module(f"{PACKAGE}.{stage}").run(work)
        yield store


def _named(rows: list[PlanRow]) -> str:
    names = "\n".join(r.tensor.name for r in rows if r.choice.type == TP2_1.id)
    return hashlib.sha256(names.encode()).hexdigest()
