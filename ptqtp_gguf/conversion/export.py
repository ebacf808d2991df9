"""The lossless Q4_0 twin of a TP2_1 file, for every runtime that is not patched.

A TP2_1 group of 32 is exactly a Q4_0 block: the same scale in fp16 (five significant bits, down to 2^-15: exact, some
as subnormals), code = 8 + level. Layout of a Q4_0 block: fp16 d, then 16 bytes; byte j holds element j in its low and
element j + 16 in its high nibble (ggml/src/ggml-common.h, block_q4_0).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..codec import types as fmt
from ..codec.arrays import U8
from ..codec.reference import LEVEL_OF_DIGIT, scale_to_float, unpack_tp2_1
from ..errors import InputError, OutputError
from ..files.gguf import KV, Q4_0_ID, OutTensor, Reader, TensorInfo, kv_string, kv_u32
from ..files.writing import check_target, system_errors, write_verified
from ..plan.recipe import Choice
from ..plan.roles import role_of
from ..plan.rows import PlanRow as Row
from ..progress import Progress, no_progress
from .summary import Summary

FILE_TYPE_Q4_0 = 2  # LLAMA_FTYPE_MOSTLY_Q4_0
_CODE_OF_DIGIT = (LEVEL_OF_DIGIT + 8).astype(np.uint8)


def to_q4_0(data: U8) -> U8:
    """TP2_1 rows uint8 (R, C/32*14) -> Q4_0 rows uint8 (R, C/32*18) with equal dequantized weights."""
    digits, scales = unpack_tp2_1(data)
    codes = _CODE_OF_DIGIT[digits].reshape(-1, 32)
    out = np.empty((len(codes), 18), np.uint8)
    out[:, :2] = scale_to_float(scales.reshape(-1)).astype("<f2").view(np.uint8).reshape(-1, 2)
    out[:, 2:] = codes[:, :16] | codes[:, 16:] << 4
    return out.reshape(len(data), -1)


def export_q4_0(source: Path, out: Path, *, force: bool = False, progress: Progress = no_progress) -> Summary:
    """Write the Q4_0 twin of a TP2_1 file. Raises InputError if the file has TP2_0 tensors, or no TP2_1 tensor."""
    started = time.monotonic()
    with system_errors(out), Reader(source) as reader:
        check_target(out, source, force)
        free = next((t.name for t in reader.tensors if t.type == fmt.TP2_0.id), None)
        if free:
            raise InputError(f"{source}: tensor {free} is TP2_0; its free scales have no exact Q4_0 twin")
        if not any(t.type == fmt.TP2_1.id for t in reader.tensors):
            raise InputError(f"{source}: no TP2_1 tensor in it; nothing to export")
        rows = [_row(t) for t in reader.tensors]
        kvs = _metadata(reader)
        tensors = [r.out for r in rows]
        blocks = _blocks(reader, rows, progress)
        size = write_verified(
            out,
            kvs,
            tensors,
            reader.header.alignment,
            blocks,
            lambda path: _verify(reader, path, out, tensors, progress),
            force,
        )
    return Summary(out, size, time.monotonic() - started, rows, {"TP2_1": 1})


def _row(t: TensorInfo) -> Row:
    twin = t.type == fmt.TP2_1.id
    choice = Choice(Q4_0_ID if twin else t.type, "exact twin of TP2_1" if twin else "as it was")
    return Row(t, choice, role_of(t.name))


def _metadata(reader: Reader) -> list[KV]:
    drop = {fmt.Key.FORMAT_VERSION, fmt.Key.TYPE_IDS, fmt.Key.GROUP_SIZE, fmt.Key.TENSOR_HASHES}
    new = {"general.file_type": kv_u32("general.file_type", FILE_TYPE_Q4_0)}
    kept = [new.pop(kv.key, kv) for kv in reader.header.kvs.values() if kv.key not in drop]
    return [*kept, *new.values(), kv_string("ptqtp.export", "Q4_0 twin of TP2_1, equal weights")]


def _blocks(reader: Reader, rows: list[Row], progress: Progress) -> Iterator[U8]:
    total, done = sum(r.tensor.n_weights for r in rows), 0
    for row in rows:
        progress("exporting", done, total, row.tensor.name)
        data = reader.bytes_of(row.tensor)
        yield to_q4_0(data) if row.tensor.type == fmt.TP2_1.id else data
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
