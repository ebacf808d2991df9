"""The folder of planes: kept, taken up, refused, removed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import write_gguf

from ptqtp_gguf.calibrate.store import PlaneStore, remove_planes, unpacked
from ptqtp_gguf.codec import native
from ptqtp_gguf.codec.reference import pack
from ptqtp_gguf.codec.tp2_1 import LEVELS, TP2_1, digits_of_levels, scale_to_float
from ptqtp_gguf.codec.tp2_2 import TP2_2
from ptqtp_gguf.errors import OutputError, ResumeError
from ptqtp_gguf.files.gguf import Reader, TensorInfo


@pytest.fixture
def source(tmp_path: Path, rng: np.random.Generator) -> Path:
    tensors = {f"blk.{i}.w.weight": (rng.normal(size=(64, 128)) * 0.05).astype(np.float32) for i in range(3)}
    return write_gguf(tmp_path / "source.gguf", tensors)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "b.gguf"


def test_planes_that_are_cut(source: Path, out: Path) -> None:
    with Reader(source) as r, PlaneStore(out, {"options": {}}) as store:
        t = r.tensors[0]
        store.put(t, np.ones((64, 128), np.int8), np.zeros((64, 4), np.uint8))
        os.truncate(store.folder / "0.bin", 1000)
        with pytest.raises(OutputError, match=r"0\.bin: damaged; start over with --restart"):
            store.planes(t)
        os.truncate(store.folder / "0.bin", 0)
        with pytest.raises(OutputError, match=r"damaged; start over"):
            store.raw(t)


def test_types_by_name(source: Path, out: Path, rng: np.random.Generator) -> None:
    """Two types in one store: what is read back is what was put, and pieces are those of the type."""
    with Reader(source) as r, PlaneStore(out, {"options": {}}, TP2_1, kinds={"blk.1.w.weight": TP2_2}) as store:
        for t, kind in zip(r.tensors, (TP2_1, TP2_2, TP2_1), strict=True):
            assert store.kind_of(t.name) == kind
            w = r.rows_f32(t)
            levels, codes = unpacked(kind, native.quantize(kind, "search", w))
            store.put(t, levels, codes)
            assert all(map(np.array_equal, store.planes(t), (levels, codes)))
            whole = store.encode(t, w.view(np.uint8), 0)
            assert np.array_equal(whole.data, native.quantize(kind, "search", w))
            assert whole.hash == native.float_hash(native.dequantize(kind, whole.data).reshape(-1))


def test_plane_store(tmp_path: Path, rng: np.random.Generator) -> None:
    out = tmp_path / "m.gguf"
    job: dict[str, Any] = {"header": "h", "options": {"--calib": ["a"], "--tune": False}}
    t, norm = (
        TensorInfo("blk.0.exps.weight", (64, 6, 2), 0, 0, 3072),
        TensorInfo("blk.0.attn_norm.weight", (48,), 0, 0, 192),
    )
    levels = rng.choice(np.array(LEVELS, np.int8), (12, 64))
    codes = rng.integers(100, 150, (12, 2)).astype(np.uint8)
    values = rng.normal(size=48).astype(np.float32)
    with PlaneStore(out, job, TP2_1) as store:
        assert not store.has(t.name) and not store.blocks and not store.marked("tuned")
        store.put(t, np.zeros_like(levels), codes)
        store.put(t, levels, codes)  # the last one counts
        store.end_block(0)
        store.put_vector(norm, values)
        store.mark("tuned")
        store.say("look here")
        with pytest.raises(OutputError, match="another conversion to this file is running"):
            PlaneStore(out, job, TP2_1)
    for change, what in (
        ({"header": "i"}, "source"),
        ({"options": {"--calib": ["b"], "--tune": False}}, "--calib"),
        ({"options": {**job["options"], "--tune-steps": 5}}, "--tune-steps"),
        ({"more": 1}, "more"),
    ):
        with pytest.raises(ResumeError, match=f"begun with another {what};"):
            PlaneStore(out, {**job, **change}, TP2_1)
    with PlaneStore(out, job, TP2_1) as store:
        assert store.has(t.name) and store.blocks == 1 and store.marked("tuned") and store.notes == ["look here"]
        before = store.planes(t)  # as calibration left them: what tuning begins with, and begins again with
        assert not before[0].any() and np.array_equal(before[1], codes)
        assert np.array_equal(store.raw(t), pack(TP2_1, digits_of_levels(levels), codes))
        weights = (levels.reshape(12, 2, 32) * scale_to_float(codes)[..., None]).reshape(12, 64).astype(np.float32)
        source = weights + rng.normal(size=(12, 64)).astype(np.float32) * 0.01
        pieces = [store.encode(t, source[a:b].view(np.uint8), a * 64) for a, b in ((0, 5), (5, 12))]
        assert np.array_equal(np.concatenate([p.data for p in pieces]), store.raw(t))
        assert sum(p.error for p in pieces) == pytest.approx(float(((source - weights) ** 2).sum()), rel=1e-5)
        assert sum(p.power for p in pieces) == pytest.approx(float((source**2).sum()), rel=1e-5)
        assert sum(p.hash for p in pieces) == native.check(TP2_1, np.array(store.raw(t)), 0)[1]
        vector = store.encode(norm, values.view(np.uint8).reshape(1, -1), 0)
        assert vector.data.tobytes() == values.tobytes()
        (store.folder / "3.bin").unlink()
        with pytest.raises(OutputError, match=r"3\.bin.*--restart"):
            store.raw(norm)
    with PlaneStore(out, {"options": {}}, TP2_1, restart=True) as store:
        assert not store.has(t.name) and not store.marked("tuned")
    remove_planes(out)
    assert list(tmp_path.iterdir()) == []


def test_a_stage_begins_with_what_the_one_before_it_left(tmp_path: Path) -> None:
    """However often it is killed: what it put itself does not count. `raw` has the newest."""
    out, t = tmp_path / "b.gguf", TensorInfo("blk.0.a.weight", (64, 4), TP2_1.id, 0, 0)
    codes = np.full((4, 2), 100, np.uint8)
    planes = [np.full((4, 64), level, np.int8) for level in (1, 2, 3)]
    for stage in range(3):
        with PlaneStore(out, {"options": {}}, TP2_1) as store:
            if stage == 0:  # the first one reads what it put first
                store.put(t, planes[0], codes)
            assert np.array_equal(store.planes(t)[0], planes[max(0, stage - 1)])
        with PlaneStore(out, {"options": {}}, TP2_1) as store:
            store.put(t, planes[stage], codes)
            assert np.array_equal(store.planes(t)[0], planes[max(0, stage - 1)])
            assert np.array_equal(unpacked(TP2_1, store.raw(t))[0], planes[stage])
            store.end_stage(f"stage {stage}")
            assert store.ended(f"stage {stage}") and not store.ended("another")
            assert np.array_equal(store.planes(t)[0], planes[stage])
