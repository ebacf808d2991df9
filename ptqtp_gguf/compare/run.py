"""Is it better than my Q4? Files of one model, ours and stock, made and measured on this machine, in one document.

Steps: the files (candidates.py), perplexity and divergence, generation, errors of tensors, speed. Each keeps what it
has finished: files and windows in the cache, rounds of the benchmark beside the report; a comparison that was stopped
resumes when it is started again.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from .. import __version__
from ..calibrate import texts
from ..codec import BY_NAME, DEFAULT
from ..errors import CalibrationError, InputError, Interrupted, OutputError, PtqtpError
from ..files import cache_folder, file_sha256, parse_json, read_whole, write_text
from ..inspect import plane_statistics, tensor_errors
from ..llamacpp import install
from ..measure import Round, bench, evaluate, generate, load_text, machine, open_files
from ..plan import Options
from ..progress import Progress, no_progress
from ..source import local
from .candidates import Item, Made, Store, Workshop, check_apart, imatrix_of, parse_items, reference_of, require_imatrix
from .document import SCHEMA, Document, Generation, Machine, Model, Row, Text
from .rows import bench_of, model_of, row_of, set_planes, set_speed

PEERS = ("Q4_0", "Q4_K_M", "IQ4_XS", "Q3_K_M")
WINDOWS = 32
ROUNDS_FILE = ".rounds.json"
MAX_ROUNDS = 1 << 26  # bytes of it


@dataclass(frozen=True)
class Settings:
    """What to compare, and how.

    against     types of llama-quantize, and files: FILE or LABEL=FILE
    ours        TP types to be made of the source, and files
    text        to score, None = the small built-in one; ctx: tokens a window; windows: at most, 0 = all
    generation  also greedy agreement and cloze questions
    prompt, generate, threads, rounds   of the benchmark, see bench.bench; rounds 0 = none; threads () = all cores
    imatrix     importance matrix for all that is made; else it is made of the options' calibration text
    cache       folder of files and records, None = cache_folder("compare"); fresh: make and measure everything again
    """

    against: tuple[str, ...] = PEERS
    ours: tuple[str, ...] = (DEFAULT.name,)
    text: Path | None = None
    ctx: int = 512
    windows: int = WINDOWS
    generation: bool = True
    prompt: tuple[int, ...] = (128, 512)
    generate: tuple[int, ...] = (64,)
    threads: tuple[int, ...] = ()
    rounds: int = 5
    imatrix: Path | None = None
    cache: Path | None = None
    fresh: bool = False
    command: str = ""


class Stopped(Interrupted):
    """Ctrl-C. document: what was finished until then."""

    def __init__(self, text: str, document: Document) -> None:
        super().__init__(text)
        self.document = document


@dataclass
class Comparison:
    """A comparison under way. document: what is measured so far; no rows until the reference is there."""

    source: Path
    output: Path
    settings: Settings
    options: Options
    progress: Progress
    document: Document
    reference: Path = Path()
    made: list[Made] = field(default_factory=list)

    @property
    def cache(self) -> Path:
        return self.settings.cache or cache_folder("compare")

    @property
    def records(self) -> Path | None:
        """Where evaluations are kept."""
        return None if self.settings.fresh else self.cache / "eval"

    def row(self, label: str) -> Row:
        return next(r for r in self.document.rows if r.label == label)

    @property
    def paths(self) -> list[Path]:
        return [m.path for m in self.made]


def compare(
    source: Path,
    output: Path,
    settings: Settings | None = None,
    options: Options | None = None,
    progress: Progress = no_progress,
) -> Document:
    """Make what is to be compared, measure it on this machine, and return the document that a report is made of.

    source   checkpoint folder, hub id, or a GGUF in 16 or 32 bits
    output   folder of the report; kept in it meanwhile: what would be lost if the comparison were stopped
    options  of our own conversions
    Raises Stopped for Ctrl-C, which has the document of what was finished; subclasses of PtqtpError.
    """
    settings, options = settings or Settings(), options or Options()
    run = Comparison(source, output, settings, options, progress, _begun(source, settings))
    items = _check(run)
    run.source = local(source, progress)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OutputError(f"{output}: cannot be made: {e.strerror}; choose another --output") from None
    try:
        _files(run, items)
        _quality(run)
        if settings.generation:
            _generation(run)
        _tensors(run)
        _speed(run)
    except KeyboardInterrupt:
        kept = "what is finished is kept; run the same command again to resume"
        raise Stopped(f"interrupted; {kept}", run.document) from None
    run.document.finished = True
    return run.document


def _begun(source: Path, settings: Settings) -> Document:
    now = datetime.datetime.now(datetime.timezone.utc)
    return Document(
        schema=SCHEMA,
        model=Model(source.name),
        created=now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        command=settings.command,
        machine=Machine(**machine.describe().as_dict()),
        rows=[],
        finished=False,
    )


def _check(run: Comparison) -> list[Item]:
    """All that can be wrong before the long work."""
    s = run.settings
    install.version()
    items = parse_items([*s.ours, *s.against])
    if not items:
        raise InputError("nothing to compare; name types or files by --ours and --against")
    calibration = run.options.calibration.texts
    require_imatrix(items, bool(s.imatrix or calibration))
    if any(i.type in BY_NAME and not BY_NAME[i.type].calibratable for i in items) and calibration:
        made = ", ".join(t.name for t in BY_NAME.values() if t.calibratable)
        raise CalibrationError(f"--calib makes {made} only; leave --calib out, or the other types of --ours")
    scored = load_text(s.text)
    for spec in calibration:
        learned = texts.load(spec)
        if learned.text is not None:
            check_apart(learned.text, spec, scored.text, scored.name)
    return items


# ---- the steps ----


def _files(run: Comparison, items: Sequence[Item]) -> None:
    s, options = run.settings, run.options
    store = Store(run.cache / "files", s.fresh)
    run.reference, sha = reference_of(run.source, store, run.progress, options.trust_code)
    given = [i.path for i in items if i.path]
    open_files([run.reference, *given], run.progress)
    imatrix, imatrix_sha = s.imatrix, ""
    if imatrix:
        imatrix_sha = file_sha256(imatrix)
    elif options.calibration.texts:
        threads = options.threads
        imatrix, imatrix_sha = imatrix_of(options.calibration.texts, run.reference, sha, store, threads, run.progress)
    if options.calibration.tune and not run.source.is_dir():
        run.document.warnings.append("the source is a GGUF: --tune was left out; give the checkpoint for it")
        options = replace(options, calibration=replace(options.calibration, tune=False))
    shop = Workshop(run.source, run.reference, sha, store, options, imatrix, imatrix_sha, run.progress)
    run.document.versions = {"ptqtp_gguf": __version__, "runtime": install.version()}
    run.document.model = model_of(run.source, run.reference)
    weights = run.document.model.weights or 0
    run.document.rows.append(row_of(Made("reference", "reference", run.reference, sha), weights))
    for item in items:
        run.made.append(shop.make(item))
        run.document.rows.append(row_of(run.made[-1], weights))


def _quality(run: Comparison) -> None:
    s = run.settings
    done = evaluate(
        run.reference,
        run.paths,
        text=s.text,
        ctx=s.ctx,
        windows=s.windows,
        threads=run.options.threads,
        state=run.records,
        progress=run.progress,
    )
    run.document.text = Text(**done.text.as_dict())
    run.document.warnings += done.warnings
    run.row("reference").quality = done.reference
    for made, quality in zip(run.made, done.quality, strict=True):
        run.row(made.label).quality = quality


def _generation(run: Comparison) -> None:
    done = generate(run.reference, run.paths, threads=run.options.threads, state=run.records, progress=run.progress)
    for made, found in zip(run.made, done, strict=True):
        run.row(made.label).generation = Generation(found.agreement, found.cloze)


def _tensors(run: Comparison) -> None:
    for made in run.made:
        row = run.row(made.label)
        row.tensors = tensor_errors(made.path, run.reference, run.progress, run.options.threads)
        set_planes(row, plane_statistics(made.path, run.progress).total)


def _speed(run: Comparison) -> None:
    s = run.settings
    if not s.rounds:
        return
    rounds = _Rounds(run.output / ROUNDS_FILE, [m.sha256 for m in run.made], s)

    def measured(count: int, progress: Progress) -> None:
        done = bench(
            run.paths,
            labels=[m.label for m in run.made],
            prompt=s.prompt,
            generate=s.generate,
            threads=s.threads or None,
            rounds=count,
            done=list(rounds.done),
            keep=rounds.keep,
            progress=progress,
        )
        run.document.machine = Machine(**done.machine.as_dict(), load=done.load)
        run.document.bench = bench_of(done)
        run.document.warnings += done.warnings
        for file in done.files:
            set_speed(run.row(file.label), done, file)

    try:
        measured(s.rounds, run.progress)
    except KeyboardInterrupt:
        if rounds.done:
            measured(len(rounds.done), no_progress)
        raise
    rounds.path.unlink(missing_ok=True)


class _Rounds:
    """Rounds of the benchmark that a stopped comparison has measured, for the next one of the same files."""

    def __init__(self, path: Path, files: Iterable[str], s: Settings) -> None:
        of = [sorted(files), s.prompt, s.generate, s.threads]
        self.path, self.key = path, hashlib.sha256(json.dumps(of).encode()).hexdigest()
        self.done: list[Round] = []
        try:
            held = parse_json(read_whole(path, MAX_ROUNDS))
            if held["key"] == self.key and not s.fresh:
                self.done = list(held["rounds"])
        except (PtqtpError, ValueError, KeyError, TypeError):
            pass

    def keep(self, found: Round) -> None:
        self.done.append(found)
        write_text(self.path, json.dumps({"key": self.key, "rounds": self.done}))
