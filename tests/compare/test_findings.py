"""The report of a comparison: what it says of numbers, that it bears any document, that its page works in a browser."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import math
import random
import re
import shutil
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import report_document
from report_document import MATRICES, example, gaps
from rich.console import Console

from ptqtp_gguf.compare import findings
from ptqtp_gguf.compare.document import Document, as_json, read_document
from ptqtp_gguf.compare.page import write_json, write_report
from ptqtp_gguf.errors import InputError, OutputError
from ptqtp_gguf.measure import Quality
from ptqtp_gguf.terminal.comparison import print_comparison

SCALES = dict.fromkeys(("min", "median", "max", "empty", "damaged"))
needs_page = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("matplotlib", "jinja2"))),
    reason="the page needs matplotlib and jinja2",
)


def pair(**changes: Any) -> Document:
    """A document of two rows, ours at 80 MB and Q4_0 at 100 MB, with changes to ours."""
    rows = [
        {"label": "TP2_1", "kind": "ours", "size": 80_000_000, **changes},
        {
            "label": "Q4_0",
            "kind": "stock",
            "size": 100_000_000,
            "quality": {"kld": 0.05, "kld_se": 0.001},
            "speed": report_document.speed(100.0, 500.0, 1),
        },
    ]
    return read_document({"schema": 1, "model": {"name": "m"}, "machine": {"cpu": "c"}, "rows": rows})


def decode(median: float, low: float, high: float, clear: bool) -> dict[str, Any]:
    return {"ratios": {"Q4_0": {"tg64 t2": {"median": median, "low": low, "high": high, "clear": clear}}}}


@pytest.mark.parametrize(
    ("changes", "sentence", "outcomes"),
    [
        ({}, "TP2_1 is 20 % smaller than Q4_0.", ["better"]),
        ({"size": 99_800_000}, "TP2_1 is as large as Q4_0.", ["same"]),
        ({"size": 104_000_000}, "TP2_1 is 4.0 % larger than Q4_0.", ["worse"]),
        ({"size": 250_000_000}, "TP2_1 is 2.5x as large as Q4_0.", ["worse"]),
        (
            decode(1.21, 1.18, 1.24, True),
            "TP2_1 is 20 % smaller than Q4_0 and decodes 1.21x as fast (1.18 to 1.24, 2 threads).",
            ["better", "better"],
        ),
        (
            decode(0.8, 0.75, 0.84, True),
            "TP2_1 is 20 % smaller than Q4_0 and decodes 0.80x as fast (0.75 to 0.84, 2 threads).",
            ["better", "worse"],
        ),
        (
            decode(1.02, 0.98, 1.05, True),  # whatever it calls itself: its interval holds 1
            "TP2_1 is 20 % smaller than Q4_0 and shows no clear difference in decoding speed (1.02x, 0.98 to 1.05, "
            "2 threads).",
            ["better", "same"],
        ),
        (
            decode(1.2, 1.1, 1.3, False),  # whatever its interval: it was not called clear
            "TP2_1 is 20 % smaller than Q4_0 and shows no clear difference in decoding speed (1.20x, 1.10 to 1.30, "
            "2 threads).",
            ["better", "same"],
        ),
        (
            {"quality": {"kld": 0.1, "kld_se": 0.002}},  # 2 * exp(+-1.96 * sqrt(2) * 0.02)
            "TP2_1 is 20 % smaller than Q4_0 and has 2.00x Q4_0's KL divergence from the original (1.89 to 2.11).",
            ["better", "worse"],
        ),
        (
            {"quality": {"kld": 0.025, "kld_se": 0.0}},  # 0.5 * exp(+-1.96 * 0.02)
            "TP2_1 is 20 % smaller than Q4_0 and has 0.50x Q4_0's KL divergence from the original (0.48 to 0.52).",
            ["better", "better"],
        ),
        (
            {"quality": {"kld": 0.051, "kld_se": 0.002}},
            "TP2_1 is 20 % smaller than Q4_0 and shows no clear difference in KL divergence from the original (1.02x, "
            "0.94 to 1.11).",
            ["better", "same"],
        ),
        (
            {"quality": {"kld": 0.1}},
            "TP2_1 is 20 % smaller than Q4_0 and has 2.00x Q4_0's KL divergence (without an interval).",
            ["better", "unknown"],
        ),
        ({"quality": {"kld": 0.0, "kld_se": 0.0}}, "TP2_1 is 20 % smaller than Q4_0.", ["better"]),
    ],
)
def test_verdict(changes: dict[str, Any], sentence: str, outcomes: list[str]) -> None:
    doc = pair(**changes)
    verdict = findings.verdicts(doc)[0]
    assert verdict.sentence == sentence
    assert [f.outcome for f in verdict.findings] == outcomes


def test_frontier_and_perplexity() -> None:
    doc = example()
    assert findings.frontier_sentence(read_document(doc), read_document(doc).rows[1]).startswith("No stock type")
    doc["rows"][3]["size"] = doc["rows"][1]["size"]  # Q4_K_M as small as ours, and nearer to the original
    assert findings.frontier_sentence(read_document(doc), read_document(doc).rows[1]) == (
        "Q4_K_M is no larger than TP2_1 and nearer to the original."
    )
    doc["rows"][1]["quality"]["ppl_ratio"] = 0.99
    assert "TP2_1 -1.00 ± 0.80 %, " in findings.perplexity_sentence(read_document(doc))


def test_the_best_that_is_no_larger_and_what_reaches_the_same() -> None:
    doc = example()
    doc["rows"][5]["size"] = 70_000_000
    read = read_document(doc)
    nearest = findings.best_no_larger(read, read.rows[1])
    assert nearest and nearest.label == "Q3_K_M" and findings.best_no_larger(read, nearest) is nearest
    assert findings.best_no_larger(read_document(example()), read.rows[1]) is None
    line = findings.stock_frontier(read)
    assert line == [(70e6, 0.074), (90.2e6, 0.044), (105.4e6, 0.031)]  # Q4_0 is larger than IQ4_XS, and farther off
    assert findings.size_for(math.sqrt(0.074 * 0.044), line) == pytest.approx(80.1e6)
    assert findings.size_for(0.01, line) is None and findings.size_for(1.1, line) is None
    assert findings.divergence(read.rows[0]) is None and findings.stock_frontier(read_document(gaps())) == []


def test_best_of_column_and_what_is_not_clearly_behind() -> None:
    table = findings.main_table(read_document(example()))
    best = {c.name: [r.label for r, cells in table.rows if cells[i].best] for i, c in enumerate(table.columns)}
    assert best["size"] == ["TP2_1"] and best["KLD"] == ["Q4_K_M"] and best["decode"] == ["TP2_1"]
    assert best["prefill"] == ["TP2_1", "Q4_0"]  # 640 (621 to 653) and 655 (635 to 668)
    assert best["perplexity"] == ["IQ4_XS", "Q4_K_M"]  # by the ratio's error, not the text's
    assert [r.label for r, _ in table.rows] == ["BF16", "TP2_1", "IQ4_XS", "Q4_0", "Q3_K_M", "Q4_K_M"]


@pytest.mark.parametrize(
    ("x", "half", "texts"),
    [
        (14.32123, 0.0843, ("14.321", "0.084")),
        (0.11234, 0.0066, ("0.1123", "0.0066")),
        (84.9, 12.3, ("85", "12")),
        (12.5, None, ("12.50", "")),
        (1e30, 1e20, ("1.000e+30", "1.0e+20")),
        (0.0, None, ("0", "")),
    ],
)
def test_numbers_end_where_their_error_begins(x: float, half: float | None, texts: tuple[str, str]) -> None:
    assert findings.with_error(x, half) == texts


def test_a_document_is_written_in_the_order_of_its_schema() -> None:
    """What was read is written as it was: no field is missing in the schema, none is renamed."""
    whole, doc = as_json(read_document(example())), example()
    doc["rows"] = [r | {"scales": r["scales"] and {**r["scales"], **SCALES}} for r in doc["rows"]]
    doc["machine"] = {**doc["machine"], "cpus": None, "quota": None}
    doc["bench"] = {**doc["bench"], "first": None}
    assert whole == {**doc, "finished": True}
    order = "schema model created command versions machine text bench warnings rows finished"
    assert list(whole) == order.split() and read_document(whole) == read_document(doc)
    assert "load" not in as_json(read_document(gaps()))["machine"]  # type: ignore[operator]
    made = read_document(doc)
    made.rows[1].quality, made.finished = Quality(ppl=math.inf, kld=math.nan, kld_se=0.5), False
    found: Any = json.loads(json.dumps(as_json(made), allow_nan=False))
    assert found["rows"][1]["quality"] == {**vars(Quality()), "kld_se": 0.5} and found["finished"] is False


# ---- documents that are none ----


def changed(path: str, value: object) -> dict[str, Any]:
    doc = example()
    at: Any = doc
    *way, last = path.split("/")
    for key in way:
        at = at[int(key) if isinstance(at, list) else key]
    at[last] = value
    return doc


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "comparison: not a JSON object"),
        ({}, "comparison: schema None, this version reads 1"),
        (changed("schema", 2), "schema 2, this version reads 1"),
        (changed("schema", "1\n" * 99), "schema '1"),
        (changed("rows", []), "no rows"),
        (changed("rows", {}), "rows is dict, not a list"),
        (changed("rows/1/label", "Q4_0"), "rows[2].label 'Q4_0' is empty or used twice"),
        (changed("rows/1/kind", "mine"), "rows[1].kind is 'mine', not one of reference, ours, stock"),
        (changed("rows/1/size", 0), "rows[1].size is 0"),
        (changed("rows/1/size", 1.5), "rows[1].size is 1.5, not a whole number"),
        (changed("rows/1/size", None), "rows[1].size is None, not a whole number"),
        (changed("rows/1/size", 10**400), "rows[1].size is int, not a finite number up to 1e+30"),
        (changed("rows/1/quality/kld", "NaN"), "rows[1].quality.kld is 'NaN', not a number"),
        (changed("rows/1/quality/kld", math.nan), "rows[1].quality.kld is float, not a finite number"),
        (changed("rows/1/quality/kld", 1e31), "rows[1].quality.kld is float, not a finite number"),
        (changed("rows/1/quality/kld", True), "rows[1].quality.kld is True, not a number"),
        (changed("rows/1/digits/counts", [1]), "rows[1].digits has 1 counts for 9 values"),
        (changed("rows/1/scales/edges", [1.0]), "rows[1].scales has 1 edges for 24 counts"),
        (changed("rows/1/ratios/Q4_0", [1]), "rows[1].ratios.Q4_0 is list, not an object"),
        (changed("rows/1/speed/0/threads", None), "rows[1].speed[0].threads is None, not a whole number"),
        (changed("machine", {}), "machine.cpu is missing"),
        (changed("model/name", "x" * 10_001), "model.name is 'xxx"),
        (changed("text/builtin", 1), "text.builtin is 1, not true or false"),
        (changed("extra", math.nan), "cannot be written as JSON"),
    ],
)
def test_documents_that_are_none(document: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as e:
        write_json(document, tmp_path / "out")
    assert message in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 200
    assert not (tmp_path / "out").exists()


@needs_page
def test_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(OutputError, match=r"matplotlib is not installed.*pip install.*report.json is written"):
        write_report(example(), tmp_path / "out")
    assert json.loads((tmp_path / "out/report.json").read_text()) == example()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["report.json"]


@needs_page
def test_a_target_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OutputError, match="cannot make this folder"):
        write_report(example(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


# ---- the terminal ----


def printed(document: dict[str, Any], encoding: str = "utf-8", width: int = 160) -> str:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    print_comparison(document, Console(file=out, width=width, highlight=False, color_system=None))
    out.flush()
    return out.buffer.getvalue().decode(encoding)


def test_terminal() -> None:
    text = printed(example())
    assert text.startswith("warning: the load of the machine")
    assert findings.verdicts(read_document(example()))[0].sentence in text
    line = next(x for x in text.splitlines() if "TP2_1" in x and "76.4" in x)
    assert "76.4 *" in line and "0.1120 ± 0.0066" in line and "171 *" in line
    assert "0.1120 +- 0.0066" in printed(example(), "ascii")
    assert "not measured: bpw, perplexity, KLD" in printed(gaps())
    hostile = changed("rows/1/label", "[red]x[/] [link=y]\x1b[31m\u00fc\ud800")
    assert "[red]x[/] [link=y]\\x1b[31m" in printed(hostile, "ascii")


# ---- the page ----


class Page(HTMLParser):
    """Tags, attributes and visible text of a page; tags must close in order."""

    VOID = frozenset({"meta", "link"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "made" / "full"
    files = write_report(example(), out)
    assert files[0].name == "index.html" and sorted(files) == sorted(out.iterdir())
    return out


@needs_page
def test_page_is_whole_and_stands_alone(folder: Path) -> None:
    html = (folder / "index.html").read_text("utf-8")
    page = Page(html)
    for words in (
        "TP2_1 is 17 % smaller than Q4_0",
        "Read these numbers with care",
        "the first 23 of 64 tokens",
        "19.5 GB/s",
        "example/example-135m",
        "2026-01-02T03:04:05Z",
        "ab" * 32,
        "Zeros: plane 1 43 %",
    ):
        assert words in page.text, words
    names = [tag for tag, _ in page.tags]
    assert names.count("figure") == names.count("svg") == 6
    assert not {"script", "img", "iframe", "object", "form", "base"} & set(names)
    for tag, attributes in page.tags:
        assert not [a for a in attributes if a.startswith("on")]
        for key in ("href", "src", "xlink:href"):
            assert (attributes.get(key) or "#").startswith(("#", "data:,")), (tag, attributes)
        if tag == "svg":
            assert attributes["role"] == "img" and len(attributes["aria-label"] or "") > 20
        if tag == "th":
            assert "scope" in attributes
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:href="|url\()#([^")]+)', html)
    assert set(used) <= set(ids)
    assert not re.search(r"url\((?!#)|@import", html)
    colours = set(re.findall(r"var\((--[a-z-]+)\)", html))
    assert colours <= set(re.findall(r"(--[a-z-]+):", html))


@needs_page
def test_figures(folder: Path) -> None:
    from PIL import Image

    names = ["block-errors", "decode-over-size", "digits", "kld-over-size", "same-top", "scales"]
    assert sorted(p.stem for p in folder.glob("*.png")) == sorted(p.stem for p in folder.glob("*.svg")) == names
    for name in names:
        image = Image.open(folder / f"{name}.png").convert("RGB")
        assert image.width > 800 and len(image.getcolors(1 << 20) or []) > 10
        ET.parse(folder / f"{name}.svg")


@needs_page
def test_same_document_same_bytes(folder: Path, tmp_path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):  # the user's settings change nothing
        write_report(example(), tmp_path)
        assert matplotlib.rcParams["font.size"] == 30
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


@needs_page
def test_what_is_missing_is_a_gap(tmp_path: Path) -> None:
    write_report(gaps(), tmp_path)
    page = Page((tmp_path / "index.html").read_text("utf-8"))
    assert "Not measured: bpw, perplexity, KLD" in page.text and "quality was not measured" in page.text
    assert "svg" not in [tag for tag, _ in page.tags]
    doc = example()
    for part in ("quality", "generation", "load_s", "peak_memory", "token_bytes", "digits"):
        doc["rows"][2][part] = None  # one row that did not finish
    doc["rows"][2] |= {"speed": [], "tensors": []}
    doc["rows"][1] |= {"digits": None, "scales": {"edges": [], "counts": []}}
    write_report(doc, tmp_path)
    page = Page((tmp_path / "index.html").read_text("utf-8"))
    assert "TP2_1 is 17 % smaller than Q4_0, decodes 1.23x as fast" in page.text
    assert "Q4_0's KL divergence" not in page.text and "nan" not in page.text.lower()
    assert [tag for tag, _ in page.tags].count("svg") == 4
    only = {**gaps(), "rows": gaps()["rows"][:1]}
    write_report(only, tmp_path)
    assert "There is no pair of rows" in (tmp_path / "index.html").read_text("utf-8")


HOSTILE = "</svg></style></title>\"'><script>alert(1)</script>{{ 7*7 }}$x^2$\x00\u202e\ud800 #0a5fc2"


def attacked(value: Any, key: str = "") -> Any:
    """The document with hostile text wherever text may stand."""
    if isinstance(value, dict):
        return {k: attacked(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [attacked(v, key) for v in value]
    if not isinstance(value, str) or key == "kind" or (key == "name" and value.startswith("blk.")):
        return value
    return value + HOSTILE if key in ("label", "test") else HOSTILE


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A report of a document that attacks, and the document."""
    doc = attacked(example())
    for row in doc["rows"]:
        for tensor in row["tensors"]:
            tensor["name"] += HOSTILE
    doc["versions"] = {HOSTILE: "1"}
    doc["rows"][1]["types"] = {HOSTILE: 1.0}
    out = tmp_path_factory.mktemp("hostile")
    write_report(doc, out)
    return out, doc


