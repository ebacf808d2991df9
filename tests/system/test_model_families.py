"""Checkpoints of many architectures, converted for real: types and sizes, and logits against two outside references.

The chain: transformers in float32 == the unquantized GGUF in the runtime == (but for quantization) our file. Files
"expanded" hold the same values as F32, so the runtime computes on them in plain float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
from tiny_models import FAMILIES, Family, build

from ptqtp_gguf.codec.tensor_type import TensorType
from ptqtp_gguf.codec.tp2_0 import TP2_0
from ptqtp_gguf.codec.tp2_2 import TP2_2
from ptqtp_gguf.conversion.export import export_q4_0
from ptqtp_gguf.conversion.pipeline import convert
from ptqtp_gguf.conversion.summary import Summary
from ptqtp_gguf.files.gguf import F32_ID, OutTensor, Reader, TensorInfo, write_stream
from ptqtp_gguf.measure.logits import BOUND, against_checkpoint
from ptqtp_gguf.plan.options import Options
from ptqtp_gguf.source import checkpoint

pytestmark = [pytest.mark.runtime, pytest.mark.hf]

N_TOKENS = 24  # three of the sliding windows
ALONE = 4  # the last ones, computed one at a time: matrix-vector products

# Sums in another order, over some ten layers of products.
SAME_FLOATS = 1e-5
# The same, with GELU from a table of fp16: 11 significant bits.
SAME_FLOATS_TABLE = 2**-10

# int8 activations: the largest of 32 Gaussians is 2.39 standard deviations (rms), its 127th part the step, and
# step/sqrt(12) the rms error: .54 % of the activations, and as much of their product with random weights.
PER_PRODUCT = 2.39 / 127 / math.sqrt(12)
# Two blocks have four products in a row each (q/k/v, attn_output, gate/up, down), then comes the output: nine errors,
# independent, each passed on at about its size: 1.6 %. Residuals damp, gates and norms raise: a factor of two.
ROUNDING = math.sqrt(9) * PER_PRODUCT


@dataclass
class Made:
    """A converted checkpoint: its folder, the bf16 GGUF, ours, and the logits that transformers gave."""

    family: Family
    tokens: list[int]
    folder: Path
    expected: np.ndarray
    summary: Summary

    @classmethod
    def convert(cls, family: Family, tokens: list[int], folder: Path, expected: np.ndarray) -> Made:
        summary = convert(folder / "checkpoint", folder / "ours.gguf", Options(keep_bf16=folder / "bf16.gguf"))
        return cls(family, tokens, folder, expected, summary)

    @property
    def bf16(self) -> Path:
        return self.folder / "bf16.gguf"

    @property
    def ours(self) -> Path:
        return self.folder / "ours.gguf"

    @cached_property
    def exact(self) -> np.ndarray:
        """Logits of the unquantized model."""
        return logits_expanded(self.bf16, self.tokens)

    @cached_property
    def dequantized(self) -> np.ndarray:
        """Logits of our file's weights."""
        return logits_expanded(self.ours, self.tokens)

    @cached_property
    def rounding(self) -> float:
        """What int8 activations do to this model: the same weights as Q4_0, in llama.cpp's own kernels.

        The median over positions, because an expert that is chosen by a hair changes all of one position.
        """
        twin = self.folder / "twin.gguf"
        export_q4_0(self.ours, twin)
        distance = float(np.median(each_distance(logits(twin, self.tokens, repack=False), self.dequantized)))
        twin.unlink()
        return distance


@pytest.fixture(scope="session")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Made]]:
    """The families of this run, made once, two at a time: most of a conversion is one process importing torch."""
    here = [item for item in request.session.items if item.path == Path(__file__)]
    wanted = {str(item.callspec.params["name"]) for item in here if isinstance(item, pytest.Function)}
    futures: dict[str, Future[Made]] = {name: Future() for name in wanted}
    with ThreadPoolExecutor(2) as pool:
        for name in FAMILIES:
            if name in wanted:  # transformers stays in this thread, for it sets warning filters
                family, folder = FAMILIES[name], tmp_path_factory.mktemp(name)
                vocabulary = int(str(family.settings["vocab_size"]))
                tokens = np.random.default_rng(5).integers(3, vocabulary, N_TOKENS).tolist()
                try:
                    expected = build(family, folder / "checkpoint", tokens)
                except Exception as e:  # fails the tests of this family alone
                    futures[name].set_exception(e)
                else:
                    futures[name] = pool.submit(Made.convert, family, tokens, folder, expected)
        yield lambda name: futures[name].result()
        pool.shutdown(cancel_futures=True)


