#!/usr/bin/env python3
"""Wheels of ptqtp-gguf that hold all that it runs: nothing is compiled where they are installed.

    python tools/build/wheels.py [x86_64] [aarch64] [--build-dir build] [--wheel-dir build/dist]

    native/           -> ptqtp_gguf/_native          the quantizer's library
    patched runtime   -> ptqtp_gguf/_llama_cpp       libraries for every CPU, tools, converter, Python bindings

The bindings are llama-cpp-python's files, in which "llama_cpp" is imported by its name here, so an installed llama_cpp
is not disturbed. Compiled by clang, for this machine or another one, against the libraries of Debian 11, which are
downloaded (requirements/sysroot.debs). Of the wheel's machine code `auditwheel` says which systems it runs on; it is an
error where that is fewer than are claimed.

In this Python: requirements/setup.lock and wheels.lock. Debian: clang-16 lld-16 (PTQTP_CLANG names another version's
suffix), dpkg.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Callable, Sequence
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
    last_error,
    make_tree,
    read_upstream,
    run,
    sha256,
)

GLIBC = "2.31"
DEBIAN = "http://deb.debian.org/debian"  # what comes from there is compared with sysroot.debs
DEBIAN_NAMES = {"x86_64": "amd64", "aarch64": "arm64"}
MACHINES = tuple(DEBIAN_NAMES)
CLANG = "16"
PROGRAMS = ("clang", "clang++", "ld.lld", "llvm-ar", "llvm-ranlib")
PACKAGE, BUNDLED = "ptqtp_gguf", "_llama_cpp"
NAME = f"{PACKAGE}.{BUNDLED}"
OTHER_LIBRARIES = 'os.environ.get("LLAMA_CPP_LIB_PATH")'  # in llama_cpp: set for another one, it is not for ours
ELF = b"\x7fELF"


def call(log: Path, *command: object) -> None:
    """Run a command, its output into a log. Raises BuildError."""
    with log.open("a") as file:
        done = subprocess.run([str(c) for c in command], stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        lines = [x for x in log.read_text(errors="replace").splitlines() if re.search(r"\b(error|Error|ERROR)\b", x)]
        raise BuildError(f"{command[0]} failed: {(lines or ['no reason given'])[-1].strip()[:200]} (all output: {log})")


# ---- the bindings under our name ----


def renamed(text: str) -> str:
    """A module of llama_cpp with the package's name here: its imports, and nothing else. Raises BuildError."""
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and _ours(node.module or ""):
            _replace(lines, node.lineno, "from llama_cpp", f"from {NAME}")
        elif isinstance(node, ast.Import) and any(_ours(a.name) for a in node.names):
            if len(node.names) > 1:
                raise BuildError(f"line {node.lineno}: imports several packages at once: {lines[node.lineno - 1]!r}")
            only = node.names[0]
            if only.asname:
                _replace(lines, node.lineno, "import llama_cpp", f"import {NAME}")
            else:  # "import llama_cpp" and "import llama_cpp.x" bind the name llama_cpp
                new = f"from {PACKAGE} import {BUNDLED} as llama_cpp"
                if "." in only.name:
                    new = f"import {NAME}.{only.name.partition('.')[2]}; {new}"
                _replace(lines, node.lineno, f"import {only.name}", new)
    return "".join(lines)


