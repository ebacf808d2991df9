"""What a model's logits say of a text, token by token, and what they say against another model's.

The rules are those of llama.cpp's llama-perplexity: float32 exponentials, float64 sums; standard errors of means over
tokens. It keeps the reference's logits in 16 bits and leaves out of the divergence what the reference gives less than
exp(-16); here neither is done, the reference's logits are compared as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from ..codec import F32

F64 = NDArray[np.float64]
I32 = NDArray[np.int32]
# of a token: -ln p by the file and by the reference, the divergence of what the two expect there, the difference of
# the two p, whether both find the same token the likeliest. Without a reference only nll means anything.
RECORD = np.dtype([("nll", "<f8"), ("nll_ref", "<f8"), ("kld", "<f8"), ("dp", "<f8"), ("same_top", "u1")])
Rows = NDArray[np.void]  # of RECORD
PART = 16  # rows that a thread takes at once


@dataclass(frozen=True)
class Logits:
    """Logits of some places of a text, with what is needed of them again and again.

    logits  float32 (N, vocabulary)
    lse     float64 (N,): ln(sum(exp(row)))
    top     int64 (N,): the likeliest token
    """

    logits: F32
    lse: F64
    top: NDArray[np.int64]

    @classmethod
    def of(cls, logits: F32, pool: ThreadPoolExecutor | None = None) -> Logits:
        """Measure logits; they are not copied."""
        found = cls(logits, np.empty(len(logits)), np.empty(len(logits), np.int64))
        _by_rows(len(logits), found._measure, pool)
        return found

    def part(self, first: int, last: int) -> Logits:
        """Places first to last - 1: views."""
        return Logits(self.logits[first:last], self.lse[first:last], self.top[first:last])

    def _measure(self, first: int, last: int) -> None:
        scratch = np.empty(self.logits.shape[1], np.float32)
        for i in range(first, last):
            row = self.logits[i]
            self.top[i] = row.argmax()
            largest = row[self.top[i]]
            np.subtract(row, largest, out=scratch)
            np.exp(scratch, out=scratch)
            self.lse[i] = float(largest) + math.log(scratch.sum(dtype=np.float64))

    def nll(self, tokens: I32) -> F64:
        """-ln p of the token that came, float64 (N,)."""
        return self.lse - self.logits[np.arange(len(tokens)), tokens]


def score(found: Logits, tokens: I32, reference: Logits | None = None, pool: ThreadPoolExecutor | None = None) -> Rows:
    """Records of N tokens: (N,) of RECORD. Values are not finite where the logits are not.

    tokens     int32 (N,), the tokens that came behind each row of logits
    reference  of the same tokens
    """
    out = np.zeros(len(tokens), RECORD)
    out["nll"] = found.nll(tokens)
    if reference is None:
        return out
    out["nll_ref"] = reference.nll(tokens)
    out["dp"] = np.exp(-out["nll"]) - np.exp(-out["nll_ref"])
    out["same_top"] = found.top == reference.top
    kld = out["kld"]

    def divergence(first: int, last: int) -> None:
        p, d = (np.empty(found.logits.shape[1], np.float32) for _ in range(2))
        for i in range(first, last):
            row = reference.logits[i]
            np.subtract(row, np.float32(reference.lse[i]), out=p)
            np.exp(p, out=p)
            np.subtract(row, found.logits[i], out=d)
            apart = float(reference.lse[i] - found.lse[i])  # of the two normalizations
            rounded = np.float32(apart)
            d -= rounded
            p *= d
            kld[i] = p.sum(dtype=np.float64) + (float(rounded) - apart)

    _by_rows(len(tokens), divergence, pool)
    return out


def _by_rows(n: int, work: Callable[[int, int], None], pool: ThreadPoolExecutor | None) -> None:
    """work(first, last) over n rows, in parts for the pool's threads; numpy lets go of the GIL meanwhile."""
    if pool is None:
        work(0, n)
    else:
        firsts = range(0, n, PART)
        list(pool.map(work, firsts, [min(n, i + PART) for i in firsts]))


@dataclass(frozen=True)
class Quality:
    """A file's figures over a text. None: not measured; without a reference all but perplexity.

    ppl       perplexity, exp(mean nll)
    kld       mean divergence of the file's expectation from the reference's, in nats; quantiles over tokens
    rms_dp    root mean square of the change in the probability of the token that came, in per cent
    same_top  how often both find the same token the likeliest, in per cent
    tokens    that were scored; _se: standard errors of means over them
    """

    ppl: float | None = None
    ppl_se: float | None = None
    windows: int | None = None
    tokens: int | None = None
    ppl_reference: float | None = None
    ppl_ratio: float | None = None
    ppl_ratio_se: float | None = None
    kld: float | None = None
    kld_se: float | None = None
    kld_median: float | None = None
    kld_99: float | None = None
    kld_999: float | None = None
    kld_max: float | None = None
    rms_dp: float | None = None
    rms_dp_se: float | None = None
    same_top: float | None = None
    same_top_se: float | None = None

    def as_dict(self) -> dict[str, float | int | None]:
        """For JSON: what is not finite is None."""
        return {k: v if v is None or math.isfinite(v) else None for k, v in asdict(self).items()}


def summarize(rows: Rows, windows: int, paired: bool) -> Quality:
    """The figures of all records of a file.

    rows    (N,) of RECORD, N at least 1
    paired  they were measured against a reference
    """
    nll, se = _mean(rows["nll"])
    ppl = _exp(nll)
    if not paired:
        return Quality(ppl, ppl * se, windows, len(rows))
    base, _ = _mean(rows["nll_ref"])
    log_ratio, log_ratio_se = _mean(rows["nll"] - rows["nll_ref"])  # its variance holds the covariance of the two
    ratio = _exp(log_ratio)
    kld, kld_se = _mean(rows["kld"])
    median, high, higher = (float(x) for x in np.quantile(rows["kld"], (0.5, 0.99, 0.999)))
    mse, mse_se = _mean(rows["dp"] ** 2)
    rms = math.sqrt(mse)
    same = float(rows["same_top"].mean())
    return Quality(
        ppl=ppl,
        ppl_se=ppl * se,
        windows=windows,
        tokens=len(rows),
        ppl_reference=_exp(base),
        ppl_ratio=ratio,
        ppl_ratio_se=ratio * log_ratio_se,
        kld=kld,
        kld_se=kld_se,
        kld_median=median,
        kld_99=high,
        kld_999=higher,
        kld_max=float(rows["kld"].max()),
        rms_dp=100 * rms,
        rms_dp_se=50 / rms * mse_se if rms else 0.0,
        same_top=100 * same,
        same_top_se=100 * math.sqrt(same * (1 - same) / max(1, len(rows) - 1)),
    )


def _mean(values: F64) -> tuple[float, float]:
    """Mean and its standard error: 0 where ten values or fewer would have to tell it."""
    n = len(values)
    return float(values.mean()), float(values.std()) / math.sqrt(n - 1) if n > 10 else 0.0


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def alone(rows: Rows) -> Rows:
    """The reference's own records out of those of a file that was compared with it."""
    out = np.zeros(len(rows), RECORD)
    out["nll"] = rows["nll_ref"]
    return out
