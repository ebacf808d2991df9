"""The document of a comparison: what is none is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from report_document import changed, example, gaps

from ptqtp_gguf.compare.document import as_json, read_document
from ptqtp_gguf.compare.page import write_json
from ptqtp_gguf.errors import InputError
from ptqtp_gguf.measure import Quality


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


SCALES = dict.fromkeys(("min", "median", "max", "empty", "damaged"))


def test_a_document_is_written_in_the_order_of_its_schema() -> None:
    """What was read is written as it was: no field is missing in the schema, none is renamed."""
    whole, doc = as_json(read_document(example())), example()
    doc["rows"] = [r | {"scales": r["scales"] and {**r["scales"], **SCALES}} for r in doc["rows"]]
    doc["machine"] = {**doc["machine"], "cpus": None, "quota": None}
    doc["bench"] = {**doc["bench"], "first": None}
    assert whole == {**doc, "finished": True}
    order = "schema model created command versions machine text bench warnings rows finished"
    assert list(whole) == order.split() and read_document(whole) == read_document(doc)
    assert "load" not in as_json(read_document(gaps()))["machine"]  # type: ignore[operator]
    made = read_document(doc)
    made.rows[1].quality, made.finished = Quality(ppl=math.inf, kld=math.nan, kld_se=0.5), False
    found: Any = json.loads(json.dumps(as_json(made), allow_nan=False))
    assert found["rows"][1]["quality"] == {**vars(Quality()), "kld_se": 0.5} and found["finished"] is False
