"""A Llama forward pass in float64 numpy, straight from a GGUF file's dequantized tensors: the runtime's referee.

Every matrix product is "dequantize and multiply". With `activations="rounded"` the inputs of products with quantized
weights are rounded first, as the runtime does: to Q8_0, or for TP2_1 and TP2_2 (panels) to the same codes with a float
scale;
"exact" leaves them alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ptqtp_gguf.codec import TP2_1, TP2_2
from ptqtp_gguf.files.gguf import FLOAT_IDS, Reader


def round_blocks(x: np.ndarray, scale: type[np.floating]) -> np.ndarray:
    """x (..., C) to the values of its blocks of 32: codes round(x/d) for d = max|x|/127, and d itself in type scale."""
    blocks = x.astype(np.float32).reshape(-1, 32)
    d = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    inverse = np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)
    codes = np.rint(blocks * inverse)
    return (codes.astype(np.float64) * d.astype(scale).astype(np.float64)).reshape(x.shape)


class Llama:
    """Weights of a `llama` GGUF in float64."""

    def __init__(self, path: Path) -> None:
        with Reader(path) as r:

            def get(key: str) -> Any:
                return r.get(f"llama.{key}")

            self.heads = int(get("attention.head_count"))
            self.kv_heads = int(get("attention.head_count_kv"))
            self.layers = int(get("block_count"))
            self.eps = float(get("attention.layer_norm_rms_epsilon"))
            self.theta = float(get("rope.freq_base") or 10000.0)
            self.w = {t.name: r.rows_f32(t).astype(np.float64) for t in r.tensors}
            self.quantized = {t.name for t in r.tensors if t.type not in FLOAT_IDS}
            self.panels = {t.name for t in r.tensors if t.type in (TP2_1.id, TP2_2.id)}

    def product(self, x: np.ndarray, name: str, activations: str) -> np.ndarray:
        """x (T, C) times the matrix (R, C) -> (T, R)."""
        if activations == "rounded" and name in self.quantized:
            x = round_blocks(x, np.float32 if name in self.panels else np.float16)
        return x @ self.w[name].T

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + self.eps) * self.w[name][0]

    def rope(self, x: np.ndarray) -> np.ndarray:
        """x (T, H, D); pairs of neighbours, as llama.cpp has them for this architecture."""
        tokens, _, dim = x.shape
        angle = np.arange(tokens)[:, None, None] * self.theta ** (-np.arange(0, dim, 2) / dim)
        even, odd = x[..., 0::2], x[..., 1::2]
        out = np.empty_like(x)
        out[..., 0::2] = even * np.cos(angle) - odd * np.sin(angle)
        out[..., 1::2] = even * np.sin(angle) + odd * np.cos(angle)
        return out

    def logits(self, tokens: list[int], activations: str = "exact") -> np.ndarray:
        """Logits of every position: (T, vocabulary)."""
        x = self.w["token_embd.weight"][tokens]
        n = len(tokens)
        mask = np.triu(np.full((n, n), -np.inf), 1)
        for i in range(self.layers):
            b = f"blk.{i}."
            mul = lambda v, name, b=b: self.product(v, f"{b}{name}.weight", activations)  # noqa: E731
            h = self.norm(x, f"{b}attn_norm.weight")
            q = self.rope(mul(h, "attn_q").reshape(n, self.heads, -1))
            k = self.rope(mul(h, "attn_k").reshape(n, self.kv_heads, -1))
            v = mul(h, "attn_v").reshape(n, self.kv_heads, -1)
            k, v = (np.repeat(a, self.heads // self.kv_heads, axis=1) for a in (k, v))
            scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(q.shape[-1]) + mask
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            x = x + mul(np.einsum("hts,shd->thd", weights, v).reshape(n, -1), "attn_output")
            h = self.norm(x, f"{b}ffn_norm.weight")
            gate = mul(h, "ffn_gate")
            x = x + mul(gate / (1 + np.exp(-gate)) * mul(h, "ffn_up"), "ffn_down")
        head = "output.weight" if "output.weight" in self.w else "token_embd.weight"
        return self.product(self.norm(x, "output_norm.weight"), head, activations)
