"""What accuracy.py stands on: llama.cpp's tools and what they print, what is in a file, the rows that are kept."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from ptqtp_gguf.files.gguf import TYPE_IDS, Reader, TensorInfo, type_block
from ptqtp_gguf.inspect.contents import inspect

REPO = Path(__file__).resolve().parents[2]
NOMINAL = {"IQ3_M": "IQ3_S", "IQ2_M": "IQ2_S"}  # mixtures whose name is no type; Q4_K_M and the like lose their suffix

Row = dict[str, Any]


class Stop(Exception):
    """One line for the user."""


class OutOfTime(Exception):
    """--minutes are over."""


# ---- llama.cpp's tools ----

NUMBER = r"(-?(?:[0-9.]+(?:[eE][+-]?[0-9]+)?|nan|inf))"
PRINTED = {  # what llama-perplexity --kl-divergence prints; "x +/- its standard error" where the second name is given
    r"Mean PPL\(Q\)\s*": ("ppl", "ppl_se"),
    r"Mean PPL\(base\)\s*": ("ppl_reference", None),
    r"Mean PPL\(Q\)/PPL\(base\)\s*": ("ppl_ratio", "ppl_ratio_se"),
    r"Mean\s+KLD": ("kld", "kld_se"),
    r"Median\s+KLD": ("kld_median", None),
    r"99\.9%\s+KLD": ("kld_999", None),
    r"RMS \u0394p\s*": ("rms_dp", "rms_dp_se"),
    r"Same top p": ("same_top", "same_top_se"),
}


# llama.cpp writes its log from a thread that the process does not wait for when it ends: on a busy machine the last
# lines, which are the figures, get lost. Preloaded, this gives that thread a moment.
LINGER = """
#include <unistd.h>
__attribute__((destructor)) static void linger(void) { usleep(300000); }
"""


def parse(text: str) -> dict[str, float | None]:
    """The figures of llama-perplexity --kl-divergence: same_top and rms_dp in per cent, None for NaN and Inf.

    Raises Stop where a line is missing.
    """
    found: dict[str, float | None] = {}
    for pattern, (name, error) in PRINTED.items():
        match = re.search(rf"^{pattern}:\s*{NUMBER}(?:\s*\u00b1\s*{NUMBER})?", text, re.MULTILINE)
        if not match or (error and match[2] is None):
            last = next((line for line in reversed(text.splitlines()) if line.strip()), "nothing")
            raise Stop(f"llama-perplexity printed no figure for {name}; its last line: {last.strip()}")
        for key, value in ((name, match[1]), (error, match[2])):
            if key:
                found[key] = float(value) if math.isfinite(float(value)) else None
    return found


def is_whole(text: str) -> bool:
    """Whether the last figure that llama-perplexity prints is there."""
    return re.search(r"^Same top p:", text, re.MULTILINE) is not None


class Tools:
    """Runs programs, several at a time, each until the time is over; kills them all when asked to."""

    def __init__(self, minutes: float | None) -> None:
        self.end = time.monotonic() + 60 * minutes if minutes else math.inf
        self.running: set[subprocess.Popen[bytes]] = set()
        self.lock = threading.Lock()
        self.halted = False
        self.folder = ""

    @cached_property
    def environment(self) -> dict[str, str]:
        """With LINGER where it can be had: a C compiler, and a system with LD_PRELOAD."""
        compiler = shutil.which(os.environ.get("CC", "cc"))
        if not compiler or not sys.platform.startswith("linux"):
            return dict(os.environ)
        self.folder = tempfile.mkdtemp()
        library = Path(self.folder) / "linger.so"
        command = [compiler, "-shared", "-fPIC", "-o", str(library), "-x", "c", "-"]
        done = subprocess.run(command, input=LINGER.encode(), capture_output=True, check=False)
        return {**os.environ, "LD_PRELOAD": str(library)} if done.returncode == 0 else dict(os.environ)

    def run(self, *command: object, linger: bool = False) -> str:
        """Output and errors together. Raises Stop where it fails, OutOfTime.

        linger  the program is one that may leave before its output is written
        """
        environment = self.environment if linger else None
        with self.lock:
            left = self.end - time.monotonic()
            if self.halted or left <= 0:
                raise OutOfTime
            words = [str(c) for c in command]
            process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
            self.running.add(process)
        try:
            out, _ = process.communicate(timeout=None if left == math.inf else left)
        except subprocess.TimeoutExpired:
            raise OutOfTime from None
        finally:
            process.kill()
            process.wait()
            with self.lock:
                self.running.discard(process)
        text = out.decode(errors="replace")
        if self.halted:
            raise OutOfTime
        if process.returncode:
            last = next((line for line in reversed(text.splitlines()) if line.strip()), "no output")
            name = Path(str(command[0])).name
            raise Stop(f"{name} failed with exit code {process.returncode}: {last.strip()}")
        return text

    def halt(self) -> None:
        with self.lock:
            self.halted = True
            for process in self.running:
                process.kill()
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


# ---- files ----


@cache
def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def is_block_matrix(t: TensorInfo) -> bool:
    return t.name.startswith("blk.") and len(t.shape) >= 2


def facts(path: Path, block: int, weights: int | None = None) -> Row:
    """What a GGUF file really holds.

    block    weights a block of the type that was asked for: rows that are no multiple of it fall back to another
    weights  of the reference: then bits per weight count a head stored apart as what it costs
    """
    report = inspect(path)
    with Reader(path) as r:
        matrices = [t for t in r.tensors if is_block_matrix(t)]
        total = sum(t.n_weights for t in matrices)
        weights = weights or report.weights
        digest = hashlib.sha256(repr([(t.name, t.shape, t.type) for t in r.tensors]).encode())
        for t in r.tensors:
            digest.update(r.bytes_of(t).data)
        kind = {t.name: t.type_name for t in r.tensors}
        return {
            "size": r.size,
            "weights": weights,
            "bpw": 8 * r.size / weights,
            "bpw_blocks": report.bpw_blocks,
            "shares": report.types,
            "fell_back": sum(t.n_weights for t in matrices if t.shape[0] % block) / total,
            "embedding": kind.get("token_embd.weight", "none"),
            "head": kind.get("output.weight", "tied"),
            "data": digest.hexdigest(),  # tensors alone: an importance matrix leaves its name in the metadata
        }


def block_of(kind: str) -> int:
    """Weights a block of the type that a llama-quantize type stands for: 256 for Q4_K_M, 32 for Q4_0."""
    for name in (kind, NOMINAL.get(kind, kind), re.sub(r"_[SML]$", "", kind)):
        if name in TYPE_IDS:
            return type_block(TYPE_IDS[name])
    raise Stop(f"--types: {kind} is no type of llama-quantize's known here")


class Results:
    """DIR/results.json: rows by key, written anew after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.Lock()
        held = json.loads(path.read_text()) if path.exists() else {}
        self.rows: dict[str, Row] = held.get("rows", {})
        self.runs: list[Row] = held.get("runs", [])

    def save(self) -> None:
        part = self.path.with_suffix(".partial")
        part.write_text(json.dumps({"runs": self.runs, "rows": self.rows}, indent=1) + "\n")
        part.replace(self.path)

    def add(self, key: str, row: Row) -> None:
        with self.lock:
            self.rows[key] = row
            self.save()

    def merge(self, path: Path) -> None:
        other = Results(path)
        done = {key: row for key, row in other.rows.items() if "error" not in row}
        self.rows |= {key: row for key, row in other.rows.items() if key not in self.rows} | done
        self.runs += [run for run in other.runs if run not in self.runs]

    def find(self, like: Row) -> Row | None:
        """A finished row of these values."""
        with self.lock:
            rows = list(self.rows.values())
        return next((r for r in rows if "error" not in r and all(r.get(k) == v for k, v in like.items())), None)

    def done(self, key: str) -> bool:
        return key in self.rows and "error" not in self.rows[key]


# ---- where and when ----


@cache
def commit() -> str:
    """PTQTP_COMMIT, or git's, where there is one."""
    given = os.environ.get("PTQTP_COMMIT")
    git = shutil.which("git")
    if given or not git:
        return given or "unknown"
    done = subprocess.run([git, "-C", str(REPO), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def machine() -> str:
    name = platform.processor() or platform.machine()
    try:
        name = next(x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name"))
        name = name.partition(":")[2].strip()
    except (OSError, StopIteration):
        pass
    return f"{os.cpu_count()} cores of {name}"
