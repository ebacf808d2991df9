"""Damaged files through every reader in Python: each is read, or refused with one line of a PtqtpError, soon.

    python tools/fuzz/fuzz_readers.py [--seconds S] [--seed N] [--corpus FOLDER] [KIND ...]

Seeds are tests/attacks and sound files made here. An input that is refused at a place where none was before is kept and
mutated on. Prints a line a kind; an input that breaks a reader is kept in FOLDER/findings.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import importlib.util
import io
import json
import random
import re
import resource
import struct
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ptqtp_gguf import errors
from ptqtp_gguf.calibrate import documents, moments, seen, texts
from ptqtp_gguf.calibrate import store as planes
from ptqtp_gguf.codec import TYPES
from ptqtp_gguf.conversion.records import ConversionJournal
from ptqtp_gguf.errors import PtqtpError
from ptqtp_gguf.files.gguf import OutTensor, TensorInfo, build_header, kv_list, kv_string, kv_u32
from ptqtp_gguf.files.journal import journal_path
from ptqtp_gguf.inspect.check import verify
from ptqtp_gguf.measure import cache, perplexity_tool, scoring
from ptqtp_gguf.plan import recipe
from ptqtp_gguf.source import checkpoint, imatrix, pickles
from ptqtp_gguf.source.gguf import GgufSource

SECONDS = 5  # that one input may take
MEMORY = 3 << 30
PACKAGE = str(Path(errors.__file__).parent)
SPECIAL = [0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, 1 << 62, 1 << 63, (1 << 64) - 1]
WORDS = [
    *(bytes([c]) for c in b'[]{},":*+|()?\xff\x00\n'),
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
    b"true",
    b"1" + b"0" * 400,
    b"\\u0000",
    b"F32",
    b"../x",
    b"{9}",
]
COLS, JOB = 4, {"text": "t"}  # of the moments; of the windows
SPOOLS = ("index.json", "sums.1", "1.rows", "1.experts", "1.held", "1.held-experts")
NUMBER = re.compile(rb"\d+")
BREAK = b"\n-----\n"  # between the files of a folder


def attacks() -> dict[str, tuple[str, str, bytes]]:
    """tools/fixtures/make_attacks.py's FILES."""
    path = Path(__file__).resolve().parents[1] / "fixtures" / "make_attacks.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    files: dict[str, tuple[str, str, bytes]] = module.FILES
    return files


def sound_moments() -> bytes:
    """A folder of moments that is gathered: an input with sums, and one of two experts whose rows are kept."""
    inputs = [
        moments.Input(0, ["a", "b"], COLS, [3], True),
        moments.Input(1, ["c"], COLS, [2, 1], False, 4 * COLS * COLS, rows=3, held=2, used=1, passed=3, held_passed=2),
    ]
    with tempfile.TemporaryDirectory() as folder:
        moments.write_index(Path(folder), moments.Index({}, 2, 2, 1, inputs))
        index = Path(folder, SPOOLS[0]).read_bytes()
    sums, rows = np.eye(COLS, dtype="<f4").tobytes(), moments.to_bf16(np.ones((5, COLS), np.float32)).tobytes()
    experts = np.array([0, 1, 0, 1, 0], "<i4").tobytes()
    return BREAK.join([index, sums, rows[:24], experts[:12], rows[24:], experts[12:]])


def sound_windows() -> bytes:
    """What an evaluation has measured, two windows of two tokens."""
    with tempfile.TemporaryDirectory() as folder:
        records = cache.Records(Path(folder), dict(JOB), 2)
        for i in range(2):
            records.add(i, np.zeros(2, scoring.RECORD))
        return next(Path(folder).iterdir()).read_bytes()


