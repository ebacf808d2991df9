"""The figures of a comparison, by matplotlib: as SVG whose colours are CSS variables, and as PNG and SVG files.

matplotlib draws in the light palette. For the page each colour of it is replaced by `var(--name)`, so that one figure
follows the page's theme. Same document, same bytes.
"""

from __future__ import annotations

import io
import math
import re
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

from .document import Document, Row
from .findings import Z95, headline, main_test, ordered, percent, plural, significant, size_unit, speed_of

# light theme; the page's CSS has the same names with values for light and dark
PALETTE = {
    "ink": "#1b232d",
    "muted": "#58626f",
    "grid": "#e2e6eb",
    "ours": "#0a5fc2",
    "stock": "#b0530a",
    "line": "#8a94a1",
}
MAX_BLOCKS = 512
SIDES = {-1: ("right", "top"), 0: ("center", "center"), 1: ("left", "bottom")}
# of a label: offset in points, and its end that is there; nearest first, beside the point rather than above or below
PLACES = [
    (dx * far, dy * far, SIDES[dx][0], SIDES[dy][1])
    for far in (8, 20, 34, 50, 68)
    for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
]
FAR = 25  # points; a label farther off has a thin line to its point
FEW = 8  # points that a figure of the usual height has room for
SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"


@dataclass(frozen=True)
class Plot:
    """name: of its files, without ending; alt: what it shows, in words; inline: SVG for the page."""

    name: str
    title: str
    caption: str
    alt: str
    inline: str
    svg: bytes
    png: bytes


def draw(doc: Document, makers: Sequence[Callable[[Document], Plot | None]] = ()) -> list[Plot]:
    """Figures that the document has numbers for: all, or those of `makers`. Raises ImportError without matplotlib."""
    makers = makers or (kld_over_size, speed_over_bytes, same_top, digit_histogram, scale_histogram, error_map)
    with _style():
        return [plot for make in makers if (plot := make(doc))]


@contextmanager
def _style() -> Iterator[None]:
    """matplotlib's own defaults and ours, whatever the user's settings are; put back afterwards."""
    import warnings

    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a label may hold letters that the font does not have
        matplotlib.rcdefaults()
        settings: dict[str, Any] = {
            "text.color": PALETTE["ink"],
            "xtick.color": PALETTE["ink"],
            "ytick.color": PALETTE["ink"],
            "axes.labelcolor": PALETTE["muted"],
            "axes.edgecolor": PALETTE["line"],
            "xtick.labelcolor": PALETTE["muted"],
            "ytick.labelcolor": PALETTE["muted"],
            "grid.color": PALETTE["grid"],
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "font.size": 9.5,
            "font.family": ["DejaVu Sans"],
            "svg.fonttype": "none",
            "svg.hashsalt": "ptqtp-gguf",
            "text.parse_math": False,
            "axes.unicode_minus": False,
            "lines.linewidth": 1.4,
        }
        cast(Any, matplotlib.rcParams).update(settings)
        yield


def _figure(height: float = 3.1) -> tuple[Any, Any]:
    """A figure as wide as a telephone, and its canvas. height in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, height), layout="constrained")
    return figure, FigureCanvasAgg(figure)


def _settle(figure: Any) -> None:
    """Lay the figure out, once: matplotlib would do it again at each drawing."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def _finish(figure: Any, name: str, title: str, caption: str, alt: str) -> Plot:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    if figure.get_layout_engine():
        _settle(figure)
    svg, png = io.BytesIO(), io.BytesIO()
    # the canvases and not savefig, which draws everything once more to find its size
    canvas: Any = FigureCanvasSVG(figure)
    canvas.print_svg(svg, metadata={"Date": None, "Creator": None})
    figure.set_dpi(180)
    canvas = FigureCanvasAgg(figure)
    canvas.print_png(png, metadata={"Software": None})
    return Plot(name, title, caption, alt, themed(svg.getvalue(), name, alt), svg.getvalue(), png.getvalue())


