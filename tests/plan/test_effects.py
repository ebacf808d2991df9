"""Types by what errors do to the output: worth, pace, and another file as the goal."""

from __future__ import annotations

import numpy as np
import pytest

from ptqtp_gguf.codec import F32
from ptqtp_gguf.errors import QuantizeError, RecipeError
from ptqtp_gguf.files.gguf import GGML_TYPES, TYPE_IDS, TensorInfo, row_size, type_name
from ptqtp_gguf.plan import Calibration, Options, Request
from ptqtp_gguf.plan.budget import PACE, SLOW, Option, _room_for, fit_budget, paced
from ptqtp_gguf.plan.recipe import Choice, load
from ptqtp_gguf.source import Importance

COLS, ROWS = 256, 64
NAMES = ("blk.0.attn_k.weight", "blk.0.attn_v.weight", "blk.0.ffn_up.weight", "blk.0.ffn_down.weight")
F16 = TYPE_IDS["F16"]


def tensors() -> list[TensorInfo]:
    return [TensorInfo(n, (COLS, ROWS), F16, 0, ROWS * row_size(F16, COLS)) for n in NAMES]


def sample(t: TensorInfo, n: int) -> F32:
    rng = np.random.default_rng(len(t.name))
    return (rng.normal(size=(ROWS, COLS)) * 0.05).astype(np.float32)


class Effects:
    """A matrix' worth by name; all inputs alike."""

    ours = 0.5

    def __init__(self, worth: dict[str, float], seen: bool = True) -> None:
        self._worth, self._seen = worth, seen

    def worth(self, t: TensorInfo) -> float:
        return self._worth.get(t.name, 1.0)

    def importance(self, t: TensorInfo, kind: int) -> Importance | None:
        return Importance(np.ones((1, COLS), np.float32), ROWS) if self._seen else None

    def power(self, t: TensorInfo, expert: int, w: F32) -> float | None:
        return float(np.vdot(w, w)) if self._seen else None

    def stock(self, name: str) -> dict[str, int]:
        return dict.fromkeys(NAMES, TYPE_IDS[name])


def chosen(effects: Effects | None, bpw: float = 5.0, **more: object) -> dict[str, Choice]:
    recipe = load("default").bind("TP2_2")
    return fit_budget(tensors(), recipe, bpw, 0, sample, effects=effects, **more)  # type: ignore[arg-type]


def bits(choices: dict[str, Choice]) -> dict[str, float]:
    return {n: 8 * GGML_TYPES[c.type][2] / GGML_TYPES[c.type][1] for n, c in choices.items()}


def test_bits_go_where_errors_are_worth_most() -> None:
    found = bits(chosen(Effects({NAMES[1]: 50.0})))
    assert found[NAMES[1]] > max(found[n] for n in NAMES if n != NAMES[1])
    other = bits(chosen(Effects({NAMES[2]: 50.0})))
    assert other[NAMES[2]] > max(other[n] for n in NAMES if n != NAMES[2])


def test_in_time_no_slow_type_is_taken_for_its_bytes() -> None:
    """Q5_0 has 5.5 bits and the time of 8.8: Q8_0 is better and faster."""
    effects = Effects({NAMES[0]: 5.0, NAMES[1]: 2.0})
    by_bytes = {type_name(c.type) for c in chosen(effects, 6.0).values()}
    in_time = {type_name(c.type) for c in chosen(effects, 6.0, in_time=True).values()}
    assert by_bytes & {"Q5_K", "Q6_K", "Q5_0"}
    assert in_time <= set(PACE) and "Q8_0" in in_time


def test_paced() -> None:
    assert paced(1000, TYPE_IDS["Q8_0"]) == paced(1000, TYPE_IDS["TP2_2"]) == 1000
    assert paced(1000, TYPE_IDS["Q5_0"]) == round(1000 * SLOW)


def test_second_order_counts_only_where_inputs_were_seen() -> None:
    """The reason of a choice tells the error, halved for ours where moments are there."""
    seen = chosen(Effects({}), 3.6)[NAMES[0]].reason
    blind = chosen(Effects({}, seen=False), 3.6)[NAMES[0]].reason
    error = [float(reason.split("error ")[1].split(" at")[0]) for reason in (seen, blind)]
    assert 0.4 * error[1] < error[0] < 0.7 * error[1]


@pytest.mark.parametrize("name", ["Q4_0", "Q5_K", "Q6_K"])
def test_as_good_as_a_stock_file(name: str) -> None:
    """No worse by the measure, and smaller than twice a step above the file that it is measured by."""
    effects = Effects({NAMES[3]: 20.0})
    found = chosen(effects, 0.0, stock=effects.stock(name))
    stock = GGML_TYPES[TYPE_IDS[name]]
    mean = sum(bits(found).values()) / len(NAMES)
    assert mean <= 8 * stock[2] / stock[1]
    better = chosen(effects, 0.0, stock=effects.stock("Q8_0"))
    assert mean < sum(bits(better).values()) / len(NAMES)


def test_room_for_a_goal() -> None:
    steps = [[Option(1, 10, 8.0), Option(2, 20, 2.0)], [Option(1, 10, 4.0), Option(2, 30, 1.0)]]
    assert [_room_for(steps, goal) for goal in (12.0, 6.0, 5.0, 3.0)] == [20, 30, 50, 50]
    assert _room_for(steps, 0.0) == 50  # not to be had: all that there is


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(target_bpw=4.0, target_size=1000), "--target-bpw and --target-size: each decides the size"),
        (
            Options(as_good_as="Q4_0", target_size=1000),
            "--target-size and --as-good-as: each decides the size; give one",
        ),
        (Options(as_good_as="Q4_0", calibration=Calibration(effort="none")), "--as-good-as looks at text"),
    ],
)
def test_targets_that_do_not_go_together(options: Options, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as e:
        Request.of(options)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("effort", ["fast", "NONE"])
def test_an_effort_that_is_none(effort: str) -> None:
    with pytest.raises(QuantizeError, match=f"--effort {effort}: is none of none, quick, normal, best"):
        Request.of(Options(calibration=Calibration(effort=effort)))
    with pytest.raises(QuantizeError, match="--effort none looks at no text"):
        Request.of(Options(calibration=Calibration(effort="none", texts=("builtin",))))
