"""What tests share that is no fixture."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

if TYPE_CHECKING:
    from ptqtp_gguf.files.gguf import KV

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
REPO = Path(__file__).resolve().parents[2]


def write_gguf(path: Path, tensors: dict[str, np.ndarray], kind: str = "F32", arch: str = "llama") -> Path:
    """A GGUF by gguf-py's own writer: an independent witness of the format."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    writer.add_uint32("llama.block_count", 1)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "a", "\u00fc", "b"])
    writer.add_array("test.floats", [0.5, 1.5])
    writer.add_bool("test.flag", True)
    for name, w in tensors.items():
        if w.ndim == 1 or kind == "F32":
            writer.add_tensor(name, w)
        else:
            q = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(w, q), raw_dtype=q)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rewritten(source: Path, out: Path, change: list[KV], rename: dict[str, str] | None = None) -> Path:
    """A copy of a GGUF with other metadata and names, its tensors' bytes the same."""
    from ptqtp_gguf.files.gguf import OutTensor, Reader, write_stream

    with Reader(source) as r, out.open("wb") as f:
        kvs = {**r.header.kvs, **{kv.key: kv for kv in change}}
        tensors = [OutTensor((rename or {}).get(t.name, t.name), t.shape, t.type) for t in r.tensors]
        data = (np.ascontiguousarray(r.bytes_of(t)) for t in r.tensors)
        for _ in write_stream(f, kvs.values(), tensors, r.header.alignment, data):
            pass
    return out


def load_tool(name: str) -> Any:
    """tools/NAME.py as a module; NAME with its folder."""
    path = REPO / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def demo_folder() -> Path:
    """The demo model's checkpoint; made once, in build/demo."""
    module = load_tool("fixtures/demo_model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers and torch while they read the GGUF
        return Path(module.ensure(REPO / "build" / "demo"))


def copy_tokenizer(folder: Path) -> None:
    """Give a checkpoint the demo model's tokenizer."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((demo_folder() / name).read_bytes())


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    """A safetensors file from a header (JSON or raw bytes) and data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def llama_tool(name: str, *args: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a tool of the patched runtime to its end."""
    from ptqtp_gguf.llamacpp import install

    return subprocess.run(
        [str(install.tool(name)), *map(str, args)],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=600,
        env={**os.environ, **(env or {})},
    )
