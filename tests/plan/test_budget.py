"""Bits per weight as a target: never above it, never worse with more, and the best that the bytes allow."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ptqtp_gguf.codec.tp2_1 import TP2_1
from ptqtp_gguf.errors import (
    QuantizeError,
    RecipeError,
    RuntimeMissing,
)
from ptqtp_gguf.files.gguf import (
    GGML_TYPES,
    TYPE_IDS,
    OutTensor,
    TensorInfo,
    build_header,
    total_size,
    type_name,
)
from ptqtp_gguf.llamacpp import install
from ptqtp_gguf.plan.budget import Option, fit_budget, hull, spend, spread
from ptqtp_gguf.plan.recipe import Choice, Rule, load
from ptqtp_gguf.source.imatrix import Importance

items = st.lists(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 60)), min_size=1, max_size=4), min_size=1, max_size=5
).map(lambda raw: [[Option(k, size, float(error)) for k, (size, error) in enumerate(options)] for options in raw])


def total(picked: list[Option]) -> tuple[int, float]:
    return sum(o.nbytes for o in picked), sum(o.error for o in picked)


def run(options: list[list[Option]], room: int) -> list[Option]:
    steps = [hull(o) for o in options]
    return [s[k] for s, k in zip(steps, spend(steps, room), strict=True)]


def least(options: list[list[Option]]) -> int:
    return sum(min(o.nbytes for o in one) for one in options)


@settings(max_examples=100)
@given(items, st.integers(0, 120))
def test_against_every_assignment(options: list[list[Option]], extra: int) -> None:
    room = least(options) + extra
    nbytes, error = total(run(options, room))
    assert nbytes <= room
    best = min(total(list(p))[1] for p in itertools.product(*options) if total(list(p))[0] <= room)
    # what is lost against the optimum is at most one tensor's step
    largest_step = max(a.error - b.error for s in map(hull, options) for a, b in itertools.pairwise([*s, s[-1]]))
    assert best <= error <= best + largest_step + 1e-9


@settings(max_examples=100)
@given(items, st.integers(0, 200))
def test_the_optimum_for_the_bytes_used_where_every_step_fits(options: list[list[Option]], taken: int) -> None:
    """At a room that the first steps fill exactly, no other assignment of the same bytes is better."""
    steps = [hull(o) for o in options]
    order = sorted(
        ((a.error - b.error) / (b.nbytes - a.nbytes), b.nbytes - a.nbytes)
        for s in steps
        for a, b in itertools.pairwise(s)
    )[::-1]
    room = least(options) + sum(cost for _, cost in order[:taken])
    error = total(run(options, room))[1]
    best = min(total(list(p))[1] for p in itertools.product(*options) if total(list(p))[0] <= room)
    ties = {gain for gain, _ in order[taken : taken + 1]} & {gain for gain, _ in order[:taken]}
    assume(not ties)
    assert error == pytest.approx(best, abs=1e-9)


@settings(max_examples=100)
@given(items, st.integers(0, 100), st.integers(0, 40))
def test_more_room_is_never_worse(options: list[list[Option]], extra: int, more: int) -> None:
    room = least(options) + extra
    assert total(run(options, room + more))[1] <= total(run(options, room))[1] + 1e-9


def test_ties_go_by_order() -> None:
    one = [Option(0, 10, 4.0), Option(1, 20, 0.0)]
    assert [o.type for o in run([one, one, one], 50)] == [1, 1, 0]


@given(st.integers(1, 5000), st.integers(1, 300), st.integers(1, 100000))
def test_a_sample_is_spread_evenly(rows: int, cols: int, n: int) -> None:
    index = spread(rows, cols, n)
    assert 1 <= len(index) <= rows and index[0] >= 0 and index[-1] < rows
    assert len(index) == rows or abs(len(index) * cols - n) <= cols
    if len(index) > 1:
        gaps = np.diff(index)
        assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1
        assert abs(index[0] - (rows - 1 - index[-1])) <= 1


SHAPES = {"token_embd": (256, 300), "output_norm": (256,), "output": (256, 300)} | {
    f"blk.{i}.{name}": shape
    for i in range(3)
    for name, shape in {
        "attn_v": (256, 64),
        "attn_norm": (256,),
        "ffn_up": (256, 200),
        "ffn_down": (192, 256),
        "odd": (40, 8),
    }.items()
}


def model(kind: str = "BF16") -> tuple[list[TensorInfo], Callable[[TensorInfo, int], np.ndarray]]:
    """Tensors of unlike shapes of distribution, so that their errors differ."""
    tensors = []
    for name, shape in SHAPES.items():
        k = TYPE_IDS[kind if shape[0] % GGML_TYPES[TYPE_IDS[kind]][1] == 0 else "BF16"]
        t = TensorInfo(f"{name}.weight", shape, k, 0, 0)
        tensors.append(TensorInfo(t.name, shape, k, 0, OutTensor(t.name, shape, k).nbytes))

    def sample(t: TensorInfo, n: int) -> np.ndarray:
        rng = np.random.default_rng(len(t.name) + t.shape[0])
        rows = spread(t.n_weights // t.shape[0], t.shape[0], min(n, 4096))
        w = rng.standard_t(3 + len(t.name) % 4, size=(len(rows), t.shape[0]))
        return (w * 0.02).astype(np.float32)

    return tensors, sample


def size(tensors: list[TensorInfo], choices: dict[str, Choice]) -> int:
    return total_size([], [OutTensor(t.name, t.shape, choices[t.name].type) for t in tensors], 32)


def header(tensors: list[TensorInfo]) -> int:
    return len(build_header([], [OutTensor(t.name, t.shape, t.type) for t in tensors], 32))


def fit(
    target: float, kind: str = "BF16", overrides: tuple[str, ...] = ()
) -> tuple[list[TensorInfo], dict[str, Choice]]:
    tensors, sample = model(kind)
    recipe = load("default").bind("TP2_1").with_overrides(overrides)
    return tensors, fit_budget(tensors, recipe, target, header(tensors), sample)


@pytest.mark.runtime
def test_the_file_meets_the_target_within_one_step() -> None:
    sizes, kinds = [], []
    for target in (4.1, 5.0, 5.7, 6.4, 8.0, 40.0):
        tensors, choices = fit(target)
        assert choices == fit(target)[1]
        weights = sum(t.n_weights for t in tensors)
        assert list(choices) == [t.name for t in tensors]
        assert 8 * size(tensors, choices) / weights <= target
        sizes.append(size(tensors, choices))
        kinds.append({type_name(c.type) for c in choices.values()})
        if target < 9:  # the smallest step is one of attn_v's, at most 2 bits of its weights
            assert 8 * sizes[-1] / weights > target - 2 * 256 * 64 / weights - 0.05
        assert choices["blk.0.attn_norm.weight"].type == TYPE_IDS["BF16"]
    assert sizes == sorted(sizes)
    assert "TP2_1" in kinds[0] and kinds[-1] == {"BF16"}
    assert choices["output.weight"].reason.startswith("budget 40.00: error 0 at 16 bits, ")


@pytest.mark.runtime
def test_a_target_out_of_reach_names_the_smallest() -> None:
    with pytest.raises(RecipeError, match="the smallest that this recipe reaches is") as e:
        fit(3.0)
    reachable = float(str(e.value).split("reaches is ")[1].split(";")[0])
    _, choices = fit(reachable)
    assert {type_name(c.type) for n, c in choices.items() if "ffn" in n or "attn_v" in n} == {"TP2_1"}
    with pytest.raises(RecipeError):
        fit(reachable - 0.002)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(RecipeError, match="bits per weight; give a number above 0"):
            fit(bad)


@pytest.mark.runtime
def test_what_the_user_names_stays() -> None:
    _, choices = fit(7.0, overrides=("attn_v=Q8_0", "^output=F16"))
    assert {type_name(choices[f"blk.{i}.attn_v.weight"].type) for i in range(3)} == {"Q8_0"}
    assert type_name(choices["output.weight"].type) == "F16"
    with pytest.raises(RecipeError, match="matches no tensor"):
        fit(5.5, overrides=("attn_w=Q8_0",))


@pytest.mark.runtime
def test_a_quantized_source_is_never_blown_up() -> None:
    _, choices = fit(40.0, "Q8_0")
    assert {type_name(choices[f"blk.{i}.ffn_up.weight"].type) for i in range(3)} == {"Q8_0"}
    assert "error 0 at 8.5 bits" in choices["blk.0.ffn_up.weight"].reason


def test_types_that_do_not_take_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the runtime the ladder has no K types; out of reach of TP2_1, a tensor starts further up."""

    def gone() -> None:
        raise RuntimeMissing("not here")

    monkeypatch.setattr(install, "ggml_library", gone)
    tensors, sample = model()
    recipe = load("small").bind("TP2_1")

    def loud(t: TensorInfo, n: int) -> np.ndarray:
        return sample(t, n) * np.float32(1e4 if t.name == "blk.1.ffn_up.weight" else 1)

    choices = fit_budget(
        tensors,
        recipe,
        4.2,
        header(tensors),
        loud,
        takes=lambda t, k: (t.name, k) != ("output.weight", TYPE_IDS["TP2_1"]),
    )
    got = {n: type_name(c.type) for n, c in choices.items()}
    assert got["blk.1.ffn_up.weight"] == "Q4_0" and got["output.weight"] == "Q4_0"
    assert "TP2_1" in got.values() and set(got.values()) <= {"TP2_1", "BF16", "Q4_0", "Q5_0", "Q8_0"}
    with pytest.raises(QuantizeError, match=r"tensor token_embd.weight: a value is not finite"):
        fit_budget(tensors, recipe, 5, 0, lambda t, n: np.full((1, t.shape[0]), np.nan, np.float32))


