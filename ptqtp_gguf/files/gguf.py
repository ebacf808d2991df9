"""GGUF in and out: a reader that trusts nothing, and a streaming writer.

The only module that imports gguf-py: its tables of type names and sizes, and its dequantizers. gguf-py's own reader
takes counts and offsets on trust and raises on our type ids, so the header is parsed here, with every count, length
and offset checked against the file before it is used (spec: ggml/docs/gguf.md; loader: ggml/src/gguf.cpp). Metadata is
kept as the raw bytes of the source, so a copy is exact.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import gguf
import numpy as np

from ..codec import F32, FORMAT_VERSION, TYPES, U8, Key, format_version, native
from ..errors import InputError
from .gguf_values import ARRAY as ARRAY
from .gguf_values import BOOL as BOOL
from .gguf_values import FLOAT32 as FLOAT32
from .gguf_values import INT32 as INT32
from .gguf_values import INT64 as INT64
from .gguf_values import SCALARS, Cursor, Truncated
from .gguf_values import STRING as STRING
from .gguf_values import UINT16 as UINT16
from .gguf_values import UINT32 as UINT32
from .gguf_values import UINT64 as UINT64
from .reading import file_size, open_regular, read_bytes

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_NAME = 63  # GGML_MAX_NAME - 1, bytes
MAX_DIMS = 4  # GGML_MAX_DIMS
MAX_WEIGHTS = 1 << 62
MAX_ROW = 1 << 26  # weights; what is read at once are whole rows
MAX_KEY = 65535  # bytes, as in the specification
MAX_KVS, MAX_TENSORS = 1 << 16, 1 << 18
MAX_METADATA = 1 << 27  # bytes; the largest vocabularies take a tenth
HEAD, MAX_HEAD = 1 << 22, 1 << 28  # bytes of a file that are read for its header: first, and at most

# type id -> (name, weights a block, bytes a block)
GGML_TYPES: dict[int, tuple[str, int, int]] = {
    **{int(t): (t.name, *gguf.GGML_QUANT_SIZES[t]) for t in gguf.GGMLQuantizationType if t in gguf.GGML_QUANT_SIZES},
    **{t.id: (t.name, t.block, t.size) for t in TYPES.values()},
}
TYPE_IDS = {name: id for id, (name, _, _) in GGML_TYPES.items()}
F32_ID, F16_ID, BF16_ID, Q4_0_ID, Q8_0_ID = (TYPE_IDS[n] for n in ("F32", "F16", "BF16", "Q4_0", "Q8_0"))
FLOAT_IDS = frozenset(TYPE_IDS[n] for n in ("F64", "F32", "F16", "BF16"))


def type_name(type_id: int) -> str:
    """ "TP2_1", "Q8_0", ..., or "type N" for an id that nobody here knows."""
    return GGML_TYPES[type_id][0] if type_id in GGML_TYPES else f"type {type_id}"


def type_block(type_id: int) -> int:
    """Weights a block of a known type."""
    return GGML_TYPES[type_id][1]


def row_size(type_id: int, n: int) -> int:
    """Bytes of a row of n weights; n must be a multiple of the type's block."""
    _, block, size = GGML_TYPES[type_id]
    assert n % block == 0
    return n // block * size