def sound() -> dict[str, list[bytes]]:
    """Files that the readers take."""
    tensors = [OutTensor("blk.0.a.weight", (32, 2), 251), OutTensor("b", (128,), 250), OutTensor("c", (7,), 0)]
    tensors.append(OutTensor("d", (64,), 252))
    kvs = [
        kv_string("general.architecture", "llama"),
        kv_u32("ptqtp.format_version", 2),
        kv_u32("general.alignment", 32),
        kv_list("numbers", 5, [1, -2, 3]),
        kv_list("ptqtp.tensor_hashes", 10, [1, 2, 3]),
    ]
    model = build_header(kvs, tensors, 32) + bytes(32 + 64 + 32 + 32)
    sums = [OutTensor("a.in_sum2", (4, 2), 0), OutTensor("a.counts", (1, 2), 0)]
    matrix = build_header([kv_string("general.type", "imatrix"), kv_u32("imatrix.chunk_count", 2)], sums, 32)
    values = np.arange(16, dtype="<f4").tobytes()
    dat = struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 2, 3) + values[:12] + struct.pack("<ii", 2, 1) + b"t"
    header = {
        "a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
        "__metadata__": {"format": "pt"},
        "b": {"dtype": "BF16", "shape": [1], "data_offsets": [8, 10]},
    }
    raw = json.dumps(header).encode()
    out = io.BytesIO()
    pickle = (
        b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01ctorch._utils\n_rebuild_tensor_v2\nq\x02((X\x07\x00\x00\x00storageq\x03"
        b"ctorch\nFloatStorage\nq\x04X\x01\x00\x00\x000q\x05X\x03\x00\x00\x00cpuq\x06K\x02tq\x07QK\x00K\x02\x85q\x08"
        b"K\x01\x85q\t\x89ccollections\nOrderedDict\nq\n)Rq\x0btq\x0cRq\rs."
    )
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), pickle)
        archive.writestr(zipfile.ZipInfo("archive/data/0"), bytes(8))
    row = {"tensor": 0, "type": 251, "nbytes": 14, "hash": 1, "source": 2, "error": 0.0, "power": 1.0, "why": None}
    plan = [[251, "r", False]]
    kept = [{"job": {"options": {"a": 1}, "stamp": [["f", 1, 2]], "plan": plan}}, row, {"verified": ["0" * 64]}]
    made = [{"job": {}}, {"tensor": 0, "name": "a", "file": "0.bin", "hash": 0}, {"tensor": 1, "said": "x"}]
    talk = {"messages": [{"role": "user", "content": "a"}, {"from": "gpt", "value": "b"}]}
    asked = {"prompt": ["a"], "response": "b", "rows": [{"row": {"text": "c"}}]}
    return {
        "gguf": [model],
        "imatrix": [matrix + values + bytes(64), dat],
        "safetensors": [struct.pack("<Q", len(raw)) + raw + bytes(10)],
        "pickle": [out.getvalue()],
        "index": [json.dumps({"weight_map": {"a": "m.safetensors"}, "metadata": {}}).encode()],
        "recipe": [p.read_bytes() for p in sorted(Path(PACKAGE, "plan", "recipes").glob("*.json"))],
        "journal": [b"".join(json.dumps(r).encode() + b"\n" for r in kept)],
        "planes": [b"".join(json.dumps(r).encode() + b"\n" for r in made)],
        "rows": [bytes([i]) + bytes(2 * t.size) for i, t in enumerate(TYPES.values())],
        "moments": [sound_moments()],
        "tokens": [np.arange(8, dtype="<i8").tobytes()],
        "worth": [b'{"a": 1.5, "b": 0}'],
        "windows": [sound_windows()],
        "logits": [struct.pack("<8s3I4i8H", b"_logits_", 4, 3, 1, *range(4), *range(8))],
        "text": [
            *(json.dumps(r).encode() for r in (talk, [talk, asked], {"data": [asked]})),
            b"".join(json.dumps(r).encode() + b"\n" for r in (talk, asked, "d")),
            b'text,label\n"a\nb",1\nc,2\n',
            "Wörter\n\nand lines\n".encode("utf-16"),
            gzip.compress(b'{"text": "a"}\n', mtime=0),
        ],
    }


# ---- readers: of a file in a folder of its own ----


def read_gguf(path: Path) -> None:
    with GgufSource(path) as source:
        for key in source.kvs:
            with contextlib.suppress(PtqtpError):
                source.get(key)
    verify(path)


def read_index(path: Path) -> None:
    path.rename(path.with_name(checkpoint.INDEX))
    path.with_name("config.json").write_text('{"architectures": ["L"]}')
    checkpoint.check(path.parent)


