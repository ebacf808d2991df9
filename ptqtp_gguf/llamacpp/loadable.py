"""Whether the runtime loads a GGUF file, by trying: it reads the header, and the weights are not touched.

What a file must hold only the runtime knows: which metadata an architecture needs, which tensors, of which shapes. So
it is asked, as llama.cpp does for its own estimate of memory (common/fit.cpp, no_alloc), and in a process of its own,
since it ends its process at some headers. That takes a tenth of a second, and up to half a second more for a large
vocabulary.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ..files import KV, OutTensor, build_header, total_size
from . import _load_child, aborts, bindings, install

# neither the script's folder nor the current one may stand before the modules that it imports
RUN = "import runpy, sys; sys.path = [p for p in sys.path if p]; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
SECONDS = 300.0  # the largest vocabularies take one
SHAPE = re.compile(r"(?P<head>.* has wrong shape; expected (?P<wanted>[\d, ]+), got )(?P<got>[\d, ]+)")
# what() of C++'s own exceptions, which name a container and no cause
WORDLESS = re.compile(r"\b\w*(map|Map_base|vector|deque|array|string)::\w+|\bsto[a-z]+$|invalid \w+<K")


def why_not_loadable(path: Path) -> str | None:
    """Why the runtime does not load a GGUF file, in its words; None: it does. path: of a split file, its first part.

    Raises RuntimeMissing without the patched runtime, OSError where no process can be started.
    """
    folder = str(install.package_dir())
    command = [sys.executable, "-c", RUN, _load_child.__file__, bindings.name(), folder, str(path)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=SECONDS,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"it was not through with the header after {SECONDS:.0f} s"
    said = [line.strip() for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
    if done.returncode == 0:
        return None
    if done.returncode == _load_child.REFUSED:
        return reason(said)
    if done.returncode > 0:
        raise install.broken(f"its bindings cannot be loaded: {said[-1] if said else 'no reason given'}")
    return f"it dies of {signal.Signals(-done.returncode).name}: {_last_words(said)}"


def why_header_not_loadable(kvs: Iterable[KV], tensors: list[OutTensor], alignment: int) -> str | None:
    """The same of a file that is not there yet: its metadata and tensors, as one file. Raises OSError besides, where
    the folder for temporary files does not take a file of that size, which is nearly all hole."""
    kvs = list(kvs)
    with tempfile.TemporaryDirectory(prefix="ptqtp-") as folder:
        path = Path(folder) / "header.gguf"
        path.write_bytes(build_header(kvs, tensors, alignment))
        os.truncate(path, total_size(kvs, tensors, alignment))
        return why_not_loadable(path)


def _last_words(said: list[str]) -> str:
    """What it printed before it died: "ggml.c:12: GGML_ASSERT(x) failed", or C++'s two lines on an exception."""
    if said and re.search(r"\.\w+:\d+: ", said[-1]):
        return aborts.short(said[-1])
    return " ".join(said[-2:]) or "it says nothing"


def reason(said: list[str]) -> str:
    """The cause among the errors that the runtime has logged, the first of which is the nearest to it."""
    if not said:
        return "no reason given"
    why = re.sub(r"^\w+: ", "", " ".join(said[0].split()))
    why = re.sub(r"^(error loading model|failed to initialize the context): (check_tensor_dims: )?", "", why)
    if match := SHAPE.fullmatch(why):  # got has always four dimensions
        wanted, got = (match[k].split(", ") for k in ("wanted", "got"))
        while len(got) > len(wanted) and got[-1] == "1":
            got.pop()
        why = match["head"] + ", ".join(got)
    if WORDLESS.search(why):
        why += " (an exception without a cause: something that it looks up in the metadata is missing or out of range)"
    return why