@dataclass(frozen=True)
class KV:
    """One metadata entry: its value as raw bytes without the type, the type, and what errors call the file."""

    key: str
    type: int
    raw: bytes
    where: str = field(default="", compare=False, repr=False)

    def value(self) -> object:
        """The value in Python: int, float, bool, str, or a list of them. Raises InputError: text that is not UTF-8."""
        where = f"{self.where}: " if self.where else ""
        return Cursor(memoryview(self.raw), f"{where}metadata {self.key}").value(self.type)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor. shape in ggml order: (weights a row, rows, ...). offset in bytes from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    nbytes: int

    @property
    def n_weights(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def type_name(self) -> str:
        return type_name(self.type)


@dataclass
class Header:
    """What stands before the tensor data."""

    kvs: dict[str, KV] = field(default_factory=dict)
    tensors: list[TensorInfo] = field(default_factory=list)
    alignment: int = DEFAULT_ALIGNMENT
    data_offset: int = 0


def parse_header(data: memoryview, where: str, size: int | None = None) -> Header:
    """Parse and validate a whole GGUF header. Raises InputError on anything out of order.

    data  the whole file, or at least its header; then size = the bytes of the whole file
    """
    size = len(data) if size is None else size
    c = Cursor(data, where)
    if bytes(c.take(4, "magic")) != MAGIC:
        c.pos = 0
        raise c.fail("not a GGUF file")
    version = c.number("<I", "version")
    if version >> 16 and not version & 0xFFFF:
        raise c.fail("big-endian GGUF files are not supported; convert on a little-endian machine")
    if version not in (2, 3):
        raise c.fail(f"GGUF version {version}; versions 2 and 3 are supported")
    n_tensors, n_kv = c.number("<Q", "tensor count"), c.number("<Q", "metadata count")
    if n_kv > size // 13 or n_tensors > size // 32:
        raise c.fail(f"{n_tensors} tensors and {n_kv} metadata entries do not fit into {size} bytes")
    if n_kv > MAX_KVS or n_tensors > MAX_TENSORS:
        raise c.fail(f"{n_tensors} tensors, {n_kv} metadata entries; the limits are {MAX_TENSORS} and {MAX_KVS}")

    h = Header()
    for _ in range(n_kv):
        key = _name(c, "a metadata key", MAX_KEY)
        kind = c.number("<I", f"type of {key}")
        start = c.pos
        c.skip(kind)
        if key in h.kvs:
            raise c.fail(f"metadata key {key} stands twice")
        if c.pos > MAX_METADATA:
            raise c.fail(f"metadata larger than the limit of {MAX_METADATA} bytes")
        h.kvs[key] = KV(key, kind, bytes(data[start : c.pos]), where)
    if (kv := h.kvs.get("general.alignment")) is not None:
        value = kv.value()
        if kv.type != UINT32 or not isinstance(value, int) or not 8 <= value <= MAX_ALIGNMENT or value & (value - 1):
            raise c.fail(f"general.alignment {value} is not a power of two from 8 to {MAX_ALIGNMENT}")
        h.alignment = value

    relative: list[TensorInfo] = []
    names: set[str] = set()
    for _ in range(n_tensors):
        info = _tensor_info(c, h.alignment)
        if info.name in names:
            raise c.fail(f"tensor {info.name} stands twice")
        names.add(info.name)
        relative.append(info)
    h.data_offset = align(c.pos, h.alignment)
    room = size - h.data_offset
    end, before = 0, ""
    for t in sorted(relative, key=lambda t: t.offset):
        if t.offset < end:
            raise InputError(f"{where}: tensor {t.name} overlaps {before}")
        if t.nbytes > room - t.offset:
            raise InputError(
                f"{where}: truncated: tensor {t.name} ends at byte {h.data_offset + t.offset + t.nbytes}, "
                f"the file at {size}"
            )
        end, before = t.offset + t.nbytes, t.name
    h.tensors = [TensorInfo(t.name, t.shape, t.type, h.data_offset + t.offset, t.nbytes) for t in relative]
    return h


def _name(c: Cursor, what: str, most: int) -> str:
    """A name that can be printed, of 1 to `most` bytes. llama.cpp ends at a zero byte, or aborts at an empty key."""
    start = c.pos
    n = c.number("<Q", f"length of {what}")
    c.pos = start
    if not 1 <= n <= most and n <= len(c.data) - start - 8:
        raise c.fail(f"{what} of {n} bytes; the limit is 1 to {most}")
    name = c.text(what)
    if not name.isprintable():
        raise c.fail(f"{what} holds control characters: {name!r}")
    return name


def _tensor_info(c: Cursor, alignment: int) -> TensorInfo:
    """Name, dimensions, type, and offset relative to the data section."""
    name = _name(c, "a tensor name", MAX_NAME)
    n_dims = c.number("<I", f"dimensions of {name}")
    if not 1 <= n_dims <= MAX_DIMS:
        raise c.fail(f"tensor {name} has {n_dims} dimensions; the limit is 1 to {MAX_DIMS}")
    shape = tuple(c.number("<Q", f"shape of {name}") for _ in range(n_dims))
    n = 1
    for dim in shape:
        n *= dim
        if dim == 0 or n > MAX_WEIGHTS:
            raise c.fail(f"tensor {name} has the shape {shape}")
    kind, offset = c.number("<I", f"type of {name}"), c.number("<Q", f"offset of {name}")
    if kind not in GGML_TYPES:
        raise c.fail(f"tensor {name} has the unknown type id {kind}")
    type_name_, block, size = GGML_TYPES[kind]
    if shape[0] > MAX_ROW:
        raise c.fail(f"tensor {name}: rows of {shape[0]} weights; the limit is {MAX_ROW}")
    if shape[0] % block:
        raise c.fail(f"tensor {name}: rows of {shape[0]} weights; {type_name_} needs a multiple of {block}")
    if offset % alignment:
        raise c.fail(f"tensor {name}: offset {offset} is not a multiple of the alignment {alignment}")
    return TensorInfo(name, shape, kind, offset, n // block * size)


def align(n: int, alignment: int) -> int:
    """n rounded up to a multiple of alignment."""
    return n + -n % alignment


def read_header(file: BinaryIO, where: str) -> tuple[Header, U8]:
    """The header of an open GGUF file, validated against the file's size, and the bytes that it was read from.

    Read and not mapped: where the disk cannot give a page of a mapping, the system ends the process.
    Raises InputError as parse_header, and where the file cannot be read.
    """
    if (size := file_size(file, where)) == 0:
        raise InputError(f"{where}: the file is empty")
    n = min(size, HEAD)
    while True:
        data = read_bytes(file, 0, n, f"{where}: the header")
        try:
            return parse_header(memoryview(data.data), where, size), data
        except Truncated:  # perhaps only where we have stopped to read
            if n >= min(size, MAX_HEAD):
                raise
        n = min(size, 4 * n)


class Reader:
    """A GGUF file, validated when opened, read tensor by tensor. Use as a context manager.

    Raises InputError if the file is missing, empty, truncated or hostile, or of an unknown ptqtp.format_version.
    """

    def __init__(self, path: Path, name: Path | None = None) -> None:
        """name: what errors call the file, where it is only our intermediate of something that the user knows."""
        self.path = name or path
        self._file = open_regular(path)
        try:
            self.header, _ = read_header(self._file, str(self.path))
            self.tensors = self.header.tensors
            self.by_name = {t.name: t for t in self.tensors}
            if not self.get("split.no"):  # only the first part of a split file carries the metadata
                self.check_format_version(self.tensors)
        except BaseException:
            self.close()
            raise

    def check_format_version(self, tensors: Iterable[TensorInfo]) -> None:
        """Raises InputError unless the metadata names a version that this program reads and that knows the types of
        these tensors: the file's own, or those of all parts of a split one."""
        ours = [TYPES[i] for i in sorted({t.type for t in tensors} & TYPES.keys())]
        version = self.get(Key.FORMAT_VERSION)
        if not ours and version is None:
            return
        if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
            found = "none" if version is None else version
            raise InputError(
                f"{self.path}: {Key.FORMAT_VERSION} is {found}; this version of ptqtp-gguf reads "
                f"1 to {FORMAT_VERSION}; convert the model again"
            )
        if version < (needed := format_version(ours)):
            late = next(t.name for t in ours if t.since == needed)
            raise InputError(
                f"{self.path}: {Key.FORMAT_VERSION} is {version}, but the file holds {late} tensors, which begin with "
                f"version {needed}; convert the model again"
            )

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def get(self, key: str) -> object:
        """Value of a metadata key, or None."""
        kv = self.header.kvs.get(key)
        return None if kv is None else kv.value()

    def chunks(self, t: TensorInfo, size: int) -> Iterator[U8]:
        """The tensor's bytes, read (not mapped) in arrays of `size` bytes; the last may be smaller.

        Raises InputError where the file has become shorter, or cannot be read.
        """
        for start in range(0, t.nbytes, size):
            yield self.read(t.offset + start, min(size, t.nbytes - start), f"tensor {t.name}")

    @property
    def size(self) -> int:
        """Bytes of the file. Raises InputError where the disk does not tell."""
        return file_size(self._file, str(self.path))

    def read(self, at: int, n: int, what: str) -> U8:
        """n bytes from byte `at` on, of `what`. Raises InputError where they are not there."""
        return read_bytes(self._file, at, n, f"{self.path}: {what}")

    def drop_cache(self) -> None:
        """Ask the system to read the file from the disk again, not from its cache."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def bytes_of(self, t: TensorInfo) -> U8:
        """The tensor's bytes, (rows, bytes a row). Raises InputError as chunks."""
        return self.read(t.offset, t.nbytes, f"tensor {t.name}").reshape(-1, row_size(t.type, t.shape[0]))

    def rows_f32(self, t: TensorInfo) -> F32:
        """The tensor dequantized: float32 (rows, weights a row), all outer dimensions joined."""
        return dequantize(self.bytes_of(t), t.type, f"{self.path}: tensor {t.name}")


def dequantize(data: U8, type_id: int, where: str) -> F32:
    """uint8 (R, B) of any ggml type that gguf-py decodes, or of ours -> float32 (R, C). Raises InputError otherwise."""
    if type_id in TYPES:
        return native.dequantize(TYPES[type_id], data)
    if type_id == F32_ID:
        return data.view("<f4")
    if type_id == F16_ID:
        return data.view("<f2").astype(np.float32)
    if type_id == BF16_ID:
        return (data.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    try:
        out: F32 = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(type_id)).astype(np.float32, copy=False)
    except (NotImplementedError, KeyError):
        raise InputError(f"{where}: {type_name(type_id)} cannot be dequantized here") from None
    return out


def quantize_plain(weights: F32, type_id: int) -> U8:
    """float32 (R, C) -> bytes of F32, F16, BF16 or Q8_0, by gguf-py."""
    if type_id == F32_ID:
        return np.ascontiguousarray(weights).view(np.uint8)
    out: U8 = gguf.quants.quantize(np.ascontiguousarray(weights), gguf.GGMLQuantizationType(type_id))
    return np.ascontiguousarray(out).view(np.uint8)


def tensor_names(arch: str, n_layers: int) -> dict[str, str]:
    """Hugging Face's names of an architecture's tensors -> GGUF's, without .weight and .bias; {} if it is unknown."""
    kind = next((k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), None)
    return {} if kind is None else {k: v for k, (_, v) in gguf.get_tensor_name_map(kind, n_layers).mapping.items()}


# ---- writing ----


def kv_string(key: str, value: str) -> KV:
    raw = value.encode()
    return KV(key, STRING, struct.pack("<Q", len(raw)) + raw)


def kv_scalar(key: str, kind: int, value: int | float | bool) -> KV:
    """A number or truth value of a GGUF type. Raises struct.error where the type cannot hold it."""
    return KV(key, kind, struct.pack(SCALARS[kind], value))


def kv_u32(key: str, value: int) -> KV:
    return kv_scalar(key, UINT32, value)


def kv_list(key: str, kind: int, values: list[int]) -> KV:
    code = SCALARS[kind][1]
    return KV(key, ARRAY, struct.pack(f"<IQ{len(values)}{code}", kind, len(values), *values))


def kv_u32_list(key: str, values: list[int]) -> KV:
    return kv_list(key, UINT32, values)


@dataclass(frozen=True)
class OutTensor:
    """A tensor to be written: name, shape in ggml order, type id."""

    name: str
    shape: tuple[int, ...]
    type: int

    @property
    def nbytes(self) -> int:
        return row_size(self.type, self.shape[0]) * int(np.prod(self.shape[1:], dtype=np.int64))


def build_header(kvs: Iterable[KV], tensors: list[OutTensor], alignment: int) -> bytes:
    """The header bytes, padded to the alignment; tensors follow in the given order, each padded to the alignment."""
    kvs = list(kvs)
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(kvs))]
    for kv in kvs:
        key = kv.key.encode()
        parts += [struct.pack("<Q", len(key)), key, struct.pack("<I", kv.type), kv.raw]
    offset = 0
    for t in tensors:
        name = t.name.encode()
        parts += [struct.pack("<Q", len(name)), name, struct.pack(f"<I{len(t.shape)}Q", len(t.shape), *t.shape)]
        parts.append(struct.pack("<IQ", t.type, offset))
        offset += align(t.nbytes, alignment)
    head = b"".join(parts)
    return head + bytes(-len(head) % alignment)


