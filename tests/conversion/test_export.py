"""The Q4_0 twin: the same weights, bit for bit, as gguf-py dequantizes them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from helpers import write_gguf

from ptqtp_gguf.codec.reference import dequantize, pack
from ptqtp_gguf.codec.tp2_1 import TP2_1
from ptqtp_gguf.conversion.export import export_q4_0, to_q4_0
from ptqtp_gguf.conversion.pipeline import convert
from ptqtp_gguf.errors import InputError, OutputError
from ptqtp_gguf.files.gguf import Reader
from ptqtp_gguf.plan.options import Options


def test_every_scale_code_and_digit_is_exact(rng: np.random.Generator) -> None:
    digits = np.tile(np.arange(32, dtype=np.uint8) % 9, (256, 1))
    packed = pack(TP2_1, digits, np.arange(256, dtype=np.uint8)[:, None])
    twin = gguf.quants.dequantize(to_q4_0(TP2_1, packed), gguf.GGMLQuantizationType.Q4_0)
    assert np.array_equal(twin, dequantize(TP2_1, packed))
    assert np.all(twin[:, 4] == 0) and np.all(twin[:, 8] > 0)


def test_a_whole_file(tiny_gguf: Path, tmp_path: Path) -> None:
    ours, twin = tmp_path / "ours.gguf", tmp_path / "twin.gguf"
    convert(tiny_gguf, ours)
    summary = export_q4_0(ours, twin)
    assert summary.size == twin.stat().st_size
    stock = gguf.GGUFReader(twin)  # as it comes, without our types
    kinds = {t.name: t.tensor_type.name for t in stock.tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["blk.0.ffn_gate_exps.weight"] == "Q4_0"
    assert stock.get_field("general.file_type").contents() == 2
    assert stock.get_field("ptqtp.method").contents() == "search"
    assert stock.get_field("ptqtp.format_version") is None
    with Reader(ours) as a:
        for t in stock.tensors:
            ours_t = a.by_name[t.name]
            assert np.array_equal(
                gguf.quants.dequantize(t.data, t.tensor_type).reshape(-1, ours_t.shape[0]), a.rows_f32(ours_t)
            )
    with pytest.raises(OutputError, match="exists already"):
        export_q4_0(ours, twin)
    with pytest.raises(OutputError, match="same file"):
        export_q4_0(ours, ours, force=True)


def test_files_without_a_twin(tmp_path: Path, rng: np.random.Generator) -> None:
    source = write_gguf(tmp_path / "a.gguf", {"blk.0.a.weight": rng.normal(size=(4, 128)).astype(np.float32)})
    with pytest.raises(InputError, match="no TP2_1 tensor"):
        export_q4_0(source, tmp_path / "b.gguf")
    convert(source, tmp_path / "free.gguf", Options(type="TP2_0"))
    with pytest.raises(InputError, match=r"tensor blk\.0\.a\.weight is TP2_0; its free scales have no exact Q4_0 twin"):
        export_q4_0(tmp_path / "free.gguf", tmp_path / "b.gguf")
