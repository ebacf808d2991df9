"""Text to calibrate with: files, the one in the package, a data set of the hub, or what the model itself writes."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CalibrationError
from ..files import parse_json
from ..progress import Progress, no_progress
from ..source import Checkpoint, hub, show, transformers_reason
from .model import require_transformers
from .sampling import written

BUILTIN, SELF = "builtin", "self"
BUILTIN_FILE = Path(__file__).with_name("data") / "builtin.jsonl.gz"
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
WINDOW, TOKENS = 1024, 262144  # tokens a window, and in all
MAX_TEXT = 64 << 20  # characters that are read of a source; far more than is used
PIECE = 12  # characters a token that are surely enough to fill a window
TOGETHER = 1 << 16  # characters that are tokenized as one, by one thread; cut at a line's end or a blank
BETWEEN = "\n\n"  # documents
MAX_TOKENS_A_BYTE = 1.2
MAX_UNKNOWN = 0.2  # share of unknown tokens
MAX_STRAY = 0.5  # share of tokens that are but a part of a character


@dataclass(frozen=True)
class Text:
    """Text by the name that the user has for it; None: the model writes it."""

    name: str
    text: str | None


def load(spec: str, log: Callable[[str], None] = lambda _: None) -> Text:
    """The text that `--calib SPEC` names, at most MAX_TEXT characters of it.

    spec  a file (UTF-8 text, .jsonl or .jsonl.gz with a "text" in each line, .parquet with such a column), "builtin",
          "self", or the id of a data set on the hub
    Raises CalibrationError, InputError.
    """
    if spec == SELF and not Path(spec).exists():
        return Text(SELF, None)
    if spec == BUILTIN and not Path(spec).exists():
        return Text(BUILTIN, _read(BUILTIN_FILE, BUILTIN))
    path = Path(spec)
    if hub.looks_like_id(spec):
        path = hub.fetch_data(spec, SUFFIXES, log)
    return Text(spec, _read(path, spec))


def _read(path: Path, name: str) -> str:
    try:
        if path.is_dir() or not path.exists():
            what = "is a folder" if path.is_dir() else "no such file"
            raise CalibrationError(
                f"{name}: {what}; --calib takes a text file, builtin, self, or a data set's org/name"
            )
        text = _joined(_parquet(path) if path.suffix == ".parquet" else _documents(path))
    except UnicodeDecodeError as e:
        raise CalibrationError(f"{name}: no UTF-8 text (byte {e.start} of a part); is it a binary file?") from None
    except (OSError, EOFError, zlib.error) as e:
        raise CalibrationError(f"{name}: {getattr(e, 'strerror', None) or e}") from None
    if "\0" in text:
        raise CalibrationError(f"{name}: holds zero bytes; is it a binary file?")
    if not text.strip():
        raise CalibrationError(f"{name}: holds no text")
    return text


def _joined(documents: Iterable[str]) -> str:
    parts, n = [], 0
    for text in documents:
        parts.append(text[: MAX_TEXT - n])
        n += len(parts[-1])
        if n >= MAX_TEXT:
            break
    return BETWEEN.join(parts)


def _documents(path: Path) -> Iterator[str]:
    packed = path.name.endswith(".gz")
    with gzip.open(path, "rt", encoding="utf-8") if packed else open(path, encoding="utf-8") as f:
        if ".jsonl" not in path.suffixes:
            yield f.read(MAX_TEXT)
            return
        for i, line in enumerate(iter(lambda: f.readline(MAX_TEXT + 1), "")):  # never more, however well it packs
            if len(line) > MAX_TEXT:
                raise CalibrationError(f"{path}: line {i + 1}: longer than the limit of {MAX_TEXT} characters")
            if line.strip():
                yield _text_of(line, f"{path}: line {i + 1}")


def _text_of(line: str, where: str) -> str:
    try:
        found = parse_json(line.encode())
    except ValueError as e:
        raise CalibrationError(f"{where}: not valid JSON ({e})") from None
    if not isinstance(found, dict) or not isinstance(found.get("text"), str):
        keys = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise CalibrationError(f'{where}: no "text" in it; it has: {show(keys) or "nothing"}')
    return str(found["text"])


def _parquet(path: Path) -> Iterator[str]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise CalibrationError(f"{path}: reading parquet needs pyarrow; pip install pyarrow, or give .jsonl") from None
    try:
        with ParquetFile(path) as f:
            if "text" not in f.schema_arrow.names:
                raise CalibrationError(f'{path}: no column "text"; it has: {show(", ".join(f.schema_arrow.names))}')
            for batch in f.iter_batches(columns=["text"]):
                yield from (str(t) for t in batch.column(0).to_pylist() if t)
    except ArrowException as e:
        raise CalibrationError(f"{path}: damaged parquet: {' '.join(str(e).split())[:200]}") from None


# ---- tokens ----


def tokens(
    texts: list[Text],
    found: Checkpoint,
    window: int = WINDOW,
    n_tokens: int = TOKENS,
    *,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress = no_progress,
) -> NDArray[np.int64]:
    """Windows of tokens by the model's own tokenizer: int64 (N, window), N at most n_tokens / window.

    Each window begins with BOS if the tokenizer adds one. Several texts take turns, a window each; a text that is
    longer than it takes is used evenly spread; where one is shorter, the others fill up, and N is smaller where all
    end. device and seed are for what the model writes itself. Raises CalibrationError, such as for a text of less than
    one window, or of another language than the tokenizer's.
    """
    n = n_tokens // window
    if window < 2 or n < 1:
        raise CalibrationError(
            f"{n_tokens} tokens in windows of {window}: at least one window, of two tokens, is needed"
        )
    require_transformers()
    tokenizer = load_tokenizer(found)
    bos = bos_of(tokenizer)
    share = -(-n // max(1, len(texts)))
    queues = []
    for t in texts:
        if t.text is None:
            common = _ids(tokenizer, _read(BUILTIN_FILE, BUILTIN)[: 1 << 16])
            queues.append(written(found, share, window, bos, common, device, seed, progress))
        else:
            queues.append(_windows(tokenizer, t, window, n, bos))
    out = []
    for i in range(n):  # the i-th window of each in turn
        out += [q[i] for q in queues if i < len(q)]
    return np.stack(out[:n])


def load_tokenizer(found: Checkpoint) -> Any:
    """The checkpoint's tokenizer, by transformers. Raises CalibrationError."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(
            found.folder, local_files_only=True, trust_remote_code=found.trust_code
        )
    except Exception as e:
        text = transformers_reason(e)
        raise CalibrationError(f"{found.folder}: transformers cannot load its tokenizer: {text}") from None


