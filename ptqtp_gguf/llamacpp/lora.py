"""LoRA adapters as GGUF files, named as FILE or FILE:SCALE."""

from __future__ import annotations

import math
from pathlib import Path

from ..errors import InputError
from ..files import Reader

Adapter = tuple[Path, float]  # (file, scale)
HOW = "make one of an adapter's folder with llama.cpp's convert_lora_to_gguf.py"


def adapter(text: str) -> Adapter:
    """ "a.gguf" -> (a.gguf, 1.0); "a.gguf:0.5" -> (a.gguf, 0.5). Raises InputError where the file is no adapter."""
    name, _, number = text.rpartition(":")
    path, scale = Path(text), 1.0
    if name and not path.exists():
        try:
            path, scale = Path(name), float(number)
        except ValueError:
            pass
    if not math.isfinite(scale):
        raise InputError(f"--lora {text}: the scale {number} is not finite; give a number, as in a.gguf:0.5")
    if path.is_dir():
        raise InputError(f"{path}: a folder, no LoRA adapter as a GGUF file; {HOW}")
    with Reader(path) as reader:
        kind = reader.get("general.type"), reader.get("adapter.type")
    if kind != ("adapter", "lora"):
        raise InputError(f"{path}: no LoRA adapter, but of the kind {kind[0] or 'model'!r}; {HOW}")
    return path, scale
