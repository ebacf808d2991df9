"""Energy that the CPU used, by the counters of RAPL, where the system shows them (Linux, mostly to root only)."""

from __future__ import annotations

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
MICRO = 1e-6  # the counters are in microjoules


class Rapl:
    """The packages' counters, and their memory's: what lies below a package is in it, but for memory."""

    def __init__(self, root: Path = POWERCAP) -> None:
        self.ranges: dict[Path, int] = {}  # zone -> microjoules at which its counter starts again from 0
        for zone in sorted(root.glob("intel-rapl:*")):
            try:
                name = (zone / "name").read_text().strip()
                if name.startswith("package") or name == "dram":
                    int((zone / "energy_uj").read_text())
                    self.ranges[zone] = int((zone / "max_energy_range_uj").read_text())
            except (OSError, ValueError):
                continue

    def read(self) -> dict[Path, int] | None:
        """The counters now, microjoules; None where none can be read."""
        try:
            return {zone: int((zone / "energy_uj").read_text()) for zone in self.ranges} or None
        except (OSError, ValueError):
            return None

    def joules(self, before: dict[Path, int] | None, after: dict[Path, int] | None) -> float | None:
        """Energy between two readings, J. A counter that began again once in between is put right; it takes minutes."""
        if before is None or after is None:
            return None
        used = 0
        for zone, start in before.items():
            delta = after[zone] - start
            used += delta if delta >= 0 else delta + self.ranges[zone]
        return used * MICRO
