"""One layout, three witnesses: Python, C, and gguf-py's size table."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from ptqtp_gguf.codec import native
from ptqtp_gguf.codec import types as fmt
from ptqtp_gguf.codec.tensor_type import TensorType
from ptqtp_gguf.codec.unit import UNIT, UNIT_BYTES
from ptqtp_gguf.files import gguf as gguf_io


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
        (t.id, t.name, t.block, t.group, t.size, t.planes, t.scales * np.dtype(t.scale_dtype).itemsize, t.reach)
        for t in fmt.TYPES.values()
    ]
    assert [tuple(row) for row in native.types()] == ours
    assert len(fmt.BY_NAME) == len(fmt.TYPES) == len({t.id for t in fmt.TYPES.values()})


@pytest.mark.parametrize("t", fmt.TYPES.values(), ids=lambda t: t.name)
def test_a_row_is_consistent(t: TensorType) -> None:
    assert t.block % UNIT == 0 and t.block % t.group == 0 and t.size == t.block // UNIT * UNIT_BYTES
    assert t.scales * np.dtype(t.scale_dtype).itemsize * t.block // t.group == t.block // UNIT  # the side bytes
    assert bool(t.levels) == bool(t.to_levels) == bool(t.from_levels)
    if t.to_levels and t.from_levels:
        digits = np.arange(9, dtype=np.uint8).repeat(2 * UNIT).reshape(9, -1)
        assert set(np.unique(t.to_levels(digits)).tolist()) <= set(t.levels)
        assert np.array_equal(t.from_levels(t.to_levels(digits)), digits)
        assert t.reach == pytest.approx(t.max_level * 1.9375)
        assert not t.q4_0_twin or max(abs(v) for v in t.levels) <= 7
