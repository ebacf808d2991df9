"""`diff` and tensor_errors: what differs is found and measured, what does not is called equal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import rewritten, write_gguf

from ptqtp_gguf.codec.types import DEFAULT
from ptqtp_gguf.conversion.export import export_q4_0
from ptqtp_gguf.conversion.pipeline import convert
from ptqtp_gguf.files.gguf import Reader, kv_string, kv_u32
from ptqtp_gguf.inspect.diff import TensorError, difference, tensor_errors
from ptqtp_gguf.plan.options import Options
from ptqtp_gguf.plan.roles import Role


@pytest.fixture
def ours(tmp_path: Path, tiny_gguf: Path) -> Path:
    convert(tiny_gguf, tmp_path / "ours.gguf")
    return tmp_path / "ours.gguf"


def test_a_file_with_itself_and_its_copy(ours: Path, tmp_path: Path) -> None:
    same = difference(ours, ours)
    assert same.same_file and not same.differs and same.identical == len(same.tensors) == 7
    copy = rewritten(ours, tmp_path / "copy.gguf", [])
    same = difference(ours, copy)
    assert not same.same_file and not same.differs and same.keys_equal > 10
    assert all(t.rel_mse == 0 and t.max_abs == 0 for t in same.tensors)


def test_the_twin_has_equal_weights_of_another_type(ours: Path, tmp_path: Path) -> None:
    export_q4_0(ours, tmp_path / "twin.gguf")
    found = difference(ours, tmp_path / "twin.gguf")
    planes = [t for t in found.tensors if t.type_a == DEFAULT.name]
    assert len(planes) == 3 == found.equal and found.identical == 4 and found.differs
    assert all(t.type_b == "Q4_0" and not t.identical and t.rel_mse == 0 for t in planes)
    assert "ptqtp.format_version" in found.keys_only_a and list(found.keys_only_b) == ["ptqtp.export"]
    assert [(k.key, k.a, k.b) for k in found.keys_changed] == [("general.file_type", DEFAULT.id, 2)]


def test_two_of_our_types(tiny_gguf: Path, weights: dict[str, np.ndarray], tmp_path: Path) -> None:
    """The same bytes a weight in the same digits: what differs is how they decode."""
    first, second = tmp_path / "TP2_1.gguf", tmp_path / "TP2_2.gguf"
    for path in (first, second):
        convert(tiny_gguf, path, Options(type=path.stem))
    found = difference(first, second)
    planes = [t for t in found.tensors if t.type_a != t.type_b]
    assert [(t.type_a, t.type_b) for t in planes] == [("TP2_1", "TP2_2")] * 3 and found.identical == 4
    with Reader(first) as a, Reader(second) as b:
        for t in planes:
            x, y = (r.rows_f32(r.by_name[t.name]).astype(np.float64) for r in (a, b))
            assert t.rel_mse == pytest.approx(((y - x) ** 2).sum() / (x**2).sum(), rel=1e-4)
            assert t.max_abs == pytest.approx(np.abs(y - x).max(), rel=1e-5)
            errors = [((v - weights[t.name].reshape(v.shape)) ** 2).sum() for v in (x, y)]
            assert errors[1] < 0.9 * errors[0]
    changed = {k.key: (k.a, k.b) for k in found.keys_changed}
    assert changed["general.file_type"] == (251, 252) and changed["ptqtp.type_ids"] == ([251], [252])


def test_errors_against_the_source(ours: Path, tiny_gguf: Path, weights: dict[str, np.ndarray]) -> None:
    found = difference(tiny_gguf, ours)
    with Reader(ours) as r:
        values = {t.name: r.rows_f32(t).astype(np.float64).reshape(-1) for t in r.tensors}
    for t in found.tensors:
        w = weights[t.name].astype(np.float64).reshape(-1)
        assert t.rel_mse == pytest.approx(((values[t.name] - w) ** 2).sum() / (w**2).sum(), rel=1e-4)
        assert t.max_abs == pytest.approx(np.abs(values[t.name] - w).max(), rel=1e-5)
    (block,) = [r for r in found.roles if r.role is Role.BLOCK and r.type_b == DEFAULT.name]
    names = [t.name for t in found.tensors if t.type_b == DEFAULT.name]
    w, v = (np.concatenate([x[n].reshape(-1).astype(np.float64) for n in names]) for x in (weights, values))
    assert block.tensors == 3 and block.weights == w.size
    assert block.rel_mse == pytest.approx(((w - v) ** 2).sum() / (w**2).sum(), rel=1e-4)
    rows = tensor_errors(ours, tiny_gguf)
    assert [r.rel_mse for r in rows] == [t.rel_mse for t in found.tensors]
    assert rows[1] == TensorError("blk.0.attn_q.weight", DEFAULT.name, "block matrix", 0, 48 * 64, rows[1].rel_mse)
    assert rows[0].block is None and rows[0].role == "embedding"


def test_one_weight_and_one_key(tiny_gguf: Path, weights: dict[str, np.ndarray], tmp_path: Path) -> None:
    changed = {k: w.copy() for k, w in weights.items()}
    changed["blk.0.ffn_down.weight"][7, 5] += 0.25
    other = write_gguf(tmp_path / "other.gguf", changed)
    found = difference(tiny_gguf, other)
    (one,) = [t for t in found.tensors if not t.identical]
    power = (weights[one.name].astype(np.float64) ** 2).sum()
    assert one.name == "blk.0.ffn_down.weight" and one.rel_mse == pytest.approx(0.0625 / power, rel=1e-4)
    assert one.max_abs == pytest.approx(0.25) and not found.keys_changed
    texts = ("x" * 900 + "left" + "y" * 900, "x" * 900 + "right" + "y" * 900)
    a, b = (rewritten(tiny_gguf, tmp_path / f"{t[900]}.gguf", [kv_string("long", t)]) for t in texts)
    (key,) = difference(a, b).keys_changed
    assert key.key == "long" and "1804 and 1805 characters; from character 900 on: 'left" in key.text
    b = rewritten(a, tmp_path / "c.gguf", [kv_u32("long", 7)])
    assert difference(a, b).differs and difference(a, b).keys_changed[0].b == 7


def test_pieces_and_threads_do_not_matter(tmp_path: Path, rng: np.random.Generator) -> None:
    """Tensors larger than a piece; a split file on one side."""
    w = {
        "blk.0.a.weight": rng.normal(size=(3000, 256)).astype(np.float32),
        "blk.1.b.weight": np.ones((64, 256), np.float32),
    }
    a = write_gguf(tmp_path / "a.gguf", w)
    parts = convert(a, tmp_path / "b.gguf", Options(split_max_size=341000)).files
    assert len(parts) == 2
    one, many = (difference(a, parts[1], threads=n) for n in (1, 5))
    assert one == many and 0.01 < one.tensors[0].rel_mse < 0.03  # type: ignore[operator]
    with Reader(parts[0]) as r:
        v = r.rows_f32(r.by_name["blk.0.a.weight"]).astype(np.float64)
    x = w["blk.0.a.weight"].astype(np.float64)
    assert one.tensors[0].rel_mse == pytest.approx(((v - x) ** 2).sum() / (x**2).sum(), rel=1e-5)


def test_other_models(tiny_gguf: Path, weights: dict[str, np.ndarray], tmp_path: Path) -> None:
    other = {k: w for k, w in weights.items() if "attn_q" not in k}
    other["blk.0.ffn_down.weight"] = other["blk.0.ffn_down.weight"][:32]
    other["blk.9.new.weight"] = np.zeros((2, 32), np.float32)
    b = write_gguf(tmp_path / "b.gguf", other, arch="qwen2")
    found = difference(tiny_gguf, b)
    assert [t.name for t in found.only_a] == ["blk.0.attn_q.weight"]
    assert [t.name for t in found.only_b] == ["blk.9.new.weight"]
    assert found.shapes == [("blk.0.ffn_down.weight", (96, 64), (96, 32))]
    assert found.architectures == ("llama", "qwen2") and len(found.tensors) == 5
    assert {r.name: r.rel_mse for r in tensor_errors(tiny_gguf, b)}["blk.0.ffn_down.weight"] is None
    none = write_gguf(tmp_path / "none.gguf", {"x.weight": np.ones((2, 32), np.float32)})
    assert difference(tiny_gguf, none).tensors == [] and difference(tiny_gguf, none).roles == []
