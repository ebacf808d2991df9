"""bench: speed of files side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..measure import Bench, File, Round
from ..measure import bench as measure
from ..terminal import event, line, out_console, right, whole
from .common import AsJson, Quiet, fail, numbers, reporter

STARTS = (  # what, header, digits, factor; columns of which nothing is known are left out
    ("load_s", "load s", 2, 1.0),
    ("ttft_s", "first token s", 2, 1.0),
    ("peak_memory", "peak MB", 0, 1e-6),
    ("energy", "J/token", 3, 1.0),
)


def bench(
    files: Annotated[list[Path], typer.Argument(help="GGUF files; speeds are compared with the first.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Tokens to take in at once; '' = none.")] = "128,512",
    generate: Annotated[str, typer.Option("--generate", "-n", help="Tokens to make one by one; '' = none.")] = "64",
    threads: Annotated[str, typer.Option("--threads", "-j", help="Numbers of threads; '' = all cores.")] = "",
    rounds: Annotated[int, typer.Option("--rounds", "-r", min=1, help="Rounds; each measures every file once.")] = 5,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure tokens a second, first token, memory and energy of files, in turn, on this machine.

    Tests: pp128 is taking in a prompt of 128 tokens, tg64 making 64 tokens. Ctrl-C shows the rounds that are finished.

    Examples:

      ptqtp-gguf bench model.gguf

      ptqtp-gguf bench model.gguf model-Q4_0.gguf model-Q4_K_M.gguf --threads 1,2

      ptqtp-gguf bench model.gguf model-Q4_0.gguf --prompt '' --generate 32 --rounds 11 --json
    """
    lengths, made = numbers(prompt, "--prompt"), numbers(generate, "--generate")
    counts = numbers(threads, "--threads") or None
    kept: list[Round] = []
    try:
        with reporter(quiet, as_json) as progress:
            result = measure(
                files, prompt=lengths, generate=made, threads=counts, rounds=rounds, keep=kept.append, progress=progress
            )
    except KeyboardInterrupt:
        if kept:
            part = measure(files, prompt=lengths, generate=made, threads=counts, rounds=len(kept), done=kept)
            _show(part, quiet, as_json, "partial")
        fail(f"interrupted; {len(kept)} of {rounds} rounds were measured", 130)
    _show(result, quiet, as_json, "done")


def _show(b: Bench, quiet: bool, as_json: bool, name: str) -> None:
    if as_json:
        event(name, **b.as_dict())
    elif not quiet:
        print_bench(b)


def print_bench(b: Bench) -> None:
    """The table of speeds, what the machine is, and what may mislead."""
    first, s = b.files[0], b.settings
    table = Table(whole("file"), right("MB"), *(right(f"{key} t/s") for key in s.keys))
    starts = [column for column in STARTS if any(b.start(f, column[0]) is not None for f in b.files)]
    for _, header, _, _ in starts:
        table.add_column(header, justify="right")
    for f in b.files:
        cells = [_speed(b, f, first, key) for key in s.keys]
        cells += [_cell(b.start(f, what), digits, factor) for what, _, digits, factor in starts]
        table.add_row(f.label, f"{f.size / 1e6:.1f}", *cells)
    out_console.print(table)
    compared = f"; in brackets: times as fast as {first.label}, paired by round, ? = no clear difference from 1"
    line(
        f"median of {len(b.rounds)} round{'s' * (len(b.rounds) > 1)}{compared if len(b.files) > 1 else ''}; "
        f"first token after a prompt of {s.first}"
    )
    m = b.machine
    memory = f", {m.memory / 1e9:.1f} GB" if m.memory else ""
    line(f"machine: {m.cpu}, {m.cores} cores{memory}, {m.os}, kernel {m.kernel or 'unknown'}")
    for t, roof in b.bandwidth.items():
        shares = [
            f"{f.label} {share:.0%}"
            for f in b.files
            for key in s.keys
            if key.endswith(f" t{t}") and (share := b.share(f, key)) is not None
        ]
        used = f"; decoding reaches {', '.join(shares)} of it" if shares else ""
        line(f"memory, {t} thread{'s' * (t > 1)}: {roof / 1e9:.1f} GB/s{used}")
    for text in b.warnings:
        line(f"  warning: {text}")


def _speed(b: Bench, f: File, first: File, key: str) -> str:
    """ "72.9", and for all but the first file "72.9 (1.10x)"."""
    speed = b.speed(f, key).median
    digits = 1 if speed < 1000 else 0
    if f is first:
        return f"{speed:.{digits}f}"
    ratio = b.ratio(f, first, key)
    return f"{speed:.{digits}f} ({ratio.median:.2f}x{'' if ratio.clear else '?'})"


def _cell(value: float | None, digits: int, factor: float) -> str:
    return "" if value is None else f"{value * factor:.{digits}f}"