def imported(text: str) -> list[tuple[int, str]]:
    """Lines and names of the modules that a module imports by their full names."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, a.name) for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append((node.lineno, node.module or ""))
    return found


def _ours(module: str) -> bool:
    return module.partition(".")[0] == "llama_cpp"


def _replace(lines: list[str], number: int, old: str, new: str) -> None:
    if lines[number - 1].count(old) != 1:
        raise BuildError(f"line {number}: {old!r} is not there once: {lines[number - 1]!r}")
    lines[number - 1] = lines[number - 1].replace(old, new)


def bundle(package: Path, into: Path, copy: Callable[[Path, Path], object] = shutil.copy) -> None:
    """The patched package llama_cpp as a package of ours: a new folder. copy: of the files that stay as they are.

    Raises BuildError where a module would still import llama_cpp by its own name.
    """
    for path in sorted(package.rglob("*")):
        inside = path.relative_to(package)
        if path.is_dir() or "__pycache__" in inside.parts or inside.parts[0] == "server":  # llama-server serves
            continue
        target = into / inside
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".py" and inside.parts[0] != "convert":  # which is no part of the bindings
            text = renamed(path.read_text(encoding="utf-8")).replace(OTHER_LIBRARIES, "None")
            if left := [line for line, name in imported(text) if _ours(name)]:
                raise BuildError(f"{inside}: line {left[0]} imports llama_cpp")
            if "LLAMA_CPP_LIB_PATH" in text:
                raise BuildError(f"{inside}: reads LLAMA_CPP_LIB_PATH in a way that is not known here")
            target.write_text(text, encoding="utf-8")
        else:
            copy(path, target)


# ---- compiling ----


def sysroot(folder: Path, machine: str) -> Path:
    """The libraries and headers to compile against, downloaded and unpacked once. Raises BuildError."""
    lock = REPO / "requirements" / "sysroot.debs"
    root, stamp = folder / machine, sha256(lock)
    if (root / "stamp").is_file() and (root / "stamp").read_text() == stamp:
        return root
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    mirror = os.environ.get("PTQTP_DEBIAN", DEBIAN)
    for digest, name in re.findall(rf"^([0-9a-f]{{64}})  (\S+_{DEBIAN_NAMES[machine]}\.deb)$", lock.read_text(), re.M):
        package = folder / Path(name).name
        try:
            with urllib.request.urlopen(f"{mirror}/{name}", timeout=60) as answer:
                package.write_bytes(answer.read())
        except OSError as e:
            raise BuildError(f"{mirror}/{name}: {e}; PTQTP_DEBIAN names another mirror") from None
        if sha256(package) != digest:
            raise BuildError(f"{mirror}/{name}: SHA-256 is {sha256(package)}, {lock.name} has {digest}")
        done = run(["dpkg-deb", "-x", str(package), str(root)])
        if done.returncode:
            raise BuildError(f"{package}: cannot be unpacked: {last_error(done.stdout)}")
        package.unlink()
    for link in root.rglob("*"):
        if link.is_symlink() and (to := os.readlink(link)).startswith("/"):  # into the root, not this machine's /
            link.unlink()
            link.symlink_to(os.path.relpath(root / to.lstrip("/"), link.parent))
    (root / "stamp").write_text(stamp)
    return root


def toolchain(folder: Path, machine: str) -> dict[str, object]:
    """CMake's options. -s: stripped when linked, since no strip here may know the machine."""
    suffix = os.environ.get("PTQTP_CLANG", CLANG)
    programs = {name: shutil.which(f"{name}-{suffix}" if suffix else name) for name in PROGRAMS}
    if missing := [name for name, path in programs.items() if not path]:
        raise BuildError(f"no {missing[0]} here; Debian: apt install clang-{suffix} lld-{suffix} llvm-{suffix}")
    if not shutil.which("dpkg-deb"):
        raise BuildError("no dpkg-deb here; Debian: apt install dpkg")
    root, target = sysroot(folder, machine), f"{machine}-linux-gnu"
    cross = machine != platform.machine()
    flags = f"--target={target} --gcc-toolchain={root / 'usr'}"
    linker = f"-s -fuse-ld={programs['ld.lld']}"
    return {
        **({"CMAKE_SYSTEM_NAME": "Linux", "CMAKE_SYSTEM_PROCESSOR": machine} if cross else {}),
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_SYSROOT": root,
        "CMAKE_C_COMPILER": programs["clang"],
        "CMAKE_CXX_COMPILER": programs["clang++"],
        "CMAKE_AR": programs["llvm-ar"],
        "CMAKE_RANLIB": programs["llvm-ranlib"],
        "CMAKE_C_FLAGS": flags,
        "CMAKE_CXX_FLAGS": flags,
        **{f"CMAKE_{kind}_LINKER_FLAGS": linker for kind in ("SHARED", "MODULE", "EXE")},
    }


