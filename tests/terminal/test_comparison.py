"""A comparison on the terminal."""

from __future__ import annotations

from report_document import changed, example, gaps, printed

from ptqtp_gguf.compare import findings
from ptqtp_gguf.compare.document import read_document


def test_terminal() -> None:
    text = printed(example())
    assert text.startswith("warning: the load of the machine")
    assert findings.verdicts(read_document(example()))[0].sentence in text
    line = next(x for x in text.splitlines() if "TP2_1" in x and "76.4" in x)
    assert "76.4 *" in line and "0.1120 ± 0.0066" in line and "171 *" in line
    assert "0.1120 +- 0.0066" in printed(example(), "ascii")
    assert "not measured: bpw, perplexity, KLD" in printed(gaps())
    hostile = changed("rows/1/label", "[red]x[/] [link=y]\x1b[31m\u00fc\ud800")
    assert "[red]x[/] [link=y]\\x1b[31m" in printed(hostile, "ascii")
