"""Speed of GGUF files side by side on this machine: tokens a second, first token, memory, energy, the roofline.

llama-bench of the patched runtime underneath, one test of each kind at a time. A round measures every file once, in an
order that turns from round to round, so that a machine that drifts hits all alike; ratios are taken round by round.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from ..errors import BenchError
from ..llamacpp import install
from ..progress import Progress, no_progress
from ..source import GgufSource, Source
from ..system import free_memory
from . import machine
from .machine import Machine
from .rounds import File, Round, Settings, fits, one_round
from .statistics import CONFIDENCE, ENOUGH, Spread, ratios, spread

BUSY = 0.1  # share of the CPUs' time used by others, from which figures are doubtful
WIDE = 1.15  # high over low of a ratio's interval, from which it says nothing if 1 lies inside
OVER = 1.05  # share of the roofline, from which it is none


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens a second of a file in one test. n_prompt, n_gen: tokens; samples: a round each, and their median with its
    interval. share: of what the memory's bandwidth allows, None for prompts."""

    test: str
    n_prompt: int = 0
    n_gen: int = 0
    threads: int
    median: float
    low: float | None = None
    high: float | None = None
    samples: list[float] = field(default_factory=list)
    share: float | None = None


@dataclass(frozen=True)
class Ratio:
    """One file's speed over another's, paired by round. clear: whether the interval says which is faster."""

    median: float
    low: float
    high: float
    clear: bool


@dataclass
class Bench:
    """What was measured. as_dict() is the form for JSON; None and null: not known."""

    settings: Settings
    files: list[File]
    rounds: list[Round]
    machine: Machine
    free: int  # bytes of memory free before the first round; 0 = not known

    def samples(self, file: File, key: str) -> list[float]:
        """Tokens a second of a file in a test ("tg64 t2"), round by round."""
        return [float(r["speed"][file.label][key]) for r in self.rounds]

    def speed(self, file: File, key: str) -> Spread:
        """Median tokens a second, and its interval: smallest and largest up to 7 rounds (pairing.spread)."""
        return spread(self.samples(file, key))

    def ratio(self, file: File, other: File, key: str) -> Spread:
        """How many times as fast as the other a file is, paired by round."""
        return ratios(self.samples(file, key), self.samples(other, key))

    @property
    def bandwidth(self) -> dict[int, float]:
        """Bytes a second of memory by threads, best of the rounds: a roof is what can be reached."""
        return {t: max(float(r["bandwidth"][str(t)]) for r in self.rounds) for t in self.settings.threads}

    def share(self, file: File, key: str) -> float | None:
        """How much of the memory's bandwidth decoding uses, 0..1 unless weights stay in caches; None for prompts."""
        if not key.startswith("tg"):
            return None
        return self.speed(file, key).median * file.token_bytes / self.bandwidth[int(key.rpartition(" t")[2])]

    def start(self, file: File, what: str) -> float | None:
        """Median over the rounds of load_s, ttft_s (seconds), peak_memory (bytes) or energy (J a token)."""
        found = [r["start"][file.label][what] for r in self.rounds if r["start"][file.label][what] is not None]
        return median(found) if found else None

    @property
    def warnings(self) -> list[str]:
        """Why the figures may mislead, a line each."""
        return list(_warnings(self))

    def speeds(self, file: File) -> list[Speed]:
        """A file's speeds: the tests of the first number of threads, then of the next."""
        found = []
        for t in self.settings.threads:
            for name, n_prompt, n_gen in self.settings.tests:
                key = f"{name} t{t}"
                s = self.speed(file, key)
                found.append(
                    Speed(
                        test=name,
                        n_prompt=n_prompt,
                        n_gen=n_gen,
                        threads=t,
                        median=s.median,
                        low=s.low,
                        high=s.high,
                        samples=self.samples(file, key),
                        share=self.share(file, key),
                    )
                )
        return found

    def ratios(self, file: File) -> dict[str, dict[str, Ratio]]:
        """A file's speeds over those of each other file, by its label, then by test and threads ("tg64 t2")."""
        return {
            other.label: {key: _ratio(self.ratio(file, other, key)) for key in self.settings.keys}
            for other in self.files
            if other is not file
        }

    @property
    def load(self) -> list[float | None]:
        """The machine's load before the first round and after the last."""
        return [self.rounds[0]["load"][0], self.rounds[-1]["load"][1]]

    def peak_memory(self, file: File) -> int | None:
        """Bytes at the peak of a process that opens the file and answers: median over the rounds."""
        peak = self.start(file, "peak_memory")
        return None if peak is None else round(peak)

    def row(self, file: File) -> dict[str, object]:
        """A file's figures, for JSON."""
        return {
            "label": file.label,
            "file": file.path.name,
            "size": file.size,
            "token_bytes": file.token_bytes,
            "speed": [asdict(s) for s in self.speeds(file)],
            "ratios": {
                label: {key: asdict(r) for key, r in found.items()} for label, found in self.ratios(file).items()
            },
            "load_s": self.start(file, "load_s"),
            "ttft_s": self.start(file, "ttft_s"),
            "peak_memory": self.peak_memory(file),
            "energy": self.start(file, "energy"),
        }

    def as_dict(self) -> dict[str, Any]:
        """For JSON: "machine", "bench", "warnings", "rows"."""
        s = self.settings
        return {
            "machine": {**self.machine.as_dict(), "load": self.load},
            "bench": {
                "prompt": list(s.prompt),
                "generate": list(s.generate),
                "threads": list(s.threads),
                "rounds": len(self.rounds),
                "first": s.first,
                "bandwidth": {str(t): b * 1e-9 for t, b in self.bandwidth.items()},
            },
            "warnings": self.warnings,
            "rows": [self.row(f) for f in self.files],
        }


