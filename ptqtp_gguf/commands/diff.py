"""What compares two files: diff."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..inspect import difference
from ..terminal import event, print_difference
from .common import AsJson, Quiet, Threads, reporter


def diff(
    a: Annotated[Path, typer.Argument(help="A GGUF file: the reference. Of a split one, any part.")],
    b: Annotated[Path, typer.Argument(help="The file to compare with it.")],
    tensors: Annotated[bool, typer.Option("--tensors", "-T", help="List every tensor, the worst first.")] = False,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="End with 1 if anything differs, as git diff does.")
    ] = False,
    threads: Threads = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compare two GGUF files of any types: metadata, tensors, and the error of B's weights against A's.

    Examples:

      ptqtp-gguf diff model-bf16.gguf model.gguf --tensors

      ptqtp-gguf diff model.gguf twin-q4_0.gguf --exit-code --quiet
    """
    with reporter(quiet, as_json) as progress:
        found = difference(a, b, progress, threads)
    if as_json:
        event("done", **found.as_dict())
    elif not quiet:
        print_difference(found, tensors)
    if exit_code and found.differs:
        raise typer.Exit(1)
