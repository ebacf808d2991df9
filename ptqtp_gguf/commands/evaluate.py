"""eval: how well files predict a text, and how they differ from a reference."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..errors import Interrupted
from ..files import cache_folder
from ..measure import Evaluation, Generation, evaluate, generate
from ..terminal import err_console, event, line, out_console, right, whole
from .common import AsJson, Quiet, Threads, fail, reporter


def evaluate_files(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="GGUF files of one model.")],
    reference: Annotated[
        Path | None, typer.Option(help="What they are compared with: the same model in BF16, F16 or Q8_0.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Text in UTF-8 to measure on; else a small one, built in.")] = None,
    ctx: Annotated[int, typer.Option(min=8, help="Tokens a window; the second half of each is scored.")] = 512,
    windows: Annotated[int, typer.Option(min=0, help="Windows at most; 0 = the whole text.")] = 0,
    generation: Annotated[
        bool, typer.Option("--generation/--no-generation", help="Also greedy agreement and questions.")
    ] = True,
    state: Annotated[
        Path | None, typer.Option(help="Folder for what is measured, to resume from; else the user's cache.")
    ] = None,
    threads: Threads = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity and, against a reference, KL divergence, as llama-perplexity does; and what files write.

    Windows that were measured before cost nothing: an evaluation that was stopped resumes where it was.

    Examples:

      ptqtp-gguf eval model.gguf --text wiki.test.raw

      ptqtp-gguf eval model-TP2_2.gguf model-Q4_0.gguf --reference model-bf16.gguf

      ptqtp-gguf eval model.gguf --reference model-bf16.gguf --windows 8 --no-generation --json
    """
    with reporter(quiet, as_json) as progress:
        try:
            folder = state or cache_folder("eval")
            found = evaluate(
                reference, files, text=text, ctx=ctx, windows=windows, threads=threads, state=folder, progress=progress
            )
            written = (
                generate(reference, files, threads=threads, state=folder, progress=progress) if generation else None
            )
        except Interrupted as e:  # typer would swallow its text
            fail(str(e), 130)
    if as_json:
        event("done", **_dict(reference, files, found, written))
    elif not quiet:
        _print(reference, files, found, written)


def _dict(
    reference: Path | None, files: list[Path], found: Evaluation, written: list[Generation] | None
) -> dict[str, object]:
    digests = found.sha256[-len(files) :]
    answers: list[Generation | None] = [*written] if written else [None] * len(files)
    return {
        "text": found.text.as_dict(),
        "warnings": found.warnings,
        "measured_windows": found.measured,
        "reference": {"file": str(reference), "sha256": found.sha256[0], "quality": found.reference.as_dict()}
        if found.reference
        else None,
        "rows": [
            {"file": str(f), "sha256": s, "quality": q.as_dict(), "generation": g.as_dict() if g else None}
            for f, s, q, g in zip(files, digests, found.quality, answers, strict=True)
        ],
    }


def _print(reference: Path | None, files: list[Path], found: Evaluation, written: list[Generation] | None) -> None:
    t = found.text
    line(f"text {t.name}: {t.windows} windows of {t.ctx} tokens, {found.quality[0].tokens} tokens scored")
    for warning in found.warnings:
        err_console.print(f"Warning: {warning}", soft_wrap=True, markup=False, style="yellow")
    heads = (
        ["perplexity", "ratio", "KL divergence", "99.9 %", "RMS dp %", "same top %"] if reference else ["perplexity"]
    )
    if written:
        heads += ["agrees for", "questions"] if reference else ["questions"]
    table = Table(whole("file"), *(right(h) for h in heads))
    if reference and found.reference:
        asked = written[0].as_dict()["cloze"] if written else None
        blank = ["1", "0", "0", "0", "100", *(["all", f"{asked['reference_right']} of {asked['of']}"] if asked else [])]
        table.add_row(reference.name, _pm(found.reference.ppl, found.reference.ppl_se, 4), *blank)
    for i, (file, q) in enumerate(zip(files, found.quality, strict=True)):
        cells = [_pm(q.ppl, q.ppl_se, 4)]
        if reference:
            cells += [
                _pm(q.ppl_ratio, q.ppl_ratio_se, 4),
                _pm(q.kld, q.kld_se, 5),
                f"{q.kld_999:.3f}",
                _pm(q.rms_dp, q.rms_dp_se, 2),
                _pm(q.same_top, q.same_top_se, 2),
            ]
        if written:
            shown = written[i].as_dict()
            if agreement := shown["agreement"]:
                cells.append(f"{agreement['mean']:.1f} of {agreement['limit']} tokens")
            if cloze := shown["cloze"]:
                cells.append(f"{cloze['right']} of {cloze['of']}")
        table.add_row(file.name, *cells)
    out_console.print(table)
    line("+/-: standard errors over the scored tokens")


def _pm(value: float | None, error: float | None, digits: int) -> str:
    return f"{value:.{digits}f} +/- {error:.{digits}f}" if value is not None else ""
