"""The tables and figures of accuracy.py: what is kept, by model and text, through the findings and plots of `compare`.

A page is written once as a skeleton; later only what stands between its markers is replaced, so words stay.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptqtp_gguf.compare import findings
from ptqtp_gguf.compare.document import Document, Row, read_document
from ptqtp_gguf.compare.plots import draw, kld_over_size
from ptqtp_gguf.errors import InputError
from ptqtp_gguf.files import write_text
from ptqtp_gguf.measure import Quality

Entry = dict[str, Any]  # a row, measured or failed, as results.json has it: see Measuring.about and add in accuracy.py
NEAR = (0.6, 1.6)  # of the sizes of ours: what the figure shows
HOW = "<!-- accuracy:how -->\n<!-- /accuracy:how -->"
RESULTS = "<!-- accuracy:results -->\n<!-- /accuracy:results -->"
SKELETON = f"""# Accuracy per bit

Each file against the predictions of the 16-bit original that it was made from. Files of stock types were made by
`llama-quantize` from that same file, with and without an importance matrix; IQ3_XXS only with one, as it is published.
Texts for calibration and texts for scoring are different works, not parts of the same work.

How to read it. KLD: mean Kullback-Leibler divergence of the next token's distribution from the original's, in nats;
0 = the same. ±: half of a 95 % interval. bpw: bits per weight of the whole file, embedding, head and metadata counted.
Bold cells: the best of their column, and what is not clearly behind it. A dagger means that some block matrices fell
back to a larger type, because their rows are not a multiple of 256.

{HOW}

