"""The reader against gguf-py's writer, the writer against gguf-py's reader, and headers made to hurt."""

from __future__ import annotations

import io
import os
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import pytest
from helpers import write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from ptqtp_gguf.codec.reference import pack
from ptqtp_gguf.codec.tensor_type import TensorType
from ptqtp_gguf.codec.tp2_1 import TP2_1
from ptqtp_gguf.codec.tp2_2 import TP2_2
from ptqtp_gguf.errors import InputError
from ptqtp_gguf.files import gguf as gguf_io
from ptqtp_gguf.files.gguf import KV, OutTensor, Reader, build_header, kv_string, kv_u32, parse_header


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_reads_what_gguf_py_writes(tmp_path: Path, kind: str, rng: np.random.Generator) -> None:
    w = rng.normal(size=(6, 64)).astype(np.float32)
    path = write_gguf(tmp_path / "a.gguf", {"blk.0.x.weight": w, "norm.weight": w[0]}, kind)
    q = gguf.GGMLQuantizationType[kind]
    expected = w if kind == "F32" else gguf.quants.dequantize(gguf.quants.quantize(w, q), q)
    with Reader(path) as reader:
        t = reader.by_name["blk.0.x.weight"]
        assert (t.shape, t.type_name) == ((64, 6), kind)
        assert np.array_equal(reader.rows_f32(t), expected)
        assert np.array_equal(reader.rows_f32(reader.by_name["norm.weight"])[0], w[0])
        assert reader.get("tokenizer.ggml.tokens") == ["<s>", "a", "\u00fc", "b"]
        assert reader.get("test.floats") == [0.5, 1.5]
        assert reader.get("test.flag") is True
        assert reader.get("absent") is None


def written(tmp_path: Path, kvs: list[KV], tensors: list[OutTensor], blocks: list[np.ndarray]) -> Path:
    path = tmp_path / "out.gguf"
    with open(path, "wb") as f:
        for _ in gguf_io.write_stream(f, kvs, tensors, 32, iter(blocks)):
            pass
    return path


def ours(tmp_path: Path, rng: np.random.Generator, version: int | None = 1, kind: TensorType = TP2_1) -> Path:
    packed = pack(kind, rng.integers(0, 9, size=(5, 64)).astype(np.uint8), np.full((5, 2), 99, np.uint8))
    kvs = [kv_string("general.architecture", "llama"), kv_string("name", "\u00fc"), kv_u32("n", 7)]
    if version is not None:
        kvs.append(kv_u32("ptqtp.format_version", version))
    tensors = [OutTensor("a", (64, 5), kind.id), OutTensor("b", (3,), gguf_io.F32_ID)]
    return written(tmp_path, kvs, tensors, [packed, np.array([1, 2, 3], np.float32).view(np.uint8)[None]])


def test_gguf_py_reads_what_we_write(tmp_path: Path, rng: np.random.Generator) -> None:
    path = ours(tmp_path, rng)
    gguf_io.register_types()
    reader = gguf.GGUFReader(path)
    assert reader.get_field("name").contents() == "\u00fc"
    assert reader.get_field("n").contents() == 7
    names = {t.name: t for t in reader.tensors}
    assert names["a"].tensor_type == TP2_1.id and names["a"].n_bytes == 5 * 2 * 14
    assert names["b"].data.tolist() == [1, 2, 3]
    with Reader(path) as mine:
        assert mine.bytes_of(mine.by_name["a"]).tobytes() == names["a"].data.tobytes()
        assert path.stat().st_size == gguf_io.total_size(
            mine.header.kvs.values(), [OutTensor(t.name, t.shape, t.type) for t in mine.tensors], 32
        )


@pytest.mark.parametrize("version", [None, 0, 3, 99])
def test_unknown_format_version_is_refused(tmp_path: Path, rng: np.random.Generator, version: int | None) -> None:
    found = "none" if version is None else version
    with pytest.raises(InputError, match=f"format_version is {found}; this version of ptqtp-gguf reads 1 to 2;"):
        Reader(ours(tmp_path, rng, version))


