"""Importance matrices: by gguf-py's writer, and by llama-imatrix itself."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from ptqtp_gguf.llamacpp import install

Sums = dict[str, tuple[np.ndarray, np.ndarray]]  # name -> sums (k, C), counts (k,)


def write_imatrix(
    path: Path, entries: Sums, chunks: int = 7, datasets: tuple[str, ...] = ("/home/x/wiki.txt",)
) -> Path:
    """A GGUF imatrix by gguf-py's writer, laid out as llama-imatrix does."""
    writer = gguf.GGUFWriter(path, "x")
    writer.kv_data[0].clear()  # llama-imatrix writes no architecture
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", list(datasets))
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, (sums, counts) in entries.items():
        writer.add_tensor(f"{name}.in_sum2", np.atleast_2d(sums).astype(np.float32))
        writer.add_tensor(f"{name}.counts", np.reshape(counts, (-1, 1)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_table(path: Path, rng: np.random.Generator) -> Path:
    """For the tensors of tiny_gguf, but for output; an expert without a token; a stranger."""
    counts = np.array([10, 0, 4])
    return write_imatrix(
        path,
        {
            "blk.0.attn_q.weight": (rng.exponential(size=64), np.array([50])),
            "blk.0.ffn_down.weight": (np.zeros(96), np.array([0])),
            "blk.0.ffn_gate_exps.weight": (rng.exponential(size=(3, 64)) * counts[:, None], counts),
            "blk.9.attn_q.weight": (rng.exponential(size=640), np.array([50])),
        },
    )


def make_imatrix(model: Path, text: Path, out: Path, *more: str) -> Path:
    """llama-imatrix on a model and a text."""
    install.run_tool(
        "llama-imatrix",
        "-m",
        str(model),
        "-f",
        str(text),
        "-o",
        str(out),
        "-c",
        "128",
        "--chunks",
        "2",
        "-t",
        "2",
        "--no-ppl",
        *more,
        timeout=240,
    )
    return out
