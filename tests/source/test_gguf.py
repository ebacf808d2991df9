"""A split GGUF as a source."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from helpers import write_gguf

from ptqtp_gguf.conversion.pipeline import convert
from ptqtp_gguf.errors import InputError
from ptqtp_gguf.files.gguf import Reader
from ptqtp_gguf.plan.options import Options
from ptqtp_gguf.source.gguf import GgufSource

LIMIT = 20_000


@pytest.fixture
def source(tmp_path: Path, rng: np.random.Generator) -> Path:
    tensors = {f"blk.{i}.w.weight": (rng.normal(size=(64, 128)) * 0.05).astype(np.float32) for i in range(12)}
    tensors["blk.4.big.weight"] = (rng.normal(size=(640, 128)) * 0.05).astype(
        np.float32
    )  # larger than a part by itself
    tensors["blk.7.w.weight"][0, 0] = 50  # falls back to a larger type
    return write_gguf(tmp_path / "source.gguf", tensors)


@pytest.fixture
def parts(source: Path, tmp_path: Path) -> list[Path]:
    (tmp_path / "out").mkdir()
    return convert(source, tmp_path / "out" / "m.gguf", Options(split_max_size=LIMIT)).files


def test_a_split_source_gives_the_same_weights(source: Path, tmp_path: Path) -> None:
    """gguf-py splits the source; any of its parts names the whole."""
    writer = gguf.GGUFWriter(tmp_path / "s.gguf", "llama", split_max_tensors=3)
    writer.add_name("tiny")
    with Reader(source) as r:
        for t in r.tensors:
            writer.add_tensor(t.name, r.rows_f32(t).reshape(t.shape[::-1]).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    pieces = sorted(tmp_path.glob("s-*.gguf"))
    assert len(pieces) > 2
    convert(source, tmp_path / "a.gguf")
    convert(pieces[1], tmp_path / "b.gguf")
    with Reader(tmp_path / "a.gguf") as a, Reader(tmp_path / "b.gguf") as b:
        assert [t.name for t in a.tensors] == [t.name for t in b.tensors]
        for t in a.tensors:
            assert np.array_equal(a.bytes_of(t), b.bytes_of(b.by_name[t.name]))
        assert b.get("general.name") == "tiny" and b.get("split.count") is None


def test_missing_and_foreign_parts(parts: list[Path], tmp_path: Path) -> None:
    renamed = tmp_path / "other.gguf"
    renamed.write_bytes(parts[0].read_bytes())
    with pytest.raises(InputError, match=r"one of \d+ parts of a split GGUF, whose names must end in"):
        GgufSource(renamed)
    keep = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(InputError, match="its metadata does not call it part 2 of"):
        GgufSource(parts[0])
    parts[1].unlink()
    with pytest.raises(InputError, match=r"this part of \d+ is missing"):
        GgufSource(parts[0])
    parts[1].write_bytes(keep)
    with GgufSource(parts[-1]) as s:
        assert len(s.tensors) == 13


def test_a_first_part_of_an_older_version(source: Path, tmp_path: Path) -> None:
    """The first part speaks for all: it may not say a version that a later part's type is newer than."""
    done = convert(source, tmp_path / "m.gguf", Options(type="TP2_1", split_max_size=LIMIT, tensor_types=("w=TP2_1",)))
    new = convert(source, tmp_path / "n.gguf", Options(type="TP2_2", split_max_size=LIMIT, tensor_types=("w=TP2_2",)))
    assert len(done.files) == len(new.files) > 2
    done.files[-1].write_bytes(new.files[-1].read_bytes())
    with pytest.raises(InputError, match=r"format_version is 1, but the file holds TP2_2 tensors, .* version 2;"):
        GgufSource(done.files[0])
