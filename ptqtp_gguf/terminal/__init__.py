"""Everything that is printed: progress, plans, tables, JSON lines."""

from __future__ import annotations

from .comparison import print_comparison
from .console import (
    Bar,
    JsonLines,
    err_console,
    event,
    line,
    out_console,
    plan_dict,
    print_likeness,
    print_plan,
    print_summary,
    print_verdict,
    right,
    summary_dict,
    verdict_dict,
    whole,
)
from .inspect import Sort, print_difference, print_histograms, print_report, print_tensors, print_text

__all__ = [
    "Bar",
    "JsonLines",
    "Sort",
    "err_console",
    "event",
    "line",
    "out_console",
    "plan_dict",
    "print_comparison",
    "print_difference",
    "print_histograms",
    "print_likeness",
    "print_plan",
    "print_report",
    "print_summary",
    "print_tensors",
    "print_text",
    "print_verdict",
    "right",
    "summary_dict",
    "verdict_dict",
    "whole",
]
