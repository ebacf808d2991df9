"""What a comparison's numbers say: sentences with their uncertainty, and the cells of its main table.

Intervals of quality are of 95 %, those of speed as the document has them. Two values whose intervals do not tell them
apart are called no clear difference.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from ..measure import Ratio, Speed
from .document import Document, Row

Z95 = 1.96
SAME_SIZE = 0.005  # a smaller difference of sizes is called none

Outcome = Literal["better", "worse", "same", "unknown"]


# ---- numbers as text ----


def significant(x: float, digits: int = 3) -> str:
    """A number for people: `digits` significant ones, no exponent unless it is far from one."""
    if x == 0:
        return "0"
    if not 1e-4 <= abs(x) < 1e6:
        return f"{x:.{digits - 1}e}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(x))))
    return f"{x:.{decimals}f}"


def with_error(x: float, half: float | None) -> tuple[str, str]:
    """A value and what to write after the +/-, cut where the error begins."""
    if half is None or half <= 0 or not 1e-6 <= half < 1e6 or abs(x) >= 1e6:
        return significant(x, 4), significant(half, 2) if half is not None and half > 0 else ""
    decimals = max(0, 1 - math.floor(math.log10(half)))
    return f"{x:.{decimals}f}", f"{half:.{decimals}f}"


def times(x: float) -> str:
    """A ratio; with more digits close to one, where they decide."""
    return significant(x) if x >= 10 or x < 0.1 else f"{x:.3f}" if 0.99 < x < 1.01 and x != 1 else f"{x:.2f}"


def percent(share: float, digits: int = 2) -> str:
    return f"{significant(100 * share, digits) if abs(share) < 0.995 else f'{100 * share:.0f}'} %"


def count(n: int) -> str:
    """134515008 -> "134.5 million"."""
    for unit, word in ((10**9, "billion"), (10**6, "million")):
        if n >= unit:
            return f"{n / unit:.1f} {word}"
    return f"{n:,}"


def plural(n: int, one: str) -> str:
    return f"{n} {one}{'' if n == 1 else 's'}"


# ---- choices that hold for the whole document ----


def headline(doc: Document) -> tuple[Row, Row] | None:
    """Whom the verdict is about: the first row of ours and the first stock row (as the user named them)."""
    ours, stock = doc.of_kind("ours"), doc.of_kind("stock")
    return (ours[0], stock[0]) if ours and stock else None


def main_test(doc: Document, decode: bool) -> tuple[str, int] | None:
    """(test, threads) that stands for decoding or prefill: what most rows have; then most threads, longest test."""
    found: Counter[tuple[str, int]] = Counter()
    length: dict[str, int] = {}
    for row in doc.rows:
        for s in row.speed:
            if (s.n_gen > 0) == decode and (s.n_prompt > 0) != decode:
                found[s.test, s.threads] += 1
                length[s.test] = s.n_gen + s.n_prompt
    return max(found, key=lambda k: (found[k], k[1], length[k[0]], k[0])) if found else None


def speed_of(row: Row, test: tuple[str, int] | None) -> Speed | None:
    return next((s for s in row.speed if (s.test, s.threads) == test), None)


def reference_perplexity(doc: Document) -> float | None:
    """The reference's perplexity: its own, or what the other rows noted."""
    for row in sorted(doc.rows, key=lambda r: r.kind != "reference"):
        if row.quality:
            own = row.quality.ppl if row.kind == "reference" else None
            if (found := own or row.quality.ppl_reference) is not None:
                return found
    return None


def ordered(doc: Document) -> list[Row]:
    """What was compared, the smallest file first; the reference is not among it."""
    return sorted((r for r in doc.rows if r.kind != "reference"), key=lambda r: (r.size, r.label))


# ---- one row against another ----


@dataclass(frozen=True)
class Finding:
    """topic: what was compared; value: the number, large; words: within a sentence; interval: text or ""."""

    topic: str
    value: str
    words: str
    interval: str
    outcome: Outcome

    @property
    def judged(self) -> str:
        return {"same": "no clear difference", "unknown": "without an interval"}.get(self.outcome, self.outcome)


