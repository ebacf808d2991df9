"""The quantizers on an NVIDIA GPU: the same bytes as native.quantize, in one pass from source bytes to packed rows.

    with CudaEncoder() as encoder:
        a = encoder.submit(piece_a, source, 251, "search")   # two pieces in flight: one uploads or downloads
        b = encoder.submit(piece_b, source, 251, "search")   # while the other computes
        write(a.result().data)

The kernels are in kernels.cu, how they get onto the device in nvidia.py.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ...codec import TP2_0, TP2_1, TP2_2, TYPES, U8, native
from ...errors import OutOfReach, QuantizeError
from ..pieces import Encoded
from .driver import OUT_OF_MEMORY, Buffer, CudaError, Device, Unavailable, api, call

_Q8_0 = 8
SOURCES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), _Q8_0: ("Q8_0", 32, 34)}  # ggml's id: block, bytes
TARGETS = {t.id: (t.block, t.size, t.reach) for t in (TP2_2, TP2_1, TP2_0)} | {_Q8_0: (32, 34, math.inf)}
KERNELS = {
    (TP2_2.id, "search"): "search_tp2_2",
    (TP2_1.id, "search"): "search_tp2_1",
    (TP2_0.id, "search"): "search_tp2_0",
    (TP2_0.id, "paper"): "paper_tp2_0",
    (_Q8_0, ""): "q8_0",
}
SOURCE_FILE = Path(__file__).with_name("kernels.cu")

# struct Stats of kernels.cu
STATS = np.dtype(
    [("error", "f8"), ("power", "f8"), ("hash", "u8"), ("bad", "u8"), ("moved", "u8")]
    + [("largest", "f4"), ("groups", "u4"), ("below", "u4"), ("overflow", "u4")]
)
LANES = 8  # threads that share a group of 128
FOLDS = (64, 8192)  # stats left after the second and the first folding; the host merges the last ones
IN_FLIGHT = 2
_NONE = 2**64 - 1
_COPIERS, _COPY_ALONE = 8, 4 << 20  # threads that copy to and from pinned memory; below that many bytes one does


def available() -> bool:
    """Whether CudaEncoder can work here: cuda-bindings, NVRTC, a driver and a device. Never raises."""
    try:
        api()
    except Exception:
        return False
    return True


def merge(stats: np.ndarray[tuple[int], np.dtype[np.void]], data: U8) -> Encoded:
    """Folded stats (n,) of STATS, n > 0, and the rows they belong to."""
    bad = int(stats["bad"].min())
    return Encoded(
        data=data,
        error=math.fsum(stats["error"]),
        power=math.fsum(stats["power"]),
        bad=-1 if bad == _NONE else bad,
        largest=float(stats["largest"].max()),
        groups=int(stats["groups"].sum()),
        below=int(stats["below"].sum()),
        hash=sum(stats["hash"].tolist()) % 2**64,
        moved=int(np.bitwise_or.reduce(stats["moved"])),
    )


class _Slot:
    """Memory of one piece in flight."""

    def __init__(self, device: Device) -> None:
        self.source, self.out, self.stats, self.moved = (Buffer(device) for _ in range(4))
        self.buffers = (self.source, self.out, self.stats, self.moved)
        self.uploaded, self.computed, self.downloaded = (device.event() for _ in range(3))
        self.pending: Pending | None = None


class Pending:
    """A piece on its way; `result` waits for it."""

    def __init__(
        self, encoder: CudaEncoder, slot: _Slot, shape: tuple[int, int], folded: int, kernel: str, reach: float
    ) -> None:
        self._encoder, self._slot = encoder, slot
        self._shape, self._folded, self._kernel, self._reach = shape, folded, kernel, reach
        self._outcome: Encoded | QuantizeError | None = None

    def result(self, copy: bool = True) -> Encoded:
        """The piece; its array is the caller's own.

        With copy=False it may be a view of pinned memory, to be used up before the second piece after this one is
        submitted, or its `buffer` asked for: for a caller who writes it to a file at once.
        Raises OutOfReach where a scale overflows although all weights are finite and within the type's reach,
        QuantizeError where the device failed.
        """
        outcome = self.collect(copy)
        if isinstance(outcome, QuantizeError):
            raise outcome
        return outcome

    def collect(self, copy: bool = True) -> Encoded | QuantizeError:
        """Wait, and move the results out of the slot, which is then free for the next piece."""
        if self._outcome is None:
            self._slot.pending = None
            try:
                self._outcome = self._read(copy)
            except CudaError as e:
                self._outcome = QuantizeError(f"--device cuda: {self._kernel}: {e}; use --device cpu")
        return self._outcome

    def _read(self, copy: bool) -> Encoded | QuantizeError:
        device, slot = self._encoder.device, self._slot
        device.enter()
        call(device.driver.cuEventSynchronize(slot.downloaded))
        data = slot.out.host(self._shape[0] * self._shape[1]).reshape(self._shape)
        if copy:
            pinned, data = data, np.empty(self._shape, np.uint8)
            self._encoder.copy(data.reshape(-1), pinned.reshape(-1))
        stats = slot.stats.host(self._folded * STATS.itemsize).view(STATS)
        encoded = merge(stats, data)
        if stats["overflow"].any() and encoded.bad < 0 and encoded.largest <= self._reach:
            return OutOfReach(f"{self._kernel}: weight beyond the reach of the type's scales")
        return encoded


class CudaEncoder:
    """Quantizes pieces of rows on one device, two in flight. To be used from one thread at a time."""

    def __init__(self, device: int = 0) -> None:
        """Compiles the kernels, some seconds, and checks their bytes against the CPU's.

        Raises QuantizeError where there is no CUDA or no such device, and where the bytes differ.
        """
        try:
            self.device = Device(device, SOURCE_FILE)
            self._slots = [_Slot(self.device) for _ in range(IN_FLIGHT)]
        except (Unavailable, CudaError) as e:
            raise QuantizeError(f"--device cuda: {e}; use --device cpu") from None
        self._turn = 0
        self._closed = False
        self._copiers = ThreadPoolExecutor(_COPIERS, "cuda-copy")
        try:
            self._self_check()
        except QuantizeError:
            self.close()
            raise

    def _self_check(self) -> None:
        """Refuse a compiler or a device that makes other bytes than the CPU: ptxas 13.0 did with an older kernel."""
        rng = np.random.default_rng(0)
        w = 0.02 * rng.standard_normal((64, 1024), np.float32)
        w[::2] *= rng.standard_exponential((32, 1024), np.float32)
        for (target, method), kernel in KERNELS.items():
            got = self.submit(w.view(np.uint8), 0, target, method).result().data
            t = TYPES.get(target)
            expected = native.quantize(t, method, w) if t else native.to_q8_0(w)
            if not np.array_equal(got, expected):
                raise QuantizeError(
                    f"--device cuda: {self.device.name}: {kernel} makes other bytes than the CPU; "
                    "update the driver and NVRTC, or use --device cpu"
                )

    def __enter__(self) -> CudaEncoder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Waits for what is in flight, whose results stay, and gives the memory back."""
        if self._closed:
            return
        self._closed = True
        self.device.enter()
        for slot in self._slots:
            if slot.pending:
                slot.pending.collect()
            for buffer in slot.buffers:
                buffer.release()
        self._copiers.shutdown()
        self.device.close()

    def copy(self, to: U8, source: U8) -> None:
        """Flat copy by a few threads: one alone is slower than PCIe."""
        if to.size < _COPY_ALONE:
            to[:] = source
            return
        step = -(-to.size // _COPIERS)
        parts = [slice(k, k + step) for k in range(0, to.size, step)]
        list(self._copiers.map(lambda s: np.copyto(to[s], source[s]), parts))

    def buffer(self, rows: int, row_bytes: int) -> U8:
        """Pinned memory (rows, row_bytes) to read the next piece into: `submit` of it saves a copy.

        Only for the next `submit` or `probe`. Waits, and raises QuantizeError, as they do.
        """
        slot = self._free_slot()
        try:
            slot.source.reserve(rows * row_bytes)
        except CudaError as e:
            raise self._failed(e, slot, rows, row_bytes) from None
        return slot.source.host(rows * row_bytes).reshape(rows, row_bytes)

    def submit(
        self, raw: U8, source_type: int, target: int, method: str = "search", first: int = 0, moved: int | None = None
    ) -> Pending:
        """Start one piece; waits only where two are in flight already.

        raw          uint8 (R, bytes a row), R > 0: rows as a GGUF holds them; may be changed once this returns
        source_type  ggml's id: F32, F16, BF16 or Q8_0
        target       252 (TP2_2), 251 (TP2_1), 250 (TP2_0) or 8 (Q8_0, which has no method)
        method       "search" or "paper"
        first        index in the tensor of the piece's first weight
        moved        of `paper`: the bits of `probe` of all pieces of the matrix, or-ed: as published, all groups of a
                     matrix stop together. None: the piece is the matrix
        Raises QuantizeError for types, methods or shapes that do not fit, and where memory runs out.
        """
        kernel = KERNELS.get((target, "" if target == _Q8_0 else method))
        if kernel is None:
            raise QuantizeError(f"--device cuda: no method {method} for type {target} on a GPU; use --device cpu")
        return self._start(raw, source_type, target, kernel, first, moved)

    def probe(self, raw: U8, source_type: int) -> Pending:
        """Run `paper` on a piece without keeping the planes: `moved` of the result is for `submit`."""
        return self._start(raw, source_type, TP2_0.id, "probe_paper", 0, None)

    def _free_slot(self) -> _Slot:
        """The slot whose turn it is, its last piece collected."""
        if self._closed:
            raise QuantizeError("--device cuda: the encoder is closed; make a new one")
        self.device.enter()
        slot = self._slots[self._turn]
        if slot.pending:
            slot.pending.collect()
        return slot

    def _start(self, raw: U8, source: int, target: int, kernel: str, first: int, moved: int | None) -> Pending:
        block, size, reach = TARGETS[target]
        rows, weights = _shape(raw, source, block)
        groups = rows * weights // block
        shape = rows, 0 if kernel == "probe_paper" else weights // block * size
        slot = self._free_slot()
        try:
            slot.source.reserve(raw.size)
            slot.out.reserve(shape[0] * shape[1])
            slot.stats.reserve((sum(FOLDS) + groups) * STATS.itemsize, FOLDS[0] * STATS.itemsize)
            slot.moved.reserve(8)
            pinned = slot.source.host(raw.size)
            if pinned.ctypes.data != raw.ctypes.data:
                self.copy(pinned, raw.reshape(-1))
            if moved is not None:
                slot.moved.host(8).view(np.uint64)[0] = moved
            self._run(slot, raw.size, shape[0] * shape[1], kernel, source, groups, first, moved is not None)
        except CudaError as e:
            raise self._failed(e, slot, *raw.shape) from None
        self._turn = (self._turn + 1) % IN_FLIGHT
        slot.pending = Pending(self, slot, shape, min(groups, FOLDS[0]), kernel, reach)
        return slot.pending

    def _run(
        self,
        slot: _Slot,
        nbytes: int,
        out_bytes: int,
        kernel: str,
        source: int,
        groups: int,
        first: int,
        have_moved: bool,
    ) -> None:
        """Upload, kernels, download, each on its own stream."""
        device, u32 = self.device, np.uint32
        slot.source.upload(nbytes)
        if have_moved:
            slot.moved.upload(8)
        device.then(device.up, slot.uploaded, device.compute)

        folded, middle, stats = (slot.stats.address + n * STATS.itemsize for n in (0, FOLDS[0], sum(FOLDS)))

        def fold(last: int) -> None:
            m = min(groups, FOLDS[1])
            device.launch("fold", m, stats, u32(groups), middle, u32(m))
            device.launch("fold", last, middle, u32(m), folded, u32(last))

        threads = groups * (1 if kernel in ("search_tp2_2", "search_tp2_1", "q8_0") else LANES)
        piece = (slot.source.address, np.int32(source), u32(groups))
        if kernel == "probe_paper" or (kernel == "paper_tp2_0" and not have_moved):
            device.launch("probe_paper", threads, *piece, stats)
            if kernel == "paper_tp2_0":
                fold(1)
                device.launch("take_moved", 1, folded, slot.moved.address)
        if kernel != "probe_paper":
            extra = (slot.moved.address,) if kernel == "paper_tp2_0" else ()
            device.launch(kernel, threads, *piece, np.uint64(first), slot.out.address, stats, *extra)
        last = min(groups, FOLDS[0])
        fold(last)

        device.then(device.compute, slot.computed, device.down)
        if out_bytes:
            slot.out.download(out_bytes)
        slot.stats.download(last * STATS.itemsize)
        call(device.driver.cuEventRecord(slot.downloaded, device.down))

    def _failed(self, e: CudaError, slot: _Slot, rows: int, row_bytes: int) -> QuantizeError:
        """The error to raise; the slot's memory is given back, so that smaller pieces may still fit."""
        where = f"--device cuda: {self.device.name}: piece of {rows} rows of {row_bytes} bytes"
        if e.code != OUT_OF_MEMORY:
            return QuantizeError(f"{where}: {e}; use --device cpu")
        self.device.driver.cuCtxSynchronize()
        for buffer in slot.buffers:
            buffer.release()
        free, total = (n >> 20 for n in self.device.free_memory())
        return QuantizeError(
            f"{where}: out of memory, {free} of {total} MiB are free on the device; "
            "free it, submit smaller pieces or use --device cpu"
        )


def _shape(raw: U8, source: int, block: int) -> tuple[int, int]:
    """Rows and weights a row. Raises QuantizeError unless the rows are whole blocks of source and target."""
    if source not in SOURCES:
        known = ", ".join(name for name, _, _ in SOURCES.values())
        raise QuantizeError(f"--device cuda: source type {source} is none of {known}; use --device cpu")
    name, per, size = SOURCES[source]
    if raw.ndim != 2 or raw.dtype != np.uint8 or not raw.size or raw.shape[1] % size or not raw.flags.c_contiguous:
        raise QuantizeError(f"raw is {raw.dtype} {raw.shape}; {name} needs contiguous uint8 rows of {size} byte blocks")
    weights = raw.shape[1] // size * per
    if weights % block:
        raise QuantizeError(f"rows of {weights} weights; the target needs a multiple of {block}")
    return raw.shape[0], weights
