"""How a field of the options stands on the command line: its name, help and place, written beside the field.

`commands/flags.py` makes the command's options from these; `decisive` tells which of them decide the bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..files import open_regular, sha256_of

INPUT, TYPES, CALIBRATION, TUNING, OUTPUT, MACHINE = "Input", "Types", "Calibration", "Tuning", "Output", "Machine"
PANELS = (INPUT, TYPES, CALIBRATION, TUNING, OUTPUT, MACHINE)  # in the order of the help page


@dataclass(frozen=True)
class Flag:
    """One option of a command.

    name      "--calib", or "--fisher/--no-fisher"
    panel     of the help page, one of PANELS
    short     "-t"
    low, high bounds of a number
    size      written "2G", held as bytes
    decides   whether it decides the output's bytes
    files     its values may be files, which count by name and checksum
    """

    name: str
    help: str
    panel: str
    short: str = ""
    low: float | None = None
    high: float | None = None
    size: bool = False
    decides: bool = False
    files: bool = False

    @property
    def long(self) -> str:
        """The name that messages use: "--fisher"."""
        return self.name.partition("/")[0]


def flag(default: Any, name: str, panel: str, help: str, **more: Any) -> Any:
    """A field of a frozen dataclass that is an option of the command line."""
    return field(default=default, metadata={"flag": Flag(name, help, panel, **more)})


def flags_of(options: Any) -> Iterator[tuple[str, Flag]]:
    """(field's name, flag) of a dataclass or an instance, in order."""
    for f in fields(options):
        if "flag" in f.metadata:
            yield f.name, f.metadata["flag"]


def decisive(options: Any, panels: tuple[str, ...]) -> dict[str, object]:
    """What decides the bytes, of the flags in these panels, by their names; a file by its checksum."""
    found: dict[str, object] = {}
    for name, of in flags_of(options):
        if of.decides and of.panel in panels:
            value = getattr(options, name)
            if isinstance(value, tuple):
                value = [_identity(v) if of.files else v for v in value]
            elif isinstance(value, Path):
                value = str(value)
            elif value is None and of.files:
                value = "none"
            found[of.long] = value
    return found


def _identity(text: str) -> str:
    path = Path(text)
    if path.is_dir():  # of a folder, which files it holds and how long they are
        files = [(str(p.relative_to(path)), p.stat().st_size) for p in sorted(path.rglob("*")) if p.is_file()]
        return f"{path.name} (SHA-256 {hashlib.sha256(repr(files).encode()).hexdigest()})"
    if not path.is_file():
        return text
    with open_regular(path) as f:
        return f"{path.name} (SHA-256 {sha256_of(f, text)})"
