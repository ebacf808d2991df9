"""The machine that figures were measured on: what it is, how busy it is, how fast it reads memory.

Everything works where /proc and sysfs lack (macOS, Windows); what cannot be known is None.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..codec import U8, native
from ..errors import BenchError, RuntimeMissing
from ..llamacpp import system_info
from ..system import free_memory

FEATURES = (  # of the flags in /proc/cpuinfo, those that kernels are chosen by
    "ssse3",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "asimd",
    "asimddp",
    "asimdhp",
    "i8mm",
    "sve",
    "sve2",
)
PROBE_BYTES = 1 << 28  # a thread: more than its share of the caches
MIN_PROBE_BYTES = 1 << 24


@dataclass(frozen=True)
class Machine:
    """cores: physical ones that this process may use; cpus: hardware threads; quota: CPUs' worth of time that its
    container may take. memory in bytes. None: not known, or no limit."""

    cpu: str
    cores: int
    cpus: int
    memory: int | None
    os: str
    features: tuple[str, ...]
    kernel: str | None  # of trit-plane matrices, as the patched runtime chose it
    governor: str | None
    quota: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "features": list(self.features)}


def describe(root: Path = Path("/")) -> Machine:
    """Look at this machine. root: where /proc and /sys hang. Raises nothing."""
    cpuinfo = _text(root / "proc/cpuinfo")
    flags = set((_field(cpuinfo, "flags") or _field(cpuinfo, "Features") or "").split())
    allowed = _allowed()
    return Machine(
        cpu=_field(cpuinfo, "model name") or _sysctl("machdep.cpu.brand_string") or platform.processor() or "unknown",
        cores=_cores(root, allowed) or len(allowed),
        cpus=len(allowed),
        memory=_memory(root),
        os=f"{platform.system()} {platform.release()} {platform.machine()}",
        features=tuple(f for f in FEATURES if f in flags),
        kernel=_kernel(),
        governor=_governor(root, allowed),
        quota=_quota(root),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _field(text: str, name: str) -> str | None:
    """Value of the first line "name : value"."""
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip() == name:
            return value.strip()
    return None


def _sysctl(name: str) -> str:
    """A value of macOS; "" elsewhere."""
    if sys.platform != "darwin":
        return ""
    done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _allowed() -> list[int]:
    """Numbers of the CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _cores(root: Path, allowed: list[int]) -> int:
    """Physical cores among the allowed CPUs; 0 where the system does not tell."""
    if sys.platform == "darwin":
        return int(_sysctl("hw.physicalcpu") or 0)
    siblings = {_text(root / f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list") for n in allowed}
    return 0 if "" in siblings else len(siblings)


def _memory(root: Path) -> int | None:
    total = _field(_text(root / "proc/meminfo"), "MemTotal")
    if total:
        return int(total.split()[0]) << 10
    return int(_sysctl("hw.memsize") or 0) or None


def _governor(root: Path, allowed: list[int]) -> str | None:
    paths = (root / f"sys/devices/system/cpu/cpu{n}/cpufreq/scaling_governor" for n in allowed)
    return ", ".join(sorted({_text(p).strip() for p in paths} - {""})) or None


def _quota(root: Path) -> float | None:
    limit, _, period = _text(root / "sys/fs/cgroup/cpu.max").partition(" ")
    return int(limit) / int(period) if limit.isdigit() and int(period or 0) else None


def _kernel() -> str | None:
    try:
        return system_info().get("PTQTP")
    except RuntimeMissing:
        return None


def load() -> float | None:
    """Processes that wanted a CPU, on average over the last minute."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


# ---- who else uses the CPUs ----


@dataclass(frozen=True)
class Moment:
    """CPU seconds since the start: all CPUs, their busy part, and ours (this process, and children that ended)."""

    total: float
    busy: float
    ours: float


def moment(stat: Path = Path("/proc/stat")) -> Moment | None:
    """Read the clocks; None where the system does not tell."""
    fields = _field(_text(stat).replace("cpu ", "cpu: ", 1), "cpu")
    if not fields:
        return None
    # user nice system idle iowait irq softirq steal; guest time is in user already
    ticks = [int(n) / os.sysconf("SC_CLK_TCK") for n in fields.split()[:8]]
    t = os.times()
    idle = sum(ticks[3:5])
    return Moment(sum(ticks), sum(ticks) - idle, t.user + t.system + t.children_user + t.children_system)


def busy_share(before: Moment | None, after: Moment | None) -> float | None:
    """Share of the CPUs' time between two moments that others used (steal by a hypervisor too), 0..1."""
    if before is None or after is None or after.total <= before.total:
        return None
    others = (after.busy - before.busy) - (after.ours - before.ours)
    return min(1.0, max(0.0, others / (after.total - before.total)))


# ---- memory ----


def read_bandwidth(threads: int, seconds: float = 0.4) -> float:
    """Bytes a second that so many threads read from memory together: the best pass within the time.

    Each thread reads 256 MB of its own, less where free memory is short. Raises BenchError below 16 MB, or for fewer
    threads than 1.
    """
    if threads < 1:
        raise BenchError(f"{threads} threads: at least 1 is needed")
    free = free_memory()
    size = min(PROBE_BYTES, free // 4 // threads) if free else PROBE_BYTES
    if size < MIN_PROBE_BYTES:
        raise BenchError(
            f"{free / 1e6:.0f} MB of memory are free; measuring the bandwidth of {threads} threads takes "
            f"{4 * threads * MIN_PROBE_BYTES / 1e6:.0f} MB; close other programs"
        )
    ends: list[float] = []  # of the measurement; one entry once it has begun
    going = True

    def decide() -> None:  # by one thread, when all have come
        nonlocal going
        now = time.monotonic()
        if not ends:
            ends.append(now + seconds)
        else:
            going = now < ends[0]

    gate = threading.Barrier(threads, decide)

    def read(number: int) -> list[tuple[float, float]]:
        try:
            data: U8 = np.full(size, number + 1, np.uint8)  # written by the thread that reads it: near to it
            passes: list[tuple[float, float]] = []
            while True:
                gate.wait()
                if not going:
                    return passes
                start = time.perf_counter()
                native.read_sum(data)
                passes.append((start, time.perf_counter()))
        except BaseException:
            gate.abort()
            raise

    try:
        with ThreadPoolExecutor(threads) as pool:
            times = list(pool.map(read, range(threads)))
    except (MemoryError, threading.BrokenBarrierError):
        raise BenchError(
            f"no {size * threads / 1e6:.0f} MB of memory to measure its bandwidth with; close other programs"
        ) from None
    best: float = min(max(end for _, end in one) - min(start for start, _ in one) for one in zip(*times, strict=True))
    return size * threads / best
