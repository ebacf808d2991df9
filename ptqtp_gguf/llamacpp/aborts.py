"""What a native library prints where it gives up, and how it ends the process: one line and exit code 1.

ggml ends its process where it cannot go on: GGML_ASSERT, or a C++ exception that nobody catches. Left alone it starts a
debugger first, prints a backtrace and dies of SIGABRT.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Callable

Tell = Callable[[str], None]

_tell: Tell | None = None
_kept: list[object] = []  # callbacks live as long as C may call them


def end_in_one_line(tell: Tell) -> None:
    """From now on `tell` gets one line where a native library gives up, and the process ends with exit code 1.

    Call it before the runtime is loaded, whose debugger it turns off; `arm` does the rest. For a program of its own,
    such as the command line: in other people's processes the end is theirs to choose.
    """
    global _tell
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    _tell = tell


def arm(library: ctypes.CDLL) -> None:
    """Take over from libggml-base, just loaded, where `end_in_one_line` was called.

    ggml_set_abort_callback is of ggml.h. set_terminate is std::set_terminate, under the name that it has on Linux and
    macOS; where it has another, the C++ library prints its own line, and the process dies of SIGABRT.
    """
    if _tell is None or _kept:
        return
    on_abort = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(lambda text: gave_up(text.decode(errors="replace")))
    on_terminate = ctypes.CFUNCTYPE(None)(lambda: gave_up(f"a C++ exception that nobody catches, {_kind(library)}"))
    _kept.extend((on_abort, on_terminate))
    library.ggml_set_abort_callback.argtypes = [ctypes.c_void_p]
    library.ggml_set_abort_callback.restype = ctypes.c_void_p
    library.ggml_set_abort_callback(ctypes.cast(on_abort, ctypes.c_void_p))
    with contextlib.suppress(AttributeError):
        library._ZSt13set_terminatePFvvE(on_terminate)


def gave_up(why: str) -> None:
    """Tell it in one line and end the process, in whatever thread; does nothing where nobody has asked for it."""
    if _tell is None:
        return
    try:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        _tell(f"the runtime gave up: {short(why)}")
    finally:
        os._exit(1)


def short(text: str) -> str:
    """ "/long/way/ggml.c:12: GGML_ASSERT(x) failed" without the way, which is that of whoever built it."""
    return re.sub(r"^\S*[/\\](?=[^/\\\s]+:\d+: )", "", " ".join(text.split()))


def _kind(library: ctypes.CDLL) -> str:
    """The type of the C++ exception that is in flight: "std::out_of_range" (Itanium C++ ABI, abi::__cxa_*)."""
    try:
        current, demangle = library.__cxa_current_exception_type, library.__cxa_demangle
    except AttributeError:
        return "of an unknown type"
    current.restype, demangle.restype = ctypes.c_void_p, ctypes.c_char_p
    demangle.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    info = current()
    if not info:
        return "of an unknown type"
    # std::type_info: a pointer to its functions, then its name
    name = ctypes.c_char_p.from_address(info + ctypes.sizeof(ctypes.c_void_p)).value or b""
    return (demangle(name, None, None, None) or name).decode(errors="replace")
