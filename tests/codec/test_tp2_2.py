"""TP2_2: levels and digits say the same, the third trit is what the chain makes of the second ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ptqtp_gguf.codec import native
from ptqtp_gguf.codec import reference as packing
from ptqtp_gguf.codec.tp2_2 import CHAIN, MAX_LEVEL, THIRD_OF_SUM, TP2_2, digits_of_levels, levels_of_digits
from ptqtp_gguf.codec.unit import UNIT
from ptqtp_gguf.errors import QuantizeError

ONE = 0xF0  # the code of scale 1


def native_levels(digits: np.ndarray) -> np.ndarray:
    """Levels (R, C) by the library."""
    codes = np.full((len(digits), digits.shape[1] // UNIT), ONE, np.uint8)
    return native.dequantize(TP2_2, native.pack(TP2_2, digits, codes)).astype(np.int8)


def test_the_chain_goes_through_every_weight_once() -> None:
    assert sorted(CHAIN.tolist()) == list(range(UNIT))
    assert [(v + 1) % 3 - 1 for v in range(-2, 3)] == THIRD_OF_SUM.tolist()


def test_what_a_second_trit_does_to_its_neighbours() -> None:
    """2 to its own weight, 1 to each of the two behind it; -1 where the chain has closed in between."""
    for c, i in enumerate(CHAIN):
        digits = np.full((1, UNIT), 4, np.uint8)
        digits[0, i] = 5
        want = np.zeros(UNIT, int)
        want[i] = 2
        for k in (1, 2):
            want[CHAIN[(c + k) % UNIT]] = 1 if c + k < UNIT else -1
        assert levels_of_digits(digits)[0].tolist() == native_levels(digits)[0].tolist() == want.tolist()


def test_levels_and_digits_are_inverse(rng: np.random.Generator) -> None:
    digits = rng.integers(0, 9, (2000, 4 * UNIT), dtype=np.uint8)
    digits[:9] = np.arange(9, dtype=np.uint8)[:, None]
    levels = levels_of_digits(digits)
    assert levels.dtype == np.int8 and np.array_equal(levels, native_levels(digits))
    assert set(np.unique(levels).tolist()) == set(TP2_2.levels) == set(range(-MAX_LEVEL, MAX_LEVEL + 1))
    assert np.array_equal(digits_of_levels(levels), digits)
    assert np.array_equal(digits_of_levels(levels.astype(np.int64)), digits)


def test_no_two_units_have_the_same_levels() -> None:
    """All 9^4 ways to end the chain, from which another start of the same levels would come."""
    ends = np.stack(np.meshgrid(*[np.arange(9)] * 4), axis=-1).reshape(-1, 4)
    digits = np.full((len(ends), UNIT), 4, np.uint8)
    digits[:, CHAIN[-4:]] = ends
    assert len(np.unique(levels_of_digits(digits), axis=0)) == 9**4


def test_levels_that_no_digits_give(rng: np.random.Generator) -> None:
    """Become 255, unit by unit; what the others hold stays, and nothing packs 255."""
    digits = rng.integers(0, 9, (300, 3 * UNIT), dtype=np.uint8)
    levels = levels_of_digits(digits)
    none = np.full(UNIT, MAX_LEVEL, np.int8)  # all 6 would need p = 1 behind two t2 = 1
    for bad in (none, -none, none * 0 + 7, np.where(np.arange(UNIT) == 9, 100, 0)):
        levels[:, UNIT : 2 * UNIT] = bad
        got = digits_of_levels(levels)
        assert (got[:, UNIT : 2 * UNIT] == 255).all()
        assert np.array_equal(got[:, :UNIT], digits[:, :UNIT]) and np.array_equal(got[:, -UNIT:], digits[:, -UNIT:])
        for pack in (packing.pack, native.pack):
            with pytest.raises(QuantizeError, match="digit"):
                pack(TP2_2, got, np.zeros((300, 3), np.uint8))


@given(hnp.arrays(np.int8, (1, UNIT), elements=st.integers(-MAX_LEVEL, MAX_LEVEL) | st.integers(-3, 3)))
@settings(max_examples=300, deadline=None)
def test_any_levels_have_their_digits_or_none(levels: np.ndarray) -> None:
    digits = digits_of_levels(levels)
    if (digits == 255).all():
        assert np.abs(levels).max() > 2
    else:
        assert np.array_equal(levels_of_digits(digits), levels)


def test_a_large_level_has_digits_where_the_chain_lets_it(rng: np.random.Generator) -> None:
    """Among levels up to 2, one of 3 to 6: p of its weight decides, and that follows from all others."""
    each = np.arange(4000)
    for large, share in ((3, 2 / 3), (4, 2 / 3), (5, 1 / 3), (6, 1 / 3)):
        levels = rng.integers(-2, 3, (4000, UNIT)).astype(np.int8)
        levels[each, rng.integers(0, UNIT, 4000)] = np.where(each % 2, large, -large)
        digits = digits_of_levels(levels)
        has = (digits != 255).all(axis=1)
        assert has.mean() == pytest.approx(share, abs=0.05) and (digits[~has] == 255).all()
        assert np.array_equal(levels_of_digits(digits[has]), levels[has])


def test_levels_up_to_2_always_have_digits(rng: np.random.Generator) -> None:
    for most in (1, 2):
        levels = rng.integers(-most, most + 1, (5000, 2 * UNIT)).astype(np.int8)
        levels[:5] = np.arange(-2, 3, dtype=np.int8)[:, None] * most // 2
        digits = digits_of_levels(levels)
        assert digits.max() <= 8
        assert np.array_equal(levels_of_digits(digits), levels) and np.array_equal(native_levels(digits), levels)
