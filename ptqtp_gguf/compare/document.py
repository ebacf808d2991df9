"""The document of a comparison, as it stands in report.json: its schema, and its reading with every value checked.

The dataclasses below are the schema, with those of rooms that measure; their fields stand in the order of report.json.
A field with a default may be missing or null: it was not measured. Keys that are not named here are allowed and
ignored. Row and Document are filled in step by step.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from ..errors import InputError
from ..inspect import TensorError
from ..measure import Agreement, Cloze, Quality, Ratio, Speed

SCHEMA = 1
MAX_ITEMS = 200_000  # of a list or an object
MAX_ROWS = 100
MAX_BARS = 1000  # of a histogram
MAX_TEXT = 10_000  # characters
MAX_NUMBER = 1e30
UNLESS_EMPTY = {"unless empty": True}  # metadata of a field that is not written while it is empty

T = TypeVar("T")


@dataclass(frozen=True)
class Model:
    """What was converted. weights: how many."""

    name: str
    source: str = ""
    weights: int | None = None
    vocab: int | None = None
    architecture: str = ""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """memory in bytes; quota: CPUs' worth of time that its container may take; load: average before and after."""

    cpu: str
    cores: int | None = None
    cpus: int | None = None
    memory: int | None = None
    os: str = ""
    features: list[str] = field(default_factory=list)
    kernel: str | None = None
    governor: str | None = None
    quota: float | None = None
    load: list[float | None] = field(default_factory=list, metadata=UNLESS_EMPTY)


@dataclass(frozen=True)
class Text:
    """What perplexity and divergence were measured on. ctx, tokens in tokens."""

    name: str
    sha256: str = ""
    builtin: bool = False
    windows: int | None = None
    ctx: int | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Bench:
    """How speed was measured. first: tokens of the prompt before the first token; bandwidth in GB/s by threads."""

    prompt: list[int] = field(default_factory=list)
    generate: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    rounds: int | None = None
    first: int | None = None
    bandwidth: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Generation:
    """What the file writes and answers."""

    agreement: Agreement | None = None
    cloze: Cloze | None = None


@dataclass(frozen=True)
class Digits:
    """How often each value of the two planes' digits together; the share of zeros of each plane."""

    values: list[int]
    counts: list[int]
    zero_share: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Scales:
    """Histogram: len(counts) + 1 edges. empty: blocks whose scales are all 0; damaged: scales that are not a number."""

    edges: list[float]
    counts: list[int]
    min: float | None = None
    median: float | None = None
    max: float | None = None
    empty: int | None = None
    damaged: int | None = None


@dataclass(kw_only=True)
class Row:
    """A file that was compared. size, peak_memory, token_bytes in bytes; load_s, ttft_s in seconds; energy in J/token.

    ratios: by the other row's label, then by test and threads ("tg64 t2")
    """

    label: str
    kind: Literal["reference", "ours", "stock"]
    file: str = ""
    sha256: str = ""
    made: str = ""
    size: int
    bpw: float | None = None
    bpw_blocks: float | None = None
    types: dict[str, float] = field(default_factory=dict)
    quality: Quality | None = None
    generation: Generation | None = None
    speed: list[Speed] = field(default_factory=list)
    ratios: dict[str, dict[str, Ratio]] = field(default_factory=dict)
    load_s: float | None = None
    ttft_s: float | None = None
    peak_memory: int | None = None
    energy: float | None = None
    token_bytes: int | None = None
    tensors: list[TensorError] = field(default_factory=list)
    digits: Digits | None = None
    scales: Scales | None = None


@dataclass(kw_only=True)
class Document:
    """A comparison. finished: nothing that was asked for is missing."""

    schema: int
    model: Model
    created: str = ""
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    machine: Machine
    text: Text | None = None
    bench: Bench | None = None
    warnings: list[str] = field(default_factory=list)
    rows: list[Row]
    finished: bool = True

    def of_kind(self, kind: str) -> list[Row]:
        """Rows of a kind, in the document's order."""
        return [r for r in self.rows if r.kind == kind]


