#!/usr/bin/env python3
"""Run the tests on what they must hold on: compilers, sanitizers, instruction sets, emulated CPUs, Pythons.

    python tools/matrix.py [--list] [--only PATTERN ...] [--no-skips]

A line a cell: its result and seconds. What this machine lacks is skipped, and told. Exit code 1 if a cell fails (with
--no-skips: or is skipped). Logs lie in build/matrix. Debian: gcc g++ clang libclang-rt-14-dev qemu-user
gcc-aarch64-linux-gnu g++-aarch64-linux-gnu gcc-s390x-linux-gnu libc6-dev-s390x-cross
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
BUILD = REPO / "build" / "matrix"
X86 = platform.machine().lower() in ("x86_64", "amd64")

# the kernel that must be chosen on a CPU that qemu plays; its x86 has no AVX512
X86_CPUS = {"qemu64": "scalar", "Conroe": "ssse3", "Nehalem": "ssse3", "SandyBridge": "avx", "Haswell": "avx2"}
ARM_CPUS = {
    "cortex-a53": "neon",
    "cortex-a72": "neon",
    "cortex-a76": "neon_dotprod",
    "neoverse-n1": "neon_dotprod",
    "max": "neon_i8mm",
}
KERNELS = REPO / "native" / "kernels" / "kernels.inc"
# the variant of ggml-cpu that a wheel must load: told by its features; and our kernel in it
WHEEL_CPUS = {
    "qemu64": ("x64", set(), "scalar"),
    "Nehalem": ("sse42", {"SSSE3"}, "ssse3"),
    "SandyBridge": ("sandybridge", {"SSSE3", "AVX"}, "avx"),
    "Haswell": ("haswell", {"SSSE3", "AVX", "F16C", "AVX2"}, "avx2"),
}
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TYPES = PYTHONS[1:]  # the stubs of a numpy of this time are not for 3.10; there it is run
# Without torch, transformers and the patched runtime: what reads and writes files, and the numbers.
PYTHON_TESTS = (
    "tests/codec",
    "tests/commands/test_app.py",
    "tests/commands/test_diff.py",
    "tests/conversion/test_output_files.py",
    "tests/conversion/test_pipeline.py",
    "tests/files",
    "tests/inspect",
    "tests/plan/test_patterns.py",
    "tests/plan/test_recipe.py",
    "tests/quantize/test_gptq_reference.py",
    "tests/quantize/test_methods.py",
    "tests/quantize/test_paper.py",
    "tests/quantize/test_search.py",
    "tests/source/test_gguf.py",
    "tests/system/test_architecture.py",
    "tests/system/test_portability.py",
    "tests/terminal/test_console.py",
    "tests/terminal/test_inspect.py",
)
NOT_FOR_THEM = re.compile(
    r"^(accelerate|transformers|tokenizers|hf-xet|playwright|greenlet|openai|mypy|ruff|clang-format|sentencepiece)=="
)
BIG_ENDIAN = {"s390x": "s390x-linux-gnu-gcc", "powerpc64": "powerpc64-linux-gnu-gcc"}


class Failed(Exception):
    """A cell's reason, in one line."""


class Skipped(Exception):
    """What this machine lacks."""


@dataclass(frozen=True)
class Cell:
    name: str
    what: str
    run: Callable[[], str]  # returns a remark


def have(*programs: str) -> None:
    for program in programs:
        if not shutil.which(program):
            raise Skipped(f"no {program} here")


def sh(log: str, *command: object, env: Mapping[str, str] | None = None, cwd: Path = REPO, fail: bool = True) -> str:
    """Run a command, its output to a log; returns the output. Raises Failed."""
    BUILD.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    with (BUILD / f"{log}.log").open("a") as file:
        file.write(f"$ {' '.join(map(str, command))}\n{done.stdout}\n")
    if fail and done.returncode != 0:
        lines = [line for line in done.stdout.splitlines() if line.strip()] or ["no output"]
        telling = [x for x in lines if re.search(r"error:|ERROR|^FAILED|\*\*\*Failed|Sanitizer|ptqtp-test", x)]
        raise Failed(f"{(telling or lines)[-1].strip()[:160]} ({BUILD.relative_to(REPO)}/{log}.log)")
    return done.stdout


# ---- native ----


