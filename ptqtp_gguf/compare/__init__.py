"""From candidates to a report: files made, measured, written into one document, and what its numbers say."""

from __future__ import annotations

from .document import Document, as_json, read_document
from .findings import frontier_sentence, generation_sentences, main_table, ordered, perplexity_sentence, verdicts
from .page import check_tools, write_report
from .run import PEERS, WINDOWS, Settings, Stopped, compare

__all__ = [
    "PEERS",
    "WINDOWS",
    "Document",
    "Settings",
    "Stopped",
    "as_json",
    "check_tools",
    "compare",
    "frontier_sentence",
    "generation_sentences",
    "main_table",
    "ordered",
    "perplexity_sentence",
    "read_document",
    "verdicts",
    "write_report",
]
