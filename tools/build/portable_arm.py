#!/usr/bin/env python3
"""Cross-build the portable runtime for 64-bit ARM Linux: a wheel with every variant of ggml-cpu for it.

    python tools/build/portable_arm.py [--build-dir build]

The same patched tree and options as `build_runtime.py --portable`; Python files as in the wheel of this machine, which
that makes before (make portable). By clang, because GCC knows SME only from version 14 on.
Debian: clang g++-aarch64-linux-gnu; qemu-user to try it (tools/matrix.py --only 'wheel-*').
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

from build_runtime import (
    REPO,
    TREE_STAMP,
    BuildError,
    Upstream,
    cmake_defines,
    copy_native,
    find_sdist,
    fingerprint,
    make_tree,
    read_upstream,
)

TARGET = "aarch64-linux-gnu"
TAG = "py3-none-linux_aarch64"
PROGRAMS = ("clang", "clang++", f"{TARGET}-g++", f"{TARGET}-strip", "cmake", "ninja")


def wheel_defines(tree: Path) -> dict[str, str]:
    """The CMake options that the bindings' pyproject.toml sets for a wheel, our patch's among them."""
    found = re.findall(r'^cmake\.define\.(\w+) = "(\w+)"$', (tree / "pyproject.toml").read_text(), re.MULTILINE)
    return dict(found)


def wheel_targets(tree: Path) -> list[str]:
    line = re.search(r"^cmake\.targets = \[(.*)\]$", (tree / "pyproject.toml").read_text(), re.MULTILINE)
    if not line:
        raise BuildError(f"{tree / 'pyproject.toml'}: has no list of targets")
    return re.findall(r'"([\w-]+)"', line[1])


def call(log: Path, *command: object) -> None:
    with log.open("a") as file:
        done = subprocess.run([str(part) for part in command], stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        lines = [line for line in log.read_text(errors="replace").splitlines() if re.search(r"[Ee]rror\b", line)]
        raise BuildError(f"{command[0]} failed: {(lines or ['no reason given'])[-1].strip()[:200]} (all output: {log})")


def build(upstream: Upstream, home: Path, jobs: int) -> Path:
    """Configure, compile, install; the folder that holds llama_cpp/lib, bin and convert, stripped."""
    runtime = home / "runtime"
    tree, folder, stage = runtime / upstream.sdist.removesuffix(".tar.gz"), runtime / "cmake-arm", runtime / "stage-arm"
    log = runtime / "arm.log"
    stamp = fingerprint([upstream.folder / "UPSTREAM", *upstream.patches])
    if not (tree / TREE_STAMP).is_file() or (tree / TREE_STAMP).read_text() != stamp:
        make_tree(find_sdist(None, home, upstream), tree, upstream.patches, stamp)
    copy_native(tree)
    log.unlink(missing_ok=True)
    shutil.rmtree(stage, ignore_errors=True)
    cross = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_C_COMPILER": "clang",
        "CMAKE_CXX_COMPILER": "clang++",
        "CMAKE_C_COMPILER_TARGET": TARGET,
        "CMAKE_CXX_COMPILER_TARGET": TARGET,
        "CMAKE_STRIP": shutil.which(f"{TARGET}-strip"),
        "SKBUILD_PLATLIB_DIR": stage,
    }
    defines = {**wheel_defines(tree), **cmake_defines(upstream, True), **cross}
    call(log, "cmake", "-S", tree, "-B", folder, "-G", "Ninja", *(f"-D{k}={v}" for k, v in defines.items()))
    call(log, "cmake", "--build", folder, "--parallel", jobs, "--target", *wheel_targets(tree))
    call(log, "cmake", "--install", folder, "--strip", "--component", "llama_cpp")
    return stage


def pack(stage: Path, model: Path, out: Path) -> Path:
    """A wheel of another machine with our machine code in place of its own."""
    target = out / re.sub(r"-py3-none-\w+\.whl$", f"-{TAG}.whl", model.name)
    rows = []
    with zipfile.ZipFile(model) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        record = next(name for name in old.namelist() if name.endswith(".dist-info/RECORD"))

        def add(name: str, data: bytes, mode: int) -> None:
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = (0o100000 | mode) << 16, zipfile.ZIP_DEFLATED
            new.writestr(info, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            rows.append(f"{name},sha256={digest},{len(data)}\n")

        for name in old.namelist():
            if name.startswith(("llama_cpp/lib/", "llama_cpp/bin/")) or name == record or name.endswith("/"):
                continue
            data = old.read(name)
            if name.endswith(".dist-info/WHEEL"):
                data = re.sub(rb"(?m)^Tag: .*$", b"Tag: " + TAG.encode(), data)
            add(name, data, 0o644)
        for path in sorted(p for place in ("lib", "bin") for p in (stage / "llama_cpp" / place).iterdir()):
            add(path.relative_to(stage).as_posix(), path.read_bytes(), 0o755)
        info = zipfile.ZipInfo(record)
        info.external_attr, info.compress_type = 0o100644 << 16, zipfile.ZIP_DEFLATED
        new.writestr(info, "".join(rows) + f"{record},,\n")
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--build-dir", type=Path, default=REPO / "build", help="sdist, tree and objects (build)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time (all cores)")
    args = parser.parse_args(arguments)
    out = args.build_dir / "portable"
    try:
        upstream = read_upstream()
        if missing := [name for name in PROGRAMS if not shutil.which(name)]:
            raise BuildError(f"no {', '.join(missing)} here; Debian: apt install clang g++-{TARGET}, pip install ninja")
        models = [p for p in out.glob(f"llama_cpp_python-{upstream.wheel_version}-*.whl") if TAG not in p.name]
        if not models:
            raise BuildError(f"{out}: holds no wheel of this machine to take the Python files from; run make portable")
        start = time.monotonic()
        stage = build(upstream, args.build_dir.resolve(), args.jobs)
        wheel = pack(stage, models[0], out)
        print(f"built {wheel}: {wheel.stat().st_size / 1e6:.1f} MB in {time.monotonic() - start:.0f} s")
    except (BuildError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
