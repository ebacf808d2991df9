"""A unit of 32 weights: where each of them lies."""

from __future__ import annotations

import numpy as np

from ptqtp_gguf.codec.unit import LAST, PAIR01, PAIR23, UNIT


def test_every_weight_of_a_unit_has_one_slot() -> None:
    slots = [*np.ravel(PAIR01), *np.ravel(PAIR23), *LAST]
    assert sorted(slots) == list(range(UNIT))
