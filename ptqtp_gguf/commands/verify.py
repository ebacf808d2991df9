"""Check a file: verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..inspect import verify as verify_file
from ..measure import TOKENS, against_checkpoint
from ..source import HINT, open_source
from ..terminal import event, print_likeness, print_verdict, verdict_dict
from .common import AsJson, Quiet, Threads, TrustCode, fail, reporter


def verify(
    file: Annotated[Path, typer.Argument(help="A GGUF file; of a split one, any part.")],
    against: Annotated[
        Path | None,
        typer.Option(help="What it was made from (GGUF or checkpoint folder): measure every tensor's error."),
    ] = None,
    logits: Annotated[
        bool,
        typer.Option(
            "--logits",
            help="With --against FOLDER: run text through transformers (float32, CPU) and through the file, too, and "
            "tell how far the logits are apart. For an unquantized file, as --keep-bf16 keeps it, more than 0.03 is a "
            "fault: it computes another function. For a quantized one the number is told.",
        ),
    ] = False,
    logits_tokens: Annotated[
        int, typer.Option(min=2, max=1 << 17, help="Tokens of text for --logits; a sliding window shows beyond it.")
    ] = TOKENS,
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

      ptqtp-gguf verify model-bf16.gguf --against ./model --logits
    """
    likeness, notes = None, list[str]()
    if logits and against is None:
        raise typer.BadParameter("--logits compares with a checkpoint; give --against FOLDER, too")
    with reporter(quiet, as_json) as progress:
        if against is None:
            verdict = verify_file(file, None, progress, threads)
        else:
            with open_source(against, progress, trust_code=trust_remote_code) as source:
                verdict = verify_file(file, source, progress, threads)
                notes += [note for note in source.notes if note != HINT]
        if logits and against is not None and verdict.good:
            likeness = against_checkpoint(
                file, against, tokens=logits_tokens, trust_code=trust_remote_code, threads=threads, progress=progress
            )
    faults = [*verdict.faults, *([likeness.fault] if likeness and likeness.fault else [])]
    if as_json:
        more = {"logits": {**likeness.as_dict(), "settings": notes}} if likeness else {}
        event("done", **{**verdict_dict(verdict), "sound": not faults, "faults": faults}, **more)
    elif not quiet:
        print_verdict(verdict, all_errors)
        if likeness:
            print_likeness(likeness, notes)
    if faults:
        more_faults = f" and {len(faults) - 1} more faults" if len(faults) > 1 else ""
        fail(f"{file}: {faults[0]}{more_faults}", 1)