def _ratio(s: Spread) -> Ratio:
    return Ratio(s.median, s.low, s.high, s.clear)


def bench(
    files: Sequence[Path],
    *,
    labels: Sequence[str] | None = None,
    prompt: Sequence[int] = (128, 512),
    generate: Sequence[int] = (64,),
    threads: Sequence[int] | None = None,
    rounds: int = 5,
    done: Iterable[Round] = (),
    keep: Callable[[Round], None] | None = None,
    progress: Progress = no_progress,
) -> Bench:
    """Measure GGUF files (of a split one, its first part) in rounds.

    labels    what the rows are called, one a file; None: the file's name without .gguf
    prompt    tokens to take in at once, generate: tokens to make one by one; each length is a test
    threads   each number is a test of its own; None: all physical cores
    done      rounds that were measured before, as `keep` got them; those of other files, sizes or settings are left out
    keep      gets each round when it is finished; Ctrl-C goes through and loses only the round at work
    progress  see plan.Progress; counts runs

    Load time, time to the first token (of a prompt of the first length, with the most threads) and peak memory are
    those of a process with llama-cpp-python and a context of 2048 tokens, or what the prompt takes; the file lies in
    the system's cache by then.

    Raises BenchError for arguments or tools that fail, InputError for a file that cannot be read, RuntimeMissing.
    """
    here = machine.describe()
    threads = (here.cores,) if threads is None else threads
    settings = Settings(_numbers(prompt), _numbers(generate), _numbers(threads), rounds)
    _check(settings, files)
    install.tool("llama-bench")
    known = [_file(p, label) for p, label in zip(files, _labels(files, labels), strict=True)]
    result = Bench(settings, known, [r for r in done if fits(r, settings, known)][:rounds], here, free_memory())
    steps = settings.steps(len(known))
    while (number := len(result.rounds)) < rounds:

        def report(step: int, what: str, number: int = number) -> None:
            progress("measuring", number * steps + step, rounds * steps, f"round {number + 1} of {rounds}: {what}")

        result.rounds.append(one_round(settings, known, number, report))
        if keep:
            keep(result.rounds[-1])
    progress("measuring", rounds * steps, rounds * steps, "")
    return result


