"""Where weights come from: a Hugging Face checkpoint folder, or a GGUF file.

A folder is checked first, without loading a weight: config, index, and every shard's safetensors header against the
file's size (format: the README of huggingface/safetensors); pickles.py checks PyTorch's .bin shards. Then llama.cpp's
own converter makes a bf16 GGUF in a process of its own; architectures, tensor names and tokenizers are its business.
"""

from __future__ import annotations

import math
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, InputError
from ..files import open_regular, parse_json, read_whole
from ..llamacpp import install
from . import _converter_child as child
from .pickles import bin_tensors

INDEX = "model.safetensors.index.json"
BIN_INDEX = "pytorch_model.bin.index.json"
MAX_HEADER = 100_000_000  # bytes; the safetensors library's own limit
MAX_JSON = 256 << 20
MAX_DIMS = 16  # of a tensor in a shard; GGUF holds 4, but the converter may reshape
MAX_SIZE = 1 << 62  # of a dimension, and of an offset

# What the converter or the tokenizer reads, and so decides the result. A GGUF in the folder may be our own output.
_DECIDES = frozenset(".json .jsonl .jinja .model .txt .tiktoken .vocab .md .py .safetensors .bin".split())

# bytes a value, of every dtype that safetensors defines and llama.cpp's converter reads
_DTYPES = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True)
class Checkpoint:
    """A checked folder: its architecture, shards, and bytes of weights; whether Python code in it may be run."""

    folder: Path
    architecture: str
    shards: tuple[Path, ...]
    nbytes: int
    trust_code: bool = False


def is_gguf(path: Path) -> bool:
    """True if the path is a file that starts like a GGUF. Raises InputError if it cannot be read."""
    try:
        if path.is_dir():
            return False
        with open_regular(path) as f:
            return f.read(4) == b"GGUF"
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}") from None


def stamp(source: Path) -> list[tuple[str, int, int]]:
    """(name, bytes, time of change in ns) of every file that decides the result, sorted; the identity of a source.

    source: a checkpoint folder, or a single file. Raises InputError if one cannot be looked at.
    """
    try:
        files = _deciding(source) if source.is_dir() else [source]
        found = [(p, p.stat()) for p in files]
    except OSError as e:
        raise InputError(f"{e.filename or source}: {e.strerror}") from None
    base = source if source.is_dir() else source.parent
    return sorted((p.relative_to(base).as_posix(), s.st_size, s.st_mtime_ns) for p, s in found)


def _deciding(folder: Path) -> list[Path]:
    """Files of the folder, and chat templates from where transformers keeps further ones."""
    files = [*folder.iterdir(), *folder.glob("additional_chat_templates/*.jinja")]
    return [p for p in files if p.suffix in _DECIDES and not p.name.startswith(".") and not p.is_dir()]


def check(folder: Path, trust_code: bool = False) -> Checkpoint:
    """Check a checkpoint folder without reading a weight. Raises CheckpointError with the first thing that is wrong.

    trust_code: Python code that the folder brings may be run, by llama.cpp's converter and by transformers
    """
    config = _load_json(folder / "config.json", "config.json names the architecture; is this a checkpoint folder?")
    architectures = config.get("architectures")
    if not (isinstance(architectures, list) and architectures and isinstance(architectures[0], str)):
        raise CheckpointError(f"{folder / 'config.json'}: no 'architectures' entry; llama.cpp's converter needs it")
    try:
        for path in _deciding(folder):  # the converter would wait for a pipe for ever
            _regular(path)
    except OSError as e:
        raise CheckpointError(f"{folder}: {e.strerror}") from None
    for index, single, others, tensors_of in (
        (INDEX, "model.safetensors", "model*.safetensors", shard_tensors),
        (BIN_INDEX, "pytorch_model.bin", "pytorch_model*.bin", bin_tensors),
    ):
        if os.path.lexists(folder / index):
            shards, nbytes = _check_sharded(folder, folder / index, tensors_of)
            return Checkpoint(folder, architectures[0], shards, nbytes, trust_code)
        found = sorted(folder.glob(others))
        if folder / single in found:
            if len(found) > 1:  # the converter would read them all
                extra = next(p.name for p in found if p.name != single)
                raise CheckpointError(f"{folder}: {extra} stands beside {single} and there is no {index}; remove one")
            nbytes = sum(tensors_of(folder / single).values())
            return Checkpoint(folder, architectures[0], (folder / single,), nbytes, trust_code)
        if found:
            raise CheckpointError(
                f"{folder}: no model.safetensors and no {INDEX}: found {found[0].name}, but no {single} and no {index}"
            )
    names = sorted(p.name for p in folder.glob("*.safetensors"))
    hint = f"found {names[0]}, but no {INDEX}" if names else "no safetensors and no pytorch_model.bin"
    raise CheckpointError(f"{folder}: no model.safetensors and no {INDEX}: {hint}")