def themed(svg: bytes, name: str, alt: str) -> str:
    """matplotlib's SVG for a page: colours by variables, the page's font, names that are its own, a text for it."""
    ET.register_namespace("", SVG)
    ET.register_namespace("xlink", XLINK)
    root = ET.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
    variables = {colour: f"var(--{key})" for key, colour in PALETTE.items()}
    drawn = {"style", "fill", "stroke"}
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "id":
                value = f"{name}-{value}"
            elif key == f"{{{XLINK}}}href":
                value = value.replace("#", f"#{name}-", 1)
            elif key == "clip-path":
                value = value.replace("url(#", f"url(#{name}-", 1)
            elif key in drawn:
                for colour, variable in variables.items():
                    value = value.replace(colour, variable)
                value = re.sub(r"font: ([\d.]+px)[^;]*", r"font: \1 var(--font)", value)
            element.set(key, value)
    # no white paper: the page's own shows through
    for patch in root.iterfind(f".//{{{SVG}}}path"):
        if (patch.get("style") or "").startswith("fill: #ffffff"):
            patch.set("style", "fill: none")
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", alt)
    return ET.tostring(root, encoding="unicode")


def _short(text: str, limit: int = 20) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "\u2026"


def _look(row: Row) -> dict[str, Any]:
    """Kinds differ in shape as well as in colour."""
    return (
        {"color": PALETTE["ours"], "marker": "o"} if row.kind == "ours" else {"color": PALETTE["stock"], "marker": "s"}
    )


def _points(figure: Any, canvas: Any, axes: Any, points: list[tuple[float, float, Row]], line: list[Any]) -> None:
    """Mark the points and write their labels where they hide no point, no other label, and not the line."""
    from matplotlib.transforms import Bbox

    for x, y, row in points:
        axes.plot([x], [y], linestyle="none", markersize=8 if row.kind == "ours" else 6.5, zorder=4, **_look(row))
    _settle(figure)
    frame = axes.get_window_extent()
    at = [axes.transData.transform((x, y)) for x, y, _ in points]
    taken = [Bbox.from_bounds(px - 6, py - 6, 12, 12) for px, py in at]
    run = [axes.transData.transform(p) for p in line]
    taken += [
        Bbox([[min(a[0], b[0]) - 1, min(a[1], b[1]) - 1], [max(a[0], b[0]) + 1, max(a[1], b[1]) + 1]])
        for a, b in pairwise(run)
    ]
    for i, (x, y, row) in enumerate(points):
        text = axes.annotate(
            _short(row.label),
            (x, y),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=9.5,
            zorder=5,
            color=_look(row)["color"],
            fontweight="bold" if row.kind == "ours" else "normal",
        )
        text.set_in_layout(False)

        def box(place: tuple[int, int, str, str], text: Any = text) -> Any:
            text.set_position(place[:2])
            text.set_ha(place[2])
            text.set_va(place[3])
            return text.get_window_extent(canvas.get_renderer())

        def cost(place: tuple[int, int, str, str], own: int = i) -> float:
            b = box(place)
            hits = sum(b.overlaps(t) for k, t in enumerate(taken) if k != own)
            outside = b.x0 < frame.x0 or b.x1 > frame.x1 or b.y0 < frame.y0 or b.y1 > frame.y1
            return float(hits + 3 * outside)

        best = min(PLACES, key=cost)  # the first of the best
        taken.append(box(best))
        if math.hypot(*best[:2]) > FAR:
            thin = {"arrowstyle": "-", "linewidth": 0.5, "color": PALETTE["line"], "shrinkA": 0, "shrinkB": 3}
            axes.annotate("", (x, y), xytext=best[:2], textcoords="offset points", arrowprops=thin).set_in_layout(False)


def _padded(values: list[float], share: float = 0.25) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = (high - low) * share or 0.1 * abs(high) or 1.0
    return low - pad, high + pad


