"""The GPU's kernels: the same bytes as the CPU. They run on a GPU where there is one, and always on the host, where
cuda_host.h stands in for what CUDA gives (threads as fibers, shuffles): kernels.cu with 8 threads a group of 128 as on
the GPU, and with one, which needs no shuffle; calibrate.cu as it is."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ptqtp_gguf.codec import native
from ptqtp_gguf.codec.tensor_type import TensorType
from ptqtp_gguf.codec.tp2_0 import TP2_0
from ptqtp_gguf.codec.tp2_1 import SMALLEST_SCALE, TP2_1, scale_to_float
from ptqtp_gguf.errors import QuantizeError
from ptqtp_gguf.quantize import gptq as calibrated
from ptqtp_gguf.quantize import pieces
from ptqtp_gguf.quantize.cuda import driver as nvidia
from ptqtp_gguf.quantize.cuda import encoder as cuda
from ptqtp_gguf.quantize.gptq_reference import cd_block, gptq_block
from ptqtp_gguf.quantize.methods import find, quantize

F32, F16, Q8_0, BF16 = 0, 1, 8, 30
CASES = [(TP2_1, "search"), (TP2_0, "search"), (TP2_0, "paper")]
ids = [f"{t.name}-{m}" for t, m in CASES]


class Host:
    """CudaEncoder's kernels on the CPU."""

    def __init__(self, library: Path) -> None:
        self.lib = ctypes.CDLL(str(library))
        p, u32 = ctypes.c_void_p, ctypes.c_uint32
        self.lib.run.argtypes = [ctypes.c_char_p, p, ctypes.c_int, u32, ctypes.c_uint64, p, p, p]
        self.lib.run_fold.argtypes = [p, u32, p, u32]

    def run(
        self, kernel: str, raw: np.ndarray, source: int, target: int, first: int = 0, moved: int = 0
    ) -> pieces.Encoded:
        block, size, _ = cuda.TARGETS[target]
        rows, weights = cuda._shape(raw, source, block)
        groups = rows * weights // block
        stats = np.empty(groups, cuda.STATS)
        out = np.full((rows, weights // block * size), 0xAA, np.uint8)
        bits = np.array(moved, np.uint64)
        data = [a.ctypes.data for a in (raw, out, stats, bits)]
        assert self.lib.run(kernel.encode(), data[0], source, groups, first, data[1], data[2], data[3]) == 0
        folded = np.empty(min(len(stats), 7), cuda.STATS)
        self.lib.run_fold(stats.ctypes.data, len(stats), folded.ctypes.data, len(folded))
        self.stats = folded
        return cuda.merge(folded, out)

    def encode(
        self,
        raw: np.ndarray,
        source: int,
        target: int,
        method: str = "search",
        first: int = 0,
        moved: int | None = None,
    ) -> pieces.Encoded:
        kernel = cuda.KERNELS[target, "" if target == Q8_0 else method]
        if method == "paper" and moved is None:
            moved = self.probe(raw, source).moved
        return self.run(kernel, raw, source, target, first, moved or 0)

    def probe(self, raw: np.ndarray, source: int) -> pieces.Encoded:
        return self.run("probe_paper", raw, source, TP2_0.id)


class Gpu:
    """The same calls to a CudaEncoder."""

    def __init__(self) -> None:
        self.encoder = cuda.CudaEncoder()

    def encode(self, *args: object, **kwargs: object) -> pieces.Encoded:
        return self.encoder.submit(*args, **kwargs).result()  # type: ignore[arg-type]

    def probe(self, raw: np.ndarray, source: int) -> pieces.Encoded:
        return self.encoder.probe(raw, source).result()


def compiling(source: str, library: Path, *options: str) -> subprocess.Popen[bytes]:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if not compiler or not sys.platform.startswith("linux"):
        pytest.skip("needs g++ or clang++ on Linux to build the kernels for the host")
    return subprocess.Popen(
        [
            compiler,
            "-std=c++17",
            "-O1",
            "-ffp-contract=off",
            "-Wall",
            "-Werror",
            "-Wno-unknown-pragmas",
            "-fPIC",
            "-shared",
            *options,
            f"-I{cuda.SOURCE_FILE.parent}",
            str(Path(__file__).with_name(source)),
            "-o",
            str(library),
        ]
    )


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Host]:
    folder = tmp_path_factory.mktemp("cuda")
    files = {lanes: folder / f"host{lanes}.so" for lanes in (1, 8)}
    jobs = [compiling("cuda_host.cpp", file, f"-DWIDE_LANES={lanes}") for lanes, file in files.items()]
    assert all([job.wait() == 0 for job in jobs])
    return {lanes: Host(file) for lanes, file in files.items()}


@pytest.fixture(scope="module", params=["host-8", "host-1", "gpu"])
def engine(request: pytest.FixtureRequest) -> Host | Gpu:
    if request.param == "gpu":
        if not cuda.available():
            pytest.skip("needs an NVIDIA GPU and cuda-bindings")
        return Gpu()
    return request.getfixturevalue("hosts")[int(request.param[-1])]


COLUMNS = 512


def sample() -> np.ndarray:
    rng = np.random.default_rng(7)
    w = (0.02 * rng.normal(size=(8, COLUMNS))).astype(np.float32)
    w[1] = 0.02 * rng.laplace(size=COLUMNS)
    w[2] = 0.02 * rng.standard_t(5, size=COLUMNS)
    w[3, :128] = 0
    w[3, 128] = -0.0
    w[4] *= 1e-4  # below the scales' range
    w[5, ::3] = 0.25  # many ties
    w[6] = np.float32(0.3)  # all equal
    w[7] = native.dequantize(TP2_1, native.quantize(TP2_1, "search", w[:1]))[0]  # exact levels
    return w


def raw_of(w: np.ndarray, source: int) -> np.ndarray:
    kind = gguf.GGMLQuantizationType(source)
    return np.ascontiguousarray(gguf.quants.quantize(w, kind)).view(np.uint8).reshape(len(w), -1)


def values(raw: np.ndarray, source: int) -> np.ndarray:
    kind = gguf.GGMLQuantizationType(source)
    view = raw.view({F32: np.float32, F16: np.float16}.get(source, np.uint8))
    return gguf.quants.dequantize(view, kind).astype(np.float32)


@pytest.mark.parametrize("source", [F32, F16, BF16, Q8_0])
@pytest.mark.parametrize(("t", "method"), CASES, ids=ids)
def test_bytes_of_the_cpu(engine: Host | Gpu, t: TensorType, method: str, source: int) -> None:
    raw = raw_of(sample(), source)
    w = values(raw, source)
    got = engine.encode(raw, source, t.id, method, first=9 << 32)
    expected = quantize(t, find(method), w)
    assert np.array_equal(got.data, expected)
    r = native.dequantize(t, expected)
    assert got.hash == native.float_hash(r, 9 << 32)
    r = r.astype(np.float64)
    assert got.error == pytest.approx(((w - r) ** 2).sum(), rel=1e-10)
    assert got.power == pytest.approx((w.astype(np.float64) ** 2).sum(), rel=1e-10)


@pytest.mark.parametrize("source", [F32, F16, BF16, Q8_0])
def test_q8_0_bytes_of_gguf_py(engine: Host | Gpu, source: int) -> None:
    raw = raw_of(sample(), source)
    got = engine.encode(raw, source, Q8_0)
    expected = raw_of(values(raw, source), Q8_0)
    assert np.array_equal(got.data, expected)
    assert got.hash == native.float_hash(values(expected, Q8_0))
    delta = values(expected, Q8_0).astype(np.float64) - values(raw, source)
    assert got.error == pytest.approx((delta**2).sum(), rel=1e-10)


odd = st.floats(-9.5, 9.5, width=32) | st.sampled_from([0.0, -0.0, 1e-30, 1e-40, 1e-5, 0.5, 9.6875, -9.6875])


@given(w=hnp.arrays(np.float32, (2, 128), elements=odd))
@settings(max_examples=25, deadline=None)
def test_bytes_of_the_cpu_on_odd_values(engine: Host | Gpu, w: np.ndarray) -> None:
    raw = w.view(np.uint8)
    for t, method in CASES:
        assert np.array_equal(engine.encode(raw, F32, t.id, method).data, quantize(t, find(method), w)), t.name
    with np.errstate(all="ignore"):  # 1/d overflows
        expected = raw_of(w, Q8_0)
    assert np.array_equal(engine.encode(raw, F32, Q8_0).data, expected)


def test_every_half_and_bfloat_value(engine: Host | Gpu) -> None:
    """Exact by way of Q8_0's error: with one value a block, w - r reveals how the value was read."""
    for source in (F16, BF16):
        bits = np.arange(65536, dtype=np.uint16).reshape(-1, 32)
        with np.errstate(all="ignore"):
            w = values(bits.view(np.uint8), source)
        finite = np.isfinite(w).all(axis=1)
        got = engine.encode(np.ascontiguousarray(bits[finite]).view(np.uint8), source, Q8_0)
        assert got.power == pytest.approx((w[finite].astype(np.float64) ** 2).sum(), rel=1e-12)
        assert got.largest == np.abs(w[finite]).max()


def test_what_was_seen_of_the_values(engine: Host | Gpu) -> None:
    w = sample()
    for target, group in ((TP2_1.id, 32), (TP2_0.id, 128), (Q8_0, 32)):
        tops = np.abs(w).reshape(-1, group).max(axis=1)
        got = engine.encode(w.view(np.uint8), F32, target)
        assert (got.bad, got.largest) == (-1, tops.max())
        assert got.groups == (tops > 0).sum() < tops.size
        assert got.below == ((tops > 0) & (tops < 5 * SMALLEST_SCALE)).sum() > 0
        for value in (np.nan, np.inf, -np.inf):
            damaged = w[2:5].copy()
            damaged[[0, 0, 2], [300, 33, 5]] = value
            seen = engine.encode(damaged.view(np.uint8), F32, target)
            assert (seen.bad, seen.largest) == (33, np.abs(np.delete(w[2:5], [300, 33, 2 * COLUMNS + 5])).max())


def test_paper_stops_all_groups_of_a_matrix_together(engine: Host | Gpu) -> None:
    w = sample() * np.float32(0.02)  # steps fall below the rule's absolute bound soon, but not in all pieces at once
    w[7] *= 50
    raw = w.view(np.uint8)
    expected = quantize(TP2_0, find("paper"), w)
    pieces = [raw[k : k + 1] for k in range(len(raw))]
    moved = 0
    for piece in pieces:
        moved |= engine.probe(piece, F32).moved
    got = [engine.encode(piece, F32, TP2_0.id, "paper", moved=moved).data for piece in pieces]
    assert np.array_equal(np.concatenate(got), expected)
    alone = [engine.encode(piece, F32, TP2_0.id, "paper").data for piece in pieces]
    assert not np.array_equal(np.concatenate(alone), expected)
    assert np.array_equal(alone[0], quantize(TP2_0, find("paper"), w[:1]))


def test_sums_of_pieces_are_those_of_the_tensor(engine: Host | Gpu) -> None:
    w = sample()
    for target in (TP2_1.id, TP2_0.id, Q8_0):
        whole = engine.encode(w.view(np.uint8), F32, target)
        pieces = [engine.encode(w[a:b].view(np.uint8), F32, target, first=a * COLUMNS) for a, b in ((0, 3), (3, 8))]
        assert np.array_equal(np.concatenate([p.data for p in pieces]), whole.data)
        assert sum(p.hash for p in pieces) % 2**64 == whole.hash
        assert sum(p.error for p in pieces) == pytest.approx(whole.error, rel=1e-12)
        assert (sum(p.groups for p in pieces), sum(p.below for p in pieces)) == (whole.groups, whole.below)


def test_scales_beyond_fp16_are_counted(hosts: dict[int, Host]) -> None:
    w = np.full((1, 256), 1e6, np.float32)
    w[0, :128] = 1
    for host in hosts.values():
        assert host.encode(w.view(np.uint8), F32, TP2_0.id, "paper").largest == np.float32(1e6)
        assert host.stats["overflow"].tolist() == [0, 1]


# ---- calibrate.cu ----

Arrays = tuple[np.ndarray, ...]
EYE = np.eye(32, dtype=np.float32)


class HostGroups:
    """Its kernels on the CPU."""

    def __init__(self, library: Path) -> None:
        p, i64 = ctypes.c_void_p, ctypes.c_int64
        self.lib = ctypes.CDLL(str(library))
        self.lib.run.argtypes = [ctypes.c_char_p, *(p, i64) * 5, ctypes.c_int, ctypes.c_int]

    def run(self, kernel: str, rows: int, matrices: Arrays, window: int) -> None:
        places = [x for m in matrices for x in (m.ctypes.data, m.strides[0] // m.itemsize)]
        assert self.lib.run(kernel.encode(), *places, rows, window) == 0


class GpuGroups:
    """The same on a device: what lies around the matrices goes there and comes back too."""

    def __init__(self) -> None:
        self.device = nvidia.Device(0, calibrated.SOURCE_FILE)

    def run(self, kernel: str, rows: int, matrices: Arrays, window: int) -> None:
        wait = self.device.driver.cuCtxSynchronize
        bases = [m.base for m in matrices if m.base is not None]
        memory = [(base.view(np.uint8).reshape(-1), nvidia.Buffer(self.device)) for base in bases]
        places = []
        for m, (raw, buffer) in zip(matrices, memory, strict=True):
            buffer.reserve(raw.size)
            buffer.host(raw.size)[:] = raw
            buffer.upload(raw.size)
            places += [buffer.address, np.int64(m.strides[0] // m.itemsize)]
        nvidia.call(wait())
        self.device.launch(kernel, rows, *places, np.int32(rows), np.int32(window))
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
        assert a.base is not None and (a.base[:, a.shape[1] :] == 77).all() and (a.base[-1] == 77).all()
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


# ---- without a device ----

QUIET = """
import sys
from ptqtp_gguf.errors import QuantizeError
from ptqtp_gguf.quantize.cuda import encoder as cuda
assert not {"cuda", "torch"} & set(sys.modules)
assert cuda.available() is False
try:
    cuda.CudaEncoder()
except QuantizeError as e:
    print(e)
"""


def test_no_cuda_is_one_line_with_the_way_out() -> None:
    env = {"CUDA_VISIBLE_DEVICES": "-1", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", QUIET], env=env, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 1 and lines[0].startswith("--device cuda: ") and lines[0].endswith("; use --device cpu")


@pytest.mark.parametrize(
    ("raw", "source", "block", "message"),
    [
        (np.zeros((2, 64), np.uint8), 12, 32, "source type 12 is none of F32, F16, BF16, Q8_0"),
        (np.zeros((2, 66), np.uint8), Q8_0, 32, "Q8_0 needs contiguous uint8 rows of 34 byte blocks"),
        (np.zeros((2, 16), np.float32), F32, 32, "F32 needs contiguous uint8 rows"),
        (np.zeros((0, 64), np.uint8), F16, 32, "needs contiguous"),
        (np.zeros((2, 256), np.uint8)[:, ::2], F32, 32, "needs contiguous"),
        (np.zeros((2, 80), np.uint8), BF16, 32, "rows of 40 weights; the target needs a multiple of 32"),
    ],
)
def test_pieces_that_do_not_fit_are_refused(raw: np.ndarray, source: int, block: int, message: str) -> None:
    with pytest.raises(QuantizeError, match=message):
        cuda._shape(raw, source, block)


@pytest.mark.parametrize("source", [cuda.SOURCE_FILE, calibrated.SOURCE_FILE], ids=lambda file: file.name)
@pytest.mark.parametrize("capability", [80, 90, 999])
def test_the_kernels_compile_for_devices(capability: int, source: Path) -> None:
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings")
    try:
        nvrtc.nvrtcVersion()
    except Exception:
        pytest.skip("needs NVRTC")
    code = nvidia.compile_for(nvrtc, capability, source)
    assert code[:4] == b"\x7fELF" if capability < 999 else b".version" in code


# ---- the stream, on a device ----

needs_gpu = pytest.mark.skipif(not cuda.available(), reason="needs an NVIDIA GPU and cuda-bindings")


@needs_gpu
def test_pieces_of_many_sizes_in_flight() -> None:
    rng = np.random.default_rng(5)
    w = (0.02 * rng.normal(size=(20000, 1024))).astype(np.float32)
    cuts = [0, 1, 2, 5000, 5003, 12000, 12001, 19000, 20000]
    with cuda.CudaEncoder() as encoder:
        pending = []
        for k, (a, b) in enumerate(itertools.pairwise(cuts)):
            raw = w[a:b].view(np.uint8)
            if k % 2:  # a reader that fills pinned memory itself
                buffer = encoder.buffer(*raw.shape)
                buffer[:] = raw
                raw = buffer
            pending.append(encoder.submit(raw, F32, TP2_1.id, "search", a * 1024))
        with pytest.raises(QuantizeError, match="no method paper for type 251 on a GPU"):
            encoder.submit(w.view(np.uint8), F32, TP2_1.id, "paper")
        data = np.concatenate([p.result().data for p in pending])
    assert np.array_equal(data, quantize(TP2_1, find("search"), w))
    with pytest.raises(QuantizeError, match="closed"):
        encoder.submit(w.view(np.uint8), F32, TP2_1.id)


@needs_gpu
def test_out_of_device_memory_is_one_line_and_can_be_survived() -> None:
    w = np.ones((1 << 16, 1024), np.float32)
    with cuda.CudaEncoder() as encoder:
        driver = encoder.device.driver
        hog = nvidia.call(driver.cuMemAlloc(encoder.device.free_memory()[0] - (64 << 20)))
        with pytest.raises(QuantizeError, match=r"piece of 65536 rows of 4096 bytes: out of memory, \d+ of \d+ MiB"):
            encoder.submit(w.view(np.uint8), F32, TP2_1.id)
        assert encoder.submit(w[:8].view(np.uint8), F32, TP2_1.id).result().error == 0
        driver.cuMemFree(hog)
        assert encoder.submit(w.view(np.uint8), F32, TP2_1.id).result().error == 0


@needs_gpu
def test_kernels_with_other_bytes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = cuda.SOURCE_FILE.read_text()
    for right, wrong, kernel in (
        ("2.5f * s", "2.6f * s", "search_tp2_1"),
        ("e2 < best ? d", "e2 <= best ? d", "tp2_0"),
    ):
        assert right in text
        file = tmp_path / "kernels.cu"
        file.write_text(text.replace(right, wrong))
        monkeypatch.setattr(cuda, "SOURCE_FILE", file)
        with pytest.raises(QuantizeError, match=f"{kernel} makes other bytes than the CPU; .* use --device cpu"):
            cuda.CudaEncoder()


@needs_gpu
def test_no_such_device() -> None:
    with pytest.raises(QuantizeError, match="no device 99, there are"):
        cuda.CudaEncoder(99)
