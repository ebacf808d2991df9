"""A folder of moments that is damaged: one line that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from kept_moments import feed, start

from ptqtp_gguf.calibrate import moments
from ptqtp_gguf.calibrate.moments import (
    VERSION,
    Input,
    Moments,
    read_index,
)
from ptqtp_gguf.errors import CalibrationError


@pytest.fixture
def complete(folder: Path, narrow: None) -> Path:
    """A folder with one input of each kind, all four windows in."""
    g = start(folder, 240)
    for i in range(4):
        feed(g, i)
    g.checkpoint(4)
    return folder


def read_all(folder: Path) -> None:
    found = Moments(folder)
    for of in found:
        for e in range(len(of.counts)):
            found.second(of, e)
            found.tokens(of, e)
            found.rows(of, e, held=True)


def one_line(e: pytest.ExceptionInfo[CalibrationError]) -> bool:
    return "\n" not in str(e.value) and len(str(e.value)) < 400


@pytest.mark.parametrize(
    "name", ["sums.1", "1.rows", "3.rows", "3.experts", "0.held", "1.held", "2.held", "2.held-experts"]
)
@pytest.mark.parametrize("what", ["cut", "empty", "missing", "folder"])
def test_files_that_are_damaged(complete: Path, name: str, what: str) -> None:
    read_all(complete)
    path = complete / name
    data = path.read_bytes()
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what != "missing":
        path.write_bytes(data[:-1] if what == "cut" else b"")
    with pytest.raises(CalibrationError, match=name) as e:
        read_all(complete)
    assert one_line(e)


@pytest.mark.parametrize("what", ["cut", "empty", "missing"])
def test_resuming_on_damaged_sums(complete: Path, what: str) -> None:
    path = complete / "sums.1"
    data = path.read_bytes()
    path.unlink()
    if what != "missing":
        path.write_bytes(data[:-1] if what == "cut" else b"")
    with pytest.raises(CalibrationError, match=r"sums\.1: damaged; remove the folder to gather the moments again"):
        start(complete)


@pytest.mark.parametrize("name", ["1.rows", "3.rows", "3.experts", "0.held", "2.held-experts"])
@pytest.mark.parametrize("what", ["cut", "missing"])
def test_resuming_on_damaged_rows(complete: Path, name: str, what: str) -> None:
    """What was on the disk at the checkpoint must be there; zeros may not take its place."""
    path = complete / name
    data = path.read_bytes()
    path.unlink()
    if what == "cut":
        path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CalibrationError, match=r"damaged|No such file") as e:
        g = start(complete, 240)
        try:
            feed(g, 2 if "held" in name else 1)
        finally:
            for file in g._files.values():
                file.close()
    assert one_line(e)


DAMAGED = "damaged; remove the folder to gather the moments again"


def index_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "index.json").read_text())
    return found


def put_index(folder: Path, found: object) -> None:
    (folder / "index.json").write_text(json.dumps(found))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"7",
        b'"text"',
        b"{}",
        b"[" * 100_000,
        b'{"version": 2}',
        b'{"version": 2, "inputs": [],',
    ],
)
def test_no_index_at_all(complete: Path, raw: bytes) -> None:
    (complete / "index.json").write_bytes(raw)
    for reads in (read_index, Moments, start):
        with pytest.raises(CalibrationError, match=rf"index\.json: {DAMAGED}$") as e:
            reads(complete)
        assert one_line(e)


@pytest.mark.parametrize("cut", [1, 10, 100, 500])
def test_an_index_that_is_cut(complete: Path, cut: int) -> None:
    path = complete / "index.json"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(CalibrationError, match=DAMAGED):
        read_index(complete)


def test_an_index_that_is_no_file(complete: Path) -> None:
    (complete / "index.json").unlink()
    (complete / "index.json").mkdir()
    with pytest.raises(CalibrationError, match=r"index\.json: no regular file"):
        read_index(complete)


def test_an_index_that_is_too_large(complete: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (complete / "index.json").stat().st_size
    monkeypatch.setattr(moments, "MAX_INDEX", size)
    assert read_index(complete)
    monkeypatch.setattr(moments, "MAX_INDEX", size - 1)
    with pytest.raises(CalibrationError, match=rf"index\.json: {size} bytes; the limit is {size - 1}"):
        read_index(complete)


@pytest.mark.parametrize("key", ["key", "windows", "done", "generation", "inputs"])
@pytest.mark.parametrize("value", [None, "x", -1, [7], {"a": 1}, float("nan"), float("inf"), "-missing-"])
def test_an_index_with_another_value(complete: Path, key: str, value: object) -> None:
    found = index_of(complete)
    found[key] = value
    if value == "-missing-":
        del found[key]
    put_index(complete, found)
    if key == "key" and isinstance(value, dict):  # of the right type: another's
        with pytest.raises(CalibrationError, match="gathered from another model"):
            start(complete)
        return
    with pytest.raises(CalibrationError, match=DAMAGED) as e:
        start(complete)
    assert one_line(e)


@pytest.mark.parametrize("version", [VERSION - 1, VERSION + 1, "2", None, 1e300, float("nan"), [2], "a\nb"])
def test_another_version(complete: Path, version: object) -> None:
    put_index(complete, {**index_of(complete), "version": version})
    with pytest.raises(CalibrationError, match=r"version .*; this program reads 2; name a new folder$") as e:
        start(complete)
    assert one_line(e)


RECORD_KEYS = [*vars(Input(0, ["a"], 1, [0], True))]


@pytest.mark.parametrize("key", RECORD_KEYS)
def test_a_record_without_a_key_or_with_another(complete: Path, key: str) -> None:
    good = index_of(complete)
    bad = index_of(complete)
    bad["inputs"][1][f"{key}x"] = bad["inputs"][1].pop(key)
    put_index(complete, bad)
    with pytest.raises(CalibrationError, match=DAMAGED):
        read_index(complete)
    put_index(complete, good)
    assert read_index(complete)


NUMBERS = ["number", "cols", "offset", "rows", "held", "used", "passed", "held_passed"]
NO_NUMBERS: list[object] = [None, "1", 1.5, -1, True, [1], {}, float("nan"), float("inf"), 1 << 48, 10**30]


@pytest.mark.parametrize("key", NUMBERS)
def test_numbers_of_a_record(complete: Path, key: str) -> None:
    for value in NO_NUMBERS:
        found = index_of(complete)
        found["inputs"][1][key] = value
        put_index(complete, found)
        with pytest.raises(CalibrationError, match=DAMAGED):
            read_index(complete)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cols", 0),
        ("cols", 1 << 20),
        ("counts", []),
        ("counts", None),
        ("counts", 7),
        ("counts", "12"),
        ("counts", {"0": 1}),
        ("counts", [1.0]),
        ("counts", [True]),
        ("counts", [-1]),
        ("counts", [float("nan")]),
        ("counts", [1 << 48]),
        ("counts", [0] * 4097),
        ("tensors", []),
        ("tensors", None),
        ("tensors", 7),
        ("tensors", [7]),
        ("tensors", ["a", None]),
    ],
)
def test_other_values_of_a_record(complete: Path, key: str, value: object) -> None:
    found = index_of(complete)
    found["inputs"][1][key] = value
    put_index(complete, found)
    for reads in (read_index, Moments, start):
        with pytest.raises(CalibrationError, match=DAMAGED) as e:
            reads(complete)
        assert one_line(e)


@pytest.mark.parametrize("value", [{"a": 1}, "abc"])
def test_tensors_that_are_no_list(complete: Path, value: object) -> None:
    found = index_of(complete)
    found["inputs"][0]["tensors"] = value
    put_index(complete, found)
    with pytest.raises(CalibrationError, match=DAMAGED):
        start(complete).share({"x": "a"})


@pytest.mark.parametrize("record", [None, 7, "x", [], [1], {}])
def test_no_record(complete: Path, record: object) -> None:
    found = index_of(complete)
    found["inputs"].append(record)
    put_index(complete, found)
    with pytest.raises(CalibrationError, match=DAMAGED):
        read_index(complete)


def test_too_many_records(complete: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "MAX_RECORDS", 5)
    assert read_index(complete)
    monkeypatch.setattr(moments, "MAX_RECORDS", 4)
    with pytest.raises(CalibrationError, match=DAMAGED):
        read_index(complete)


@pytest.mark.parametrize("key", ["cols", "offset"])
def test_sums_beyond_the_file(complete: Path, key: str) -> None:
    """Numbers that the index allows and the file does not bear out; no memory is taken for them."""
    for value in ((1 << 48) - 1, 1 << 40) if key == "offset" else ((1 << 20) - 1, 1 << 18, 1 << 10):
        found = index_of(complete)
        found["inputs"][0][key] = value
        put_index(complete, found)
        for reads in (read_all, start):
            with pytest.raises(CalibrationError, match=r"sums\.1|index\.json: damaged") as e:
                reads(complete)
            assert one_line(e)


@pytest.mark.parametrize("key", ["cols", *(pytest.param(k) for k in ("rows", "held", "used"))])
def test_rows_beyond_the_file(complete: Path, key: str) -> None:
    for value in (1 << 10, 1 << 19) if key == "cols" else (1 << 10, 1 << 36, (1 << 48) - 1):
        found = index_of(complete)
        found["inputs"][3][key] = value
        put_index(complete, found)
        with pytest.raises(CalibrationError, match=r"3\.") as e:
            read_all(complete)
        assert one_line(e)


@pytest.mark.parametrize(
    ("key", "value"), [("generation", 10**300), ("generation", 1.5), ("done", True), ("windows", "4"), ("done", -1)]
)
def test_numbers_of_the_index(complete: Path, key: str, value: object) -> None:
    put_index(complete, {**index_of(complete), key: value})
    for reads in (read_index, Moments, start):
        with pytest.raises(CalibrationError, match=rf"index\.json: {DAMAGED}$"):
            reads(complete)


@pytest.mark.parametrize("what", ["number", "offset", "tensors"])
def test_inputs_that_are_told_twice(complete: Path, what: str) -> None:
    found = index_of(complete)
    found["inputs"][2][what] = found["inputs"][0][what]
    found["inputs"][0]["number"] += what == "offset"
    put_index(complete, found)
    with pytest.raises(CalibrationError, match=DAMAGED):
        read_index(complete)


@pytest.mark.parametrize("key", ["cols", "counts", "used", "heads"])
def test_rows_that_do_not_fit_the_index(complete: Path, key: str) -> None:
    """A run that takes it up finds out before anything is added."""
    found = index_of(complete)
    of = next(i for i in found["inputs"] if not i["summed"])
    of[key] = {"cols": 1, "counts": [*of["counts"], 0], "used": of["used"] + 1, "heads": True}[key]
    put_index(complete, found)
    g = start(complete, 240)
    try:
        with pytest.raises(CalibrationError, match=rf"index\.json: {DAMAGED}$"):
            feed(g, 1)
    finally:
        for file in g._files.values():
            file.close()
