"""Where weights come from: a Hugging Face checkpoint folder, or a GGUF file.

A folder is checked first, without loading a weight: config, index, and every shard's safetensors header against the
file's size (format: the README of huggingface/safetensors). Then llama.cpp's own converter makes a bf16 GGUF from it
in a process of its own; architectures, tensor names and tokenizers are its business.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import runtime
from .errors import CheckpointError, InputError

INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # bytes; the safetensors library's own limit
MAX_JSON = 256 << 20

# bytes a value, of every dtype that safetensors defines and llama.cpp's converter reads
_DTYPES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A checked folder: its architecture, shards, and bytes of weights."""

    folder: Path
    architecture: str
    shards: tuple[Path, ...]
    nbytes: int


def is_gguf(path: Path) -> bool:
    """True if the path is a file that starts like a GGUF. Raises InputError if it does not exist."""
    try:
        if path.is_dir():
            return False
        with open(path, "rb") as f:
            return f.read(4) == b"GGUF"
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}") from None


def check(folder: Path) -> Checkpoint:
    """Check a checkpoint folder without reading a weight. Raises CheckpointError with the first thing that is wrong."""
    config = _load_json(folder / "config.json", "config.json names the architecture; is this a checkpoint folder?")
    architectures = config.get("architectures")
    if not (isinstance(architectures, list) and architectures and isinstance(architectures[0], str)):
        raise CheckpointError(f"{folder / 'config.json'}: no 'architectures' entry; llama.cpp's converter needs it")
    index_path, single = folder / INDEX, folder / "model.safetensors"
    if index_path.exists():
        shards, nbytes = _check_sharded(folder, index_path)
    elif single.exists():
        shards, nbytes = (single,), sum(shard_tensors(single).values())
    else:
        others = sorted(p.name for p in folder.glob("*.safetensors"))
        hint = f"found {others[0]}, but no {INDEX}" if others else "no safetensors file at all"
        if not others and any(folder.glob("*.bin")):
            hint = "only pytorch .bin files, which can run code when read; save the model as safetensors"
        raise CheckpointError(f"{folder}: no model.safetensors and no {INDEX}: {hint}")
    return Checkpoint(folder, architectures[0], shards, nbytes)


def _check_sharded(folder: Path, index_path: Path) -> tuple[tuple[Path, ...], int]:
    weight_map = _load_json(index_path, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path}: no 'weight_map'")
    wanted: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
            raise CheckpointError(
                f"{index_path}: tensor {tensor} names the shard {shard!r}, which is no plain file name"
            )
        wanted.setdefault(shard, set()).add(tensor)
    total = 0
    owner: dict[str, str] = {}
    for shard in sorted(wanted):
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder}: shard {shard} is missing; {INDEX} names {len(wanted)} shards")
        present = shard_tensors(folder / shard)
        if absent := sorted(wanted[shard] - set(present)):
            raise CheckpointError(f"{folder / shard}: tensor {absent[0]} is named by {INDEX} but absent from the shard")
        for name in present:
            if owner.setdefault(name, shard) != shard:
                raise CheckpointError(f"{folder}: tensor {name} stands in both {owner[name]} and {shard}")
        total += sum(present.values())
    return tuple(folder / s for s in sorted(wanted)), total


def shard_tensors(path: Path) -> dict[str, int]:
    """Names and byte sizes of the tensors of a safetensors file, its header validated against the file's size."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            head = f.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > min(MAX_HEADER, size - 8):
                raise CheckpointError(
                    f"{path}: damaged or truncated: the header claims {length} bytes, the file has {size}"
                )
            raw = f.read(length)
    except OSError as e:
        raise CheckpointError(f"{path}: {e.strerror}") from None
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: damaged: the header is not valid JSON ({e})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: damaged: the header is no JSON object")
    tensors: dict[str, int] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = _check_entry(path, name, entry, size - 8 - length)
        spans.append((begin, end, name))
        tensors[name] = end - begin
    expected = 0
    for begin, end, name in sorted(spans):
        if begin != expected:
            raise CheckpointError(f"{path}: damaged: tensor {name} starts at byte {begin}, expected {expected}")
        expected = end
    if expected != size - 8 - length:
        raise CheckpointError(f"{path}: damaged: {size - 8 - length} bytes of data, {expected} are used by tensors")
    return tensors


def _check_entry(path: Path, name: str, entry: object, room: int) -> tuple[int, int]:
    where = f"{path}: tensor {name}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where}: damaged header entry")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if dtype not in _DTYPES:
        raise CheckpointError(f"{where}: unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not all(type(d) is int and d >= 0 for d in shape):
        raise CheckpointError(f"{where}: damaged shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(o) is int for o in offsets):
        raise CheckpointError(f"{where}: damaged offsets {offsets!r}")
    begin, end = offsets
    n = _DTYPES[dtype]
    for d in shape:
        n *= d
    if not 0 <= begin <= end <= room:
        raise CheckpointError(f"{where}: truncated: data at {begin}..{end}, the file holds {room} bytes of data")
    if end - begin != n:
        raise CheckpointError(f"{where}: {end - begin} bytes for shape {shape} of {dtype}, which takes {n}")
    return begin, end


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"'{key}' stands twice")
        out[key] = value
    return out


def _load_json(path: Path, hint: str) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes; the limit is {MAX_JSON}")
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise CheckpointError(f"{path}: {e.strerror}" + (f"; {hint}" if hint else "")) from None
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not valid JSON ({e})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: no JSON object")
    return data


def to_bf16_gguf(checkpoint: Checkpoint, out: Path) -> Iterator[str]:
    """Run llama.cpp's converter: checkpoint -> bf16 GGUF at `out`. Yields its log lines as they come.

    Raises CheckpointError if the converter fails, with its own last word; the process dies with the generator.
    """
    script = runtime.converter()
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-u", "-c", _LAUNCH, str(script), str(checkpoint.folder)]
    command += ["--outtype", "bf16", "--outfile", str(out)]
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    assert process.stdout is not None
    lines: list[str] = []
    try:
        for line in process.stdout:
            lines = [*lines[-200:], line.rstrip()]
            yield line.rstrip()
        code = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        process.stdout.close()
    if code:
        raise CheckpointError(f"{checkpoint.folder}: {_reason(checkpoint, lines, code)}")


# -I keeps the current folder and PYTHONPATH out. The converter's own gguf-py must come before PyPI's, which claims the
# same version.
_LAUNCH = """
import runpy, sys
script = sys.argv[1]
folder = script.rsplit('/', 1)[0] if '/' in script else script.rsplit(chr(92), 1)[0]
sys.path[:0] = [folder + '/gguf-py', folder]
sys.argv = sys.argv[1:]
runpy.run_path(script, run_name='__main__')
"""


def _reason(checkpoint: Checkpoint, lines: list[str], code: int) -> str:
    """The converter's last word, in one line."""
    for line in reversed(lines):
        if "is not supported" in line:
            return f"llama.cpp's converter does not know the architecture {checkpoint.architecture}"
        if line.startswith("ModuleNotFoundError"):
            return f"the converter needs a package: {line}; pip install 'ptqtp-gguf[hf]'"
    last = next((line for line in reversed(lines) if line.strip()), "no output")
    return f"llama.cpp's converter failed (exit code {code}): {last.strip()}"
