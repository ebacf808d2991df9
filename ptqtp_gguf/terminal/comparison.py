"""A comparison on the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ..compare import (
    Document,
    frontier_sentence,
    generation_sentences,
    main_table,
    ordered,
    perplexity_sentence,
    read_document,
    verdicts,
)
from .console import out_console


def print_comparison(document: Document | Mapping[str, object], console: Console | None = None) -> None:
    """Print verdict, table and warnings of a comparison. Raises InputError for a document that is none."""
    show(read_document(document), console or out_console)


def show(doc: Document, console: Console) -> None:
    def say(text: str, style: str = "") -> None:
        console.print(Text(_plain(text, console), style), soft_wrap=not console.is_terminal)

    for warning in doc.warnings:
        say(f"warning: {warning}", "yellow")
    console.print(_table(doc, console))
    if absent := main_table(doc).absent:
        say(f"not measured: {', '.join(absent)}")
    say("*: best of its column, or not clearly behind it; \u00b1: 95 % interval; sizes with all tensors counted")
    for i, verdict in enumerate(verdicts(doc)):
        say(verdict.sentence, "" if i else "bold")
    ours = doc.of_kind("ours")
    for text in (perplexity_sentence(doc), frontier_sentence(doc, ours[0]) if ours else ""):
        if text:
            say(text)
    for row in ordered(doc):
        if said := generation_sentences(row):
            say(f"{row.label} {'; '.join(said)}.")


def _table(doc: Document, console: Console) -> Table:
    found = main_table(doc)
    names = [_plain(f"{c.name}\n{c.detail}", console) for c in found.columns]
    heads = [Column(Text(name), justify="right", overflow="fold") for name in names]
    table = Table(
        Column(overflow="fold"), *heads, title=Text(_plain(doc.model.name, console), "bold"), title_justify="left"
    )
    for row, cells in found.rows:
        label = Text(_plain(row.label, console), {"ours": "bold", "reference": "dim"}.get(row.kind, ""))
        texts = []
        for cell in cells:
            half = _plain(f" \u00b1 {cell.half}", console) if cell.half else ""
            text = f"{cell.text}{half}{' *' if cell.best else ''}" if cell.text else "-"
            texts.append(Text(text, "bold" if cell.best else "dim" if row.kind == "reference" else ""))
        table.add_row(label, *texts, end_section=row.kind == "reference")
    return table


def _plain(text: str, console: Console) -> str:
    """For terminals that have ASCII only."""
    if not console.options.ascii_only:
        return text
    return text.replace("\u00b1", "+-").encode("ascii", "backslashreplace").decode()
