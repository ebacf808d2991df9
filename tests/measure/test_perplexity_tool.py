"""llama-perplexity as a scorer: what it prints is read, and what was lost is asked for again."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptqtp_gguf.errors import BenchError
from ptqtp_gguf.llamacpp import install
from ptqtp_gguf.measure import perplexity_tool

PRINTED = """
Mean PPL(Q)                   :  19.040000 ±   0.840000
Mean PPL(base)                :  18.000000 ±   0.800000
Cor(ln(PPL(Q)), ln(PPL(base))):  99.90%
Mean PPL(Q)/PPL(base)         :   1.057778 ±   0.004000
Mean PPL(Q)-PPL(base)         :   1.040000 ±   0.070000

Mean    KLD:   0.053570 ±   0.000900
Maximum KLD:   4.100000
99.9%   KLD:   1.010000
99.0%   KLD:   0.300000
Median  KLD:   0.034400
 1.0%   KLD:   0.000100

Mean    Δp: -0.100 ±  0.050 %
RMS Δp    :  5.360 ±  0.090 %
Same top p: 87.400 ±  0.370 %
"""


def test_llama_perplexity_is_read() -> None:
    q = perplexity_tool.parse(PRINTED, 2, 510)
    assert (q.ppl, q.ppl_se, q.ppl_reference, q.ppl_ratio, q.ppl_ratio_se) == (19.04, 0.84, 18.0, 1.057778, 0.004)
    assert (q.kld, q.kld_se, q.kld_median, q.kld_99, q.kld_999, q.kld_max) == (0.05357, 0.0009, 0.0344, 0.3, 1.01, 4.1)
    assert (q.rms_dp, q.rms_dp_se, q.same_top, q.same_top_se, q.windows, q.tokens) == (5.36, 0.09, 87.4, 0.37, 2, 510)
    assert perplexity_tool.parse(PRINTED.replace("0.053570", "    -nan"), 2, 510).kld is None
    with pytest.raises(BenchError, match=r"no figure for same_top; its last line: RMS .p"):
        perplexity_tool.parse(PRINTED[: PRINTED.index("Same top")], 2, 510)
    with pytest.raises(BenchError, match="no figure for ppl; its last line: nothing"):
        perplexity_tool.parse("", 2, 510)


def test_output_that_was_lost_is_asked_for_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers = ["", "Mean PPL(Q)", PRINTED]
    monkeypatch.setattr(install, "run_tool", lambda *words: answers.pop(0))
    assert perplexity_tool._figures(tmp_path, [], 2, 512).tokens == 510 and not answers
