"""A conversion on several processes or hosts, started by torchrun: each makes whole shares of the output (shares.py).

Source and output folder are seen by all. Rank 0 plans and has the output's journal; what the ranks have made it joins,
or, of a split output, names. The bytes are those of one process, and so is what is left when it is stopped: the same
command resumes, with as many ranks as one likes, or with none. docs/distributed.md is the page for users.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..conversion import (
    Conversion,
    ConversionJournal,
    Job,
    JobRecord,
    Part,
    Share,
    Summary,
    TensorRecord,
    choices_json,
    choices_of,
    complete,
    discard,
    finish,
    imatrix_of,
    lay_out,
    metadata_of,
    plan_of,
    ready_source,
    require_loadable,
    require_same,
    rows_of,
    share_files,
    shares,
    source_hash,
    verify_written,
)
from ..errors import InputError, Interrupted, OutputError, PtqtpError, QuantizeError, RankError
from ..files import check_space, check_target
from ..plan import (
    Choice,
    Options,
    PlanRow,
    Request,
    check_values,
    piece_for,
    require_planes,
)
from ..progress import Progress, no_progress
from ..quantize import make_encoder
from ..source import GgufSource, Imatrix, Source, changed_option, fingerprint, hub, local, open_source
from .ranks import Ranks, number, own_gpu

KEPT = "what is finished is kept; run the same command again to resume"


def convert_on_ranks(
    source: Path,
    out: Path,
    options: Options | None = None,
    progress: Progress = no_progress,
    on_published: Callable[[Summary], None] = lambda _: None,
) -> Summary | None:
    """conversion.convert on all ranks that torchrun has started; each calls this with the same arguments.

    source     seen by every rank under its path, which may differ; with keep_bf16 by rank 0 only
    out        in a folder that all ranks see
    progress   of all ranks together, called on rank 0 only, and so is on_published
    Returns the summary on rank 0, None on the others. Raises as conversion.convert does, each message with the rank's
    name, and RankError where another rank has failed.
    """
    request = Request.of(options)
    if request.calibration.by_default:
        request = request.without_text()
        progress("calibrating", 0, 0, "not calibrated: that does not divide by tensors")
    if request.method.learns:
        raise QuantizeError(
            "--calib and --hessians do not divide by tensors: calibration goes through the model in order; run the "
            "command without torchrun, or weigh errors by --imatrix, which divides"
        )
    ranks = Ranks(progress)
    try:
        with ranks:
            return _Conversion(ranks, out, request).run(source, progress, on_published)
    except RankError as e:
        raise RankError(f"{ranks.name(ranks.rank)}: ended, because {ranks.lost or e}; {KEPT}") from None
    except PtqtpError as e:
        raise type(e)(f"{ranks.name(ranks.rank)}: {e}") from None
    except KeyboardInterrupt:
        why = f"ended, because {ranks.lost}" if ranks.lost else "interrupted, or another rank has died"
        raise Interrupted(f"{ranks.name(ranks.rank)}: {why}; {KEPT}") from None
    except OSError as e:
        where = e.filename or f"{out}: writing failed"
        raise OutputError(f"{ranks.name(ranks.rank)}: {where}: {e.strerror or e}; {KEPT}") from None
    except MemoryError:
        raise OutputError(f"{ranks.name(ranks.rank)}: out of memory; give --max-memory; {KEPT}") from None


@dataclass
class _Layout:
    """What is to be made. of: token of the output; suspect: see shares.work."""

    rows: list[PlanRow]
    parts: list[Part]
    shares: list[Share]
    header: str
    of: str
    suspect: bool


class _Conversion:
    """One conversion, on one of the ranks."""

    def __init__(self, ranks: Ranks, out: Path, request: Request) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = request.options.threads or max(1, cores // number("LOCAL_WORLD_SIZE", 1))
        self.ranks, self.out = ranks, out
        self.options = replace(request.options, threads=threads)
        self.request = replace(request, options=self.options)
        self.first = ranks.rank == 0
        self.imatrix: Imatrix | None = None
        self.journal: ConversionJournal | None = None

    def run(self, source: Path, progress: Progress, on_published: Callable[[Summary], None]) -> Summary | None:
        started = time.monotonic()
        own_gpu()
        with ExitStack() as stack:
            check_target(self.out, source, True)
            self.imatrix = imatrix_of(self.options, self.out, stack)
            if self.first:
                self.journal = stack.enter_context(ConversionJournal(self.out, self.options.restart))
                stack.callback(_tidy, self.out, self.journal)
                if self.journal.job is None:
                    discard(self.out)
                if self.journal.verified is None:
                    check_target(self.out, source, self.options.force)
            self._one_folder()
            opened = self._opened(source, stack, progress)
            found = self._layout(opened, progress)
            made = self._make(opened, found) if found else (0, "none")
            if self.journal is None:
                self.ranks.exchange(None)
                return None
            summary = Conversion(opened, self.out, self.request, self.imatrix, self.journal, progress).run()
            if found:
                summary.resumed, summary.device = made
            summary.seconds = time.monotonic() - started
            on_published(summary)
            self.journal.remove()
            self.ranks.exchange(None)
            return summary

    def _one_folder(self) -> None:
        """Raises OutputError where a rank does not see rank 0's folder."""
        name = self.ranks.from_first(lambda: f".{self.out.name}.{uuid.uuid4().hex}.seen")
        mark = self.out.with_name(name)
        try:
            if self.first:
                mark.touch()
            self.ranks.exchange(None)
            seen = self.ranks.exchange(mark.exists())
        finally:
            if self.first:
                mark.unlink(missing_ok=True)
        if not all(seen):
            blind = self.ranks.name(seen.index(False))
            raise OutputError(
                f"{self.out.parent}: {blind} does not see the folder of {self.ranks.name(0)}; name one that all hosts "
                "share"
            )

    def _opened(self, source: Path, stack: ExitStack, progress: Progress) -> Source:
        """The source. One rank of a host fetches what is on the hub; rank 0 alone runs the converter of --keep-bf16."""
        options, bf16 = self.options, self.options.keep_bf16
        finished = self.journal is not None and self.journal.verified is not None
        if bf16 is not None:
            opened: Source | None = None
            if self.first:
                source = local(source, progress, options.revision)
                opened = stack.enter_context(ready_source(source, self.out, options, progress, finished))
            self.ranks.exchange(None)
            return opened or stack.enter_context(GgufSource(bf16))
        if not self.first and not source.exists() and not hub.looks_like_id(str(source)):
            raise InputError(
                f"{source}: this rank does not see it; put it where every host sees it, or let rank 0 alone read it, "
                "with --keep-bf16 FILE in a folder that all share"
            )
        one, quiet = number("LOCAL_RANK", 0) == 0, progress if self.first else no_progress
        if one:
            source = local(source, quiet, options.revision)
        self.ranks.exchange(None)
        if not one:
            source = local(source, quiet, options.revision)
        return stack.enter_context(open_source(source, quiet, None, options.trust_code, options.pre_tokenizer))

    def _layout(self, source: Source, progress: Progress) -> _Layout | None:
        """What all ranks agree upon; None where only names are missing. Rank 0 notes it in the journal."""
        job = JobRecord.of(fingerprint(source, self.request.decisive(self.imatrix)))
        self._same(source, job)
        journal, options = self.journal, self.options

        def begun() -> dict[str, Any]:
            assert journal is not None
            if journal.job is None:
                return {"plan": choices_json(plan_of(source, self.request, self.imatrix, progress))}
            then = require_same(self.out, source, journal, job)
            choices_of(source, journal)
            return {"job": then.json(), "verified": journal.verified is not None}

        found = self.ranks.from_first(begun)
        if found.get("verified"):
            return None
        fresh = "job" not in found
        whole = replace(job, plan=found["plan"]) if fresh else JobRecord.read(found["job"])
        rows = rows_of(source, whole.plan)
        if fresh and options.split_max_size:
            self._check_values(source, rows)
        whole = whole.planned(rows)
        if fresh:  # rank 0's: another's source may have other times
            whole = JobRecord.read(self.ranks.from_first(whole.json))
        kvs = metadata_of(source, rows, self.request, self.imatrix)
        outs = [r.out for r in rows]
        parts = lay_out(self.out, outs, kvs, source.alignment, options.split_max_size)
        if options.load_check and journal is not None:
            require_loadable(source, kvs, outs, source.alignment)
        planned = shares.shares_of(self.out, source, whole.plan, parts)
        of = whole.token()
        if journal is not None:
            for part in parts if len(parts) > 1 else []:
                check_target(part.path, source.path, options.force)
            begun_size = sum(p.stat().st_size for p in share_files(self.out))
            check_space(self.out.parent, sum(p.size for p in parts) - begun_size)
            if journal.job is None:
                journal.begin(whole.json())
                journal.sync()
            if len(parts) > 1:  # what one process has done alone
                for share in planned:
                    shares.seed(share, of, journal.rows[share.first : share.end])
                journal.cut(0)
        suspect = self.ranks.from_first(lambda: bool(whole.stamp != job.stamp))
        return _Layout(rows, parts, planned, whole.header, of, suspect)

    def _same(self, source: Source, job: JobRecord) -> None:
        """Raises OutputError where ranks do not do the same. A copy of the source may have other times."""
        o = self.options
        mine = {**job.json(), "source": [] if o.keep_bf16 else [s[:2] for s in job.stamp]}
        mine |= {"restart": o.restart, "force": o.force, "name": self.out.name}
        del mine["stamp"], mine["plan"]
        all_ = self.ranks.exchange(mine)
        for rank, other in enumerate(all_[1:], 1):
            if (option := changed_option(all_[0]["options"], other["options"])) is not None:
                here, there = (a["options"].get(option, "none") for a in (all_[0], other))
            elif (option := changed_option(all_[0], other)) is not None:
                here, there = (str(a.get(option, "none"))[:100] for a in (all_[0], other))
            else:
                continue
            told = "" if option == "--recipe" else f": {there}, and {here} on rank 0"
            raise OutputError(f"{self.ranks.name(rank)} has another {option}{told}; start all with the same command")

    def _check_values(self, source: Source, rows: list[PlanRow]) -> None:
        """plan.check_values, each rank its share of the tensors."""
        mine = shares.assign([r.tensor.n_weights for r in rows], self.ranks.size)[self.ranks.rank]
        progress = self.ranks.begin("checking", sum(r.tensor.n_weights for r in rows))
        pinned = self.request.recipe.pinned(source.tensors)
        check_values(source, [rows[i] for i in mine], self.options.threads, progress, pinned)
        found = self.ranks.exchange([[i, *choices_json([rows[i]])[0]] for i in mine])
        self.ranks.end()
        for i, *choice in [c for said in found for c in said]:
            rows[i].choice = Choice(*choice)
        require_planes(source, rows, self.request.kind.name)

    def _make(self, source: Source, found: _Layout) -> tuple[int, str]:
        """All shares, each by one rank. Returns the tensors that were there already, and the device."""
        ranks, options = self.ranks, self.options
        split = len(found.parts) > 1
        # looked at by one rank, before any begins: journals change while others work
        done, todo = ranks.from_first(lambda: self._found(found))
        weights = [[r.tensor.n_weights for r in found.rows[s.first : s.end]] for s in found.shares]
        lacking = [sum(w[n:]) for w, n in zip(weights, done, strict=True)]
        mine = [todo[k] for k in shares.assign([lacking[i] for i in todo], ranks.size)[ranks.rank]]
        total = sum(sum(weights[i]) for i in mine)
        progress = ranks.begin("quantizing", sum(sum(weights[i]) for i in todo))
        piece = piece_for(found.rows, self.request.direct, options.max_memory, source)
        made: dict[str, Any] = {}
        with closing(make_encoder(options.device, options.threads, options.use_reference)) as encoder:
            base = 0
            for i in mine:
                share = found.shares[i]
                with shares.opened(share, found.of) as journal:
                    job = Job(
                        source,
                        found.rows[share.first : share.end],
                        [share.part],
                        journal,
                        encoder,
                        self.request.direct,
                        piece,
                        options.threads,
                        shares.shifted(progress, base, total),
                        self.imatrix,
                        pinned=self.request.recipe.pinned(source.tensors),
                    )
                    records, digest = shares.work(job, self.out, found.suspect, split and i > 0)
                    made[str(i)] = [[r.json() for r in records], digest]
                base += sum(weights[i])
            device = encoder.name
        said = ranks.exchange(made if split else None)
        ranks.end()
        if split:
            self._close(found, {int(i): v for one in said for i, v in one.items()}, 0 in mine)
        return sum(done), device

    def _found(self, found: _Layout) -> tuple[list[int], list[int]]:
        """How many tensors of each share are finished; and the shares to do, of a single file without those in it."""
        alone = len(self.journal.rows) if self.journal else 0
        held = [shares.peek(s, found.of) for s in found.shares]
        done = [min(max(n, alone - s.first), s.end - s.first) for n, s in zip(held, found.shares, strict=True)]
        gone = [len(found.parts) == 1 and s.end <= alone for s in found.shares]
        return done, [i for i, in_it in enumerate(gone) if not in_it]

    def _close(self, found: _Layout, made: dict[int, Any], mine: bool) -> None:
        """The first part, which holds the checksums of all; the journal gets what was made. mine: I write that part."""
        records = [TensorRecord.read(r) for i in sorted(made) for r in made[i][0]]
        whole = source_hash(found.header, [r.source for r in records])
        digest = ""
        if mine:
            part = found.shares[0].part
            part.kvs = complete(part.kvs, whole, [r.hash for r in records])
            finish([part])
            digest = verify_written([part], [r["hash"] for r in made[0][0]])[0]
        digests = [next(filter(None, self.ranks.exchange(digest))), *(made[i][1] for i in sorted(made) if i)]
        if self.journal is not None:
            for n, record in enumerate(records):
                self.journal.add(record.numbered(n))
            self.journal.verify(digests)
            self.journal.sync()


def _tidy(out: Path, journal: ConversionJournal) -> None:
    """Nothing is left of a conversion of which nothing was made."""
    if journal.job is not None and not journal.rows and not shares.left(out):
        journal.clear()