@needs_page
def test_hostile_text_stays_text(hostile: tuple[Path, dict[str, Any]]) -> None:
    folder, doc = hostile
    page = Page((folder / "index.html").read_text("utf-8"))
    names = [tag for tag, _ in page.tags]
    assert "script" not in names and names.count("svg") == 6 and names.count("style") == 1
    assert "<script>alert(1)</script>{{ 7*7 }}$x^2$\\x00\\u202e\\ud800 #0a5fc2" in page.text
    for path in folder.glob("*.svg"):
        assert not [e for e in ET.parse(path).iter() if "script" in str(e.tag)]
    assert json.loads((folder / "report.json").read_text()) == doc


def scrambled(value: Any, rng: random.Random, key: str = "") -> Any:
    """The document with any number that its schema allows."""
    if isinstance(value, dict):
        return {k: scrambled(v, rng, k) for k, v in value.items()}
    if isinstance(value, list):
        return [scrambled(v, rng, key) for v in value]
    if isinstance(value, bool) or key in ("schema", "threads", "values"):
        return value
    if isinstance(value, float):
        return rng.choice([value, value, 0.0, -1.0, 1e30, -1e30, 1e-30, 5e-324])
    if isinstance(value, int):
        return rng.choice([value, value, 1, 10**30] if key == "size" else [value, value, 0, -1, 10**30, 10**7])
    return value


