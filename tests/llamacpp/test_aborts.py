"""Where the runtime gives up, in a process of its own: one line and exit code 1, if that was asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.runtime

PROGRAM = """
import sys, threading
from ptqtp_gguf.llamacpp import end_in_one_line, install
if sys.argv[1] == "asked":
    end_in_one_line(lambda why: print("told:", why, file=sys.stderr))
library = install.ggml_library()
print("before", end="")  # is not lost
def abort():
    library.ggml_abort(b"/long/way/ggml.c", 12, b"GGML_ASSERT(%s) failed", b"a == b")
"""
WAYS = {
    "assert": ("abort()", "ggml.c:12: GGML_ASSERT(a == b) failed"),
    "assert in a thread": (
        "t = threading.Thread(target=abort); t.start(); t.join()",
        "ggml.c:12: GGML_ASSERT(a == b) failed",
    ),
    "assert while servers are used": (  # by then rpc.py has a handler of its own
        "import ctypes; from ptqtp_gguf.llamacpp import rpc\n"
        "library.ggml_set_abort_callback(ctypes.cast(rpc._ABORTED, ctypes.c_void_p)); abort()",
        "ggml.c:12: GGML_ASSERT(a == b) failed",
    ),
    "exception": (
        "library._ZSt20__throw_out_of_rangePKc(b'unordered_map::at')",
        "a C++ exception that nobody catches, std::out_of_range",
    ),
}


def run(way: str, asked: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"{PROGRAM}\n{WAYS[way][0]}", asked]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="names of libstdc++")
@pytest.mark.parametrize("way", WAYS)
def test_one_line(way: str) -> None:
    done = run(way, "asked")
    assert (done.returncode, done.stdout) == (1, "before")
    assert done.stderr == f"told: the runtime gave up: {WAYS[way][1]}\n"


@pytest.mark.skipif(sys.platform != "linux", reason="signals")
def test_other_programs_end_as_they_would() -> None:
    done = run("assert", "not asked")
    assert done.returncode == -6 and "/long/way/ggml.c:12: GGML_ASSERT(a == b) failed" in done.stderr
