"""Tables and figures of results.json, for accuracy.py.

A page is written once as a skeleton; later only what stands between its markers is written again, so words stay.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Point = tuple[float, float]

INK, MUTED, GRID = "#1f2328", "#6e7781", "#e6e8eb"
PLAIN, WITH, OURS = "#9aa4af", "#2f6fb3", "#d1480b"

SKELETON = """# Accuracy per bit

Each file against the predictions of the 16-bit original that it was made from. Files of stock types were made by
`llama-quantize` from that same file, with and without an importance matrix; IQ3_XXS only with one, as it is published.
Texts for calibration and for scoring are different works, not different parts of one.

How to read it. KLD: mean Kullback-Leibler divergence of the next token's distribution from the original's, in nats,
with its standard error; 0 = the same. The reference's own row is the floor: its logits are stored in 16 bits. "bpw":
bits per weight of the whole file, embedding, head and metadata counted. A dagger: some block matrices fell back to a
larger type, because their rows are no multiple of 256; what each file really holds stands in the second table.

SmolLM2-135M here comes from a Q4_1 file (`tools/fixtures/demo_model.py`), so its weights lie on a 4-bit lattice, which
favours stock 4-bit types, and its rows of 576 make K and IQ types fall back.

<!-- accuracy:how -->
<!-- /accuracy:how -->

<!-- accuracy:results -->
<!-- /accuracy:results -->

## Published figures

Of PTQTP v3 (arXiv 2509.16989), Table 1, WikiText2, 4.25 bits as implemented (group 128), no calibration; block
matrices only, so embedding and head come on top. Other models and another protocol: only the ratio to FP16 may be
compared, and that loosely; the paper itself prints several FP16 baselines.

| | LLaMA2-7B | 3.2-1B | 3.2-3B | 3.1-8B | 3-70B | Qwen3-1.7B | 4B | 8B | 32B |
|---|---|---|---|---|---|---|---|---|---|
| FP16 | 5.47 | 9.75 | 7.80 | 6.23 | 2.81 | 16.70 | 13.64 | 9.71 | 8.64 |
| PTQTP | 6.30 | 17.15 | 10.24 | 8.53 | 7.76 | 32.46 | 18.25 | 11.80 | 10.06 |
| ratio | 1.15 | 1.76 | 1.31 | 1.37 | 2.76 | 1.94 | 1.34 | 1.22 | 1.16 |
"""


class Missing(Exception):
    """What is not there to be rendered, in one line."""


# ---- numbers ----


def number(x: float | None, digits: int = 3) -> str:
    """At least `digits` significant digits, an exponent below 1e-4 and from a million on; a dash for none."""
    if not x:
        return "-" if x is None else "0"
    if not 1e-4 <= abs(x) < 1e6:
        return f"{x:.1e}"
    return f"{x:.{max(0, digits - 1 - math.floor(math.log10(abs(x))))}f}"


def with_error(x: float | None, error: float | None) -> str:
    """A figure to two digits of its standard error."""
    if x is None or not error or abs(x) < 1e-4:
        return number(x)
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{x:.{digits}f} \u00b1 {error:.{digits}f}"


def finished(rows: Sequence[Row], model: str, role: str) -> list[Row]:
    """A model's rows on the first or second text, by size."""
    found = [r for r in rows if r["model"] == model and r.get("role") == role and "error" not in r]
    return sorted(found, key=lambda r: -r["bpw"])


def models(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(r["model"] for r in rows))


def settings(row: Row) -> tuple[object, ...]:
    """What must be equal in one table."""
    return tuple(row[k] for k in ("reference", "text_name", "text", "chunks", "ctx"))


def latest(rows: Sequence[Row], model: str, role: str) -> list[Row]:
    """The model's rows with the settings of the last one, since others do not belong beside it; the last of a label."""
    found = [r for r in rows if r["model"] == model and r.get("role") == role]
    same = [r for r in found if settings(r) == settings(found[-1])]
    return list({(r["label"], r["kind"]): r for r in same}.values())


# ---- tables ----


def frontier(rows: Sequence[Row]) -> list[Point]:
    """(bpw, KLD) of the peers that no smaller one beats, by bpw."""
    best: list[Point] = []
    for bpw, kld in sorted((r["bpw"], r["kld"]) for r in rows if r["kind"] == "stock" and r["kld"]):
        if not best or kld < best[-1][1]:
            best.append((bpw, kld))
    return best


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
    try:
        import matplotlib
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


# ---- the page ----


def between(page: str, name: str, text: str) -> str:
    """Replace what stands between the markers of a name. Raises Missing without them."""
    start, end = f"<!-- accuracy:{name} -->", f"<!-- /accuracy:{name} -->"
    if page.count(start) != 1 or page.count(end) != 1:
        raise Missing(f"the page has not one {start} and one {end}; put them back, or delete the page")
    return re.sub(f"{start}.*{end}", lambda _: f"{start}\n{text}\n{end}", page, flags=re.DOTALL)


def write(page: Path, rows: Sequence[Row], runs: Sequence[Row], kind: str) -> list[Path]:
    """The page and a figure a model beside it; returns the files written. Raises Missing where there are no rows."""
    if not rows:
        raise Missing("results.json has no rows; measure first")
    page.parent.mkdir(parents=True, exist_ok=True)
    written, sections = [page], []
    for model in models(rows):
        first = finished(latest(rows, model, "text"), model, "text")
        path = page.with_name(f"{page.stem}-{model}.{kind}")
        if any(r["kld"] for r in first if r["kind"] != "reference"):
            figure(first, model, path)
            written.append(path)
        sections.append(model_section(rows, model, path.name if path in written else ""))
    text = page.read_text(encoding="utf-8") if page.exists() else SKELETON
    text = between(between(text, "how", how(runs)), "results", "\n\n".join(sections))
    page.write_text(text, encoding="utf-8")
    return written
