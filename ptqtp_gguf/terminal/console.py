"""What the command line shows: progress as a bar or as JSON lines, plans, summaries, verdicts."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from ..conversion import Plan, Summary
from ..errors import OutputError, printable
from ..files import type_name
from ..inspect import Verdict
from ..measure import Likeness
from ..system import resident

# a file or a pipe has no width of its own: wide enough that names stay whole
_wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 180
out_console = Console(highlight=False, width=_wide)
err_console = Console(stderr=True, highlight=False)

INTERVAL = 0.5  # seconds between progress lines
WEIGHTED = ("checking", "quantizing", "verifying", "exporting", "comparing", "counting")  # stages that count weights


class Bar:
    """Shows the library's progress reports as one rich bar a stage; on no terminal, nothing."""

    def __init__(self, quiet: bool) -> None:
        self.bar = Progress(
            TextColumn("{task.description:>10}"),
            BarColumn(20),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=err_console,
            disable=quiet or not err_console.is_terminal,
            transient=True,
        )
        self.tasks: dict[str, TaskID] = {}
        self.begun: dict[str, tuple[float, int]] = {}
        self.seen = 0.0

    def __enter__(self) -> Bar:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, stage: str, done: int, total: int, detail: str) -> None:
        now = time.monotonic()
        if stage not in self.tasks:
            self.tasks[stage] = self.bar.add_task(stage, total=total or None, detail="")
            self.begun[stage] = (now, done)
        if now - self.seen < 0.05 and done != total:
            return
        self.seen = now
        start, first = self.begun[stage]
        speed = ""
        if stage in WEIGHTED and now > start:
            speed = f"{(done - first) / 1e6 / (now - start):6.1f} Mw/s {resident() / 1e6:5.0f} MB  "
        width = max(10, err_console.width - 65 - len(speed))
        self.bar.update(
            self.tasks[stage], completed=done, total=total or None, detail=speed + printable(detail[-width:])
        )


class JsonLines:
    """Progress as JSON lines on standard output, for scripts: {"event": "progress", "stage": ..., ...}."""

    def __init__(self) -> None:
        self.last: tuple[str, float] = ("", 0.0)

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, stage: str, done: int, total: int, detail: str) -> None:
        now = time.monotonic()
        if (stage, done) != (self.last[0], total) and stage == self.last[0] and now - self.last[1] < INTERVAL:
            return
        self.last = (stage, now)
        event("progress", stage=stage, done=done, total=total, detail=detail, memory=resident())


def event(kind: str, **fields: object) -> None:
    """Print one JSON line. Raises OutputError where nobody takes it: a full disk, a closed pipe."""
    try:
        print(json.dumps({"event": kind, **fields}, allow_nan=False, default=str), flush=True)
    except OSError as e:
        raise OutputError(f"standard output: {e.strerror or e}") from None


def right(header: str) -> Column:
    return Column(header, justify="right")


def whole(header: str) -> Column:
    """A column whose texts are not cut."""
    return Column(header, overflow="fold")


# ---- conversions ----


def summary_dict(s: Summary) -> dict[str, object]:
    """A summary for JSON. Sizes in bytes, time in seconds."""
    return {
        "files": [str(p) for p in s.files],
        "bytes": s.size,
        "weights": s.n_weights,
        "bpw": round(s.bpw, 4),
        "seconds": round(s.seconds, 3),
        "device": s.device,
        "resumed_tensors": s.resumed,
        "sha256": s.sha256,
        "source_hash": s.source_hash,
        "weights_by_type": s.weights_by_type(),
        "notes": s.notes,
        "tensors": [
            {
                "name": r.tensor.name,
                "type": type_name(r.choice.type),
                "reason": r.choice.reason,
                "fallback": r.choice.fallback,
                "rel_mse": r.rel_mse,
            }
            for r in s.rows
        ],
    }


def print_summary(s: Summary) -> None:
    by_type = ", ".join(
        f"{n / 1e6:.1f} M {kind}" for kind, n in sorted(s.weights_by_type().items(), key=lambda x: -x[1])
    )
    shown = str(s.files[0]) if len(s.files) == 1 else f"{s.files[0]} and {len(s.files) - 1} more parts"
    speed = f", {s.n_weights / 1e6 / s.seconds:.0f} Mweights/s on {s.device}" if s.seconds else ""
    line(f"{shown}: {s.size / 1e6:.1f} MB, {s.bpw:.3f} bits per weight, {s.seconds:.1f} s{speed}, verified")
    line(f"  weights: {by_type}")
    if s.resumed:
        line(f"  taken up: {s.resumed} of {len(s.rows)} tensors were done already")
    errors = sorted(((r.rel_mse, r.tensor.name) for r in s.rows if r.rel_mse is not None), reverse=True)
    if errors:
        worst = ", ".join(f"{name} {e:.4f}" for e, name in errors[:3])
        line(f"  relative squared error: worst {worst}")
    quantized = [kind for kind in s.source_types if kind not in ("F32", "F16", "BF16", "F64")]
    if quantized:
        line(f"  note: the source was already quantized ({', '.join(quantized)}); its error adds to ours")
    for r in s.fallbacks[:20]:
        line(f"  fallback: {r.tensor.name} is {type_name(r.choice.type)}: {r.choice.reason}")
    if len(s.fallbacks) > 20:
        line(f"  ... and {len(s.fallbacks) - 20} more fallbacks")
    for name, lack in s.unweighted[:20]:
        line(f"  note: {name}: {lack}")
    if len(s.unweighted) > 20:
        line(f"  ... and {len(s.unweighted) - 20} more without importance")
    for note in s.notes:
        line(f"  note: {note}")
    for name, digest in s.sha256.items():
        line(f"  sha256 {digest}  {name}")