@dataclass(frozen=True)
class Verdict:
    """A row of ours against another one."""

    ours: Row
    against: Row
    findings: list[Finding]

    @property
    def sentence(self) -> str:
        return f"{self.ours.label} {_joined([f.words for f in self.findings])}."


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _interval(low: float, high: float) -> str:
    a, b = times(low), times(high)
    return f"{a} to {b}" if a != b else ""


def size_finding(ours: Row, against: Row) -> Finding:
    ratio = ours.size / against.size
    if abs(ratio - 1) < SAME_SIZE:
        return Finding("file size", "1.00x", f"is as large as {against.label}", "", "same")
    if ratio < 1:
        words = f"is {percent(1 - ratio)} smaller than {against.label}"
        return Finding("file size", f"-{percent(1 - ratio)}", words, "", "better")
    more = percent(ratio - 1) if ratio < 2 else ""
    words = f"is {more} larger than {against.label}" if more else f"is {ratio:.1f}x as large as {against.label}"
    return Finding("file size", f"+{more}" if more else f"{ratio:.1f}x", words, "", "worse")


def _outcome(low: float, high: float, clear: bool, more_is_better: bool) -> Outcome:
    if not clear or low <= 1 <= high:
        return "same"
    return "better" if (low > 1) == more_is_better else "worse"


def speed_finding(topic: str, verb: str, ratio: Ratio, threads: int) -> Finding:
    outcome = _outcome(ratio.low, ratio.high, ratio.clear, True)
    interval, value = _interval(ratio.low, ratio.high), f"{times(ratio.median)}x"
    said = ", ".join(x for x in (interval, plural(threads, "thread")) if x)
    if outcome == "same":
        words = f"shows no clear difference in {topic} speed ({value}, {said})"
    else:
        words = f"{verb} {value} as fast ({said})"
    return Finding(f"{topic} speed", value, words, interval, outcome)


def ratio_interval(a: float, a_se: float, b: float, b_se: float) -> tuple[float, float, float]:
    """a / b with its interval, by the delta method on logarithms. a, b > 0.

    The errors are taken as independent. Measured on one text they move together, so the interval is rather too wide.
    """
    ratio, spread = a / b, Z95 * math.hypot(a_se / a, b_se / b)
    return ratio, ratio * math.exp(-min(spread, 50)), ratio * math.exp(min(spread, 50))


def kld_finding(ours: Row, against: Row) -> Finding | None:
    """Distance from the original's predictions; None where one of the two was not measured."""
    a, b = ours.quality, against.quality
    if not a or not b or not a.kld or not b.kld or a.kld <= 0 or b.kld <= 0:
        return None
    if a.kld_se is None or b.kld_se is None:
        value = f"{times(a.kld / b.kld)}x"
        return Finding(
            "KL divergence", value, f"has {value} {against.label}'s KL divergence (without an interval)", "", "unknown"
        )
    ratio, low, high = ratio_interval(a.kld, a.kld_se, b.kld, b.kld_se)
    outcome, interval = _outcome(low, high, True, False), _interval(low, high)
    value = f"{times(ratio)}x"
    said = f" ({interval})" if interval else ""
    if outcome == "same":
        words = f"shows no clear difference in KL divergence from the original ({value}{', ' * bool(said)}{interval})"
    else:
        words = f"has {value} {against.label}'s KL divergence from the original{said}"
    return Finding("KL divergence", value, words, interval, outcome)


def compare(doc: Document, ours: Row, against: Row) -> Verdict:
    """All that the numbers say of two rows."""
    findings = [size_finding(ours, against)]
    ratios = ours.ratios.get(against.label, {})
    for topic, verb, decode in (("decoding", "decodes", True), ("prefill", "reads prompts", False)):
        test = main_test(doc, decode)
        if test and (ratio := ratios.get(f"{test[0]} t{test[1]}")):
            findings.append(speed_finding(topic, verb, ratio, test[1]))
    if kld := kld_finding(ours, against):
        findings.append(kld)
    return Verdict(ours, against, findings)


def verdicts(doc: Document) -> list[Verdict]:
    """Each row of ours against each stock row; the headline is the first."""
    return [compare(doc, ours, stock) for ours in doc.of_kind("ours") for stock in doc.of_kind("stock")]