@functools.cache
def native(name: str, *options: str) -> Path:
    """A build of native/ and its tests, once for all cells that share it."""
    folder = BUILD / name
    sh(name, "cmake", "-S", REPO, "-B", folder, "-G", "Ninja", "-DPTQTP_WERROR=ON", "-DPTQTP_SHARED=OFF", *options)
    sh(name, "cmake", "--build", folder)
    return folder


def compiler(cc: str, cxx: str, *options: str) -> str:
    have(cc, cxx)
    folder = native(cell_name.get(), f"-DCMAKE_C_COMPILER={cc}", f"-DCMAKE_CXX_COMPILER={cxx}", *options)
    return ctest(folder, {})


def ctest(folder: Path, env: Mapping[str, str]) -> str:
    text = sh(cell_name.get(), "ctest", "--test-dir", folder, "--output-on-failure", env=env)
    passed = re.search(r"100% tests passed.* out of (\d+)", text)
    if not passed:
        raise Failed("ctest says neither")
    return f"{passed[1]} tests"


def chosen(folder: Path, prefix: Sequence[str], env: Mapping[str, str], wanted: str) -> str:
    """Whether `wanted` is the kernel in use; returns it, or "none" where the CPU has no such thing."""
    text = sh(cell_name.get(), *prefix, folder / "ptqtp-test", "--kernel", env=env)
    found: set[str] = set(re.findall(r"^\S+ (\w+)$", text, re.MULTILINE))
    if found != {wanted} and found != {"none"}:
        raise Failed(f"uses {', '.join(sorted(found))}, not {wanted}")
    return found.pop()


def plain() -> Path:
    have("gcc", "g++")
    return native("gcc", "-DCMAKE_C_COMPILER=gcc", "-DCMAKE_CXX_COMPILER=g++")


def forced(kernel: str) -> str:
    folder, env = plain(), {"PTQTP_KERNEL": kernel}
    if chosen(folder, [], env, kernel) == "none":
        raise Skipped(f"this CPU has no {kernel}")
    return ctest(folder, env)


def emulated(cpu: str, kernel: str) -> str:
    have("qemu-x86_64")
    qemu = ["qemu-x86_64", "-cpu", cpu]
    if chosen(plain(), qemu, {}, kernel) != kernel:
        raise Failed(f"no kernel on a {cpu}")
    for program in ("ptqtp-test", "ptqtp-test-quantize", "ptqtp-test-calibrate"):
        sh(cell_name.get(), *qemu, plain() / program)
    return kernel


def arm(cpu: str, kernel: str) -> str:
    have("aarch64-linux-gnu-gcc", "aarch64-linux-gnu-g++", "qemu-aarch64")
    folder = native("aarch64", f"-DCMAKE_TOOLCHAIN_FILE={REPO / 'native' / 'toolchains' / 'aarch64.cmake'}")
    if chosen(folder, ["qemu-aarch64"], {"QEMU_CPU": cpu}, kernel) != kernel:
        raise Failed(f"no kernel on a {cpu}")
    return f"{ctest(folder, {'QEMU_CPU': cpu})}, {kernel}"


def refused(cc: str) -> str:
    have(cc)
    text = sh(cell_name.get(), cc, "-fsyntax-only", "-x", "c", REPO / "native" / "ptqtp.h", fail=False)
    errors = [line for line in text.splitlines() if "error:" in line]
    if len(errors) != 1 or "little-endian machines only" not in errors[0]:
        raise Failed("compiles, or does not say why not")
    return "refused with one line"


# ---- the runtime ----


def runtime_tests() -> str:
    if not importlib.util.find_spec("ptqtp_gguf") or not importlib.util.find_spec("llama_cpp"):
        raise Skipped("no package and patched runtime in this Python; run make setup")
    tests = "tests/llamacpp/test_model.py"
    text = sh(cell_name.get(), sys.executable, "-m", "pytest", "-q", "-k", "forced or panels_rows", tests)
    return text.strip().splitlines()[-1]