def read_imatrix(path: Path) -> None:
    imatrix.read(path).close()


def read_journal(path: Path) -> None:
    out = path.with_name("out.gguf")
    path.rename(journal_path(out))
    ConversionJournal(out).__exit__(None, None, None)


def read_planes(path: Path) -> None:
    folder = planes.planes_folder(path.with_name("out.gguf"))
    folder.mkdir(exist_ok=True)
    path.rename(journal_path(folder / "planes"))
    planes.PlaneStore(path.with_name("out.gguf"), {}).__exit__(None, None, None)


def read_rows(path: Path) -> None:
    """Planes of a tensor; the first byte names the type."""
    raw = path.read_bytes()
    path.unlink()
    kind = list(TYPES.values())[raw[0] % len(TYPES) if raw else 0]
    t = TensorInfo("a", (kind.block, 2), 0, 0, 8 * kind.block)
    with planes.PlaneStore(path.with_name("out.gguf"), {}, kind) as store:
        store.put(t, np.zeros((2, kind.block), np.int8), np.zeros((2, kind.block // kind.group), np.uint8))
        (store.folder / "0.bin").write_bytes(raw[1:])
        levels, codes = store.planes(t)
        assert levels.shape == (2, kind.block) and len(codes) == 2
        store.encode(t, np.zeros((2, 4 * kind.block), np.uint8), 0, 1)


def read_moments(path: Path) -> None:
    """A folder of moments as calibration takes it, and as a run that was killed takes it up again."""
    folder = path.with_name("moments")
    folder.mkdir()
    for name, raw in zip(SPOOLS, path.read_bytes().split(BREAK), strict=False):
        (folder / name).write_bytes(raw)
    with contextlib.suppress(PtqtpError):
        found = moments.Moments(folder)
        for of in found:
            for e in range(len(of.counts)) if of.cols <= COLS else ():  # other widths fit no tensor
                found.second(of, e)
                found.energy(of, np.ones((1, of.cols), np.float32), e)
                found.tokens(of, e)
                found.rows(of, e, held=True)
    gathering = moments.Gathering(folder, {}, 2, 8)
    try:
        gathering.add("a", np.ones((2, COLS), np.float32), None, 0, False)
        gathering.add("c", np.ones((2, 1, COLS), np.float32), np.zeros((2, 1), np.int32), 2, False)
        gathering.add("c", np.ones((2, 1, COLS), np.float32), np.ones((2, 1), np.int32), 2, True)
        gathering.checkpoint(2)
    finally:
        for file in gathering._files.values():
            file.close()


def read_tokens(path: Path) -> None:
    texts.kept(path, 4, True, lambda: np.zeros((1, 4), np.int64))


def read_windows(path: Path) -> None:
    cache.Records(path.parent, dict(JOB), 2)
    path.rename(next(path.parent.glob("*.windows"), cache._place(path.parent, dict(JOB), "windows")))
    assert all(cache.finite(rows) for rows in cache.Records(path.parent, dict(JOB), 2).windows.values())


def read_text(path: Path) -> None:
    documents.read(path, "t")


READERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "gguf": (read_gguf, ".gguf"),
    "imatrix": (read_imatrix, ".imatrix"),
    "recipe": (recipe.load, ".json"),
    "safetensors": (checkpoint.shard_tensors, ".safetensors"),
    "pickle": (pickles.bin_tensors, ".bin"),
    "index": (read_index, ".json"),
    "journal": (read_journal, ".journal"),
    "planes": (read_planes, ".journal"),
    "rows": (read_rows, ".bin"),
    "moments": (read_moments, ".moments"),
    "tokens": (read_tokens, ""),
    "worth": (seen._worth, ".json"),
    "windows": (read_windows, ""),
    "logits": (perplexity_tool.windows_of, ".logits"),
    "text": (read_text, ".txt"),
}


# ---- mutation ----


def mutate(rng: random.Random, raw: bytes, others: list[bytes]) -> bytes:
    data = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(data))
        choice = rng.randrange(9)
        if choice == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif choice == 1 and data:
            data[at % len(data)] = rng.randrange(256)
        elif choice == 2:
            width = rng.choice([1, 2, 4, 8])
            data[at : at + width] = (rng.choice(SPECIAL) & ((1 << 8 * width) - 1)).to_bytes(width, "little")
        elif choice == 3:
            del data[at : at + rng.randint(1, 16)]
        elif choice == 4:
            data[at:at] = data[at : at + rng.randint(1, 64)] * rng.choice([1, 1, 2, 50])
        elif choice == 5:
            other = rng.choice(others)
            start = rng.randint(0, len(other))
            data[at:] = other[start:]
        elif choice == 6:
            data[at:at] = rng.choice(WORDS) * rng.choice([1, 1, 1, 40])
        elif choice == 7 and (numbers := [m.span() for m in NUMBER.finditer(data)]):
            first, last = rng.choice(numbers)
            data[first:last] = rng.choice([b"%d" % rng.choice([*SPECIAL, -1, 2, 3]), *WORDS])
        else:
            del data[at:]
    return bytes(data[: 1 << 17])


def place(e: BaseException) -> tuple[tuple[str, int], ...]:
    """The lines of ours that an error went through."""
    frames = traceback.extract_tb(e.__traceback__)
    return tuple((f.filename, f.lineno or 0) for f in frames if f.filename.startswith(PACKAGE))


def broken(read: Callable[[Path], object], path: Path) -> tuple[str, object]:
    """(what is wrong, or "", where it was refused)."""
    started, at = time.process_time(), None
    wrong = ""
    try:
        read(path)
    except PtqtpError as e:
        at = place(e)
        if not str(e).isprintable():
            wrong = f"not one line: {str(e)!r:.200}"
    except BaseException as e:
        wrong, at = f"{type(e).__name__}: {str(e)[:200]}", place(e)
    took = time.process_time() - started
    return wrong or (f"{took:.1f} s" if took > SECONDS else ""), at


def fuzz(kind: str, seconds: float, seed: int, corpus: Path) -> dict[str, object]:
    """Fuzz one reader for so many seconds of this process. Returns what came of it."""
    read, ending = READERS[kind]
    rng = random.Random(f"{kind} {seed}")
    folder = corpus / f"python-{kind}"
    folder.mkdir(parents=True, exist_ok=True)
    kept = [p.read_bytes() for p in sorted(folder.iterdir())]
    wanted = (kind, "data") if kind == "gguf" else (kind,)
    inputs = [*sound()[kind], *(raw for _, k, raw in attacks().values() if k in wanted), *kept]
    seen: set[object] = set()
    findings: dict[object, str] = {}
    runs, first, end = 0, len(inputs), time.process_time() + seconds
    taken = 0
    while runs < first or time.process_time() < end:
        raw = inputs[runs] if runs < first else mutate(rng, rng.choice(inputs), inputs)
        runs += 1
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
            path = Path(scratch, f"x{ending}")
            path.write_bytes(raw)
            wrong, at = broken(read, path)
        taken += at is None
        if wrong and at not in findings:
            findings[at] = wrong
            (corpus / "findings").mkdir(exist_ok=True)
            (corpus / "findings" / f"python-{kind}-{len(findings)}{ending}").write_bytes(raw)
        if at not in seen:
            seen.add(at)
            if runs > first:
                inputs.append(raw)
                (folder / f"{seed}-{runs}").write_bytes(raw)
    return {
        "target": f"python-{kind}",
        "runs": runs,
        "inputs": len(inputs),
        "places": len(seen),
        "read": taken,
        "findings": sorted(findings.values()),
    }


def results(kinds: list[str], seconds: float, seed: int, corpus: Path) -> Iterator[dict[str, object]]:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    for kind in kinds:
        yield fuzz(kind, seconds / len(kinds), seed, corpus)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(READERS))
    parser.add_argument("--seconds", type=float, default=10, help="of computing, all kinds together (10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", type=Path, default=Path("build/fuzz/corpus"))
    args = parser.parse_args()
    bad = 0
    for result in results(args.kinds or list(READERS), args.seconds, args.seed, args.corpus):
        print(json.dumps(result), flush=True)
        bad += len(result["findings"])  # type: ignore[arg-type]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
