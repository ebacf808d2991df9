"""What the commands share: options, sizes, progress, and how an error ends a run."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from ..errors import OutputError
from ..terminal import Bar, JsonLines, err_console, event

EXIT_CODES = "Exit codes: 0 done; 1 an error, in one line; 2 wrong usage; 130 interrupted."

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar and no summary.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace an existing output.")]
Threads = Annotated[int, typer.Option("--threads", "-j", min=0, help="Threads; 0 = all cores.")]
Rpc = Annotated[
    list[str] | None,
    typer.Option("--rpc", metavar="HOST:PORT", help="An rpc-server of the patched runtime that computes layers."),
]
RpcLayers = Annotated[
    int, typer.Option(min=-1, metavar="N", help="The last N layers go to the --rpc servers; -1 = all.")
]
Lora = Annotated[
    list[str] | None,
    typer.Option("--lora", metavar="FILE[:SCALE]", help="A LoRA adapter, a GGUF file; may be given several times."),
]
Grammar = Annotated[Path | None, typer.Option(help="A file that says what may be answered (GBNF, llama.cpp's).")]
JsonSchema = Annotated[Path | None, typer.Option(help="The same, as a JSON schema.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON lines on standard output: progress, result, error.")]
TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that the checkpoint brings; without, one that needs it is refused.",
    ),
]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_json_lines = False  # whether errors are printed as JSON too


def parse_size(text: str) -> int:
    """ "2G", "500M", "1.5GiB", "4000000" -> bytes. Raises typer.BadParameter."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if not match or match[2] not in _UNITS or not (size := int(float(match[1]) * _UNITS[match[2]])):
        raise typer.BadParameter(f"{text!r} is not a size; write 500M, 2G or 1.5GiB")
    return size


def numbers(text: str, option: str) -> list[int]:
    """ "128,512" -> [128, 512]; "" -> []. Raises typer.BadParameter."""
    try:
        return [int(n) for n in text.split(",") if n.strip()]
    except ValueError:
        raise typer.BadParameter(f"{option} {text!r}: whole numbers with commas between them are needed") from None


def reporter(quiet: bool, as_json: bool) -> Bar | JsonLines:
    """What shows the progress of a command; errors are shown in the same way from here on."""
    global _json_lines
    _json_lines = as_json
    return JsonLines() if as_json else Bar(quiet)


def tell(message: str, code: int) -> None:
    """Print the one line of an error; code: the exit code that follows."""
    if _json_lines:
        with contextlib.suppress(OutputError):  # standard output may be what has failed
            event("error", message=message, exit_code=code)
    err_console.print(f"Error: {message}", soft_wrap=True, markup=False, style="red")


def fail(message: str, code: int) -> NoReturn:
    """Print the one line of an error and end with the exit code."""
    tell(message, code)
    sys.exit(code)
