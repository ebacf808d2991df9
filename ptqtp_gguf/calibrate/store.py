"""Planes that calibration and tuning have made, kept in a folder until a conversion takes them up.

.NAME.planes/             beside the target; removed when the target is complete
  .planes.journal         one JSON line a finished tensor or block (journal.py): a killed run resumes after it
  N.bin                   packed rows of a tensor, or float32 values that replace a norm or bias
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ..codec import DEFAULT, F32, I8, U8, TensorType, native, weights_of_levels
from ..errors import InputError, OutputError, ResumeError
from ..files import (
    MAX_BYTES,
    Journal,
    TensorInfo,
    file_size,
    is_count,
    is_text,
    journal_path,
    open_regular,
    parse_json,
    partial_file,
    read_bytes,
    read_whole,
    row_size,
)
from ..quantize import FLOOR, Encoded, to_float
from ..source import changed_option

STOPPED = (KeyboardInterrupt, OutputError, OSError)  # after which the same call goes on; anything else is a failure


def unpacked(kind: TensorType, packed: U8) -> tuple[I8, U8]:
    """Packed rows of a type with levels -> levels int8 (R, C), codes uint8 (R, C/group)."""
    digits, codes = native.unpack(kind, packed)
    return native.levels_of_digits(kind, digits), codes.astype(np.uint8)


def read_row(record: dict[str, Any]) -> dict[str, Any]:
    """A line of the journal: planes of a tensor, or a note. Raises ValueError for a damaged one.

    A file has the name that it was given here, never one that leads out of the folder.
    """
    if "name" in record:
        good = (
            is_text(record["name"]) and record.get("file") == f"{record['tensor']}.bin" and is_count(record.get("hash"))
        )
    else:
        texts = all(is_text(record.get(key, "")) for key in ("said", "mark", "stage"))
        good = texts and is_count(record.get("block", 0))
    if not good:
        raise ValueError("a damaged record")
    return record


def planes_folder(out: Path) -> Path:
    return out.with_name(f".{out.name}.planes")


def is_work(record: dict[str, Any]) -> bool:
    """Whether a line of the journal stands for what took long: planes, or a finished block."""
    return "name" in record or "block" in record


def holds_planes(out: Path) -> bool:
    """Whether there are planes beside a target that a run which was killed or stopped has left."""
    try:
        lines = read_whole(journal_path(planes_folder(out) / "planes"), MAX_BYTES).split(b"\n")[:-1]
        records = [parse_json(line) for line in lines]
    except (InputError, OSError, ValueError):
        return False
    return any(map(is_work, records)) and "failed" not in records[-1]


def _changed(then: dict[str, Any], now: dict[str, Any]) -> str:
    """What decides the planes and is not as it was, in the user's words."""
    if option := changed_option(then.get("options", {}), now.get("options", {})):
        return option
    what = changed_option(then, now)
    return {"header": "source", "stamp": "source", "tensors": "choice of types"}.get(str(what), str(what))