@needs_page
@pytest.mark.parametrize("seed", range(2))
def test_any_number_is_borne(seed: int, tmp_path: Path) -> None:
    doc = copy.deepcopy(scrambled(example(), random.Random(seed)))
    for row in doc["rows"]:
        row["tensors"] = row["tensors"][:: 5 + seed]
    write_report(doc, tmp_path)
    assert not re.search(r"\b(nan|inf)\b", Page((tmp_path / "index.html").read_text("utf-8")).text)
    assert printed(doc)


@needs_page
def test_labels_of_many_points_do_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    from ptqtp_gguf.compare import plots

    boxes: list[Any] = []
    finish = plots._finish

    def measured(figure: Any, *words: str) -> Any:
        axes = figure.axes[0]
        boxes.extend(t.get_window_extent() for t in axes.texts if t.get_text())
        boxes.append(figure.bbox.frozen())
        return finish(figure, *words)

    monkeypatch.setattr(plots, "_finish", measured)
    rng = random.Random(1)
    rows = [
        {"kind": "stock" if i % 4 else "ours", "label": f"Type {i} imatrix"[: 6 + i % 10], "size": int(size * 1e6)}
        | {"quality": {"kld": math.exp(rng.gauss(9 - size / 10, 0.4))}}
        for i, size in enumerate(rng.uniform(60, 140) for _ in range(18))
    ]
    rows = [row | {"label": f"{row['label']}{i}"} for i, row in enumerate(rows)]
    doc = {"schema": 1, "model": {"name": "tiny"}, "machine": {"cpu": "any"}, "rows": rows}
    plots.draw(read_document(doc), [plots.kld_over_size])
    *boxes, frame = boxes
    assert len(boxes) == 18
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    assert all(frame.x0 <= b.x0 and b.x1 <= frame.x1 and frame.y0 <= b.y0 and b.y1 <= frame.y1 for b in boxes)


