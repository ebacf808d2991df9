"""Checkpoint or GGUF in, trit-plane GGUF out: plan -> prepare -> transcode -> verify -> publish, all resumable."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

from ..calibrate import STOPPED, Effects, Seen, goes_in_order, remove_moments, remove_planes, require_checkpoint
from ..errors import OutputError, ResumeError
from ..files import KV, check_space, check_target, system_errors
from ..plan import (
    Options,
    PlanRow,
    Request,
    Role,
    check_values,
    chooses_types,
    make_plan,
    memory_need,
    piece_for,
    require_planes,
    role_of,
)
from ..progress import Progress, no_progress
from ..quantize import make_encoder
from ..source import Imatrix, Source, fingerprint, local, open_source
from . import metadata, shares
from .bf16 import ready_source
from .checking import require_loadable, verify_written
from .leftovers import kept_on_failure, replaceable
from .loop import Job, transcode
from .output_files import Part, discard, finish, lay_out, publish, share_files
from .prepare import Uncalibrated, optional, prepared
from .records import ConversionJournal, JobRecord, choices_of, require_same, take_up
from .summary import Plan, Summary


def convert(
    source: Path,
    out: Path,
    options: Options | None = None,
    progress: Progress = no_progress,
    on_published: Callable[[Summary], None] = lambda _: None,
) -> Summary:
    """Convert a Hugging Face folder, a hub id or a GGUF file to a trit-plane GGUF.

    source        folder with config.json and safetensors, a GGUF of any ggml type (or a part of a split one), or the id
                  of a model on the Hugging Face hub
    out           the file to write; appears complete and verified, or not at all
    progress      called often, from two threads; see progress.Progress
    on_published  called after the output has its name, before the journal is removed. If it raises, the same call
                  resumes here

    A conversion that was killed resumes with its last finished tensor when it is called again with the same source and
    options. Raises a subclass of PtqtpError for anything that the caller can mend, Interrupted for Ctrl-C.
    """
    request = Request.of(options)
    started = time.monotonic()
    options = request.options
    with system_errors(out), ExitStack() as stack:
        check_target(out, source, True)
        imatrix = imatrix_of(options, out, stack)
        source = local(source, progress, options.revision)
        journal = stack.enter_context(ConversionJournal(out, options.restart))
        if options.restart:
            discard(out)
        if journal.verified is None:
            check_target(out, source, options.force)
        stack.enter_context(kept_on_failure(out, journal))
        with ready_source(source, out, options, progress, journal.verified is not None) as opened:
            summary = _converted(opened, out, request, imatrix, journal, progress)
            summary.seconds = time.monotonic() - started
            on_published(summary)
        journal.remove()
    return summary


def _converted(
    source: Source,
    out: Path,
    request: Request,
    imatrix: Imatrix | None,
    journal: ConversionJournal,
    progress: Progress,
) -> Summary:
    """The conversion; without text where nobody asked for a calibration and it cannot be done."""
    why = ""
    if request.calibration.by_default and journal.job is not None and not JobRecord.learns(journal.job):
        request, why = request.without_text(), JobRecord.why_without_text(journal.job)
    else:
        try:
            return Conversion(source, out, request, imatrix, journal, progress).run()
        except Uncalibrated as e:
            remove_planes(out)
            remove_moments(out)
            discard(out)
            journal.clear()
            request, why = request.without_text(), str(e)
    note = f"not calibrated: {why}"
    progress("calibrating", 0, 0, note)
    return Conversion(source, out, request, imatrix, journal, progress, [note], why).run()


def dry_run(source: Path, out: Path, options: Options | None = None, progress: Progress = no_progress) -> Plan:
    """The plan of a conversion, without reading a weight (but for --target-bpw, which measures samples)."""
    request = Request.of(options)
    options = request.options
    with system_errors(out), ExitStack() as stack:
        check_target(out, source, True)
        imatrix = imatrix_of(options, out, stack)
        opened = stack.enter_context(
            open_source(
                local(source, progress, options.revision), progress, None, options.trust_code, options.pre_tokenizer
            )
        )
        if options.load_check:
            rows = _by_recipe(opened, request)
            kvs = metadata_of(opened, rows, request, imatrix)
            require_loadable(opened, kvs, [r.out for r in rows], opened.alignment)
        rows = plan_of(opened, request, imatrix, progress)
        kvs = metadata_of(opened, rows, request, imatrix)
        parts = lay_out(out, [r.out for r in rows], kvs, opened.alignment, options.split_max_size)
        piece = piece_for(rows, request.direct, options.max_memory, opened)
        return Plan(rows, parts, memory_need(rows, request.direct, piece, opened), request.recipe, opened.notes)


def imatrix_of(options: Options, out: Path, stack: ExitStack) -> Imatrix | None:
    if options.imatrix is None:
        return None
    if options.imatrix.resolve() == out.resolve():
        raise OutputError(f"{out}: is also the imatrix to read; give the output a name of its own")
    return stack.enter_context(Imatrix(options.imatrix))


def plan_of(
    source: Source, request: Request, imatrix: Imatrix | None, progress: Progress, effects: Effects | None = None
) -> list[PlanRow]:
    """What each tensor becomes; see plan.make_plan."""
    # a little more than the header will take: names, shapes, our own keys
    header = 4096 + sum(len(kv.raw) + len(kv.key) + 12 for kv in source.kvs.values())
    header += sum(60 + len(t.name.encode()) + 8 for t in source.tensors)
    return make_plan(source, request, header, progress, imatrix, effects)


def metadata_of(source: Source, rows: list[PlanRow], request: Request, imatrix: Imatrix | None) -> list[KV]:
    """The output's metadata, its checksums still zeros. Raises RecipeError for a bad --override-kv."""
    how = request.calibration
    return metadata.build(
        source,
        rows,
        request.method.name,
        request.kind.name,
        request.described(),
        request.options.overrides,
        imatrix,
        how.described() if how.wanted else "",
    )


