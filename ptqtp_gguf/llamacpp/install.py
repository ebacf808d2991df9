"""The patched llama-cpp-python: found, checked by its version, its tools run, its libraries opened.

It lies in this package, where that came as a wheel for a platform (tools/build/wheels.py). Else it is the package
llama_cpp of the wheel llama-cpp-python 0.3.36+ptqtp.N that tools/build/build_runtime.py builds. Beside the Python
bindings it holds the command-line tools (bin) and llama.cpp's converter with its own gguf-py (convert). Its
libggml-base is opened here, without the Python package around it: it quantizes and dequantizes stock types (`ggml.py`).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from ..codec import BY_NAME
from ..errors import RuntimeMissing
from . import aborts, bindings

HOW_TO_BUILD = (
    "install ptqtp-gguf again"
    if bindings.bundled()
    else "build it with 'python tools/build/build_runtime.py' in the project's folder (or 'make'), "
    "then pip install the wheel"
)
LIB_PATH = "LLAMA_CPP_LIB_PATH"  # llama-cpp-python's: where its libraries lie
_VERSION = re.compile(r'^__version__ = "([^"]+)"$', re.MULTILINE)


def version() -> str:
    """Version of the patched llama-cpp-python. Raises RuntimeMissing if there is none, or a stock one."""
    if bindings.bundled():
        stated = _VERSION.search((bindings.BUNDLED / "__init__.py").read_text(encoding="utf-8"))
        if not stated:
            raise RuntimeMissing(f"{bindings.BUNDLED}: damaged; {HOW_TO_BUILD}")
        return stated[1]
    found = _installed()
    if not found:
        raise RuntimeMissing(f"the patched llama-cpp-python is not installed; {HOW_TO_BUILD}")
    if "+ptqtp." not in found:
        raise RuntimeMissing(
            f"llama-cpp-python {found} is a stock build that does not know {' and '.join(BY_NAME)}; {HOW_TO_BUILD}"
        )
    return found


def broken(what: str) -> RuntimeMissing:
    """The error for an installed runtime that does not work."""
    return RuntimeMissing(f"the runtime is installed but {what}; {HOW_TO_BUILD}")


def _installed() -> str:
    """Version of the llama-cpp-python that is installed; "" = none."""
    try:
        return importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return ""


def point_llama_cpp() -> Path:
    """Let the installed llama_cpp, of the version that was patched, use the patched libraries; returns their folder.

    For this process and those that it starts, by the variable LLAMA_CPP_LIB_PATH that llama-cpp-python reads; so before
    llama_cpp is imported for the first time. Raises RuntimeMissing where another version is installed, or none, or
    llama_cpp is there already.
    """
    ours, found = version(), _installed()
    folder = package_dir() / "lib"
    if not found:
        raise RuntimeMissing(f"no llama-cpp-python is installed; pip install llama-cpp-python=={_stock(ours)}")
    if _stock(found) != _stock(ours):
        raise RuntimeMissing(
            f"llama-cpp-python {found} is installed, and the libraries here fit {_stock(ours)} alone; "
            f"pip install llama-cpp-python=={_stock(ours)}"
        )
    if found != ours:  # else they are its own
        if "llama_cpp" in sys.modules and os.environ.get(LIB_PATH) != str(folder):
            raise RuntimeMissing("llama_cpp is imported already, with its own libraries; call this before that")
        os.environ[LIB_PATH] = str(folder)
    return folder


def _stock(version: str) -> str:
    return version.partition("+")[0]


def package_dir() -> Path:
    """Folder of the patched llama_cpp package, without importing it (the import loads the libraries)."""
    version()
    if bindings.bundled():
        return bindings.BUNDLED
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


_TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _Traits(ctypes.Structure):
    """struct ggml_type_traits of ggml.h, as far as it is read here."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", _TO_FLOAT),
    )


def _library(name: str) -> ctypes.CDLL:
    """One of the wheel's libraries, by its plain name. Raises RuntimeMissing."""
    file = {"darwin": f"lib{name}.dylib", "win32": f"{name}.dll"}.get(sys.platform, f"lib{name}.so")
    path = package_dir() / "lib" / file
    try:
        return ctypes.CDLL(str(path))
    except OSError as e:
        raise RuntimeMissing(f"the runtime's library {path} cannot be loaded: {e}; {HOW_TO_BUILD}") from None


@functools.cache
def ggml_library() -> ctypes.CDLL:
    """The patched build's libggml-base with its quantizers declared. Raises RuntimeMissing.

    Its calls release the GIL. Pointers are passed as integers (`array.ctypes.data`).
    """
    lib = _library("ggml-base")
    aborts.arm(lib)
    i, i64, p = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    lib.ggml_quantize_init.argtypes, lib.ggml_quantize_init.restype = [i], None
    lib.ggml_quantize_requires_imatrix.argtypes, lib.ggml_quantize_requires_imatrix.restype = [i], ctypes.c_bool
    lib.ggml_quantize_chunk.argtypes, lib.ggml_quantize_chunk.restype = [i, p, p, i64, i64, i64, p], ctypes.c_size_t
    lib.ggml_validate_row_data.argtypes, lib.ggml_validate_row_data.restype = [i, p, ctypes.c_size_t], ctypes.c_bool
    lib.ggml_get_type_traits.argtypes, lib.ggml_get_type_traits.restype = [i], ctypes.POINTER(_Traits)
    return lib


def run_tool(name: str, *args: str, timeout: float | None = None, codes: tuple[int, ...] = (0,)) -> str:
    """Run a tool and return its standard output and error together. Raises RuntimeMissing if it fails.

    codes: exit codes that are not a failure
    """
    done = subprocess.run(
        [str(tool(name)), *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout, check=False
    )
    text = done.stdout.decode(errors="replace")
    if done.returncode not in codes:
        raise _failed(name, done.returncode, text.splitlines())
    return text


def stream_tool(name: str, *args: str) -> Iterator[str]:
    """Run a tool; yields lines of its standard output and error as they come. Raises RuntimeMissing if it fails.

    It is killed where the caller stops reading.
    """
    last: deque[str] = deque(maxlen=20)
    with subprocess.Popen([str(tool(name)), *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout
        try:
            for raw in process.stdout:
                last.append(raw.decode(errors="replace").rstrip())
                yield last[-1]
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise _failed(name, process.returncode, list(last))


def _failed(name: str, code: int, lines: list[str]) -> RuntimeMissing:
    last = next((line for line in reversed(lines) if line.strip()), "no output")
    return RuntimeMissing(f"{name} failed with exit code {code}: {last.strip()}")


def quantize_libraries() -> list[Path]:
    """The libraries that decide what llama-quantize writes. Raises RuntimeMissing."""
    folder = package_dir() / "lib"
    found = sorted(p for p in folder.iterdir() if re.match(r"(lib)?(llama|ggml-base)\.", p.name))
    if not found:
        raise RuntimeMissing(f"the runtime's libraries are missing in {folder}; {HOW_TO_BUILD}")
    return found
