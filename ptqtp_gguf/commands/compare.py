"""compare: ours and stock types of one model, made and measured on this machine."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..codec import BY_NAME, DEFAULT
from ..compare import PEERS, WINDOWS, Settings, Stopped, check_tools, write_report
from ..compare import as_json as as_document
from ..compare import compare as compare_files
from ..errors import OutputError, PtqtpError
from ..files import parse_json, read_whole
from ..plan import Calibration, Options
from ..terminal import event, line, print_comparison
from .common import AsJson, Force, Quiet, Threads, TrustCode, fail, numbers, reporter

MAX_REPORT = 1 << 26  # bytes of its JSON

TYPE_NAMES = ", ".join(sorted(BY_NAME, reverse=True))


def compare(
    source: Annotated[
        Path, typer.Argument(help="The original: checkpoint folder, hub id, or a GGUF in bf16, f16 or f32.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the report.")],
    against: Annotated[
        list[str] | None,
        typer.Option(help="Types of llama-quantize, and files (FILE or LABEL=FILE), by commas. Repeatable."),
    ] = None,
    ours: Annotated[
        list[str] | None, typer.Option(help=f"{TYPE_NAMES}, and files (FILE or LABEL=FILE), by commas. Repeatable.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Text to score; without, a small one in the package.")] = None,
    ctx: Annotated[int, typer.Option(min=16, help="Tokens a window.")] = 512,
    windows: Annotated[int, typer.Option(min=0, help="Windows to score, at most; 0 = all.")] = WINDOWS,
    generation: Annotated[
        bool, typer.Option("--generation/--no-generation", help="Greedy agreement and questions too.")
    ] = True,
    prompt: Annotated[str, typer.Option(help="Prompt lengths of the benchmark.")] = "128,512",
    generate: Annotated[str, typer.Option(help="Lengths of generation of the benchmark.")] = "64",
    bench_threads: Annotated[str, typer.Option(help="Threads of the benchmark, as 1,2; empty = all cores.")] = "",
    rounds: Annotated[int, typer.Option(min=0, help="Rounds of the benchmark; 0 = no benchmark.")] = 5,
    calib: Annotated[
        list[str] | None,
        typer.Option(help="Calibrate all on text: ours, and the peers by an importance matrix. Repeatable."),
    ] = None,
    calib_tokens: Annotated[int, typer.Option(min=0, help="As for convert.")] = 0,
    tune: Annotated[bool, typer.Option("--tune", help="As for convert.")] = False,
    imatrix: Annotated[Path | None, typer.Option(help="Importance matrix for all that is made.")] = None,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Recipe of ours.")] = "default",
    tensor_type: Annotated[list[str] | None, typer.Option(help="REGEX=TYPE for ours. Repeatable.")] = None,
    device: Annotated[str, typer.Option(help="Where ours is quantized: cpu, cuda or auto.")] = "auto",
    cache: Annotated[
        Path | None, typer.Option(help="Folder of what is made and measured, kept for the next time.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Make and measure everything again.")] = False,
    trust_remote_code: TrustCode = False,
    threads: Threads = 0,
    force: Force = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Is it better than my Q4? Make ours and stock types of one model, measure all here, write a report.

    Size, perplexity, KL divergence, same-top, tokens a second, memory. What is made lies in the cache; a comparison
    that was stopped resumes when the same command is run again.

    Examples:

      ptqtp-gguf compare ./SmolLM2-135M --output report

      ptqtp-gguf compare model-bf16.gguf --against Q4_0,IQ4_XS --text wiki.txt --output report

      ptqtp-gguf compare ./model --ours TP2_2,tuned=mine.gguf --against Q4_K_M,theirs.gguf --output report

      ptqtp-gguf compare ./model --calib builtin --against Q4_K_M,IQ3_XXS --output report --rounds 0
    """
    _check_output(output, force)
    check_tools()
    settings = Settings(
        against=_names(against, PEERS),
        ours=_names(ours, (DEFAULT.name,)),
        text=text,
        ctx=ctx,
        windows=windows,
        generation=generation,
        prompt=tuple(numbers(prompt, "--prompt")),
        generate=tuple(numbers(generate, "--generate")),
        threads=tuple(numbers(bench_threads, "--bench-threads")),
        rounds=rounds,
        imatrix=imatrix,
        cache=cache,
        fresh=fresh,
        command=_command(),
    )
    options = Options(
        recipe=recipe,
        tensor_types=tuple(tensor_type or ()),
        device=device,
        threads=threads,
        trust_code=trust_remote_code,
        calibration=Calibration(texts=tuple(calib or ()), tokens=calib_tokens, tune=tune),
    )
    stopped = ""
    with reporter(quiet, as_json) as progress:
        try:
            document = compare_files(source, output, settings, options, progress)
        except Stopped as e:
            stopped, document = str(e), e.document
    if len(document.rows) > 1:
        paths = write_report(document, output)
        if as_json:
            event("stopped" if stopped else "done", document=as_document(document), files=[str(p) for p in paths])
        elif not quiet:
            print_comparison(document)
            line(f"report: {output / 'index.html'}")
    if stopped:
        fail(stopped, 130)


def _names(given: list[str] | None, default: tuple[str, ...]) -> tuple[str, ...]:
    if given is None:
        return default
    return tuple(name.strip() for text in given for name in text.split(",") if name.strip())


def _check_output(output: Path, force: bool) -> None:
    """Refuse to write over the report of a finished comparison. Raises OutputError."""
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output}: is a file; --output names a folder")
    try:
        finished = parse_json(read_whole(output / "report.json", MAX_REPORT)).get("finished", True)
    except (PtqtpError, ValueError, AttributeError):
        finished = False
    if finished and (output / "index.html").exists() and not force:  # the page is written last
        raise OutputError(f"{output}: holds a report already; use --force to replace it, or another --output")


def _command() -> str:
    """The command line, without the folders of files."""
    return shlex.join(["ptqtp-gguf", *(_bare(word) for word in sys.argv[1:])])


def _bare(word: str) -> str:
    label, eq, path = word.rpartition("=")
    return label + eq + Path(path).name if "/" in path else word