def remove_planes(out: Path) -> None:
    """The conversion is complete: nothing of this is needed any more. Raises OSError where something is left."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(planes_folder(out))


class PlaneStore:
    """The folder of one target, locked while it is open. A context manager.

    kind     type of the tensors that `kinds` does not name
    Raises ResumeError where a run that was killed or stopped has left planes in it that were made in another way;
    OutputError where it cannot be written. Anything else that it holds gives way.
    """

    def __init__(
        self,
        out: Path,
        job: dict[str, Any],
        kind: TensorType = DEFAULT,
        restart: bool = False,
        kinds: Mapping[str, TensorType] | None = None,
    ) -> None:
        """job: all that decides the planes; "options" in it by the names that the command line has for them.
        kinds: types of the tensors by name, each one with levels."""
        self.kind, self._kinds = kind, kinds or {}
        self.folder = planes_folder(out)
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as e:
            raise OutputError(f"{self.folder}: {e.strerror}") from None
        self._journal = Journal(self.folder / "planes", read_row, restart)
        then = self._journal.job
        if then is not None and then != job and (self._journal.failed or not self._worth_keeping):
            for path in self.folder.glob("[!.]*"):
                path.unlink()
            self._journal.clear()
            then = None
        if then is not None and then != job:
            self._journal.__exit__(None, None, None)
            changed = _changed(then, job)
            raise ResumeError(
                f"{out}: unfinished calibration exists beside it, begun with another {changed}; finish it as it was "
                "begun, or start over with --restart"
            )
        if then is None:
            self._journal.begin(job)
        self._of: dict[str, dict[str, Any]] = {}  # name -> its newest row
        self._before: dict[str, dict[str, Any]] = {}  # as the stage that runs found it; or as it put it first
        for record in self._journal.rows:
            self._note_row(record)

    def __enter__(self) -> PlaneStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        failed = kind is not None and not issubclass(kind, STOPPED)
        if failed and self._worth_keeping:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                self._journal.fail()
        self._journal.__exit__(kind, e, tb)
        if failed and not self._worth_keeping:  # other text, other settings are next
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _worth_keeping(self) -> bool:
        return any(map(is_work, self._journal.rows))

    @property
    def notes(self) -> list[str]:
        """What was said, in this run or an earlier one."""
        return [r["said"] for r in self._journal.rows if "said" in r]

    def say(self, text: str) -> None:
        """Keep something that the user should read at the end."""
        self._note(said=text)

    @property
    def blocks(self) -> int:
        """Blocks that are finished, from the first on."""
        return sum("block" in r for r in self._journal.rows)

    def marked(self, what: str) -> bool:
        """Whether `mark(what)` was called, in this run or an earlier one."""
        return any(r.get("mark") == what for r in self._journal.rows)

    def mark(self, what: str) -> None:
        """Note that a step is done."""
        self._note(mark=what)

    def end_stage(self, name: str) -> None:
        """Note that a stage is done: the next one begins with the planes of now."""
        self._note(stage=name)
        self._note_row(self._journal.rows[-1])

    def ended(self, name: str) -> bool:
        """Whether `end_stage(name)` was called, in this run or an earlier one."""
        return any(r.get("stage") == name for r in self._journal.rows)

    def _note_row(self, record: dict[str, Any]) -> None:
        if "name" in record:
            self._of[record["name"]] = record
            self._before.setdefault(record["name"], record)
        elif "stage" in record:
            self._before.update(self._of)

    def end_block(self, index: int) -> None:
        """Note that all of a block's tensors are here."""
        self._note(block=index)

    def _note(self, **record: Any) -> None:
        self._journal.append({"tensor": len(self._journal.rows), **record})
        self._journal.sync()

    def _write(self, name: str, data: np.ndarray[Any, Any], **record: Any) -> None:
        file = f"{len(self._journal.rows)}.bin"
        with partial_file(self.folder / file) as partial:
            partial.file.write(np.ascontiguousarray(data).data)
            partial.sync()
            partial.publish()
        self._note(name=name, file=file, **record)
        self._note_row(self._journal.rows[-1])

    def kind_of(self, name: str) -> TensorType:
        """Type of a tensor's planes."""
        return self._kinds.get(name, self.kind)

    def put(self, t: TensorInfo, levels: I8, codes: U8) -> None:
        """Planes of a whole tensor: levels int8 (R, C), codes uint8 (R, C/32)."""
        kind = self.kind_of(t.name)
        hash_ = native.float_hash(weights_of_levels(levels, codes).reshape(-1))
        self._write(t.name, native.pack(kind, native.digits_of_levels(kind, levels), codes), hash=hash_)

    def put_vector(self, t: TensorInfo, values: F32) -> None:
        """New values of a norm or a bias, float32 (C,)."""
        self._write(t.name, np.ascontiguousarray(values, np.float32), hash=0)

    def has(self, name: str) -> bool:
        return name in self._of

    def raw(self, t: TensorInfo) -> U8:
        """The newest that is kept of a tensor, from the disk: uint8 (R, bytes a row). Raises OutputError."""
        return self._rows(t, self._of[t.name], 0, t.n_weights // t.shape[0])

    def _rows(self, t: TensorInfo, record: dict[str, Any], start: int, n: int) -> U8:
        path, rows = self.folder / record["file"], t.n_weights // t.shape[0]
        try:
            with open_regular(path) as f:
                width = row_size(self.kind_of(t.name).id, t.shape[0]) if len(t.shape) > 1 else 4 * t.shape[0]
                if file_size(f, str(path)) != rows * width:
                    raise InputError(f"{path}: damaged")
                return read_bytes(f, start * width, n * width, str(path)).reshape(n, width)
        except InputError as e:
            raise OutputError(f"{e}; start over with --restart") from None

    def planes(self, t: TensorInfo) -> tuple[I8, U8]:
        """Levels int8 (R, C) and codes uint8 (R, C/32) of a tensor, as the stage that runs found it: a stage that was
        killed begins with the same again. Of a tensor that this stage was the first to put, as it was put first."""
        return unpacked(self.kind_of(t.name), self._rows(t, self._before[t.name], 0, t.n_weights // t.shape[0]))

    def encode(self, t: TensorInfo, source: U8, first: int, threads: int = 0) -> Encoded:
        """A piece of a tensor: source uint8 (R, bytes a row) from weight `first` on -> the same rows of the planes, and
        what was seen of the weights."""
        at, kind = first // t.shape[0], self.kind_of(t.name)
        data = self._rows(t, self._of[t.name], at, len(source))
        w = to_float(source, t.type, threads)
        scan = native.scan(w.reshape(-1), kind.group, FLOOR, threads)
        if len(t.shape) == 1:
            return Encoded(data, 0.0, 0.0, *scan)
        difference = w - native.dequantize(kind, data)
        error, power = float(np.vdot(difference, difference)), float(np.vdot(w, w))
        return Encoded(data, error, power, *scan, self._of[t.name]["hash"] if first == 0 else 0)
