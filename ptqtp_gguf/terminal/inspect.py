"""The terminal's pages of `inspect` and `diff`. All text out of files is cut, escaped and free of markup."""

from __future__ import annotations

import math
from enum import Enum
from statistics import fmean

from rich.table import Table

from ..codec import T1_OF_DIGIT, T2_OF_DIGIT, TP2_2
from ..errors import printable
from ..files import TensorInfo
from ..inspect import (
    DIGIT_VALUES,
    FEW,
    SHOWN,
    TEMPLATE,
    TRIT_VALUES,
    Difference,
    PlaneStatistics,
    Report,
    Statistics,
    TensorDifference,
)
from ..plan import role_of
from .console import cell, line, out_console, right, whole

BAR = 40  # characters of the longest bar
MOST_BINS = 40  # above that, a bin an octave
MOST_NAMES = 20
MOST_KEYS = 100  # a damaged file may have millions
VALUE = 200  # characters of a metadata value


def cut(text: str, limit: int = VALUE) -> str:
    """One printable line of at most `limit` characters, and how many there are."""
    one = printable(" ".join(text[: 2 * limit].split()))
    if len(text) <= limit and len(one) <= 4 * limit:
        return one
    return f"{one[:limit]} ... ({len(text)} characters)"


def told(value: object, limit: int = VALUE) -> str:
    """A metadata value in one line."""
    if isinstance(value, list):
        if len(value) > FEW:
            return f"{len(value)} values"
        return cut("[" + ", ".join(told(v, limit) for v in value) + "]", limit)
    return cut(value if isinstance(value, str) else str(value), limit)


def lines_of(text: str) -> str:
    """A text whole, for the terminal: its lines and tabs as they are, all else printable."""
    return "\n".join("\t".join(printable(part) for part in one.split("\t")) for one in text.split("\n"))


