"""The error of one tensor where its values have none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import write_gguf

from ptqtp_gguf.errors import InputError
from ptqtp_gguf.files.gguf import TYPE_IDS, OutTensor, kv_string, write_stream
from ptqtp_gguf.inspect.diff import difference
from ptqtp_gguf.inspect.tensor_error import Meter, decodable
from ptqtp_gguf.source.gguf import GgufSource


def test_values_without_an_error(tmp_path: Path) -> None:
    """A reference of zeros, NaN, and types that nobody decodes: no number, and no crash."""
    zero, one = np.zeros((4, 32), np.float32), np.ones((4, 32), np.float32)
    nan = np.full((4, 32), np.nan, np.float32)
    a = write_gguf(tmp_path / "a.gguf", {"a.weight": zero, "b.weight": zero, "c.weight": one, "d.weight": nan})
    b = write_gguf(tmp_path / "b.gguf", {"a.weight": zero, "b.weight": one, "c.weight": nan, "d.weight": nan})
    found = {t.name[0]: (t.rel_mse, t.max_abs, t.identical) for t in difference(a, b).tensors}
    assert found == {"a": (0, 0, True), "b": (None, 1, False), "c": (None, None, False), "d": (None, 0, True)}
    json.dumps(difference(a, b).as_dict(), allow_nan=False)
    kind = TYPE_IDS["I32"]
    assert not decodable(kind) and decodable(TYPE_IDS["Q4_K"]) and decodable(TYPE_IDS["TP2_0"])
    for name, last in (("i", 0), ("j", 0), ("k", 1)):
        with (tmp_path / f"{name}.gguf").open("wb") as f:
            data = np.full((1, 32), last, "<i4").view(np.uint8)
            list(
                write_stream(
                    f, [kv_string("general.architecture", "x")], [OutTensor("x", (32,), kind)], 32, iter([data])
                )
            )
    same, other = (difference(tmp_path / "i.gguf", tmp_path / f"{x}.gguf") for x in "jk")
    assert not same.differs and other.differs and other.tensors[0].rel_mse is None and other.roles[0].rel_mse is None
    with GgufSource(tmp_path / "i.gguf") as x, Meter(1) as meter, pytest.raises(InputError, match="I32"):
        meter.distance(x, x.tensors[0], x, x.tensors[0])
