"""The command line: parse, call the library, print. One line on error.

Exit codes: 0 done; 1 an error, or a file that does not verify; 2 wrong usage; 130 interrupted (Ctrl-C, SIGTERM).
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

from . import __version__
from . import convert as conversion
from .card import card
from .errors import PtqtpError
from .export import export_q4_0
from .inspect import inspect as inspect_file
from .options import METHOD_NAMES, Calibration, Options
from .output import check_text_target, write_text
from .plan import Progress
from .recipe import SHIPPED
from .results import Summary, card_facts
from .terminal import (
    Bar,
    JsonLines,
    err_console,
    event,
    line,
    plan_dict,
    print_plan,
    print_report,
    print_summary,
    print_verdict,
    summary_dict,
    verdict_dict,
)
from .verify import verify as verify_file

EXIT_CODES = "Exit codes: 0 done; 1 an error, told in one line; 2 wrong usage; 130 interrupted."

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Hugging Face checkpoints to trit-plane GGUF files (PTQTP, 3.5 bits per weight) that llama.cpp runs.",
    epilog=EXIT_CODES,
)

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar and no summary.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace an existing output.")]
Threads = Annotated[int, typer.Option("--threads", "-j", min=0, help="Threads; 0 = all cores.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON lines on standard output: progress, result, error.")]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_json_lines = False  # whether errors are told as JSON too


def parse_size(text: str) -> int:
    """ "2G", "500M", "1.5GiB", "4000000" -> bytes. Raises typer.BadParameter."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if not match or match[2] not in _UNITS or not (size := int(float(match[1]) * _UNITS[match[2]])):
        raise typer.BadParameter(f"{text!r} is no size; write 500M, 2G or 1.5GiB")
    return size


def _reporter(quiet: bool, as_json: bool) -> Bar | JsonLines:
    global _json_lines
    _json_lines = as_json
    return JsonLines() if as_json else Bar(quiet)