def write_stream(
    out: BinaryIO, kvs: Iterable[KV], tensors: list[OutTensor], alignment: int, data: Iterator[U8]
) -> Iterator[int]:
    """Write header and tensors, one tensor's bytes at a time. Yields after each tensor the bytes written so far.

    data yields each tensor's bytes, in the order of tensors.
    """
    written = out.write(build_header(kvs, tensors, alignment))
    for t, block in zip(tensors, data, strict=True):
        assert block.nbytes == t.nbytes, f"{t.name}: {block.nbytes} bytes, planned {t.nbytes}"
        raw = np.ascontiguousarray(block)
        written += out.write(raw.data)
        written += out.write(bytes(-raw.nbytes % alignment))
        yield written


def total_size(kvs: Iterable[KV], tensors: list[OutTensor], alignment: int) -> int:
    """Bytes of the whole file."""
    return len(build_header(kvs, tensors, alignment)) + sum(align(t.nbytes, alignment) for t in tensors)


def register_types() -> None:
    """Teach gguf-py our two types: an enum member and a size each, so that its reader opens our files. Idempotent."""
    kinds = gguf.GGMLQuantizationType
    for t in TYPES.values():
        if t.id not in kinds._value2member_map_:
            member = int.__new__(kinds, t.id)
            member._name_, member._value_ = t.name, t.id
            kinds._member_map_[t.name] = member
            kinds._value2member_map_[t.id] = member
            gguf.GGML_QUANT_SIZES[member] = (t.block, t.size)