def line(text: str) -> None:
    """Print one line, whatever stands in it: names and values come out of files."""
    out_console.print(Text(printable(text)), soft_wrap=True)


def cell(text: str) -> Text:
    """A table's cell with text out of a file: no markup, one line."""
    return Text(printable(text))


def plan_dict(p: Plan) -> dict[str, object]:
    """A plan for JSON. Sizes in bytes."""
    n = sum(r.tensor.n_weights for r in p.rows)
    return {
        "recipe": p.recipe.name,
        "bytes": p.size,
        "weights": n,
        "bpw": round(8 * p.size / n, 4),
        "memory": p.memory,
        "notes": list(p.notes),
        "files": [{"path": str(x.path), "bytes": x.size, "tensors": len(x.tensors)} for x in p.parts],
        "tensors": [
            {
                "name": r.tensor.name,
                "shape": list(r.tensor.shape),
                "source_type": r.tensor.type_name,
                "type": type_name(r.choice.type),
                "bytes": r.out.nbytes,
                "bpw": round(8 * r.out.nbytes / r.tensor.n_weights, 4),
                "reason": r.choice.reason,
                "fallback": r.choice.fallback,
            }
            for r in p.rows
        ],
    }


def print_plan(p: Plan, free: int) -> None:
    """The table of a dry run. free: bytes free on the disk of the output."""
    table = Table(whole("tensor"), "shape", "from", "to", right("bpw"), right("MB"), "reason")
    for r in p.rows:
        bpw = 8 * r.out.nbytes / r.tensor.n_weights
        table.add_row(
            cell(r.tensor.name),
            " x ".join(map(str, r.tensor.shape)),
            r.tensor.type_name,
            type_name(r.choice.type),
            f"{bpw:.3f}",
            f"{r.out.nbytes / 1e6:.3f}",
            cell(r.choice.reason),
        )
    out_console.print(table)
    n = sum(r.tensor.n_weights for r in p.rows)
    line(f"recipe {p.recipe.name}: {p.recipe.description}")
    line(
        f"{p.size / 1e6:.1f} MB in {len(p.parts)} file{'s' * (len(p.parts) > 1)}, {8 * p.size / n:.3f} bits per weight"
    )
    line(f"needs {p.size / 1e6:.0f} MB of disk ({free / 1e6:.0f} MB free) and about {p.memory / 1e6:.0f} MB of memory")
    line("values are looked at when converting: a tensor beyond the reach of its scales may still fall back")
    for note in p.notes:
        line(f"note: {note}")


# ---- files: see also listing.py ----


def verdict_dict(v: Verdict) -> dict[str, object]:
    """A verdict for JSON."""
    return {
        "file": str(v.path),
        "good": v.good,
        "sha256": v.sha256,
        "tensors": v.tensors,
        "trit_plane_tensors": v.planes,
        "checksums": v.checksums,
        "faults": v.faults,
        "notes": v.notes,
        "errors": [
            {"name": e.name, "type": e.type, "rel_mse": e.rel_mse if math.isfinite(e.rel_mse) else None}
            for e in v.errors
        ],
    }


def print_verdict(v: Verdict, all_errors: bool) -> None:
    line(f"{v.path}: {v.tensors} tensors, {v.planes} of trit planes, {'sound' if v.good else 'DAMAGED'}")
    if not v.checksums:
        line("  no checksums of tensors in the metadata: structure, words and scales were checked, kept bytes were not")
    for fault in v.faults[:20]:
        line(f"  fault: {fault}")
    if len(v.faults) > 20:
        line(f"  ... and {len(v.faults) - 20} more faults")
    for note in v.notes:
        line(f"  note: {note}")
    if v.errors:
        worst = sorted(v.errors, key=lambda e: -e.rel_mse)
        table = Table(whole("tensor"), "type", right("relative squared error"))
        for e in worst if all_errors else worst[:10]:
            table.add_row(cell(e.name), e.type, f"{e.rel_mse:.6f}")
        out_console.print(table)
    for name, digest in v.sha256.items():
        line(f"  sha256 {digest}  {Path(name).name}")


def print_likeness(found: Likeness, notes: Sequence[str]) -> None:
    """How far a file's logits are from transformers'. notes: what may be the cause."""
    quantized = ", ".join(found.quantized)
    line(
        f"  logits against transformers, {found.tokens} tokens: {found.distance:.4f} apart (relative; median of tokens "
        f"{found.median:.4f}, of the last ones {found.late:.4f}), divergence {found.kld:.5f} nats, "
        f"same likeliest token {100 * found.same_top:.0f} %"
    )
    if found.bound is None:
        line(
            f"  note: what is normal for {quantized} nobody knows; whether the same function is computed, tells this "
            "check of the unquantized GGUF (convert --keep-bf16)"
        )
    for note in notes:
        line(f"  note: {note}")
