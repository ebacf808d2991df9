"""What a file writes and answers: greedy agreement with a reference, and questions with four endings.

Agreement: the reference continues short prompts, always by the likeliest token, for LIMIT tokens whatever they are;
counted are the tokens until the file would have gone on in another way. The file is fed the reference's text, many
tokens at once: until it first differs, that is what it would have written itself. (So few at once that the runtime
computes as it does token by token: the prompt is short, and longer batches take another path of flash attention, whose
rounding alone changes a small model's text after some 30 tokens.)

Cloze: of four endings the one counts as chosen whose log-likelihood, summed over its tokens and divided by its
characters, is the largest: what others call acc_norm.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..codec import I32
from ..errors import InputError, Interrupted
from ..llamacpp import Context, Model, cores, install
from ..progress import Progress, no_progress
from .cache import Job, keep, kept
from .scoring import Logits
from .text import File, open_files

DATA = Path(__file__).with_name("data")
LIMIT = 64  # tokens that are continued
TOGETHER = 8  # prompts that the reference continues at once
AT_ONCE = 32  # tokens of a known text fed at once; far above it flash attention rounds in another way
ROOM = 128  # tokens of a prompt with its continuation, or of a question with an ending, at most
ENDINGS = 4


@dataclass(frozen=True)
class Question:
    """A context and four endings, each beginning with its blank; right: the number of the right one."""

    context: str
    endings: tuple[str, ...]
    right: int


def prompts() -> list[str]:
    """The prompts in the package."""
    return [str(p) for p in json.loads((DATA / "prompts.json").read_text())]


def questions() -> list[Question]:
    """The questions in the package."""
    found = json.loads((DATA / "cloze.json").read_text())
    return [Question(q["context"], tuple(f" {e}" for e in q["endings"]), q["right"]) for q in found]


@dataclass(frozen=True)
class Agreement:
    """Tokens of greedy text before it leaves the reference's; full: prompts that never do; limit: tokens written."""

    mean: float
    median: float
    full: int
    prompts: int
    limit: int


@dataclass(frozen=True)
class Cloze:
    """Right endings chosen, of how many questions, the reference's, and how often both choose the same."""

    right: int
    of: int
    reference_right: int | None = None
    same_answer: int | None = None


@dataclass(frozen=True)
class Generation:
    """A file's answers.

    agreed     tokens a prompt, 0 to LIMIT, that it writes as the reference does; None without one
    answers    chosen ending of each question
    right      the right ones
    reference  those that the reference chose, or None
    """

    agreed: list[int] | None
    answers: list[int]
    right: list[int]
    reference: list[int] | None

    @property
    def agreement(self) -> Agreement | None:
        """The tokens agreed upon, in short; None without a reference."""
        a = self.agreed
        return Agreement(statistics.fmean(a), statistics.median(a), a.count(LIMIT), len(a), LIMIT) if a else None

    @property
    def cloze(self) -> Cloze:
        """The answers, counted."""
        right, theirs = _equal(self.answers, self.right), self.reference
        if theirs is None:
            return Cloze(right, len(self.right))
        return Cloze(right, len(self.right), _equal(theirs, self.right), _equal(theirs, self.answers))

    def as_dict(self) -> dict[str, dict[str, Any] | None]:
        """For JSON."""
        a = self.agreement
        return {"agreement": asdict(a) if a else None, "cloze": asdict(self.cloze)}


def _equal(a: list[int], b: list[int]) -> int:
    return sum(x == y for x, y in zip(a, b, strict=True))


def generate(
    reference: Path | None,
    candidates: Sequence[Path],
    *,
    threads: int = 0,
    state: Path | None = None,
    progress: Progress = no_progress,
) -> list[Generation]:
    """Agreement and cloze of each file, in the order given. Without a reference there is no agreement.

    threads, state, progress and what is raised: as evaluation.evaluate; the stage is "generating", texts. What is kept
    is a file's agreement, and a file's answers.
    """
    build, texts, asked = install.version(), prompts(), questions()
    files = open_files([*([reference] if reference else []), *candidates], progress)
    base, rest = (files[0], files[1:]) if reference else (None, files)
    step = _Steps(progress, len(files) * (len(asked) + (len(texts) if base else 0)))
    threads = threads or cores()
    try:
        told, told_answers = None, None
        if base:
            tokens, told_answers = _of_file(base, None, texts, asked, build, base.sha256, state, threads, step)
            told = np.array(tokens, np.int32).reshape(-1, LIMIT)
        results = [
            _of_file(f, told, texts, asked, build, base.sha256 if base else "", state, threads, step) for f in rest
        ]
    except KeyboardInterrupt:
        what = "what files have finished is kept; run the same command again to resume" if state else "nothing was kept"
        raise Interrupted(f"interrupted; {what}") from None
    right = [q.right for q in asked]
    return [Generation(agreed if base else None, answers, right, told_answers) for agreed, answers in results]


