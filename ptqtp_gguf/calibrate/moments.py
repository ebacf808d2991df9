"""What the inputs of each matrix were, kept in a folder: second moments, or rows of inputs where they are wide.

DIR/                 `--hessians`, or a folder beside the target
  index.json         what it was gathered from, how far it is, and a record for each distinct input
  sums.N             float32: the sums of x xT, one input behind the other; a new file at each checkpoint
  K.rows  K.experts  rows of an input in bf16, and to which experts each went, int32
  K.held             rows of the held-out windows, K.held-experts

An input of at most SUM_COLS values has the sum over all tokens, (C, C), of E experts each its own; so long as the sums
take at most SUM_BYTES together. Of any other, rows are kept, spread evenly over the text. What is shared by several
matrices (q, k, v; gate, up) is kept once.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..codec import F32, I32, native
from ..errors import CalibrationError, OutputError
from ..files import (
    BF16_ID,
    check_space,
    file_size,
    is_count,
    open_regular,
    parse_json,
    read_whole,
    sync_folder,
    write_text,
)

VERSION = 2
SUM_COLS = 4096
SUM_BYTES = 4 << 30
ROWS = 8192  # of an input that has no sum
EXPERT_ROWS = 1 << 16  # of one of experts
HELD_ROWS, HELD_EVERY = 1024, 8  # rows of held-out windows, of plain inputs; one window of so many is held out
HELD_EXPERTS = 8  # times as many rows of inputs of experts
MAX_INDEX = 64 << 20
MAX_RECORDS, MAX_COLS, MAX_EXPERTS, MAX_NUMBER = 1 << 16, 1 << 20, 1 << 12, 1 << 48
_MEANING = {  # of the key's entries, for messages
    "model": "another model",
    "tokens": "another text",
    "shape": "other windows",
    "tensors": "other tensors",
}
U16 = NDArray[np.uint16]


@dataclass
class Input:
    """One distinct input.

    number   of its files
    tensors  the matrices that are given it, the first one's name first
    cols     values of an input
    counts   tokens, one number an expert, or one in all
    summed   whether it has sums, at `offset` bytes of them; else `rows` rows are kept
    held     rows of the held-out windows
    used     experts that a row went to; 0 = no experts
    heads    whether each "expert" is a head that sees all tokens
    passed   rows that rows were chosen from, and held_passed
    """

    number: int
    tensors: list[str]
    cols: int
    counts: list[int]
    summed: bool
    offset: int = 0
    rows: int = 0
    held: int = 0
    used: int = 0
    heads: bool = False
    passed: int = 0
    held_passed: int = 0

    @property
    def sum_bytes(self) -> int:
        return 4 * self.cols * self.cols * len(self.counts) if self.summed else 0


@dataclass
class Index:
    """key: what decides the moments; done: windows that are in; windows: of all; generation: of the sums' file."""

    key: dict[str, Any]
    windows: int
    done: int = 0
    generation: int = 0
    inputs: list[Input] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return self.done >= self.windows


def _index_path(folder: Path) -> Path:
    return folder / "index.json"


def sums_path(folder: Path, generation: int) -> Path:
    return folder / f"sums.{generation}"


def rows_path(folder: Path, number: int, what: str) -> Path:
    """what: "rows", "experts", "held" or "held-experts"."""
    return folder / f"{number}.{what}"


def write_index(folder: Path, index: Index) -> None:
    """Raises OSError."""
    inputs = [vars(i) for i in index.inputs]
    held = {
        "version": VERSION,
        "key": index.key,
        "windows": index.windows,
        "done": index.done,
        "generation": index.generation,
        "inputs": inputs,
    }
    write_text(_index_path(folder), json.dumps(held), force=True)
    sync_folder(folder)


def read_index(folder: Path) -> Index | None:
    """The index of a folder, checked; None where there is none. Raises CalibrationError."""
    path = _index_path(folder)
    if not path.exists():
        return None
    try:
        found = parse_json(read_whole(path, MAX_INDEX, CalibrationError))
        if found["version"] != VERSION:
            raise CalibrationError(
                f"{path}: version {found['version']!r}; this program reads {VERSION}; name a new folder"
            )
        inputs = [_input(r) for r in found["inputs"]]
        numbers = [found[k] for k in ("windows", "done", "generation")]
        leaders = {i.tensors[0] for i in inputs}
        if len(inputs) > MAX_RECORDS or len(leaders) < len(inputs) or not all(is_count(n, MAX_NUMBER) for n in numbers):
            raise ValueError("out of range")
        offset = 0
        for number, i in enumerate(inputs):
            if (i.number, i.offset) != (number, offset):
                raise ValueError("out of turn")
            offset += i.sum_bytes
        return Index(dict(found["key"]), numbers[0], numbers[1], numbers[2], inputs)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise _damaged(path) from None


