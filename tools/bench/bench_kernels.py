#!/usr/bin/env python3
"""Tokens a second of our file beside stock types run by a stock build, with the memory roofline.

    bench_kernels.py --stock STOCK/bin --probe build/native/ptqtp-bench FILE PEER... [--threads 1,2] [--json OUT]

FILE runs in the patched build that is installed, each PEER (LABEL=PATH) in the stock llama-bench, by default with
CPU_REPACK on. Every round runs every file once, in turn, so that a drifting machine hits all alike; the best round
counts. The roofline: bytes of weights read a token (all matrices but an untied embedding), over the read bandwidth that
ptqtp-bench measures in each round.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ptqtp_gguf.llamacpp import install
from ptqtp_gguf.measure.speed import token_bytes
from ptqtp_gguf.source.gguf import GgufSource


@dataclass
class Row:
    """Best tokens a second by (test, threads); bytes of weights that one decoded token reads."""

    label: str
    path: Path
    bench: Path
    env: dict[str, str] = field(default_factory=dict)
    token_bytes: int = 0
    speed: dict[str, float] = field(default_factory=dict)


def run(row: Row, threads: int, prompts: list[int], generate: int) -> None:
    """One llama-bench run; keeps the better of what was and what is."""
    args = [str(row.bench), "-m", str(row.path), "-t", str(threads), "-r", "1", "-o", "json", "-n", str(generate)]
    args += ["-p", ",".join(map(str, prompts))]
    done = subprocess.run(args, capture_output=True, text=True, env={**os.environ, **row.env}, check=False)
    if done.returncode:
        sys.exit(f"bench_kernels: {' '.join(args)} failed: {done.stderr.strip()[-500:]}")
    for result in json.loads(done.stdout):
        test = f"pp{result['n_prompt']}" if result["n_prompt"] else f"tg{result['n_gen']}"
        key = f"{test} t{threads}"
        row.speed[key] = max(row.speed.get(key, 0.0), float(result["avg_ts"]))


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("peers", nargs="*", metavar="LABEL=PATH")
    parser.add_argument("--stock", type=Path, help="folder of a stock llama-bench for the peers; else the patched one")
    parser.add_argument("--probe", type=Path, required=True, help="the built ptqtp-bench")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--prompt", default="128,512")
    parser.add_argument("--generate", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kernel", action="append", default=[], help="also FILE with this kernel forced")
    parser.add_argument("--wide", action="store_true", help="also FILE expanded to wide panels")
    parser.add_argument("--also", action="append", default=[], metavar="LABEL=PATH", help="another file of ours")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    ours = install.tool("llama-bench")
    rows = [Row("ours", args.file, ours)]
    rows += [Row("ours wide", args.file, ours, {"PTQTP_EXPAND": "1"})] if args.wide else []
    rows += [Row(f"ours {name}", args.file, ours, {"PTQTP_KERNEL": name}) for name in args.kernel]
    theirs = args.stock / "llama-bench" if args.stock else ours
    for tool, given in ((ours, args.also), (theirs, args.peers)):
        pairs = [text.partition("=") for text in given]
        rows += [Row(label, Path(path), tool) for label, _, path in pairs]
    threads = [int(t) for t in args.threads.split(",")]
    prompts = [int(p) for p in args.prompt.split(",") if p]
    bandwidth = dict.fromkeys(threads, 0.0)
    for row in rows:
        with GgufSource(row.path) as source:
            row.token_bytes = token_bytes(source)
    for number in range(args.rounds):
        for t in threads:
            probe = subprocess.run([args.probe, "--read", str(t), "1"], capture_output=True, text=True, check=True)
            bandwidth[t] = max(bandwidth[t], float(probe.stdout))
            for row in rows[number % len(rows) :] + rows[: number % len(rows)]:
                run(row, t, prompts, args.generate)
    table = Table("test", "roofline", *(f"{row.label}" for row in rows))
    for key in rows[0].speed:
        t = int(key.rpartition("t")[2])
        first = rows[0].speed[key]
        cells = [f"{first:.1f}"] + [f"{row.speed[key]:.1f} ({first / row.speed[key]:.2f}x)" for row in rows[1:]]
        share = first * rows[0].token_bytes * 1e-9 / bandwidth[t] if key.startswith("tg") else 0.0
        table.add_row(key, f"{share:.0%}" if share else "", *cells)
    console = Console(width=160)
    console.print(table)
    for t in threads:
        console.print(f"read bandwidth, {t} threads: {bandwidth[t]:.2f} GB/s")
    for row in rows:
        console.print(f"{row.label}: {row.token_bytes / 1e6:.1f} MB of weights a token")
    if args.json:
        data = {"rows": [asdict(row) for row in rows], "bandwidth": bandwidth}
        args.json.write_text(json.dumps(data, indent=1, default=str), encoding="utf-8")


if __name__ == "__main__":
    main()
