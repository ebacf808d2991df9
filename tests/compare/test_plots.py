"""The figures of a comparison."""

from __future__ import annotations

import importlib.util
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from report_document import MATRICES, example

from ptqtp_gguf.compare.document import read_document
from ptqtp_gguf.compare.page import write_report

needs_page = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("matplotlib", "jinja2"))),
    reason="the page needs matplotlib and jinja2",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "made" / "full"
    files = write_report(example(), out)
    assert files[0].name == "index.html" and sorted(files) == sorted(out.iterdir())
    return out


@needs_page
def test_figures(folder: Path) -> None:
    from PIL import Image

    names = ["block-errors", "decode-over-size", "digits", "kld-over-size", "same-top", "scales"]
    assert sorted(p.stem for p in folder.glob("*.png")) == sorted(p.stem for p in folder.glob("*.svg")) == names
    for name in names:
        image = Image.open(folder / f"{name}.png").convert("RGB")
        assert image.width > 800 and len(image.getcolors(1 << 20) or []) > 10
        ET.parse(folder / f"{name}.svg")


def test_experts_of_a_block_are_one_cell() -> None:
    from ptqtp_gguf.compare.plots import block_errors

    row = example()["rows"][1]
    row["tensors"] = [
        {"name": "blk.3.ffn_up.weight", "block": 3, "weights": 100, "rel_mse": 0.01},
        {"name": "blk.3.ffn_up.weight", "block": 3, "weights": 300, "rel_mse": 0.05},
        {"name": "blk.3.attn_norm.weight", "block": 3, "weights": 5, "rel_mse": None},
        {"name": "output.weight", "block": None, "weights": 5, "rel_mse": 0.5},
    ]
    doc = read_document({**example(), "rows": [row]})
    assert block_errors(doc.rows[0]) == {("ffn_up", 3): pytest.approx(0.04)}
    assert {m for m, _ in block_errors(read_document(example()).rows[1])} == set(MATRICES)
