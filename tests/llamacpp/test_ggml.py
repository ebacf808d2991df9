"""Stock types through the runtime's library: the bytes of llama-quantize, whatever the threads."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from ptqtp_gguf.errors import OutOfReach, QuantizeError, RuntimeMissing
from ptqtp_gguf.files import gguf as gguf_io
from ptqtp_gguf.files.gguf import GGML_TYPES, TYPE_IDS, Reader, type_name
from ptqtp_gguf.llamacpp import ggml, install

STOCK = sorted(ggml.WRITABLE - ggml.NEEDS_IMPORTANCE)
QUICK = [i for i in sorted(ggml.WRITABLE) if not type_name(i).startswith(("IQ1", "IQ2"))]  # their tables take 5 to 60 s
COLS = 512


def matrix(seed: int, rows: int = 24, cols: int = COLS) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_t(5, size=(rows, cols)) * 0.02).astype(np.float32)


def names(ids: object) -> list[str]:
    return [type_name(i) for i in ids]  # type: ignore[attr-defined]


@pytest.mark.runtime
def test_the_bytes_of_llama_quantize(tmp_path: Path) -> None:
    """One run of the stock tool over a model whose layers take every type in turn."""
    kinds = [
        i for i in STOCK if type_name(i) not in ("F32", "IQ2_S", "IQ1_M")
    ]  # F32 is the source; it wants an imatrix
    assert {"Q4_K", "Q6_K", "IQ4_XS", "IQ4_NL", "IQ3_S", "Q5_1", "TQ1_0"} <= set(names(kinds))
    source, out = tmp_path / "in.gguf", tmp_path / "out.gguf"
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(COLS)
    writer.add_block_count(len(kinds))
    writer.add_feed_forward_length(COLS)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(32)
    for i in range(len(kinds)):
        writer.add_tensor(f"blk.{i}.attn_q.weight", matrix(i))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    wanted = [arg for i, k in enumerate(kinds) for arg in ("--tensor-type", f"blk.{i}.attn_q={type_name(k).lower()}")]
    install.run_tool("llama-quantize", *wanted, str(source), str(out), "Q8_0", "2", timeout=120)
    with Reader(out) as reader:
        for i, kind in enumerate(kinds):
            t = reader.by_name[f"blk.{i}.attn_q.weight"]
            assert t.type_name == type_name(kind)
            assert np.array_equal(reader.bytes_of(t), ggml.quantize(kind, matrix(i))), t.type_name


@pytest.mark.runtime
@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "Q5_1"])
def test_bytes_do_not_depend_on_threads(name: str) -> None:
    w, importance = matrix(1, 200), np.abs(matrix(2, 1))[0]
    for table in (None, importance):
        alone = ggml.quantize(TYPE_IDS[name], w, table, threads=1)
        assert all(np.array_equal(alone, ggml.quantize(TYPE_IDS[name], w, table, threads=n)) for n in (0, 2, 3, 64))
    assert np.array_equal(ggml.dequantize(TYPE_IDS[name], alone, 1), ggml.dequantize(TYPE_IDS[name], alone, 3))


@pytest.mark.runtime
@pytest.mark.parametrize("kind", QUICK, ids=type_name)
def test_back_to_floats_as_gguf_py_does(kind: int) -> None:
    w = matrix(kind, 6)
    data = ggml.quantize(kind, w, np.ones(COLS, np.float32) if kind in ggml.NEEDS_IMPORTANCE else None)
    assert data.shape == (6, COLS // GGML_TYPES[kind][1] * GGML_TYPES[kind][2])
    back = ggml.dequantize(kind, data)
    assert back.shape == w.shape and np.square(back - w).sum() < 0.8 * np.square(w).sum()
    if type_name(kind) != "Q1_0":  # not known to every gguf-py
        assert np.array_equal(back, gguf_io.dequantize(data, kind, "x"))


@pytest.mark.runtime
@pytest.mark.parametrize("kind", sorted(ggml._BY_PYTHON), ids=type_name)
def test_gguf_py_writes_the_same_bytes(kind: int) -> None:
    w = matrix(7)
    assert np.array_equal(ggml.quantize(kind, w), gguf_io.quantize_plain(w, kind).reshape(len(w), -1))


@pytest.mark.runtime
@pytest.mark.parametrize("name", ["Q4_K", "Q3_K", "IQ4_XS", "Q4_0"])
def test_importance_moves_the_error_to_where_it_matters_less(name: str) -> None:
    kind, w = TYPE_IDS[name], matrix(3)
    importance = np.where(np.arange(COLS) % 4 == 0, 1.0, 0.001).astype(np.float32)

    def weighed(table: np.ndarray) -> float:
        error = np.square(ggml.dequantize(kind, ggml.quantize(kind, w, table)) - w)
        return float((error * importance).sum())

    assert weighed(importance) < 0.9 * weighed(np.ones(COLS, np.float32))
    # only the shares count; out of the ordinary, they are brought back to it
    assert np.array_equal(ggml.quantize(kind, w, importance), ggml.quantize(kind, w, importance * np.float32(2.0**60)))


@pytest.mark.runtime
@pytest.mark.parametrize("kind", QUICK, ids=type_name)
def test_extreme_values_neither_abort_nor_give_infinity(kind: int) -> None:
    rng = np.random.default_rng(5)
    most = min(ggml.reach(kind), 1e38)
    rows = [
        np.zeros(256),
        np.full(256, most),
        rng.choice([-most, most], 256),
        rng.normal(size=256) * 1e-38,
        rng.normal(size=256) * 1e-42,
        np.where(np.arange(256) % 100, 1e-30, most / 1.1),
        rng.normal(size=256) * 1e-10,
    ]
    w = np.array(rows, np.float32)
    wild = 10.0 ** rng.uniform(-38, 30, 256)
    for importance in (None, np.zeros(256), np.full(256, 1e-38), np.full(256, 1e30), wild):
        table = None if importance is None else importance.astype(np.float32)
        if table is None and kind in ggml.NEEDS_IMPORTANCE:
            continue
        try:
            data = ggml.quantize(kind, w, table)
        except OutOfReach as e:  # its smallest exponent does not reach down to 1e-42
            assert type_name(kind) == "MXFP4" and "a scale is out of its range" in str(e)
        else:
            assert np.isfinite(ggml.dequantize(kind, data)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers(bad: float) -> None:
    w = matrix(1)
    w[3, 5] = bad
    with pytest.raises(QuantizeError, match="value is not finite"):
        ggml.quantize(TYPE_IDS["Q8_0"], w)


def test_what_is_refused() -> None:
    w = matrix(1)
    with pytest.raises(QuantizeError, match=r"shape \(24, 500\); Q4_0 needs rows of a multiple of 32"):
        ggml.quantize(TYPE_IDS["Q4_0"], w[:, :500])
    with pytest.raises(QuantizeError, match=r"largest weight 7e\+04; F16 reaches 65504; BF16 holds it"):
        ggml.quantize(TYPE_IDS["F16"], np.full((1, 32), 7e4, np.float32))
    assert ggml.quantize(TYPE_IDS["BF16"], np.full((1, 32), 7e4, np.float32)).shape == (1, 64)
    with pytest.raises(QuantizeError, match="no weights can be written as Q8_K"):
        ggml.quantize(TYPE_IDS["Q8_K"], w)
    with pytest.raises(QuantizeError, match=r"bytes of shape \(1, 33\); rows of Q8_0 are a multiple of 34"):
        ggml.dequantize(TYPE_IDS["Q8_0"], np.zeros((1, 33), np.uint8))


@pytest.mark.runtime
def test_importance_that_is_refused() -> None:
    w = matrix(1)
    with pytest.raises(QuantizeError, match="IQ2_XXS needs an importance matrix; IQ3_S"):
        ggml.quantize(TYPE_IDS["IQ2_XXS"], w)
    for table, says in [
        (np.ones(5), r"shape \(5,\) for rows of 512"),
        (np.full(COLS, -1), "not negative"),
        (np.full(COLS, np.nan), "finite"),
    ]:
        with pytest.raises(QuantizeError, match=says):
            ggml.quantize(TYPE_IDS["Q4_K"], w, table.astype(np.float32))


def test_without_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> None:
        raise RuntimeMissing("not here")

    monkeypatch.setattr(install, "ggml_library", gone)
    w = matrix(1)
    assert ggml.quantize(TYPE_IDS["Q4_1"], w).shape == (24, COLS // 32 * 20)
    with pytest.raises(RuntimeMissing, match="Q4_K is quantized by the patched runtime: not here"):
        ggml.quantize(TYPE_IDS["Q4_K"], w)
    with pytest.raises(RuntimeMissing, match="not here"):  # gguf-py would leave the importance out without a word
        ggml.quantize(TYPE_IDS["Q4_0"], w, np.ones(COLS, np.float32))
    data = np.random.default_rng(0).integers(0, 60, (2, 144), np.uint8)
    assert ggml.dequantize(TYPE_IDS["Q4_K"], data).shape == (2, 256)
