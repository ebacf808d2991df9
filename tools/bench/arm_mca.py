#!/usr/bin/env python3
"""Predict the speed of the AArch64 panel kernels with llvm-mca: a prediction from LLVM's tables, not a measurement.

Needs Debian's gcc-aarch64-linux-gnu and llvm (19 or later: older ones have no table for Neoverse N1 and V2).
LLVM takes the Cortex-A57's table for the Cortex-A76, which has nearly the core of the Neoverse N1: read both.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

NATIVE = Path(__file__).resolve().parents[2] / "native"
PLAIN_CPUS = ["cortex-a53", "cortex-a72"]
DOTPROD_CPUS = ["cortex-a55", "cortex-a76", "neoverse-n1", "neoverse-v2", "apple-m1"]
I8MM_CPUS = ["neoverse-n2", "neoverse-v2"]
FILES = {
    "kernels/arm/dot-neon.c": PLAIN_CPUS,
    "kernels/arm/dot-neon-dotprod.c": DOTPROD_CPUS,
    "kernels/arm/panel-neon.c": PLAIN_CPUS,
    "kernels/arm/panel-neon-dotprod.c": DOTPROD_CPUS,
    "kernels/arm/panel-neon-i8mm.c": I8MM_CPUS,
}
# GHz, of the machine meant: Raspberry Pi 3, 4, 5; Graviton 2, Cobalt 100, Graviton 4; MacBook
CLOCK = {
    "cortex-a53": 1.2,
    "cortex-a72": 1.8,
    "cortex-a55": 1.8,
    "cortex-a76": 2.4,
    "neoverse-n1": 2.5,
    "neoverse-n2": 3.4,
    "neoverse-v2": 2.8,
    "apple-m1": 3.2,
}
MARK = "// LLVM-MCA-BEGIN "
WEIGHTS = {"row": 128, "gemv": 512, "gemv tp2_2": 512, "gemv_wide": 512, "unpack": 256}  # in one pass through the loop


@dataclass
class Loop:
    name: str
    lines: list[str]

    @property
    def weights(self) -> int:
        """Weights in one pass; for "gemm ROWSxCOLUMNS" times the columns, that is multiplications."""
        shape = re.fullmatch(r"gemm (\d+)x(\d+)", self.name)
        return int(shape[1]) * int(shape[2]) * 32 if shape else WEIGHTS[self.name]


def file_flags() -> dict[str, list[str]]:
    text = (NATIVE / "sources.cmake").read_text()
    return {name: flags.split() for name, flags in re.findall(r'"([\w/-]+\.c):([^"]*)"', text)}


def compile_file(compiler: list[str], name: str, flags: list[str]) -> list[str]:
    command = [*compiler, "-O3", "-std=gnu11", "-ffp-contract=off", "-DPTQTP_MCA", *flags]
    command += [f"-I{NATIVE}", "-S", "-o", "-", str(NATIVE / name)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def find_loops(lines: list[str]) -> list[Loop]:
    """The loop around the first mark of each name: from the label above it to the branch back to that label."""
    loops: dict[str, Loop] = {}
    for at, line in enumerate(lines):
        name = line.split(MARK)[-1].strip()
        if MARK not in line or name in loops:
            continue
        start = max(i for i in range(at) if re.match(r"\.L\w+:", lines[i]))
        branch = re.compile(rf"\s(c?b|tb)[\w.]*\s.*{re.escape(lines[start].split(':')[0])}\s*(//.*)?$")
        end = next((i for i in range(at, len(lines)) if branch.search(lines[i])), None)
        if end is None:
            sys.exit(f"no branch back to the start of the loop '{line.strip()}'")
        body = [x.split("//")[0].strip() for x in lines[start + 1 : end + 1]]
        body = [x for x in body if x and not x.startswith(("#", "."))]
        if any(re.match(r"[\w.$]+:|b\s|b\.|cbn?z|tbn?z|bl\s", x) for x in body[:-1]):
            sys.exit(f"the loop '{line.strip()}' is not one straight piece of code")
        loops[name] = Loop(name, body)
    return list(loops.values())


def predict(mca: str, cpu: str, loop: Loop, iterations: int) -> tuple[float, int]:
    command = [mca, "-march=aarch64", f"-mcpu={cpu}", "-mattr=+dotprod,+i8mm", f"-iterations={iterations}"]
    command += ["-instruction-info=0", "-resource-pressure=0"]
    run = subprocess.run(command, input="\n".join(loop.lines) + "\n", capture_output=True, text=True)
    cycles = re.search(r"Total Cycles:\s+(\d+)", run.stdout)
    if not cycles:
        sys.exit(f"{' '.join(command)} failed:\n{run.stderr}")
    return int(cycles[1]) / iterations, len(loop.lines)


def newest_mca() -> str:
    for name in ["llvm-mca-21", "llvm-mca-20", "llvm-mca-19", "llvm-mca"]:
        if found := shutil.which(name):
            return found
    sys.exit("llvm-mca not found: install Debian's llvm-19")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiler", default="aarch64-linux-gnu-gcc", help="with any further flags")
    parser.add_argument("--mca", help="the llvm-mca to run (default: the newest installed)")
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--only", default="", help="files whose name contains this")
    parser.add_argument("--cpu", action="append", help="these CPUs instead of each file's own")
    args = parser.parse_args()
    mca = args.mca or newest_mca()
    flags = file_flags()
    print("Weights a cycle and 10^9 a second; for gemm times the columns.")
    print(f"{'file':28} {'loop':10} {'cpu':12} {'instr.':>7} {'cycles':>7} {'a cycle':>8} {'GHz':>5} {'G/s':>6}")
    for name, cpus in FILES.items():
        if args.only not in name:
            continue
        for loop in find_loops(compile_file(args.compiler.split(), name, flags[name])):
            for cpu in args.cpu or cpus:
                cycles, count = predict(mca, cpu, loop, args.iterations)
                rate = loop.weights / cycles
                clock = CLOCK.get(cpu, 1.0)
                print(
                    f"{Path(name).name:28} {loop.name:10} {cpu:12} {count:7} {cycles:7.1f} {rate:8.2f} "
                    f"{clock:5.1f} {rate * clock:6.2f}"
                )


if __name__ == "__main__":
    main()