def wheel(machine: str, cpu: str | None) -> str:
    """llama-completion out of a wheel of `make wheels`, on a CPU that qemu plays, with a file of ours."""
    wheels = sorted((REPO / "build" / "dist").glob(f"ptqtp_gguf-*_{machine}.whl"))
    model = REPO / "build" / "demo" / "smollm2-TP2_2.gguf"
    if not wheels or not model.is_file():
        raise Skipped("no wheel or no model; run make wheels, make demo")
    emulator = [f"qemu-{machine}", "-cpu", cpu] if cpu else []
    have(*emulator[:1])
    if machine != "x86_64":  # its loader and C library
        emulator += ["-L", str(REPO / "build" / "sysroot" / machine)]
    folder = BUILD / f"wheel-{machine}"
    stamp = folder / f"{wheels[-1].name}.{wheels[-1].stat().st_mtime_ns}"
    if not stamp.exists():
        shutil.rmtree(folder, ignore_errors=True)
        with zipfile.ZipFile(wheels[-1]) as archive:
            archive.extractall(folder)
        stamp.touch()
    program = folder / "ptqtp_gguf" / "_llama_cpp" / "bin" / "llama-completion"
    program.chmod(0o755)
    ask = ["-m", model, "-p", "The", "-n", "2", "--temp", "0", "-no-cnv", "-t", "1", "-c", "64", "--no-warmup"]
    text = sh(cell_name.get(), *emulator, program, *ask)
    info: dict[str, str] = dict(re.findall(r"(\w+) = (\w+) \|", text))
    if "PTQTP" not in info or not re.search(r"^The ?\S", text, re.MULTILINE):
        raise Failed("generates nothing, or without our kernel")
    if not cpu:
        return info["PTQTP"]
    if machine != "x86_64":
        if info["PTQTP"] != ARM_CPUS[cpu]:
            raise Failed(f"has {info['PTQTP']}, not {ARM_CPUS[cpu]}")
        return info["PTQTP"]
    variant, features, kernel = WHEEL_CPUS[cpu]
    found = {name for name in ("SSSE3", "AVX", "F16C", "AVX2", "AVX512") if name in info}
    if (found, info["PTQTP"]) != (features, kernel):
        raise Failed(f"has {', '.join(sorted(found)) or 'nothing'} and {info['PTQTP']}, not {variant} with {kernel}")
    return f"{variant}, {kernel}"


# ---- Pythons ----


def interpreter(version: str) -> str:
    places = [shutil.which(f"python{version}"), *map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))]
    for place in filter(None, places):
        done = subprocess.run([place, "-c", "import venv"], capture_output=True, check=False)
        if done.returncode == 0:
            return place
    raise Skipped(f"no Python {version} here")


