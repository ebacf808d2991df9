"""The lossless Q4_0 twin of a TP2_1 or TP2_2 file, for every runtime that is not patched.

A group of 32 is exactly a Q4_0 block: the same scale in fp16 (five significant bits, down to 2^-15: exact, some as
subnormals), code = 8 + level, level being -6 .. 6. Layout of a Q4_0 block: fp16 d, then 16 bytes; byte j holds element
j in its low and element j + 16 in its high nibble (ggml/src/ggml-common.h, block_q4_0).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..codec import TYPES, U8, Key, TensorType, scale_to_float, unpack
from ..errors import InputError, OutputError
from ..files import (
    KV,
    Q4_0_ID,
    OutTensor,
    Reader,
    TensorInfo,
    check_target,
    kv_string,
    kv_u32,
    system_errors,
    write_verified,
)
from ..inspect import ask_runtime
from ..llamacpp import why_header_not_loadable
from ..plan import Choice, role_of
from ..plan import PlanRow as Row
from ..progress import Progress, no_progress
from .summary import Summary

FILE_TYPE_Q4_0 = 2  # LLAMA_FTYPE_MOSTLY_Q4_0
_TYPES = " or ".join(t.name for t in TYPES.values() if t.q4_0_twin)


def to_q4_0(t: TensorType, data: U8) -> U8:
    """Rows of a type with a Q4_0 twin, uint8 (R, B) -> Q4_0 rows uint8 (R, C/32*18) with equal dequantized weights."""
    digits, scales = unpack(t, data)
    assert t.to_levels
    codes = (t.to_levels(digits) + 8).astype(np.uint8).reshape(-1, 32)
    out = np.empty((len(codes), 18), np.uint8)
    out[:, :2] = scale_to_float(scales.astype(np.uint8).reshape(-1)).astype("<f2").view(np.uint8).reshape(-1, 2)
    out[:, 2:] = codes[:, :16] | codes[:, 16:] << 4
    return out.reshape(len(data), -1)


def export_q4_0(source: Path, out: Path, *, force: bool = False, progress: Progress = no_progress) -> Summary:
    """Write the Q4_0 twin of a file. Raises InputError if it has tensors of one of our types that has no twin, or none
    of one that has, and where the runtime does not load such a file."""
    started = time.monotonic()
    with system_errors(out), Reader(source) as reader:
        check_target(out, source, force)
        ours = [(t.name, TYPES[t.type]) for t in reader.tensors if t.type in TYPES]
        if free := next(((name, kind) for name, kind in ours if not kind.q4_0_twin), None):
            raise InputError(f"{source}: tensor {free[0]} is {free[1].name}; its free scales have no exact Q4_0 twin")
        if not ours:
            raise InputError(f"{source}: no {_TYPES} tensor in it; nothing to export")
        rows = [_row(t) for t in reader.tensors]
        kvs = _metadata(reader)
        tensors = [r.out for r in rows]
        alignment = reader.header.alignment
        ask = functools.partial(why_header_not_loadable, kvs, tensors, alignment)
        if why := ask_runtime(reader.header.kvs, ask).why:
            raise InputError(f"{source}: the runtime cannot load this file, nor its twin: {why}")
        blocks = _blocks(reader, rows, progress)
        size = write_verified(
            out,
            kvs,
            tensors,
            alignment,
            blocks,
            lambda path: _verify(reader, path, out, tensors, progress),
            force,
        )
    seconds = time.monotonic() - started
    return Summary(path=out, size=size, seconds=seconds, rows=rows, source_types={kind.name: 1 for _, kind in ours})


def _row(t: TensorInfo) -> Row:
    twin = TYPES.get(t.type)
    choice = Choice(Q4_0_ID if twin else t.type, f"exact twin of {twin.name}" if twin else "as it was")
    return Row(t, choice, role_of(t.name))


def _metadata(reader: Reader) -> list[KV]:
    drop = {Key.FORMAT_VERSION, Key.TYPE_IDS, Key.GROUP_SIZE, Key.TENSOR_HASHES}
    new = {"general.file_type": kv_u32("general.file_type", FILE_TYPE_Q4_0)}
    kept = [new.pop(kv.key, kv) for kv in reader.header.kvs.values() if kv.key not in drop]
    names = " and ".join(sorted({TYPES[t.type].name for t in reader.tensors if t.type in TYPES}))
    return [*kept, *new.values(), kv_string("ptqtp.export", f"Q4_0 twin of {names}, equal weights")]


def _blocks(reader: Reader, rows: list[Row], progress: Progress) -> Iterator[U8]:
    total, done = sum(r.tensor.n_weights for r in rows), 0
    for row in rows:
        progress("exporting", done, total, row.tensor.name)
        data = reader.bytes_of(row.tensor)
        kind = TYPES.get(row.tensor.type)
        yield to_q4_0(kind, data) if kind else data
        done += row.tensor.n_weights
    progress("exporting", total, total, "")


def _verify(reader: Reader, path: Path, out: Path, tensors: list[OutTensor], progress: Progress) -> None:
    """Every weight of the twin, dequantized by gguf-py, equals ours bit for bit."""
    with Reader(path) as twin:
        for i, t in enumerate(tensors):
            progress("verifying", i, len(tensors), t.name)
            a, b = reader.by_name[t.name], twin.by_name[t.name]
            same = (
                np.array_equal(reader.bytes_of(a), twin.bytes_of(b))
                if a.type == b.type
                else np.array_equal(reader.rows_f32(a), twin.rows_f32(b))
            )
            if not same:
                raise OutputError(f"{out}: tensor {t.name} of the twin differs; is the disk sound?")
    progress("verifying", len(tensors), len(tensors), "")
