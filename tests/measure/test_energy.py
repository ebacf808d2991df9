"""Energy, from a made-up tree."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptqtp_gguf.measure.energy import Rapl


def test_energy_from_a_made_up_tree(tmp_path: Path) -> None:
    def zone(name: str, kind: str, value: int) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "name").write_text(f"{kind}\n")
        (folder / "energy_uj").write_text(f"{value}\n")
        (folder / "max_energy_range_uj").write_text("10000000\n")
        return folder / "energy_uj"

    package, dram = zone("intel-rapl:0", "package-0", 9_000_000), zone("intel-rapl:0:1", "dram", 100)
    core, psys = zone("intel-rapl:0:0", "core", 5), zone("intel-rapl:1", "psys", 7)
    rapl = Rapl(tmp_path)
    before = rapl.read()
    for path, value in ((package, 500_000), (dram, 250_100), (core, 999_999), (psys, 999_999)):
        path.write_text(f"{value}\n")
    # the package's counter began again: 1 J to its end, 0.5 J after; core is in package, psys is more than the CPU
    assert rapl.joules(before, rapl.read()) == pytest.approx(1.5 + 0.25)
    package.unlink()
    assert rapl.joules(before, rapl.read()) is None
    nothing = Rapl(tmp_path / "nowhere")
    assert nothing.read() is None and nothing.joules(None, None) is None
