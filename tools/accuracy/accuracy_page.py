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


def bits_for(kld: float, line: Sequence[Point]) -> float | None:
    """Bits per weight at which the peers' line, straight between its points in log KLD, reaches a KLD, or None."""
    for (x0, y0), (x1, y1) in itertools.pairwise(line):
        if y1 <= kld <= y0:
            return x0 + (x1 - x0) * math.log(y0 / kld) / math.log(y0 / y1)
    return None


def main_table(first: list[Row], second: list[Row]) -> str:
    other = {(r["label"], r["kind"]): r for r in second}
    # llama-perplexity's own ratio is to the stored 16-bit logits, which are off by up to .1 %
    exact = next((r["ppl"] for r in first if r["kind"] == "reference"), None)
    head = ["", "MB", "bpw", "PPL", "/ reference", "KLD", "median", "99.9 %", "same top %", "RMS \u0394p %"]
    if second:
        head += [f"KLD, {second[0]['text_name']}", "same top %"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in first:
        name = f"{r['label']}\u2020" if r["fell_back"] > 0 and r["kind"] == "stock" else r["label"]
        cells = [
            f"**{name}**" if r["kind"] == "ours" else name,
            f"{r['size'] / 1e6:.1f}",
            f"{r['bpw']:.3f}",
            number(r["ppl"], 4),
            number(r["ppl"] / exact if exact and r["ppl"] else r["ppl_ratio"], 4),
            with_error(r["kld"], r["kld_se"]),
            number(r["kld_median"]),
            number(r["kld_999"]),
            number(r["same_top"]),
            number(r["rms_dp"]),
        ]
        if second:
            o = other.get((r["label"], r["kind"]))
            cells += [with_error(o["kld"], o["kld_se"]), number(o["same_top"])] if o else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def contents_table(first: list[Row]) -> str:
    head = "| | block matrices, share of weights | bpw of them | embedding | head | fell back |"
    lines = [head, "|---|---|---|---|---|---|"]
    for r in first:
        shares = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in r["shares"].items() if share >= 0.005)
        same = f"; tensors as {r['same_as']}" if r.get("same_as") else ""
        fell = f"{100 * r['fell_back']:.0f} %" if r["fell_back"] else "-"
        name = f"**{r['label']}**" if r["kind"] == "ours" else r["label"]
        cells = [name, shares + same, f"{r['bpw_blocks']:.3f}", r["embedding"], r["head"], fell]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ours_table(first: list[Row]) -> str:
    """What the peers need for the same KLD, and the best of those that are no larger."""
    line = frontier(first)
    ours = [r for r in first if r["kind"] == "ours" and r["kld"]]
    if not ours or len(line) < 2:
        return ""
    head = ["ours", "bpw", "KLD", "stock types reach it at", "difference", "best stock type no larger", "ours / its"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in ours:
        need = bits_for(r["kld"], line)
        past = f"beyond {line[-1][0]:.2f}" if r["kld"] < line[-1][1] else f"below {line[0][0]:.2f}"
        cells = [r["label"], f"{r['bpw']:.3f}", number(r["kld"]), f"{need:.3f} bpw" if need else f"{past} bpw"]
        cells.append(f"{r['bpw'] - need:+.3f} bpw ({100 * (r['bpw'] / need - 1):+.1f} %)" if need else "")
        smaller = [p for p in first if p["kind"] == "stock" and p["kld"] and p["bpw"] <= r["bpw"]]
        best = min(smaller, key=lambda p: p["kld"], default=None)
        cells += [f"{best['label']}, {number(best['kld'])}", f"{r['kld'] / best['kld']:.2f}"] if best else ["none", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def model_section(rows: Sequence[Row], model: str, figure: str = "") -> str:
    everything = [*latest(rows, model, "text"), *latest(rows, model, "text2")]
    first, second = finished(everything, model, "text"), finished(everything, model, "text2")
    parts = [f"## {model}"]
    if first:
        r = first[0]
        tokens = r["chunks"] * (r["ctx"] - 1 - r["ctx"] // 2)
        texts = r["text_name"] + (f"; second text {second[0]['text_name']}" if second else "")
        parts.append(f"{texts}: {r['chunks']} windows of {r['ctx']} tokens, {tokens} predictions scored each.")
    if figure:
        parts.append(f"![KLD over bits per weight, {model}]({figure})")
    if first:
        parts += [main_table(first, second), contents_table(first), ours_table(first)]
    for r in everything:
        if "error" in r:
            parts.append(f"Not measured: {r['label']} on {r['text_name']}: {r['error']}")
    return "\n\n".join(p for p in parts if p)


def tables(rows: Sequence[Row]) -> str:
    """Markdown of all models."""
    return "\n\n".join(model_section(rows, m) for m in models(rows)) + "\n"


def how(runs: Sequence[Row]) -> str:
    lines = []
    for run in runs:
        lines.append(f"{run['date']}, commit {run['commit']}, {run['machine']}:\n\n    {run['command']}\n")
    return "\n".join(lines).rstrip()


# ---- the figure ----


def overlaps(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


NEAR = (1.3, 1.7)  # bits per weight below and above ours that a figure shows
Box = tuple[float, ...]  # left, low, right, high


def place(sizes: Sequence[Point], at: Sequence[Point], taken: list[Box], area: Box) -> list[Point]:
    """Lower left corners for labels beside their points, none over another, a point, or the edge of the area.

    sizes, at  width and height of each label, and its point; pixels.  taken  boxes (x0, y0, x1, y1) to keep clear of
    Rings of growing distance are tried, right of the point first; the last resort is the place of least overlap.
    """
    corners = []
    for (w, h), (x, y) in zip(sizes, at, strict=True):
        tries: list[tuple[int, int, Box]] = []
        for gap in (7, 12, 18, 26, 36, 48, 62, 78, 96, 120):
            for angle in (0, 180, 90, 270, 30, -30, 150, 210, 60, -60, 120, 240):
                c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
                left = x + gap * c - (0 if c > 0.3 else w if c < -0.3 else w / 2)
                low = y + gap * s - (0 if s > 0.6 else h if s < -0.6 else h / 2)
                box: Box = (left, low, left + w, low + h)
                inside = area[0] <= box[0] and area[1] <= box[1] and box[2] <= area[2] and box[3] <= area[3]
                tries.append((sum(overlaps(box, t) for t in taken) + (0 if inside else 100), len(tries), box))
        box = min(tries)[2]
        taken.append(box)
        corners.append((box[0], box[1]))
    return corners


def near_ours(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows not far from ours in bits per weight, and of the others the best of each type."""
    ours = [r["bpw"] for r in rows if r["kind"] == "ours"]
    low, high = (min(ours) - NEAR[0], max(ours) + NEAR[1]) if ours else (-math.inf, math.inf)
    near = [r for r in rows if low <= r["bpw"] <= high]
    best: dict[str, Row] = {}
    for r in sorted((r for r in rows if r not in near), key=lambda r: (-r["kld"], not r["imatrix"])):
        best[r["type"]] = r
    return near, sorted(best.values(), key=lambda r: r["bpw"])


def figure(rows: list[Row], model: str, path: Path) -> None:
    """KLD, on a log axis, over bits per weight of the whole file; what is far off in a line of text.

    Raises Missing without matplotlib.
    """
    sizes = [r.size for r in doc.of_kind("ours")] or [r.size for r in doc.rows]
    low, high = NEAR[0] * min(sizes), NEAR[1] * max(sizes)
    off: list[Row] = [r for r in findings.ordered(doc) if not low <= r.size <= high and findings.divergence(r)]
    rest = read_document(doc)
    rest.rows = [r for r in rest.rows if r.label not in {o.label for o in off}]
    try:
        plots = draw(rest, [kld_over_size])
    except ImportError:
        raise Missing("figures need matplotlib; pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.family": "DejaVu Sans", "svg.hashsalt": "ptqtp", "text.color": INK})
    shown, outside = near_ours([r for r in rows if r["kld"] and r["kind"] != "reference"])
    fig, ax = plt.subplots(figsize=(9.6, 6.2), dpi=110, facecolor="white")
    ax.set_yscale("log")
    styles = [
        ("stock", [r for r in shown if r["kind"] == "stock" and not r["imatrix"]], "o", PLAIN, 34),
        ("stock, importance matrix", [r for r in shown if r["kind"] == "stock" and r["imatrix"]], "o", WITH, 42),
        ("ours", [r for r in shown if r["kind"] == "ours"], "D", OURS, 64),
    ]
    line = frontier(shown)
    ax.plot(*zip(*line, strict=True), color=WITH, lw=1, alpha=0.35, zorder=1) if line else None
    by_type: dict[str, list[Row]] = {}
    for name, group, marker, colour, size in styles:
        xy = [(r["bpw"], r["kld"]) for r in group]
        if xy:
            look: dict[str, Any] = {"s": size, "marker": marker, "c": colour, "lw": 0.8, "ec": "white"}
            ax.scatter(*zip(*xy, strict=True), label=name, zorder=3, **look)
        for r in group:
            by_type.setdefault(r["type"] or r["label"], []).append(r)
    for pair in by_type.values():  # one type, without and with the matrix
        ax.plot([r["bpw"] for r in pair], [r["kld"] for r in pair], color=PLAIN, lw=0.8, zorder=2)
    ax.margins(0.09, 0.07)
    ax.set_xlabel("bits per weight, whole file", color=INK)
    ax.set_ylabel("mean KLD to the 16-bit original, nats (log)", color=INK)
    ax.set_title(f"{model}: accuracy per bit", loc="left", color=INK, fontsize=13, pad=26 if outside else 12)
    if outside:
        off = "; ".join(f"{r['label']} {r['bpw']:.1f} bpw, KLD {number(r['kld'], 2)}" for r in outside)
        ax.text(0, 1.025, f"Off the figure: {off}", fontsize=8.5, color=MUTED, transform=ax.transAxes)
    ax.grid(True, which="major", color=GRID, lw=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(which="both", colors=MUTED, length=0)
    ax.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda v, _: f"{v:g}"))
    low, high = ax.get_ylim()
    few = math.log10(high / low) < 1.5
    ax.yaxis.set_major_locator(matplotlib.ticker.LogLocator(10, (1.0, 2.0, 5.0) if few else (1.0,)))
    ax.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(MUTED)
    legend = ax.legend(frameon=False, loc="upper right", fontsize=9)
    fig.tight_layout()
    fig.canvas.draw()
    texts, anchors = [], []
    for label, pair in sorted(by_type.items(), key=lambda kv: kv[1][0]["kind"] != "ours"):
        r = min(pair, key=lambda r: r["kld"])
        mine = r["kind"] == "ours"
        texts.append(
            ax.text(
                0,
                0,
                label,
                fontsize=9.5 if mine else 8.5,
                color=OURS if mine else INK,
                weight="bold" if mine else "normal",
                transform=None,
                zorder=4,
            )
        )
        anchors.append(tuple(ax.transData.transform((r["bpw"], r["kld"]))))
    boxes = [t.get_window_extent() for t in texts]
    points = [ax.transData.transform((r["bpw"], r["kld"])) for r in shown]
    taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    taken.append(legend.get_window_extent().extents)
    corners = place([(b.width + 2, b.height + 2) for b in boxes], anchors, taken, tuple(ax.bbox.extents))
    to_axes = ax.transAxes.inverted()
    for text, box, (x, y), (px, py) in zip(texts, boxes, corners, anchors, strict=True):
        text.set_transform(ax.transAxes)  # so that it stays where it is whatever the resolution
        at = to_axes.transform((x + 1, y + 1 - box.y0))
        text.set_position((at[0], at[1]))
        nearest = (min(max(px, x), x + box.width), min(max(py, y), y + box.height))
        if math.dist(nearest, (px, py)) > 14:
            ends = to_axes.transform([nearest, (px, py)])
            ax.plot(ends[:, 0], ends[:, 1], color=MUTED, lw=0.6, transform=ax.transAxes, zorder=2)
    fig.savefig(path, facecolor="white", metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(fig)


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