def logits(path: Path, tokens: list[int], repack: bool = True) -> np.ndarray:
    """Logits of every position in the runtime, float64 (T, vocabulary): most in one batch, the last ones alone.

    repack: let ggml rearrange the weights. Not for stock types: on a CPU with AMX its buffers take DeepSeek's 3-D
    matrices, and then ggml aborts (ggml-backend.cpp, cur_backend_id), since their inputs are not contiguous.
    """
    import llama_cpp

    f32 = llama_cpp.GGML_TYPE_F32
    params = llama_cpp.llama_cpp.llama_model_default_params

    def default_params() -> object:
        made = params()
        made.use_extra_bufts = repack
        return made

    with pytest.MonkeyPatch.context() as m:
        m.setattr(llama_cpp.llama_cpp, "llama_model_default_params", default_params)
        model = llama_cpp.Llama(
            str(path), n_ctx=64, n_threads=2, logits_all=True, verbose=False, type_k=f32, type_v=f32, swa_full=True
        )
    model.eval(tokens[:-ALONE])
    for token in tokens[-ALONE:]:
        model.eval([token])
    out = np.array(model.scores[: len(tokens)], np.float64)
    model.close()
    return out


def logits_expanded(
    path: Path, tokens: list[int], change: Callable[[TensorInfo, np.ndarray], np.ndarray] | None = None
) -> np.ndarray:
    """Logits of a file whose every tensor is first written out as F32, the same metadata around it."""
    f32 = path.with_suffix(".f32.gguf")
    with Reader(path) as r, open(f32, "wb") as file:
        tensors = [OutTensor(t.name, t.shape, F32_ID) for t in r.tensors]
        values = ((t, r.rows_f32(t)) for t in r.tensors)
        data = (np.ascontiguousarray(change(t, w) if change else w).view(np.uint8) for t, w in values)
        for _ in write_stream(file, r.header.kvs.values(), tensors, r.header.alignment, data):
            pass
    out = logits(f32, tokens)
    f32.unlink()
    return out


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Relative L2 distance of a to b over the sequence."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def each_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The same, position by position: (T,)."""
    return np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)


# ---- the checks ----


def check_types(m: Made, path: Path, kind: TensorType) -> None:
    """Every block matrix is in planes or in its stated fallback; output Q8_0; embedding too, or Q4_0; the rest F32."""
    matrices = m.family.matrices()
    with Reader(path) as r, Reader(m.bf16) as source:
        assert r.get("general.architecture") == m.family.arch
        assert r.get("general.file_type") == kind.id
        assert [(t.name, t.shape) for t in r.tensors] == [(t.name, t.shape) for t in source.tensors]
        assert matrices <= r.by_name.keys()
        assert ("output.weight" in r.by_name) is not m.family.settings["tie_word_embeddings"]
        for t in r.tensors:
            if t.name in ("token_embd.weight", "output.weight"):
                expected = "Q4_0" if t.name[0] == "t" and "output.weight" in r.by_name else "Q8_0"
            elif t.name in matrices:
                expected = m.family.fallback.get(t.name.split(".")[2], kind.name)
            else:
                expected = "F32"
            assert t.type_name == expected, t.name
            if expected == kind.name:
                assert t.shape[0] % kind.group == 0 and t.nbytes * 8 == 3.5 * t.n_weights
            if t.name.endswith("_exps.weight"):
                assert t.shape[2] == 4


