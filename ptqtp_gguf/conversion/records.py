"""What a conversion notes in its journal, and whether an unfinished one may be resumed: same source, options, program.

{"job": {...}}                   JobRecord: everything that decides the bytes, and the plan
{"tensor": 0, "type": 251, ...}  TensorRecord: tensor 0 is in the unfinished file
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..codec import TYPES
from ..errors import ResumeError
from ..files import GGML_TYPES, Journal, TensorInfo, is_count, is_text, type_block
from ..plan import Choice, PlanRow, role_of
from ..quantize import MASK, checksum
from ..source import Source, changed_option
from .checking import intact_tensors
from .output_files import Part

CHUNK = 1 << 24
PROGRAM = ("ptqtp-gguf", "llama-cpp-python", "format")  # keys of a fingerprint that say which program it was


@dataclass(frozen=True)
class TensorRecord:
    """One finished tensor.

    tensor        its number in the output, or in a share
    type, nbytes  ggml type id and bytes in the output
    hash, source  checksums: of the weights that were meant (of the bytes, for a stock type), and of the source's bytes
    error, power  sums of squared differences from the source and of squared weights
    why           the reason, where it fell back to another type than planned
    """

    tensor: int
    type: int
    nbytes: int
    hash: int
    source: int
    error: float
    power: float
    why: str | None = None

    @classmethod
    def read(cls, line: dict[str, Any]) -> TensorRecord:
        """Raises ValueError unless a conversion can be resumed behind this tensor."""
        sums = all(isinstance(line.get(k), float | int) and math.isfinite(line[k]) for k in ("error", "power"))
        good = sums and all(is_count(line.get(k)) for k in ("tensor", "nbytes", "hash", "source"))
        why = line.get("why")
        if not good or line.get("type") not in GGML_TYPES or not (why is None or is_text(why)):
            raise ValueError("a damaged tensor record")
        return cls(**{k: line.get(k) for k in cls.__dataclass_fields__})  # type: ignore[arg-type]

    def json(self) -> dict[str, Any]:
        """The journal's line."""
        return asdict(self)

    def numbered(self, tensor: int) -> TensorRecord:
        """The same with another number."""
        return replace(self, tensor=tensor)

    def put_into(self, row: PlanRow) -> None:
        """Tell the plan what became of the tensor."""
        if self.type != row.choice.type:
            row.choice = Choice(self.type, self.why or "", fallback=True)
        if self.type in TYPES:
            row.rel_mse = self.error / self.power if self.power else 0.0


@dataclass(frozen=True)
class JobRecord:
    """Everything that decides the output's bytes.

    program  versions, by the names of PROGRAM
    header   hash of the source's metadata and tensor list
    stamp    (name, bytes, time of change in ns) of each file of the source
    options  by the command line's names for them
    plan     (type id, reason, whether it is a fallback) of each tensor
    """

    program: dict[str, Any]
    header: str
    stamp: list[list[Any]]
    options: dict[str, Any]
    plan: list[list[Any]]

    @classmethod
    def of(cls, fingerprint: dict[str, Any], rows: Sequence[PlanRow] = ()) -> JobRecord:
        """fingerprint: of source.identity."""
        program = {k: fingerprint[k] for k in PROGRAM}
        return cls(program, fingerprint["header"], fingerprint["stamp"], fingerprint["options"], choices_json(rows))

    @classmethod
    def read(cls, job: dict[str, Any]) -> JobRecord:
        """What a journal or another rank holds. Raises ValueError where a part is missing."""
        if not {"options", "stamp", "header"} <= job.keys():
            raise ValueError("a damaged job")
        program = {k: job.get(k) for k in PROGRAM}
        return cls(program, job["header"], job["stamp"], job["options"], job.get("plan", []))

    @staticmethod
    def learns(job: dict[str, Any]) -> bool:
        """Whether what a journal holds is a conversion that looks at text."""
        return "method" in job.get("options", {})

    @staticmethod
    def why_without_text(job: dict[str, Any]) -> str:
        """Why one that looks at none does so: a run that resumes it writes the same model card."""
        why: Any = job.get("without_text")
        return str(why) if is_text(why) and why.isprintable() else "an earlier run began without text"

    def json(self) -> dict[str, Any]:
        """The journal's line."""
        of = {"header": self.header, "stamp": self.stamp, "options": self.options, "plan": self.plan}
        return {**self.program, **of}

    def planned(self, rows: Sequence[PlanRow]) -> JobRecord:
        """The same with the plan of these rows."""
        return replace(self, plan=choices_json(rows))

    def token(self) -> str:
        """SHA-256 over all of it: what ties a share to its output."""
        return hashlib.sha256(json.dumps(self.json(), sort_keys=True).encode()).hexdigest()


def choices_json(rows: Sequence[PlanRow]) -> list[list[Any]]:
    """The choices of plan rows as JSON."""
    return [[r.choice.type, r.choice.reason, r.choice.fallback] for r in rows]


def rows_of(source: Source, plan: list[list[Any]]) -> list[PlanRow]:
    """The rows of a plan that `choices_json` wrote, one a tensor of the source."""
    return [PlanRow(t, Choice(*c), role_of(t.name)) for t, c in zip(source.tensors, plan, strict=True)]