{RESULTS}
"""


def number(x: float | None, digits: int = 3) -> str:
    return "-" if x is None else findings.significant(x, digits)


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)) if lines else ""


def latest(entries: Sequence[Entry], model: str, text: str) -> dict[str, Entry]:
    """By label: entries with the settings of the last one, since others do not belong beside it."""
    found = [e for e in entries if (e["model"], e["text"]) == (model, text)]
    return {e["label"]: e for e in found if e["settings"] == found[-1]["settings"]}


def document_of(entries: dict[str, Entry]) -> Document | None:
    """What is measured, as one document. Raises InputError for values that are not of its schema."""
    documents = [e["document"] for e in entries.values() if "error" not in e]
    if not documents:
        return None
    return read_document({**documents[-1], "rows": [row for d in documents for row in d["rows"]]})


def main_table(doc: Document, entries: dict[str, Entry]) -> str:
    """The reference, then all files by size, with what each holds."""
    found, lines = findings.main_table(doc), []
    names = {"size": findings.size_unit(doc)[1], "perplexity": "PPL", "same top": "same top %"}
    head = ["", *(names.get(c.name, c.name) for c in found.columns), "/ reference", "median", "99.9 %", "RMS Δp %"]
    for row, cells in found.rows:
        about, q = entries[row.label], row.quality or Quality()
        figures = [number(q.ppl_ratio, 4), number(q.kld_median), number(q.kld_999), number(q.rms_dp)]
        shares = [f"{kind} {100 * share:.0f} %" for kind, share in row.types.items() if share >= 0.005]
        shares += [f"{100 * about['fell_back']:.0f} % fell back"] if about["fell_back"] else []
        name = f"{row.label}†" if about["fell_back"] else f"**{row.label}**" if row.kind == "ours" else row.label
        holds = [f"{number(row.bpw_blocks)} bpw: {', '.join(shares)}", about["embedding"], about["head"]]
        lines.append([name, *map(shown, cells), *figures, *holds])
    return table([*head, "block matrices, share of weights", "embedding", "head"], lines)


def shown(cell: findings.Cell) -> str:
    text = f"{cell.text} ± {cell.half}" if cell.half else cell.text
    return f"**{text}**" if cell.best else text


def ours_table(doc: Document) -> str:
    """At what size stock types reach the divergence of ours, and the best of those that are no larger."""
    frontier, (unit, word), lines = findings.stock_frontier(doc), findings.size_unit(doc), []
    for row in doc.of_kind("ours") if frontier else []:
        kld, best = findings.divergence(row), findings.best_no_larger(doc, row)
        need = findings.size_for(kld, frontier) if kld else None
        found = findings.kld_finding(row, best) if best else None
        reach = f"{need / unit:.1f} {word}, ours {100 * (row.size / need - 1):+.1f} %" if need else "at none here"
        ratio = f"{found.value}{f' ({found.interval})' if found.interval else ''}" if found else ""
        lines.append([row.label, f"{row.size / unit:.1f}", number(kld), reach, best.label if best else "none", ratio])
    head = ["ours", word, "KLD", "stock types reach it at", "best stock type no larger", "KLD of ours / its"]
    return table(head, lines)


def figure(doc: Document, path: Path) -> str:
    """Write KLD over size as SVG; returns its caption, or "" where there is nothing to draw.

    Only rows not far from ours in size are drawn. Raises InputError without matplotlib.
    """
    sizes = [r.size for r in doc.of_kind("ours")] or [r.size for r in doc.rows]
    low, high = NEAR[0] * min(sizes), NEAR[1] * max(sizes)
    off: list[Row] = [r for r in findings.ordered(doc) if not low <= r.size <= high and findings.divergence(r)]
    rest = read_document(doc)
    rest.rows = [r for r in rest.rows if r.label not in {o.label for o in off}]
    try:
        plots = draw(rest, [kld_over_size])
    except ImportError:
        raise InputError("figures need matplotlib; pip install matplotlib") from None
    for plot in plots:
        path.write_bytes(plot.svg)
    far = "; ".join(f"{r.label} {number(r.bpw)} bpw, KLD {number(findings.divergence(r))}" for r in off)
    return plots[0].caption + (f" Off the figure: {far}." if far else "") if plots else ""


def section(entries: Sequence[Entry], model: str, draw_to: Path | None = None) -> str:
    """Markdown of a model, text after text. draw_to: file of the figure, which is of the first text."""
    parts = [f"## {model}"]
    for i, text in enumerate(dict.fromkeys(e["text"] for e in entries if e["model"] == model)):
        found = latest(entries, model, text)
        if (doc := document_of(found)) and doc.text:
            parts.append(f"{text}: {doc.text.windows} windows of {doc.text.ctx} tokens.")
            if not i and draw_to and (caption := figure(doc, draw_to)):
                parts.append(f"![KLD over size, {model}]({draw_to.name})\n\n{caption}")
            parts += [main_table(doc, found), ours_table(doc)]
        parts += [f"Not measured: {e['label']} on {text}: {e['error']}" for e in found.values() if "error" in e]
    return "\n\n".join(filter(None, parts))


def models(entries: Sequence[Entry]) -> list[str]:
    return list(dict.fromkeys(e["model"] for e in entries))


def write(page: Path, entries: Sequence[Entry], runs: Sequence[dict[str, str]]) -> list[Path]:
    """The page and a figure a model; returns the files written. Raises InputError where there are no rows."""
    if not entries:
        raise InputError("results.json has no rows; measure first")
    page.parent.mkdir(parents=True, exist_ok=True)
    text = page.read_text(encoding="utf-8") if page.exists() else SKELETON
    figures = {m: page.with_name(f"{page.stem}-{m}.svg") for m in models(entries)}
    how = "\n\n".join(f"{r['date']}, commit {r['commit']}, {r['machine']}:\n\n    {r['command']}" for r in runs)
    text = between(text, "how", how)
    text = between(text, "results", "\n\n".join(section(entries, m, path) for m, path in figures.items()))
    write_text(page, text)
    return [page, *(path for path in figures.values() if path.exists())]


def between(page: str, name: str, text: str) -> str:
    """Replace what stands between the markers of a name. Raises InputError without them."""
    start, end = f"<!-- accuracy:{name} -->", f"<!-- /accuracy:{name} -->"
    if page.count(start) != 1 or page.count(end) != 1:
        raise InputError(f"the page has not one {start} and one {end}; put them back, or delete the page")
    return re.sub(f"{start}.*{end}", lambda _: f"{start}\n{text}\n{end}", page, flags=re.DOTALL)
