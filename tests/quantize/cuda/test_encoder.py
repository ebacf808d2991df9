"""The GPU's kernels: the same bytes as the CPU. They run on a GPU where there is one, and always on the host, where
cuda_host.h stands in for what CUDA gives (threads as fibers, shuffles): kernels.cu with 8 threads a group of 128 as on
the GPU, and with one, which needs no shuffle."""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path

import gguf
import numpy as np
import pytest
from host_compiler import compiling
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ptqtp_gguf.codec import native
from ptqtp_gguf.codec.tensor_type import TensorType
from ptqtp_gguf.codec.tp2_0 import TP2_0
from ptqtp_gguf.codec.tp2_1 import SMALLEST_SCALE, TP2_1
from ptqtp_gguf.codec.tp2_2 import TP2_2
from ptqtp_gguf.errors import QuantizeError
from ptqtp_gguf.quantize import pieces
from ptqtp_gguf.quantize.cuda import driver as nvidia
from ptqtp_gguf.quantize.cuda import encoder as cuda
from ptqtp_gguf.quantize.methods import find, quantize

F32, F16, Q8_0, BF16 = 0, 1, 8, 30
CASES = [(TP2_2, "search"), (TP2_1, "search"), (TP2_0, "search"), (TP2_0, "paper")]
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
        n_groups = rows * weights // block
        stats = np.empty(n_groups, cuda.STATS)
        out = np.full((rows, weights // block * size), 0xAA, np.uint8)
        bits = np.array(moved, np.uint64)
        data = [a.ctypes.data for a in (raw, out, stats, bits)]
        assert self.lib.run(kernel.encode(), data[0], source, n_groups, first, data[1], data[2], data[3]) == 0
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


LONELY = np.array([[1e-45, *[0] * 127], [0] * 128], np.float32)  # the mean of a group's weights is 0
odd = st.floats(-9.5, 9.5, width=32) | st.sampled_from([0.0, -0.0, 1e-30, 1e-40, 1e-5, 0.5, 9.6875, -9.6875])


@given(w=hnp.arrays(np.float32, (2, 128), elements=odd))
@example(w=LONELY)
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


# ---- without a device ----


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
    # What the compiler is given: the file and the headers beside it.
    texts = {f.name: f.read_text() for f in (cuda.SOURCE_FILE, *cuda.SOURCE_FILE.parent.glob("*.cuh"))}
    monkeypatch.setattr(cuda, "SOURCE_FILE", tmp_path / cuda.SOURCE_FILE.name)
    for right, wrong, kernel in (
        ("2.5f * s", "2.6f * s", "search_tp2_1"),
        ("sum == 2 ? 0 : -1", "sum == 2 ? -1 : 0", "search_tp2_2"),
        ("e2 < best ? d", "e2 <= best ? d", "tp2_0"),
    ):
        assert any(right in text for text in texts.values()), f"{right!r} is in none of {sorted(texts)}"
        for name, text in texts.items():
            (tmp_path / name).write_text(text.replace(right, wrong))
        with pytest.raises(QuantizeError, match=f"{kernel} makes other bytes than the CPU; .* use --device cpu"):
            cuda.CudaEncoder()
