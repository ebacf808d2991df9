"""Where weights come from: a Hugging Face checkpoint folder, or a GGUF file.

A folder is checked first, without loading a weight: config, index, and every shard's safetensors header against the
file's size (format: the README of huggingface/safetensors); pickles.py checks PyTorch's .bin shards. Then llama.cpp's
own converter makes a bf16 GGUF in a process of its own; architectures, tensor names and tokenizers are its business.
"""

from __future__ import annotations

import math
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, InputError
from ..files import open_regular, parse_json
from ..llamacpp import install
from . import _converter_hooks as hooks
from . import kinds, pre_tokenizers
from .converter_log import ConverterLog
from .kinds import load_json, show
from .pickles import bin_tensors

INDEX = "model.safetensors.index.json"
BIN_INDEX = "pytorch_model.bin.index.json"
MAX_HEADER = 100_000_000  # bytes; the safetensors library's own limit
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
    """A checked folder.

    architecture   as llama.cpp's converter finds it
    nbytes         of weights, in the shards
    trust_code     Python code in it may be run
    pre_tokenizer  name of it that is given; "" = by the converter's own list
    """

    folder: Path
    architecture: str
    shards: tuple[Path, ...]
    nbytes: int
    trust_code: bool = False
    pre_tokenizer: str = ""


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


def check(folder: Path, trust_code: bool = False, pre_tokenizer: str = "") -> Checkpoint:
    """Check a checkpoint folder without reading a weight. Raises CheckpointError with the first thing that is wrong.

    trust_code     Python code that the folder brings may be run, by llama.cpp's converter and by transformers
    pre_tokenizer  of a byte-level BPE, by the runtime's name; "" = by the converter's own list
    """
    if not folder.is_dir():
        if os.path.lexists(folder):
            raise CheckpointError(kinds.file_reason(folder))
        raise CheckpointError(f"{folder}: no such folder")
    try:
        if not os.path.lexists(folder / "config.json") and (found := kinds.folder_reason(folder)):
            raise CheckpointError(found)
        for path in _deciding(folder):  # the converter would wait for a pipe for ever
            _regular(path)
            if wrong := kinds.instead(path):
                raise CheckpointError(wrong)
    except OSError as e:
        raise CheckpointError(f"{folder}: {e.strerror}") from None
    hint = "config.json names the architecture; is this a checkpoint folder?"
    config = load_json(folder / "config.json", hint)
    architecture = kinds.architecture(folder, config)
    by = kinds.quantized(config)
    try:
        shards, tensors = _weights(folder)
    except CheckpointError:
        if by:  # its tensors may be of kinds that we do not know
            raise CheckpointError(kinds.quantized_reason(folder, by, None)) from None
        raise
    if by:
        raise CheckpointError(kinds.quantized_reason(folder, by, tensors))
    return Checkpoint(folder, architecture, shards, sum(tensors.values()), trust_code, pre_tokenizer)


def _weights(folder: Path) -> tuple[tuple[Path, ...], dict[str, int]]:
    """The shards, and bytes of each tensor. Raises CheckpointError."""
    for index, single, others, tensors_of in (
        (INDEX, "model.safetensors", "model*.safetensors", shard_tensors),
        (BIN_INDEX, "pytorch_model.bin", "pytorch_model*.bin", bin_tensors),
    ):
        if os.path.lexists(folder / index):
            return _check_sharded(folder, folder / index, tensors_of)
        found = sorted(folder.glob(others))
        if folder / single in found:
            if len(found) > 1:  # the converter would read them all
                extra = next(p.name for p in found if p.name != single)
                raise CheckpointError(f"{folder}: {extra} stands beside {single} and there is no {index}; remove one")
            return (folder / single,), tensors_of(folder / single)
        if found:
            raise CheckpointError(
                f"{folder}: no model.safetensors and no {INDEX}: found {found[0].name}, but no {single} and no {index}"
            )
    names = sorted(p.name for p in folder.glob("*.safetensors") if not p.name.startswith("adapter_"))
    if not names and (other := kinds.folder_reason(folder)):
        raise CheckpointError(other)
    hint = f"found {names[0]}, but no {INDEX}" if names else "no safetensors and no pytorch_model.bin"
    raise CheckpointError(f"{folder}: no model.safetensors and no {INDEX}: {hint}")


def _check_sharded(
    folder: Path, index_path: Path, tensors_of: Callable[[Path], dict[str, int]]
) -> tuple[tuple[Path, ...], dict[str, int]]:
    index = index_path.name
    weight_map = load_json(index_path).get("weight_map")
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
    tensors: dict[str, int] = {}
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
        tensors |= present
    if extra := sorted(set(owner) - set(weight_map)):  # the converter refuses it too, later
        raise CheckpointError(
            f"{folder / owner[extra[0]]}: tensor {show(extra[0])} is not named by {index}; is it another model's index?"
        )
    return tuple(folder / s for s in sorted(wanted)), tensors


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


def to_bf16_gguf(checkpoint: Checkpoint, out: Path) -> Iterator[str]:
    """Run llama.cpp's converter: checkpoint -> bf16 GGUF at `out`. Yields its log lines as they come.

    Raises CheckpointError if the converter fails, with the reason; the process dies with the generator.
    """
    script, log = install.converter(), ConverterLog()
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    job = log.job(checkpoint.trust_code, checkpoint.pre_tokenizer)
    command = [sys.executable, "-I", "-u", hooks.__file__, str(script), job, str(checkpoint.folder)]
    command += ["--outtype", "bf16", "--outfile", str(out)]
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if not log.take(line.rstrip()):
                yield line.rstrip()
        code = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        process.stdout.close()
    if code:
        raise CheckpointError(log.reason(checkpoint.folder, checkpoint.architecture, code))
    if log.unknown_pre:
        name = pre_tokenizers.required_of(out, log.sample, str(checkpoint.folder))
        yield f"again, with the pre-tokenizer {name}"
        yield from to_bf16_gguf(replace(checkpoint, pre_tokenizer=name), out)


def transformers_reason(e: Exception) -> str:
    """What transformers has to say, in one line. Its long text about code of the checkpoint's own becomes ours."""
    return hooks.UNTRUSTED if "trust_remote_code" in str(e) else " ".join(str(e).split())[:200]
