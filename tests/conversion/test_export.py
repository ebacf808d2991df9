"""The Q4_0 twin: the same weights, bit for bit, as gguf-py dequantizes them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from bench_models import write_llama
from helpers import rewritten, write_gguf

from ptqtp_gguf.codec import native
from ptqtp_gguf.codec.reference import dequantize, pack
from ptqtp_gguf.codec.tensor_type import TensorType
from ptqtp_gguf.codec.types import TYPES
from ptqtp_gguf.conversion.export import export_q4_0, to_q4_0
from ptqtp_gguf.conversion.pipeline import convert
from ptqtp_gguf.errors import InputError, OutputError
from ptqtp_gguf.files.gguf import Reader, kv_u32
from ptqtp_gguf.plan.options import Options

TWINS = [t for t in TYPES.values() if t.q4_0_twin]
each_twin = pytest.mark.parametrize("t", TWINS, ids=lambda t: t.name)


def test_which_types_have_a_twin() -> None:
    assert [t.name for t in TWINS] == ["TP2_1", "TP2_2"]


@each_twin
def test_every_scale_code_and_digit_is_exact(t: TensorType, rng: np.random.Generator) -> None:
    digits = np.tile(np.arange(32, dtype=np.uint8) % 9, (256, 4))
    digits[:, 32:] = rng.integers(0, 9, (256, 96))
    packed = pack(t, digits, np.arange(256, dtype=np.uint8)[:, None].repeat(4, axis=1))
    twin = to_q4_0(t, packed)
    values = gguf.quants.dequantize(twin, gguf.GGMLQuantizationType.Q4_0)
    assert np.array_equal(values, dequantize(t, packed)) and np.array_equal(values, native.dequantize(t, packed))
    assert t is TWINS[1] or (np.all(values[:, 4] == 0) and np.all(values[:, 8] > 0))
    codes = twin.reshape(-1, 18)[:, 2:]
    assert set((codes & 15).ravel()) | set((codes >> 4).ravel()) == {8 + level for level in t.levels}


@each_twin
def test_a_whole_file(t: TensorType, tiny_gguf: Path, tmp_path: Path) -> None:
    ours, twin = tmp_path / "ours.gguf", tmp_path / "twin.gguf"
    convert(tiny_gguf, ours, Options(type=t.name))
    summary = export_q4_0(ours, twin)
    assert summary.size == twin.stat().st_size
    stock = gguf.GGUFReader(twin)  # as it comes, without our types
    kinds = {t.name: t.tensor_type.name for t in stock.tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["blk.0.ffn_gate_exps.weight"] == "Q4_0"
    assert stock.get_field("general.file_type").contents() == 2
    assert stock.get_field("ptqtp.method").contents() == "search"
    assert stock.get_field("ptqtp.format_version") is None
    assert stock.get_field("ptqtp.export").contents() == f"Q4_0 twin of {t.name}, equal weights"
    with Reader(ours) as a:
        for other in stock.tensors:
            ours_t = a.by_name[other.name]
            assert kinds[other.name] == ("Q4_0" if ours_t.type == t.id else ours_t.type_name)
            assert np.array_equal(
                gguf.quants.dequantize(other.data, other.tensor_type).reshape(-1, ours_t.shape[0]), a.rows_f32(ours_t)
            )
    with pytest.raises(OutputError, match="exists already"):
        export_q4_0(ours, twin)
    with pytest.raises(OutputError, match="same file"):
        export_q4_0(ours, ours, force=True)


def test_a_file_of_both_types(tiny_gguf: Path, tmp_path: Path) -> None:
    ours, twin = tmp_path / "ours.gguf", tmp_path / "twin.gguf"
    convert(tiny_gguf, ours, Options(type="TP2_1", tensor_types=("ffn_down=TP2_2",)))
    export_q4_0(ours, twin)
    with Reader(ours) as a, Reader(twin) as b:
        assert {t.type_name for t in a.tensors} >= {"TP2_1", "TP2_2"}
        assert all(np.array_equal(a.rows_f32(t), b.rows_f32(b.by_name[t.name])) for t in a.tensors)
        assert not {t.type for t in b.tensors} & set(TYPES)
        assert b.header.kvs["ptqtp.export"].value() == "Q4_0 twin of TP2_1 and TP2_2, equal weights"


def test_files_without_a_twin(tmp_path: Path, rng: np.random.Generator) -> None:
    source = write_gguf(tmp_path / "a.gguf", {"blk.0.a.weight": rng.normal(size=(4, 128)).astype(np.float32)})
    with pytest.raises(InputError, match="no TP2_1 or TP2_2 tensor"):
        export_q4_0(source, tmp_path / "b.gguf")
    convert(source, tmp_path / "free.gguf", Options(type="TP2_0"))
    with pytest.raises(InputError, match=r"tensor blk\.0\.a\.weight is TP2_0; its free scales have no exact Q4_0 twin"):
        export_q4_0(tmp_path / "free.gguf", tmp_path / "b.gguf")


@pytest.mark.runtime
def test_a_file_that_the_runtime_does_not_load(tmp_path: Path) -> None:
    convert(write_llama(tmp_path / "a.gguf"), tmp_path / "ours.gguf")
    export_q4_0(tmp_path / "ours.gguf", tmp_path / "twin.gguf")
    bad = rewritten(tmp_path / "ours.gguf", tmp_path / "bad.gguf", [kv_u32("llama.block_count", 2)])
    with pytest.raises(
        InputError, match=r"cannot load this file, nor its twin: tensor 'blk\.1\.attn_norm\.weight' not"
    ):
        export_q4_0(bad, tmp_path / "b.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", "bad.gguf", "ours.gguf", "twin.gguf"]
