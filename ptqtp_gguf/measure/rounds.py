"""One round of measurements: every file once, by llama-bench and by a process that loads it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BenchError
from ..llamacpp import install, why_not_loadable
from . import machine

Round = dict[str, Any]  # what a round measured, fit for JSON: see one_round

# not -m, which would take a package in the current folder for ours
LOAD = "import sys; sys.path.insert(0, sys.argv.pop(1)); from ptqtp_gguf.measure._load_child import main; main()"
DEFAULT_FIRST = 128  # tokens of the prompt before the first token, where no prompts are measured


@dataclass(frozen=True)
class Settings:
    """Lengths in tokens; threads, each measured; rounds."""

    prompt: tuple[int, ...]
    generate: tuple[int, ...]
    threads: tuple[int, ...]
    rounds: int

    @property
    def tests(self) -> list[tuple[str, int, int]]:
        """(name, tokens of the prompt, tokens generated); one of the numbers is 0."""
        return [(f"pp{n}", n, 0) for n in self.prompt] + [(f"tg{n}", 0, n) for n in self.generate]

    @property
    def keys(self) -> list[str]:
        """A test with so many threads: "tg64 t2"."""
        return [f"{name} t{t}" for t in self.threads for name, _, _ in self.tests]

    @property
    def first(self) -> int:
        """Tokens of the prompt before the first token."""
        return self.prompt[0] if self.prompt else DEFAULT_FIRST

    @property
    def first_of(self) -> list[int]:
        """What the time to the first token depends on: tokens of the prompt, threads."""
        return [self.first, max(self.threads)]

    def steps(self, files: int) -> int:
        """Runs of a round, for progress."""
        return len(self.threads) * (1 + files) + files


@dataclass(frozen=True)
class File:
    """A file to measure. Bytes: of the file (all its parts), and of the weights that a decoded token reads."""

    path: Path
    label: str
    size: int
    token_bytes: int


def one_round(settings: Settings, files: list[File], number: int, report: Callable[[int, str], None]) -> Round:
    """Every file once: {"number", "sizes", "bandwidth" by threads, "speed" and "start" by label, ...}."""
    turn = number % len(files)
    order = files[turn:] + files[:turn]
    before, load_before = machine.moment(), machine.load()
    bandwidth: dict[str, float] = {}
    speed: dict[str, dict[str, float]] = {f.label: {} for f in files}
    start: dict[str, dict[str, float | None]] = {}
    step = 0
    for t in settings.threads:
        report(step, "memory")
        bandwidth[str(t)] = machine.read_bandwidth(t)
        step += 1
        for f in order:
            report(step, f"{f.label}, {t} thread{'s' * (t > 1)}")
            speed[f.label].update(_llama_bench(f, settings, t))
            step += 1
    for f in order:
        report(step, f"{f.label}, first token")
        start[f.label] = _first_token(f, settings)
        step += 1
    return {
        "number": number,
        "sizes": {f.label: f.size for f in files},
        "bandwidth": bandwidth,
        "speed": speed,
        "start": start,
        "first_of": settings.first_of,
        "busy": machine.busy_share(before, machine.moment()),
        "load": [load_before, machine.load()],
    }


def fits(found: Round, settings: Settings, files: list[File]) -> bool:
    """Whether a round measured before holds all that is needed, of files that are as large as these."""
    try:
        return (
            found["first_of"] == settings.first_of
            and all(
                found["sizes"][f.label] == f.size
                and all(found["speed"][f.label][key] > 0 for key in settings.keys)
                and {"load_s", "ttft_s", "peak_memory", "energy"} <= found["start"][f.label].keys()
                for f in files
            )
            and all(found["bandwidth"][str(t)] > 0 and "busy" in found and found["load"] for t in settings.threads)
        )
    except (KeyError, TypeError, AttributeError):
        return False


def _run(args: list[str], file: File, what: str) -> str:
    """A child's standard output. Raises BenchError with its last line if it fails."""
    done = subprocess.run(args, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        lack = "; memory is likely short" if name == "SIGKILL" else ""
        why = None if lack else why_not_loadable(file.path)
        raise BenchError(f"{file.path}: {what} was ended by {name}{lack}{f': {why}' if why else ''}")
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        why = why_not_loadable(file.path) or (said[-1] if said else "it says nothing")  # llama-bench does not tell
        raise BenchError(f"{file.path}: {what} failed: {why}")
    return done.stdout


def _llama_bench(file: File, settings: Settings, threads: int) -> dict[str, float]:
    """Tokens a second of each test; llama-bench warms up before each."""
    # on the CPU, also where the build could use something else: our types run there
    args = [str(install.tool("llama-bench")), "-m", str(file.path), "-t", str(threads), "-r", "1", "-o", "json"]
    args += ["-p", ",".join(map(str, settings.prompt)) or "0", "-n", ",".join(map(str, settings.generate)) or "0"]
    return parse(_run([*args, "-ngl", "0", "-nopo", "1"], file, "llama-bench"), settings, threads, file.path)


def parse(text: str, settings: Settings, threads: int, path: Path) -> dict[str, float]:
    """llama-bench's JSON -> tokens a second by key. Raises BenchError if a test lacks."""
    try:
        results = {(r["n_prompt"], r["n_gen"]): float(r["avg_ts"]) for r in json.loads(text)}
        return {f"{name} t{threads}": results[n_prompt, n_gen] for name, n_prompt, n_gen in settings.tests}
    except (ValueError, KeyError, TypeError) as e:
        raise BenchError(f"{path}: llama-bench's output lacks a test or is not JSON ({e!r}): {text[:200]!r}") from None


def _first_token(file: File, settings: Settings) -> dict[str, float | None]:
    """What _load_child tells."""
    numbers = max(settings.threads), settings.first, max(settings.generate, default=0)
    args = [sys.executable, "-c", LOAD, str(Path(__file__).parents[2]), str(file.path), *map(str, numbers)]
    result: dict[str, float | None] = json.loads(_run(args, file, "loading").splitlines()[-1])
    return result
