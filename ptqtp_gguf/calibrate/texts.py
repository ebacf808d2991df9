"""Text to calibrate with: files, the one in the package, a data set of the hub, or what the model itself writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import CalibrationError, OutputError
from ..files import partial_file, read_whole, system_errors
from ..llamacpp import keeps
from ..progress import Progress, no_progress
from ..source import Checkpoint, hub
from . import documents
from .documents import MAX_TEXT, Document
from .model import require_transformers
from .sampling import written
from .tokenizers import Tokenizer, TransformersTokenizer

BUILTIN, SELF = "builtin", "self"
BUILTIN_FILE = Path(__file__).with_name("data") / "builtin.jsonl.gz"
SUFFIXES = tuple(s + p for s in (".txt", ".jsonl", ".json", ".csv", ".tsv") for p in ("", ".gz")) + (".parquet",)
WINDOW, TOKENS = 1024, 262144  # tokens a window, and in all
PIECE = 12  # characters a token that are surely enough to fill a window
TOGETHER = 1 << 16  # characters that are tokenized as one, by one thread; cut at a line's end or a blank
BETWEEN = "\n\n"  # documents
MAX_TOKENS_A_BYTE = 1.2
MAX_UNKNOWN = 0.2  # share of unknown tokens
MAX_KEPT = 1 << 32  # bytes of the tokens that are kept
MAX_STRAY = 0.5  # share of tokens that are but a part of a character

__all__ = ["BUILTIN", "MAX_TEXT", "SELF", "Text", "kept", "load", "tokens"]


@dataclass(frozen=True)
class Text:
    """Text by the name that the user has for it; None: the model writes it.

    documents: what it consists of, where conversations are among them
    """

    name: str
    text: str | None
    documents: tuple[Document, ...] = ()


def load(spec: str, log: Callable[[str], None] = lambda _: None) -> Text:
    """The text that `--calib SPEC` names, at most MAX_TEXT characters of it.

    spec  a file or a folder (documents.read), "builtin", "self", or the id of a data set on the hub
    Raises CalibrationError, InputError.
    """
    if spec == SELF and not Path(spec).exists():
        return Text(SELF, None)
    if spec == BUILTIN and not Path(spec).exists():
        return _read(BUILTIN_FILE, BUILTIN)
    path = Path(spec)
    if hub.looks_like_id(spec):
        path = hub.fetch_data(spec, SUFFIXES, log)
    return _read(path, spec, log)


def _read(path: Path, name: str, log: Callable[[str], None] = lambda _: None) -> Text:
    found = documents.read(path, name, log)
    talks = any(d.messages for d in found)
    return Text(name, BETWEEN.join(d.text for d in found), tuple(found) if talks else ())


# ---- tokens ----


def tokens(
    texts: list[Text],
    tokenizer: Tokenizer | Checkpoint,
    window: int = WINDOW,
    n_tokens: int = TOKENS,
    *,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress = no_progress,
) -> NDArray[np.int64]:
    """Windows of tokens by the model's own tokenizer: int64 (N, window), N at most n_tokens / window.

    tokenizer  a checkpoint means its own, by transformers; text that the model writes itself wants a checkpoint
    Each window begins with BOS if the tokenizer adds one. Several texts take turns, a window each; a text that is
    longer than it takes is used evenly spread; where one is shorter, the others fill up, and N is smaller where all
    end. Conversations stand as the model's chat template has them. device and seed are for what the model writes
    itself. Raises CalibrationError, such as for a text of less than one window, or of another language than the
    tokenizer's.
    """
    n = n_tokens // window
    if window < 2 or n < 1:
        raise CalibrationError(
            f"{n_tokens} tokens in windows of {window}: at least one window, of two tokens, is needed"
        )
    found = tokenizer if isinstance(tokenizer, Checkpoint) else None
    if found is not None:
        require_transformers()
    by = TransformersTokenizer(tokenizer) if isinstance(tokenizer, Checkpoint) else tokenizer
    share = -(-n // max(1, len(texts)))
    queues = []
    for t in texts:
        if t.text is not None:
            queues.append(_windows(by, t, window, n))
            continue
        if found is None:
            raise CalibrationError(f"{t.name}: a model writes its own text from a checkpoint folder only; give a text")
        common = _ids(by, (_read(BUILTIN_FILE, BUILTIN).text or "")[: 1 << 16])
        queues.append(written(found, share, window, by.bos, common, device, seed, progress))
    out = []
    for i in range(n):  # the i-th window of each in turn
        out += [q[i] for q in queues if i < len(q)]
    return np.stack(out[:n])


def kept(path: Path, window: int, found: bool, make: Callable[[], NDArray[np.int64]]) -> NDArray[np.int64]:
    """Windows of tokens, int64 (N, window), out of a file; made and put there first unless they were found there.

    Raises OutputError, and what `make` raises.
    """
    if not found:
        made = make()
        with system_errors(path), partial_file(path) as partial:
            partial.file.write(np.ascontiguousarray(made, "<i8").data)
            partial.sync()
            partial.publish()
    raw = read_whole(path, MAX_KEPT, OutputError)
    if not raw or len(raw) % (8 * window):
        raise OutputError(f"{path}: damaged; start over with --restart")
    return np.frombuffer(raw, "<i8").astype(np.int64).reshape(-1, window)


def _windows(tokenizer: Tokenizer, t: Text, window: int, n: int) -> NDArray[np.int64]:
    """At most n windows (N, window) of a text."""
    assert t.text is not None
    bos = tokenizer.bos
    fill, size = window - (bos is not None), PIECE * window
    if t.documents:
        rows, most = _of_documents(tokenizer, t, fill, n)
    else:
        rows, most = _of_text(tokenizer, t, fill, size, n)
    if not len(rows):
        raise CalibrationError(
            f"{t.name}: {most} tokens; a window needs {fill}; give more text, or take a smaller window"
        )
    if bos is None:
        return rows
    return np.concatenate([np.full((len(rows), 1), bos, np.int64), rows], axis=1)


def _of_text(tokenizer: Tokenizer, t: Text, fill: int, size: int, n: int) -> tuple[NDArray[np.int64], int]:
    """At most n windows (N, fill) of plain text, and the most tokens of a piece."""
    assert t.text is not None
    pieces = [t.text]
    if len(t.text) > n * size:  # spread evenly; each begins behind a blank, not within a word
        starts = np.linspace(0, len(t.text) - size, n).astype(np.int64)
        pieces = [p.partition(" ")[2] or p for p in (t.text[int(s) : int(s) + size] for s in starts)]
    ids = [_ids(tokenizer, p) for p in pieces]
    _check_tokens(tokenizer, t.name, "".join(pieces[:8]), np.concatenate(ids[:8]))
    per_piece = n if len(pieces) == 1 else 1
    return np.concatenate([_cut(i, fill)[:per_piece] for i in ids]), max(map(len, ids))


def _of_documents(tokenizer: Tokenizer, t: Text, fill: int, n: int) -> tuple[NDArray[np.int64], int]:
    """At most n windows (N, fill) of documents, evenly spread over all, and the tokens of all."""
    ids, plain = [], []
    between = tokenizer.encode([BETWEEN])[0]
    for d in t.documents:
        messages = [{"role": r, "content": c} for r, c in d.messages]
        shown = tokenizer.render(messages) if messages else None
        if shown is not None and not keeps(messages, shown):  # a template that loses the texts
            shown = None
        made = _ids(tokenizer, d.text) if shown is None else tokenizer.encode([shown], special=True)[0]
        ids += [made, between]
        plain.append(made if shown is None else made[:0])
    sample = slice(0, len(plain), max(1, len(plain) // 16))
    text = "".join(d.text for d, p in zip(t.documents[sample], plain[sample], strict=True) if len(p))
    _check_tokens(tokenizer, t.name, text, np.concatenate([np.empty(0, np.int64), *plain[sample]]))
    rows = _cut(np.concatenate(ids), fill)
    return rows[np.linspace(0, len(rows) - 1, min(n, len(rows))).round().astype(np.int64)], sum(map(len, ids))


def _cut(ids: NDArray[np.int64], fill: int) -> NDArray[np.int64]:
    return ids[: len(ids) // fill * fill].reshape(-1, fill)


def _ids(tokenizer: Tokenizer, text: str) -> NDArray[np.int64]:
    parts, start = [], 0
    while len(text) - start > TOGETHER:
        most = start + TOGETHER
        end = text.rfind("\n", start, most) + 1 or text.rfind(" ", start + 1, most)
        end = end if end > start else most
        parts.append(text[start:end])
        start = end
    parts.append(text[start:])
    return np.concatenate(tokenizer.encode(parts))


def _check_tokens(tokenizer: Tokenizer, name: str, text: str, ids: NDArray[np.int64]) -> None:
    """Raises CalibrationError for a text that the tokenizer was not made for."""
    if not len(ids):
        return
    each, counts = np.unique(ids, return_counts=True)
    unknown = counts[each == tokenizer.unknown].sum() / len(ids) if tokenizer.unknown is not None else 0.0
    stray = sum(int(c) for i, c in zip(each, counts, strict=True) if tokenizer.stray(int(i))) / len(ids)
    rate = len(ids) / max(1, len(text.encode()))
    for value, limit, what in (
        (unknown, MAX_UNKNOWN, "of its tokens are unknown ones"),
        (stray, MAX_STRAY, "of its tokens are but parts of a character"),
        (rate, MAX_TOKENS_A_BYTE, "tokens a byte"),
    ):
        if value > limit:
            raise CalibrationError(
                f"{name}: {value:.2f} {what}, the limit is {limit}: the model's tokenizer does not know this language; "
                "give text like what the model was trained on"
            )