def perplexity_sentence(doc: Document) -> str:
    """How far perplexity rises over the original, each row with its interval; "" where nothing was measured."""
    parts = []
    for row in ordered(doc):
        q = row.quality
        if q and q.ppl_ratio is not None:
            value, half = with_error(100 * (q.ppl_ratio - 1), Z95 * 100 * q.ppl_ratio_se if q.ppl_ratio_se else None)
            sign = "" if value.startswith("-") else "+"
            parts.append(f"{row.label} {sign}{value}{' ± ' * bool(half)}{half} %")
    return f"Perplexity over the original: {', '.join(parts)}." if parts else ""


def frontier_sentence(doc: Document, ours: Row) -> str:
    """Whether another row is both smaller and nearer to the original; "" where nothing was measured."""
    others = [r for r in doc.rows if r.kind == "stock" and kld_finding(ours, r)]
    better = []
    for row in others:
        nearer = kld_finding(row, ours)
        if row.size <= ours.size and nearer and nearer.outcome == "better":
            better.append(row.label)
    if better:
        be = "is" if len(better) == 1 else "are"
        return f"{_joined(better)} {be} no larger than {ours.label} and nearer to the original."
    return f"No stock type here is both smaller than {ours.label} and nearer to the original." if others else ""


def best_no_larger(doc: Document, ours: Row) -> Row | None:
    """The stock row nearest to the original among those that are no larger than a row; None where there is none."""
    smaller = [r for r in doc.of_kind("stock") if r.size <= ours.size and divergence(r)]
    return min(smaller, key=lambda r: divergence(r) or math.inf, default=None)


def divergence(row: Row) -> float | None:
    """The row's KL divergence; None where it was not measured, or is 0."""
    return row.quality.kld if row.quality and row.quality.kld and row.quality.kld > 0 else None


def stock_frontier(doc: Document) -> list[tuple[float, float]]:
    """(size, divergence) of the stock rows that no smaller one beats, by size."""
    best: list[tuple[float, float]] = []
    for size, kld in sorted((r.size, kld) for r in doc.of_kind("stock") if (kld := divergence(r))):
        if not best or kld < best[-1][1]:
            best.append((float(size), kld))
    return best


def size_for(kld: float, frontier: Sequence[tuple[float, float]]) -> float | None:
    """The size at which a frontier reaches a divergence, straight between its points in log divergence; or None."""
    for (x0, y0), (x1, y1) in pairwise(frontier):
        if y1 <= kld <= y0:
            return x0 + (x1 - x0) * math.log(y0 / kld) / math.log(y0 / y1)
    return None


# ---- the main table ----


@dataclass(frozen=True)
class Cell:
    """text: the value, or "" where there is none; half: what stands behind the +/-; best: of its column."""

    text: str = ""
    half: str = ""
    best: bool = False


@dataclass(frozen=True)
class Value:
    """A number with the interval that it may as well be."""

    text: str
    half: str
    low: float
    high: float


@dataclass(frozen=True)
class Column:
    """better: which end of the column is the good one. detail: of the header, small."""

    name: str
    detail: str
    better: Literal["low", "high"]
    value: Callable[[Row], Value | None]


def _estimated(x: float | None, se: float | None) -> Value | None:
    if x is None:
        return None
    half = Z95 * se if se else 0.0
    text, after = with_error(x, half or None)
    return Value(text, after, x - half, x + half)


def _plain(x: float | None, text: Callable[[float], str]) -> Value | None:
    return Value(text(x), "", x, x) if x is not None else None


def _speed(row: Row, test: tuple[str, int] | None) -> Value | None:
    if not (s := speed_of(row, test)):
        return None
    low, high = (s.median if x is None else x for x in (s.low, s.high))
    return Value(significant(s.median), "", low, high)


