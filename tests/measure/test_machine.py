"""The machine, from made-up trees, and its bandwidth."""

from __future__ import annotations

import subprocess
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ptqtp_gguf.codec import native
from ptqtp_gguf.errors import BenchError
from ptqtp_gguf.llamacpp import model as runtime
from ptqtp_gguf.measure import machine


def test_machine_from_a_made_up_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_allowed", lambda: [0, 1, 2, 3])
    assert machine.describe(tmp_path).governor is None  # nothing there: nulls, no error
    assert (machine.describe(tmp_path).memory, machine.describe(tmp_path).features) == (None, ())
    cpu = tmp_path / "sys/devices/system/cpu"
    for n in range(4):
        (cpu / f"cpu{n}/topology").mkdir(parents=True)
        (cpu / f"cpu{n}/cpufreq").mkdir()
        (cpu / f"cpu{n}/topology/thread_siblings_list").write_text(f"{n % 2},{n % 2 + 2}\n")
        (cpu / f"cpu{n}/cpufreq/scaling_governor").write_text("powersave\n" if n == 3 else "performance\n")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("model name\t: A: CPU\nflags\t\t: fpu avx2 ssse3 avx512f_not amx_int8\n\n")
    (tmp_path / "proc/meminfo").write_text("MemTotal:       16000 kB\nMemFree: 1 kB\n")
    m = machine.describe(tmp_path)
    assert (m.cpu, m.cores, m.cpus, m.memory) == ("A: CPU", 2, 4, 16000 * 1024)
    assert m.features == ("ssse3", "avx2", "amx_int8") and m.governor == "performance, powersave"
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    for text, quota in (("max 100000\n", None), ("150000 100000\n", 1.5), ("", None)):
        (tmp_path / "sys/fs/cgroup/cpu.max").write_text(text)
        assert machine.describe(tmp_path).quota == quota
    assert m.kernel == runtime.system_info()["PTQTP"]


def test_others_use_of_the_cpus(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 0 100 1000 0 0 0 0 0 0\ncpu0 1 1 1 1\n")
    before = machine.moment(stat)
    stat.write_text("cpu  400 0 100 1600 0 0 0 100 50 0\ncpu0 1 1 1 1\n")  # 300 user, 100 stolen, 600 idle
    after = machine.moment(stat)
    assert before and after
    second = 0.01 * (after.total - before.total) / 10  # of 1000 ticks, whatever a tick is
    mine = replace(after, ours=before.ours + 100 * second * 10 / 10)
    assert machine.busy_share(before, mine) == pytest.approx(0.3)
    assert machine.busy_share(before, replace(after, ours=before.ours + 1e9)) == 0.0
    assert machine.busy_share(before, before) is None and machine.busy_share(None, after) is None
    assert machine.moment(tmp_path / "nowhere") is None


def test_busy_child_is_ours() -> None:
    """A child that burns a CPU counts as ours once it has ended."""
    if (before := machine.moment()) is None:
        pytest.skip("no /proc/stat")
    subprocess.run(["sh", "-c", "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done"], check=True)
    after = machine.moment()
    assert after and after.ours - before.ours > 0.05


def test_probe_reads_every_word(rng: np.random.Generator) -> None:
    for n in (0, 7, 8, 255, 256, 1000, 4096 + 13):
        buffer = rng.integers(0, 256, n + 3, np.uint8)
        for at in (0, 3):  # any alignment
            data = buffer[at : at + n]
            words = np.frombuffer(data.tobytes()[: n // 8 * 8], np.uint64)
            assert native.read_sum(data) == int(words.sum(dtype=np.uint64))


def test_probe_of_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: set[int] = set()
    read = native.read_sum

    def noted(data: Any) -> int:
        calls.add(threading.get_ident())
        return read(data)

    monkeypatch.setattr(native, "read_sum", noted)
    monkeypatch.setattr(machine, "free_memory", lambda: 200 << 20)  # 25 MB a thread
    assert machine.read_bandwidth(2, 0.01) > 0 and len(calls) == 2
    with pytest.raises(BenchError, match="close other programs"):
        machine.read_bandwidth(64, 0.01)
    with pytest.raises(BenchError, match="at least 1"):
        machine.read_bandwidth(0)