def _input(r: dict[str, Any]) -> Input:
    """A record of the index. Raises ValueError, TypeError, KeyError."""
    made = Input(**r)
    numbers = (made.number, made.offset, made.rows, made.held, made.used, made.passed, made.held_passed, *made.counts)
    good = (
        all(is_count(n, MAX_NUMBER) for n in numbers)
        and type(made.cols) is int
        and 0 < made.cols < MAX_COLS
        and 0 < len(made.counts) <= MAX_EXPERTS
        and isinstance(made.tensors, list)
        and bool(made.tensors)
        and all(isinstance(t, str) for t in made.tensors)
        and type(made.summed) is type(made.heads) is bool
    )
    if not good:
        raise ValueError("no record")
    return made


def require_key(folder: Path, index: Index, key: dict[str, Any]) -> None:
    """Raises CalibrationError where the moments were gathered from something else."""
    for name, value in key.items():
        if index.key.get(name) != value:
            raise CalibrationError(
                f"{folder}: these moments were gathered from {_MEANING.get(name, name)}; name a new folder"
            )


def to_bf16(x: F32) -> U16:
    """float32 -> the bits of bf16, to nearest even."""
    return native.to_bf16(x.reshape(1, -1)).view(np.uint16).reshape(x.shape)


def from_bf16(bits: U16) -> F32:
    """The inverse."""
    values = native.to_float(BF16_ID, bits.view(np.uint8))
    assert values is not None
    return values.reshape(bits.shape)