def _log_ticks(axis: Any) -> None:
    """Plain numbers at 1, 2, 5 of each decade, or more of them in less than one."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    low, high = axis.get_view_interval()
    subs = (1.0,) if high > 300 * low else (1.0, 2.0, 5.0) if high > 10 * low else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    axis.set_major_locator(LogLocator(10, subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def kld_over_size(doc: Document) -> Plot | None:
    """KL divergence over size, with the frontier of what no other row beats in both."""
    unit, word = size_unit(doc)
    points = [
        (r.size / unit, r.quality.kld, r) for r in ordered(doc) if r.quality and r.quality.kld and r.quality.kld > 0
    ]
    if len(points) < 2:
        return None
    figure, canvas = _figure(3.1 + 0.12 * max(0, len(points) - FEW))
    axes = figure.add_subplot()
    axes.set_yscale("log")
    best, frontier = math.inf, []
    for x, y, _ in points:
        if y < best:
            best = y
            frontier.append((x, y))
    corners = [p for a, b in pairwise(frontier) for p in (a, (b[0], a[1]))] + frontier[-1:]
    axes.plot(*zip(*corners, strict=True), color=PALETTE["line"], linestyle="--", zorder=2)
    for x, y, row in points:
        if row.quality and row.quality.kld_se:
            half = min(Z95 * row.quality.kld_se, 0.9 * y)
            axes.plot([x, x], [y - half, y + half], color=_look(row)["color"], zorder=3)
    axes.set_xlim(*_padded([p[0] for p in points]))
    low, high = _padded([math.log10(p[1]) for p in points])
    axes.set_ylim(10**low, 10**high)
    _log_ticks(axes.yaxis)
    axes.set_xlabel(f"file size, {word}")
    axes.set_ylabel("KL divergence, nats a token")
    _points(figure, canvas, axes, points, corners)
    said = "; ".join(f"{r.label} {significant(y)} at {significant(x)} {word}" for x, y, r in points)
    return _finish(
        figure,
        "kld-over-size",
        "Distance from the original over file size",
        "Lower left is better. Bars: 95 % intervals. Dashed: the frontier; what lies on it is beaten by no other row "
        "in both size and distance.",
        f"KL divergence over file size. {said}.",
    )


def speed_over_bytes(doc: Document) -> Plot | None:
    """Decoding speed over what is read for a token, under the line that the memory's bandwidth draws."""
    test = main_test(doc, True)
    unit, word = size_unit(doc)
    rows = [(r, s) for r in ordered(doc) if (s := speed_of(r, test)) and s.median > 0]
    if not test or len(rows) < 2:
        return None
    exact = all((r.token_bytes or 0) > 0 for r, _ in rows)
    points = [((r.token_bytes if exact and r.token_bytes else r.size) / unit, s.median, r) for r, s in rows]
    bandwidth = (doc.bench.bandwidth.get(str(test[1])) if doc.bench else None) or None
    figure, canvas = _figure()
    axes = figure.add_subplot()
    low, high = _padded([p[0] for p in points])
    axes.set_xlim(max(low, 0.5 * min(p[0] for p in points)), high)
    top = max(s.high or s.median for _, s in rows)
    roofline: list[tuple[float, float]] = []
    if exact and bandwidth and bandwidth > 0:
        x0, x1 = axes.get_xlim()
        xs = [x0 + (x1 - x0) * i / 60 for i in range(61)]
        roofline = [(x, bandwidth * 1e9 / (x * unit)) for x in xs]
        axes.plot(*zip(*roofline, strict=True), color=PALETTE["line"], linestyle="--", zorder=2)
        reach = max(bandwidth * 1e9 / (p[0] * unit) for p in points)
        top = max(top, min(reach, 2.5 * top))
    for (x, _, row), (_, s) in zip(points, rows, strict=True):
        if s.low is not None and s.high is not None:
            axes.plot([x, x], [s.low, s.high], color=_look(row)["color"], zorder=3)
    axes.set_ylim(0, 1.12 * top)
    axes.set_xlabel(f"read for a token, {word}" if exact else f"file size, {word}")
    axes.set_ylabel("decoding, tokens/s")
    _points(figure, canvas, axes, points, roofline)
    caption = f"Higher is better. {test[0]}, {plural(test[1], 'thread')}; bars: intervals of the median."
    if exact and bandwidth:
        caption += f" Dashed: what {significant(bandwidth)} GB/s of measured memory bandwidth allow."
    said = "; ".join(f"{r.label} {significant(y)}" for _, y, r in points)
    return _finish(figure, "decode-over-size", "Decoding speed", caption, f"Decoding speed in tokens a second. {said}.")


