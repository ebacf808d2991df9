"""Checkpoint or GGUF in, trit-plane GGUF out: check -> plan -> stream -> verify -> rename."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from . import __version__, checkpoint, native
from . import format as fmt
from . import quantize as methods
from .errors import InputError, OutputError, QuantizeError, RecipeError
from .gguf_io import (
    FLOAT_IDS,
    KV,
    OutTensor,
    Reader,
    TensorInfo,
    dequantize,
    kv_string,
    kv_u32,
    kv_u32_list,
    quantize_plain,
    total_size,
    type_name,
    write_stream,
)
from .output import check_space, check_target, partial_file, scratch_path
from .packing import U8
from .recipe import Choice, Role, block_type, choose, default_rules, fall_back, role_of

# stage, weights done, weights in all, what is being worked on
Progress = Callable[[str, int, int, str], None]

CHUNK = 1 << 22  # weights looked at together in the first pass
MOSTLY_BELOW = 0.5  # share of groups below the scales' range from which a tensor falls back


def no_progress(stage: str, done: int, total: int, detail: str) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Options:
    """How to convert. threads 0 = all cores."""

    method: str = "search"
    type: str = "TP2_1"
    threads: int = 0
    force: bool = False
    keep_bf16: Path | None = None
    use_reference: bool = False


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


@dataclass
class Summary:
    """What was written."""

    path: Path
    size: int
    seconds: float
    rows: list[PlanRow] = field(default_factory=list)
    source_types: dict[str, int] = field(default_factory=dict)

    @property
    def n_weights(self) -> int:
        return sum(r.tensor.n_weights for r in self.rows)

    @property
    def bpw(self) -> float:
        """Bits per weight of the whole file, metadata counted."""
        return 8 * self.size / self.n_weights

    def weights_by_type(self) -> dict[str, int]:
        """Weights in each target type."""
        count: Counter[str] = Counter()
        for r in self.rows:
            count[type_name(r.choice.type)] += r.tensor.n_weights
        return dict(count)

    @property
    def fallbacks(self) -> list[PlanRow]:
        return [r for r in self.rows if r.choice.fallback]


def convert(source: Path, out: Path, options: Options | None = None, progress: Progress = no_progress) -> Summary:
    """Convert a Hugging Face folder or a GGUF file to a trit-plane GGUF.

    source    folder with config.json and safetensors, or a GGUF of any ggml type
    out       the file to write; appears complete and verified, or not at all
    progress  called often; see Progress
    Raises a subclass of PtqtpError for anything that the caller can mend.
    """
    options = options or Options()
    methods.require(methods.find(options.method), block_type(options.type))
    started = time.monotonic()
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
    with ExitStack() as stack:
        if checkpoint.is_gguf(source):
            check_target(out, source, options.force)
            path = source
        elif source.is_dir():
            check_target(out, source, options.force)
            if options.keep_bf16:
                check_target(options.keep_bf16, source, options.force)
                if options.keep_bf16.resolve() == out.resolve():
                    raise OutputError(f"{out}: is also the name to keep the bf16 GGUF under; give it one of its own")
            path = options.keep_bf16 or stack.enter_context(scratch_path(out, ".bf16.gguf"))
            _make_bf16(source, path, progress)
        else:
            raise InputError(f"{source}: neither a GGUF file nor a checkpoint folder with config.json")
        with Reader(path, source) as reader:
            summary = _transcode(reader, out, options, progress)
    summary.seconds = time.monotonic() - started
    return summary


def _make_bf16(source: Path, bf16: Path, progress: Progress) -> None:
    found = checkpoint.check(source)
    check_space(bf16.parent, found.nbytes + found.nbytes // 3)
    progress("converter", 0, 0, found.architecture)
    with scratch_path(bf16, ".work") as work:
        for line in checkpoint.to_bf16_gguf(found, work):
            progress("converter", 0, 0, line)
        work.replace(bf16)


def plan(reader: Reader, options: Options, progress: Progress = no_progress) -> list[PlanRow]:
    """Decide on every tensor, and look at every weight once: NaN, Inf, out of reach, below the scales' range.

    Raises InputError for a value that is not finite, RecipeError if no tensor would become a trit-plane tensor.
    """
    split = reader.get("split.count")
    if isinstance(split, int) and split > 1:
        raise InputError(f"{reader.path}: one of {split} parts of a split GGUF; merge them first with llama-gguf-split")
    rules = default_rules(block_type(options.type))
    rows = [PlanRow(t, choose(t, rules), role_of(t.name)) for t in reader.tensors]
    total, done = sum(r.tensor.n_weights for r in rows), 0
    for row in rows:
        t = row.tensor
        progress("checking", done, total, t.name)
        if t.type in FLOAT_IDS or row.choice.type != t.type:
            why = _examine(reader, t, fmt.TYPES.get(row.choice.type))
            if why:
                row.choice = fall_back(t, why)
        done += t.n_weights
    progress("checking", total, total, "")
    if not any(r.choice.type in fmt.TYPES for r in rows):
        first = next((r for r in rows if r.role is Role.BLOCK and r.choice.fallback), None)
        why = f"; {first.tensor.name}: {first.choice.reason}" if first else ""
        raise RecipeError(f"{reader.path}: no tensor takes {options.type.upper()}{why}")
    return rows


def _examine(reader: Reader, t: TensorInfo, target: fmt.TensorType | None) -> str | None:
    """Check the values of one tensor; the reason to fall back from target, or None."""
    largest = 0.0
    groups = below = 0
    per_chunk = max(1, CHUNK // t.shape[0])
    data = reader.bytes_of(t)
    for first in range(0, len(data), per_chunk):
        w = dequantize(data[first : first + per_chunk], t.type, f"{reader.path}: tensor {t.name}")
        bad = ~np.isfinite(w)
        if bad.any():
            row, col = (int(i) for i in np.argwhere(bad)[0])
            raise InputError(
                f"{reader.path}: tensor {t.name} holds {w[row, col]} at row {first + row}, column {col}; "
                "the checkpoint is damaged"
            )
        if target is None:
            continue
        tops = np.abs(w).reshape(-1, target.group).max(axis=1)
        largest = max(largest, float(tops.max()))
        groups += int((tops > 0).sum())
        below += int(((tops > 0) & (tops < fmt.MAX_LEVEL * fmt.SMALLEST_SCALE)).sum())
    if target is None:
        return None
    if largest > target.reach:
        return f"largest weight {largest:.4g}; {target.name} reaches {target.reach:.4g}"
    if groups and below > MOSTLY_BELOW * groups:
        return f"{below} of {groups} groups lie below the range of the scales of {target.name}"
    return None


def _transcode(reader: Reader, out: Path, options: Options, progress: Progress) -> Summary:
    rows = plan(reader, options, progress)
    kvs = _metadata(reader, rows, options)
    digests: list[bytes] = []
    blocks = _blocks(reader, rows, options, progress, digests)
    size = write_verified(
        out, kvs, [r.out for r in rows], reader.header.alignment, blocks,
        lambda path: _verify(path, out, rows, digests, progress),
    )  # fmt: skip
    source_types = Counter(r.tensor.type_name for r in rows if r.role is Role.BLOCK)
    return Summary(out, size, 0.0, rows, dict(source_types))


def _blocks(
    reader: Reader, rows: list[PlanRow], options: Options, progress: Progress, digests: list[bytes]
) -> Iterator[U8]:
    """Each tensor's bytes in its target type, in order; appends their digests."""
    total, done = sum(r.tensor.n_weights for r in rows), 0
    for row in rows:
        progress("quantizing", done, total, row.tensor.name)
        block = _encode(reader, row, options)
        digests.append(_digest(block))
        yield block
        done += row.tensor.n_weights
    progress("quantizing", total, total, "")


