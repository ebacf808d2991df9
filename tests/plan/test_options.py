"""Options that do not go together."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptqtp_gguf.errors import QuantizeError
from ptqtp_gguf.plan.options import Calibration, Options
from ptqtp_gguf.plan.request import Request

pytestmark = pytest.mark.hf


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(calibration=Calibration(tune=True)), "--tune learns from text; give --calib FILE, builtin or self"),
        (Options(calibration=Calibration(hessians=Path("h"), tune=True)), "--tune learns from text"),
        (Options(method="tuned"), "--method tuned learns from text"),
        (Options(calibration=Calibration(("builtin",), tune_texts=("a.txt",))), "--tune-text says .*; give --tune too"),
        (Options(method="calibrated"), "--method calibrated learns from text"),
        (Options(type="tp2_0", calibration=Calibration(("builtin",))), "--calib makes TP2_1, not TP2_0"),
        (Options(method="paper", calibration=Calibration(("builtin",))), "--method paper takes no calibration"),
    ],
)
def test_options_that_do_not_go_together(options: Options, message: str) -> None:
    with pytest.raises(QuantizeError, match=message) as e:
        Request.of(options)
    assert "\n" not in str(e.value)
