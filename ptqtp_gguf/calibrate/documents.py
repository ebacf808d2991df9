"""Documents out of a file of text, whatever form people have it in: what it is, its content tells, not its name."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import csv
import gzip
import io
import itertools
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from ..errors import CalibrationError
from ..files import parse_json
from ..source import show
from .records import KEYS, TEXT_KEYS, Document, conversation, of_record, whole

MAX_TEXT = 64 << 20  # characters that are read of a source; far more than is used
TABLES = {".csv": ",", ".tsv": "\t"}
LINES = {".jsonl", ".ndjson"}  # of names that promise JSON lines
PACKED: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
PARQUET = b"PAR1"
NO_TEXT = {  # what files begin with that are taken for text at times
    b"PK\3\4": "a zip archive or an Office document; give the text in it",
    b"\x28\xb5\x2f\xfd": "packed with zstd; unpack it",
    b"%PDF": "a PDF; give the text in it",
    b"{\\rtf": "an RTF document; give its text",
    b"GGUF": "a GGUF file, a model",
}
BOMS = (  # the longer ones first
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
JSON = re.compile(r'\s*\[?\s*\{\s*"(\\.|[^"\\])*"\s*:|\s*\[\s*"(\\.|[^"\\])*"\s*[,\]]')  # how records begin
PRETTY = re.compile(r"(?m)(?<=^\})\s+(?=\{)")  # between objects over several lines
BATCH = 256  # rows of a table that are read at a time

__all__ = ["MAX_TEXT", "Document", "read", "whole"]


class NoText(CalibrationError):
    """A file that holds no text at all: an empty or a binary one."""


def read(path: Path, name: str, log: Callable[[str], None] = lambda _: None) -> list[Document]:
    """The documents of a file, at most MAX_TEXT characters of them. Raises CalibrationError.

    A text; JSON lines, or one JSON array or object; a table (.csv, .tsv, Parquet) with a header. Records are as
    records.py knows them. UTF-8, or UTF-16 or -32 with a byte order mark; packed with gzip, bzip2 or xz, or not. Of a
    folder, the documents of all files in it but those that are no text, which `log` is told.
    """
    try:
        if not path.is_dir():
            if not path.exists():
                raise CalibrationError(
                    f"{name}: no such file; --calib takes a text file or a folder of some, builtin, self, or a data "
                    "set's org/name"
                )
            return list(_limited(iter(_read(path, name))))
        files = [p for p in sorted(path.rglob("*")) if p.is_file() and not _hidden(p.relative_to(path))]
        found = list(_limited(d for p in files for d in _read_or_skip(p, log)))
    except OSError as e:
        raise CalibrationError(f"{name}: {e.strerror or e}") from None
    if not found:
        raise NoText(f"{name}: a folder without a file of text")
    return found


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read_or_skip(path: Path, log: Callable[[str], None]) -> list[Document]:
    try:
        return _read(path, str(path))
    except NoText as e:
        log(f"left out: {e}")
        return []


def _read(path: Path, name: str) -> list[Document]:
    """The documents of one file. Raises CalibrationError, OSError."""
    try:
        found = list(_limited(_documents(path, name)))
    except UnicodeError:
        raise NoText(f"{name}: no UTF-8 text; is it a binary file, or of another encoding? Save it as UTF-8") from None
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as e:
        raise CalibrationError(f"{name}: {e}") from None
    if any("\0" in d.text for d in found):
        raise NoText(f"{name}: holds zero bytes; is it a binary file, or UTF-16 without a mark? Save it as UTF-8")
    found = [d for d in found if d.text.strip()]
    if not found:
        raise NoText(f"{name}: holds no text")
    return found


def _limited(documents: Iterator[Document]) -> Iterator[Document]:
    left = MAX_TEXT
    for d in documents:
        yield d if len(d.text) <= left else Document(d.text[:left])
        left -= len(d.text)
        if left <= 0:
            return


def _documents(path: Path, name: str) -> Iterator[Document]:
    with open(path, "rb") as f:
        begin = f.read(16)
    for magic, what in NO_TEXT.items():
        if begin.startswith(magic):
            raise NoText(f"{name}: is {what}")
    if begin.startswith(PARQUET):
        yield from _parquet(path)
        return
    opened = next((how for magic, how in PACKED.items() if begin.startswith(magic)), open)
    with opened(path, "rb") as raw:
        data = raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw)
        begin = data.peek(4)[:4]
        encoding = next((e for mark, e in BOMS if begin.startswith(mark)), "utf-8-sig")
        with io.TextIOWrapper(data, encoding=encoding) as f:
            suffixes = {s.lower() for s in path.suffixes}
            yield from _Reader(f, str(path), suffixes).documents()


class _Reader:
    """One file of text. f: opened; suffixes: of its name, which count only where its content leaves a choice."""

    def __init__(self, f: IO[str], path: str, suffixes: set[str]) -> None:
        self.f, self.path = f, path
        self.lines = bool(suffixes & LINES)
        self.promised = self.lines or ".json" in suffixes
        self.delimiters = [d for s, d in TABLES.items() if s in suffixes]
        self.number = 0  # of the line that was read last

    def documents(self) -> Iterator[Document]:
        first = self._line()
        while first and not first.strip():
            first = self._line()
        promised = (self.promised and not _opens(first)) or (self.lines and len(first) > MAX_TEXT)
        if (value := self._record_of(first)) is not None or promised:
            yield from self._lines(first, isinstance(value, list))
        elif _opens(first):
            yield from self._one_value(first)
        elif header := self._header(first):
            yield from self._rows(*header)
        else:
            yield Document(_no_surrogates(first + self.f.read(MAX_TEXT)))

    def _line(self) -> str:
        """The next line, "" at the end; never more at a time than the limit, however well it packs."""
        self.number += 1
        return self.f.readline(MAX_TEXT + 1)

    @property
    def _here(self) -> str:
        return f"{self.path}: line {self.number}"

    def _rest(self, line: str) -> Iterator[tuple[str, str]]:
        """A line and those behind it but blank ones, and where each is. Raises CalibrationError for too long a one."""
        while line:
            if len(line) > MAX_TEXT:
                raise CalibrationError(f"{self._here}: longer than the limit of {MAX_TEXT} characters")
            if line.strip():
                yield self._here, line
            line = self._line()

    # ---- JSON ----

    def _record_of(self, line: str) -> object:
        """What a line is by itself: a JSON object, or a list of such or of strings; else None."""
        try:
            found = parse_json(_raw(line)) if _opens(line) and len(line) <= MAX_TEXT else None
        except ValueError:
            return None
        return found if isinstance(found, dict) or (isinstance(found, list) and _holds_records(found)) else None

    def _lines(self, first: str, lists: bool) -> Iterator[Document]:
        """JSON lines; if the first is a list and the only one, it is all the records."""
        rest = self._rest(first)
        begin = list(itertools.islice(rest, 2))
        if lists and len(begin) == 1:
            yield from self._one_value(first)
            return
        for where, line in itertools.chain(begin, rest):
            try:
                found = parse_json(_raw(line))
            except ValueError as e:
                raise CalibrationError(f"{where}: not valid JSON ({e})") from None
            yield from of_record(found, where)

    def _one_value(self, first: str) -> Iterator[Document]:
        """A JSON array, or objects over several lines; or prose that begins like one."""
        most = 2 * MAX_TEXT
        text = first + self.f.read(most)
        meant = self.promised or bool(JSON.match(text))
        if len(text) > most and meant:
            raise CalibrationError(f"{self.path}: JSON longer than the limit of {most} characters; give JSON lines")
        try:
            values = [parse_json(_raw(part)) for part in PRETTY.split(text)]
        except ValueError as e:
            if meant:
                raise CalibrationError(f"{self.path}: line 1: not valid JSON ({e})") from None
            values = []
        records = values[0] if len(values) == 1 and isinstance(values[0], list) else values
        if not _holds_records(records):  # [1] may be a note
            yield Document(_no_surrogates(text))
            return
        if talk := conversation(records):
            yield talk
            return
        for i, record in enumerate(records):
            yield from of_record(record, f"{self.path}: record {i + 1}" if len(records) > 1 else self.path)

    # ---- tables ----

    def _header(self, first: str) -> tuple[list[str], str] | None:
        """Names of the columns and the delimiter of a table; None for what is none."""
        for delimiter in self.delimiters or ("\t", ",", ";"):
            names = [n.strip().lower() for n in next(csv.reader([first], delimiter=delimiter), [])]
            if KEYS.intersection(names) and (len(names) > 1 or self.delimiters):
                return names, delimiter
        if self.delimiters:
            raise CalibrationError(f'{self.path}: no column "{TEXT_KEYS[0]}"; it has: {show(first.strip())}')
        return None

    def _rows(self, names: list[str], delimiter: str) -> Iterator[Document]:
        before = csv.field_size_limit(MAX_TEXT)
        try:
            for row in csv.reader((line for _, line in self._rest(self._line())), delimiter=delimiter):
                yield from of_record(dict.fromkeys(names) | dict(zip(names, row, strict=False)), self._here)
        except csv.Error as e:
            raise CalibrationError(f"{self._here}: {e}") from None
        finally:
            csv.field_size_limit(before)


def _opens(line: str) -> bool:
    return line.lstrip()[:1] in ("[", "{") and bool(line.strip())


def _holds_records(found: list[object]) -> bool:
    return any(isinstance(r, (str, dict, list)) for r in found)


def _raw(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def _no_surrogates(text: str) -> str:
    """UTF-16 may hold halves of pairs in one."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _parquet(path: Path) -> Iterator[Document]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise CalibrationError(f"{path}: reading parquet needs pyarrow; pip install pyarrow, or give .jsonl") from None
    try:
        with contextlib.closing(ParquetFile(path)) as f:
            names = f.schema_arrow.names
            known = [n for n in names if n.lower() in KEYS]
            if not known:
                raise CalibrationError(f'{path}: no column "{TEXT_KEYS[0]}"; it has: {show(", ".join(names))}')
            row = 0
            for batch in f.iter_batches(BATCH, columns=known):
                for record in batch.to_pylist():
                    row += 1
                    yield from of_record(record, f"{path}: row {row}")
    except ArrowException as e:
        raise CalibrationError(f"{path}: damaged parquet: {' '.join(str(e).split())[:200]}") from None