def test_experts_of_a_block_are_one_cell() -> None:
    from ptqtp_gguf.compare.plots import block_errors

    row = example()["rows"][1]
    row["tensors"] = [
        {"name": "blk.3.ffn_up.weight", "block": 3, "weights": 100, "rel_mse": 0.01},
        {"name": "blk.3.ffn_up.weight", "block": 3, "weights": 300, "rel_mse": 0.05},
        {"name": "blk.3.attn_norm.weight", "block": 3, "weights": 5, "rel_mse": None},
        {"name": "output.weight", "block": None, "weights": 5, "rel_mse": 0.5},
    ]
    doc = read_document({**example(), "rows": [row]})
    assert block_errors(doc.rows[0]) == {("ffn_up", 3): pytest.approx(0.04)}
    assert {m for m, _ in block_errors(read_document(example()).rows[1])} == set(MATRICES)


# ---- in a browser ----

OVERFLOWS = """() => {
  const width = document.documentElement.clientWidth, found = [];
  for (const e of document.querySelectorAll('body *')) {
    const box = e.getBoundingClientRect();
    if (!box.width || e.closest('svg') && e.tagName !== 'svg') continue;
    let p = e.parentElement, clip = null;
    while (p && !clip) { if (getComputedStyle(p).overflowX !== 'visible') clip = p; p = p.parentElement; }
    if (!clip && (box.right > width + 0.5 || box.left < -0.5)) found.push(e.tagName + ' ' + box.right);
  }
  return found; }"""
