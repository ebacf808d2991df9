"""Quantizers on an NVIDIA GPU: equality with the CPU, speed, and a 70B model's worth of tensors through the encoder.

    python tools/bench/bench_cuda.py [--millions 100] [--seconds 2] [--layers 80] [--json FILE]

Equality is against native.quantize and native.to_q8_0. Speed is of the kernels alone, of pieces that already lie in
pinned memory (upload, kernels, download), and of pieces in ordinary memory; the CPU's on the same piece beside it. The
model has Llama-3-70B's shapes in bf16, one set of weights a shape, in ordinary memory; disk is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gguf
import numpy as np

from ptqtp_gguf.codec import native
from ptqtp_gguf.codec.tp2_0 import TP2_0
from ptqtp_gguf.codec.tp2_1 import TP2_1, scale_to_float
from ptqtp_gguf.codec.tp2_2 import TP2_2
from ptqtp_gguf.quantize.cuda import encoder as cuda
from ptqtp_gguf.quantize.cuda.driver import call
from ptqtp_gguf.quantize.methods import find, quantize

F32, F16, Q8_0, BF16 = 0, 1, 8, 30
CASES = [(TP2_2.id, "search"), (TP2_1.id, "search"), (TP2_0.id, "search"), (TP2_0.id, "paper"), (Q8_0, "")]
TYPES = {TP2_2.id: TP2_2, TP2_1.id: TP2_1, TP2_0.id: TP2_0}
COLUMNS = 8192
PIECE = 64 << 20  # bytes

LAYER = {
    "attn_q": (8192, 8192),
    "attn_k": (1024, 8192),
    "attn_v": (1024, 8192),
    "attn_output": (8192, 8192),
    "ffn_gate": (28672, 8192),
    "ffn_up": (28672, 8192),
    "ffn_down": (8192, 28672),
}
LAYERS, VOCABULARY = 80, (128256, 8192)


def name_of(target: int, method: str) -> str:
    return f"{TYPES[target].name} {method}" if target in TYPES else "Q8_0"


def to_bf16(w: np.ndarray) -> np.ndarray:
    bits = w.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def samples(n: int) -> Iterator[tuple[str, int, np.ndarray, np.ndarray]]:
    """(name, source type, raw rows, the same as float32), n weights each."""
    rng = np.random.default_rng(11)
    rows = max(1, n // COLUMNS)
    shape = rows, COLUMNS
    gaussian = 0.02 * rng.standard_normal(shape, np.float32)
    laplace = np.float32(0.02) * (rng.standard_exponential(shape, np.float32) * np.sign(gaussian))
    t5 = gaussian / np.sqrt(rng.standard_gamma(2.5, shape, np.float32) / 2.5)
    codes = rng.integers(40, 200, size=(rows, COLUMNS // 32)).astype(np.uint8)
    levels = rng.choice(np.array([-5, -3, -2, -1, 0, 1, 2, 3, 5], np.float32), size=(rows, COLUMNS // 32, 32))
    exact = (scale_to_float(codes)[..., None] * levels).reshape(shape)
    mixed = gaussian.copy()
    mixed[::5] = 0
    mixed[1::5] *= np.float32(1e-5)
    mixed[2::5, ::3] = 0.25
    mixed[3::5] = np.exp(gaussian[3::5] * 300) * np.float32(1e-3)
    mixed = np.clip(mixed, -9.6, 9.6)
    bf16 = to_bf16(laplace)
    f16 = gaussian.astype(np.float16)
    for name, w in (("gaussian", gaussian), ("laplace", laplace), ("student-t5", t5), ("levels", exact)):
        yield name, F32, w.view(np.uint8), w
    yield "zeros, tiny, ties, wide", F32, mixed.view(np.uint8), mixed
    yield "laplace bf16", BF16, bf16.view(np.uint8), (bf16.astype(np.uint32) << 16).view(np.float32)
    yield "gaussian f16", F16, f16.view(np.uint8), f16.astype(np.float32)
    q8 = gguf.quants.quantize(t5[: max(1, rows // 4)], gguf.GGMLQuantizationType.Q8_0)
    yield "student-t5 q8_0", Q8_0, q8, gguf.quants.dequantize(q8, gguf.GGMLQuantizationType.Q8_0)


def on_cpu(target: int, method: str, w: np.ndarray) -> np.ndarray:
    if target in TYPES:
        return quantize(TYPES[target], find(method), w)
    return native.to_q8_0(w)


def check_equality(encoder: cuda.CudaEncoder, n: int) -> list[dict[str, Any]]:
    """Blocks that differ, of all."""
    out = []
    for name, source, raw, w in samples(n):
        for target, method in CASES:
            got = encoder.submit(raw, source, target, method).result()
            start = time.perf_counter()
            expected = on_cpu(target, method, w)
            seconds = time.perf_counter() - start
            size = cuda.TARGETS[target][1]
            differ = int((got.data.reshape(-1, size) != expected.reshape(-1, size)).any(axis=1).sum())
            row = {"data": name, "method": name_of(target, method), "weights": w.size, "blocks": expected.size // size}
            row |= {"differ": differ, "cpu_gws": w.size / seconds / 1e9}
            if target in TYPES:
                r = native.dequantize(TYPES[target], expected[:64]).astype(np.float64)
                few = encoder.submit(raw[:64], source, target, method).result()
                if method != "paper":
                    row["error_off"] = abs(few.error / max(((w[:64] - r) ** 2).sum(), 1e-300) - 1)
            out.append(row)
            print(f"{name:24} {row['method']:14} {row['blocks']:>9} blocks, {differ} differ", flush=True)
    return out


def repeat(seconds: float, f: Callable[[], None], settle: Callable[[], None]) -> float:
    """Mean seconds of f, after a warm-up."""
    f()
    settle()
    start, times = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(3):
            f()
        settle()
        times += 3
    return (time.perf_counter() - start) / times


def speed(encoder: cuda.CudaEncoder, seconds: float) -> list[dict[str, Any]]:
    """Gweights/s of a piece of bf16 weights."""
    rng = np.random.default_rng(3)
    w = 0.02 * rng.standard_normal((PIECE // 2 // COLUMNS, COLUMNS), np.float32)
    raw = to_bf16(w).view(np.uint8)
    values = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    device, out = encoder.device, []
    for target, method in CASES:
        result = encoder.submit(raw, BF16, target, method).result()
        slot = encoder._slots[0]
        slot.source.reserve(raw.size)
        encoder.submit(raw, BF16, target, method).result()
        encoder.submit(raw, BF16, target, method).result()
        groups = w.size // cuda.TARGETS[target][0]
        threads = groups * (cuda.LANES if target == TP2_0.id else 1)
        stats = slot.stats.address + sum(cuda.FOLDS) * cuda.STATS.itemsize
        kernel = cuda.KERNELS[target, method]
        extra = (slot.moved.address,) if method == "paper" else ()

        piece = (slot.source.address, np.int32(BF16), np.uint32(groups))
        place = (np.uint64(0), slot.out.address, stats)
        alone = partial(device.launch, kernel, threads, *piece, *place, *extra)
        alone_s = repeat(seconds, alone, lambda: call(device.driver.cuStreamSynchronize(device.compute)))

        flying: deque[cuda.Pending] = deque()

        def settle(flying: deque[cuda.Pending] = flying) -> None:
            while flying:
                flying.popleft().result()

        def pinned(target: int = target, method: str = method, flying: deque[cuda.Pending] = flying) -> None:
            buffer = encoder.buffer(*raw.shape)
            flying.append(encoder.submit(buffer, BF16, target, method))
            if len(flying) > 1:
                flying.popleft().result(copy=False)

        def ordinary(target: int = target, method: str = method, flying: deque[cuda.Pending] = flying) -> None:
            flying.append(encoder.submit(raw, BF16, target, method))
            if len(flying) > 1:
                flying.popleft().result()

        for _ in range(2):  # both pinned buffers hold the piece
            encoder.buffer(*raw.shape)[:] = raw
            encoder.submit(encoder.buffer(*raw.shape), BF16, target, method).result()
        pinned_s = repeat(seconds, pinned, settle)
        ordinary_s = repeat(seconds, ordinary, settle)
        rows = len(values) if target != TP2_0.id else len(values) // 4
        cpu_s = min(timed(partial(on_cpu, target, method, values[:rows])) for _ in range(2))
        row: dict[str, Any] = {
            "method": name_of(target, method),
            "kernel": w.size / alone_s / 1e9,
            "pinned": w.size / pinned_s / 1e9,
            "ordinary": w.size / ordinary_s / 1e9,
            "cpu": rows * COLUMNS / cpu_s / 1e9,
            "relative_mse": result.error / result.power,
        }
        out.append(row)
        print(
            f"{row['method']:14} Gweights/s: kernel {row['kernel']:7.2f}, from pinned memory {row['pinned']:6.2f}, "
            f"from ordinary memory {row['ordinary']:6.2f}; CPU, {os.cpu_count()} cores: {row['cpu']:.4f}, "
            f"{row['ordinary'] / row['cpu']:.0f} times",
            flush=True,
        )
    return out


def timed(f: Callable[[], object]) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def model(encoder: cuda.CudaEncoder, target: int, method: str, layers: int) -> dict[str, Any]:
    """Every tensor of the model through the encoder: seconds, and bytes each way."""
    rng = np.random.default_rng(5)
    tile = to_bf16(0.02 * rng.standard_normal(1 << 25, np.float32))
    weights = {
        shape: np.resize(np.roll(tile, 31 * k), shape).view(np.uint8)
        for k, shape in enumerate(sorted({*LAYER.values(), VOCABULARY}))
    }
    tensors = [(VOCABULARY, Q8_0, "")] * 2 + [(s, target, method) for s in LAYER.values()] * layers
    flying: deque[cuda.Pending] = deque()
    error = power = 0.0
    out_bytes = pieces = 0

    def take() -> None:
        nonlocal error, power, out_bytes
        got = flying.popleft().result(copy=False)
        out_bytes += got.data.nbytes
        error, power = error + got.error, power + got.power

    start = time.perf_counter()
    for shape, kind, how in tensors:
        raw = weights[shape]
        per = max(1, PIECE // raw.shape[1])
        for first in range(0, len(raw), per):
            piece = raw[first : first + per]
            flying.append(encoder.submit(piece, BF16, kind, how, first * shape[1]))
            pieces += 1
            if len(flying) > 1:
                take()
    while flying:
        take()
    seconds = time.perf_counter() - start
    n = sum(s[0] * s[1] for s, _, _ in tensors)
    row = {
        "method": name_of(target, method),
        "weights": n,
        "seconds": seconds,
        "pieces": pieces,
        "out_bytes": out_bytes,
    }
    row |= {"gws": n / seconds / 1e9, "relative_mse": error / power}
    print(
        f"model, {name_of(target, method)}: {n / 1e9:.2f} G weights in {len(tensors)} tensors, {pieces} pieces: "
        f"{seconds:.1f} s, {row['gws']:.2f} Gweights/s, {2 * n / 1e9:.0f} GB in, {out_bytes / 1e9:.1f} GB out",
        flush=True,
    )
    return row


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--millions", type=int, default=100, help="weights compared, all distributions together")
    p.add_argument("--seconds", type=float, default=2, help="of each measurement")
    p.add_argument("--layers", type=int, default=LAYERS, help="of the model; 0 leaves it out")
    p.add_argument("--json", help="write the figures to this file")
    args = p.parse_args()
    start = time.perf_counter()
    with cuda.CudaEncoder() as encoder:
        print(f"{encoder.device.name}, kernels compiled in {time.perf_counter() - start:.1f} s", flush=True)
        report: dict[str, Any] = {"device": encoder.device.name, "cpus": os.cpu_count()}

        def save() -> None:
            if args.json:
                with open(args.json, "w") as f:
                    json.dump(report, f, indent=1)

        report["equality"] = check_equality(encoder, args.millions * 1_000_000 // 8)
        save()
        report["speed"] = speed(encoder, args.seconds)
        save()
        if args.layers:
            report["model"] = [
                model(encoder, TP2_1.id, "search", args.layers),
                model(encoder, TP2_0.id, "search", args.layers),
                model(encoder, TP2_0.id, "paper", args.layers),
            ]
            save()
    differ = sum(row["differ"] for row in report["equality"])
    n = sum(row["weights"] for row in report["equality"])
    print(f"{n / 1e6:.0f} M weights compared, {differ} blocks differ")


if __name__ == "__main__":
    main()