def wheel_settings(tree: Path) -> tuple[dict[str, object], list[str]]:
    """What the bindings' pyproject.toml, with our patch, tells CMake: its options, and its targets."""
    text = (tree / "pyproject.toml").read_text(encoding="utf-8")
    defines = dict(re.findall(r'^cmake\.define\.(\w+) = "(\w+)"$', text, re.MULTILINE))
    targets = re.search(r"^cmake\.targets = \[(.*)\]$", text, re.MULTILINE)
    if not targets:
        raise BuildError(f"{tree / 'pyproject.toml'}: has no list of targets")
    return defines, re.findall(r'"([\w-]+)"', targets[1])


def runtime(upstream: Upstream, build: Path, machine: str, jobs: int) -> Path:
    """Compile the runtime; the folder of its package llama_cpp: lib, bin, convert, and the bindings."""
    home = build / "runtime"
    tree, folder = home / upstream.sdist.removesuffix(".tar.gz"), home / f"cmake-wheel-{machine}"
    stage, log = home / f"stage-wheel-{machine}", home / f"wheel-{machine}.log"
    stamp = fingerprint([upstream.folder / "UPSTREAM", *upstream.patches])
    if not (tree / TREE_STAMP).is_file() or (tree / TREE_STAMP).read_text() != stamp:
        make_tree(find_sdist(None, build, upstream), tree, upstream.patches, stamp)
    copy_native(tree)
    log.unlink(missing_ok=True)
    shutil.rmtree(stage, ignore_errors=True)
    settings, targets = wheel_settings(tree)
    defines = {
        **settings,
        **cmake_defines(upstream, True),
        **toolchain(build / "sysroot", machine),
        "SKBUILD_PLATLIB_DIR": stage,
    }
    call(log, "cmake", "-S", tree, "-B", folder, "-G", "Ninja", *(f"-D{k}={v}" for k, v in defines.items()))
    call(log, "cmake", "--build", folder, "--parallel", jobs, "--target", *targets)
    call(log, "cmake", "--install", folder, "--component", "llama_cpp")
    shutil.copytree(
        tree / "llama_cpp",
        stage / "llama_cpp",
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("__pycache__", "server", "lib"),
    )
    return stage / "llama_cpp"


def native(build: Path, machine: str, jobs: int, into: Path) -> None:
    """Compile the quantizer's library into a package."""
    home = build / "runtime"
    folder, log = home / f"native-{machine}", home / f"native-{machine}.log"
    log.unlink(missing_ok=True)
    defines = {**toolchain(build / "sysroot", machine), "PTQTP_TESTS": "OFF", "CMAKE_INSTALL_PREFIX": into}
    call(log, "cmake", "-S", REPO, "-B", folder, "-G", "Ninja", *(f"-D{k}={v}" for k, v in defines.items()))
    call(log, "cmake", "--build", folder, "--parallel", jobs)
    call(log, "cmake", "--install", folder)


# ---- the wheel ----