class Moments:
    """A complete folder of moments. Raises CalibrationError where it is none, or what is read is damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = read_index(folder)
        if index is None or not index.inputs:
            raise CalibrationError(f"{folder}: holds no second moments; give --calib TEXT to gather them there")
        if not index.complete:
            raise CalibrationError(f"{folder}: was not finished; give --calib TEXT as before to resume it")
        self._index = index
        self._held: tuple[tuple[int, int], F32] | None = None
        self._went: dict[bool, tuple[Path, I32]] = {}  # held-out or not: to which experts rows of an input went

    def __iter__(self) -> Iterator[Input]:
        return iter(self._index.inputs)

    def second(self, of: Input, expert: int = 0) -> F32:
        """Sum of x xT over the tokens that are kept, float32 (C, C), finite or not; see `tokens`."""
        c = of.cols
        if of.summed:
            at = of.offset + 4 * c * c * expert
            h: F32 = self._read(sums_path(self.folder, self._index.generation), at, c * c, np.float32).reshape(c, c)
            return h
        x = self.rows(of, expert)
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(x.T @ x, np.float32)

    def diagonal(self, of: Input, expert: int = 0) -> F32:
        """The diagonal of `second`, (C,)."""
        if of.summed:
            return np.array(self._last(of, expert).diagonal())
        return np.asarray(np.square(self._last(of, expert)).sum(axis=0), np.float32)

    def energy(self, of: Input, w: F32, expert: int = 0) -> float:
        """Sum of squares of the outputs of rows w (R, C), over the tokens that are kept."""
        if of.summed:
            return float(np.vdot(w @ self._last(of, expert), w))
        y = self._last(of, expert) @ w.T
        return float(np.vdot(y, y))

    def _last(self, of: Input, expert: int) -> F32:
        """Sums or rows, those that were read last at hand."""
        if self._held is None or self._held[0] != (of.number, expert):
            self._held = (of.number, expert), (self.second if of.summed else self.rows)(of, expert)
        return self._held[1]

    def tokens(self, of: Input, expert: int = 0) -> int:
        """Tokens behind `second`."""
        if of.summed:
            return of.counts[expert]
        return len(self._of_expert(of, expert, False)) if of.used else of.rows

    def rows(self, of: Input, expert: int = 0, held: bool = False) -> F32:
        """Inputs that are kept as they were, float32 (T, C): of the text, or of its held-out windows."""
        what, n = ("held", of.held) if held else ("rows", of.rows)
        path = rows_path(self.folder, of.number, what)
        if not of.used:
            return from_bf16(self._read(path, 0, n * of.cols, np.uint16).reshape(n, of.cols))
        wanted = self._of_expert(of, expert, held)
        runs = np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1) if len(wanted) else []
        with self._opened(path, 2 * n * of.cols) as f:
            bits, done = np.empty((len(wanted), of.cols), np.uint16), 0
            for run in runs:
                _fill(f, 2 * of.cols * int(run[0]), bits[done : done + len(run)], path)
                done += len(run)
        return from_bf16(bits)

    def _of_expert(self, of: Input, expert: int, held: bool) -> NDArray[np.int64]:
        """Numbers of the rows that went to an expert. Where each went is read once, of the input that is asked for."""
        name, n = ("held-experts", of.held) if held else ("experts", of.rows)
        path = rows_path(self.folder, of.number, name)
        if held not in self._went or self._went[held][0] != path:
            self._went[held] = path, self._read(path, 0, n * of.used, np.int32).reshape(n, of.used)
        return np.flatnonzero((self._went[held][1] == expert).any(axis=1))

    def _read(self, path: Path, at: int, n: int, dtype: Any) -> NDArray[Any]:
        kind = np.dtype(dtype).newbyteorder("<")
        with self._opened(path, at + n * kind.itemsize) as f:
            out = np.empty(n, kind)  # not before the file is known to hold so much
            _fill(f, at, out, path)
        return out

    @contextlib.contextmanager
    def _opened(self, path: Path, size: int) -> Iterator[BinaryIO]:
        """A file of at least so many bytes; nothing is opened where none are wanted. Raises CalibrationError."""
        if not size:
            yield io.BytesIO()
            return
        try:
            with open_regular(path, CalibrationError) as f:
                if file_size(f, str(path)) < size:
                    raise _damaged(path)
                yield f
        except OSError as e:
            raise CalibrationError(
                f"{path}: {e.strerror or e}; remove the folder to gather the moments again"
            ) from None


def _fill(f: BinaryIO, at: int, out: NDArray[Any], path: Path) -> None:
    """Read what a file has from byte `at` on. Raises CalibrationError where it has become shorter."""
    f.seek(at)
    if f.readinto(out.data) != out.nbytes:  # type: ignore[attr-defined]
        raise _damaged(path)


def _damaged(path: Path) -> CalibrationError:
    return CalibrationError(f"{path}: damaged; remove the folder to gather the moments again")


def _shape(x: F32, experts: I32 | None, n_experts: int) -> tuple[int, int, int, bool]:
    """Of an input as `Gathering.add` is given it: values, experts or heads, experts of a row, whether heads."""
    if experts is None:
        heads = x.ndim == 3
        return x.shape[-1], x.shape[1] if heads else max(1, n_experts), 0, heads
    own = x.ndim == 3 and x.shape[1] > 1
    return x.shape[-1], max(1, n_experts), 1 if own else experts.shape[1], False


class Gathering:
    """A folder of moments that is being filled, window by window. Resumes at its last checkpoint.

    key, windows  see Index
    total         tokens of all windows
    Raises CalibrationError where the folder holds another's, OutputError.
    """

    def __init__(self, folder: Path, key: dict[str, Any], windows: int, total: int) -> None:
        self.folder, self._total = folder, max(1, total)
        found = read_index(folder)
        self.index = found or Index(key, windows)
        require_key(folder, self.index, key)
        if found is None:
            write_index(folder, self.index)  # before any other file: a run that is killed owns what it leaves
        self._by_name = {i.tensors[0]: i for i in self.index.inputs}
        self._sums: dict[int, F32] = {}
        self._files: dict[Path, Any] = {}
        self._scratch: dict[int, F32] = {}
        if self.index.inputs:
            self._restore()

    def _restore(self) -> None:
        path = sums_path(self.folder, self.index.generation)
        for i in self.index.inputs:
            if i.summed:
                n = i.sum_bytes // 4
                whole = path.exists() and path.stat().st_size >= i.offset + 4 * n
                held = np.fromfile(path, np.float32, n, offset=i.offset) if whole else np.empty(0, np.float32)
                if held.size != n or not n:
                    raise _damaged(path)
                self._sums[i.number] = held.reshape(len(i.counts), i.cols, i.cols)

    def add(self, name: str, x: F32, experts: I32 | None, n_experts: int, held: bool) -> None:
        """Inputs of a batch: x float32 (T, C), (T, 1 or U, C) with experts (T, U), or (T, H, C) of H heads.

        name: of the first matrix with that input; n_experts: 0 for a plain matrix. Raises OSError.
        """
        of = self._by_name.get(name)
        if of is None:
            of = self._new(name, x, experts, n_experts)
        elif (of.cols, len(of.counts), of.used, of.heads) != _shape(x, experts, n_experts):
            raise _damaged(_index_path(self.folder))
        if x.ndim == 3 and experts is not None and x.shape[1] > 1:  # each of a token's experts has its own
            x, experts = x.reshape(-1, x.shape[2]), experts.reshape(-1, 1)
        elif x.ndim == 3 and experts is not None:
            x = x[:, 0]
        if held:
            self._hold(of, x, experts)
        elif of.heads:
            for h in range(x.shape[1]):
                self._add(of, h, np.ascontiguousarray(x[:, h]))
                of.counts[h] += len(x)
        elif not of.summed:
            self._keep(of, x, experts)
        elif experts is None:
            self._add(of, 0, np.ascontiguousarray(x))
            of.counts[0] += len(x)
        else:
            for e in np.unique(experts).tolist():
                part = x[(experts == e).any(axis=1)]
                self._add(of, e, part)
                of.counts[e] += len(part)

    def _new(self, name: str, x: F32, experts: I32 | None, n_experts: int) -> Input:
        c, n, used, heads = _shape(x, experts, n_experts)
        taken = sum(i.sum_bytes for i in self.index.inputs)
        summed = heads or (c <= SUM_COLS and taken + 4 * c * c * n <= SUM_BYTES)
        of = Input(len(self.index.inputs), [name], c, [0] * n, summed, taken, used=used, heads=heads)
        self.index.inputs.append(of)
        self._by_name[name] = of
        if summed:
            self._sums[of.number] = np.zeros((n, c, c), np.float32)
        return of

    def _add(self, of: Input, expert: int, x: F32) -> None:
        c = of.cols
        if c not in self._scratch:
            self._scratch[c] = np.empty((c, c), np.float32)
        np.matmul(x.T, x, out=self._scratch[c])
        self._sums[of.number][expert] += self._scratch[c]

    def _keep(self, of: Input, x: F32, experts: I32 | None) -> None:
        most = EXPERT_ROWS if experts is not None else ROWS
        rows = self._spread(of.passed, len(x), most)
        of.passed += len(x)
        self._write(of, "rows", x[rows], experts if experts is None else experts[rows])
        of.rows += len(rows)
        if experts is None:
            of.counts[0] += len(x)
        else:
            for e, n in zip(*np.unique(experts, return_counts=True), strict=True):
                of.counts[int(e)] += int(n)

    def _hold(self, of: Input, x: F32, experts: I32 | None) -> None:
        if of.heads:
            return
        rows = self._spread(of.held_passed, len(x), HELD_EVERY * HELD_ROWS * (HELD_EXPERTS if of.used else 1))
        of.held_passed += len(x)
        self._write(of, "held", x[rows], experts if experts is None else experts[rows])
        of.held += len(rows)

    def _spread(self, passed: int, n: int, most: int) -> NDArray[np.int64]:
        """Which of n rows to keep so that of all tokens about `most` are kept; the same whatever the batches are."""
        step = max(1, -(-self._total // most))
        return np.arange(-passed % step, n, step)

    def _write(self, of: Input, what: str, x: F32, experts: I32 | None) -> None:
        self._file(rows_path(self.folder, of.number, what), 2 * of.cols * getattr(of, what)).write(to_bf16(x).data)
        if experts is not None:
            name = "experts" if what == "rows" else "held-experts"
            path = rows_path(self.folder, of.number, name)
            data = np.ascontiguousarray(experts, np.int32)
            self._file(path, 4 * of.used * getattr(of, what)).write(data.data)

    def _file(self, path: Path, at: int) -> Any:
        if path not in self._files:
            if at and not (path.exists() and path.stat().st_size >= at):
                raise _damaged(path)
            file = open(path, "r+b" if path.exists() else "w+b")  # closed by `checkpoint`
            file.truncate(at)  # what came after the last checkpoint goes
            file.seek(at)
            self._files[path] = file
        return self._files[path]

    def share(self, same: dict[str, str]) -> None:
        """Which matrices have an input together: name -> name under which it was added."""
        for name, leader in same.items():
            of = self._by_name.get(leader)
            if of and name not in of.tensors:
                of.tensors.append(name)

    def checkpoint(self, done: int) -> None:
        """So many windows are in and on the disk. Raises OutputError."""
        try:
            size = sum(i.sum_bytes for i in self.index.inputs)
            check_space(self.folder, size)
            before, after = self.index.generation, self.index.generation + 1
            with open(sums_path(self.folder, after), "wb") as f:
                for i in self.index.inputs:
                    if i.summed:
                        f.write(self._sums[i.number].data)
            for file in self._files.values():
                file.close()
            self._files.clear()
            self.index.done, self.index.generation = done, after
            write_index(self.folder, self.index)
            sums_path(self.folder, before).unlink(missing_ok=True)
        except OSError as e:
            raise OutputError(f"{self.folder}: {e.strerror or e}; run again to resume") from None