def shape_of(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def bar(share: float, width: int = BAR) -> str:
    """A bar of share * width characters, in eighths where the terminal has them."""
    if out_console.options.ascii_only:
        return "#" * round(share * width)
    full, eighths = divmod(round(share * width * 8), 8)
    return "\u2588" * full + " \u258f\u258e\u258d\u258c\u258b\u258a\u2589"[eighths].strip()


# ---- inspect ----


class Sort(str, Enum):
    """Orders of the tensors' table; largest first but for names and types."""

    FILE = "file"
    NAME = "name"
    TYPE = "type"
    SIZE = "size"
    BPW = "bpw"
    ZEROS = "zeros"
    SCALE = "scale"


def print_report(report: Report, every_key: bool = False) -> None:
    """What a file holds. every_key: all metadata, not only what says what it is and how it was made."""
    line(
        f"{report.path}: {report.size / 1e6:.1f} MB, {report.weights / 1e6:.1f} M weights, "
        f"{report.bpw:.3f} bits per weight (embedding, head and metadata counted)"
    )
    ours = "" if report.format_version is None else f", tensor format {report.format_version}"
    line(f"  GGUF version {report.gguf_version}{ours}, {len(report.tensors)} tensors, alignment {report.alignment}")
    if len(report.files) > 1:
        sizes = [f"{name} {size / 1e6:.1f} MB" for name, size in report.files.items()]
        more = "" if len(sizes) <= MOST_NAMES else ", ..."
        line(f"  in {len(sizes)} files: {', '.join(sizes[:MOST_NAMES])}{more}")
    table = Table("role", "type", *(right(h) for h in ("tensors", "M weights", "MB", "bpw")))
    for p in report.parts:
        table.add_row(
            p.role.value, p.type, str(p.tensors), f"{p.weights / 1e6:.2f}", f"{p.nbytes / 1e6:.2f}", f"{p.bpw:.3f}"
        )
    out_console.print(table)
    _print_tokenizer(report)
    chosen = [key for key in report.metadata if every_key or key.startswith(("ptqtp.", "general."))]
    for key in chosen if every_key else chosen[:MOST_KEYS]:
        line(f"  {cut(key)} = {told(report.metadata[key])}")
    if not every_key:
        line(f"  {len(report.metadata)} metadata keys in all; --kvs lists them")


def _print_tokenizer(report: Report) -> None:
    tok = report.tokenizer
    if tok.model is None and not tok.tokens:
        line("  no tokenizer")
    else:
        pre = "" if tok.pre is None else f" ({cut(tok.pre, SHOWN)})"
        line(f"  tokenizer {cut(tok.model or 'unnamed', SHOWN)}{pre}: {tok.tokens} tokens, {tok.merges} merges")
    for name, (i, text) in list(tok.special.items())[:MOST_NAMES]:
        line(f"    {cut(name, SHOWN)} = {i} {'which is not a token' if text is None else cut(text, SHOWN)}")
    others = [key.removeprefix(TEMPLATE + ".") for key in report.metadata if key.startswith(TEMPLATE + ".")]
    named = f"; also named {cut(', '.join(others))}" if others else ""
    if report.template is None:
        line(f"  no chat template{named}")
    else:
        first = report.template.lstrip().split("\n", 1)[0]
        line(f"  chat template of {len(report.template)} characters{named}: {cut(first, 100)}")


def print_text(value: object) -> None:
    """A value of the metadata, whole: a text as it stands, a list an entry a line."""
    for one in value if isinstance(value, list) else [value]:
        print(lines_of(str(one)))


def print_tensors(report: Report, planes: Statistics, order: Sort = Sort.FILE) -> None:
    """A line a tensor; of trit planes, the share of zeros and the scales too."""

    def key(t: TensorInfo) -> tuple[object, ...]:
        s = planes.tensors.get(t.name)
        by: dict[Sort, object] = {
            Sort.NAME: t.name,
            Sort.TYPE: t.type_name,
            Sort.SIZE: -t.nbytes,
            Sort.BPW: -t.nbytes / t.n_weights,
            Sort.ZEROS: -(fmean(s.zero_share) if s else -math.inf),
            Sort.SCALE: -(s.median if s and s.scales else -math.inf),
        }
        return (by[order],)

    n = max((len(s.zero_share) for s in planes.tensors.values()), default=0)
    more = ("0 in plane 1", *(f"in plane {i}" for i in range(2, n + 1)), "scale min", "median", "max") if n else ()
    table = Table(whole("tensor"), "shape", "type", *map(right, ("bpw", "MB")), "role", *map(right, more))
    for t in report.tensors if order is Sort.FILE else sorted(report.tensors, key=key):
        s = planes.tensors.get(t.name)
        table.add_row(
            cell(t.name),
            shape_of(t.shape),
            t.type_name,
            f"{8 * t.nbytes / t.n_weights:.3f}",
            f"{t.nbytes / 1e6:.3f}",
            role_of(t.name).value,
            *(_of_planes(s, n) if n else ()),
        )
    out_console.print(table)


def _of_planes(s: PlaneStatistics | None, planes: int) -> list[str]:
    if s is None:
        return [""] * (planes + 3)
    scales = [f"{x:.3g}" for x in (s.smallest, s.median, s.largest)] if s.scales else ["none"] * 3
    zeros = [f"{100 * z:.1f} %" for z in s.zero_share]
    return [*zeros, *[""] * (planes - len(zeros)), *scales]


def print_histograms(planes: Statistics) -> None:
    """Digits, third trits and scales as bars: of the whole file, and by role where there are several."""
    if planes.total is None:
        line("  no trit planes in it: no digits and no scales to count")
        return
    parts = {"all trit planes": planes.total}
    if len(planes.roles) > 1:
        parts |= {role.value: s for role, s in planes.roles.items()}
    for name, s in parts.items():
        zeros = ", in ".join(f"plane {i} {100 * z:.1f} %" for i, z in enumerate(s.zero_share, 1))
        line(f"{name}: {s.weights / 1e6:.2f} M weights; zeros in {zeros}")
        _print_digits(s)
        _print_third(s)
        _print_scales(s)


def _print_digits(s: PlaneStatistics) -> None:
    table = Table(*map(right, ("digit", "t1", "t2", "share")), "", box=None)
    most = max(1, *s.digits)
    for d, n in enumerate(s.digits):
        table.add_row(
            str(DIGIT_VALUES[d]),
            str(T1_OF_DIGIT[d]),
            str(T2_OF_DIGIT[d]),
            f"{100 * n / max(1, s.weights):.2f} %",
            bar(n / most),
        )
    out_console.print(table)


def _print_third(s: PlaneStatistics) -> None:
    if not s.third:
        return
    total = sum(s.third)
    table = Table(*map(right, ("t3", "share")), "", box=None)
    for trit, n in zip(TRIT_VALUES, s.third, strict=True):
        table.add_row(str(trit), f"{100 * n / total:.2f} %", bar(n / max(s.third)))
    out_console.print(table)
    only = "" if total == s.weights else f"; the {total / 1e6:.2f} M weights of {TP2_2.name} have one"
    line(f"  t3 is not stored: it follows from the t2 of the two weights before{only}")


def _print_scales(s: PlaneStatistics) -> None:
    if s.scales:
        counts, edges = list(s.scales), list(s.edges[:-1])
        if len(counts) > MOST_BINS:
            octaves: dict[int, int] = {}
            for edge, n in zip(edges, counts, strict=True):
                octave = math.frexp(edge)[1] - 1
                octaves[octave] = octaves.get(octave, 0) + n
            counts, edges = list(octaves.values()), [2.0**e for e in octaves]
        table = Table(*map(right, ("scale from", "share")), "", box=None)
        for edge, n in zip(edges, counts, strict=True):
            table.add_row(f"{edge:.4g}", f"{100 * n / sum(counts):.2f} %", bar(n / max(counts)))
        out_console.print(table)
        line(f"  scales: smallest {s.smallest:.4g}, median {s.median:.4g}, largest {s.largest:.4g}")
    if s.empty:
        line(f"  {s.empty} scales of groups that are all zero, not counted")
    if s.damaged:
        line(f"  {s.damaged} scales are Inf or NaN; see verify")


# ---- diff ----


def print_difference(d: Difference, tensors: bool) -> None:
    """A line for each fact, a table by role; tensors: a line for each tensor too, the worst first."""
    for name, path, size, arch in zip("AB", (d.a, d.b), d.sizes, d.architectures, strict=True):
        line(f"{name}  {path}: {size / 1e6:.1f} MB, {'no architecture' if arch is None else told(arch, SHOWN)}")
    if d.same_file:
        line("note: both are the same file")
    if d.architectures[0] != d.architectures[1]:
        line("note: the architectures differ; these are different kinds of models")
    _print_keys(d)
    _print_names(d)
    if d.tensors:
        _print_roles(d)
    if tensors and d.tensors:
        _print_each(d.tensors)
    if not d.differs:
        line("no difference: the same metadata, the same tensors, byte for byte")


def _print_keys(d: Difference) -> None:
    line(
        f"metadata: {d.keys_equal} keys equal, {len(d.keys_changed)} different, {len(d.keys_only_a)} only in A, "
        f"{len(d.keys_only_b)} only in B"
    )
    if not (d.keys_changed or d.keys_only_a or d.keys_only_b):
        return
    rows = [(k.key, told(k.a, SHOWN), told(k.b, SHOWN), k.text) for k in d.keys_changed[:MOST_KEYS]]
    rows += [(k, told(v, SHOWN), "-", "only in A") for k, v in list(d.keys_only_a.items())[:MOST_KEYS]]
    rows += [(k, "-", told(v, SHOWN), "only in B") for k, v in list(d.keys_only_b.items())[:MOST_KEYS]]
    table = Table(whole("key"), "A", "B", whole("where"))
    for key, a, b, where in rows:
        table.add_row(cell(cut(key)), cell(a), cell(b), cell(where))
    out_console.print(table)
    if (more := len(d.keys_changed) + len(d.keys_only_a) + len(d.keys_only_b) - len(rows)) > 0:
        line(f"  ... and {more} more; --json has all")


def _print_names(d: Difference) -> None:
    line(
        f"tensors: {len(d.tensors) + len(d.shapes)} in both, {d.identical} identical byte for byte, {d.equal} with "
        f"equal weights in other bytes, {len(d.only_a)} only in A, {len(d.only_b)} only in B"
    )
    if not d.tensors and not d.shapes:
        line("note: no tensor has the same name in both")
    shown = [f"only in A: {t.name} ({shape_of(t.shape)}, {t.type_name})" for t in d.only_a[:MOST_NAMES]]
    shown += [f"only in B: {t.name} ({shape_of(t.shape)}, {t.type_name})" for t in d.only_b[:MOST_NAMES]]
    shown += [f"{name} has the shape {shape_of(a)} in A, {shape_of(b)} in B" for name, a, b in d.shapes[:MOST_NAMES]]
    for text in shown:
        line(f"  {text}")
    if (more := len(d.only_a) + len(d.only_b) + len(d.shapes) - len(shown)) > 0:
        line(f"  ... and {more} more; --json has all")


def _print_roles(d: Difference) -> None:
    heads = ("tensors", "identical", "M weights", "relative squared error", "largest difference")
    table = Table("role", "A", "B", *map(right, heads))
    for r in d.roles:
        table.add_row(
            r.role.value,
            r.type_a,
            r.type_b,
            str(r.tensors),
            str(r.identical),
            f"{r.weights / 1e6:.2f}",
            _number(r.rel_mse, ".6f"),
            _number(r.max_abs, ".4g"),
        )
    out_console.print(table)
    worst = sorted(((t.rel_mse, t.name) for t in d.tensors if t.rel_mse), reverse=True)[:3]
    if worst:
        line("worst: " + ", ".join(f"{name} {e:.6f}" for e, name in worst))


def _print_each(tensors: list[TensorDifference]) -> None:
    heads = ("relative squared error", "largest difference")
    table = Table(whole("tensor"), "shape", "A", "B", *map(right, heads))
    for t in sorted(tensors, key=lambda t: -math.inf if t.rel_mse is None else -t.rel_mse):
        error = "identical" if t.identical else _number(t.rel_mse, ".6f")
        table.add_row(cell(t.name), shape_of(t.shape), t.type_a, t.type_b, error, _number(t.max_abs, ".4g"))
    out_console.print(table)


def _number(x: float | None, form: str) -> str:
    return "-" if x is None else format(x, form)