def _check_sharded(
    folder: Path, index_path: Path, tensors_of: Callable[[Path], dict[str, int]]
) -> tuple[tuple[Path, ...], int]:
    index = index_path.name
    weight_map = _load_json(index_path, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path}: no 'weight_map'")
    wanted: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        if (
            not isinstance(shard, str)
            or Path(shard).name != shard
            or shard in ("", ".", "..")
            or not shard.isprintable()
        ):
            raise CheckpointError(
                f"{index_path}: tensor {show(tensor)} names the shard {show(repr(shard))}, "
                "which is not a plain file name"
            )
        wanted.setdefault(shard, set()).add(tensor)
    total = 0
    owner: dict[str, str] = {}
    for shard in sorted(wanted):
        if not os.path.lexists(folder / shard):
            raise CheckpointError(f"{folder}: shard {shard} is missing; {index} names {len(wanted)} shards")
        present = tensors_of(folder / shard)
        if absent := sorted(wanted[shard] - set(present)):
            raise CheckpointError(
                f"{folder / shard}: tensor {show(absent[0])} is named by {index} but absent from the shard"
            )
        for name in present:
            if owner.setdefault(name, shard) != shard:
                raise CheckpointError(f"{folder}: tensor {show(name)} stands in both {owner[name]} and {shard}")
        total += sum(present.values())
    if extra := sorted(set(owner) - set(weight_map)):  # the converter refuses it too, later
        raise CheckpointError(
            f"{folder / owner[extra[0]]}: tensor {show(extra[0])} is not named by {index}; is it another model's index?"
        )
    return tuple(folder / s for s in sorted(wanted)), total


def show(text: str) -> str:
    """A name from a file, fit for one line of a message."""
    text = "".join(c if c.isprintable() else "?" for c in text[:100])
    return text[:97] + "..." if len(text) == 100 else text


def _regular(path: Path) -> int:
    """Size of a regular file. Raises CheckpointError for a pipe or a device, where reading might never end; OSError."""
    try:
        found = path.stat()
    except OSError as e:
        raise CheckpointError(f"{path}: {e.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path}: no regular file")
    return found.st_size


def shard_tensors(path: Path) -> dict[str, int]:
    """Names and byte sizes of the tensors of a safetensors file, its header validated against the file's size."""
    try:
        with open_regular(path, CheckpointError) as f:
            size = os.fstat(f.fileno()).st_size
            head = f.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > min(MAX_HEADER, size - 8):
                raise CheckpointError(
                    f"{path}: damaged or truncated: the header claims {length} bytes, the file has {size}"
                )
            raw = f.read(length)
    except OSError as e:
        raise CheckpointError(f"{path}: {e.strerror}") from None
    if not raw.startswith(b"{"):  # before JSON of any other kind takes memory
        raise CheckpointError(f"{path}: damaged: the header is not a JSON object")
    try:
        header = parse_json(raw, _no_duplicates)
    except ValueError as e:
        raise CheckpointError(f"{path}: damaged: the header is not valid JSON ({e})") from None
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
            raise CheckpointError(f"{path}: damaged: tensor {show(name)} starts at byte {begin}, expected {expected}")
        expected = end
    if expected != size - 8 - length:
        raise CheckpointError(f"{path}: damaged: {size - 8 - length} bytes of data, {expected} are used by tensors")
    return tensors


