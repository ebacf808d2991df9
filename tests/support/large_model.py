"""A model of a hundred megabytes, made in a moment: the talking model's tokenizer, and the same few rows again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from talking_model import write_talking_model

from ptqtp_gguf.codec import native
from ptqtp_gguf.codec.tp2_1 import TP2_1
from ptqtp_gguf.files import (
    F32_ID,
    INT32,
    UINT16,
    OutTensor,
    Reader,
    kv_scalar,
    kv_u32,
    row_size,
)
from ptqtp_gguf.files.gguf import write_stream

WIDTH, HIDDEN, HEADS, LAYERS = 1024, 8192, 8, 8
MATRICES = {
    **{f"attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")},
    **{"ffn_gate": (WIDTH, HIDDEN), "ffn_up": (WIDTH, HIDDEN), "ffn_down": (HIDDEN, WIDTH)},
}


def write_large_model(folder: Path, parts: int = 1) -> list[Path]:
    """A Llama in TP2_1, of 103 MB, in one file or split; the parts, the first one first."""
    small = write_talking_model(folder / "small.gguf")
    with Reader(small) as r:
        kvs, alignment = {**r.header.kvs}, r.header.alignment
    small.unlink()
    sizes = {
        "embedding_length": WIDTH,
        "feed_forward_length": HIDDEN,
        "attention.head_count": HEADS,
        "block_count": LAYERS,
    }
    changed = [kv_u32(f"llama.{key}", n) for key, n in sizes.items()]
    for kv in [*changed, kv_u32("ptqtp.format_version", 1)]:
        kvs[kv.key] = kv
    vocabulary = kvs["llama.vocab_size"].value()
    assert isinstance(vocabulary, int)
    rng = np.random.default_rng(7)
    some = native.quantize(TP2_1, "search", rng.normal(size=(64, WIDTH)).astype(np.float32) * 0.03).reshape(-1)
    tensors = [
        *(OutTensor(f"{name}.weight", (WIDTH, vocabulary), F32_ID) for name in ("token_embd", "output")),
        *(OutTensor(f"{name}.weight", (WIDTH,), F32_ID) for name in ("output_norm",)),
    ]
    for i in range(LAYERS):
        tensors += [OutTensor(f"blk.{i}.{name}.weight", shape, TP2_1.id) for name, shape in MATRICES.items()]
        tensors += [OutTensor(f"blk.{i}.{name}.weight", (WIDTH,), F32_ID) for name in ("attn_norm", "ffn_norm")]

    def data(t: OutTensor) -> np.ndarray:
        if t.type == TP2_1.id:
            return np.resize(some, (t.shape[1], row_size(t.type, t.shape[0])))
        values = rng.normal(size=t.shape[::-1]) if len(t.shape) > 1 else np.ones(t.shape)
        return values.astype(np.float32).view(np.uint8)

    paths = []
    for no in range(parts):
        own = tensors[no * len(tensors) // parts : (no + 1) * len(tensors) // parts]
        split = [kv_scalar("split.no", UINT16, no), kv_scalar("split.count", UINT16, parts)]
        split.append(kv_scalar("split.tensors.count", INT32, len(tensors)))
        words = [*(kvs.values() if no == 0 else []), *(split if parts > 1 else [])]
        path = folder / (f"large-{no + 1:05}-of-{parts:05}.gguf" if parts > 1 else "large.gguf")
        with path.open("wb") as file:
            for _ in write_stream(file, words, own, alignment, map(data, own)):
                pass
        paths.append(path)
    return paths
