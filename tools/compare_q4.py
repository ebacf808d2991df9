#!/usr/bin/env python3
"""Compare GGUF files of one model: size, perplexity and KL divergence to a reference, tokens a second.

    compare_q4.py --reference BF16.gguf --text TEXT.txt [--chunks N] [--ctx 512] [--threads N] [--json OUT] FILE...

Quality by llama-perplexity and speed by llama-bench of the patched build (stock types run there unchanged, with
CPU_REPACK on). Each FILE may be LABEL=PATH. A type name such as Q4_0 or Q8_0 makes the peer from the reference with
llama-quantize first. Rounds of the benchmark are interleaved; the best of --rounds counts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ptqtp_gguf import runtime
from ptqtp_gguf.errors import PtqtpError
from ptqtp_gguf.inspect import inspect


@dataclass
class Row:
    """One file. ppl and kld by llama-perplexity; speeds in tokens a second, best of the rounds."""

    label: str
    path: Path
    mb: float
    bpw: float
    ppl: float = float("nan")
    kld: float = float("nan")
    same_top: float = float("nan")
    prompt: float = 0.0
    decode: float = 0.0


def _number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    if not found:
        raise SystemExit(f"compare_q4: llama-perplexity printed no line for {pattern!r}:\n{text[-2000:]}")
    return float(found.group(1))


def quality(rows: list[Row], reference: Path, text: Path, ctx: int, chunks: int, threads: int) -> float:
    """Fill in ppl, kld and same_top. Returns the reference's perplexity."""
    with tempfile.TemporaryDirectory() as tmp:
        base = str(Path(tmp) / "logits")
        args = ["-c", str(ctx), "--chunks", str(chunks), "-t", str(threads), "--kl-divergence-base", base]
        out = runtime.run_tool("llama-perplexity", "-m", str(reference), "-f", str(text), *args)
        ppl = _number(r"Final estimate: PPL = ([0-9.]+)", out)
        for row in rows:
            out = runtime.run_tool("llama-perplexity", "-m", str(row.path), *args, "--kl-divergence")
            row.ppl = _number(r"Mean PPL\(Q\)\s*:\s*([0-9.]+)", out)
            row.kld = _number(r"Mean\s+KLD:\s*([0-9.eE+-]+)", out)
            row.same_top = _number(r"Same top p:\s*([0-9.]+)", out)
    return ppl


def speed(rows: list[Row], prompt: int, decode: int, rounds: int, threads: int) -> None:
    """Fill in tokens a second, the files in turn within each round."""
    for _ in range(rounds):
        for row in rows:
            out = runtime.run_tool(
                "llama-bench", "-m", str(row.path), "-p", str(prompt), "-n", str(decode), "-r", "1",
                "-t", str(threads), "-o", "json",
            )  # fmt: skip
            for result in json.loads(out[out.index("[\n") : out.rindex("]") + 1]):
                if result["n_gen"]:
                    row.decode = max(row.decode, result["avg_ts"])
                else:
                    row.prompt = max(row.prompt, result["avg_ts"])


def make_peer(kind: str, reference: Path, folder: Path, threads: int) -> Path:
    """Quantize the reference with llama-quantize."""
    path = folder / f"{reference.stem}.{kind}.gguf"
    if not path.exists():
        part = path.with_suffix(".partial")
        runtime.run_tool("llama-quantize", str(reference), str(part), kind, str(threads))
        part.replace(path)
    return path


def rows_of(files: list[str], reference: Path, folder: Path, threads: int) -> list[Row]:
    rows = []
    for item in files:
        label, _, name = item.rpartition("=")
        path = Path(name)
        if not label and re.fullmatch(r"[A-Z0-9_]+", name) and not path.exists():
            label, path = name, make_peer(name, reference, folder, threads)
        report = inspect(path)
        rows.append(Row(label or path.stem, path, report.size / 1e6, report.bpw))
    return rows


def table(rows: list[Row], reference_ppl: float, prompt: int, decode: int) -> Table:
    head = ["", "MB", "bpw", "perplexity", "KLD", "same top", f"prompt {prompt} t/s", f"decode {decode} t/s"]
    t = Table(*head, caption=f"perplexity of the reference: {reference_ppl:.3f}; KLD is to its logits")
    for r in rows:
        cells = f"{r.mb:.1f} {r.bpw:.3f} {r.ppl:.3f} {r.kld:.4f} {r.same_top:.1f}% {r.prompt:.0f} {r.decode:.1f}"
        t.add_row(r.label, *cells.split())
    return t


def compare(args: argparse.Namespace, say: Callable[[str], None] = lambda _: None) -> tuple[list[Row], float]:
    reference = Path(args.reference)
    rows = rows_of(args.files, reference, reference.parent, args.threads)
    say("perplexity and KL divergence ...")
    ppl = quality(rows, reference, Path(args.text), args.ctx, args.chunks, args.threads)
    say("tokens a second ...")
    speed(rows, args.prompt, args.decode, args.rounds, args.threads)
    return rows, ppl


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--reference", required=True, help="GGUF whose logits are the reference, bf16 or f16")
    p.add_argument("--text", default=str(Path(__file__).with_name("sample.txt")), help="text to score")
    p.add_argument("--ctx", type=int, default=512)
    p.add_argument("--chunks", type=int, default=-1, help="windows of the text to score; -1 = all")
    p.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    p.add_argument("--prompt", type=int, default=128)
    p.add_argument("--decode", type=int, default=32)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--json", help="write the rows here too")
    p.add_argument("files", nargs="+", metavar="FILE")
    return p


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    try:
        rows, ppl = compare(args, lambda text: print(text, file=sys.stderr, flush=True))
    except PtqtpError as e:
        print(f"compare_q4: {e}", file=sys.stderr)
        return 1
    Console(width=max(100, Console().width)).print(table(rows, ppl, args.prompt, args.decode))
    if args.json:
        records = [{**asdict(r), "path": r.path.name} for r in rows]
        Path(args.json).write_text(json.dumps({"reference_ppl": ppl, "rows": records}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
