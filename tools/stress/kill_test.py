#!/usr/bin/env python3
"""Kill a conversion with SIGKILL at random moments, run it again, and compare the bytes with an uninterrupted run.

    kill_test.py [--points 200] [--seed 1] [--source FILE_OR_FOLDER] [CONVERT OPTIONS ...]

Each point: the conversion starts in a fresh folder, is killed a random time after it has begun to work (about a third
of the resumptions are killed again, one kill in twenty comes while Python starts), and is run until it ends by itself.
Whatever is then in the folder must be exactly the output, equal to the reference byte for byte. Prints at which stage
the kills came, and exits 1 at the first difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from rich.console import Console

console = Console(highlight=False)
IN_TIME = "ended before the kill"


def model(path: Path, n_tensors: int = 24) -> Path:
    """A GGUF with random weights: matrices that become trit planes, Q8_0, and one that falls back halfway."""
    from ptqtp_gguf.files.gguf import OutTensor, kv_string, write_stream

    rng = np.random.default_rng(1)
    tensors, data = [OutTensor("token_embd.weight", (1024, 4096), 0)], [rng.normal(size=(4096, 1024))]
    for i in range(n_tensors):
        tensors += [OutTensor(f"blk.{i}.w.weight", (1024, 1024), 0), OutTensor(f"blk.{i}.attn_norm.weight", (1024,), 0)]
        data += [rng.normal(size=(1024, 1024)) * 0.05, np.ones((1, 1024))]
    data[n_tensors][-1, -1] = 20.0  # beyond the scales: noticed at the end of the tensor
    with open(path, "wb") as f:
        blocks = (d.astype(np.float32).view(np.uint8) for d in data)
        list(write_stream(f, [kv_string("general.architecture", "llama")], tensors, 32, blocks))
    return path


def command(source: Path, out: Path, options: list[str]) -> list[str]:
    return [str(Path(sys.executable).with_name("ptqtp-gguf")), "convert", str(source), str(out), "-q", *options]


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def stage(out: Path) -> str:
    """How far the killed process had come, by what it left."""
    journal = out.with_name(f".{out.name}.journal")
    if not journal.exists():
        return "done" if any(out.parent.iterdir()) else "before it began"
    lines = journal.read_bytes().split(b"\n")
    whole = [json.loads(x) for x in lines[:-1]]
    if any("verified" in x for x in whole):
        return "publishing"
    job = next((x["job"] for x in whole if "job" in x), None)
    done = sum("tensor" in x for x in whole)
    if job is None:
        return "opening"
    return "finishing" if done == len(job["plan"]) else "first tensor" if done == 0 else "quantizing"


def wait_for_work(process: subprocess.Popen[bytes], out: Path) -> None:
    """Until a conversion has opened its journal, or the process has ended."""
    journal = out.with_name(f".{out.name}.journal").resolve()
    while process.poll() is None and not holds(process.pid, journal):
        time.sleep(0.001)


def holds(pid: int, path: Path) -> bool:
    """Whether a process has a file open."""
    try:
        return any(os.path.realpath(fd) == str(path) for fd in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False


def run_point(source: Path, folder: Path, options: list[str], span: float, rng: random.Random) -> list[str]:
    """One kill and its resumption. Returns the stages at which kills came. Raises RuntimeError if a run fails."""
    out, stages = folder / "out.gguf", []
    again = 1.0
    while rng.random() < again:
        process = subprocess.Popen(command(source, out, options), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        early = rng.random() < 0.05
        if not early:
            wait_for_work(process, out)
        try:
            process.wait(rng.uniform(0, 0.3 if early else span))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        _, err = process.communicate()
        if process.returncode == 0:
            stages.append(IN_TIME)
            return stages
        if process.returncode != -signal.SIGKILL:
            raise RuntimeError(f"a resumed run failed: {err.decode()}")
        stages.append(stage(out))
        if stages[-1] == "done":  # killed behind the last step: complete, and another run would say so
            return stages
        again = 0.35
    done = subprocess.run(command(source, out, options), capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the resumed run failed: {done.stderr.decode()}")
    return stages


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--source", type=Path)
    args, options = parser.parse_known_args(argv)
    rng = random.Random(args.seed)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        source = args.source or model(work / "model.gguf")
        reference = work / "reference"
        reference.mkdir()
        process = subprocess.Popen(command(source, reference / "out.gguf", options))
        wait_for_work(process, reference / "out.gguf")
        started = time.monotonic()
        if process.wait():
            raise SystemExit("kill_test: the uninterrupted run failed")
        span = time.monotonic() - started
        expected = digest(reference)
        console.print(f"uninterrupted: {span:.2f} s of work, {len(expected)} file(s)")
        point = 0
        while point < args.points:
            folder = work / "point"
            folder.mkdir()
            stages = run_point(source, folder, options, span, rng)
            counts.update(stages)
            if digest(folder) != expected:
                console.print(
                    f"point {point}: killed at {stages}: the files differ: {sorted(digest(folder))}", style="red"
                )
                return 1
            shutil.rmtree(folder)
            if stages == [IN_TIME]:  # was not killed at all, so it does not count
                continue
            point += 1
            if point % 20 == 0:
                console.print(f"{point} points: identical")
    kills = sum(n for s, n in counts.items() if s != IN_TIME)
    console.print(f"{args.points} points, {kills} kills, all identical: {dict(counts.most_common())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
