"""The document of a comparison: what is none is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from report_document import changed

from ptqtp_gguf.compare.page import write_json
from ptqtp_gguf.errors import InputError


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "comparison: not a JSON object"),
        ({}, "comparison: schema None, this version reads 1"),
        (changed("schema", 2), "schema 2, this version reads 1"),
        (changed("schema", "1\n" * 99), "schema '1"),
        (changed("rows", []), "no rows"),
        (changed("rows", {}), "rows is dict, not a list"),
        (changed("rows/1/label", "Q4_0"), "rows[2].label 'Q4_0' is empty or used twice"),
        (changed("rows/1/kind", "mine"), "rows[1].kind is 'mine', not one of reference, ours, stock"),
        (changed("rows/1/size", 0), "rows[1].size is 0"),
        (changed("rows/1/size", 1.5), "rows[1].size is 1.5, not a whole number"),
        (changed("rows/1/size", None), "rows[1].size is None, not a whole number"),
        (changed("rows/1/size", 10**400), "rows[1].size is int, not a finite number up to 1e+30"),
        (changed("rows/1/quality/kld", "NaN"), "rows[1].quality.kld is 'NaN', not a number"),
        (changed("rows/1/quality/kld", math.nan), "rows[1].quality.kld is float, not a finite number"),
        (changed("rows/1/quality/kld", 1e31), "rows[1].quality.kld is float, not a finite number"),
        (changed("rows/1/quality/kld", True), "rows[1].quality.kld is True, not a number"),
        (changed("rows/1/digits/counts", [1]), "rows[1].digits has 1 counts for 9 values"),
        (changed("rows/1/scales/edges", [1.0]), "rows[1].scales has 1 edges for 24 counts"),
        (changed("rows/1/ratios/Q4_0", [1]), "rows[1].ratios.Q4_0 is list, not an object"),
        (changed("rows/1/speed/0/threads", None), "rows[1].speed[0].threads is None, not a whole number"),
        (changed("machine", {}), "machine.cpu is missing"),
        (changed("model/name", "x" * 10_001), "model.name is 'xxx"),
        (changed("text/builtin", 1), "text.builtin is 1, not true or false"),
        (changed("extra", math.nan), "cannot be written as JSON"),
    ],
)
def test_documents_that_are_none(document: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as e:
        write_json(document, tmp_path / "out")
    assert message in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 200
    assert not (tmp_path / "out").exists()
