"""Check a file: verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..inspect import verify as verify_file
from ..source import open_source
from ..terminal import event, print_verdict, verdict_dict
from .common import AsJson, Quiet, Threads, TrustCode, fail, reporter


def verify(
    file: Annotated[Path, typer.Argument(help="A GGUF file; of a split one, any part.")],
    against: Annotated[
        Path | None,
        typer.Option(help="What it was made from (GGUF or checkpoint folder): measure every tensor's error."),
    ] = None,
    all_errors: Annotated[
        bool, typer.Option("--all", "-a", help="List every tensor's error, not the worst ten.")
    ] = False,
    trust_remote_code: TrustCode = False,
    threads: Threads = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Check a file: structure, offsets, digit words, scales, checksums; and its distance to the source.

    Examples:

      ptqtp-gguf verify model.gguf

      ptqtp-gguf verify model.gguf --against ./model --all
    """
    with reporter(quiet, as_json) as progress:
        if against is None:
            verdict = verify_file(file, None, progress, threads)
        else:
            with open_source(against, progress, trust_code=trust_remote_code) as source:
                verdict = verify_file(file, source, progress, threads)
    if as_json:
        event("done", **verdict_dict(verdict))
    elif not quiet:
        print_verdict(verdict, all_errors)
    if not verdict.good:
        more = f" and {len(verdict.faults) - 1} more faults" if len(verdict.faults) > 1 else ""
        fail(f"{file}: {verdict.faults[0]}{more}", 1)
