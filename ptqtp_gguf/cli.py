"""The command line: parse, call the library, print. One line on error, exit 1 (wrong usage 2, Ctrl-C 130)."""

from __future__ import annotations

import json
import signal
import sys
import textwrap
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from . import __version__
from . import convert as conversion
from .errors import PtqtpError
from .export import export_q4_0
from .gguf_io import type_name
from .inspect import Report
from .inspect import inspect as inspect_file
from .quantize import METHODS

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Hugging Face checkpoints to trit-plane GGUF files (PTQTP, 3.5 bits per weight) that llama.cpp runs.",
)
out_console = Console(highlight=False)
err_console = Console(stderr=True, highlight=False)

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar and no summary.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace an existing output.")]


class Bar:
    """Shows the library's progress reports as one rich bar a stage."""

    def __init__(self, quiet: bool) -> None:
        self.bar = Progress(
            TextColumn("{task.description:>10}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[detail]}"),
            console=err_console, disable=quiet or not err_console.is_terminal, transient=True,
        )  # fmt: skip
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Bar:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, stage: str, done: int, total: int, detail: str) -> None:
        if stage not in self.tasks:
            self.tasks[stage] = self.bar.add_task(stage, total=total or None, detail="")
        width = max(10, err_console.width - 70)
        self.bar.update(self.tasks[stage], completed=done, total=total or None, detail=detail[-width:])


