"""Options that do not go together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ptqtp_gguf.errors import QuantizeError
from ptqtp_gguf.plan.options import Calibration, Options
from ptqtp_gguf.plan.request import Request
from ptqtp_gguf.quantize.methods import METHODS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(calibration=Calibration(tune=True)), "--tune learns from text; give --calib FILE, builtin or self"),
        (Options(calibration=Calibration(hessians=Path("h"), tune=True)), "--tune learns from text"),
        (Options(method="tuned"), "--method tuned learns from text"),
        (
            Options(calibration=Calibration(texts=("builtin",), tune_texts=("a.txt",))),
            "--tune-text says .*; give --tune too",
        ),
        (Options(method="calibrated"), "--method calibrated learns from text"),
        (Options(type="tp2_0", calibration=Calibration(texts=("builtin",))), "--calib makes TP2_1, TP2_2, not TP2_0"),
        (Options(method="paper", calibration=Calibration(texts=("builtin",))), "--method paper takes no calibration"),
        (
            Options(calibration=Calibration(texts=("builtin",), tune=True, tune_texts=("a",)), type="TP2_0"),
            "--calib makes TP2_1",
        ),
    ],
)
def test_options_that_do_not_go_together(options: Options, message: str) -> None:
    with pytest.raises(QuantizeError, match=message) as e:
        Request.of(options)
    assert "\n" not in str(e.value)


def test_the_method_that_the_options_mean() -> None:
    text = Calibration(texts=("builtin",))
    tuned = replace(text, tune=True)
    for options, method, direct, tunes in (
        (Options(), "search", "search", False),
        (Options(method="paper", type="TP2_0"), "paper", "paper", False),
        (Options(calibration=text), "calibrated", "search", False),
        (Options(method="calibrated", calibration=tuned), "tuned", "search", True),
        (Options(method="tuned", calibration=text), "tuned", "search", True),
        (Options(calibration=tuned), "tuned", "search", True),
    ):
        request = Request.of(options)
        assert (request.method.name, request.direct.name, request.calibration.tune) == (method, direct, tunes)
        decisive = request.decisive()
        assert decisive["--method"] == direct and decisive.get("method", direct) == method  # no other resumes the job


def test_a_method_of_ones_own_is_not_taken_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stages say whether it tunes; --tune does not make it `tuned`."""
    calibrated, tuned = METHODS["calibrated"], METHODS["tuned"]
    monkeypatch.setitem(METHODS, "mine", replace(calibrated, name="mine", stages=("calibrate.run", "calibrate.mine")))
    monkeypatch.setitem(METHODS, "ours", replace(tuned, name="ours"))
    text = Calibration(texts=("builtin",))
    assert Request.of(Options(method="mine", calibration=text)).method.name == "mine"
    with pytest.raises(QuantizeError, match="--method mine does not tune; leave out --tune, or use --method tuned"):
        Request.of(Options(method="mine", calibration=replace(text, tune=True)))
    ours = Request.of(Options(method="ours", calibration=text))
    assert ours.method.name == "ours" and ours.calibration.tune
