"""Split output: the names and keys that gguf-py writes and the runtime reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import write_gguf

from ptqtp_gguf.codec.types import Key
from ptqtp_gguf.conversion.pipeline import convert
from ptqtp_gguf.errors import OutputError
from ptqtp_gguf.files.gguf import Reader
from ptqtp_gguf.llamacpp import model as runtime
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


def test_parts_are_within_the_limit_and_as_few_as_order_allows(parts: list[Path], tmp_path: Path) -> None:
    n = len(parts)
    assert n > 3 and sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        f"m-{i:05d}-of-{n:05d}.gguf" for i in range(1, n + 1)
    ]
    sizes = []
    for no, path in enumerate(parts):
        with Reader(path) as r:
            assert (r.get("split.no"), r.get("split.count"), r.get("split.tensors.count")) == (no, n, 13)
            assert (r.get(Key.METHOD) is not None) == (no == 0)
            sizes.append(path.stat().st_size)
            assert sizes[-1] <= LIMIT or len(r.tensors) == 1
            if no:  # its first tensor would not have gone into the part before
                assert sizes[-2] + r.tensors[0].nbytes > LIMIT - 200
    assert max(sizes) > LIMIT  # the one that is too large by itself


def test_parts_hold_what_the_whole_holds(source: Path, parts: list[Path], tmp_path: Path) -> None:
    convert(source, tmp_path / "whole.gguf")
    with GgufSource(tmp_path / "whole.gguf") as whole, GgufSource(parts[2]) as split:
        assert [t.name for t in split.tensors] == [t.name for t in whole.tensors]
        assert split.kvs == whole.kvs
        for a, b in zip(whole.tensors, split.tensors, strict=True):
            assert np.array_equal(
                np.concatenate(list(whole.chunks(a, 999))), np.concatenate(list(split.chunks(b, 5000)))
            )


@pytest.mark.runtime
def test_the_runtime_loads_parts(demo_files: dict[str, Path], tmp_path: Path) -> None:
    parts = convert(demo_files["bf16"], tmp_path / "m.gguf", Options(split_max_size=20_000_000)).files
    assert len(parts) > 3
    texts = []
    for path in (demo_files["ours"], parts[0]):
        model = runtime.load(path, n_ctx=64, threads=2)
        texts.append("".join(runtime.generate(model, "The sea is", max_tokens=8, temperature=0, seed=1)))
    assert texts[0] == texts[1] and texts[0].strip()


def test_what_fits_is_not_split(source: Path, tmp_path: Path) -> None:
    summary = convert(source, tmp_path / "m.gguf", Options(split_max_size=10**9))
    assert summary.files == [tmp_path / "m.gguf"]


def test_existing_parts_are_not_overwritten(source: Path, parts: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out" / "m.gguf"
    before = [p.read_bytes() for p in parts]
    with pytest.raises(OutputError, match="exists already; use --force"):
        convert(source, out, Options(split_max_size=LIMIT))
    convert(source, out, Options(split_max_size=LIMIT, force=True))
    assert [p.read_bytes() for p in parts] == before