def _check_entry(path: Path, name: str, entry: object, room: int) -> tuple[int, int]:
    where = f"{path}: tensor {show(name)}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where}: damaged header entry")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(f"{where}: dtype {show(repr(dtype))}, which llama.cpp's converter does not read")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(map(_is_size, shape)):
        raise CheckpointError(f"{where}: damaged shape {show(repr(shape))}")
    if 0 in shape:
        raise CheckpointError(f"{where}: shape {shape}, which holds nothing; a GGUF cannot store it")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise CheckpointError(f"{where}: damaged offsets {show(repr(offsets))}")
    begin, end = offsets
    n = math.prod(shape, start=_DTYPES[dtype])
    if not begin <= end <= room:
        raise CheckpointError(f"{where}: truncated: data at {begin}..{end}, the file holds {room} bytes of data")
    if end - begin != n:
        raise CheckpointError(f"{where}: {end - begin} bytes for shape {shape} of {dtype}, which takes {n}")
    return begin, end


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_SIZE  # numbers of thousands of digits cannot even be printed


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"'{show(key)}' stands twice")
        out[key] = value
    return out


def _load_json(path: Path, hint: str) -> dict[str, Any]:
    try:
        data = parse_json(read_whole(path, MAX_JSON, CheckpointError))
    except CheckpointError as e:
        raise CheckpointError(f"{e}; {hint}" if hint and not path.is_file() else str(e)) from None
    except ValueError as e:
        raise CheckpointError(f"{path}: not valid JSON ({e})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return data


def to_bf16_gguf(checkpoint: Checkpoint, out: Path) -> Iterator[str]:
    """Run llama.cpp's converter: checkpoint -> bf16 GGUF at `out`. Yields its log lines as they come.

    Raises CheckpointError if the converter fails, with its own last word; the process dies with the generator.
    """
    script = install.converter()
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    guard = child.TRUST if checkpoint.trust_code else child.__file__
    command = [sys.executable, "-I", "-u", "-c", _LAUNCH, guard, str(script), str(checkpoint.folder)]
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
        raise CheckpointError(f"{checkpoint.folder}: {converter_reason(checkpoint, lines, code)}")


# Linux ends it with its parent, so that nobody goes on writing the file when a killed conversion is begun again.
# -I keeps the current folder and PYTHONPATH out. The converter's own gguf-py must come before PyPI's, which claims the
# same version.
_LAUNCH = """
import ctypes, runpy, signal, sys
if sys.platform == 'linux':
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
guard, script = sys.argv[1:3]
folder = script.rsplit('/', 1)[0] if '/' in script else script.rsplit(chr(92), 1)[0]
sys.path[:0] = [folder + '/gguf-py', folder]
sys.argv = sys.argv[2:]
if guard != '--trust-remote-code':
    runpy.run_path(guard)['distrust']()
runpy.run_path(script, run_name='__main__')
"""


def transformers_reason(e: Exception) -> str:
    """What transformers has to say, in one line. Its long text about code of the checkpoint's own becomes ours."""
    return child.UNTRUSTED if "trust_remote_code" in str(e) else " ".join(str(e).split())[:200]


def converter_reason(checkpoint: Checkpoint, lines: list[str], code: int) -> str:
    """The converter's last word, in one line."""
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")[:300]
    for line in reversed(lines):
        if any(word in line for word in (child.UNTRUSTED, "Please pass the argument `trust_remote_code=True`")):
            return child.UNTRUSTED
        if "is not supported" in line:
            return f"llama.cpp's converter does not know the architecture {checkpoint.architecture}"
        if line.startswith("ModuleNotFoundError"):
            return f"the converter needs a package: {line}; pip install 'ptqtp-gguf[hf]'"
    if code < 0:
        why = "; out of memory?" if code == -signal.SIGKILL else ""
        return f"llama.cpp's converter was killed by signal {-code} ({_signal_name(-code)}){why}"
    if last.startswith("KeyError") and "could not find any of" in last:
        return f"config.json lacks an entry that llama.cpp's converter needs: {last}"
    if not any(any(checkpoint.folder.glob(pattern)) for pattern in _TOKENIZERS):
        return f"no tokenizer.json and no tokenizer.model in the folder; llama.cpp's converter failed: {last}"
    if "JSONDecodeError" in last:
        for path in sorted(checkpoint.folder.glob("*.json")):
            try:
                _load_json(path, "")
            except CheckpointError as e:
                return f"llama.cpp's converter cannot read {str(e).removeprefix(f'{checkpoint.folder}{os.sep}')}"
    return f"llama.cpp's converter failed (exit code {code}): {last}"


_TOKENIZERS = "tokenizer.json", "*.model", "vocab*", "tekken.json", "*.tiktoken", "*vocab*.txt"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"