def test_of_our_types_with_equal_bytes_the_better_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """TP2_2 where the recipe names it beside TP2_1; no other type, and not what --tensor-type gives other tensors."""

    def gone() -> None:
        raise RuntimeMissing("not here")

    monkeypatch.setattr(install, "ggml_library", gone)
    tensors, sample = model()
    tensors = [t for t in tensors if t.shape[0] % 32 == 0]
    small = load("small")
    both = replace(small, rules=(Rule(r"blk\.0\..*", "TP2_1", "r"), *small.bind("TP2_2").rules))
    errors = {}
    for recipe, kind in (
        (small.bind("TP2_1"), "TP2_1"),
        (small.bind("TP2_2"), "TP2_2"),
        (small.bind("TP2_1").with_overrides(["attn_v=TP2_2"]), "TP2_1"),
        (both, "TP2_2"),
    ):
        got = fit_budget(tensors, recipe, 4.0, header(tensors), sample)
        free = {n: c for n, c in got.items() if c.reason.startswith("budget") and type_name(c.type).startswith("TP")}
        assert "blk.0.ffn_up.weight" in free and {type_name(c.type) for c in free.values()} == {kind}
        errors[recipe.canonical()] = float(free["blk.0.ffn_up.weight"].reason.split("error ")[1].split()[0])
    first, second, third, last = errors.values()
    assert second == last < 0.9 * first and third == first


