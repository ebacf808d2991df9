"""One layout, three witnesses: Python, C, and gguf-py's size table."""

from __future__ import annotations

import gguf
import pytest

from ptqtp_gguf.codec import native
from ptqtp_gguf.codec import types as fmt
from ptqtp_gguf.codec.tensor_type import TensorType
from ptqtp_gguf.files import gguf as gguf_io


@pytest.mark.parametrize("t", fmt.TYPES.values(), ids=lambda t: t.name)
def test_sizes_agree(t: TensorType) -> None:
    assert native.sizes(t) == (t.block, t.size)
    gguf_io.register_types()
    gguf_io.register_types()  # twice does no harm
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(t.id)] == (t.block, t.size)
    assert gguf.GGMLQuantizationType(t.id).name == t.name
    assert t.bpw == 3.5


def test_ids_are_free_in_gguf_py_and_high() -> None:
    stock = [int(t) for t in gguf.GGMLQuantizationType if t.name not in fmt.BY_NAME]
    assert max(stock) < min(fmt.TYPES)
