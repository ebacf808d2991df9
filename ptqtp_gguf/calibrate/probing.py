"""How much an error in each matrix changes the model's output: noise is put into its outputs, and the divergence told.

To second order the KL divergence is a sum over matrices of their relative squared output errors, each times a factor of
its own (SignRoundV2 and others estimate it from gradients; here it is measured, by forward passes alone). Matrices of
one role, such as ffn_down, in neighbouring layers are measured together.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..codec import F32, I32
from ..llamacpp import Model, Probe

TOKENS = 256  # of the text that is looked at; the second half is scored
NOISE = 0.003  # of the energy of a matrix' outputs, of each matrix
BANDS = 5  # of layers: the first, the last, and thirds between
_BLOCK = re.compile(r"blk\.(\d+)\.(.*)\.weight")


def groups(names: list[str]) -> list[list[str]]:
    """Matrices that are measured together."""
    roles: dict[str, dict[int, str]] = {}
    alone = []
    for name in names:
        match = _BLOCK.fullmatch(name)
        if match:
            roles.setdefault(match[2], {})[int(match[1])] = name
        else:
            alone.append([name])
    found = []
    for by in roles.values():
        layers = sorted(by)
        inner = np.array_split(np.array(layers[1:-1], int), BANDS - 2)
        bands = [layers[:1], *(part.tolist() for part in inner), layers[1:][-1:]]
        found += [[by[i] for i in band] for band in bands if band]
    return found + alone


def measure(
    path: Path,
    tokens: I32,
    names: list[str],
    threads: int,
    done: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """By name: KL divergence of the model for a relative squared error of 1 in a matrix' outputs, linearly continued.

    tokens  int32 (N,), of text that the model would write
    names   weight tensors; token_embd.weight as the one that is looked up in
    Raises InputError where the runtime fails.
    """
    tokens = tokens[:TOKENS]
    scored = np.arange(len(tokens)) >= len(tokens) // 2
    found: dict[str, float] = {}
    parts = groups(names)
    with Model(path) as model, Probe(model, len(tokens), threads) as probe:
        base = probe.run(tokens, scored, (), _noise(0)).copy()
        for i, group in enumerate(parts):
            done(i, len(parts))
            changed = divergence(base, probe.run(tokens, scored, group, _noise(i)))
            worth = max(0.0, changed) / (NOISE * len(group))
            found |= {name: worth if np.isfinite(worth) else 0.0 for name in group}
        done(len(parts), len(parts))
    return found


def _noise(seed: int) -> Callable[[str, F32], None]:
    rng = np.random.default_rng(seed)

    def change(name: str, y: F32) -> None:
        size = np.sqrt(NOISE * np.mean(np.square(y), axis=-1, keepdims=True))
        y += size * rng.standard_normal(y.shape, np.float32)

    return change


def divergence(p: F32, q: F32) -> float:
    """Mean KL divergence of rows of logits q from those of p, float32 (N, V)."""
    total = 0.0
    for a, b in zip(p, q, strict=True):  # a row at a time: a vocabulary is long
        a, b = a - a.max(), b - b.max()
        e = np.exp(a)
        z = float(e.sum())
        log = a - b
        total += float(e @ log) / z - float(np.log(z)) + float(np.log(np.exp(b).sum()))
    return total / max(1, len(p))