def python(version: str) -> str:
    """The package installed from source, with the lock's versions for this Python, and its tests."""
    base, folder, log = interpreter(version), BUILD / f"python{version}", cell_name.get()
    mine = folder / "bin" / "python"
    if not mine.exists():
        sh(log, base, "-m", "venv", folder)
    whole = (REPO / "requirements" / "setup.lock").read_text()
    entries = re.split(r"^(?=[A-Za-z0-9])", whole, flags=re.MULTILINE)
    lock = folder / "some.lock"
    lock.write_text("".join(entry for entry in entries if not NOT_FOR_THEM.match(entry)))
    pip = [mine, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--no-deps"]
    sh(log, *pip, "--only-binary", ":all:", "--require-hashes", "-r", lock)
    path = {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    sh(
        log,
        *pip,
        "--no-build-isolation",
        "--force-reinstall",
        f"--config-settings=build-dir={folder / 'build'}",
        REPO,
        env=path,
    )
    sh(
        log,
        mine,
        "-W",
        "error",
        "-m",
        "compileall",
        "-q",
        folder / "lib" / f"python{version}" / "site-packages" / "ptqtp_gguf",
    )
    text = sh(log, folder / "bin" / "pytest", "-q", "-m", "not hf and not runtime", *PYTHON_TESTS)
    return text.strip().splitlines()[-1]


def types(version: str) -> str:
    if not importlib.util.find_spec("mypy"):
        raise Skipped("no mypy in this Python; run make setup")
    return sh(cell_name.get(), sys.executable, "-m", "mypy", "--python-version", version).strip().splitlines()[-1]


# ---- the table ----


class _Name:
    """The cell that runs: its log, its build folder."""

    now = ""

    def get(self) -> str:
        return self.now


cell_name = _Name()


def x86_kernels() -> list[str]:
    """The instruction sets of the one list of kernels that can run here, the scalar one among them."""
    text = KERNELS.read_text()
    here = re.sub(r"#ifdef PTQTP_ARM64\n.*?#endif\n", "", text, flags=re.DOTALL)
    return re.findall(r"^PTQTP_PANEL_KERNEL\((\w+)\)$", here, flags=re.MULTILINE)


def cells() -> list[Cell]:
    sanitize = ("-DPTQTP_SANITIZE=ON", "-DPTQTP_OPTIMIZE=-O0")
    table = []
    for cc, cxx in (("gcc", "g++"), ("clang", "clang++")):
        table.append(Cell(cc, f"native tests, {cc} -O3", functools.partial(compiler, cc, cxx)))
        what = f"native tests, {cc} -O0, address and undefined behaviour"
        table.append(Cell(f"{cc}-sanitize", what, functools.partial(compiler, cc, cxx, *sanitize)))
    if X86:
        for name in x86_kernels():
            table.append(Cell(f"kernel-{name}", f"native tests, {name} forced", functools.partial(forced, name)))
        for cpu, kernel in X86_CPUS.items():
            what = f"native tests under qemu, a {cpu}: {kernel}"
            table.append(Cell(f"x86-{cpu}", what, functools.partial(emulated, cpu, kernel)))
    for cpu, kernel in ARM_CPUS.items():
        what = f"native tests under qemu, a {cpu}: {kernel}"
        table.append(Cell(f"aarch64-{cpu}", what, functools.partial(arm, cpu, kernel)))
    for name, cc in BIG_ENDIAN.items():
        table.append(Cell(f"big-endian-{name}", "native/ says that it is not for it", functools.partial(refused, cc)))
    for version in TYPES:
        table.append(Cell(f"types-{version}", f"mypy for Python {version}", functools.partial(types, version)))
    for version in PYTHONS:
        what = f"package installed and tested with Python {version}"
        table.append(Cell(f"python-{version}", what, functools.partial(python, version)))
    table.append(Cell("runtime-kernels", "the patched runtime, each kernel forced", runtime_tests))
    if X86:
        table.append(Cell("wheel-native", "the wheel on this CPU", functools.partial(wheel, "x86_64", None)))
        for cpu, (variant, *_) in WHEEL_CPUS.items():
            what = f"the wheel under qemu, a {cpu}: {variant}"
            table.append(Cell(f"wheel-{cpu}", what, functools.partial(wheel, "x86_64", cpu)))
    for cpu, kernel in ARM_CPUS.items():
        what = f"the wheel under qemu, a {cpu}: {kernel}"
        table.append(Cell(f"wheel-{cpu}", what, functools.partial(wheel, "aarch64", cpu)))
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="the cells")
    parser.add_argument("--only", nargs="+", metavar="PATTERN", default=["*"], help="cells by name: aarch64-* gcc")
    parser.add_argument("--no-skips", action="store_true", help="a cell that this machine cannot run is a failure")
    args = parser.parse_args(arguments)
    table = cells()
    if unknown := [p for p in args.only if not any(fnmatch.fnmatch(cell.name, p) for cell in table)]:
        print(f"error: no cell is called {', '.join(unknown)}; see --list", file=sys.stderr)
        return 2
    table = [cell for cell in table if any(fnmatch.fnmatch(cell.name, p) for p in args.only)]
    width = max(len(cell.name) for cell in table)
    counts = {"ok": 0, "FAIL": 0, "skip": 0}
    for cell in table:
        if args.list:
            print(f"{cell.name:{width}}  {cell.what}")
            continue
        cell_name.now = cell.name
        (BUILD / f"{cell.name}.log").unlink(missing_ok=True)
        start = time.monotonic()
        try:
            result, remark = "ok", cell.run()
        except Skipped as e:
            result, remark = "skip", str(e)
        except Failed as e:
            result, remark = "FAIL", str(e)
        counts[result] += 1
        print(f"{cell.name:{width}}  {result:4}  {time.monotonic() - start:6.1f} s  {remark}", flush=True)
    if args.list:
        return 0
    print(f"{counts['ok']} passed, {counts['FAIL']} failed, {counts['skip']} skipped")
    return 1 if counts["FAIL"] or (args.no_skips and counts["skip"]) else 0


if __name__ == "__main__":
    sys.exit(main())