class _Steps:
    """Counts texts for the progress."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, n: int, what: str) -> None:
        self.done += n
        self.progress("generating", self.done, self.total, what)


def _of_file(
    file: File,
    told: I32 | None,
    texts: list[str],
    asked: list[Question],
    build: str,
    reference: str,
    state: Path | None,
    threads: int,
    step: _Steps,
) -> tuple[list[int], list[int]]:
    """Its agreement with what the reference told (P, LIMIT), and its answers.

    Of the reference itself, whose told is None: its tokens, P x LIMIT in a row; [] where there is no reference.
    """
    job: Job = {"runtime": build, "prompts": _hash(texts), "limit": LIMIT, "reference": reference}
    job |= {"of": "agreement", "file": file.sha256} if told is not None else {"of": "tokens"}
    cloze: Job = {"runtime": build, "questions": _hash([[q.context, *q.endings] for q in asked]), "file": file.sha256}
    n, most = (len(texts), LIMIT) if told is not None else (len(texts) * LIMIT, 1 << 30)
    first: list[int] | None = _known(state, job, n, most) if reference else []
    answers = _known(state, cloze, len(asked), ENDINGS - 1)
    step(len(texts) if first else 0, file.path.name)
    step(len(asked) if answers else 0, file.path.name)
    if first is not None and answers is not None:
        return first, answers
    with Model(file.parts[0]) as model:
        if first is None:
            first = (
                continued(model, texts, threads, step) if told is None else agreed(model, texts, told, threads, step)
            )
            keep(state, job, {"values": first})
        if answers is None:
            answers = answered(model, asked, threads, step)
            keep(state, cloze, {"values": answers})
    return first, answers


def _known(state: Path | None, job: Job, n: int, most: int) -> list[int] | None:
    """What was kept, if it is n whole numbers from 0 to most."""
    found = (kept(state, job) or {}).get("values")
    good = isinstance(found, list) and len(found) == n and all(type(x) is int and 0 <= x <= most for x in found)
    return found if good else None


def _hash(what: object) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _nothing(n: int, what: str) -> None:
    pass


def continued(
    model: Model, texts: Sequence[str], threads: int, step: Callable[[int, str], None] = _nothing, limit: int = LIMIT
) -> list[int]:
    """The likeliest token, `limit` times behind each text: the tokens of all texts in a row."""
    out: list[int] = []
    for at in range(0, len(texts), TOGETHER):
        begun = [_prompt(model, t) for t in texts[at : at + TOGETHER]]
        ends = np.array([len(t) for t in begun], np.int32)
        with model.context(TOGETHER * ROOM, sequences=TOGETHER, threads=threads) as context:
            rows = np.repeat(np.arange(len(begun), dtype=np.int32), ends)
            places = np.concatenate([np.arange(n, dtype=np.int32) for n in ends])
            logits = context.feed(np.concatenate(begun), places, places == ends[rows] - 1, rows)
            found = np.empty((len(begun), limit), np.int32)
            for i in range(limit):
                found[:, i] = logits.argmax(1)
                step(0, f"token {i + 1} of {limit}: {model.path.name}")
                if i < limit - 1:
                    logits = context.feed(found[:, i], ends + i, ends > 0, np.arange(len(begun), dtype=np.int32))
        out += found.ravel().tolist()
        step(len(begun), model.path.name)
    return out


def _prompt(model: Model, text: str) -> I32:
    tokens = model.tokens(text)
    if not 0 < len(tokens) <= ROOM - LIMIT:
        raise InputError(f"{model.path}: {len(tokens)} tokens in {text[:40]!r}; its tokenizer is not made for English")
    return tokens


def agreed(
    model: Model, texts: Sequence[str], told: I32, threads: int, step: Callable[[int, str], None] = _nothing
) -> list[int]:
    """Tokens a text that the model's own greedy continuation shares with `told`, int32 (P, n), from its beginning."""
    out = []
    with model.context(ROOM, threads=threads) as context:
        for text, tokens in zip(texts, told, strict=True):
            begun = _prompt(model, text)
            fed = np.concatenate([begun, tokens[:-1]])
            places = np.arange(len(fed), dtype=np.int32)
            wanted = places >= len(begun) - 1
            parts = [slice(at, at + AT_ONCE) for at in range(0, len(fed), AT_ONCE)]
            own = np.concatenate([context.feed(fed[p], places[p], wanted[p]).argmax(1) for p in parts])
            context.forget()
            differs = np.flatnonzero(own != tokens)
            out.append(int(differs[0]) if len(differs) else len(tokens))
            step(1, model.path.name)
    return out


def answered(
    model: Model, asked: Sequence[Question], threads: int, step: Callable[[int, str], None] = _nothing
) -> list[int]:
    """The ending of each question that the model finds likeliest, by its characters."""
    out = []
    with model.context(ENDINGS * ROOM, sequences=ENDINGS, threads=threads) as context:
        for q in asked:
            out.append(int(np.argmax(_likelihoods(context, model, q))))
            context.forget()
            step(1, model.path.name)
    return out


def _likelihoods(context: Context, model: Model, q: Question) -> list[float]:
    """ln p of each ending, all its tokens together, by its characters."""
    start = model.tokens(q.context)
    whole = [model.tokens(q.context + ending) for ending in q.endings]
    if max(map(len, whole)) > ROOM:
        raise InputError(f"{model.path}: {max(map(len, whole))} tokens in a question; is its tokenizer for English?")
    # where blank and word are one token, an ending begins with the first token that the context alone does not have
    shared = max(1, min(_shared(start, w) for w in whole))
    places = np.concatenate([np.arange(len(w), dtype=np.int32) for w in whole])
    rows = np.repeat(np.arange(len(whole), dtype=np.int32), [len(w) for w in whole])
    lengths = np.array([len(w) for w in whole], np.int32)
    wanted = (places >= shared - 1) & (places < lengths[rows] - 1)
    logits = context.feed(np.concatenate(whole), places, wanted, rows)
    nll = Logits.of(logits).nll(np.concatenate([w[shared:] for w in whole]))
    of = rows[wanted]
    return [-float(nll[of == i].sum()) / len(ending.strip()) for i, ending in enumerate(q.endings)]


def _shared(a: I32, b: I32) -> int:
    """Tokens that both begin with."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n