def check_logits(m: Made, got: np.ndarray, dequantized: np.ndarray) -> None:
    """The runtime on our file against dequantize-then-multiply, apart by the rounding of activations and no more."""
    apart = each_distance(got, dequantized)
    assert ROUNDING / 2 < m.rounding < ROUNDING * 2
    # not above what other int8 kernels do, and not below: then the file would not have run on int8
    assert m.rounding / 1.5 < np.median(apart) < m.rounding * 1.5
    # no position is out of line, the single tokens at the end included, but for experts chosen by a hair
    outliers = int((apart > 2.5 * m.rounding).sum())
    assert outliers <= (N_TOKENS // 4 if m.family.experts else 0)
    # small against what quantizing does
    quantizing = distance(dequantized, m.exact)
    assert 10 * m.rounding < quantizing < 1


@pytest.mark.parametrize("name", FAMILIES)
def test_types_and_sizes(made: Callable[[str], Made], name: str) -> None:
    m = made(name)
    check_types(m, m.ours, TP2_2)
    fallback = {r.tensor.name.split(".")[2] for r in m.summary.fallbacks}
    assert fallback == m.family.fallback.keys()
    assert m.summary.size == m.ours.stat().st_size
    with Reader(m.ours) as r:  # nothing was left out on the way: as many weights as the checkpoint has
        found = checkpoint.check(m.folder / "checkpoint")
        assert sum(t.n_weights for t in r.tensors) * 2 == found.nbytes
        assert len(found.shards) > 1 or m.family.shards == Family.shards


@pytest.mark.parametrize("name", FAMILIES)
def test_unquantized_equals_transformers(made: Callable[[str], Made], name: str) -> None:
    """The reference itself: no row of q or k misplaced, no wrong rope, window, norm, bias or expert."""
    m = made(name)
    assert distance(m.exact, m.expected) < (SAME_FLOATS_TABLE if m.family.table else SAME_FLOATS)


@pytest.mark.parametrize("name", FAMILIES)
def test_verify_finds_the_same_function(made: Callable[[str], Made], name: str) -> None:
    """The check that users have, `verify --against FOLDER --logits`; and nothing in these configurations is noted."""
    m = made(name)
    found = against_checkpoint(m.bf16, m.folder / "checkpoint", threads=2)
    assert found.fault is None and not found.quantized
    assert max(found.median, found.late) < BOUND / 2 and found.same_top > 0.8
    assert not m.summary.notes
    assert against_checkpoint(m.ours, m.folder / "checkpoint", threads=2).distance > 4 * found.median


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_the_dequantized_weights(made: Callable[[str], Made], name: str) -> None:
    m = made(name)
    check_logits(m, logits(m.ours, m.tokens), m.dequantized)


@pytest.mark.parametrize("name", ["qwen3moe"])
def test_tp2_0_by_the_papers_method(made: Callable[[str], Made], name: str) -> None:
    m = made(name)
    path = m.folder / "tp2_0.gguf"
    summary = convert(m.bf16, path, Options(type="TP2_0", method="paper"))
    assert not summary.fallbacks
    check_types(m, path, TP2_0)
    check_logits(m, logits(path, m.tokens), logits_expanded(path, m.tokens))


@pytest.mark.parametrize("name", ["llama-tied"])
def test_the_checks_can_fail(made: Callable[[str], Made], name: str) -> None:
    """One q matrix in transformers' order of rope pairs, and two rows of one matrix exchanged: each shows."""
    m = made(name)

    def pairs_apart(t: TensorInfo, w: np.ndarray) -> np.ndarray:
        wrong = t.name == "blk.1.attn_q.weight"
        return w.reshape(4, -1, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape) if wrong else w

    def rows_exchanged(t: TensorInfo, w: np.ndarray) -> np.ndarray:
        return w[[1, 0, *range(2, len(w))]] if t.name == "blk.1.ffn_down.weight" else w

    assert distance(logits_expanded(m.bf16, m.tokens, pairs_apart), m.expected) > 1000 * SAME_FLOATS
    got = logits(m.ours, m.tokens)
    check_logits(m, got, m.dequantized)
    with pytest.raises(AssertionError):
        check_logits(m, got, logits_expanded(m.ours, m.tokens, rows_exchanged))