def test_a_budget_goes_to_what_counts() -> None:
    """Two tensors with the same weights: half of each row is held exactly; one of them uses only that half."""
    tensors = [TensorInfo(f"blk.{i}.w.weight", (256, 64), TYPE_IDS["F32"], 0, 4 * 256 * 64) for i in range(2)]
    rng = np.random.default_rng(3)
    w = rng.normal(size=(64, 256)).astype(np.float32) * np.float32(0.05)
    w[:, :128] = np.ldexp(rng.choice([-5, -3, -2, -1, 0, 1, 2, 3, 5], (64, 128)).astype(np.float32), -6)
    recipe = load("default").bind("TP2_1")

    def chosen(of: Callable[[TensorInfo, int], Importance | None]) -> list[int]:
        got = fit_budget(tensors, recipe, 6.2, 0, lambda t, n: w[spread(64, 256, n)], importance=of)
        return [got[t.name].type for t in tensors]

    def of(t: TensorInfo, target: int) -> Importance:
        h = np.where(np.arange(256) < 128, 1, 0) if t.name == "blk.0.w.weight" else np.ones(256)
        return Importance(h[None].astype(np.float32), 64)

    weighted, plain = chosen(of), chosen(lambda t, target: None)
    assert weighted[0] == TP2_1.id != weighted[1] and plain != weighted