def _digest(data: U8) -> bytes:
    return hashlib.blake2b(data.data, digest_size=16).digest()


def _encode(reader: Reader, row: PlanRow, options: Options) -> U8:
    t, target = row.tensor, row.choice.type
    if target == t.type:
        return reader.bytes_of(t)
    w = reader.rows_f32(t)
    if target not in fmt.TYPES:
        return quantize_plain(w, target)
    # experts are 3-D: one matrix at a time, as the method means it
    matrices = w.reshape(-1, t.shape[1], t.shape[0])
    method, kind = methods.find(options.method), fmt.TYPES[target]
    parts = []
    error = power = 0.0
    for matrix in matrices:
        try:
            packed = methods.quantize(
                kind, method, matrix, threads=options.threads, use_reference=options.use_reference
            )
        except QuantizeError as e:
            raise QuantizeError(f"tensor {t.name}: {e}") from None
        delta = native.dequantize(kind, packed)
        delta -= matrix
        error += float(np.vdot(delta, delta))
        power += float(np.vdot(matrix, matrix))
        parts.append(packed)
    row.rel_mse = error / power if power else 0.0
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _metadata(reader: Reader, rows: list[PlanRow], options: Options) -> list[KV]:
    """The source's metadata in its order, with ours put in."""
    used = sorted({r.choice.type for r in rows if r.choice.type in fmt.TYPES})
    source_types = Counter(r.tensor.type_name for r in rows if r.choice.type in fmt.TYPES)
    ours = [
        kv_u32("general.file_type", fmt.FILE_TYPE[options.type.upper()]),
        kv_u32("general.quantization_version", 2),
        kv_u32(fmt.Key.FORMAT_VERSION, fmt.FORMAT_VERSION),
        kv_u32_list(fmt.Key.TYPE_IDS, used),
        kv_u32_list(fmt.Key.GROUP_SIZE, [fmt.TYPES[i].group for i in used]),
        kv_string(fmt.Key.METHOD, options.method),
        kv_string(fmt.Key.VERSION, __version__),
        kv_string(fmt.Key.RECIPE, "default"),
        kv_string(fmt.Key.CALIBRATION, "none"),
        kv_string(fmt.Key.SOURCE_TYPE, source_types.most_common(1)[0][0]),
    ]
    new = {kv.key: kv for kv in ours}
    kept = [new.pop(kv.key, kv) for kv in reader.header.kvs.values()]
    return kept + list(new.values())