def _version(value: bool) -> None:
    if value:
        print(f"ptqtp-gguf {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Checkpoint folder (config.json, safetensors), or a GGUF file.")],
    out: Annotated[Path, typer.Argument(help="The GGUF file to write.")],
    method: Annotated[str, typer.Option("--method", "-m", help=f"One of: {', '.join(METHODS)}.")] = "search",
    type: Annotated[str, typer.Option("--type", "-t", help="Type of the block matrices: TP2_1 or TP2_0.")] = "TP2_1",
    threads: Annotated[int, typer.Option("--threads", "-j", min=0, help="Threads; 0 = all cores.")] = 0,
    keep_bf16: Annotated[Path | None, typer.Option(help="Keep the intermediate bf16 GGUF under this name.")] = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Convert a checkpoint or a GGUF file to a trit-plane GGUF.

    The output appears complete and verified, or not at all.

    Examples:

      ptqtp-gguf convert ./SmolLM2-135M smollm2.gguf

      ptqtp-gguf convert model-bf16.gguf model-tp2.gguf --threads 4

      ptqtp-gguf convert ./model model-paper.gguf --method paper --type TP2_0
    """
    options = conversion.Options(method=method, type=type, threads=threads, force=force, keep_bf16=keep_bf16)
    with Bar(quiet) as bar:
        summary = conversion.convert(source, out, options, bar)
    if not quiet:
        _print_summary(summary)


def _print_summary(s: conversion.Summary) -> None:
    by_type = ", ".join(
        f"{n / 1e6:.1f} M {kind}" for kind, n in sorted(s.weights_by_type().items(), key=lambda x: -x[1])
    )
    out_console.print(f"{s.path}: {s.size / 1e6:.1f} MB, {s.bpw:.3f} bits per weight, {s.seconds:.1f} s")
    out_console.print(f"  weights: {by_type}", soft_wrap=True)
    errors = sorted(((r.rel_mse, r.tensor.name) for r in s.rows if r.rel_mse is not None), reverse=True)
    if errors:
        worst = ", ".join(f"{name} {e:.4f}" for e, name in errors[:3])
        out_console.print(f"  relative squared error: worst {worst}", soft_wrap=True)
    quantized = [kind for kind in s.source_types if kind not in ("F32", "F16", "BF16", "F64")]
    if quantized:
        out_console.print(
            f"  note: the source was already quantized ({', '.join(quantized)}); its error adds to ours", soft_wrap=True
        )
    for r in s.fallbacks[:20]:
        out_console.print(
            f"  fallback: {r.tensor.name} is {type_name(r.choice.type)}: {r.choice.reason}", soft_wrap=True
        )
    if len(s.fallbacks) > 20:
        out_console.print(f"  ... and {len(s.fallbacks) - 20} more fallbacks")


@app.command("export-q4_0")
def export_q4_0_command(
    source: Annotated[Path, typer.Argument(help="A GGUF with TP2_1 tensors.")],
    out: Annotated[Path, typer.Argument(help="The Q4_0 twin to write.")],
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Write the lossless Q4_0 twin of a TP2_1 file, for runtimes that are not patched.

    The weights are bit-exact the same, at 4.5 bits each.

    Example:

      ptqtp-gguf export-q4_0 model.gguf model-q4_0.gguf
    """
    with Bar(quiet) as bar:
        s = export_q4_0(source, out, force=force, progress=bar)
    if not quiet:
        out_console.print(f"{s.path}: {s.size / 1e6:.1f} MB, {s.bpw:.3f} bits per weight, weights equal bit for bit")


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A GGUF file.")],
    tensors: Annotated[bool, typer.Option("--tensors", "-T", help="List every tensor.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """Show tensors, types, bits per weight and what was used to make a file.

    Examples:

      ptqtp-gguf inspect model.gguf --tensors

      ptqtp-gguf inspect model.gguf --json | jq .bpw
    """
    report = inspect_file(file)
    if as_json:
        print(json.dumps(report.as_dict(), indent=1, allow_nan=False, default=str))
    else:
        _print_report(report, tensors)


def _print_report(report: Report, tensors: bool) -> None:
    out_console.print(
        f"{report.path}: {report.size / 1e6:.1f} MB, {report.weights / 1e6:.1f} M weights, "
        f"{report.bpw:.3f} bits per weight (embedding, head and metadata counted)"
    )
    table = Table("role", "type", *(_right(h) for h in ("tensors", "M weights", "MB", "bpw")))
    for p in report.parts:
        table.add_row(
            p.role.value, p.type, str(p.tensors), f"{p.weights / 1e6:.2f}", f"{p.nbytes / 1e6:.2f}", f"{p.bpw:.3f}"
        )
    out_console.print(table)
    if tensors:
        listing = Table("tensor", "shape", "type", _right("MB"))
        for t in report.tensors:
            listing.add_row(t.name, " x ".join(map(str, t.shape)), t.type_name, f"{t.nbytes / 1e6:.3f}")
        out_console.print(listing)
    for key, value in report.metadata.items():
        if key.startswith(("ptqtp.", "general.")):
            text = textwrap.shorten(str(value), 200, placeholder=" ...")
            out_console.print(f"  {key} = {text}", soft_wrap=True, markup=False)


def _right(header: str) -> Column:
    return Column(header, justify="right")


@app.command()
def run(
    file: Annotated[Path, typer.Argument(help="A GGUF file.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.")],
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option("--temp", min=0.0, help="0 = always the likeliest token.")] = 0.8,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 1,
    threads: Annotated[int, typer.Option("--threads", "-j", min=0, help="Threads; 0 = llama.cpp's default.")] = 0,
    ctx: Annotated[int, typer.Option(min=32, help="Context length in tokens.")] = 2048,
) -> None:
    """Generate text with a file, through the patched llama-cpp-python.

    Example:

      ptqtp-gguf run model.gguf -p "The capital of France is" -n 32 --temp 0
    """
    from . import runtime

    inspect_file(file)  # a damaged file gets our own clear line
    model = runtime.load(file, n_ctx=ctx, threads=threads or None)
    print(prompt, end="", flush=True)
    for piece in runtime.generate(model, prompt, max_tokens=max_tokens, temperature=temperature, seed=seed):
        print(piece, end="", flush=True)
    print()


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def main() -> NoReturn:
    """Entry point of the console script."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        code = app(standalone_mode=False)
        if code == 130:  # typer turns Ctrl-C into an exit code of its own
            raise KeyboardInterrupt
        sys.exit(code or 0)
    except PtqtpError as e:
        _fail(str(e), 1)
    except typer.Exit as e:
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted; no file was left half-written", 130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except Exception as e:
        if hasattr(e, "format_message") and hasattr(e, "exit_code"):  # click's usage errors
            _fail(e.format_message(), e.exit_code)
        if isinstance(e, MemoryError):
            _fail("out of memory; the largest tensor must fit several times as float32", 1)
        if type(e).__name__ == "Abort":
            _fail("interrupted; no file was left half-written", 130)
        raise


def _fail(message: str, code: int) -> NoReturn:
    err_console.print(f"Error: {' '.join(message.split())}", soft_wrap=True, markup=False, style="red")
    sys.exit(code)
