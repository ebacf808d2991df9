"""convert, and the lossless Q4_0 twin."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from ..conversion import Summary, card, card_facts, export_q4_0, modelfile_path, pipeline, write_modelfile
from ..distributed import convert_on_ranks, ranks
from ..errors import Interrupted
from ..files import check_text_target, journal_path, write_text
from ..plan import OUTPUT, Options
from ..progress import Progress
from ..terminal import Bar, event, line, plan_dict, print_plan, print_summary, summary_dict
from .common import AsJson, Force, Quiet, fail, reporter
from .flags import with_options


@with_options
def convert(
    source: Annotated[
        Path,
        typer.Argument(help="Checkpoint folder, GGUF file of any type (of a split one, any part), or hub id org/name."),
    ],
    out: Annotated[Path, typer.Argument(help="The GGUF file to write.")],
    options: Options,
    model_card: Annotated[
        Path | None,
        typer.Option(help="Write a model card (README.md for the hub) there.", rich_help_panel=OUTPUT),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and what it needs; write nothing.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Convert a checkpoint or a GGUF file to a trit-plane GGUF.

    The output appears complete and verified, or not at all. A conversion that was stopped resumes where it was when
    the same command is run again.

    Examples:

      ptqtp-gguf convert ./SmolLM2-135M smollm2.gguf

      ptqtp-gguf convert ./model model.gguf --calib builtin --calib my-text.txt

      ptqtp-gguf convert Qwen/Qwen2.5-0.5B qwen.gguf --target-bpw 4.25 --dry-run
    """
    rank, n_ranks = ranks.world()
    quiet, as_json = quiet or rank > 0, as_json and rank == 0
    with reporter(quiet, as_json) as progress:
        fresh = not journal_path(out).exists()  # a conversion that is resumed may have written the card
        if model_card and rank == 0 and fresh:
            check_text_target(model_card, options.force)
        if dry_run:
            if rank > 0:
                return
            plan = pipeline.dry_run(source, out, options, progress)
        else:
            summary = _convert(source, out, options, progress, model_card, n_ranks > 1)
    if dry_run:
        if as_json:
            event("plan", **plan_dict(plan))
        elif not quiet:
            print_plan(plan, shutil.disk_usage(out.resolve().parent).free)
        return
    if summary is None:  # rank 0 tells it
        return
    if as_json:
        event("done", **summary_dict(summary))
    elif not quiet:
        print_summary(summary)


def _convert(
    source: Path, out: Path, options: Options, progress: Progress, model_card: Path | None, divided: bool
) -> Summary | None:
    def write_card(summary: Summary) -> None:
        if model_card:
            write_text(model_card, card(card_facts(summary, source, options)), options.force)

    try:
        run = convert_on_ranks if divided else pipeline.convert
        return run(source, out, options, progress, write_card)
    except Interrupted as e:  # typer would swallow its text
        fail(str(e), 130)


def export(
    source: Annotated[Path, typer.Argument(help="A GGUF with TP2_1 or TP2_2 tensors.")],
    out: Annotated[Path, typer.Argument(help="The Q4_0 twin to write.")],
    ollama: Annotated[bool, typer.Option("--ollama", help="Write OUT's Modelfile for Ollama beside it, too.")] = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Write the lossless Q4_0 twin of a TP2_1 or TP2_2 file, for runtimes that are not patched.

    The weights are bit-exact the same, at 4.5 bits each.

    Examples:

      ptqtp-gguf export-q4_0 model.gguf model-q4_0.gguf

      ptqtp-gguf export-q4_0 model.gguf twin.gguf --ollama && ollama create mine -f twin.Modelfile
    """
    if ollama:
        modelfile_path(out, force)
    with Bar(quiet) as bar:
        s = export_q4_0(source, out, force=force, progress=bar)
    if not quiet:
        line(f"{s.path}: {s.size / 1e6:.1f} MB, {s.bpw:.3f} bits per weight, weights equal bit for bit")
    if ollama:
        path, why = write_modelfile(out, force)
        if not quiet:
            line(f"{path}: ollama create NAME -f {path}" + (f"; no TEMPLATE: {why}" if why else ""))