def check_job(job: dict[str, Any]) -> None:
    """Raises ValueError for what cannot be the job of a conversion, a share, or an intermediate file."""
    stamps = job.get("stamp", job.get("bf16", []))
    files = isinstance(stamps, list) and all(
        isinstance(s, list) and len(s) == 3 and is_text(s[0]) and is_count(s[1]) and is_count(abs(s[2])) for s in stamps
    )
    plan = job.get("plan", [])
    choices = isinstance(plan, list) and all(
        isinstance(c, list) and len(c) == 3 and c[0] in GGML_TYPES and is_text(c[1]) and isinstance(c[2], bool)
        for c in plan
    )
    if not files or not choices or not isinstance(job.get("options", {}), dict):
        raise ValueError("a damaged job")


class ConversionJournal(Journal[TensorRecord]):
    """The journal of an output, a share of it, or an intermediate file; its rows are tensors."""

    def __init__(self, out: Path, restart: bool = False) -> None:
        super().__init__(out, TensorRecord.read, restart, check_job)

    def add(self, record: TensorRecord) -> None:
        """Note a finished tensor."""
        self.append(record.json())


# ---- resuming ----


def require_same(out: Path, source: Source, journal: ConversionJournal, now: JobRecord) -> JobRecord:
    """The journal's job. Raises ResumeError naming the first thing that has changed since it was begun."""
    assert journal.job is not None
    for what in PROGRAM:
        if journal.job.get(what) != now.program[what]:
            raise _refusal(out, f"{what} {journal.job.get(what)} (now {now.program[what]})")
    try:
        then = JobRecord.read(journal.job)
    except ValueError:
        raise journal.damaged() from None
    if option := changed_option(then.options, now.options):
        value, new = (job.options.get(option, "none") for job in (then, now))
        raise _refusal(out, "another recipe" if option == "--recipe" else f"{option} {value} (now {new})")
    changed = _changed_file(then.stamp, now.stamp)
    if then.header != now.header or _sizes(then) != _sizes(now):
        raise _refusal(out, f"another source: {changed or source.path} has changed")
    if changed:  # same sizes, other times: a copy, or a change in place
        require_tensors(out, source, source.tensors, journal.rows)
    return then


def require_tensors(out: Path, source: Source, tensors: list[TensorInfo], records: list[TensorRecord]) -> None:
    """Raises ResumeError unless finished tensors are in the source as they were. records: of the first tensors."""
    for record, t in zip(records, tensors, strict=False):
        at = total = 0
        for chunk in source.chunks(t, CHUNK):
            total += checksum(chunk, at)
            at += chunk.size
        if total & MASK != record.source:
            raise _refusal(out, f"another source: tensor {t.name} of {source.path} has changed")


def choices_of(source: Source, journal: ConversionJournal) -> list[Choice]:
    """The plan that a journal holds, one choice a tensor. Raises OutputError unless it, and the finished tensors, fit
    the source."""
    assert journal.job is not None
    plan = journal.job.get("plan", [])
    kinds = [(t, choice[0]) for t, choice in zip(source.tensors, plan, strict=False)]
    kinds += [(t, record.type) for t, record in zip(source.tensors, journal.rows, strict=False)]
    fits = all(t.shape[0] % type_block(kind) == 0 for t, kind in kinds)
    if len(plan) != len(source.tensors) or len(journal.rows) > len(plan) or not fits:
        raise journal.damaged()
    return [Choice(*choice) for choice in plan]


def take_up(parts: list[Part], rows: list[PlanRow], journal: ConversionJournal, named: bool = True) -> int:
    """Put what a journal holds into plan and layout; forget what the disk has lost. Returns the tensors kept.

    parts  the files of an output, or the one of a share, whose tensors are `rows`
    named  a verified file may have its name already; a share never has
    Raises OutputError for a journal that cannot be theirs.
    """
    kinds = zip(rows, journal.rows, strict=False)
    if len(journal.rows) > len(rows) or any(r.tensor.shape[0] % type_block(k.type) for r, k in kinds):
        raise journal.damaged()
    if journal.verified is not None and (len(journal.verified), len(journal.rows)) != (len(parts), len(rows)):
        raise journal.damaged()
    for row, record in zip(rows, journal.rows, strict=False):
        record.put_into(row)
    for part in parts:
        part.tensors = [r.out for r in rows[part.first : part.first + len(part.tensors)]]
    if journal.verified is not None and not all(_whole(p) or (named and p.path.exists()) for p in parts):
        journal.cut(len(journal.rows))  # the verdict falls
    if journal.verified is None:
        intact = intact_tensors(parts, journal.rows)
        if intact < len(journal.rows):
            journal.cut(intact)
    return len(journal.rows)


def _whole(part: Part) -> bool:
    return part.work.exists() and part.work.stat().st_size == part.size


def _changed_file(then: list[list[Any]], now: list[list[Any]]) -> str | None:
    """The first file that is new, gone, or of another size or time."""
    return next((s[0] for s in [*now, *then] if s not in now or s not in then), None)


def _sizes(job: JobRecord) -> list[list[Any]]:
    return [s[:2] for s in job.stamp]


def _refusal(out: Path, what: str) -> ResumeError:
    return ResumeError(
        f"{out}: an unfinished conversion exists beside it, begun with {what}; finish it as it was begun, or start "
        "over with --restart"
    )