def same_top(doc: Document) -> Plot | None:
    """How often a row's most likely token is the original's."""
    rows = [(r, r.quality) for r in ordered(doc) if r.quality and r.quality.same_top is not None]
    if len(rows) < 2:
        return None
    figure, _ = _figure(0.9 + 0.32 * len(rows))
    axes = figure.add_subplot()
    values = []
    for i, (row, q) in enumerate(rows):
        x = q.same_top or 0.0
        half = Z95 * (q.same_top_se or 0.0)
        values += [x - half, x + half]
        axes.plot([x - half, x + half], [i, i], zorder=3, color=_look(row)["color"])
        axes.plot([x], [i], linestyle="none", markersize=8 if row.kind == "ours" else 6.5, zorder=4, **_look(row))
        axes.annotate(
            f"{x:.1f}",
            (x, i),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            color=PALETTE["muted"],
        )
    low, high = _padded(values, 0.08)
    axes.set_xlim(max(low, 0), high)
    axes.set_ylim(len(rows) - 0.5, -0.7)
    axes.set_yticks(range(len(rows)), [_short(r.label) for r, _ in rows])
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("same most likely token, % of tokens")
    said = "; ".join(f"{r.label} {q.same_top:.1f} %" for r, q in rows)
    return _finish(
        figure,
        "same-top",
        "Same next token as the original",
        "Further right is better; smallest file first. Bars: 95 % intervals.",
        f"How often the most likely token is the original's. {said}.",
    )


def block_errors(row: Row) -> dict[tuple[str, int], float]:
    """(matrix, block) -> relative squared error; several tensors there (experts) weigh by their weights."""
    sums: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for t in row.tensors:
        if t.block is not None and 0 <= t.block < MAX_BLOCKS and t.rel_mse is not None and t.rel_mse > 0:
            s = sums[re.sub(r"^blk\.\d+\.|\.weight$", "", t.name), t.block]
            s[0] += t.rel_mse * max(t.weights, 1)
            s[1] += max(t.weights, 1)
    return {k: a / b for k, (a, b) in sums.items()}


