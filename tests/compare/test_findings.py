"""What the numbers of a comparison say."""

from __future__ import annotations

import math
from typing import Any

import pytest
import report_document
from report_document import example, gaps

from ptqtp_gguf.compare import findings
from ptqtp_gguf.compare.document import Document, read_document


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
