"""Where it runs, and where it says that it does not; the tools that build for and test on other machines."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPO, Cli

BIG = "import sys; sys.byteorder = 'big'; sys.argv[0] = 'ptqtp-gguf'; from ptqtp_gguf.__main__ import main; main()"


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1 and not done.stdout, done.stdout + done.stderr
    line = done.stderr.rstrip("\n")
    assert line.startswith("Error: ") and "\n" not in line, line
    return line


def test_a_big_endian_machine_is_refused_by_python(tiny_gguf: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BIG, "convert", str(tiny_gguf), str(tmp_path / "out.gguf")],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "300"},
        cwd=tmp_path,  # not in the repository, whose package may lack its library
        check=False,
    )
    assert "runs on little-endian machines only; this one is big-endian" in one_line(done)
    assert not list(tmp_path.glob("*out.gguf*"))


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_a_big_endian_machine_is_refused_by_the_compiler() -> None:
    """The macro that a big-endian machine's compiler sets; tools/matrix.py asks such compilers themselves."""
    header = str(REPO / "native" / "ptqtp.h")
    plain = subprocess.run(["cc", "-fsyntax-only", "-x", "c", header], capture_output=True, text=True, check=False)
    assert plain.returncode == 0, plain.stderr
    big = ["cc", "-fsyntax-only", "-U__BYTE_ORDER__", "-D__BYTE_ORDER__=__ORDER_BIG_ENDIAN__", "-x", "c", header]
    done = subprocess.run(big, capture_output=True, text=True, check=False)
    errors = [line for line in done.stderr.splitlines() if "error" in line and "#" not in line.split("error")[0]]
    assert done.returncode != 0 and "little-endian machines only" in errors[0]


def test_a_big_endian_file_is_refused(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "big.gguf"
    path.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(64))
    for args in (["inspect", path], ["convert", path, tmp_path / "out.gguf"], ["run", path, "-p", "x"]):
        line = one_line(cli(*args))
        assert str(path) in line and "big-endian GGUF files are not supported" in line


# ---- the matrix ----


def matrix(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(REPO / "tools" / "matrix.py"), *args],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        check=False,
    )


def test_every_kernel_has_its_cell() -> None:
    """A kernel that is added must be forced, or chosen on an emulated CPU."""
    cells = matrix("--list").stdout
    listed = (REPO / "native" / "kernels" / "kernels.inc").read_text()
    kernels = set(re.findall(r"^PTQTP_KERNEL\((\w+), TP2_1", listed, re.MULTILINE))
    assert len(kernels) > 9
    for kernel in kernels:
        assert re.search(rf"(: {kernel}$|^kernel-{kernel}  )", cells, re.MULTILINE) or "kernel-scalar" not in cells, (
            kernel
        )


def test_what_is_missing_is_skipped_and_told(tmp_path: Path) -> None:
    (tmp_path / "python").symlink_to(sys.executable)
    done = matrix("--only", "big-endian-*", PATH=str(tmp_path))
    assert done.returncode == 0 and "skip" in done.stdout and "no s390x-linux-gnu-gcc here" in done.stdout
    assert done.stdout.endswith("0 passed, 0 failed, 2 skipped\n")
    assert matrix("--only", "big-endian-*", "--no-skips", PATH=str(tmp_path)).returncode == 1
    unknown = matrix("--only", "nonsense")
    assert unknown.returncode == 2 and "no cell is called nonsense" in unknown.stderr


def test_a_failing_cell_fails(tmp_path: Path) -> None:
    """A compiler that takes everything, in place of the one that must refuse."""
    fake = tmp_path / "s390x-linux-gnu-gcc"
    fake.write_text("#!/bin/sh\nexit 0\n")
    fake.chmod(0o755)
    done = matrix("--only", "big-endian-s390x", PATH=f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    assert done.returncode == 1 and "FAIL" in done.stdout and "1 failed" in done.stdout