CONTRASTS = """() => {
  const rgba = c => { const m = c.match(/[\\d.]+/g).map(Number); return m.length > 3 ? m : [...m, 1]; };
  const linear = v => v <= .03928 * 255 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
  const light = c => { const [r, g, b] = c.map(linear);
    return .2126 * r + .7152 * g + .0722 * b; };
  const found = {};
  for (const e of document.querySelectorAll('main *')) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    const style = getComputedStyle(e);
    let p = e, under = [0, 0, 0, 0];
    while (p && !under[3]) { under = rgba(getComputedStyle(p).backgroundColor); p = p.parentElement; }
    const a = light(rgba(e.tagName === 'text' ? style.fill : style.color).slice(0, 3)), b = light(under.slice(0, 3));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    const key = e.tagName + '.' + e.getAttribute('class');
    found[key] = Math.min(found[key] ?? 99, ratio);
  }
  return found; }"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    pytest.importorskip("matplotlib", reason="the page needs matplotlib")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not found:
        pytest.skip("no chromium, chromium-browser or google-chrome on this machine")
    with sync.sync_playwright() as p:
        started = p.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [(390, 800), (1280, 900)])
def test_in_a_browser(browser: Any, folder: Path, tmp_path: Path, size: tuple[int, int], theme: str) -> None:
    from PIL import Image

    complaints: list[str] = []
    asked: list[str] = []
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=theme)
    page = context.new_page()
    page.on("console", lambda m: complaints.append(m.text))
    page.on("pageerror", lambda e: complaints.append(str(e)))
    page.on("request", lambda r: asked.append(r.url))
    page.goto((folder / "index.html").as_uri())
    assert not complaints and all(url.startswith(("file:", "data:")) for url in asked)
    scroll, client = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert scroll <= client and page.evaluate(OVERFLOWS) == []
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 15 and not {k: v for k, v in contrasts.items() if v < 4.5}
    for svg in page.query_selector_all("figure svg"):
        box = svg.bounding_box()
        assert box["width"] > 300 and box["height"] > 100
    page.screenshot(path=tmp_path / "page.png", full_page=True, timeout=180_000)  # 30 s are too few on a busy machine
    image = Image.open(tmp_path / "page.png").convert("RGB")
    assert image.width == size[0] and len(image.getcolors(1 << 24) or []) > 100
    corner = sum(image.getpixel((2, 2)))
    assert corner > 700 if theme == "light" else corner < 100
    figure = page.query_selector("#kld-over-size svg").screenshot()
    colours = Image.open(io.BytesIO(figure)).convert("RGB").getcolors(1 << 24) or []
    blue = {"light": (10, 95, 194), "dark": (111, 177, 255)}[theme]
    assert len(colours) > 20 and any(c == blue for _, c in colours)
    context.close()


def test_hostile_page_runs_nothing(browser: Any, hostile: tuple[Path, dict[str, Any]]) -> None:
    page = browser.new_page()
    said: list[str] = []
    page.on("dialog", lambda d: (said.append(d.message), d.dismiss()))
    page.on("console", lambda m: said.append(m.text))
    page.goto((hostile[0] / "index.html").as_uri())
    assert not said and page.evaluate("document.scripts.length") == 0
    page.close()


def test_prints(browser: Any, folder: Path) -> None:
    page = browser.new_page(color_scheme="dark")
    page.goto((folder / "index.html").as_uri())
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.close()
