"""convert, and the lossless Q4_0 twin."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from ..conversion import Summary, card, card_facts, export_q4_0, pipeline
from ..distributed import convert_on_ranks, ranks
from ..errors import Interrupted
from ..files import check_text_target, journal_path, write_text
from ..plan import METHOD_NAMES, SHIPPED, Calibration, Options
from ..progress import Progress
from ..terminal import Bar, event, line, plan_dict, print_plan, print_summary, summary_dict
from .common import AsJson, Force, Quiet, Threads, TrustCode, fail, parse_size, reporter


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
    tune: Annotated[bool, typer.Option("--tune", help="Tune trits, scales and norms on the text, end to end.")] = False,
    tune_tokens: Annotated[int, typer.Option(min=2, help="Tokens to tune on, at most.")] = 1 << 22,
    tune_steps: Annotated[int, typer.Option(min=1, help="Steps of tuning, at most.")] = 1000,
    tune_text: Annotated[
        list[str] | None,
        typer.Option(help="Tune on this text, not on that of --calib. Repeatable."),
    ] = None,
    tune_planes: Annotated[
        bool, typer.Option("--tune-planes/--no-tune-planes", help="Tune the trits too: better, and twice the memory.")
    ] = True,
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
    trust_remote_code: TrustCode = False,
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

      ptqtp-gguf convert ./model model.gguf --calib c4.txt --tune --tune-text wiki.txt --tune-text docs.txt

      ptqtp-gguf convert ./model model-paper.gguf --method paper --type TP2_0
    """
    options = Options(
        method=method,
        type=type,
        recipe=recipe,
        tensor_types=tuple(tensor_type or ()),
        imatrix=imatrix,
        calibration=Calibration(
            texts=tuple(calib or ()),
            tokens=calib_tokens,
            window=calib_window,
            hessians=hessians,
            fisher=fisher,
            tune=tune,
            tune_tokens=tune_tokens,
            tune_steps=tune_steps,
            tune_texts=tuple(tune_text or ()),
            tune_planes=tune_planes,
        ),
        target_bpw=target_bpw,
        overrides=tuple(override_kv or ()),
        split_max_size=parse_size(split_max_size) if split_max_size else 0,
        revision=revision,
        keep_bf16=keep_bf16,
        threads=threads,
        device=device,
        max_memory=parse_size(max_memory) if max_memory else 0,
        force=force,
        restart=restart,
        trust_code=trust_remote_code,
    )
    rank, n_ranks = ranks.world()
    quiet, as_json = quiet or rank > 0, as_json and rank == 0
    with reporter(quiet, as_json) as progress:
        if (
            model_card and rank == 0 and not journal_path(out).exists()
        ):  # a conversion that is taken up may have written it
            check_text_target(model_card, force)
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