def _version(value: bool) -> None:
    if value:
        print(f"ptqtp-gguf {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


@app.command(epilog=EXIT_CODES)
def convert(
    source: Annotated[
        Path,
        typer.Argument(help="Checkpoint folder, GGUF file of any type (of a split one, any part), or hub id org/name."),
    ],
    out: Annotated[Path, typer.Argument(help="The GGUF file to write.")],
    method: Annotated[
        str,
        typer.Option("--method", "-m", help=f"One of: {', '.join(METHOD_NAMES)}; auto: search, or what --calib makes."),
    ] = "auto",
    type: Annotated[str, typer.Option("--type", "-t", help="Type of the block matrices: TP2_1 or TP2_0.")] = "TP2_1",
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help=f"Which tensor gets which type: {', '.join(SHIPPED)}, or a file.")
    ] = "default",
    tensor_type: Annotated[
        list[str] | None, typer.Option(help="REGEX=TYPE: tensors whose name it finds get the type. Repeatable.")
    ] = None,
    target_bpw: Annotated[
        float | None,
        typer.Option(min=0.1, max=32, help="Choose types by measured error, within these bits per weight."),
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(help="Importance matrix of llama-imatrix: weigh errors by what the inputs count.")
    ] = None,
    calib: Annotated[
        list[str] | None,
        typer.Option(help="Calibrate on text: a file, 'builtin', 'self', or a data set's hub id. Repeatable."),
    ] = None,
    calib_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens to calibrate on, at most; 0: 262144 on a GPU, 32768 on a CPU.")
    ] = 0,
    calib_window: Annotated[int, typer.Option(min=2, help="Tokens a window of calibration and tuning.")] = 1024,
    hessians: Annotated[
        Path | None, typer.Option(help="Folder of second moments: made from --calib, or taken as they are.")
    ] = None,
    fisher: Annotated[
        bool, typer.Option("--fisher/--no-fisher", help="Weigh tokens by their effect on the output (whole model).")
    ] = True,
    tune: Annotated[bool, typer.Option("--tune", help="Tune scales and norms on the text, end to end.")] = False,
    tune_tokens: Annotated[int, typer.Option(min=2, help="Tokens to tune on, at most.")] = 1 << 22,
    tune_steps: Annotated[int, typer.Option(min=1, help="Steps of tuning, at most.")] = 600,
    split_max_size: Annotated[str | None, typer.Option(help="Split the output into files of at most this: 2G.")] = None,
    override_kv: Annotated[
        list[str] | None, typer.Option(help="KEY=TYPE:VALUE in the metadata (int, float, bool, str). Repeatable.")
    ] = None,
    model_card: Annotated[Path | None, typer.Option(help="Write a model card (README.md for the hub) there.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto: the same bytes.")] = "auto",
    threads: Threads = 0,
    max_memory: Annotated[str | None, typer.Option(help="Stay below this: 2G. Smaller pieces, the same bytes.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the hub.")] = None,
    keep_bf16: Annotated[Path | None, typer.Option(help="Keep the intermediate bf16 GGUF under this name.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and what it needs; write nothing.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away what an earlier run left unfinished.")] = False,
    force: Force = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Convert a checkpoint or a GGUF file to a trit-plane GGUF.

    The output appears complete and verified, or not at all. A conversion that was stopped goes on where it was when
    the same command is run again.

    Examples:

      ptqtp-gguf convert ./SmolLM2-135M smollm2.gguf

      ptqtp-gguf convert model-bf16.gguf model.gguf --dry-run

      ptqtp-gguf convert Qwen/Qwen2.5-0.5B qwen.gguf --recipe quality

      ptqtp-gguf convert ./model model.gguf --tensor-type attn_v=Q6_K --split-max-size 4G

      ptqtp-gguf convert ./model model.gguf --target-bpw 4.25 --model-card README.md

      ptqtp-gguf convert ./model model.gguf --imatrix imatrix.gguf

      ptqtp-gguf convert ./model model.gguf --calib builtin --calib my-text.txt

      ptqtp-gguf convert ./model model.gguf --calib c4.txt --calib code.txt --tune

      ptqtp-gguf convert ./model model-paper.gguf --method paper --type TP2_0
    """
    options = Options(
        method=method, type=type, recipe=recipe, tensor_types=tuple(tensor_type or ()), imatrix=imatrix,
        calibration=Calibration(
            texts=tuple(calib or ()), tokens=calib_tokens, window=calib_window, hessians=hessians, fisher=fisher,
            tune=tune, tune_tokens=tune_tokens, tune_steps=tune_steps,
        ),
        target_bpw=target_bpw, overrides=tuple(override_kv or ()),
        split_max_size=parse_size(split_max_size) if split_max_size else 0,
        revision=revision, keep_bf16=keep_bf16, threads=threads, device=device,
        max_memory=parse_size(max_memory) if max_memory else 0, force=force, restart=restart,
    )  # fmt: skip
    with _reporter(quiet, as_json) as progress:
        if model_card:
            check_text_target(model_card, force)
        if dry_run:
            plan = conversion.dry_run(source, out, options, progress)
        else:
            summary = _convert(source, out, options, progress)
    if dry_run:
        if as_json:
            event("plan", **plan_dict(plan))
        elif not quiet:
            print_plan(plan, shutil.disk_usage(out.resolve().parent).free)
        return
    if model_card:
        write_text(model_card, card(card_facts(summary, source, options)))
    if as_json:
        event("done", **summary_dict(summary))
    elif not quiet:
        print_summary(summary)


def _convert(source: Path, out: Path, options: Options, progress: Progress) -> Summary:
    try:
        return conversion.convert(source, out, options, progress)
    except conversion.Interrupted as e:  # typer would swallow its text
        _fail(str(e), 130)


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
        line(f"{s.path}: {s.size / 1e6:.1f} MB, {s.bpw:.3f} bits per weight, weights equal bit for bit")


@app.command(epilog=EXIT_CODES)
def verify(
    file: Annotated[Path, typer.Argument(help="A GGUF file; of a split one, any part.")],
    against: Annotated[
        Path | None,
        typer.Option(help="What it was made from (GGUF or checkpoint folder): measure every tensor's error."),
    ] = None,
    all_errors: Annotated[
        bool, typer.Option("--all", "-a", help="List every tensor's error, not the worst ten.")
    ] = False,
    threads: Threads = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Check a file: structure, offsets, digit words, scales, checksums; and its distance to the source.

    Examples:

      ptqtp-gguf verify model.gguf

      ptqtp-gguf verify model.gguf --against ./model --all
    """
    with _reporter(quiet, as_json) as progress:
        if against is None:
            verdict = verify_file(file, None, progress, threads)
        else:
            with conversion.open_source(against, progress) as source:
                verdict = verify_file(file, source, progress, threads)
    if as_json:
        event("done", **verdict_dict(verdict))
    elif not quiet:
        print_verdict(verdict, all_errors)
    if not verdict.good:
        more = f" and {len(verdict.faults) - 1} more faults" if len(verdict.faults) > 1 else ""
        _fail(f"{file}: {verdict.faults[0]}{more}", 1)


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
        print_report(report, tensors)


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
            _fail("out of memory; close other programs, or give --max-memory", 1)
        if type(e).__name__ == "Abort":
            _fail("interrupted; no file was left half-written", 130)
        raise


def _fail(message: str, code: int) -> NoReturn:
    if _json_lines:
        event("error", message=" ".join(message.split()), exit_code=code)
    err_console.print(f"Error: {' '.join(message.split())}", soft_wrap=True, markup=False, style="red")
    sys.exit(code)
