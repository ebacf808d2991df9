"""Reads what was written: structure, every word and scale, every weight, and the distance to the source.

Trit-plane tensors are decoded by native/codec/check.c, which shares no code with the packer or the codec, and their
weights compared, through a 64-bit checksum of every float's bits and place, with those that the quantizer had in mind
before it packed them. Other tensors have a checksum over their bytes, and their scales are looked at: no value may be
Inf or NaN. A file keeps the checksums in its metadata. The runtime says meanwhile whether it loads the file.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..codec import TYPES, U8, Key, dequantize, native
from ..errors import InputError
from ..files import (
    F32_ID,
    FLOAT_IDS,
    OutTensor,
    ReadAhead,
    Reader,
    TensorInfo,
    WriteBehind,
    align,
    row_size,
    system_errors,
    type_name,
)
from ..llamacpp import why_not_loadable
from ..progress import Progress, no_progress
from ..quantize import MASK, checksum, first_not_finite, methods
from ..source import GgufSource, Source, rows_together
from .loading import ask_runtime
from .tensor_error import Meter

UNRELATED = 0.5  # relative squared error: unrelated weights have 1 or more, the coarsest types about 0.3
GAP = 1 << 24  # bytes read at once between tensors, and behind the last
SAMPLE = 1 << 12  # weights of a tensor that numpy decodes too


def _spans(t: OutTensor | TensorInfo) -> Iterator[tuple[int, int]]:
    """(first byte, bytes) of pieces of whole rows, in multiples of four rows."""
    width = row_size(t.type, t.shape[0])
    step = width * rows_together(t.shape[0])
    for start in range(0, t.nbytes, step):
        yield start, min(step, t.nbytes - start)


class Checker:
    """Takes the pieces of one tensor in order; tells what is wrong with them."""

    def __init__(self, t: OutTensor | TensorInfo, threads: int = 0) -> None:
        self.t, self.threads = t, threads
        self.kind = TYPES.get(t.type)
        self.width = row_size(t.type, t.shape[0])
        self.hash = 0
        self.fault: str | None = None

    def take(self, data: U8, start: int) -> None:
        """data: bytes from byte `start` of the tensor on."""
        if self.kind is None:
            self.hash += checksum(data, start, self.threads)
            if self.fault is None and (at := first_not_finite(self.t.type, data)) >= 0:
                row, column = divmod(at + start // self.width * self.t.shape[0], self.t.shape[0])
                self.fault = f"holds values that are not finite, the first at row {row}, column {column}"
            return
        rows = data.reshape(-1, self.width)
        bad, found = native.check(self.kind, rows, start // self.width * self.t.shape[0], self.threads)
        self.hash += found
        if bad is not None and self.fault is None:
            self.fault = f"block {start // self.kind.size + bad} holds a word or scale that no packer writes"
        elif start == 0:
            few = rows[: max(1, SAMPLE // self.t.shape[0])]
            if not np.array_equal(dequantize(self.kind, few), native.dequantize(self.kind, few)):
                self.fault = "two decoders do not agree; the program is at fault, please report it"

    def verdict(self, expected: int | None) -> str | None:
        """What is wrong, in words, or None."""
        if self.fault is None and expected is not None and self.hash & MASK != expected:
            return "reads back differently than it was written"
        return self.fault


def intact(fd: int, at: int, t: OutTensor, expected: int) -> bool:
    """Whether the tensor at byte `at` of an unfinished file is what its checksum says."""
    checker = Checker(t)
    for start, size in _spans(t):
        data = np.frombuffer(os.pread(fd, size, at + start), np.uint8)
        if data.size != size:
            return False
        checker.take(data, start)
    return checker.verdict(expected) is None


@dataclass
class Read:
    """A piece of a file: tensor number (-1 = between tensors), first byte in it, bytes."""

    tensor: int
    start: int
    data: U8


def _read_all(reader: Reader, order: list[TensorInfo]) -> Generator[Read, None, None]:
    """The whole file, every byte in order."""
    at = 0
    for i, t in enumerate(order):
        for start in range(at, t.offset, GAP):  # a sparse file may have gaps of any size
            yield Read(-1, start, reader.read(start, min(GAP, t.offset - start), "between tensors"))
        for start, n in _spans(t):
            yield Read(i, start, reader.read(t.offset + start, n, f"tensor {t.name}"))
        at = t.offset + t.nbytes
    for start in range(at, size := reader.size, GAP):
        yield Read(-1, start, reader.read(start, min(GAP, size - start), "behind the tensors"))


@dataclass
class FileCheck:
    """What reading a whole file gave."""

    sha256: str
    faults: list[str] = field(default_factory=list)


def check_file(reader: Reader, hashes: dict[str, int], progress: Progress = no_progress, threads: int = 0) -> FileCheck:
    """Read a GGUF from the disk, byte by byte. hashes: expected checksum of tensors, by name.

    Raises InputError where the disk cannot be read.
    """
    faults: list[str] = []
    sha = hashlib.sha256()
    reader.drop_cache()
    order = sorted(reader.tensors, key=lambda t: t.offset)
    end = max((t.offset + align(t.nbytes, reader.header.alignment) for t in order), default=reader.size)
    if hashes and reader.size != end:
        faults.append(f"the file has {reader.size} bytes; its tensors end at {end}")
    total, done = sum(t.n_weights for t in order), 0
    checker: Checker | None = None
    with ReadAhead(_read_all(reader, order)) as pieces, WriteBehind() as hashing:
        for piece in pieces:
            hashing.put(functools.partial(sha.update, piece.data.data))
            if piece.tensor < 0:
                if checker and piece.data.any():
                    faults.append(f"bytes behind tensor {checker.t.name} are not zero")
                continue
            t = order[piece.tensor]
            if piece.start == 0:
                checker = Checker(t, threads)
                progress("verifying", done, total, t.name)
            assert checker
            checker.take(piece.data, piece.start)
            if piece.start + piece.data.size == t.nbytes:
                done += t.n_weights
                if verdict := checker.verdict(hashes.get(t.name)):
                    faults.append(f"tensor {t.name}: {verdict}")
    progress("verifying", total, total, "")
    return FileCheck(sha.hexdigest(), faults)


# ---- any time later ----


@dataclass
class TensorError:
    """Distance of one tensor to its source: sum of squared differences over the source's sum of squares."""

    name: str
    type: str
    rel_mse: float


