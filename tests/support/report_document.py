"""A comparison document with made-up numbers, for tests of the report."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

from rich.console import Console

from ptqtp_gguf.terminal.comparison import print_comparison

MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
HOSTILE = "</svg></style></title>\"'><script>alert(1)</script>{{ 7*7 }}$x^2$\x00\u202e\ud800 #0a5fc2"


def speed(tg: float, pp: float, size: int) -> list[dict[str, Any]]:
    """Made-up speeds for one and two threads. tg, pp in tokens/s at two."""
    found = []
    for threads, factor, bandwidth in ((1, 0.55, 11.0e9), (2, 1.0, 19.5e9)):
        for test, n_prompt, n_gen, value in (("pp128", 128, 0, pp), ("tg64", 0, 64, tg)):
            v = value * factor
            share = v * size / bandwidth if n_gen else None
            found.append(
                {
                    "test": test,
                    "n_prompt": n_prompt,
                    "n_gen": n_gen,
                    "threads": threads,
                    "median": v,
                    "low": 0.97 * v,
                    "high": 1.02 * v,
                    "samples": [0.97 * v, v, 1.02 * v],
                    "share": share,
                }
            )
    return found


def tensors(level: float, kind: str, blocks: int = 16) -> list[dict[str, Any]]:
    """Made-up errors: smooth over blocks, different by matrix."""
    found: list[dict[str, Any]] = [
        {
            "name": "token_embd.weight",
            "type": "Q8_0",
            "role": "embedding",
            "block": None,
            "weights": 28311552,
            "rel_mse": 3e-5,
        }
    ]
    for b in range(blocks):
        for m, name in enumerate(MATRICES):
            e = level * (1 + 0.4 * math.sin(b / 4 + m)) * (1.6 if m == 6 and b in (0, blocks - 1) else 1.0)
            found.append(
                {
                    "name": f"blk.{b}.{name}.weight",
                    "type": kind,
                    "role": "block matrix",
                    "block": b,
                    "weights": 331776,
                    "rel_mse": e,
                }
            )
        found.append(
            {
                "name": f"blk.{b}.attn_norm.weight",
                "type": "F32",
                "role": "other",
                "block": b,
                "weights": 576,
                "rel_mse": None,
            }
        )
    return found


def quality(kld: float, rise: float, top: float) -> dict[str, Any]:
    """Made-up quality. rise: perplexity over the reference's, less one."""
    return {
        "ppl": 18.42 * (1 + rise),
        "ppl_se": 0.31,
        "ppl_reference": 18.42,
        "ppl_ratio": 1 + rise,
        "ppl_ratio_se": 0.0041,
        "kld": kld,
        "kld_se": 0.03 * kld,
        "kld_median": 0.6 * kld,
        "kld_99": 7 * kld,
        "kld_999": 16 * kld,
        "kld_max": 44 * kld,
        "rms_dp": 100 * kld,
        "rms_dp_se": kld,
        "same_top": top,
        "same_top_se": 0.31,
        "windows": 40,
        "tokens": 10200,
    }


def row(
    label: str,
    kind: str,
    mb: float,
    bpw: float,
    kld: float,
    rise: float,
    top: float,
    tg: float,
    pp: float,
    agree: float,
    right: int,
) -> dict[str, Any]:
    size = int(mb * 1e6)
    return {
        "label": label,
        "kind": kind,
        "file": f"example-{label}.gguf",
        "sha256": (label.encode().hex() * 32)[:64],
        "size": size,
        "bpw": bpw,
        "bpw_blocks": bpw - 0.8,
        "types": {label: 0.97, "Q8_0": 0.03},
        "made": "ptqtp-gguf convert example" if kind == "ours" else f"llama-quantize example {label}",
        "quality": quality(kld, rise, top),
        "generation": {
            "agreement": {"mean": agree, "median": agree + 2, "full": int(agree / 6), "prompts": 16, "limit": 64},
            "cloze": {"right": right, "of": 60, "reference_right": 41, "same_answer": right + 12},
        },
        "speed": speed(tg, pp, int(0.97 * size)),
        "ratios": {},
        "load_s": 0.05 + size / 2e9,
        "ttft_s": 0.4,
        "peak_memory": int(size * 1.15 + 8e7),
        "energy": None,
        "token_bytes": int(0.97 * size),
        "tensors": tensors(kld / 12, label),
        "digits": None,
        "scales": None,
    }


