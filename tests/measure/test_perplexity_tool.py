"""llama-perplexity as a scorer: what it prints is read, and what was lost is asked for again."""

from __future__ import annotations

from pathlib import Path

import pytest
from talking_model import write_talking_model

from ptqtp_gguf.errors import BenchError, InputError, OutputError
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


@pytest.mark.runtime
def test_logits_that_are_not_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama-perplexity writes on a full disk as if nothing were: nothing is measured by a part, and no part is kept."""
    model, text, state = write_talking_model(tmp_path / "a.gguf"), tmp_path / "text.txt", tmp_path / "state"
    text.write_text("a letter and more of them " * 20)

    def figures(ctx: int = 128) -> object:
        found = perplexity_tool.evaluate_by_tool(model, [model], text=text, ctx=ctx, windows=2, threads=1, state=state)
        return found.quality

    tool = install.run_tool

    def full(name: str, *words: str) -> str:
        said = tool(name, *words)
        base = Path(words[words.index("--kl-divergence-base") + 1])
        base.write_bytes(base.read_bytes()[:5000])
        return said

    with monkeypatch.context() as m:
        m.setattr(install, "run_tool", full)
        with pytest.raises(OutputError, match=r"not all logits are in it, 5000 bytes; is the disk full\?"):
            figures()
    assert not list(state.glob("*.logits")) and not list(state.glob("*.partial"))
    whole = figures()
    kept = next(state.glob("*.logits"))
    data = kept.read_bytes()
    assert perplexity_tool.windows_of(kept) == 2
    kept.write_bytes(data[:-2])
    assert figures() == whole and kept.read_bytes() == data
    with pytest.raises(InputError, match="less than a window of 1024 tokens"):
        figures(1024)