def test_a_version_older_than_a_type_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    """A newer one than the types need is read."""
    for version, kind in ((1, TP2_1), (2, TP2_1), (2, TP2_2)):
        with Reader(ours(tmp_path, rng, version, kind)) as reader:
            assert reader.by_name["a"].type == kind.id
    with pytest.raises(InputError, match="is 1, but the file holds TP2_2 tensors, which begin with version 2; convert"):
        Reader(ours(tmp_path, rng, 1, TP2_2))


def s(text: str | bytes) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def tensor(name: str | bytes = "t", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return s(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file(n_tensors: int = 0, n_kv: int = 0, body: bytes = b"", version: int = 3, data: bytes = b"") -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_kv) + body
    return head + bytes(-len(head) % 32) + data


U32 = struct.pack("<I", 4)


HOSTILE = {
    "no magic": (b"GGML" + bytes(60), "not a GGUF"),
    "three bytes": (b"GGU", "truncated: magic"),
    "header cut": (b"GGUF\x03\0\0\0\x01", "truncated: tensor count"),
    "version 1": (file(version=1), "version 1"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "2^63 tensors": (file(n_tensors=1 << 63), "do not fit"),
    "2^64-1 kvs": (file(n_kv=(1 << 64) - 1), "do not fit"),
    "key of 2^60 bytes": (file(n_kv=1, body=struct.pack("<Q", 1 << 60) + bytes(40)), "truncated: a metadata key"),
    "string of 2^63": (file(n_kv=1, body=s("k") + struct.pack("<IQ", 8, 1 << 63) + bytes(40)), "truncated: a string"),
    "array of 2^61": (file(n_kv=1, body=s("k") + struct.pack("<IIQ", 9, 4, 1 << 61) + bytes(40)), "does not fit"),
    "array type 77": (file(n_kv=1, body=s("k") + struct.pack("<IIQ", 9, 77, 1) + bytes(40)), "array type 77"),
    "value type 13": (file(n_kv=1, body=s("k") + struct.pack("<I", 13) + bytes(40)), "value type 13"),
    "nested arrays": (
        file(n_kv=1, body=s("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 50),
        "nested deeper",
    ),
    "key not UTF-8": (file(n_kv=1, body=s(b"\xff\xfe") + U32 + bytes(40)), "not UTF-8"),
    "key twice": (file(n_kv=2, body=(s("key-of-14-byte") + U32 + bytes(4)) * 2), "stands twice"),
    "alignment 0": (file(n_kv=1, body=s("general.alignment") + U32 + bytes(4)), "alignment 0"),
    "alignment 48": (file(n_kv=1, body=s("general.alignment") + U32 + struct.pack("<I", 48)), "alignment 48"),
    "alignment 2^31": (file(n_kv=1, body=s("general.alignment") + U32 + struct.pack("<I", 1 << 31)), "alignment"),
    "name too long": (file(1, body=tensor("n" * 64), data=bytes(128)), "name of 64 bytes"),
    "empty name": (file(1, body=tensor(""), data=bytes(128)), "name of 0 bytes"),
    "five dims": (file(1, body=tensor(shape=(2, 2, 2, 2, 2)), data=bytes(128)), "5 dimensions"),
    "no dims": (file(1, body=tensor(shape=()), data=bytes(128)), "0 dimensions"),
    "zero dim": (file(1, body=tensor(shape=(32, 0)), data=bytes(128)), r"shape \(32, 0\)"),
    "product overflows": (file(1, body=tensor(shape=(1 << 32, 1 << 32, 2)), data=bytes(128)), "shape"),
    "type 249": (file(1, body=tensor(kind=249), data=bytes(128)), "unknown type id 249"),
    "type 2^32-1": (file(1, body=tensor(kind=(1 << 32) - 1), data=bytes(128)), "unknown type id 4294967295"),
    "row not of blocks": (file(1, body=tensor(shape=(40,), kind=251), data=bytes(128)), "multiple of 32"),
    "offset misaligned": (file(1, body=tensor(offset=4), data=bytes(256)), "offset 4"),
    "offset past end": (file(1, body=tensor(offset=1 << 40), data=bytes(128)), "truncated: tensor t"),
    "offset 2^64-32": (file(1, body=tensor(offset=(1 << 64) - 32), data=bytes(128)), "truncated: tensor t"),
    "data cut": (file(1, body=tensor(), data=bytes(127)), "truncated: tensor t"),
    "overlap": (file(2, body=tensor("a", (32,)) + tensor("b", (32,), 0, 96), data=bytes(512)), "b overlaps a"),
    "name twice": (file(2, body=tensor("a") + tensor("a", offset=128), data=bytes(512)), "tensor a stands twice"),
    "tensors cut": (file(2, body=tensor("a", (8,)))[:70], "truncated: length of a tensor name"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(name: str, tmp_path: Path) -> None:
    raw, message = HOSTILE[name]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(raw)
    with pytest.raises(InputError, match=message) as e:
        Reader(path)
    assert "\n" not in str(e.value) and str(path) in str(e.value)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        Reader(tmp_path / "absent.gguf")
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(InputError, match="is empty"):
        Reader(tmp_path / "empty.gguf")


def good_file() -> bytes:
    out = io.BytesIO()
    kvs = [kv_string("general.architecture", "llama"), gguf_io.kv_u32_list("list", [1, 2, 3])]
    tensors = [OutTensor("a", (32, 2), TP2_1.id), OutTensor("b", (4, 2), gguf_io.F32_ID)]
    for _ in gguf_io.write_stream(
        out, kvs, tensors, 32, iter([np.zeros((2, 14), np.uint8), np.zeros((2, 16), np.uint8)])
    ):
        pass
    return out.getvalue()


GOOD = good_file()


@given(st.data())
@settings(max_examples=400)
def test_a_damaged_header_is_read_or_refused_but_nothing_else(data: st.DataObject) -> None:
    raw = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    for candidate in (bytes(raw), bytes(raw[:cut])):
        try:
            header = parse_header(memoryview(candidate), "fuzz")
        except InputError:
            continue
        for t in header.tensors:
            assert t.offset + t.nbytes <= len(candidate)


def test_header_is_a_pure_function_of_its_input() -> None:
    kvs = [kv_u32("b", 1), kv_u32("a", 2)]
    tensors = [OutTensor("x", (32,), 0)]
    assert build_header(kvs, tensors, 32) == build_header(kvs, tensors, 32)
    assert list(parse_header(memoryview(build_header(kvs, [], 32)), "x").kvs) == ["b", "a"]


def test_a_stock_reader_refuses_our_type() -> None:
    """gguf-py without our registration, in a process of its own: its own error names the id."""
    with tempfile.NamedTemporaryFile(suffix=".gguf") as f:
        f.write(GOOD)
        f.flush()
        done = subprocess.run(
            [sys.executable, "-c", f"import gguf; gguf.GGUFReader({f.name!r})"], capture_output=True, text=True
        )
    assert done.returncode and re.search(r"251\)? is not a valid GGMLQuantizationType", done.stderr)


@pytest.fixture
def source(tmp_path: Path, rng: np.random.Generator) -> Path:
    tensors = {f"blk.{i}.w.weight": (rng.normal(size=(64, 128)) * 0.05).astype(np.float32) for i in range(3)}
    return write_gguf(tmp_path / "source.gguf", tensors)


def test_a_file_that_is_cut_while_it_is_read(source: Path) -> None:
    """Of a mapping, the lost page would end the process by SIGBUS."""
    with Reader(source) as r:
        os.truncate(source, 100)
        with pytest.raises(InputError, match="has become shorter"):
            r.rows_f32(r.tensors[0])


def test_a_header_larger_than_the_first_read(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Reader(source) as r:
        expected = r.header
    monkeypatch.setattr("ptqtp_gguf.files.gguf.HEAD", 16)
    with Reader(source) as r:
        assert r.header == expected
    data = source.read_bytes()
    source.write_bytes(data[:200])
    with pytest.raises(InputError, match="does not fit into the file"):
        Reader(source)
