"""PTQTP trit-plane quantization for GGUF: Hugging Face checkpoints to files of 3.5 bits per weight for llama.cpp.

    from ptqtp_gguf import convert, load, evaluate

The names of __all__ are the library's front. Each is read from its room when it is first asked for, so importing the
package costs nothing. None is named like a room: importing that room would take its place.
docs/library.md shows them at work.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .conversion import convert as convert
    from .conversion import dry_run as dry_run
    from .conversion import export_q4_0 as export_q4_0
    from .errors import Interrupted as Interrupted
    from .errors import PtqtpError as PtqtpError
    from .llamacpp import generate as generate
    from .llamacpp import load as load
    from .llamacpp import point_llama_cpp as point_llama_cpp
    from .measure import evaluate as evaluate
    from .plan import Calibration as Calibration
    from .plan import Options as Options
    from .serve import Chat as Chat
    from .serve import Server as Server

__version__ = "0.1.0"

_HOMES = {
    "Calibration": "plan",
    "Chat": "serve",
    "Interrupted": "errors",
    "Options": "plan",
    "PtqtpError": "errors",
    "Server": "serve",
    "convert": "conversion",
    "dry_run": "conversion",
    "evaluate": "measure",
    "export_q4_0": "conversion",
    "generate": "llamacpp",
    "load": "llamacpp",
    "point_llama_cpp": "llamacpp",
}
__all__ = [
    "Calibration",
    "Chat",
    "Interrupted",
    "Options",
    "PtqtpError",
    "Server",
    "convert",
    "dry_run",
    "evaluate",
    "export_q4_0",
    "generate",
    "load",
    "point_llama_cpp",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
