"""Importance matrices: real files of llama-imatrix, and damaged ones."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from helpers import REPO
from hypothesis import given, settings
from hypothesis import strategies as st
from imatrix_files import make_imatrix, tiny_table, write_imatrix
from numpy.typing import ArrayLike

from ptqtp_gguf.codec.tp2_1 import TP2_1
from ptqtp_gguf.errors import (
    InputError,
)
from ptqtp_gguf.files.gguf import TYPE_IDS, Reader, TensorInfo
from ptqtp_gguf.llamacpp import install
from ptqtp_gguf.source.imatrix import Imatrix, read


def dat_bytes(entries: Mapping[str, tuple[int, ArrayLike]], tail: bytes = struct.pack("<ii", 7, 3) + b"a/b") -> bytes:
    parts = [struct.pack("<i", len(entries))]
    for name, (calls, values) in entries.items():
        raw = np.asarray(values, "<f4").tobytes()
        parts += [struct.pack("<i", len(name)), name.encode(), struct.pack("<ii", calls, len(raw) // 4), raw]
    return b"".join(parts) + tail


# ---- real files ----


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "readme.txt"
    path.write_text((REPO / "docs" / "architecture.md").read_text() * 2)
    return path


@pytest.mark.runtime
def test_both_formats_as_llama_imatrix_writes_them(demo_files: dict[str, Path], text: Path, tmp_path: Path) -> None:
    model = demo_files["bf16"]
    new, old = make_imatrix(model, text, tmp_path / "new.gguf"), tmp_path / "old.dat"
    args = ("--in-file", str(new), "-o", str(old), "--output-format", "dat", "-c", "128")
    install.run_tool("llama-imatrix", "-m", str(model), *args, timeout=60)
    with read(new) as a, read(old) as b:
        assert (a.legacy, b.legacy) == (False, True)
        with Reader(model) as r:
            wanted = {t.name for t in r.tensors if t.name.startswith("blk.") and len(t.shape) == 2}
            assert wanted == set(a.values) == set(b.values)
            for t in r.tensors:
                if t.name in wanted:
                    assert a.values[t.name].shape == (t.shape[0],) and a.values[t.name].min() >= 0
                    assert np.allclose(a.values[t.name], b.values[t.name], rtol=1e-5)
        assert a.text == "imatrix new.gguf, 2 chunks, readme.txt" and b.text == "imatrix old.dat, 2 chunks, readme.txt"
        with Reader(new) as r:  # the mean square, by hand
            sums, counts = r.by_name["blk.1.ffn_down.weight.in_sum2"], r.by_name["blk.1.ffn_down.weight.counts"]
            assert r.rows_f32(counts) == 2 * 128
            assert np.array_equal(a.values["blk.1.ffn_down.weight"], r.rows_f32(sums)[0] / np.float32(256))


# ---- conversions with written ones ----


@pytest.fixture
def table(tmp_path: Path, rng: np.random.Generator) -> Path:
    return tiny_table(tmp_path / "t.imatrix", rng)


# ---- what is refused ----


def opened(path: Path) -> None:
    """A file either tells in one line what is wrong, or holds what it promises."""
    try:
        m = read(path)
    except InputError as e:
        assert str(e).startswith(str(path)) and "\n" not in str(e)
        return
    with m:
        for name in m.values:
            assert np.isfinite(m.values[name]).all() and (m.values[name] >= 0).all()
        assert m.text.isprintable() and m.chunks >= 0


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (dat_bytes({"a": (3, [1, np.nan])}), "a: value 1 is nan"),
        (dat_bytes({"a": (3, [np.inf])}), "value 0 is inf"),
        (dat_bytes({"a": (3, [1, -1])}), "value 1 is -1"),
        (dat_bytes({"a": (-3, [1])}), "calls of a is -3"),
        (struct.pack("<i", 2**31 - 1) + bytes(99), "number of entries is 2147483647, not 1 to 6"),
        (struct.pack("<ii", 1, 2**31 - 1) + bytes(99), "length of name 0 is 2147483647, not 1 to 63"),
        (dat_bytes({"a": (3, [])}), "values of a is 0"),
        (dat_bytes({"a": (3, [1])}) + b"x", "1 bytes follow its end"),
        (struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 2**30) + bytes(9), "values of a is 1073741824, not 1"),
        (struct.pack("<ii", 1, 1) + b"\xff" + struct.pack("<ii", 1, 1) + bytes(4), "name 0 is not UTF-8"),
        (dat_bytes({"a": (3, [1])})[:-8] + struct.pack("<ii", 7, 9), "length of the data set's name"),
        (struct.pack("<i", 2) + 2 * dat_bytes({"a": (3, [1])}, b"")[4:], "a stands twice"),
    ],
)
def test_damaged_dat_files(raw: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(raw)
    with pytest.raises(InputError, match=says) as e:
        read(tmp_path / "x")
    assert "\n" not in str(e.value)


def test_dat_files_without_an_end_and_with_unseen_experts(tmp_path: Path) -> None:
    t = TensorInfo("a", (2, 8, 3), TYPE_IDS["F32"], 0, 192)
    (tmp_path / "x").write_bytes(dat_bytes({"a": (2, [2, 4, 2, 2, 6, 2]), "b": (0, [2])}, b""))
    with read(tmp_path / "x") as m:
        assert (m.chunks, m.datasets, m.text) == (0, (), "imatrix x, chunks not told")
        assert m.values["a"].tolist() == [1, 2, 1, 1, 3, 1] and m.values["b"].tolist() == [0]
        found = m.of(t, TP2_1.id)
        assert found is not None and found.unseen == (1,) and found.values.tolist() == [[1, 2], [1, 1], [3, 1]]
        assert m.of(t, TYPE_IDS["Q8_0"]) is None


@pytest.mark.parametrize(
    ("sums", "counts", "says"),
    [
        ([[1, np.nan]], [1], "a: value 1 is nan"),
        ([[1, -2]], [1], "a: value 1 is -2"),
        ([[1, 2]], [-1], "count 0 is -1"),
        ([[1, 2]], [np.nan], "count 0 is nan"),
        ([[1, 2]], [np.inf], "count 0 is inf"),
        ([[1, 2, 3]], [1, 1], "3 values do not divide among 2 counts"),
    ],
)
def test_damaged_values(sums: list[list[float]], counts: list[float], says: str, tmp_path: Path) -> None:
    path = write_imatrix(tmp_path / "x", {"a": (np.array(sums), np.array(counts))})
    with pytest.raises(InputError, match=says):
        read(path)


def test_halves_of_a_pair_and_other_types(tmp_path: Path) -> None:
    path = write_imatrix(tmp_path / "x", {"abc": (np.ones(32), np.array([1]))})
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"abc.counts", b"abd.counts"))
    with pytest.raises(InputError, match=r"abc\.in_sum2 stands without abc\.counts"):
        read(path)
    at = raw.index(b"abc.in_sum2") + 11 + 4 + 16
    assert raw[at : at + 4] == bytes(4)
    path.write_bytes(raw[:at] + struct.pack("<I", 26) + raw[at + 4 :])  # I32
    with pytest.raises(InputError, match=r"abc\.in_sum2 is of type I32; an imatrix holds F32"):
        read(path)
    at = raw.index(b"abc.counts") + 10 + 4 + 16
    assert raw[at : at + 4] == bytes(4)
    path.write_bytes(raw[:at] + struct.pack("<I", 1) + raw[at + 4 :])  # F16, of which one takes two bytes
    with pytest.raises(InputError, match=r"abc\.counts is of type F16; an imatrix holds F32"):
        read(path)


def test_a_name_with_line_breaks_is_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.dat"
    raw = dat_bytes({"a\n\n \x1b[31m\x00b": (3, np.ones(8))})
    path.write_bytes(raw.replace(struct.pack("<i", 8), struct.pack("<i", 613)))
    with pytest.raises(InputError) as e:
        read(path)
    assert r"values of a \x1b[31m\x00b is 613, not 1 to " in str(e.value)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    folder = tmp_path_factory.mktemp("seeds")
    entries = {"blk.0.a": (np.ones(8), np.array([3])), "blk.0.e": (np.ones((2, 4)), np.array([0, 9]))}
    return folder / "x", [
        write_imatrix(folder / "g", entries).read_bytes(),
        dat_bytes({"blk.0.a": (3, np.ones(8)), "blk.0.e": (2, np.ones(8))}),
    ]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_files(seeds: tuple[Path, list[bytes]], data: st.DataObject) -> None:
    path, files = seeds
    raw = bytearray(data.draw(st.sampled_from(files)))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        new = data.draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 4, b"\xff" * 8, b"\0" * 8]))
        raw[at : at + (len(new) if data.draw(st.booleans()) else 0)] = new
    path.write_bytes(raw[: data.draw(st.integers(1, len(raw)) | st.just(len(raw)))])
    opened(path)


@settings(max_examples=100, deadline=None)
@given(raw=st.binary(max_size=200))
def test_any_bytes(seeds: tuple[Path, list[bytes]], raw: bytes) -> None:
    seeds[0].write_bytes(raw)
    opened(seeds[0])


def test_a_file_that_shrinks_or_changes_is_told(table: Path) -> None:
    with Imatrix(table) as m:
        raw = table.read_bytes()
        with open(table, "r+b") as f:
            f.truncate(len(raw) - 200 * 4)
        with pytest.raises(InputError, match="has become shorter"):
            for name in m.values:
                m.values[name]
