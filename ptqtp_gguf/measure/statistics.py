"""Medians, and how far to trust them: intervals by order statistics, which assume nothing of how noise is spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from statistics import median

CONFIDENCE = 0.9  # an interval holds the true median at least that often, if there are samples enough
ENOUGH = 5  # samples from which one can


@dataclass(frozen=True)
class Spread:
    """A median of samples and the interval of it."""

    median: float
    low: float
    high: float
    confidence: float  # how often such an interval holds the true median, if the samples are independent

    @property
    def clear(self) -> bool:
        """Of a ratio: it is not 1."""
        return self.confidence >= CONFIDENCE and not self.low <= 1 <= self.high

    @property
    def width(self) -> float:
        """high over low."""
        return self.high / self.low


def spread(samples: Sequence[float]) -> Spread:
    """Median and interval of at least one sample: the k-th smallest to the k-th largest, k as large as CONFIDENCE lets;
    smallest and largest for fewer than 8 samples, and with less confidence for fewer than 5.

    A true median lies outside if fewer than k of n samples fall to one side of it, each with probability 1/2.
    """
    ordered = sorted(samples)
    n, k = len(ordered), 1
    while 2 * k + 2 <= n and _confidence(n, k + 1) >= CONFIDENCE:
        k += 1
    return Spread(median(ordered), ordered[k - 1], ordered[n - k], _confidence(n, k))


def _confidence(n: int, k: int) -> float:
    outside: int = sum(comb(n, i) for i in range(k))
    return max(0.0, 1 - 2.0 * outside / 2.0**n)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """ours over theirs, sample by sample: those of a round belong together, and drift of the machine cancels."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])