def error_map(doc: Document) -> Plot | None:
    """Error of each matrix of each block: of ours, and of the stock type of the headline."""
    import matplotlib
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    pair = headline(doc)
    rows = [r for r in (pair or doc.of_kind("ours")[:1]) if block_errors(r)]
    if not rows:
        return None
    errors = [block_errors(r) for r in rows]
    named = list(dict.fromkeys(m for e in errors for m, _ in sorted(e, key=lambda k: k[1])))
    matrices = sorted(named, key=lambda m: (not m.startswith("attn"), named.index(m)))[:24]
    blocks = 1 + max(b for e in errors for _, b in e)
    values = [v for e in errors for (m, _), v in e.items() if m in matrices]
    figure, _ = _figure(0.7 + len(rows) * (0.5 + 0.19 * max(len(matrices), 3)))
    least, most = min(values), max(max(values), 1.01 * min(values))
    norm = LogNorm(least, most)
    colours = matplotlib.colormaps["cividis"].resampled(16)
    grid = figure.subplots(len(rows), 1, squeeze=False, sharex=True)[:, 0]
    mesh = None
    for axes, row, found in zip(grid, rows, errors, strict=True):
        cells = [[found.get((m, b), math.nan) for b in range(blocks)] for m in matrices]
        mesh = axes.pcolormesh(range(blocks + 1), range(len(matrices) + 1), cells, norm=norm, cmap=colours)
        axes.set_yticks([i + 0.5 for i in range(len(matrices))], [_short(m, 16) for m in matrices], fontsize=8.5)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.tick_params(length=0)
        axes.set_title(_short(row.label, 40), loc="left", fontsize=9.5, color=_look(row)["color"], fontweight="bold")
    grid[-1].set_xlabel("block")
    grid[-1].xaxis.set_major_locator(MaxNLocator(8, integer=True))
    bar = figure.colorbar(mesh, ax=list(grid), shrink=0.9, aspect=24, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.minorticks_off()
    steps = [least * (most / least) ** (i / 4) for i in range(5)]
    bar.set_ticks(steps, labels=[significant(v, 2) for v in steps])
    bar.set_label("relative squared error")
    worst = max(errors[0], key=lambda k: errors[0][k])
    said = [
        f"{r.label} from {significant(min(e.values()), 2)} to {significant(max(e.values()), 2)}"
        for r, e in zip(rows, errors, strict=True)
    ]
    return _finish(
        figure,
        "block-errors",
        "Error by block and matrix",
        f"Squared error over the original's squares, brighter is worse. Worst of {rows[0].label}: {worst[0]} of block "
        f"{worst[1]}.",
        f"Relative squared error of each matrix in {blocks} blocks: {'; '.join(said)}.",
    )


def _bars(x: list[float], width: list[float], counts: list[int], xlabel: str) -> Any:
    figure, _ = _figure(2.7)
    axes = figure.add_subplot()
    total = sum(counts)
    axes.bar(x, [100 * n / total for n in counts], width, color=PALETTE["ours"])
    axes.grid(axis="x", visible=False)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("%")
    return figure


def _first(doc: Document, has: Callable[[Row], object]) -> Row | None:
    return next((r for r in doc.of_kind("ours") if has(r)), None)


def digit_histogram(doc: Document) -> Plot | None:
    """How often each value of the two planes' digits together."""
    row = _first(doc, lambda r: r.digits and sum(r.digits.counts) > 0 and min(r.digits.counts) >= 0)
    if not row or not row.digits:
        return None
    d = row.digits
    figure = _bars([float(v) for v in d.values], [0.8] * len(d.values), d.counts, "value")
    if d.values == list(range(-4, 5)):  # 3 * t1 + t2
        trits = [f"{(v + 4) // 3 - 1}\n{(v + 4) % 3 - 1}" for v in d.values]
        figure.axes[0].set_xticks(d.values, trits)
        figure.axes[0].set_xlabel("digit of plane 1, of plane 2 below it")
    zeros = "; ".join(f"plane {i} {percent(z)}" for i, z in enumerate(d.zero_share, 1))
    total = sum(d.counts)
    said = ", ".join(f"{v}: {percent(n / total)}" for v, n in zip(d.values, d.counts, strict=True))
    return _finish(
        figure,
        "digits",
        f"Digits of {row.label}",
        f"Zeros: {zeros}." if zeros else "Share of each value.",
        f"How often each value of two digits is used. {said}.",
    )


def scale_histogram(doc: Document) -> Plot | None:
    """How the blocks' scales are spread."""
    row = _first(doc, lambda r: r.scales and sum(r.scales.counts) > 0 and min(r.scales.counts) >= 0)
    if not row or not row.scales:
        return None
    edges, counts = row.scales.edges, row.scales.counts
    widths = [b - a for a, b in pairwise(edges)]
    if min(widths) <= 0:
        return None
    middles = [(a + b) / 2 for a, b in pairwise(edges)]
    log = edges[0] > 0 and edges[-1] / edges[0] > 5
    figure = _bars(middles, widths, counts, "scale")
    if log:
        figure.axes[0].set_xscale("log")
        _log_ticks(figure.axes[0].xaxis)
    most = middles[counts.index(max(counts))]
    said = f"from {significant(edges[0])} to {significant(edges[-1])}, most at about {significant(most)}"
    return _finish(
        figure,
        "scales",
        f"Scales of {row.label}",
        f"Share of blocks by scale: {said}.",
        f"Histogram of the scales, {said}.",
    )
