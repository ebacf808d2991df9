"""Documents out of a file of text, whatever form people have it in: what it is, its content tells, not its name."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import CalibrationError
from ..files import parse_json
from ..source import show

MAX_TEXT = 64 << 20  # characters that are read of a source; far more than is used
TEXT_KEYS = ("text", "content")
TALK_KEYS = ("messages", "conversations", "conversation")
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class Document:
    """text, or a conversation: messages of ("user", "assistant" or "system", content)."""

    text: str
    messages: tuple[tuple[str, str], ...] = ()


def read(path: Path, name: str) -> list[Document]:
    """The documents of a file, at most MAX_TEXT characters of them. Raises CalibrationError.

    A file of JSON lines or one JSON array, packed with gzip or not: strings, objects with "text", or conversations
    ("messages" with role and content, "conversations" with from and value). A .parquet with a column "text". Anything
    else is one text, in UTF-8.
    """
    try:
        if path.is_dir() or not path.exists():
            what = "is a folder" if path.is_dir() else "no such file"
            raise CalibrationError(
                f"{name}: {what}; --calib takes a text file, builtin, self, or a data set's org/name"
            )
        found = list(_limited(_parquet(path) if path.suffix == ".parquet" else _documents(path)))
    except UnicodeDecodeError as e:
        raise CalibrationError(f"{name}: no UTF-8 text (byte {e.start} of a part); is it a binary file?") from None
    except (OSError, EOFError, zlib.error) as e:
        raise CalibrationError(f"{name}: {getattr(e, 'strerror', None) or e}") from None
    if any("\0" in d.text for d in found):
        raise CalibrationError(f"{name}: holds zero bytes; is it a binary file?")
    found = [d for d in found if d.text.strip()]
    if not found:
        raise CalibrationError(f"{name}: holds no text")
    return found


def _limited(documents: Iterator[Document]) -> Iterator[Document]:
    left = MAX_TEXT
    for d in documents:
        yield d if len(d.text) <= left else Document(d.text[:left])
        left -= len(d.text)
        if left <= 0:
            return


def _documents(path: Path) -> Iterator[Document]:
    with open(path, "rb") as f:
        packed = f.read(2) == _GZIP or path.name.endswith(".gz")
    with gzip.open(path, "rt", encoding="utf-8-sig") if packed else open(path, encoding="utf-8-sig") as f:
        lines = ".jsonl" in path.suffixes
        first, number = f.readline(MAX_TEXT + 1), 1
        while first and not first.strip():
            first, number = f.readline(MAX_TEXT + 1), number + 1
        if not lines and first.lstrip().startswith("["):
            text = first + f.read(2 * MAX_TEXT)
            if len(text) > 2 * MAX_TEXT and _begins_array(text):
                raise CalibrationError(
                    f"{path}: a JSON array longer than the limit of {2 * MAX_TEXT} characters; give JSON lines"
                )
            records = _array(text)
            if records is not None:
                yield from (d for i, r in enumerate(records) for d in _of(r, f"{path}: record {i + 1}"))
                return
            yield Document(text)
            return
        if not lines and not _is_record(first):
            yield Document(whole(first + f.read(MAX_TEXT)))
            return
        line = first
        while line:  # never more at a time, however well it packs
            if len(line) > MAX_TEXT:
                raise CalibrationError(f"{path}: line {number}: longer than the limit of {MAX_TEXT} characters")
            if line.strip():
                yield from _line(line, f"{path}: line {number}")
            line, number = f.readline(MAX_TEXT + 1), number + 1


def whole(text: str) -> str:
    """Halves of surrogate pairs, which no tokenizer takes, become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _array(text: str) -> list[object] | None:
    """The records of a JSON array that holds some; None for what is none, such as prose in brackets."""
    try:
        found = parse_json(text.encode(errors="surrogatepass"))
    except ValueError:
        return None
    return found if isinstance(found, list) and any(isinstance(r, (str, dict)) for r in found) else None


def _begins_array(text: str) -> bool:
    """Whether a text begins as a JSON array of strings or objects does."""
    return text.lstrip()[1:].lstrip()[:1] in ('"', "{")


def _is_record(line: str) -> bool:
    """Whether a line is a JSON object with text in it, as JSON lines have."""
    if not line.lstrip().startswith("{"):
        return False
    try:
        found = parse_json(line.encode(errors="surrogatepass"))
    except ValueError:
        return False
    return isinstance(found, dict) and any(k in found for k in (*TEXT_KEYS, *TALK_KEYS))


def _line(line: str, where: str) -> Iterator[Document]:
    try:
        found = parse_json(line.encode(errors="surrogatepass"))
    except ValueError as e:
        raise CalibrationError(f"{where}: not valid JSON ({e})") from None
    yield from _of(found, where)


def _of(record: object, where: str) -> Iterator[Document]:
    """The document of a record; none of one whose text is null or empty."""
    if isinstance(record, str):
        yield Document(whole(record))
        return
    if isinstance(record, dict):
        for key in TEXT_KEYS:
            if isinstance(record.get(key), str):
                yield Document(whole(record[key]))
                return
        for key in TALK_KEYS:
            if isinstance(record.get(key), list) and (made := _talk(record[key])):
                yield made
                return
        if any(k in record and not record[k] for k in (*TEXT_KEYS, *TALK_KEYS)):
            return
    keys = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
    raise CalibrationError(f'{where}: no "text" in it; it has: {show(keys) or "nothing"}')


def _talk(turns: list[object]) -> Document | None:
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            return None
        role = ROLES.get(str(turn.get("role", turn.get("from"))))
        content = turn.get("content", turn.get("value"))
        if isinstance(content, list):  # parts, as of models that see pictures too
            content = "".join(str(p.get("text") or "") for p in content if isinstance(p, dict))
        if role and isinstance(content, str):
            messages.append((role, whole(content)))
    return Document("\n\n".join(content for _, content in messages), tuple(messages)) if messages else None


def _parquet(path: Path) -> Iterator[Document]:
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
                yield from (Document(whole(str(t))) for t in batch.column(0).to_pylist() if t)
    except ArrowException as e:
        raise CalibrationError(f"{path}: damaged parquet: {' '.join(str(e).split())[:200]}") from None