def as_json(document: Document) -> dict[str, object]:
    """A document as report.json has it: keys in the schema's order, null for numbers that are not finite."""
    return cast(dict[str, object], _plain(document))


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value):
        pairs = ((f, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {f.name: _plain(v) for f, v in pairs if v or "unless empty" not in f.metadata}
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_document(document: object) -> Document:
    """Check a document or a decoded report.json and give it types. Raises InputError that names the value at fault.

    Texts come back as one printable line each, whatever was in them.
    """
    if isinstance(document, Document):
        document = as_json(document)
    if not isinstance(document, Mapping):
        raise InputError("comparison: not a JSON object; give the document of a report.json")
    if document.get("schema") != SCHEMA:
        raise InputError(
            f"comparison: schema {_shown(document.get('schema'))}, this version reads {SCHEMA}; "
            "make the report again, or use the version that made it"
        )
    doc = _object(Document, document, "")
    if not doc.rows:
        raise InputError("comparison: no rows; there is nothing to report")
    if len(doc.rows) > MAX_ROWS:
        raise InputError(f"comparison: {len(doc.rows)} rows, the limit is {MAX_ROWS}; compare fewer files at once")
    seen: set[str] = set()
    for i, row in enumerate(doc.rows):
        at = f"rows[{i}]"
        if row.size <= 0:
            raise InputError(f"comparison: {at}.size is {row.size}; a file has at least one byte")
        if not row.label or row.label in seen:
            raise InputError(f"comparison: {at}.label {_shown(row.label)} is empty or used twice; name each row")
        seen.add(row.label)
        if (d := row.digits) and not len(d.values) == len(d.counts) <= MAX_BARS:
            raise InputError(
                f"comparison: {at}.digits has {len(d.counts)} counts for {len(d.values)} values; "
                f"give one each, at most {MAX_BARS}"
            )
        # no scale was counted: neither an edge
        if (s := row.scales) and (s.edges or s.counts) and not len(s.edges) == len(s.counts) + 1 <= MAX_BARS:
            raise InputError(
                f"comparison: {at}.scales has {len(s.edges)} edges for {len(s.counts)} counts; "
                f"give one more than counts, at most {MAX_BARS}"
            )
    return doc


def _shown(value: object) -> str:
    """A value for an error message, short."""
    text = repr(value) if isinstance(value, (str, bool, type(None))) else type(value).__name__
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 10**18:
        text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _fault(where: str, value: object, wanted: str) -> InputError:
    return InputError(f"comparison: {where} is {_shown(value)}, not {wanted}")


def _value(hint: object, value: object, where: str) -> object:
    """`value` as the hint asks for it."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return None if value is None else _value(args[0], value, where)  # T | None is the only union here
    if origin is Literal:
        if value not in args:
            raise _fault(where, value, f"one of {', '.join(map(str, args))}")
        return value
    if origin is list:
        if not isinstance(value, list) or len(value) > MAX_ITEMS:
            raise _fault(where, value, f"a list of at most {MAX_ITEMS} values")
        return [_value(args[0], v, f"{where}[{i}]") for i, v in enumerate(value)]
    if origin is dict:
        items = _mapping(value, where).items()
        return {_line(k, where): _value(args[1], v, f"{where}.{k}") for k, v in items}
    if hint is str:
        return _line(value, where)
    if hint is bool:
        if not isinstance(value, bool):
            raise _fault(where, value, "true or false")
        return value
    if hint in (int, float):
        return _number(hint, value, where)
    return _object(cast(type, hint), value, where)


def _line(value: object, where: str) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise _fault(where, value, f"a text of at most {MAX_TEXT} characters")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(value.split()))


def _number(hint: object, value: object, where: str) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int if hint is int else (int, float)):
        raise _fault(where, value, "a whole number" if hint is int else "a number")
    if not (isinstance(value, int) or math.isfinite(value)) or abs(value) > MAX_NUMBER:
        raise _fault(where, value, f"a finite number up to {MAX_NUMBER:g}; write null for what was not measured")
    return value


def _mapping(value: object, where: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping) or len(value) > MAX_ITEMS or not all(isinstance(k, str) for k in value):
        raise _fault(where, value, "an object")
    return value


def _object(cls: type[T], value: object, where: str) -> T:
    found = _mapping(value, where or "it")
    got: dict[str, object] = {}
    for name, hint, required in _fields(cast(type, cls)):
        at = f"{where}.{name}" if where else name
        if required and name not in found:
            raise InputError(f"comparison: {at} is missing")
        if required or found.get(name) is not None:
            got[name] = _value(hint, found[name], at)
    return cls(**got)


@functools.cache
def _fields(cls: type) -> list[tuple[str, object, bool]]:
    """Of a dataclass: name, type, whether it must be there."""
    hints, missing = get_type_hints(cls), dataclasses.MISSING
    return [
        (f.name, hints[f.name], f.default is missing and f.default_factory is missing) for f in dataclasses.fields(cls)
    ]