def pure(scratch: Path, log: Path) -> Path:
    """The package's Python files and metadata, as its own build makes them, unpacked; without machine code."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--quiet"]
    command += ["--no-build-isolation", "--wheel-dir", str(scratch), "-C", "wheel.cmake=false", str(REPO)]
    call(log, *command)
    (made,) = scratch.glob("*.whl")
    folder = scratch / "unpacked"
    with zipfile.ZipFile(made) as wheel:
        wheel.extractall(folder)
    made.unlink()
    return folder


def requirements(tree: Path) -> list[str]:
    """What the bindings need besides ours."""
    text = (tree / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    names = re.findall(r'"([^"]+)"', found[1]) if found else []
    if not names:
        raise BuildError(f"{tree / 'pyproject.toml'}: names no dependencies")
    return [n for n in names if not n.startswith("numpy")]


def finish(folder: Path, machine: str, more: Sequence[str], out: Path, log: Path) -> Path:
    """Metadata for what is in the folder now, packed."""
    (info,) = folder.glob("*.dist-info")
    wheel, metadata = info / "WHEEL", info / "METADATA"
    tag = f"py3-none-manylinux_{GLIBC.replace('.', '_')}_{machine}"
    text = re.sub(r"(?m)^Tag: .*\n", "", wheel.read_text())
    text = re.sub(r"(?m)^Root-Is-Purelib: .*$", "Root-Is-Purelib: false", text).rstrip("\n")
    wheel.write_text(f"{text}\nTag: {tag}\n")
    head, blank, rest = metadata.read_text(encoding="utf-8").partition("\n\n")
    head = re.sub(r"\n(Provides-Extra: run|Requires-Dist: llama-cpp-python.*)(?=\n)", "", head)
    head += "".join(f"\nRequires-Dist: {name}" for name in more)
    metadata.write_text(head + blank + rest, encoding="utf-8")
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as f:
                path.chmod(0o755 if f.read(4) == ELF else 0o644)
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob(f"{PACKAGE}-*-{tag}.whl"):
        old.unlink()
    call(log, sys.executable, "-m", "wheel", "pack", folder, "--dest-dir", out)
    (made,) = out.glob(f"{PACKAGE}-*-{tag}.whl")
    return made


def audit(wheel: Path) -> str:
    """auditwheel's own words on which systems a wheel runs. Raises BuildError where it is fewer than its name says."""
    done = subprocess.run(
        [sys.executable, "-m", "auditwheel", "show", str(wheel)], capture_output=True, text=True, check=False
    )
    said = " ".join(done.stdout.split())
    found = re.search(r'consistent with the following platform tag: "manylinux_(\d+)_(\d+)_\w+"', said)
    if not found or (int(found[1]), int(found[2])) > tuple(int(n) for n in GLIBC.split(".")):
        raise BuildError(
            f"{wheel.name}: auditwheel does not find it fit for glibc {GLIBC}: {said or done.stderr[-300:]}"
        )
    return found[0].partition('"')[2].rstrip('"')


def make(upstream: Upstream, build: Path, out: Path, machine: str, jobs: int) -> Path:
    """One machine's wheel."""
    log = build / "runtime" / f"pack-{machine}.log"
    package = runtime(upstream, build, machine, jobs)
    log.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=build / "runtime") as scratch:
        folder = pure(Path(scratch), log)
        shutil.rmtree(folder / PACKAGE / "_native", ignore_errors=True)
        native(build, machine, jobs, folder)
        bundle(package, folder / PACKAGE / BUNDLED)
        tree = build / "runtime" / upstream.sdist.removesuffix(".tar.gz")
        return finish(folder, machine, requirements(tree), out, log)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("machines", nargs="*", metavar="MACHINE", help=f"{' or '.join(MACHINES)} (this one's)")
    parser.add_argument("--build-dir", type=Path, default=REPO / "build", help="sdist, tree and objects (build)")
    parser.add_argument("--wheel-dir", type=Path, default=REPO / "build" / "dist", help="where wheels go (build/dist)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time (all cores)")
    args = parser.parse_args(arguments)
    machines = args.machines or [platform.machine()]
    try:
        if unknown := [m for m in machines if m not in MACHINES]:
            raise BuildError(f"{unknown[0]}: no wheels for this machine; there are {', '.join(MACHINES)}")
        for module in ("auditwheel", "wheel"):
            if not importlib.util.find_spec(module):
                raise BuildError(f"no {module} here; pip install --require-hashes -r requirements/wheels.lock")
        for machine in machines:
            start = time.monotonic()
            wheel = make(read_upstream(), args.build_dir.resolve(), args.wheel_dir.resolve(), machine, args.jobs)
            tag = audit(wheel)
            took = time.monotonic() - start
            print(f"built {wheel}: {wheel.stat().st_size / 1e6:.1f} MB in {took:.0f} s; auditwheel: {tag}", flush=True)
    except (BuildError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
