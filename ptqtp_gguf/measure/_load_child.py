"""A process of its own that opens a GGUF file as a user of llama-cpp-python does, and tells what that took.

    python -m ptqtp_gguf.measure._load_child FILE THREADS PROMPT GENERATE      (rounds.py runs it)

Prints one JSON object: load_s, the time to open the file; ttft_s, from a prompt of PROMPT tokens to the first token of
the answer; peak_memory, bytes at the peak until then, Python's own (some 60 MB) counted; energy, J a token over
GENERATE tokens more, what the CPU takes when idle counted. What the system does not tell is null.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from ..errors import PtqtpError
from ..llamacpp import load, system_info
from .energy import Rapl

CONTEXT = 2048  # the default of `run`; longer only for longer prompts


def peak_memory() -> int | None:
    """Bytes at the peak of this process, mapped files counted. Not ru_maxrss on Linux: exec hands on the parent's."""
    try:
        if sys.platform == "darwin":
            import resource

            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) << 10
    except (OSError, IndexError, ValueError):
        return None


def measure(path: Path, threads: int, prompt: int, generate: int, rapl: Rapl | None = None) -> dict[str, float | None]:
    """Open the file, take a prompt in, make a token; then `generate` more if energy can be read. Raises InputError."""
    system_info()  # imports llama_cpp: not a part of opening a file
    rapl = rapl or Rapl()
    start = time.perf_counter()
    model = load(path, n_ctx=max(CONTEXT, prompt + generate + 1), threads=threads)
    loaded = time.perf_counter()
    vocab = model.n_vocab()
    model.eval([7919 * i % vocab for i in range(prompt)])
    token = model.sample(temp=0.0)
    first = time.perf_counter()
    result: dict[str, float | None] = {"load_s": loaded - start, "ttft_s": first - loaded, "peak_memory": peak_memory()}
    before = rapl.read()
    if before and generate:
        for _ in range(generate):
            model.eval([token])
            token = model.sample(temp=0.0)
    used = rapl.joules(before, rapl.read())
    result["energy"] = used / generate if used is not None and generate else None
    return result


def main() -> None:
    """Measure and print; an error is one line on standard error."""
    path, *numbers = sys.argv[1:]
    try:
        threads, prompt, generate = map(int, numbers)
        print(json.dumps(measure(Path(path), threads, prompt, generate)))
    except PtqtpError as e:
        sys.exit(str(e))


if __name__ == "__main__":
    main()
