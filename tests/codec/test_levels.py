"""Levels and digits by the library, as the numpy functions of the types give them."""

from __future__ import annotations

import numpy as np
import pytest

from ptqtp_gguf.codec import native
from ptqtp_gguf.codec.tensor_type import TensorType
from ptqtp_gguf.codec.tp2_0 import TP2_0
from ptqtp_gguf.codec.tp2_1 import LEVELS, TP2_1
from ptqtp_gguf.codec.tp2_2 import MAX_LEVEL, TP2_2
from ptqtp_gguf.codec.unit import UNIT
from ptqtp_gguf.errors import QuantizeError

SHAPES = [(1, 32), (3, 96), (5, 65_536 // 5 // UNIT * UNIT), (65, 1024), (100_000,), (1, 2, 64), (0, 64)]
both = pytest.mark.parametrize("t", [TP2_1, TP2_2], ids=lambda t: t.name)
threads = pytest.mark.parametrize("threads", [1, 3])


def reference(t: TensorType, levels: np.ndarray) -> np.ndarray:
    """Digits by numpy, which asks for levels of TP2_1 within its range."""
    assert t.from_levels
    if t is TP2_1:
        return np.where(np.abs(levels.astype(int)) <= 5, t.from_levels(np.clip(levels, -5, 5)), 255).astype(np.uint8)
    return t.from_levels(levels)


@both
@threads
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_valid_units(t: TensorType, threads: int, shape: tuple[int, ...], rng: np.random.Generator) -> None:
    assert t.to_levels
    digits = rng.integers(0, 9, shape, dtype=np.uint8)
    levels = native.levels_of_digits(t, digits, threads)
    assert levels.dtype == np.int8 and levels.shape == shape and np.array_equal(levels, t.to_levels(digits))
    back = native.digits_of_levels(t, levels, threads)
    assert back.dtype == np.uint8 and back.shape == shape and np.array_equal(back, digits)


@both
@threads
@pytest.mark.parametrize("most", [1, 2, 3, MAX_LEVEL, 7, 127])
def test_any_levels(t: TensorType, threads: int, most: int, rng: np.random.Generator) -> None:
    """And among small levels, which always have digits of TP2_2, one that is larger."""
    for n in (UNIT, 100_000):
        levels = rng.integers(-most - (most == 127), most + 1, n).astype(np.int8)
        assert np.array_equal(native.digits_of_levels(t, levels, threads), reference(t, levels))
    units = rng.integers(-2, 3, (3000, UNIT)).astype(np.int8)
    units[np.arange(3000), rng.integers(0, UNIT, 3000)] = rng.integers(-most, most + 1, 3000)
    digits = native.digits_of_levels(t, units, threads)
    assert np.array_equal(digits, reference(t, units))
    if t is TP2_2:
        none = (digits == 255).any(axis=1)
        assert (digits[none] == 255).all() and none.any() == (most > 2)


def test_a_level_at_every_place() -> None:
    """Each of 256 at each place of a unit, alone: what a place adds to the end of the lap."""
    each = np.arange(-128, 128).astype(np.int8)
    units = np.zeros((UNIT, 256, UNIT), np.int8)
    units[np.arange(UNIT), :, np.arange(UNIT)] = each
    digits = native.digits_of_levels(TP2_2, units)
    assert np.array_equal(digits, reference(TP2_2, units)) and (digits[:, np.abs(each.astype(int)) <= 2] <= 8).all()
    alone = native.digits_of_levels(TP2_1, each)
    assert np.array_equal(alone <= 8, np.isin(each, LEVELS)) and (alone[~np.isin(each, LEVELS)] == 255).all()


@both
def test_slices_are_taken(t: TensorType, rng: np.random.Generator) -> None:
    digits = rng.integers(0, 9, (64, 256), dtype=np.uint8)
    levels = native.levels_of_digits(t, digits[::3, 32:96])
    assert np.array_equal(levels, native.levels_of_digits(t, digits[::3, 32:96].copy()))
    assert np.array_equal(native.digits_of_levels(t, np.asfortranarray(levels)), digits[::3, 32:96])


@both
def test_what_is_refused(t: TensorType) -> None:
    zeros = np.full((2, 64), 4, np.uint8)
    for shape in ((31,), (33,), (2, 48), ()):
        with pytest.raises(QuantizeError, match="a multiple of 32"):
            native.levels_of_digits(t, np.zeros(shape, np.uint8))
        with pytest.raises(QuantizeError, match="a multiple of 32"):
            native.digits_of_levels(t, np.zeros(shape, np.int8))
    with pytest.raises(QuantizeError, match="int64; int8"):
        native.digits_of_levels(t, zeros.astype(np.int64))
    with pytest.raises(QuantizeError, match="int8; uint8"):
        native.levels_of_digits(t, zeros.view(np.int8))
    with pytest.raises(QuantizeError, match="a type with levels is needed"):
        native.levels_of_digits(TP2_0, np.zeros((1, 128), np.uint8))
    for digit in (9, 255):
        zeros[1, 40] = digit
        with pytest.raises(QuantizeError, match="digit above 8"):
            native.levels_of_digits(t, zeros)
