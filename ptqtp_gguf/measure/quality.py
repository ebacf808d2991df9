"""Perplexity, and divergence from a reference, of files over one text: the loop.

Window by window: the reference's logits of a window are computed once, every file is compared with them, and they are
thrown away. So the disk holds no logits, and memory those of one window (ctx / 2 x vocabulary float32) and of a batch.
The files stay open, mapped; a context of the runtime is made for each window, which costs a hundredth of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..codec import F32, FORMAT_VERSION, I32
from ..errors import InputError, Interrupted
from ..llamacpp import Context, Model, cores, install
from ..progress import Progress, no_progress
from .cache import Job, Records, finite
from .scoring import Logits, Quality, Rows, alone, score, summarize
from .text import BUILTIN_WARNING, File, TextFacts, load_text, open_files, windows_of

BATCH = 512  # tokens a call of the runtime; llama-perplexity's -ub
MIN_CTX, MAX_CTX = 8, 1 << 17


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    quality    a file each, in the order given
    reference  the reference's own perplexity, or None without one
    sha256     of each file, the reference's first where there is one; of a split file, of its parts' hashes
    measured   windows that were run now; the others had been kept
    """

    quality: list[Quality]
    reference: Quality | None
    text: TextFacts
    sha256: list[str]
    measured: int
    warnings: list[str] = field(default_factory=list)


def evaluate(
    reference: Path | None,
    candidates: Sequence[Path],
    *,
    text: Path | None = None,
    ctx: int = 512,
    windows: int = 0,
    threads: int = 0,
    state: Path | None = None,
    progress: Progress = no_progress,
) -> Evaluation:
    """Measure files over a text, against a reference where one is given, by the rules of llama-perplexity.

    text      UTF-8; None: the one in the package
    ctx       tokens a window; its second half is scored
    windows   at most so many, 0 = all that the text holds
    threads   0 = all cores
    state     folder where records are kept, so that a killed evaluation can be resumed; None: nothing is kept
    progress  stage "evaluating", windows times files

    Raises InputError, before anything is loaded, for a file that is damaged, of an unknown ptqtp.format_version, or of
    another vocabulary; RuntimeMissing, OutputError; Interrupted for Ctrl-C.
    """
    if not candidates:
        raise InputError("nothing to evaluate; name at least one file")
    if not MIN_CTX <= ctx <= MAX_CTX:
        raise InputError(f"a window of {ctx} tokens; --ctx takes {MIN_CTX} to {MAX_CTX}")
    build = install.version()
    found = load_text(text)
    files = open_files([*([reference] if reference else []), *candidates], progress)
    with Model(files[0].parts[0], vocabulary_only=True) as model:
        tokens = windows_of(model, found, ctx, windows)
        warnings = [BUILTIN_WARNING] if found.builtin else []
        if windows > len(tokens):
            warnings.append(f"text {found.name} holds {len(tokens)} windows of {ctx} tokens, {windows} were asked for")
        if ctx > model.trained > 0:
            warnings.append(f"--ctx {ctx}: the model was trained on {model.trained} tokens of context")
    base, rest = (files[0], files[1:]) if reference else (None, files)
    job: Job = {
        "records": 1,
        "format": FORMAT_VERSION,
        "runtime": build,
        "reference": base.sha256 if base else "",
        "text": found.sha256,
        "ctx": ctx,
    }
    records = [Records(state, {**job, "file": f.sha256}, ctx - ctx // 2 - 1) for f in rest]
    before = sum(len(r.windows) for r in records)
    try:
        _measure(base, rest, records, tokens, threads or cores(), progress)
    except KeyboardInterrupt:
        n = sum(len(r.windows) for r in records)
        kept = f"{n} windows are kept; run the same command again to resume" if state else "nothing was kept"
        raise Interrupted(f"interrupted; {kept}") from None
    n = len(tokens)
    rows = [r.all(n) for r in records]
    facts = TextFacts(found.name, found.sha256, found.builtin, n, ctx, n * ctx)
    return Evaluation(
        quality=[summarize(r, n, base is not None) for r in rows],
        reference=summarize(alone(rows[0]), n, False) if base else None,
        text=facts,
        sha256=[f.sha256 for f in files],
        measured=sum(len(r.windows) for r in records) - before,
        warnings=warnings,
    )


def _measure(
    base: File | None, files: list[File], records: list[Records], tokens: I32, threads: int, progress: Progress
) -> None:
    """Fill the records where a window is missing."""
    missing = [[i for i, r in enumerate(records) if w not in r.windows] for w in range(len(tokens))]
    total = sum(len(m) + (base is not None) for m in missing if m)
    if not total:
        return
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        wanted = sorted({i for m in missing for i in m})
        progress("evaluating", 0, total, "loading")
        models = {i: stack.enter_context(Model(files[i].parts[0])) for i in wanted}
        reference = stack.enter_context(Model(base.parts[0])) if base else None
        done = 0

        def begin(w: int, file: File) -> None:
            progress("evaluating", done, total, f"window {w + 1} of {len(tokens)}: {file.path.name}")

        for w, lacking in enumerate(missing):
            if not lacking:
                continue
            compared = None
            if base and reference:
                begin(w, base)
                compared = _reference_logits(reference, tokens[w], threads, pool)
                done += 1
            for i in lacking:
                begin(w, files[i])
                rows = _window(models[i], tokens[w], threads, pool, compared)
                if not finite(rows):
                    name = files[i].path if compared is None or np.isfinite(compared.lse).all() else base and base.path
                    raise InputError(f"{name}: the runtime's figures are not finite in window {w + 1}; verify the file")
                records[i].add(w, rows)
                done += 1
        progress("evaluating", total, total, "")


def scored(context: Context, tokens: I32) -> Iterator[F32]:
    """Run a window; yields logits of its second half but for the last token's, which nothing follows.

    Each is float32 (n, vocabulary), a view that lasts until the next; the rows together: len(tokens) - len(tokens) // 2
    - 1. tokens: int32 (ctx,).
    """
    places = np.arange(len(tokens), dtype=np.int32)
    wanted = places >= len(tokens) // 2  # with the last, as llama-perplexity does: the same batches, the same logits
    for at in range(0, len(tokens), context.batch):
        part = slice(at, at + context.batch)
        logits = context.feed(tokens[part], places[part], wanted[part])
        if at + context.batch >= len(tokens):
            logits = logits[:-1]
        if len(logits):
            yield logits


def _reference_logits(model: Model, tokens: I32, threads: int, pool: ThreadPoolExecutor) -> Logits:
    """The reference's logits of a window's scored half: a copy, (ctx - ctx // 2 - 1, vocabulary)."""
    out = np.empty((len(tokens) - len(tokens) // 2 - 1, model.n_vocab), np.float32)
    at = 0
    with model.context(len(tokens), batch=BATCH, threads=threads) as context:
        for part in scored(context, tokens):
            out[at : at + len(part)] = part
            at += len(part)
    return Logits.of(out, pool)


def _window(model: Model, tokens: I32, threads: int, pool: ThreadPoolExecutor, reference: Logits | None) -> Rows:
    out, at, first = [], 0, len(tokens) // 2 + 1
    with model.context(len(tokens), batch=BATCH, threads=threads) as context:
        for part in scored(context, tokens):
            n = len(part)
            compared = reference.part(at, at + n) if reference else None
            out.append(score(Logits.of(part, pool), tokens[first + at : first + at + n], compared, pool))
            at += n
    return np.concatenate(out)