class Phase(IntEnum):
    """How far a conversion is. Each phase is on the disk before it counts, so a killed run resumes behind it."""

    BEGUN = 0  # nothing is noted
    PLANNED = 1  # the journal holds the job and the plan
    PREPARED = 2  # the planes of the method's stages, if it has any, are in the store
    WRITTEN = 3  # every tensor is in the unfinished files and in the journal
    VERIFIED = 4  # the files are whole and were read back; only their names are missing
    PUBLISHED = 5  # the files have their names


@dataclass
class Conversion:
    """One conversion of an opened source, on one process: `run` takes it from the phase that it finds to the last.

    journal       open, and locked as long as this works
    without_text  why the default calibration is left out, if it is
    """

    source: Source
    out: Path
    request: Request
    imatrix: Imatrix | None
    journal: ConversionJournal
    progress: Progress
    notes: list[str] = field(default_factory=list)
    without_text: str = ""

    def __post_init__(self) -> None:
        self.phase = Phase.BEGUN if self.journal.job is None else Phase.PLANNED
        if self.journal.verified is not None:
            self.phase = Phase.VERIFIED
            self.notes = [*self.journal.notes]  # of the run that verified it: the model card is the same
        self.rows: list[PlanRow] = []
        self.parts: list[Part] = []
        self.resumed = 0  # tensors that were finished before
        self.device = "none"
        self.source_hash = ""
        self._stack = ExitStack()
        self._loadable: list[int] = []  # types with which the runtime loads the output
        self.seen: Seen | None = None
        if self.phase < Phase.VERIFIED and self.request.method.learns and not goes_in_order(self.source, self.request):
            require_checkpoint(self.source, self.request)
            self.seen = Seen(self.source, self.request, self.out, self.progress)

    def run(self) -> Summary:
        """All phases that are left. Raises a subclass of PtqtpError, OSError or KeyboardInterrupt."""
        self.plan()
        try:
            with self._stack:
                if self.phase < Phase.VERIFIED:
                    job = self.prepare()
                    self.transcode(job)
                self.verify()
        except STOPPED:
            raise
        except BaseException:
            with suppress(OSError):  # the first error is the one to tell
                self.journal.fail()
            raise
        self.publish()
        return self.summary()

    def plan(self) -> None:
        """What each tensor becomes and where it goes: made now, or taken from the journal. -> PLANNED at least."""
        options, journal = self.request.options, self.journal
        job = JobRecord.of(fingerprint(self.source, self.request.decisive(self.imatrix)))
        if self.phase is not Phase.BEGUN:
            self._require_same(job)
        if self.seen:
            self.seen.begin()
        if self.phase is Phase.BEGUN:
            if self.seen or options.has_target:  # before what may take long
                self._require_loadable(_by_recipe(self.source, self.request))
            self.rows = plan_of(self.source, self.request, self.imatrix, self.progress, self._effects())
            if options.split_max_size:  # the files' sizes must be known before the first is written
                pinned = self.request.recipe.pinned(self.source.tensors)
                check_values(self.source, self.rows, options.threads, self.progress, pinned)
                require_planes(self.source, self.rows, self.request.kind.name)
        else:
            choices = choices_of(self.source, journal)
            self.rows = [PlanRow(t, c, role_of(t.name)) for t, c in zip(self.source.tensors, choices, strict=True)]
        job = job.planned(self.rows)
        self._piece = piece_for(self.rows, self.request.direct, options.max_memory, self.source)
        self._lay_out()
        if self.phase is Phase.BEGUN:
            discard(self.out)  # of a run whose journal is lost
            journal.begin({**job.json(), **({"without_text": self.without_text} if self.without_text else {})})
            self.phase = Phase.PLANNED
        self._stamp = job.stamp

    def _require_same(self, job: JobRecord) -> None:
        """An unfinished run was this one, or gives way to it. Raises ResumeError where it is worth something."""
        try:
            require_same(self.out, self.source, self.journal, job)
        except ResumeError:
            if not replaceable(self.out, self.journal):
                raise
            discard(self.out)
            self.journal.clear()
            self.phase = Phase.BEGUN

    def _effects(self) -> Effects | None:
        """What the runtime has seen, where types are chosen by it."""
        if not self.seen or not self.seen.how.texts or not chooses_types(self.request):
            return None
        with optional(self.request.calibration.by_default):
            return self.seen.effects()

    def _lay_out(self) -> None:
        """The files of the output, with what they hold already; is there room for the rest?"""
        options = self.request.options
        kvs = metadata_of(self.source, self.rows, self.request, self.imatrix)
        outs = [r.out for r in self.rows]
        self.parts = lay_out(self.out, outs, kvs, self.source.alignment, options.split_max_size)
        if self.phase < Phase.VERIFIED:
            self._require_loadable(self.rows)
        if self.phase < Phase.VERIFIED and len(self.parts) > 1:
            for part in self.parts:
                check_target(part.path, self.source.path, options.force)
        self.resumed = take_up(self.parts, self.rows, self.journal)
        if self.phase is Phase.VERIFIED and self.journal.verified is None:
            self.phase = Phase.PLANNED  # the disk has lost what was verified
        begun = {*(p.work for p in self.parts if p.work.exists()), *share_files(self.out)}
        check_space(self.out.parent, sum(p.size for p in self.parts) - sum(p.stat().st_size for p in begun))

    def _require_loadable(self, rows: list[PlanRow]) -> None:
        """The runtime takes a file of this plan. Raises InputError where it does not."""
        kinds = [r.choice.type for r in rows]
        if not self.request.options.load_check or kinds == self._loadable:
            return
        kvs = metadata_of(self.source, rows, self.request, self.imatrix)
        note = require_loadable(self.source, kvs, [r.out for r in rows], self.source.alignment)
        self._loadable = kinds
        if note and note not in self.notes:
            self.notes.append(note)

    def prepare(self) -> Job:
        """The planes of the method's stages, and all that the loop works with. -> PREPARED."""
        options, store = self.request.options, None
        if self.request.method.stages:
            store = self._stack.enter_context(
                prepared(self.source, self.out, self.rows, self.request, self.progress, self.seen)
            )
            self.notes += store.notes
        encoder = make_encoder(options.device, options.threads, options.use_reference)
        self._stack.enter_context(closing(encoder))
        self.phase = Phase.PREPARED
        return Job(
            self.source,
            self.rows,
            self.parts,
            self.journal,
            encoder,
            self.request.direct,
            self._piece,
            options.threads,
            self.progress,
            self.imatrix,
            store,
            Effects(self.seen.moments, {}).importance if self.seen else None,
            self.request.recipe.pinned(self.source.tensors),
        )

    def transcode(self, job: Job) -> None:
        """Every tensor into the unfinished files. -> WRITTEN."""
        if shares.left(self.out):  # of several processes that worked on it
            self.resumed += _join(job, self.out, self._stamp)
        transcode(job)
        self.device = job.encoder.name
        require_planes(self.source, self.rows, self.request.kind.name)
        self.phase = Phase.WRITTEN

    def verify(self) -> None:
        """Headers and checksums, everything to the disk and read back from it. -> VERIFIED."""
        journal = self.journal
        hashes = [r.hash for r in journal.rows]
        assert journal.job is not None
        self.source_hash = metadata.source_hash(journal.job["header"], [r.source for r in journal.rows])
        self.parts[0].kvs = metadata.complete(self.parts[0].kvs, self.source_hash, hashes)
        if self.phase < Phase.VERIFIED:
            self._require_loadable(self.rows)  # of which some may have fallen back
            finish(self.parts)
            sums = verify_written(self.parts, hashes, self.progress, self.request.options.threads)
            journal.verify(sums, self.notes)
            journal.sync()
            self.phase = Phase.VERIFIED

    def publish(self) -> None:
        """The files get their names; what is not needed any more goes. -> PUBLISHED."""
        publish(self.parts)
        self.phase = Phase.PUBLISHED
        remove_planes(self.out)  # while there is a journal: if this fails, the next run does it
        remove_moments(self.out)
        discard(self.out)  # journals of shares

    def summary(self) -> Summary:
        """What was written. In phase PUBLISHED only."""
        verified = self.journal.verified
        assert self.phase is Phase.PUBLISHED and verified is not None
        lacks: list[tuple[str, str]] = []
        for r in self.rows if self.imatrix else []:
            assert self.imatrix
            if lack := self.imatrix.unweighted(r.tensor, r.choice.type, self.source.tensors):
                lacks.append((r.tensor.name, lack))
        return Summary(
            path=self.out,
            size=sum(p.path.stat().st_size for p in self.parts),
            seconds=0.0,
            rows=self.rows,
            source_types=dict(Counter(r.tensor.type_name for r in self.rows if r.role is Role.BLOCK)),
            files=[p.path for p in self.parts],
            sha256={p.path.name: d for p, d in zip(self.parts, verified, strict=True)},
            resumed=self.resumed,
            device=self.device,
            source_hash=self.source_hash,
            kvs=self.parts[0].kvs,
            unweighted=lacks,
            notes=list(dict.fromkeys([*self.source.notes, *self.notes])),
        )


def _by_recipe(source: Source, request: Request) -> list[PlanRow]:
    """The plan without a look at weights or text: what it has in common with the final one is all but types."""
    choices = request.recipe.plan(source.tensors)
    rows = [PlanRow(t, choices[t.name], role_of(t.name)) for t in source.tensors]
    require_planes(source, rows, request.kind.name)
    return rows


def _join(work: Job, out: Path, stamp: object) -> int:
    """Take in what several processes have made, and make what they have left. Returns the tensors that were found."""
    assert work.journal.job is not None
    job = JobRecord.read(work.journal.job)
    of, start = job.token(), len(work.journal.rows)
    found = shares.shares_of(out, work.source, job.plan, work.parts)
    done = sum(shares.peek(s, of) for s in found if s.first >= start)
    shares.join(work, found, of, out, job.stamp != stamp)
    return done