def _numbers(values: Sequence[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(values))


def _check(settings: Settings, files: Sequence[Path]) -> None:
    if not files:
        raise BenchError("no file to measure; name one or more")
    if settings.rounds < 1:
        raise BenchError(f"{settings.rounds} rounds: at least 1 is needed, {ENOUGH} for clear ratios")
    if not settings.tests or not settings.threads:
        raise BenchError("nothing to measure; give a length of prompt or of what is generated, and a number of threads")
    for what, values in (("threads", settings.threads), ("tokens", settings.prompt + settings.generate)):
        if min(values, default=1) < 1:
            raise BenchError(f"{min(values)} {what}: at least 1 is needed; leave it out instead")


def _labels(files: Sequence[Path], labels: Sequence[str] | None) -> list[str]:
    """One a file, each once."""
    if labels is not None:
        if len(labels) != len(files) or len(set(labels)) != len(labels):
            raise BenchError(f"{len(labels)} labels for {len(files)} files: one a file is needed, each another")
        return list(labels)
    found: list[str] = []
    for path in files:
        label, n = path.name.removesuffix(".gguf"), 1
        while label in found:
            n += 1
            label = f"{path.name.removesuffix('.gguf')} ({n})"
        found.append(label)
    return found


def _file(path: Path, label: str) -> File:
    with GgufSource(path) as source:
        return File(path, label, sum(size for _, size, _ in source.stamp), token_bytes(source))


# ---- what may mislead ----


def _warnings(b: Bench) -> Iterable[str]:
    m, s, n = b.machine, b.settings, len(b.rounds)
    if busy := [r for r in b.rounds if (r["busy"] or 0) > BUSY]:
        most = max(r["busy"] for r in busy)
        yield f"other programs used up to {most:.0%} of the CPUs in {len(busy)} of {n} rounds: speeds may be too low"
    if m.governor and "powersave" in m.governor:
        yield "the CPU's governor is powersave: clocks may be held low; set it to performance for steady figures"
    for t in s.threads:
        if t > m.cpus:
            yield f"{t} threads on {m.cpus} CPUs: they wait for one another"
        elif m.quota and t > m.quota:
            yield f"{t} threads, but the container may take {m.quota:.1f} CPUs' worth of time: they are held up"
    if kernel := os.environ.get("PTQTP_KERNEL"):
        yield f"PTQTP_KERNEL={kernel} forces a kernel"
    for f in b.files:
        if b.free and f.size > b.free:
            yield (
                f"{f.label} has {f.size / 1e6:.0f} MB, {b.free / 1e6:.0f} MB of memory are free: its weights come from "
                "the disk again and again"
            )
    if n < ENOUGH:
        sure = spread([1.0] * n).confidence
        yield (
            f"{n} round{'s' * (n > 1)}: intervals hold the true median with {sure:.0%} only, so no ratio is called "
            f"clear; from {ENOUGH} rounds on with {CONFIDENCE:.0%} and more"
        )
    for key in s.keys:
        pairs = [(f, o, b.ratio(f, o, key)) for i, f in enumerate(b.files) for o in b.files[:i]]
        wide = [
            f"{f.label} / {o.label} {r.low:.2f} to {r.high:.2f}" for f, o, r in pairs if not r.clear and r.width > WIDE
        ]
        if wide:
            more = f" and {len(wide) - 3} more" if len(wide) > 3 else ""
            yield f"{key}: rounds differ too much to tell which is faster: {', '.join(wide[:3])}{more}"
        for f in b.files:
            if (share := b.share(f, key) or 0) > OVER:
                yield f"{f.label}, {key}: {share:.0%} of memory's bandwidth: caches help, or its probe was disturbed"


LOOKED_UP = ("position_embd.weight", "token_types.weight", "per_layer_token_embd.weight")  # only rows of them are read


def token_bytes(source: Source) -> int:
    """Bytes of the matrices that a decoded token reads.

    All but tables of which only rows are looked up (an embedding that is the head too is read as a head); of experts
    those that a token uses; not the blocks that only predict further tokens. Vectors and the cache of keys and values
    are not counted.
    """
    arch = source.get("general.architecture")

    def number(key: str) -> int:
        value = source.get(f"{arch}.{key}")
        return value if isinstance(value, int) else 0

    used, experts = number("expert_used_count"), number("expert_count")
    last = number("block_count") - number("nextn_predict_layers")
    tied = all(t.name != "output.weight" for t in source.tensors)
    total = 0
    for t in source.tensors:
        if len(t.shape) < 2 or t.name in LOOKED_UP or (t.name == "token_embd.weight" and not tied):
            continue
        head, _, rest = t.name.partition(".")
        block = rest.partition(".")[0]
        if head == "blk" and last > 0 and block.isdigit() and int(block) >= last:
            continue
        share = used / experts if "_exps." in t.name and 0 < used <= experts else 1.0
        total += round(t.nbytes * share)
    return total
