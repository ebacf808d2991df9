"""The patched runtime: finds it, checks it, and is the only importer of llama_cpp.

`tools/build_runtime.py` builds the wheel llama-cpp-python 0.3.36+ptqtp.N. Beside the Python bindings it holds the
command-line tools (llama_cpp/bin) and llama.cpp's converter with its own gguf-py (llama_cpp/convert).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import InputError, RuntimeMissing

HOW_TO_BUILD = (
    "build it with 'python tools/build_runtime.py' in the project's folder (or 'make'), then pip install the wheel"
)


def version() -> str:
    """Version of the installed llama-cpp-python. Raises RuntimeMissing if there is none, or a stock one."""
    try:
        found = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeMissing(f"the patched llama-cpp-python is not installed; {HOW_TO_BUILD}") from None
    if "+ptqtp." not in found:
        raise RuntimeMissing(
            f"llama-cpp-python {found} is a stock build that does not know TP2_0 and TP2_1; {HOW_TO_BUILD}"
        )
    return found


def package_dir() -> Path:
    """Folder of the installed llama_cpp package, without importing it (the import loads the libraries)."""
    version()
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeMissing(f"llama-cpp-python is installed but its package is not; {HOW_TO_BUILD}")
    return Path(next(iter(spec.submodule_search_locations)))


def tool(name: str) -> Path:
    """Path of one of llama.cpp's tools, such as llama-quantize. Raises RuntimeMissing."""
    path = package_dir() / "bin" / (name + (".exe" if os.name == "nt" else ""))
    if not path.is_file():
        raise RuntimeMissing(f"tool {name} is missing at {path}; {HOW_TO_BUILD}")
    return path


def converter() -> Path:
    """Path of llama.cpp's convert_hf_to_gguf.py. Raises RuntimeMissing."""
    path = package_dir() / "convert" / "convert_hf_to_gguf.py"
    if not path.is_file():
        raise RuntimeMissing(f"llama.cpp's converter is missing at {path}; {HOW_TO_BUILD}")
    return path


def run_tool(name: str, *args: str, timeout: float | None = None) -> str:
    """Run a tool and return its standard output and error together. Raises RuntimeMissing if it fails."""
    done = subprocess.run(
        [str(tool(name)), *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout, check=False
    )
    text = done.stdout.decode(errors="replace")
    if done.returncode:
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "no output")
        raise RuntimeMissing(f"{name} failed with exit code {done.returncode}: {last.strip()}")
    return text


def load(path: Path, *, n_ctx: int = 2048, threads: int | None = None, verbose: bool = False) -> Any:
    """Open a GGUF file as llama_cpp.Llama. Raises InputError if the runtime cannot load it."""
    version()
    import llama_cpp

    try:
        return llama_cpp.Llama(str(path), n_ctx=n_ctx, n_threads=threads, verbose=verbose)
    except (ValueError, RuntimeError) as e:
        raise InputError(f"{path}: the runtime cannot load this file: {e}") from None


def generate(
    model: Any, prompt: str, *, max_tokens: int, temperature: float, seed: int, stop: list[str] | None = None
) -> Iterator[str]:
    """Continue the prompt; yields pieces of text as they come. temperature 0 = greedy."""
    stream = model.create_completion(
        prompt, max_tokens=max_tokens, temperature=temperature, seed=seed, stop=stop or [], stream=True
    )
    for piece in stream:
        yield piece["choices"][0]["text"]
