"""llama.cpp's log, one for the whole process: of a thread that hushes it nothing is printed, and its errors are kept.

Nothing of the process is changed meanwhile, so threads do not disturb each other. What other threads log goes where it
went before. Imported where it is needed, as llama_cpp comes with it. There is no lock, as the garbage collector may
close a model, which hushes, wherever it likes.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from typing import Any

from . import bindings

llama_cpp = bindings.load()
_ERROR = 4  # GGML_LOG_LEVEL_ERROR


class _Here(threading.local):
    """lists: for each `hushed` of this thread what was complained about since."""

    def __init__(self) -> None:
        self.lists: list[list[str]] = []


_here = _Here()
_before: list[tuple[Any, Any]] = []  # one: what llama.cpp called before us, and with which data


@contextlib.contextmanager
def hushed() -> Iterator[list[str]]:
    """llama.cpp prints nothing for this thread meanwhile; its errors are collected."""
    _take_over()
    mine: list[str] = []
    _here.lists.append(mine)
    try:
        yield mine
    finally:
        _here.lists[:] = [x for x in _here.lists if x is not mine]


def is_hushed() -> bool:
    """Whether this thread is."""
    return bool(_here.lists)


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _listen(level: int, text: bytes, _: object, here: _Here = _here, before: list[tuple[Any, Any]] = _before) -> None:
    # by its defaults it has what it needs, when the interpreter ends and the module's names are gone
    if not here.lists:
        for call, data in before:
            call(level, text, data)
    elif level == _ERROR and text.strip():
        for kept in here.lists:
            kept.append(text.decode(errors="replace").strip())


def _take_over() -> None:
    """Be what llama.cpp calls, also where the program has given it another function since."""
    call, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(call), ctypes.byref(data))
    if ctypes.cast(call, ctypes.c_void_p).value != ctypes.cast(_listen, ctypes.c_void_p).value:
        _before[:] = [(call, data)] if call else []
        llama_cpp.llama_log_set(_listen, None)