def write_verified(
    out: Path,
    kvs: list[KV],
    tensors: list[OutTensor],
    alignment: int,
    data: Iterator[U8],
    verify: Callable[[Path], None],
) -> int:
    """Write a whole GGUF beside `out`, check its size, let `verify` read it back, and only then give it its name.

    Returns its bytes. verify raises OutputError where the file at the path it is given is not what it should be.
    """
    size = total_size(kvs, tensors, alignment)
    check_space(out.parent, size)
    with partial_file(out) as partial:
        for _ in write_stream(partial.file, kvs, tensors, alignment, data):
            pass
        partial.sync()
        written = partial.path.stat().st_size
        if written != size:
            raise OutputError(f"{out}: {written} bytes were written instead of {size}; try again")
        verify(partial.path)
        partial.publish()
    return size


def _verify(path: Path, out: Path, rows: list[PlanRow], digests: list[bytes], progress: Progress) -> None:
    """Read the written file back: structure, every tensor's bytes, every trit-plane block."""
    total, done = sum(r.tensor.n_weights for r in rows), 0
    with Reader(path) as written:
        for row, digest in zip(rows, digests, strict=True):
            progress("verifying", done, total, row.tensor.name)
            t = written.by_name[row.tensor.name]
            data = written.bytes_of(t)
            kind = fmt.TYPES.get(t.type)
            same = _digest(data) == digest
            if not same or (kind and native.first_bad_block(kind, data) is not None):
                raise OutputError(
                    f"{out}: tensor {t.name} reads back differently than it was written; is the disk sound?"
                )
            done += t.n_weights
    progress("verifying", total, total, "")