def columns(doc: Document) -> list[Column]:
    """The main table's columns, whether measured or not."""
    unit, word = size_unit(doc)
    decode, prefill = main_test(doc, True), main_test(doc, False)

    def size(x: float | None) -> Value | None:
        return _plain(x, lambda v: f"{v / unit:.{2 if unit > 1e6 else 1}f}")

    def threads(test: tuple[str, int] | None) -> str:
        return f"tokens/s\n{test[0]}, {plural(test[1], 'thread')}" if test else "tokens/s"

    return [
        Column("size", word, "low", lambda r: size(r.size)),
        Column("bpw", "bits a weight", "low", lambda r: _plain(r.bpw, lambda v: f"{v:.2f}")),
        Column("perplexity", "lower is better", "low", lambda r: _perplexity(doc, r)),
        Column(
            "KLD", "nats a token", "low", lambda r: _estimated(r.quality.kld, r.quality.kld_se) if r.quality else None
        ),
        Column(
            "same top",
            "% of tokens",
            "high",
            lambda r: _estimated(r.quality.same_top, r.quality.same_top_se) if r.quality else None,
        ),
        Column("decode", threads(decode), "high", lambda r: _speed(r, decode)),
        Column("prefill", threads(prefill), "high", lambda r: _speed(r, prefill)),
        Column("load", "seconds", "low", lambda r: _plain(r.load_s, lambda v: significant(v, 2))),
        Column("memory", f"peak {word}", "low", lambda r: size(r.peak_memory)),
    ]


def _perplexity(doc: Document, row: Row) -> Value | None:
    if row.kind == "reference" and not (row.quality and row.quality.ppl):
        return _estimated(reference_perplexity(doc), None)
    q = row.quality
    if not q or not (value := _estimated(q.ppl, q.ppl_se)) or q.ppl is None:
        return None
    if q.ppl_ratio_se and q.ppl_reference:  # on one text: the text's own spread is in all rows alike
        half = Z95 * q.ppl_ratio_se * q.ppl_reference
        return Value(value.text, value.half, q.ppl - half, q.ppl + half)
    return value


def size_unit(doc: Document) -> tuple[float, str]:
    """The unit of all sizes: (bytes, name)."""
    return (1e9, "GB") if min(r.size for r in doc.rows) >= 2e9 else (1e6, "MB")


@dataclass(frozen=True)
class Table:
    """Columns that hold a value, rows with one cell a column, names of columns that hold none."""

    columns: list[Column]
    rows: list[tuple[Row, list[Cell]]]
    absent: list[str]


def main_table(doc: Document) -> Table:
    """The reference first, then by size. Best: the best of what was compared, and what is not clearly behind it."""
    rows = [*doc.of_kind("reference"), *ordered(doc)]
    shown, absent, cells = [], [], []
    for column in columns(doc):
        values = [column.value(r) for r in rows]
        rivals = [v for r, v in zip(rows, values, strict=True) if v and r.kind != "reference"]
        if not any(values):
            absent.append(column.name)
            continue
        shown.append(column)
        cells.append(
            [
                Cell(
                    v.text, v.half, r.kind != "reference" and len(rivals) > 1 and _among_best(v, rivals, column.better)
                )
                if v
                else Cell()
                for r, v in zip(rows, values, strict=True)
            ]
        )
    return Table(shown, [(r, [c[i] for c in cells]) for i, r in enumerate(rows)], absent)


def _among_best(value: Value, rivals: list[Value], better: str) -> bool:
    if better == "low":
        return value.low <= min(rivals, key=lambda v: v.low + v.high).high
    return value.high >= max(rivals, key=lambda v: v.low + v.high).low


# ---- generation ----


def generation_sentences(row: Row) -> list[str]:
    """What the row wrote, in words."""
    said = []
    g = row.generation
    if g and (a := g.agreement):
        mean = significant(a.mean, 2) if a.mean < 10 else f"{a.mean:.0f}"
        always = f"; {a.full} of {plural(a.prompts, 'prompt')} to the end" if a.full else ""
        said.append(f"writes the same as the original for the first {mean} of {a.limit} tokens on average{always}")
    if g and (c := g.cloze):
        theirs = f" (the original {c.reference_right})" if c.reference_right is not None else ""
        same = f", and the original's choice {c.same_answer} times" if c.same_answer is not None else ""
        said.append(f"picks the right ending in {c.right} of {plural(c.of, 'question')}{theirs}{same}")
    return said
