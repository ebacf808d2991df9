"""calibrate.cu, the inner loops of calibrated quantization, on the host and on a GPU: the bytes of the reference."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host_compiler import compiling

from ptqtp_gguf.codec.tp2_1 import scale_to_float
from ptqtp_gguf.quantize import gptq as calibrated
from ptqtp_gguf.quantize.cuda import driver as nvidia
from ptqtp_gguf.quantize.cuda import encoder as cuda
from ptqtp_gguf.quantize.gptq_reference import cd_block, gptq_block, kbest_cd_block, kbest_gptq_block

Arrays = tuple[np.ndarray, ...]
EYE = np.eye(32, dtype=np.float32)


def whole(a: np.ndarray) -> np.ndarray:
    """The array that a view is cut out of."""
    assert a.base is not None
    return a.base


class HostGroups:
    """Its kernels on the CPU."""

    def __init__(self, library: Path) -> None:
        p: Any = ctypes.c_void_p
        i64 = ctypes.c_int64
        self.lib = ctypes.CDLL(str(library))
        self.lib.run.argtypes = [ctypes.c_char_p, *[p, i64] * 5, ctypes.c_int, ctypes.c_int]

    def run(self, kernel: str, rows: int, matrices: Arrays, window: int) -> None:
        places = [x for m in matrices for x in (m.ctypes.data, m.strides[0] // m.itemsize)]
        assert self.lib.run(kernel.encode(), *places, rows, window) == 0


class GpuGroups:
    """The same on a device: what lies around the matrices goes there and comes back too."""

    def __init__(self) -> None:
        self.device = nvidia.Device(0, calibrated.SOURCE_FILE)

    def run(self, kernel: str, rows: int, matrices: Arrays, window: int) -> None:
        wait = self.device.driver.cuCtxSynchronize
        memory = [(whole(m).view(np.uint8).reshape(-1), nvidia.Buffer(self.device)) for m in matrices]
        places = []
        for m, (raw, buffer) in zip(matrices, memory, strict=True):
            buffer.reserve(raw.size)
            buffer.host(raw.size)[:] = raw
            buffer.upload(raw.size)
            places += [buffer.address, np.int64(m.strides[0] // m.itemsize)]
        nvidia.call(wait())
        threads = rows * (calibrated.ROW_THREADS if "chain" in kernel else 1)
        self.device.launch(kernel, threads, *places, np.int32(rows), np.int32(window))
        nvidia.call(wait())
        for raw, buffer in memory:
            buffer.download(raw.size)
            nvidia.call(wait())
            raw[:] = buffer.host(raw.size)
            buffer.release()


@pytest.fixture(scope="module", params=["host", "gpu"])
def groups(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HostGroups | GpuGroups:
    if request.param == "gpu":
        if not cuda.available():
            pytest.skip("needs an NVIDIA GPU and cuda-bindings")
        return GpuGroups()
    library = tmp_path_factory.mktemp("calibrate") / "host.so"
    assert compiling("calibrate_host.cpp", library).wait() == 0
    return HostGroups(library)


def padded(a: np.ndarray, pad: int) -> np.ndarray:
    """A copy of a whose rows lie `pad` elements further apart; 77 in between and behind."""
    whole = np.full((len(a) + 1, a.shape[1] + pad), 77, a.dtype)
    whole[:-1, : a.shape[1]] = a
    return whole[:-1, : a.shape[1]]


def assert_same(
    groups: HostGroups | GpuGroups, kernel: str, x: np.ndarray, m: np.ndarray, planes: Arrays, window: int, want: Arrays
) -> None:
    """A kernel on the planes makes what is wanted of them and of a third matrix, and writes nowhere else."""
    inputs, outputs = [padded(a, 3) for a in (x, m)], [padded(a, 5) for a in (*planes, np.full_like(x, 99))]
    groups.run(kernel, len(x), (*inputs, *outputs), window)
    for a in (*inputs, *outputs):
        assert (whole(a)[:, a.shape[1] :] == 77).all() and (whole(a)[-1] == 77).all()
    assert np.array_equal(outputs[0], want[0]) and np.array_equal(outputs[1], want[1])
    got, moved = outputs[2].copy().view(np.uint32), want[2].view(np.uint32)
    assert ((got == moved) | (np.isnan(outputs[2]) & np.isnan(want[2]))).all()  # the sign of zero included


def correlated(rng: np.random.Generator) -> Arrays:
    """w, u and h as they come."""
    x = rng.normal(size=(128, 16)) @ rng.normal(size=(16, 32)) + rng.normal(size=(128, 32))
    h = x.T @ x / 128 + 0.01 * np.eye(32)
    w = (0.02 * rng.standard_t(4, size=(200, 32))).astype(np.float32)
    return w, np.linalg.cholesky(np.linalg.inv(h)).T.astype(np.float32), h.astype(np.float32)


def ladder(rng: np.random.Generator) -> Arrays:
    """Weights on and between the levels of many scales, at which all is exact: equals are common."""
    steps = np.array([0, -0.0, 0.5, 1, 1.5, 2, 2.5, 3, 4, 5, 6])
    w = rng.choice(np.concatenate([steps, -steps]), (200, 32)) * 2.0 ** rng.integers(-17, 1, (200, 1))
    w[20:24] *= np.array([[1e-30], [1e-8], [1e3], [1e30]])
    w[24:26], w[26:28] = rng.integers(-1, 2, (2, 32)) * 2.0**-6, rng.integers(-2, 3, (2, 32)) * 2.0**-7
    w[28:80] = 94 * 2.0**-12  # to code 120 (24 of these steps) those two below and above are equals
    return w.astype(np.float32), 0.5 * EYE, 1 * EYE


def pairs(rng: np.random.Generator) -> Arrays:
    """Weights of two values that two codes fit equally well: how the sums are rounded decides."""
    w = np.repeat(np.array([[33, 217], [34, 248], [34, 112], [35, 75]]) * 2.0**-11, 16, axis=1)
    return rng.permuted(np.tile(w, (50, 1)), axis=1).astype(np.float32), 0.65 * EYE, 0.65 * EYE


def odd_diagonals(rng: np.random.Generator) -> Arrays:
    """Columns of no say; one whose u_jj^2 overflows, the only one that is not 0 in some rows; huge rows."""
    w, u, h = correlated(rng)
    at = np.arange(0, 28, 4)
    u[at, at], h[at, at] = [0, -1, np.nan, -np.inf, 1e10, -0.0, 2e19], [0, -1, -1e-25, -np.inf, 1e10, -0.0, 1e-25]
    w[8:16] = 0
    w[8:16, 24] = 1
    w[16:18] *= 1e22
    return w, u, h


def no_numbers(rng: np.random.Generator) -> Arrays:
    """In some rows."""
    w, u, h = correlated(rng)
    w[0] = w[4, 3] = w[5, 31] = w[6, 0] = np.nan
    w[1, 7], w[2, 9], w[3] = np.inf, -np.inf, np.inf
    return w, u, h


def broken(rng: np.random.Generator) -> Arrays:
    """The factor and H themselves."""
    w, u, h = correlated(rng)
    u[3, 20:22], h[3, 20:22] = [np.nan, np.inf], [np.inf, np.nan]
    u[9, 9] = h[9, 9] = np.nan
    return w, u, h


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("rows", [1, 31, 200])
@pytest.mark.parametrize("inputs", [correlated, ladder, pairs, odd_diagonals, no_numbers, broken])
def test_groups_are_those_of_the_reference(
    groups: HostGroups | GpuGroups, inputs: Callable[[np.random.Generator], Arrays], rows: int, window: int
) -> None:
    rng = np.random.default_rng(rows)
    w, u, h = inputs(rng)
    w = w[:rows]
    u[np.tril_indices(32, -1)] = h[np.tril_indices(32, -1)] = np.nan  # not to be read
    found = gptq_block(w, u, window)
    none = np.full((rows, 32), 99, np.int8), np.full((rows, 1), 99, np.uint8)
    assert_same(groups, "gptq_group", w, u, none, window, found)
    near = np.clip(found[1] + rng.integers(-2, 3, (rows, 1)), 0, 255).astype(np.uint8)
    noise = rng.choice([-5, -3, -1, 0, 2], (rows, 32)).astype(np.int8), rng.choice([0, 1, 120, 254, 255], (rows, 1))
    for levels, codes in ((found[0], found[1]), (found[0], near), (noise[0], noise[1].astype(np.uint8))):
        with np.errstate(all="ignore"):
            r = ((w - scale_to_float(codes) * levels) * np.diagonal(h)).astype(np.float32)
        want = cd_block(r, h, levels, codes, window)
        assert_same(groups, "cd_group", r, h, (levels, codes), window, want)


@pytest.mark.parametrize("window", [0, 1])
@pytest.mark.parametrize("rows", [1, 9, 40])
@pytest.mark.parametrize("inputs", [correlated, ladder, pairs, odd_diagonals, no_numbers, broken])
def test_chains_are_those_of_the_reference(
    groups: HostGroups | GpuGroups, inputs: Callable[[np.random.Generator], Arrays], rows: int, window: int
) -> None:
    rng = np.random.default_rng(rows)
    w, u, h = inputs(rng)
    w = w[:rows]
    u[np.tril_indices(32, -1)] = h[np.tril_indices(32, -1)] = np.nan  # not to be read
    found = kbest_gptq_block(w, u, window)
    none = np.full((rows, 32), 99, np.int8), np.full((rows, 1), 99, np.uint8)
    assert_same(groups, "gptq_chain_group", w, u, none, window, found)
    near = np.clip(found[1] + rng.integers(-2, 3, (rows, 1)), 0, 255).astype(np.uint8)
    for levels, codes in ((found[0], found[1]), (found[0], near)):
        with np.errstate(all="ignore"):
            r = ((w - scale_to_float(codes) * levels) * np.diagonal(h)).astype(np.float32)
        want = kbest_cd_block(r, h, levels, codes, window)
        assert_same(groups, "cd_chain_group", r, h, (levels, codes), window, want)
