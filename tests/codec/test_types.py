"""One layout, three witnesses: Python, C, and gguf-py's size table."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from ptqtp_gguf.codec import native
from ptqtp_gguf.codec import types as fmt
from ptqtp_gguf.codec.tensor_type import TensorType
from ptqtp_gguf.codec.tp2_0 import TP2_0
from ptqtp_gguf.codec.tp2_1 import TP2_1
from ptqtp_gguf.codec.tp2_2 import TP2_2
from ptqtp_gguf.codec.unit import UNIT, UNIT_BYTES
from ptqtp_gguf.files import gguf as gguf_io


def scale_size(t: TensorType) -> int:
    return t.scales * np.dtype(t.scale_dtype).itemsize


@pytest.mark.parametrize("t", fmt.TYPES.values(), ids=lambda t: t.name)
def test_sizes_agree(t: TensorType) -> None:
    gguf_io.register_types()
    gguf_io.register_types()  # twice does no harm
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(t.id)] == (t.block, t.size)
    assert gguf.GGMLQuantizationType(t.id).name == t.name
    assert t.bpw == 3.5


def test_ids_are_free_in_gguf_py_and_high() -> None:
    stock = [int(t) for t in gguf.GGMLQuantizationType if t.name not in fmt.BY_NAME]
    assert max(stock) < min(fmt.TYPES)


def test_the_c_table_has_the_same_rows() -> None:
    """A type that stands in one table only, or with other numbers, would be read as something else."""
    ours = [
        (t.id, t.name, t.since, t.block, t.group, t.size, t.planes, scale_size(t), t.reach) for t in fmt.TYPES.values()
    ]
    assert [tuple(row) for row in native.types()] == ours
    assert len(fmt.BY_NAME) == len(fmt.TYPES) == len({t.id for t in fmt.TYPES.values()})


def test_format_versions() -> None:
    assert fmt.format_version([]) == fmt.format_version([TP2_0, TP2_1]) == 1
    assert fmt.format_version(t for t in (TP2_1, TP2_2, TP2_0)) == fmt.format_version(fmt.TYPES.values()) == 2
    assert fmt.FORMAT_VERSION == 2


@pytest.mark.parametrize("t", fmt.TYPES.values(), ids=lambda t: t.name)
def test_a_row_is_consistent(t: TensorType, rng: np.random.Generator) -> None:
    assert t.block % UNIT == 0 and t.block % t.group == 0 and t.size == t.block // UNIT * UNIT_BYTES
    assert scale_size(t) * t.block // t.group == t.block // UNIT  # the side bytes
    assert bool(t.levels) == bool(t.to_levels) == bool(t.from_levels)
    if t.to_levels and t.from_levels:
        equal = np.arange(9, dtype=np.uint8).repeat(2 * UNIT).reshape(9, -1)
        digits = np.concatenate([equal, rng.integers(0, 9, (500, 2 * UNIT), dtype=np.uint8)])
        levels = t.to_levels(digits)
        assert levels.dtype == np.int8 and set(np.unique(levels).tolist()) == set(t.levels)
        assert np.array_equal(t.from_levels(levels), digits)
        one = np.full(t.scale_shape(*digits.shape), 0xF0, t.scale_dtype)
        assert np.array_equal(t.weights(digits, one), levels)
        assert t.reach == pytest.approx(t.max_level * 1.9375)
        assert not t.q4_0_twin or max(abs(v) for v in t.levels) <= 7
