"""Checkpoint or GGUF in, trit-plane GGUF out: check -> plan -> stream -> verify -> rename, and all of it resumable."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

from ..calibrate import PlaneStore, planes_folder, remove_planes
from ..errors import InputError, Interrupted, OutputError, PtqtpError, ResumeError
from ..files import KV, Journal, check_space, check_target, scratch_path, system_errors
from ..plan import (
    Options,
    PlanRow,
    Recipe,
    Role,
    check_values,
    decisive,
    described,
    make_plan,
    memory_need,
    method_name,
    piece_for,
    recipe_of,
    require_planes,
    resolved,
    role_of,
)
from ..progress import Progress, no_progress
from ..quantize import make_encoder
from ..source import GgufSource, Imatrix, Source, checkpoint, fingerprint, local, open_source
from . import metadata, shares
from .checking import intact_tensors, verify_written
from .loop import Job, take_record, transcode
from .output_files import Part, discard, finish, lay_out, publish, share_files
from .prepare import prepared
from .records import choices_of, require_same
from .summary import Plan, Summary


def convert(
    source: Path,
    out: Path,
    options: Options | None = None,
    progress: Progress = no_progress,
    last: Callable[[Summary], None] = lambda _: None,
) -> Summary:
    """Convert a Hugging Face folder, a hub id or a GGUF file to a trit-plane GGUF.

    source    folder with config.json and safetensors, a GGUF of any ggml type (or a part of a split one), or the id of
              a model on the Hugging Face hub
    out       the file to write; appears complete and verified, or not at all
    progress  called often, from two threads; see plan.Progress
    last      called when the output lies there, before the conversion counts as done: what it raises can be mended, and
              the same call goes on with it

    A conversion that was killed goes on with its last finished tensor when it is called again with the same source
    and options. Raises a subclass of PtqtpError for anything that the caller can mend, Interrupted for Ctrl-C.
    """
    options = resolved(options or Options())
    started = time.monotonic()
    recipe = recipe_of(options)
    with system_errors(out), ExitStack() as stack:
        check_target(out, source, True)
        imatrix = imatrix_of(options, out, stack)
        source = local(source, progress, options.revision)
        journal = stack.enter_context(Journal(out, options.restart))
        if options.restart:
            discard(out)
        if journal.verified is None:
            check_target(out, source, options.force)
        stack.enter_context(_kept_on_failure(out, journal))
        with ready_source(source, out, options, progress, journal.verified is not None) as opened:
            summary = convert_opened(opened, out, options, recipe, imatrix, journal, progress)
            summary.seconds = time.monotonic() - started
            last(summary)
        journal.remove()
    return summary


def dry_run(source: Path, out: Path, options: Options | None = None, progress: Progress = no_progress) -> Plan:
    """The plan of a conversion, without reading a weight (but for --target-bpw, which measures samples)."""
    options = resolved(options or Options())
    recipe = recipe_of(options)
    with system_errors(out), ExitStack() as stack:
        check_target(out, source, True)
        imatrix = imatrix_of(options, out, stack)
        opened = stack.enter_context(
            open_source(local(source, progress, options.revision), progress, trust_code=options.trust_code)
        )
        rows = plan_of(opened, options, recipe, imatrix, progress)
        kvs = metadata_of(opened, rows, options, recipe, imatrix)
        parts = lay_out(out, [r.out for r in rows], kvs, opened.alignment, options.split_max_size)
        piece = piece_for(rows, options.method, options.max_memory, opened)
        return Plan(rows, parts, memory_need(rows, options.method, piece, opened), recipe)


def imatrix_of(options: Options, out: Path, stack: ExitStack) -> Imatrix | None:
    if options.imatrix is None:
        return None
    if options.imatrix.resolve() == out.resolve():
        raise OutputError(f"{out}: is also the imatrix to read; give the output a name of its own")
    return stack.enter_context(Imatrix(options.imatrix))


@contextmanager
def ready_source(source: Path, out: Path, options: Options, progress: Progress, finished: bool) -> Iterator[Source]:
    """The source, ready to be read; with keep_bf16 its intermediate GGUF is made first, unless it was before.

    finished: the conversion was killed when only names were missing, so the GGUF's note may be gone already
    """
    bf16 = options.keep_bf16
    if bf16 is None:
        with open_source(source, progress, out.with_name(f".{out.name}.bf16.gguf"), options.trust_code) as opened:
            yield opened
        return
    if checkpoint.is_gguf(source):
        raise InputError(f"{source}: is a GGUF already; --keep-bf16 is for checkpoint folders")
    if bf16.resolve() == out.resolve():
        raise OutputError(f"{out}: is also the name to keep the bf16 GGUF under; give it one of its own")
    found = checkpoint.check(source, options.trust_code)
    with Journal(bf16) as note:
        files = [list(s) for s in checkpoint.stamp(source)]
        mine = note.job == {"bf16": files, "made": _identity(bf16)}
        if not (mine or (finished and bf16.exists())):
            check_target(bf16, source, options.force)
            note.clear()
            # noted before it gets its name: of one without a note nobody knows where it comes from
            make_bf16(
                found, bf16, progress, lambda work: note.append({"job": {"bf16": files, "made": _identity(work)}})
            )
        with GgufSource(bf16, source) as opened:
            opened.stamp = checkpoint.stamp(source)
            yield opened
        note.clear()


def _identity(path: Path) -> list[int]:
    """What a file keeps when it gets another name: bytes, time of change in ns; nothing of one that is not there."""
    with suppress(FileNotFoundError):
        found = path.stat()
        return [found.st_size, found.st_mtime_ns]
    return []


def make_bf16(
    found: checkpoint.Checkpoint,
    bf16: Path,
    progress: Progress = no_progress,
    made: Callable[[Path], None] = lambda _: None,
) -> None:
    """llama.cpp's own bf16 GGUF of a checked folder, whole or not at all. Raises CheckpointError, OutputError.

    made: called with the whole file before it gets its name
    """
    with system_errors(bf16):
        check_space(bf16.parent, found.nbytes + found.nbytes // 3)
        progress("converter", 0, 0, found.architecture)
        with scratch_path(bf16, ".work") as work:
            for line in checkpoint.to_bf16_gguf(found, work):
                progress("converter", 0, 0, line)
            made(work)
            work.replace(bf16)


@contextmanager
def _kept_on_failure(out: Path, journal: Journal) -> Iterator[None]:
    """Leaves a state that can be taken up again where that makes sense, and nothing at all where it does not."""
    try:
        yield
    except ResumeError:
        raise
    except (KeyboardInterrupt, OutputError, OSError, MemoryError) as e:
        kept = _kept(out, journal)
        if isinstance(e, KeyboardInterrupt):
            raise Interrupted(f"interrupted; {kept}") from None
        if isinstance(e, OSError):
            where = e.filename or f"{out}: writing failed"
            raise OutputError(f"{where}: {e.strerror or e}; {kept}") from None
        raise
    except PtqtpError:
        # what this run has begun is of no use; what it found, or has finished, is not for it to throw away
        if journal.found == 0 and journal.verified is None and not shares.left(out):
            with suppress(OSError):  # the first error is the one to tell
                _forget(out, journal)
        raise


def _kept(out: Path, journal: Journal) -> str:
    """Removes what is not worth keeping; what is left, in words."""
    try:
        n = len(journal.rows)
        divided = shares.left(out)
        if n == 0 and not planes_folder(out).exists() and not divided:
            _forget(out, journal)
            return "nothing was left behind"
        what = f"{n} finished tensors are" if n else "what calibration has finished is"
        what = "what several processes have finished is" if divided else what
        return f"{what} kept; run the same command again to go on"
    except OSError:  # a disk that takes nothing any more
        return "run the same command again"


def _forget(out: Path, journal: Journal) -> None:
    discard(out)
    journal.clear()
    journal.remove()


def plan_of(
    source: Source, options: Options, recipe: Recipe, imatrix: Imatrix | None, progress: Progress
) -> list[PlanRow]:
    # a little more than the header will take: names, shapes, our own keys
    header = 4096 + sum(len(kv.raw) + len(kv.key) + 12 for kv in source.kvs.values())
    header += sum(60 + len(t.name.encode()) + 8 for t in source.tensors)
    return make_plan(
        source, recipe, options.type, options.target_bpw, header, options.method, options.threads, progress, imatrix
    )


def metadata_of(
    source: Source, rows: list[PlanRow], options: Options, recipe: Recipe, imatrix: Imatrix | None
) -> list[KV]:
    return metadata.build(
        source,
        rows,
        method_name(options),
        options.type,
        described(options, recipe),
        options.overrides,
        imatrix,
        options.calibration.described() if options.calibration.wanted else "",
    )


def convert_opened(
    source: Source,
    out: Path,
    options: Options,
    recipe: Recipe,
    imatrix: Imatrix | None,
    journal: Journal,
    progress: Progress,
) -> Summary:
    job = fingerprint(source, decisive(options, recipe, imatrix))
    if journal.job is None:
        rows = plan_of(source, options, recipe, imatrix, progress)
        if options.split_max_size:  # the files' sizes must be known before the first is written
            check_values(source, rows, options.threads, progress)
            require_planes(source, rows, options.type)
        job["plan"] = [[r.choice.type, r.choice.reason, r.choice.fallback] for r in rows]
    else:
        require_same(out, source, journal, job)
        rows = [
            PlanRow(t, c, role_of(t.name)) for t, c in zip(source.tensors, choices_of(source, journal), strict=True)
        ]
    piece = piece_for(rows, options.method, options.max_memory, source)
    kvs = metadata_of(source, rows, options, recipe, imatrix)
    parts = lay_out(out, [r.out for r in rows], kvs, source.alignment, options.split_max_size)
    if journal.verified is None and len(parts) > 1:
        for part in parts:
            check_target(part.path, source.path, options.force)
    resumed = _take_up(parts, rows, journal)
    begun = {*(p.work for p in parts if p.work.exists()), *share_files(out)}
    check_space(out.parent, sum(p.size for p in parts) - sum(p.stat().st_size for p in begun))
    if journal.job is None:
        discard(out)  # of a run whose journal is lost
        journal.append({"job": job})
    device = "none"
    store: PlaneStore | None = None
    notes: list[str] = []
    with ExitStack() as stack:
        if journal.verified is None:
            if options.calibration.wanted:
                store = stack.enter_context(prepared(source, out, rows, options, progress))
                notes = store.notes
            encoder = stack.enter_context(closing(make_encoder(options.device, options.threads, options.use_reference)))
            work = Job(source, rows, parts, journal, encoder, options.method, piece, options.threads, progress, imatrix)
            work.planes = store
            if shares.left(out):  # of several processes that worked on it
                resumed += _join(work, out, job["stamp"])
            transcode(work)
            device = encoder.name
            require_planes(source, rows, options.type)
        whole = _finish(parts, journal, options, progress)
    remove_planes(out)  # while there is a journal: if this fails, the next run does it
    discard(out)  # journals of shares
    assert journal.verified is not None
    digests = {p.path.name: d for p, d in zip(parts, journal.verified, strict=True)}
    source_types = Counter(r.tensor.type_name for r in rows if r.role is Role.BLOCK)
    size = sum(p.path.stat().st_size for p in parts)
    lacks: list[tuple[str, str | None]] = []
    if imatrix:
        lacks = [(r.tensor.name, imatrix.unweighted(r.tensor, r.choice.type, source.tensors)) for r in rows]
    return Summary(
        out,
        size,
        0.0,
        rows,
        dict(source_types),
        [p.path for p in parts],
        digests,
        resumed,
        device,
        whole,
        parts[0].kvs,
        [(name, lack) for name, lack in lacks if lack],
        notes,
    )


def _join(work: Job, out: Path, stamp: object) -> int:
    """Take in what several processes have made, and make what they have left. Returns the tensors that were found."""
    job = work.journal.job
    assert job is not None
    of, start = shares.token(job), len(work.journal.rows)
    found = shares.shares_of(out, work.source, job, work.parts)
    done = sum(shares.peek(s, of) for s in found if s.first >= start)
    shares.join(work, found, of, out, job["stamp"] != stamp)
    return done


def _finish(parts: list[Part], journal: Journal, options: Options, progress: Progress) -> str:
    """Headers, sync, reading back, names. Returns the source's hash."""
    hashes = [r["hash"] for r in journal.rows]
    assert journal.job is not None
    whole = metadata.source_hash(journal.job["header"], [r["source"] for r in journal.rows])
    parts[0].kvs = metadata.complete(parts[0].kvs, whole, hashes)
    if journal.verified is None:
        finish(parts)
        journal.append({"verified": verify_written(parts, hashes, progress, options.threads)})
        journal.sync()
    publish(parts)
    return whole


def _take_up(parts: list[Part], rows: list[PlanRow], journal: Journal) -> int:
    """Put what the journal holds into plan and layout; forget what the disk has lost. Returns the tensors kept."""
    if journal.verified is not None and (len(journal.verified), len(journal.rows)) != (len(parts), len(rows)):
        raise journal.damaged()
    if journal.verified is not None and not all(p.work.exists() or p.path.exists() for p in parts):
        journal.cut(0)
    for row, record in zip(rows, journal.rows, strict=False):
        take_record(row, record)
    for part in parts:
        part.tensors = [r.out for r in rows[part.first : part.first + len(part.tensors)]]
    if journal.verified is None:
        intact = intact_tensors(parts, journal.rows)
        if intact < len(journal.rows):
            journal.cut(intact)
    return len(journal.rows)
