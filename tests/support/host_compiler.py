"""The GPU's kernels compiled for the host."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPO

from ptqtp_gguf.quantize.cuda import encoder as cuda


def compiling(source: str, library: Path, *options: str) -> subprocess.Popen[bytes]:
    """A compiler at work on a source of tests/quantize/cuda."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if not compiler or not sys.platform.startswith("linux"):
        pytest.skip("needs g++ or clang++ on Linux to build the kernels for the host")
    return subprocess.Popen(
        [
            compiler,
            "-std=c++17",
            "-O1",
            "-ffp-contract=off",
            "-Wall",
            "-Werror",
            "-Wno-unknown-pragmas",
            "-fPIC",
            "-shared",
            *options,
            f"-I{cuda.SOURCE_FILE.parent}",
            str(REPO / "tests" / "quantize" / "cuda" / source),
            "-o",
            str(library),
        ]
    )
