"""Medians, their intervals, ratios paired by round: by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest

from ptqtp_gguf.measure.statistics import ratios, spread


@pytest.mark.parametrize(
    ("n", "low", "high", "confidence"),  # 1 - 2 * (binomial tail below k) / 2^n, by hand
    [
        (1, 1, 1, 0.0),
        (3, 1, 3, 0.75),
        (5, 1, 5, 0.9375),
        (7, 1, 7, 126 / 128),
        (8, 2, 7, 238 / 256),
        (11, 3, 9, 1914 / 2048),
    ],
)
def test_interval_of_a_median(n: int, low: int, high: int, confidence: float) -> None:
    samples = list(range(1, n + 1))
    random.Random(n).shuffle(samples)
    s = spread(samples)
    assert (s.median, s.low, s.high) == ((n + 1) / 2, low, high)
    assert s.confidence == pytest.approx(confidence)


def test_interval_holds_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    for n in (5, 9):
        found = [spread(list(rng.exponential(size=n))) for _ in range(2000)]
        inside = np.mean([s.low <= np.log(2) <= s.high for s in found])
        assert abs(inside - found[0].confidence) < 0.03
        assert found[0].confidence >= 0.9


def test_ratios_are_paired_by_round() -> None:
    drifting = [100.0, 50.0, 25.0, 80.0, 10.0]  # the machine; ours is 1.1 times as fast in each round
    ratio = ratios([1.1 * x for x in drifting], drifting)
    assert ratio.low == pytest.approx(1.1) and ratio.high == pytest.approx(1.1) and ratio.clear
    assert not ratios([2.0, 2.0, 2.0, 2.0, 1.9], [1.0, 1.0, 1.0, 1.0, 2.0]).clear  # one round the other way
    assert not ratios([2.0] * 4, [1.0] * 4).clear  # four rounds never suffice
    assert ratios([0.5] * 5, [1.0] * 5).clear
