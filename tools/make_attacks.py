"""Writes tests/attacks/: small files that try something, and what each tries. tests/system/test_attacks.py reads them.

    python tools/make_attacks.py [FOLDER]

No library would write them: every byte is put here by hand. FILES: name -> (what it tries, its reader, bytes).
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import sys
import zipfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "attacks"
TP2_0, TP2_1 = 250, 251


def text(raw: str | bytes) -> bytes:
    raw = raw if isinstance(raw, bytes) else raw.encode()
    return struct.pack("<Q", len(raw)) + raw


def kv(key: str | bytes, kind: int, raw: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + raw


def u32(key: str, value: int) -> bytes:
    return kv(key, 4, struct.pack("<I", value))


def array(kind: int, n: int, raw: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, n) + raw


def tensor(name: str | bytes = "t", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf(
    kvs: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = b"",
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    kvs, tensors = kvs or [], tensors or []
    counts = counts or (len(tensors), len(kvs))
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join([*kvs, *tensors])
    return head + bytes(-len(head) % 32) + data


def safetensors(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def torch_bin(pickle: bytes, *members: tuple[str, bytes], packed: bool = False) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
        for name, raw in [("archive/data.pkl", pickle), *members]:
            archive.writestr(zipfile.ZipInfo(name), raw, zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED)
    return out.getvalue()


def storage(count: int, key: bytes = b"0") -> bytes:
    """Pickle: the storage of `count` floats."""
    return (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX"
        + struct.pack("<I", len(key))
        + key
        + b"X\x03\x00\x00\x00cpuK"
        + bytes([count])
        + b"tQ"
    )


def bin_of(rebuilt: bytes) -> bytes:
    """Pickle: {"a": rebuilt}."""
    return b"\x80\x02}X\x01\x00\x00\x00a" + rebuilt + b"s."


def rebuild(offset: bytes, size: bytes, stride: bytes, count: int = 2) -> bytes:
    call = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return call + storage(count) + offset + size + stride + b"\x89ccollections\nOrderedDict\n)RtR"


def dat(*entries: tuple[bytes, int, int, bytes], n: int | None = None, tail: bytes = b"") -> bytes:
    """A legacy imatrix: (name, calls, values claimed, values)."""
    out = struct.pack("<i", len(entries) if n is None else n)
    for name, calls, claimed, values in entries:
        out += struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, claimed) + values
    return out + tail


def imatrix(*tensors: bytes, chunks: bytes = u32("imatrix.chunk_count", 1), data: bytes = bytes(256)) -> bytes:
    return gguf([kv("general.type", 8, text("imatrix")), chunks], list(tensors), data)


def recipe(pattern: str, **more: object) -> bytes:
    rule = {"pattern": pattern, "type": "keep", "reason": "r", **more}
    return json.dumps({"name": "n", "description": "d", "rules": [rule]}).encode()


def journal(*records: object) -> bytes:
    return b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in records)


VERSION = u32("ptqtp.format_version", 1)
ARCH = kv("general.architecture", 8, text("llama"))
F32S = bytes(128)
ROW = {"tensor": 0, "type": TP2_1, "nbytes": 14, "hash": 1, "source": 2, "error": 0.0, "power": 1.0, "why": None}
JOB = {"job": {"options": {}}}

GGUF = {
    "no-magic": ("is no GGUF", b"GGML" + bytes(60)),
    "magic-only": ("ends behind the magic", b"GGUF"),
    "version-1": ("a version with 32-bit counts", gguf(version=1)),
    "version-77": ("a version of the future", gguf(version=77)),
    "big-endian": ("numbers of the other byte order", b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(32)),
    "tensors-2e63": ("2^63 tensors: allocation, or a negative count", gguf(counts=(1 << 63, 0))),
    "kvs-max": ("2^64-1 metadata entries", gguf(counts=(0, (1 << 64) - 1))),
    "key-2e60": ("a key of 2^60 bytes", gguf(counts=(0, 1), data=struct.pack("<Q", 1 << 60) + bytes(64))),
    "key-empty": ("an empty key, at which llama.cpp aborts", gguf([kv("", 4, bytes(4))])),
    "key-zero-byte": ("a key that ends earlier for C", gguf([kv("a\0b", 4, bytes(4))])),
    "key-escape": ("a key that sets the terminal's title", gguf([kv("\x1b]0;owned\x07", 4, bytes(4))])),
    "key-not-utf8": ("a key that is no text", gguf([kv(b"\xff\xfe", 4, bytes(4))])),
    "key-twice": ("which of two values counts?", gguf([u32("some.longer.key", 1), u32("some.longer.key", 2)])),
    "string-2e63": ("a string of 2^63 bytes", gguf([kv("k", 8, struct.pack("<Q", 1 << 63) + bytes(40))])),
    "string-cut": ("a string that ends behind the file", gguf([kv("k", 8, struct.pack("<Q", 4096) + bytes(40))])),
    "array-2e61": ("2^61 numbers, whose bytes overflow", gguf([kv("k", 9, array(4, 1 << 61, bytes(40)))])),
    "array-of-strings-2e61": ("2^61 strings", gguf([kv("k", 9, array(8, 1 << 61, bytes(40)))])),
    "array-type-77": ("an array of an unknown type", gguf([kv("k", 9, array(77, 1, bytes(40)))])),
    "array-in-array": ("arrays 50 deep: recursion", gguf([kv("k", 9, array(9, 1) * 50)])),
    "value-type-13": ("a value of an unknown type", gguf([kv("k", 13, bytes(40))])),
    "alignment-0": ("division by zero", gguf([u32("general.alignment", 0)])),
    "alignment-48": ("an alignment that is no power of two", gguf([u32("general.alignment", 48)])),
    "alignment-2e31": ("padding of two gigabytes", gguf([u32("general.alignment", 1 << 31)])),
    "alignment-text": ("an alignment that is text", gguf([kv("general.alignment", 8, text("32"))])),
    "name-64": ("a name as long as ggml's buffer", gguf([], [tensor("n" * 64)], F32S)),
    "name-empty": ("a tensor without a name", gguf([], [tensor("")], F32S)),
    "name-zero-byte": ("a name that ends earlier for C", gguf([], [tensor("a\0b")], F32S)),
    "name-escape": ("a name that clears the terminal", gguf([], [tensor("\x1b[2J")], F32S)),
    "name-newline": ("a name that forges a line of output", gguf([], [tensor("a\nerror: b")], F32S)),
    "name-twice": ("two tensors of one name", gguf([], [tensor("a"), tensor("a", offset=128)], F32S * 2)),
    "dims-5": ("more dimensions than ggml's array holds", gguf([], [tensor(shape=(2, 2, 2, 2, 2))], F32S)),
    "dims-0": ("no dimensions", gguf([], [tensor(shape=())], F32S)),
    "dims-max": ("2^32-1 dimensions", gguf([], [text("t") + struct.pack("<I", (1 << 32) - 1)], F32S)),
    "dim-0": ("a dimension of nothing", gguf([], [tensor(shape=(32, 0))], F32S)),
    "dim-2e63": ("a negative dimension", gguf([], [tensor(shape=(1 << 63,))], F32S)),
    "dims-overflow": ("a product of 2^64", gguf([], [tensor(shape=(1 << 32, 1 << 32))], F32S)),
    "dims-overflow-to-32": ("a product that is 32 mod 2^64", gguf([], [tensor(shape=(1 << 60, 16, 32))], F32S)),
    "row-2e40": ("a row of 2^40 weights", gguf([], [tensor(shape=(1 << 40,))], F32S)),
    "type-249": ("a type id between upstream's and ours", gguf([], [tensor(kind=249)], F32S)),
    "type-4": ("a type that was removed", gguf([], [tensor(kind=4)], F32S)),
    "type-max": ("type id 2^32-1", gguf([], [tensor(kind=(1 << 32) - 1)], F32S)),
    "offset-odd": ("data that is not aligned", gguf([], [tensor(offset=4)], F32S * 2)),
    "offset-behind": ("data behind the file", gguf([], [tensor(offset=1 << 40)], F32S)),
    "offset-wraps": ("an offset that overflows to before the data", gguf([], [tensor(offset=(1 << 64) - 32)], F32S)),
    "data-cut": ("data that ends too early", gguf([], [tensor()], F32S[:-1])),
    "data-none": ("a header without data", gguf([], [tensor()])),
    "overlap": ("two tensors over the same bytes", gguf([], [tensor("a"), tensor("b", offset=96)], F32S * 4)),
    "tp-row-of-40": (
        "a row that is no multiple of our block",
        gguf([VERSION], [tensor(shape=(40,), kind=TP2_1)], F32S),
    ),
    "tp-row-of-32": ("TP2_0 in a row of a quarter block", gguf([VERSION], [tensor(shape=(32,), kind=TP2_0)], F32S)),
    "tp-no-version": ("our type, and no format version", gguf([ARCH], [tensor(kind=TP2_1)], bytes(32))),
    "tp-version-2": (
        "a format version of the future",
        gguf([u32("ptqtp.format_version", 2)], [tensor(kind=TP2_1)], bytes(32)),
    ),
    "tp-version-text": (
        "a format version that is text",
        gguf([ARCH, kv("ptqtp.format_version", 8, text("1"))], [tensor(kind=TP2_1)], bytes(32)),
    ),
    "split-uncounted": (
        "a later part, which needs no format version, of nothing",
        gguf([kv("split.no", 2, struct.pack("<H", 1))], [tensor(kind=TP2_1)], bytes(32)),
    ),
    "split-100000": ("one of more parts than names can hold", gguf([kv("split.count", 5, struct.pack("<i", 100000))])),
}

# structure is good, content is not: `verify` and llama.cpp's --check-tensors must find it
BAD_DATA = {
    "tp21-word": ("a word that no packer writes", gguf([ARCH, VERSION], [tensor(kind=TP2_1)], b"\x01" + bytes(31))),
    "tp21-rest": (
        "a remainder byte that no packer writes",
        gguf([ARCH, VERSION], [tensor(kind=TP2_1)], bytes(13) + b"\x01" + bytes(18)),
    ),
    "tp20-scale-inf": (
        "an infinite scale",
        gguf([ARCH, VERSION], [tensor(shape=(128,), kind=TP2_0)], bytes(26) + b"\x7c" + bytes(37)),
    ),
    "hashes-of-text": (
        "checksums that are text",
        gguf([ARCH, VERSION, kv("ptqtp.tensor_hashes", 9, array(8, 1, text("x")))], [tensor(kind=TP2_1)], bytes(32)),
    ),
    "hashes-too-many": (
        "more checksums than tensors",
        gguf([ARCH, VERSION, kv("ptqtp.tensor_hashes", 9, array(10, 9, bytes(72)))], [tensor(kind=TP2_1)], bytes(32)),
    ),
}

SAFETENSORS = {
    "empty": ("nothing at all", b""),
    "seven-bytes": ("not even a length", bytes(7)),
    "header-2e63": ("a header of 2^63 bytes", struct.pack("<Q", 1 << 63) + b"{}"),
    "header-cut": ("a header longer than the file", struct.pack("<Q", 100) + b"{}"),
    "header-array": ("a header that is a list", safetensors([])),
    "header-no-json": ("a header that is no JSON", safetensors(b"{'a': 1}")),
    "header-not-utf8": ("a header that is no text", safetensors(b'{"\xff": 1}')),
    "header-deep": ("objects nested without end: recursion", safetensors(b'{"a":' * 600)),
    "header-big-number": (
        "a number of 4000 digits squared, in a message",
        safetensors({"a": entry(shape=[10**1200] * 3, offsets=[0, 0])}),
    ),
    "offset-big-number": (
        "an offset of 4000 digits",
        safetensors(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,1' + b"0" * 3000 + b"]}}"),
    ),
    "name-twice": (
        "which of two entries counts?",
        safetensors(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{}}', b"x"),
    ),
    "dtype-unknown": ("a type that nobody reads", safetensors({"a": entry("F7")}, bytes(8))),
    "dtype-list": ("a type that cannot be looked up", safetensors({"a": {**entry(), "dtype": []}}, bytes(8))),
    "shape-negative": ("a negative dimension", safetensors({"a": entry(shape=[-2])}, bytes(8))),
    "shape-overflow": ("a product of 2^64", safetensors({"a": entry(shape=[1 << 32, 1 << 32], offsets=[0, 0])})),
    "shape-true": ("a dimension that is no number", safetensors({"a": entry(shape=[True, 2])}, bytes(8))),
    "shape-float": (
        "a dimension of 2.0",
        safetensors(b'{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}', bytes(8)),
    ),
    "dims-1000": ("a thousand dimensions", safetensors({"a": entry(shape=[1] * 1000, offsets=[0, 4])}, bytes(4))),
    "offsets-reversed": ("an end before its begin", safetensors({"a": entry(offsets=[8, 0])}, bytes(8))),
    "offsets-behind": ("data behind the file", safetensors({"a": entry(offsets=[8, 16])}, bytes(8))),
    "offsets-three": ("three offsets", safetensors({"a": entry(offsets=[0, 8, 8])}, bytes(8))),
    "gap": ("bytes that no tensor owns", safetensors({"a": entry(offsets=[8, 16])}, bytes(16))),
    "overlap": ("two tensors over the same bytes", safetensors({"a": entry(), "b": entry()}, bytes(8))),
    "tail": ("bytes behind the last tensor", safetensors({"a": entry()}, bytes(9))),
    "entry-null": ("an entry that is no object", safetensors({"a": None})),
}

INDEX = {
    "shard-up": ("a shard in the folder above", {"weight_map": {"a": "../secret.safetensors"}}),
    "shard-root": ("a shard by an absolute path", {"weight_map": {"a": "/etc/passwd"}}),
    "shard-dots": ("a shard that is a folder", {"weight_map": {"a": ".."}}),
    "shard-escape": ("a shard whose name clears the terminal", {"weight_map": {"a": "\x1b[2J.safetensors"}}),
    "shard-number": ("a shard that is no name", {"weight_map": {"a": 7}}),
    "map-list": ("a map that is a list", {"weight_map": ["a"]}),
    "map-empty": ("an empty map", {"weight_map": {}}),
}

PICKLES = {
    "bare-pickle": ("os.system, in the format before 1.6", b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00id\x85R."),
    "system": ("os.system when loaded", torch_bin(b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00id\x85R.")),
    "builtins-eval": ("eval when loaded", torch_bin(b"\x80\x02c__builtin__\neval\nX\x01\x00\x00\x001\x85R.")),
    "stack-global": (
        "a name put together on the stack",
        torch_bin(b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x02id\x85R."),
    ),
    "inst": ("an old opcode that makes objects", torch_bin(b"(X\x02\x00\x00\x00idiposix\nsystem\n.")),
    "extension": ("a name by number", torch_bin(b"\x80\x02\x82\x01.")),
    "put-2e31": ("a list of 2^31 entries", torch_bin(b"\x80\x02Nr\xff\xff\xff\x7f.")),
    "deep-key": ("a key nested deep: hashing it is recursion", torch_bin(b"\x80\x02}N" + b"\x85" * 2000 + b"Ns.")),
    "build": ("attributes on what has none", torch_bin(b"\x80\x02}}b.")),
    "no-dict": ("no dictionary", torch_bin(b"\x80\x02K\x01.")),
    "entry-number": ("an entry that is no tensor", torch_bin(bin_of(b"K\x01"))),
    "beyond-storage": (
        "a tensor beyond its storage",
        torch_bin(bin_of(rebuild(b"K\x00", b"K\x09\x85", b"K\x01\x85")), ("archive/data/0", bytes(8))),
    ),
    "stride-huge": (
        "strides out of the storage",
        torch_bin(
            bin_of(rebuild(b"K\x00", b"K\x02\x85", b"\x8a\x08" + b"\xff" * 7 + b"\x7f\x85")),
            ("archive/data/0", bytes(8)),
        ),
    ),
    "size-negative": (
        "a negative size",
        torch_bin(bin_of(rebuild(b"K\x00", b"J\xff\xff\xff\xff\x85", b"K\x01\x85")), ("archive/data/0", bytes(8))),
    ),
    "storage-missing": (
        "a storage that is not there",
        torch_bin(bin_of(rebuild(b"K\x00", b"K\x02\x85", b"K\x01\x85"))),
    ),
    "storage-short": (
        "a storage of other bytes than claimed",
        torch_bin(bin_of(rebuild(b"K\x00", b"K\x02\x85", b"K\x01\x85")), ("archive/data/0", bytes(4))),
    ),
    "compressed": ("a member that grows when read", torch_bin(b"\x80\x02}." + bytes(2000), packed=True)),
    "no-pickle": ("a zip without a pickle", torch_bin(b"", ("x", b""))[60:]),
    "list-2e31": (
        "a list of members of 2^31 bytes",
        b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 9, 9, 1 << 31, 0, 0),
    ),
    "list-before-file": (
        "a list of members before the file's begin",
        bytes(64) + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, 46, 1 << 31, 0),
    ),
}

IMATRIX = {
    "dat-count-2e31": ("2^31-1 entries", dat(n=2**31 - 1) + bytes(64)),
    "dat-count-negative": ("-1 entries", dat(n=-1) + bytes(64)),
    "dat-name-2e31": ("a name of 2^31-1 bytes", struct.pack("<ii", 1, 2**31 - 1) + bytes(64)),
    "dat-values-2e31": ("2^31-1 values", dat((b"a", 1, 2**31 - 1, bytes(64)))),
    "dat-values-negative": ("-1 values", dat((b"a", 1, -1, bytes(64)))),
    "dat-nan": ("a value that is no number", dat((b"a", 1, 1, struct.pack("<f", float("nan"))))),
    "dat-negative": ("a negative sum of squares", dat((b"a", 1, 1, struct.pack("<f", -1)))),
    "dat-tail": ("bytes behind the end", dat((b"a", 1, 1, bytes(4)), tail=struct.pack("<ii", 1, 0) + b"x")),
    "dat-name-binary": ("a name that is no text", dat((b"\xff", 1, 1, bytes(4)))),
    "gguf-chunks-2e40": (
        "a count that our metadata cannot hold",
        imatrix(
            tensor("a.in_sum2"),
            tensor("a.counts", (1,), 0, 128),
            chunks=kv("imatrix.chunk_count", 10, struct.pack("<Q", 1 << 40)),
        ),
    ),
    "gguf-lonely": ("sums without counts", imatrix(tensor("a.in_sum2"))),
    "gguf-f16": ("sums of another type", imatrix(tensor("a.in_sum2", kind=1), tensor("a.counts", (1,), 0, 128))),
    "gguf-uneven": (
        "values that do not divide among experts",
        imatrix(tensor("a.in_sum2"), tensor("a.counts", (3,), 0, 128)),
    ),
    "gguf-no-imatrix": ("a GGUF of another kind", gguf([ARCH], [tensor()], F32S)),
}

RECIPES = {
    "empty": ("nothing", b""),
    "not-utf8": ("no text", b"\xff\xfe\xff"),
    "deep": ("lists nested without end: recursion", b"[" * 3900),
    "nested-repeat": ("(a+)+: longer than the universe, on a name of 63 letters", recipe("(a+)+b")),
    "nested-choice": ("(ab|ab)*: the same by another way", recipe("(ab|ab|abab)*c")),
    "many-options": ("a?a?a?...: the same by a third way", recipe("a?" * 30 + "a" * 30)),
    "many-repeats": (".*.*.*...: not for ever, but for long", recipe(".*" * 12 + "x")),
    "back-reference": ("a reference back to a group", recipe(r"(.*)\1\1\1x")),
    "count-2e30": ("a repeat of nothing, 2^30 times", recipe("(){1073741824}x")),
    "type-unknown": ("a type that nobody writes", recipe("a", type="Q77")),
    "layers-nan": ("a depth that is no number", recipe("a", layers=[[0, 0]]).replace(b"[0, 0]", b"[NaN, NaN]")),
    "layers-big": (
        "a depth of 3000 digits",
        recipe("a", layers=[[0, 0]]).replace(b"[0, 0]", b"[0, 1" + b"0" * 3000 + b"]"),
    ),
    "key-unknown": ("a key that means something elsewhere", recipe("a", path="/etc/passwd")),
    "reason-escape": ("a reason that clears the terminal", recipe("a", reason="\x1b[2J")),
    "no-rules": ("no rule", b'{"name": "n", "description": "d", "rules": []}'),
}

JOURNALS = {
    "no-journal": ("somebody's file, which a torn line would cut to nothing", b"precious"),
    "deep": ("lists nested without end: recursion", b'{"job":' + b"[" * 3900 + b"\n"),
    "job-list": ("a job that is a list", journal({"job": []})),
    "job-stamp": ("files that are none", journal({"job": {"options": {}, "stamp": [["a", "b"]]}})),
    "job-plan": ("a plan with an unknown type", journal({"job": {"options": {}, "plan": [[77, "r", False]]}})),
    "tensor-first": ("a tensor before any job", journal(ROW)),
    "tensor-9": ("a tensor out of turn", journal(JOB, {**ROW, "tensor": 9})),
    "type-77": ("a tensor of an unknown type", journal(JOB, {**ROW, "type": 77})),
    "type-list": ("a type that cannot be looked up", journal(JOB, {**ROW, "type": []})),
    "hash-text": ("a checksum that is text", journal(JOB, {**ROW, "hash": "0"})),
    "error-infinite": ("an error that is no number", journal(JOB, ROW).replace(b'"error": 0.0', b'"error": 1e999')),
    "error-huge": (
        "an error of 400 digits, which is no float",
        journal(JOB, ROW).replace(b'"error": 0.0', b'"error": 1' + b"0" * 400),
    ),
    "verified-number": ("a verdict that is a number", journal(JOB, {"verified": 1})),
    "verified-text": ("a verdict that is no checksum", journal(JOB, {"verified": ["x"]})),
    "record-text": ("a record that is text", journal(JOB, '"job"')),
}

PLANES = {
    "file-up": (
        "a file outside of the folder",
        journal({"job": {}}, {"tensor": 0, "name": "a", "file": "../../../etc/passwd", "hash": 0}),
    ),
    "file-root": (
        "a file by an absolute path",
        journal({"job": {}}, {"tensor": 0, "name": "a", "file": "/etc/passwd", "hash": 0}),
    ),
    "file-of-other": (
        "the file of another tensor",
        journal({"job": {}}, {"tensor": 0, "name": "a", "file": "1.bin", "hash": 0}),
    ),
    "no-hash": ("no checksum", journal({"job": {}}, {"tensor": 0, "name": "a", "file": "0.bin"})),
    "said-list": ("words that are a list", journal({"job": {}}, {"tensor": 0, "said": ["a"]})),
}

KINDS = {  # reader -> (files, ending)
    "gguf": (GGUF, ".gguf"),
    "data": (BAD_DATA, ".gguf"),
    "safetensors": (SAFETENSORS, ".safetensors"),
    "index": ({k: (what, json.dumps(v).encode()) for k, (what, v) in INDEX.items()}, ".json"),
    "pickle": (PICKLES, ".bin"),
    "imatrix": (IMATRIX, ".imatrix"),
    "recipe": (RECIPES, ".json"),
    "journal": (JOURNALS, ".journal"),
    "planes": (PLANES, ".journal"),
}
FILES = {
    f"{kind}-{name}{ending}": (what, kind, raw)
    for kind, (files, ending) in KINDS.items()
    for name, (what, raw) in files.items()
}


def contents() -> str:
    """What each file tries, for people: tests/attacks/README.md."""
    made = "Made by `tools/make_attacks.py`; read by `tests/system/test_attacks.py`. What each tries:"
    lines = ["# Attacks", "", made, ""]
    lines += [f"- `{name}`: {what}" for name, (what, _, _) in FILES.items()]
    return "\n".join(lines) + "\n"


def main(folder: Path = FOLDER) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for name, (_, _, raw) in FILES.items():
        (folder / name).write_bytes(raw)
    (folder / "README.md").write_text(contents(), encoding="utf-8")
    total = hashlib.sha256(b"".join(raw for _, _, raw in FILES.values())).hexdigest()
    print(f"{len(FILES)} files in {folder}, SHA-256 of all {total[:16]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:2])))
