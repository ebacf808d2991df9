"""A piece of a tensor in one type -> the same piece in another: decode, look at every value, quantize.

A piece is some whole rows. The encoder is the CPU's or the GPU's; both give the same bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np

from ..codec import F32, TYPES, U8, TensorType, native
from ..errors import QuantizeError
from ..files import FLOAT_IDS, Q8_0_ID
from ..llamacpp import ggml
from ..source import Importance
from . import methods
from .cuda import encoder as cuda
from .pieces import FLOOR, MASK, Done, Encoded, Encoder, Pending, to_float
from .values import first_not_finite, reach


def _runs(w: F32, first: int, importance: Importance | None, planes: bool) -> Iterator[tuple[slice, F32 | None]]:
    """The piece w (R, C), whose first weight has the index first, in runs of rows of one expert, with importance.

    planes: an expert that no token has reached goes without, since our methods know better then than all ones.
    """
    if importance is None:
        yield slice(0, len(w)), None
        return
    at = first // w.shape[1]
    rows = np.arange(at, at + len(w), dtype=np.int64)
    for run, values in importance.split(rows):
        unseen = planes and int(rows[run.start]) // importance.rows in importance.unseen
        yield run, None if unseen else values


class CpuEncoder:
    """All on the CPU, a piece at once with all threads. use_reference: the numpy methods, not the native ones."""

    depth = 1
    name = "cpu"

    def __init__(self, threads: int = 0, use_reference: bool = False) -> None:
        self.threads, self.use_reference = threads, use_reference

    def submit(
        self, raw: U8, source_type: int, target: int, method: str, first: int, importance: Importance | None = None
    ) -> Done:
        kind = TYPES.get(target)
        if target == source_type and target not in FLOAT_IDS:
            if kind:
                return Done(Encoded(raw, hash=native.check(kind, raw, first, self.threads)[1]))
            return Done(Encoded(raw, bad=first_not_finite(target, raw)))
        w = to_float(raw, source_type, self.threads)
        scan = native.scan(w.reshape(-1), kind.group if kind else 32, FLOOR, self.threads)
        data, stats = raw, native.Stats(0.0, 0.0, 0)
        if scan.bad >= 0 or scan.largest > reach(target):
            return Done(Encoded(raw[:0], 0.0, 0.0, *scan))
        if kind or target != source_type:
            runs = list(_runs(w, first, importance, kind is not None))
            parts = [self._run(target, method, w[run], h, first + run.start * w.shape[1]) for run, h in runs]
            data = np.concatenate([p for p, _ in parts]) if len(parts) > 1 else parts[0][0]
            error, power, hashes = (sum(column) for column in zip(*(s for _, s in parts), strict=True))
            stats = native.Stats(error, power, hashes & MASK)
        return Done(Encoded(data, stats.error, stats.power, *scan, stats.hash))

    def _run(self, target: int, method: str, w: F32, importance: F32 | None, first: int) -> tuple[U8, native.Stats]:
        """Rows w (R, C) that share their importance (C,); first: index of the first weight."""
        kind = TYPES.get(target)
        if kind:
            return self._planes(kind, method, w, importance, first)
        return self._plain(w, importance, target), native.Stats(0.0, 0.0, 0)

    def _planes(
        self, kind: TensorType, method: str, w: F32, importance: F32 | None, first: int
    ) -> tuple[U8, native.Stats]:
        if not self.use_reference:
            return native.quantize_stats(kind, method, w, importance, self.threads, first)
        data = methods.quantize(kind, methods.find(method), w, importance, use_reference=True)
        r = native.dequantize(kind, data)
        error, power = float(np.vdot(w - r, w - r)), float(np.vdot(w, w))
        return data, native.Stats(error, power, native.float_hash(r.reshape(-1), first))

    def _plain(self, w: F32, importance: F32 | None, target: int) -> U8:
        if target == Q8_0_ID and not self.use_reference:
            return native.to_q8_0(w, self.threads)
        return ggml.quantize(target, w, importance, self.threads)

    def close(self) -> None:
        pass


class GpuEncoder:
    """On the GPU what the GPU can do, the rest, as all that is weighted by importance, on the CPU."""

    depth = cuda.IN_FLIGHT
    name = "cuda"

    def __init__(self, threads: int = 0) -> None:
        self._gpu, self._cpu = cuda.CudaEncoder(), CpuEncoder(threads)

    def submit(
        self, raw: U8, source_type: int, target: int, method: str, first: int, importance: Importance | None = None
    ) -> Pending:
        takes = source_type in cuda.SOURCES and (target, "" if target == Q8_0_ID else method) in cuda.KERNELS
        if takes and target != source_type and importance is None:
            return self._gpu.submit(raw, source_type, target, method, first)
        return self._cpu.submit(raw, source_type, target, method, first, importance)

    def close(self) -> None:
        self._gpu.close()


def make_encoder(device: str, threads: int, use_reference: bool = False) -> Encoder:
    """device: cpu, cuda, or auto: cuda where one works. Raises QuantizeError for any other, or a cuda that fails."""
    if device == "auto" and not use_reference and cuda.available():
        with contextlib.suppress(QuantizeError):  # a GPU that fails its check at the start
            return GpuEncoder(threads)
    if device in ("auto", "cpu"):
        return CpuEncoder(threads, use_reference)
    if device == "cuda":
        return GpuEncoder(threads)
    raise QuantizeError(f"no device '{device}'; there are auto, cpu, cuda")
