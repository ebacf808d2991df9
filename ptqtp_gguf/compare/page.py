"""A comparison as a folder: a page that needs nothing but itself, its figures, and the document behind it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import InputError, OutputError
from ..files import partial_file, system_errors
from . import findings
from .document import Document, Row, as_json, read_document
from .plots import Plot, draw

INSTALL = "pip install 'ptqtp-gguf[report]'"


def check_tools() -> None:
    """Refuse early where a page cannot be made. Raises OutputError."""
    for name in ("jinja2", "matplotlib"):
        try:
            __import__(name)
        except ImportError:
            raise OutputError(f"report: {name} is not installed, so there is no page; {INSTALL}") from None


def write_report(document: Document | Mapping[str, object], folder: Path) -> list[Path]:
    """Write report.json, the figures (PNG, SVG) and index.html into a folder, which is made; returns the files.

    document: of this run, or decoded from a report.json, whose unknown keys are written too.
    Files of these names are replaced, each whole or not at all, report.json first. Raises InputError for a document
    that is none (see document.py), OutputError where a file cannot be written or a package for the page is missing;
    report.json is written all the same in the latter case.
    """
    doc = read_document(document)
    files = [write_json(document, folder)]
    try:
        check_tools()
    except OutputError as e:
        raise OutputError(f"{e}; {files[0]} is written") from None
    plots = draw(doc)
    page = render(doc, plots)
    with system_errors(folder):
        (folder / "index.html").unlink(missing_ok=True)  # written last: where it is, the report is whole
    for plot in plots:
        files += [_write(folder / f"{plot.name}.svg", plot.svg), _write(folder / f"{plot.name}.png", plot.png)]
    return [_write(folder / "index.html", page.encode()), *files]


def write_json(document: Document | Mapping[str, object], folder: Path) -> Path:
    """Write the document as report.json into a folder, which is made. Raises InputError, OutputError."""
    read_document(document)
    found = as_json(document) if isinstance(document, Document) else document
    try:
        text = json.dumps(found, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as e:
        raise InputError(f"comparison: cannot be written as JSON: {e}") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OutputError(f"{folder}: cannot make this folder: {e.strerror}") from None
    return _write(folder / "report.json", text.encode())


def _write(path: Path, data: bytes) -> Path:
    with partial_file(path) as partial:
        partial.file.write(data)
        partial.sync()
        partial.publish()
    return path


def render(doc: Document, plots: list[Plot]) -> str:
    """The page. Every text of the document is escaped; only the figures' SVG is taken as it is."""
    import jinja2
    from markupsafe import Markup

    env = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters["sig"], env.filters["times"] = findings.significant, findings.times
    env.filters["count"], env.filters["percent"] = findings.count, findings.percent
    source = resources.files(__package__) / "data" / "report.html"
    template = env.from_string(source.read_text("utf-8"))
    pair = findings.headline(doc)
    ordered = findings.ordered(doc)
    every = findings.verdicts(doc)
    unit, unit_name = findings.size_unit(doc)
    return template.render(
        doc=doc,
        ordered=ordered,
        verdicts=every,
        table=findings.main_table(doc),
        perplexity=findings.perplexity_sentence(doc),
        unit=unit,
        unit_name=unit_name,
        frontier=findings.frontier_sentence(doc, pair[0]) if pair else "",
        speeds=speeds(doc),
        ours=pair[0].label if pair else "ours",
        quantiles=[r for r in ordered if r.quality and r.quality.kld is not None],
        generation=[(r, said) for r in ordered if (said := findings.generation_sentences(r))],
        plots=[{"plot": p, "svg": Markup(p.inline)} for p in plots],
    )


def speeds(doc: Document) -> list[dict[str, Any]]:
    """All speeds, a group a test and number of threads: its title; lines of row, speed, ratio by the first of ours."""
    rows: list[Row] = [*doc.of_kind("reference"), *findings.ordered(doc)]
    keys = sorted({(s.n_gen > 0, s.test, s.threads) for r in rows for s in r.speed}, key=lambda k: (not k[0], *k[1:]))
    ours = doc.of_kind("ours")[:1]
    groups = []
    for _, test, threads in keys:
        found = [(r, s) for r in rows if (s := findings.speed_of(r, (test, threads)))]
        ratios = [ours[0].ratios.get(r.label, {}).get(f"{test} t{threads}") if ours else None for r, _ in found]
        lines = [{"row": r, "speed": s, "ratio": ratio} for (r, s), ratio in zip(found, ratios, strict=True)]
        groups.append({"title": f"{test}, {findings.plural(threads, 'thread')}", "lines": lines})
    return groups