@dataclass
class Verdict:
    """What `verify` found. sha256 by file name; notes: what could not be tried."""

    path: Path
    sha256: dict[str, str]
    tensors: int
    planes: int
    checksums: bool
    faults: list[str]
    errors: list[TensorError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not self.faults


def verify(path: Path, against: Source | None = None, progress: Progress = no_progress, threads: int = 0) -> Verdict:
    """Check a GGUF file, or all the parts of a split one: structure, offsets, padding, words, scales, checksums, and
    whether the runtime loads it.

    against: the source that it was made from, or any other version of the same model, to measure every tensor's error.
    What was kept must be equal; of a tuned file, norms and biases may differ.
    Raises InputError where a header is damaged or a part is missing; other findings are faults of the verdict.
    """
    with system_errors(path, InputError), GgufSource(path) as mine, ThreadPoolExecutor(1) as runtime:
        asked = runtime.submit(ask_runtime, mine.kvs, functools.partial(why_not_loadable, mine.readers[0].path))
        found = mine.get(Key.TENSOR_HASHES)
        names = [t.name for t in mine.tensors]
        planes = sum(t.type in TYPES for t in mine.tensors)
        verdict = Verdict(path, {}, len(names), planes, isinstance(found, list), [])
        hashes: dict[str, int] = {}
        if isinstance(found, list) and len(found) == len(names):
            hashes = dict(zip(names, found, strict=True))
        elif isinstance(found, list):
            verdict.faults.append(f"{len(found)} checksums for {len(names)} tensors")
        for reader in mine.readers:
            name = reader.path.name
            checked = check_file(reader, hashes, progress, threads)
            verdict.sha256[name] = checked.sha256
            verdict.faults += [f if len(mine.readers) == 1 else f"{name}: {f}" for f in checked.faults]
        if why := asked.result().why:
            verdict.faults.append(f"the runtime cannot load this file: {why}")
        elif note := asked.result().note:
            verdict.notes.append(note)
        if against is not None:
            with Meter(threads) as meter:
                _compare(mine, against, verdict, meter, progress)
    return verdict


def _compare(mine: Source, source: Source, verdict: Verdict, meter: Meter, progress: Progress) -> None:
    theirs = {t.name: t for t in source.tensors}
    method = methods.METHODS.get(str(mine.get(Key.METHOD)))
    trained = method is not None and method.trains_vectors
    total, done = sum(t.n_weights for t in mine.tensors), 0
    held = {t.name for t in mine.tensors}
    verdict.faults += [f"tensor {name} of {source.path} is missing" for name in theirs if name not in held]
    for t in mine.tensors:
        progress("comparing", done, total, t.name)
        done += t.n_weights
        other = theirs.get(t.name)
        if other is None or other.shape != t.shape:
            what = "is not in" if other is None else f"has the shape {t.shape}, not {other.shape} as in"
            verdict.faults.append(f"tensor {t.name} {what} {source.path}")
            continue
        error = meter.distance(mine, t, source, other).rel_mse
        verdict.errors.append(TensorError(t.name, type_name(t.type), error))
        if not error <= UNRELATED:
            verdict.faults.append(f"tensor {t.name}: relative squared error {error:.3g}; these are other weights")
        elif trained and t.type == F32_ID and len(t.shape) == 1:
            continue  # tuning moves norms and biases; their distance is in the list
        elif t.type == other.type and t.type in FLOAT_IDS and error > 0:
            verdict.faults.append(f"tensor {t.name}: kept as {type_name(t.type)}, yet it differs from {source.path}")
    progress("comparing", total, total, "")
