#!/usr/bin/env python3
"""An original for comparisons from a quantized GGUF: its weights, off the lattice of the types they are stored in.

    dither.py SOURCE.gguf BF16.gguf [--seed N]

Where a model is to be had only as a quantized GGUF, its dequantized weights are no fair original: the source's own
types find their lattice again and read an error near zero. So BF16.gguf gets them with uniform noise of one
quantization step of their group added, -1/2 to 1/2 of it: as far as the unknown weights lay from them, and as good a
model as SOURCE.
SOURCE: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K and unquantized tensors. The layout and all metadata are those of
SOURCE; weights become BF16, unquantized tensors stay. Same seed, same bytes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import Q4_K, dequantize
from numpy.typing import NDArray

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

PLAIN = (T.F32, T.F16, T.BF16)
LEGACY = (T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0)  # the step is the first fp16 of a block of 32
ROWS = 4096  # at a time


def half(data: U8) -> F32:
    """uint8 (N, 2*K) -> float32 (N, K)."""
    return np.ascontiguousarray(data).view(np.float16).astype(np.float32)


def steps(blocks: U8, kind: T) -> F32:
    """Blocks (N, bytes) -> the quantization step of each weight (N, weights). Raises SystemExit for other types."""
    if kind in LEGACY:
        return np.repeat(np.abs(half(blocks[:, :2])), 32, axis=1)
    if kind in (T.Q4_K, T.Q5_K):
        scales, _ = Q4_K.get_scale_min(np.ascontiguousarray(blocks[:, 4:16]))
        return np.repeat(np.abs(half(blocks[:, :2]) * scales.reshape(len(blocks), 8).astype(np.float32)), 32, axis=1)
    if kind == T.Q6_K:
        scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
        return np.repeat(np.abs(half(blocks[:, 208:210]) * scales), 16, axis=1)
    raise SystemExit(f"dither.py: {kind.name}: its quantization step is not known here; use a file of other types")


def to_bf16(w: F32) -> U8:
    """float32 (R, C), finite -> bf16 to nearest even, uint8 (R, 2*C)."""
    bits = np.ascontiguousarray(w, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).view(np.uint8)


def dithered(rows: U8, kind: T, rng: np.random.Generator) -> U8:
    """Rows of a quantized type -> bf16 rows."""
    w = dequantize(rows, kind)
    step = steps(rows.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1]), kind).reshape(w.shape)
    return to_bf16(w + step * (rng.random(w.shape, np.float32) - np.float32(0.5)))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    if not args.source.is_file():
        raise SystemExit(f"dither.py: {args.source} is no file")
    if args.target.exists() and args.target.samefile(args.source):
        raise SystemExit(f"dither.py: {args.target} is the source; name another file")
    reader = GGUFReader(args.source)
    rng = np.random.default_rng(args.seed)
    partial = args.target.with_name(args.target.name + ".partial")
    writer = GGUFWriter(partial, str(reader.fields["general.architecture"].contents()))
    for key, value in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        kind = value.types[0]
        writer.add_key_value(key, value.contents(), kind, value.types[-1] if kind == GGUFValueType.ARRAY else None)
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_BF16))
    for t in reader.tensors:
        shape = [int(n) for n in reversed(t.shape)]
        if t.tensor_type in (T.F32, T.F16):
            writer.add_tensor_info(t.name, shape, t.data.dtype, t.data.nbytes, t.tensor_type)
        else:  # raw bytes: the writer wants the shape in bytes
            shape[-1] *= 2
            writer.add_tensor_info(t.name, shape, np.dtype(np.uint8), int(np.prod(shape)), T.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for t in reader.tensors:
        if t.tensor_type in PLAIN:
            writer.write_tensor_data(t.data)
            continue
        rows = t.data.reshape(-1, t.data.shape[-1])
        parts = [dithered(rows[i : i + ROWS], t.tensor_type, rng) for i in range(0, len(rows), ROWS)]
        writer.write_tensor_data(np.concatenate(parts))
    writer.close()
    partial.rename(args.target)


if __name__ == "__main__":
    main(sys.argv[1:])
