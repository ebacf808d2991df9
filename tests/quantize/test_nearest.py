"""The nearest levels that TP2_2 can hold: native against the numpy trellis, and what it must leave alone."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from host_compiler import compiling

from ptqtp_gguf.codec import F32, I8, TP2_2, native
from ptqtp_gguf.codec.tp2_2 import CHAIN
from ptqtp_gguf.errors import QuantizeError
from ptqtp_gguf.quantize import nearest_in_chain, trellis


def nearest(v: F32, threads: int = 0) -> I8:
    levels = np.full(v.shape, 99, np.int8)
    native.nearest_levels(v.ctypes.data, levels.ctypes.data, v.size, threads)
    return levels


def reference(v: F32) -> I8:
    x, one = np.ascontiguousarray(v[:, CHAIN]), np.ones(len(v), np.float32)
    h = np.ones_like(x)
    start = trellis.best_start(x, h, one)
    _, came = trellis.lap(x, h, one, trellis._only(start))
    digits = np.empty(v.shape, np.uint8)
    digits[:, CHAIN] = trellis.trace(x, one, start, came)
    assert TP2_2.to_levels
    return TP2_2.to_levels(digits)


@pytest.fixture(scope="module")
def values() -> F32:
    rng = np.random.default_rng(0)
    v = rng.normal(size=(300, 32)).astype(np.float32) * 2.5
    v[:20] = np.round(v[:20])  # ties
    v[20:40] *= 4  # beyond the outermost level
    v[40] = 0
    return v


def test_native_is_the_numpy_trellis(values: F32) -> None:
    want = reference(values)
    for threads in (1, 3):
        assert np.array_equal(nearest(values, threads), want)
    levels = torch.zeros(values.shape, dtype=torch.int8)
    nearest_in_chain(torch.from_numpy(values), levels)
    assert np.array_equal(levels.numpy(), want)


def test_levels_that_can_be_held_stay() -> None:
    digits = np.random.default_rng(1).integers(0, 9, (500, 32)).astype(np.uint8)
    assert TP2_2.to_levels and TP2_2.from_levels
    levels = TP2_2.to_levels(digits)
    near: F32 = (levels + np.random.default_rng(2).uniform(-0.2, 0.2, levels.shape)).astype(np.float32)
    exact: F32 = np.asarray(levels, np.float32)
    for v in (exact, near):
        assert np.array_equal(nearest(v), levels)
        assert np.array_equal(TP2_2.from_levels(nearest(v)), digits)


def test_no_other_path_is_nearer(values: F32) -> None:
    """Against many others: those of changed digits."""
    assert TP2_2.to_levels and TP2_2.from_levels
    levels = nearest(values)
    least = ((values - levels) ** 2).sum(axis=1)
    digits, rng = TP2_2.from_levels(levels), np.random.default_rng(3)
    for _ in range(300):
        other = digits.copy()
        for _ in range(rng.integers(1, 4)):
            other[np.arange(len(other)), rng.integers(0, 32, len(other))] = rng.integers(0, 9, len(other))
        assert (((values - TP2_2.to_levels(other)) ** 2).sum(axis=1) >= least * (1 - 1e-5)).all()


def test_a_broken_group_is_refused() -> None:
    with pytest.raises(QuantizeError, match="multiple of the block"):
        nearest(np.zeros((1, 33), np.float32))


def test_the_gpu_kernel_on_the_host(values: F32, tmp_path: Path) -> None:
    file = tmp_path / "calibrate.so"
    assert compiling("calibrate_host.cpp", file).wait() == 0
    levels = np.zeros(values.shape, np.int8)
    library = ctypes.CDLL(str(file))
    library.run_nearest.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint]
    library.run_nearest(values.ctypes.data, levels.ctypes.data, len(values))
    assert np.array_equal(levels, nearest(values))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(values: F32) -> None:
    many = np.tile(values, (50, 1))
    levels = torch.zeros(many.shape, dtype=torch.int8, device="cuda")
    nearest_in_chain(torch.from_numpy(many).cuda(), levels)
    assert np.array_equal(levels.cpu().numpy(), nearest(many))
