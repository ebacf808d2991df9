"""Whether an unfinished conversion may be taken up: the same source, the same options, the same program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ResumeError
from ..files import Journal, TensorInfo, type_block
from ..plan import Choice
from ..quantize import MASK, checksum
from ..source import Source, changed_option

CHUNK = 1 << 24


def require_same(out: Path, source: Source, journal: Journal, now: dict[str, Any]) -> None:
    """Raises ResumeError naming the first thing that has changed since the journal was begun."""
    then = journal.job
    assert then is not None
    for what in ("ptqtp-gguf", "llama-cpp-python", "format"):
        if then.get(what) != now[what]:
            raise _refusal(out, f"{what} {then.get(what)} (now {now[what]})")
    if not {"options", "stamp", "header"} <= then.keys():
        raise journal.damaged()
    if option := changed_option(then["options"], now["options"]):
        value, new = (o["options"].get(option, "none") for o in (then, now))
        raise _refusal(out, "another recipe" if option == "--recipe" else f"{option} {value} (now {new})")
    changed = _changed_file(then["stamp"], now["stamp"])
    if then["header"] != now["header"] or _sizes(then) != _sizes(now):
        raise _refusal(out, f"another source: {changed or source.path} has changed")
    if changed:  # same sizes, other times: a copy, or a change in place
        require_tensors(out, source, source.tensors, journal.rows)


def require_tensors(out: Path, source: Source, tensors: list[TensorInfo], records: list[dict[str, Any]]) -> None:
    """Raises ResumeError unless finished tensors are in the source as they were. records: of the first tensors."""
    for record, t in zip(records, tensors, strict=False):
        at = total = 0
        for chunk in source.chunks(t, CHUNK):
            total += checksum(chunk, at)
            at += chunk.size
        if total & MASK != record["source"]:
            raise _refusal(out, f"another source: tensor {t.name} of {source.path} has changed")


def choices_of(source: Source, journal: Journal) -> list[Choice]:
    """The plan that a journal holds, one choice a tensor. Raises OutputError unless it, and the finished tensors, fit
    the source."""
    assert journal.job is not None
    plan = journal.job.get("plan", [])
    kinds = [(t, choice[0]) for t, choice in zip(source.tensors, plan, strict=False)]
    kinds += [(t, record["type"]) for t, record in zip(source.tensors, journal.rows, strict=False)]
    fits = all(t.shape[0] % type_block(kind) == 0 for t, kind in kinds)
    if len(plan) != len(source.tensors) or len(journal.rows) > len(plan) or not fits:
        raise journal.damaged()
    return [Choice(*choice) for choice in plan]


def _changed_file(then: list[list[Any]], now: list[list[Any]]) -> str | None:
    """The first file that is new, gone, or of another size or time."""
    return next((s[0] for s in [*now, *then] if s not in now or s not in then), None)


def _sizes(job: dict[str, Any]) -> list[list[Any]]:
    return [s[:2] for s in job["stamp"]]


def _refusal(out: Path, what: str) -> ResumeError:
    return ResumeError(
        f"{out}: an unfinished conversion lies beside it, begun with {what}; finish it as it was begun, or begin anew "
        "with --restart"
    )
