"""Moments that are put into a folder by hand, for the tests of what is kept there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ptqtp_gguf.calibrate.moments import Gathering, Input, Moments

KEY = {"model": "m", "tokens": "t", "shape": [4, 60], "tensors": "n"}
WIDE = 96  # of inputs without sums, where SUM_COLS is 64


def values(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def rounded(x: np.ndarray) -> np.ndarray:
    """To bf16 and back, by another way: 8 bits of the significand, ties to even."""
    m, e = np.frexp(x.astype(np.float64))
    return np.ldexp(np.round(m * 256) / 256, e).astype(np.float32)


def batches(x: np.ndarray, sizes: Iterable[int]) -> list[np.ndarray]:
    return np.split(x, np.cumsum(list(sizes))[:-1])


def by_name(folder: Path) -> tuple[Moments, dict[str, Input]]:
    found = Moments(folder)
    return found, {i.tensors[0]: i for i in found}


def start(folder: Path, total: int = 1000) -> Gathering:
    return Gathering(folder, KEY, 4, total)


def went(rng: np.random.Generator, tokens: int, experts: int, used: int) -> np.ndarray:
    """int32 (tokens, used): `used` different experts of each token, the last expert of none."""
    return np.array([rng.permutation(experts - 1)[:used] for _ in range(tokens)], np.int32)


def feed(g: Gathering, window: int) -> None:
    """One window of all kinds of inputs; the third is held out."""
    rng = np.random.default_rng(window)
    to, held = went(rng, 60, 4, 2), window == 2
    g.add("q", values(rng, 60, 32), None, 0, held)
    g.add("down", values(rng, 60, WIDE), None, 0, held)
    g.add("gate", values(rng, 60, 1, 32), to, 4, held)
    g.add("down_exps", values(rng, 60, 2, WIDE), to, 4, held)
    g.add("k_b", values(rng, 60, 2, 32), None, 2, held)


def contents(folder: Path) -> dict[str, bytes]:
    """All but the index, and the sums' name: their number is how often they were saved."""
    return {p.name.split(".")[0] + p.suffix * (p.stem != "sums"): p.read_bytes() for p in folder.glob("*.*[!n]")}
