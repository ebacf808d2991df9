"""Look at a file and judge it: contents, histograms, errors, differences, soundness."""

from __future__ import annotations

from .check import Verdict, check_file, intact, verify
from .contents import FEW, TEMPLATE, Report, inspect, plain
from .diff import SHOWN, Difference, TensorDifference, TensorError, difference, tensor_errors
from .histograms import DIGIT_VALUES, TRIT_VALUES, PlaneStatistics, Statistics, plane_statistics

__all__ = [
    "DIGIT_VALUES",
    "FEW",
    "SHOWN",
    "TEMPLATE",
    "TRIT_VALUES",
    "Difference",
    "PlaneStatistics",
    "Report",
    "Statistics",
    "TensorDifference",
    "TensorError",
    "Verdict",
    "check_file",
    "difference",
    "inspect",
    "intact",
    "plain",
    "plane_statistics",
    "tensor_errors",
    "verify",
]