def bos_of(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts before a text, or None."""
    ids = tokenizer("a").input_ids
    return int(ids[0]) if ids and ids[0] == tokenizer.bos_token_id else None


def _windows(tokenizer: Any, t: Text, window: int, n: int, bos: int | None) -> NDArray[np.int64]:
    """At most n windows (N, window) of a text."""
    assert t.text is not None
    fill, size = window - (bos is not None), PIECE * window
    pieces = [t.text]
    if len(t.text) > n * size:  # spread evenly; each begins behind a blank, not within a word
        starts = np.linspace(0, len(t.text) - size, n).astype(np.int64)
        pieces = [p.partition(" ")[2] or p for p in (t.text[int(s) : int(s) + size] for s in starts)]
    ids = [_ids(tokenizer, p) for p in pieces]
    _check_tokens(tokenizer, t.name, "".join(pieces[:8]), np.concatenate(ids[:8]))
    per_piece = n if len(pieces) == 1 else 1
    rows = np.concatenate([i[: len(i) // fill * fill].reshape(-1, fill)[:per_piece] for i in ids])
    if not len(rows):
        have = max(map(len, ids))
        raise CalibrationError(
            f"{t.name}: {have} tokens; a window needs {fill}; give more text, or take a smaller window"
        )
    if bos is None:
        return rows
    return np.concatenate([np.full((len(rows), 1), bos, np.int64), rows], axis=1)


def _ids(tokenizer: Any, text: str) -> NDArray[np.int64]:
    parts, start = [], 0
    while len(text) - start > TOGETHER:
        most = start + TOGETHER
        end = text.rfind("\n", start, most) + 1 or text.rfind(" ", start + 1, most)
        end = end if end > start else most
        parts.append(text[start:end])
        start = end
    parts.append(text[start:])
    found = tokenizer(parts, add_special_tokens=False, verbose=False).input_ids
    return np.concatenate([np.array(ids, np.int64) for ids in found])


def _check_tokens(tokenizer: Any, name: str, text: str, ids: NDArray[np.int64]) -> None:
    """Raises CalibrationError for a text that the tokenizer was not made for."""
    if not len(ids):
        return
    each, counts = np.unique(ids, return_counts=True)
    unknown = counts[each == tokenizer.unk_token_id].sum() / len(ids) if tokenizer.unk_token_id is not None else 0.0
    stray = sum(int(c) for i, c in zip(each, counts, strict=True) if "\ufffd" in tokenizer.decode([int(i)])) / len(ids)
    rate = len(ids) / len(text.encode())
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
