"""Fuzzing: native code with sanitizers, the readers in Python, the patched loader. Seeds and findings are kept.

    python tools/fuzz/fuzz.py [--minutes M] [--seed N] [--compiler clang|gcc] [--folder build/fuzz] [TARGET ...]

TARGET: rows, dot, quantize (native/fuzz), gguf (ggml's reader, patched, with sanitizers), python (fuzz_readers.py),
loader (fuzz_loader.py; needs the patched runtime). All of them if none is named. M: minutes of computing a target.
Corpora grow in FOLDER/corpus, what breaks something goes to FOLDER/findings, and FOLDER/summary.json has the figures.
Exit status 1 if anything was found.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
NATIVE = ("rows", "dot", "quantize")
TARGETS = (*NATIVE, "gguf", "python", "loader")
MAX_LEN = {"rows": 16384, "dot": 16384, "quantize": 32768, "gguf": 8192}
SANITIZERS = {
    "ASAN_OPTIONS": "abort_on_error=0:detect_leaks=1:allocator_may_return_null=1:max_allocation_size_mb=4096",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "GGML_NO_BACKTRACE": "1",  # by gdb, where there is one: it takes long
}


def tool(name: str) -> Any:
    """tools/NAME.py as a module; NAME with its folder."""
    path = REPO / "tools" / f"{name}.py"
    name = path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


# ---- building ----


def patched_tree(folder: Path) -> Path:
    """llama-cpp-python's sources with our patches, made once for each set of them."""
    runtime = tool("build/build_runtime")
    upstream = runtime.choose_upstream(None)
    stamp = runtime.fingerprint([upstream.folder / "UPSTREAM", *upstream.patches])
    tree: Path = folder / "tree"
    if not (tree / runtime.TREE_STAMP).is_file() or (tree / runtime.TREE_STAMP).read_text() != stamp:
        sdist = runtime.find_sdist(None, REPO / "build", upstream)
        runtime.make_tree(sdist, tree, upstream.patches, stamp)
    runtime.copy_native(tree)
    return tree


def build(folder: Path, compiler: str, targets: list[str]) -> Path:
    """The native targets; returns their folder."""
    home = folder / compiler
    defines = ["-DPTQTP_FUZZ=ON", "-DPTQTP_TESTS=OFF", "-DPTQTP_SHARED=OFF", "-DCMAKE_BUILD_TYPE=Release"]
    if "gguf" in targets:
        defines.append(f"-DPTQTP_FUZZ_GGML={patched_tree(folder)}")
    compilers = {"clang": ("clang", "clang++"), "gcc": ("gcc", "g++")}[compiler]
    defines += [f"-DCMAKE_C_COMPILER={compilers[0]}", f"-DCMAKE_CXX_COMPILER={compilers[1]}"]
    names = [f"fuzz-{t}" for t in targets]
    for command in (
        ["cmake", "-S", str(REPO), "-B", str(home), "-G", "Ninja", *defines],
        ["cmake", "--build", str(home), "--target", *names],
    ):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            sys.exit(f"error: {' '.join(command)}: {done.stdout[-2000:]}")
    return home


def default_compiler() -> str:
    """clang where it has libFuzzer, else gcc and our driver."""
    if shutil.which("clang") and shutil.which("clang++"):
        found = subprocess.run(
            ["clang", "-fsanitize=fuzzer", "-x", "c++", "-", "-o", os.devnull],
            input='extern "C" int LLVMFuzzerTestOneInput(const unsigned char *, unsigned long) { return 0; }',
            capture_output=True,
            text=True,
        )
        if found.returncode == 0:
            return "clang"
    return "gcc"


# ---- seeds ----


