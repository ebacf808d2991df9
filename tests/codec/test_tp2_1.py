"""TP2_1: its levels and its scale codes."""

from __future__ import annotations

import numpy as np

from ptqtp_gguf.codec import native
from ptqtp_gguf.codec.tp2_1 import LEVELS, scale_from_float, scale_to_float


def test_levels_follow_from_the_digits() -> None:
    assert [3 * (d // 3 - 1) + 2 * (d % 3 - 1) for d in range(9)] == list(LEVELS)


def test_scale_codes() -> None:
    codes = np.arange(256, dtype=np.uint8)
    values = scale_to_float(codes)
    assert values[0] == 2.0**-15 and values[-1] == 1.9375
    assert np.array_equal(values, [(1 + c % 16 / 16) * 2.0 ** (c // 16 - 15) for c in range(256)])
    assert np.array_equal(scale_from_float(values), codes)
    probe = np.concatenate([values, (values[1:] + values[:-1]) / 2, np.array([0, -1, 1e-9, 5, np.inf], np.float32)])
    probe = np.concatenate([probe, np.nextafter(probe, np.float32(0)), np.nextafter(probe, np.float32(9))])
    assert scale_from_float(probe).tolist() == [native.scale_from_float(float(x)) for x in probe]
