"""The page of a comparison: it bears any document, stands alone, and works in a browser."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
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
from report_document import HOSTILE, attacked, example, gaps, printed

from ptqtp_gguf.compare.page import write_report
from ptqtp_gguf.errors import OutputError

needs_page = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("matplotlib", "jinja2"))),
    reason="the page needs matplotlib and jinja2",
)


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
    pixel = image.getpixel((2, 2))
    assert isinstance(pixel, tuple)
    corner = sum(pixel)
    assert corner > 700 if theme == "light" else corner < 100
    figure = page.query_selector("#kld-over-size svg").screenshot()
    colours = Image.open(io.BytesIO(figure)).convert("RGB").getcolors(1 << 24) or []
    blue = {"light": (10, 95, 194), "dark": (111, 177, 255)}[theme]
    assert len(colours) > 20 and any(c == blue for _, c in colours)
    context.close()


def test_hostile_page_runs_nothing(browser: Any, hostile: tuple[Path, dict[str, Any]]) -> None:
    page = browser.new_page()
    said: list[str] = []

    def dismiss(dialog: Any) -> None:
        said.append(dialog.message)
        dialog.dismiss()

    page.on("dialog", dismiss)
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
