"""Look at a file and judge it: contents, histograms, errors, differences, soundness."""

from __future__ import annotations

from .check import Verdict, check_file, intact, verify
from .contents import FEW, TEMPLATE, Report, inspect, plain
from .diff import SHOWN, Difference, TensorDifference, TensorError, difference, tensor_errors
from .histograms import DIGIT_VALUES, TRIT_VALUES, PlaneStatistics, Statistics, plane_statistics
from .loading import Loading, ask_runtime

__all__ = [
    "DIGIT_VALUES",
    "FEW",
    "SHOWN",
    "TEMPLATE",
    "TRIT_VALUES",
    "Difference",
    "Loading",
    "PlaneStatistics",
    "Report",
    "Statistics",
    "TensorDifference",
    "TensorError",
    "Verdict",
    "ask_runtime",
    "check_file",
    "difference",
    "inspect",
    "intact",
    "plain",
    "plane_statistics",
    "tensor_errors",
    "verify",
]