def example() -> dict[str, Any]:
    """A whole document: the original, TP2_1 and four stock types. No number in it was measured."""
    bf16 = row("BF16", "reference", 271.0, 16.1, 1.0, 0.0, 100.0, 48.0, 410.0, 64.0, 41)
    bf16 |= {"quality": None, "generation": None, "tensors": [], "types": {"BF16": 1.0}}
    ours = row("TP2_1", "ours", 76.4, 4.54, 0.112, 0.094, 84.9, 171.0, 640.0, 23.4, 36)
    q4_0 = row("Q4_0", "stock", 91.7, 5.45, 0.061, 0.048, 88.7, 139.0, 655.0, 30.9, 38)
    q4_k = row("Q4_K_M", "stock", 105.4, 6.27, 0.031, 0.021, 91.9, 118.0, 380.0, 37.2, 40)
    iq4 = row("IQ4_XS", "stock", 90.2, 5.36, 0.044, 0.033, 90.3, 121.0, 350.0, 34.5, 39)
    q3 = row("Q3_K_M", "stock", 93.5, 5.56, 0.074, 0.061, 87.6, 109.0, 330.0, 27.8, 37)
    ours["ratios"] = {
        "Q4_0": {
            "tg64 t2": {"median": 1.23, "low": 1.20, "high": 1.26, "clear": True},
            "pp128 t2": {"median": 0.98, "low": 0.95, "high": 1.01, "clear": False},
        },
        "Q4_K_M": {
            "tg64 t2": {"median": 1.45, "low": 1.41, "high": 1.49, "clear": True},
            "pp128 t2": {"median": 1.68, "low": 1.61, "high": 1.75, "clear": True},
        },
        "IQ4_XS": {"tg64 t2": {"median": 1.41, "low": 1.37, "high": 1.45, "clear": True}},
        "Q3_K_M": {"tg64 t2": {"median": 1.57, "low": 1.5, "high": 1.62, "clear": True}},
    }
    ours["digits"] = {
        "values": list(range(-4, 5)),
        "counts": [310, 640, 1220, 1800, 2060, 1790, 1230, 650, 300],
        "zero_share": [0.43, 0.31],
    }
    ours["scales"] = {
        "edges": [(1 + i % 4 / 4) * 2.0 ** (i // 4 - 11) for i in range(25)],
        "counts": [int(4000 * math.exp(-(((i - 11) / 5) ** 2))) for i in range(24)],
    }
    return {
        "schema": 1,
        "model": {
            "name": "Example 135M (made up)",
            "source": "example/example-135m",
            "weights": 134515008,
            "vocab": 49152,
            "architecture": "llama",
        },
        "created": "2026-01-02T03:04:05Z",
        "command": "ptqtp-gguf compare example-135m --against Q4_0,Q4_K_M,IQ4_XS,Q3_K_M --output report/",
        "versions": {"ptqtp_gguf": "0.0.0", "runtime": "0.0.0 (made up)"},
        "machine": {
            "cpu": "Example CPU",
            "cores": 2,
            "memory": 8 * 2**30,
            "os": "Linux 6.1 x86_64",
            "features": ["avx2", "fma", "avx512f", "avx512vnni"],
            "kernel": "avx512vnni",
            "governor": None,
            "load": [0.12, 1.94],
        },
        "text": {
            "name": "made-up.txt",
            "sha256": "ab" * 32,
            "builtin": False,
            "windows": 40,
            "ctx": 512,
            "tokens": 10200,
        },
        "bench": {
            "prompt": [128],
            "generate": [64],
            "threads": [1, 2],
            "rounds": 5,
            "bandwidth": {"1": 11.0, "2": 19.5},
        },
        "warnings": ["the load of the machine was 1.94 at the end: another process may have slowed the last rounds"],
        "rows": [bf16, ours, q4_0, q4_k, iq4, q3],
    }


def gaps() -> dict[str, Any]:
    """The same, with all left out that may be missing."""
    doc = copy.deepcopy(example())
    doc |= {"text": None, "bench": None, "warnings": []}
    doc["machine"] = {"cpu": "Example CPU"}
    for r in doc["rows"]:
        for key in set(r) - {"label", "kind", "size"}:
            del r[key]
    return doc


def changed(path: str, value: object) -> dict[str, Any]:
    """The example with another value at a path of keys and places."""
    doc = example()
    at: Any = doc
    *way, last = path.split("/")
    for key in way:
        at = at[int(key) if isinstance(at, list) else key]
    at[last] = value
    return doc


def attacked(value: Any, key: str = "") -> Any:
    """The document with hostile text wherever text may stand."""
    if isinstance(value, dict):
        return {k: attacked(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [attacked(v, key) for v in value]
    if not isinstance(value, str) or key == "kind" or (key == "name" and value.startswith("blk.")):
        return value
    return value + HOSTILE if key in ("label", "test") else HOSTILE


def printed(document: dict[str, Any], encoding: str = "utf-8", width: int = 160) -> str:
    """What the terminal shows of a document."""
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    print_comparison(document, Console(file=out, width=width, highlight=False, color_system=None))
    out.flush()
    return out.buffer.getvalue().decode(encoding)