def seeds(target: str, seed: int) -> list[bytes]:
    """Inputs to begin with: what the packers and files look like."""
    rng = random.Random(f"{target} {seed}")
    words = [-(-n * 65536 // 59049) for n in range(59049)]
    rests = [-(-n * 256 // 81) for n in range(81)]

    def unit(side: int) -> bytes:
        return struct.pack("<6HBB", *rng.choices(words, k=6), side, rng.choice(rests))

    def tp2_0() -> bytes:
        return b"".join(unit(side) for a in range(2) for side in (rng.randrange(256), rng.randrange(64)))

    def floats(n: int, scale: float) -> bytes:
        return struct.pack(f"<{n}f", *(rng.gauss(0, scale) for _ in range(n)))

    valid = {t: [b"".join(unit(rng.randrange(256)) for _ in range(k)) for k in (1, 16, 80)] for t in (1, 2)}
    valid[0] = [b"".join(tp2_0() for _ in range(k)) for k in (1, 5, 20)]
    if target == "rows":
        return [bytes([t, r]) + raw for t in sorted(valid) for raw in valid[t] for r in (0, 15, 19)]
    if target == "dot":
        return [
            bytes([t, r]) + raw + b"".join(b"\0\x3c" + rng.randbytes(32) for _ in range(len(raw) // 14))
            for t in sorted(valid)
            for raw in valid[t]
            for r in (0, 15, 19, 128 + 17)
        ]
    if target == "quantize":
        heads = [bytes([flags, rows, 2, 31]) for flags in (0, 1, 2, 4, 5, 8, 9, 13, 29, 32, 38) for rows in (0, 3)]
        return [h + floats(n, 0.02) for h in heads for n in (300, 1300)] + [
            h + floats(6500, 1) for h in (heads[3], heads[-3])
        ]
    readers, attacks = tool("fuzz/fuzz_readers"), tool("fixtures/make_attacks")
    return [*readers.sound()["gguf"], *(raw for _, kind, raw in attacks.FILES.values() if kind in ("gguf", "data"))]


def write_seeds(target: str, seed: int, corpus: Path) -> None:
    corpus.mkdir(parents=True, exist_ok=True)
    for i, raw in enumerate(seeds(target, seed)):
        (corpus / f"seed-{i:03d}").write_bytes(raw)


# ---- running ----


def run_native(target: str, home: Path, seconds: int, seed: int, folder: Path) -> dict[str, Any]:
    """One native target. libFuzzer counts seconds of the clock, our driver those of computing.

    An assertion of upstream's own ends the process, and is counted by itself; then the next process goes on.
    """
    corpus, findings = folder / "corpus" / target, folder / "findings"
    write_seeds(target, seed, corpus)
    findings.mkdir(parents=True, exist_ok=True)
    before, spent = computed(), 0.0
    runs = edges = 0
    upstream: Counter[str] = Counter()
    lines: list[str] = []
    while not lines and spent < seconds:
        command = [str(home / f"fuzz-{target}"), f"-max_total_time={max(1, round(seconds - spent))}"]
        command += [f"-seed={seed + 1 + upstream.total() * 100_003}", f"-max_len={MAX_LEN[target]}"]
        command += [f"-artifact_prefix={findings}/{target}-", "-timeout=60", "-rss_limit_mb=4096"]
        done = subprocess.run(
            [*command, "-print_final_stats=1", str(corpus)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            errors="replace",
            env={**os.environ, **SANITIZERS},
        )
        spent = computed() - before
        out = done.stdout
        runs += max(map(int, re.findall(r"(?:stat::number_of_executed_units:|runs:)\s+(\d+)", out)), default=0)
        edges = max(map(int, re.findall(r"(?:cov:|edges:) (\d+)", out)), default=edges)
        asserted = re.findall(r"([^\s/]+\.(?:cpp|c|h):\d+: GGML_(?:ASSERT|ABORT)[^\n]{1,120})", out)
        if done.returncode == -signal.SIGABRT and asserted and "ptqtp" not in asserted[-1]:
            upstream[asserted[-1]] += 1
            (findings / f"{target}-crash").unlink(missing_ok=True)
        elif done.returncode:
            lines = [x for x in out.splitlines() if re.search(r"ERROR|runtime error|timeout:|SUMMARY|: .*: ", x)][-5:]
            lines = lines or [out[-500:]]
        else:
            break
    return {
        "target": target,
        "runs": runs,
        "edges": edges,
        "inputs": len(list(corpus.iterdir())),
        "findings": lines,
        "upstream_aborts": upstream,
        "cpu_seconds": round(spent, 1),
    }


def computed() -> float:
    """Seconds that children of this process have computed."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_script(name: str, seconds: int, seed: int, folder: Path) -> list[dict[str, Any]]:
    """fuzz_readers.py or fuzz_loader.py: a line of JSON a result."""
    command = [sys.executable, str(REPO / "tools" / "fuzz" / f"fuzz_{name}.py"), "--seed", str(seed)]
    command += ["--seconds", str(seconds), "--corpus", str(folder / "corpus")]
    before = computed()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if not results or (done.returncode and not any(r["findings"] for r in results)):
        results.append({"target": name, "runs": 0, "findings": [f"{command[1]} ended with {done.returncode}"]})
    results[-1]["cpu_seconds_of_all"] = round(computed() - before, 1)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--minutes", type=float, default=1, help="of computing, a target (1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compiler", choices=("clang", "gcc"), default=None, help="clang where it has libFuzzer")
    parser.add_argument("--built", type=Path, help="folder of native targets that were built elsewhere")
    parser.add_argument("--folder", type=Path, default=REPO / "build" / "fuzz")
    args = parser.parse_args()
    targets = args.targets or list(TARGETS)
    if unknown := [t for t in targets if t not in TARGETS]:
        parser.error(f"{unknown[0]}: no such target; there are {', '.join(TARGETS)}")
    folder, seconds = args.folder.resolve(), max(1, round(60 * args.minutes))
    folder.mkdir(parents=True, exist_ok=True)
    compiler = args.compiler or default_compiler()
    native = [t for t in targets if t in (*NATIVE, "gguf")]
    home = args.built or (build(folder, compiler, native) if native else folder)
    results: list[dict[str, Any]] = []
    for target in targets:
        started = time.monotonic()
        if target in native:
            found = [{**run_native(target, home, seconds, args.seed, folder), "compiler": compiler}]
        else:
            found = run_script({"python": "readers"}.get(target, target), seconds, args.seed, folder)
        for result in found:
            print(json.dumps(result), f"{time.monotonic() - started:.0f} s", flush=True)
        results += found
    (folder / "summary.json").write_text(json.dumps(results, indent=1) + "\n")
    findings = sum(len(r["findings"]) for r in results)
    print(f"{findings} findings" + (f", see {folder / 'findings'}" if findings else ""))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
