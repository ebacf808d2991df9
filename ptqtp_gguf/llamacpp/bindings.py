"""llama-cpp-python's bindings: those in this package, as its wheels have them, else the installed package llama_cpp.

In a wheel they are ptqtp_gguf._llama_cpp (tools/build/wheels.py), so a llama_cpp of any version may be installed
besides, and neither knows of the other.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

BUNDLED = Path(__file__).parents[1] / "_llama_cpp"


def name() -> str:
    """The package's name."""
    return f"{__package__.partition('.')[0]}.{BUNDLED.name}" if bundled() else "llama_cpp"


def bundled() -> bool:
    """Whether the bindings lie in this package."""
    return (BUNDLED / "__init__.py").is_file()


def load(module: str = "") -> Any:
    """The package, or a module of it. Raises what importing it raises."""
    return import_module(f"{name()}.{module}" if module else name())
