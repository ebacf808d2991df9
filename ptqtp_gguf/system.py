"""What the operating system says of memory: in use by this process, free for new work."""

from __future__ import annotations

from pathlib import Path


def resident() -> int:
    """Bytes of memory in use now by this process and its children; 0 where the system does not tell."""
    total = 0
    waiting = ["self"]
    while waiting:
        process = Path("/proc") / waiting.pop()
        try:
            status = (process / "status").read_text()
            waiting += (process / "task" / status.split("\nPid:")[1].split()[0] / "children").read_text().split()
            total += int(status.split("VmRSS:")[1].split()[0]) << 10
        except (OSError, IndexError, ValueError):
            continue
    return total


def free_memory() -> int:
    """Bytes that new work may take without swapping; 0 where the system does not tell."""
    try:
        return int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) << 10
    except (OSError, IndexError, ValueError):
        return 0
