"""What conversions with calibration text are tried with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import REPO

from ptqtp_gguf.calibrate import texts
from ptqtp_gguf.codec import TYPES
from ptqtp_gguf.files.gguf import Reader
from ptqtp_gguf.plan.options import Calibration, Options
from ptqtp_gguf.source.gguf import GgufSource

WINDOW, TOKENS = 64, 1024


def prose(folder: Path) -> Options:
    """In order on 16 windows of prose, Fisher-weighted."""
    (folder / "prose.txt").write_text(str(texts.load("builtin").text)[:20000])
    calibration = Calibration(effort="best", texts=(str(folder / "prose.txt"),), tokens=TOKENS, window=WINDOW)
    return Options(calibration=calibration, device="cpu", threads=1)


def seen_prose(folder: Path) -> Options:
    """The same by what the runtime sees; types by name, as the default recipe has them, not by what errors do."""
    rules = json.loads((REPO / "ptqtp_gguf" / "plan" / "recipes" / "default.json").read_text())
    (folder / "by-name.json").write_text(json.dumps({**rules, "name": "by-name"}))
    return replace(with_(prose(folder), effort="normal"), recipe=str(folder / "by-name.json"))


@contextmanager
def converted_before(bf16: Path) -> Iterator[None]:
    """The checkpoint's GGUF is there already, as with --keep-bf16: llama.cpp's converter takes seconds."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr("ptqtp_gguf.conversion.bf16.open_source", lambda source, *_: GgufSource(bf16, source))
        yield


def with_(options: Options, **changes: Any) -> Options:
    return replace(options, calibration=replace(options.calibration, **changes))


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def planes_of(path: Path) -> dict[str, np.ndarray]:
    """The bytes of all trit-plane tensors."""
    with Reader(path) as r:
        return {t.name: np.array(r.bytes_of(t)) for t in r.tensors if t.type in TYPES}
