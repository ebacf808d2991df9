"""The command line: its commands, and how it ends. One line on error.

Exit codes: 0 done; 1 an error, or a file that does not verify; 2 wrong usage; 130 interrupted (Ctrl-C, SIGTERM).
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Annotated, NoReturn

import typer

from .. import __version__
from ..errors import PtqtpError, printable
from ..llamacpp import end_in_one_line
from . import bench, chat, compare, convert, diff, evaluate, inspect, serve
from . import run as generate
from . import verify as files
from .common import EXIT_CODES, fail, tell

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Hugging Face checkpoints to trit-plane GGUF files (PTQTP, 3.5 bits per weight) that llama.cpp runs.",
    epilog=EXIT_CODES,
)
COMMANDS: dict[str, Callable[..., None]] = {
    "convert": convert.convert,
    "export-q4_0": convert.export,
    "verify": files.verify,
    "inspect": inspect.inspect,
    "diff": diff.diff,
    "run": generate.run,
    "chat": chat.chat,
    "serve": serve.serve,
    "eval": evaluate.evaluate_files,
    "bench": bench.bench,
    "compare": compare.compare,
}
for _name, _command in COMMANDS.items():
    app.command(_name, epilog=EXIT_CODES)(_command)


def _version(value: bool) -> None:
    if value:
        print(f"ptqtp-gguf {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _drop_output() -> None:
    """Forget what cannot be printed: the interpreter would try again at its end, and tell it in many lines."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> NoReturn:
    """Entry point of the console script."""
    signal.signal(signal.SIGTERM, _stop)
    end_in_one_line(lambda why: tell(printable(why), 1))
    if isinstance(
        sys.stdout, io.TextIOWrapper
    ):  # a name out of a file that the terminal cannot show is not a reason to end
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = app(standalone_mode=False)
        if code == 130:  # typer turns Ctrl-C into an exit code of its own
            raise KeyboardInterrupt
        sys.stdout.flush()
        sys.exit(code or 0)
    except PtqtpError as e:
        _drop_output()
        fail(str(e), 1)
    except typer.Exit as e:
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        fail("interrupted; no file was left half-written", 130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except OSError as e:
        _drop_output()
        fail(f"{e.filename or 'standard output, or a file'}: {e.strerror or e}", 1)
    except Exception as e:
        if hasattr(e, "format_message") and hasattr(e, "exit_code"):  # click's usage errors
            fail(e.format_message(), e.exit_code)
        if isinstance(e, MemoryError):
            fail("out of memory; close other programs, or give --max-memory", 1)
        if type(e).__name__ == "Abort":
            fail("interrupted; no file was left half-written", 130)
        raise
