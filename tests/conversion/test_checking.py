"""Before a weight is quantized, the runtime says whether it would load the output."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bench_models import write_llama
from helpers import Cli, rewritten

from ptqtp_gguf.conversion import checking
from ptqtp_gguf.conversion.pipeline import convert, dry_run
from ptqtp_gguf.errors import InputError
from ptqtp_gguf.files.gguf import Reader, kv_u32
from ptqtp_gguf.inspect.check import verify
from ptqtp_gguf.llamacpp.loadable import why_header_not_loadable
from ptqtp_gguf.plan.options import Calibration, Options

MISSING = "the runtime could not load the output: tensor 'blk.1.attn_norm.weight' not found; "
WAY_OUT = "or give --no-load-check to convert it all the same"


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.runtime
@pytest.mark.parametrize(
    "options",
    [
        Options(),
        Options(split_max_size=20000),
        Options(calibration=Calibration(effort="quick")),
        Options(target_bpw=8),
    ],
    ids=["plain", "split", "calibrated", "budget"],
)
def test_what_the_runtime_does_not_load_is_refused(tmp_path: Path, options: Options) -> None:
    source = write_llama(tmp_path / "a.gguf", block_count=2)
    for make in (convert, dry_run):
        with pytest.raises(InputError) as e:
            make(source, tmp_path / "b.gguf", options)
        assert MISSING in str(e.value) and WAY_OUT in str(e.value)
        assert left(tmp_path) == ["a.gguf"]


@pytest.mark.runtime
def test_nothing_is_read_before_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_llama(tmp_path / "a.gguf", block_count=2)

    def read(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Reader, "chunks", read)
    for options in (Options(), Options(target_bpw=8), Options(calibration=Calibration(effort="quick"))):
        with pytest.raises(InputError, match="could not load"):
            convert(source, tmp_path / "b.gguf", options)


@pytest.mark.runtime
def test_what_the_user_changes_counts(tmp_path: Path) -> None:
    good = write_llama(tmp_path / "a.gguf")
    with pytest.raises(InputError, match=r"blk\.1\.attn_norm\.weight' not found"):
        convert(good, tmp_path / "b.gguf", Options(overrides=("llama.block_count=int:2",)))
    bad = rewritten(good, tmp_path / "bad.gguf", [kv_u32("llama.block_count", 2)])
    summary = convert(bad, tmp_path / "b.gguf", Options(overrides=("llama.block_count=int:1",)))
    assert not summary.notes and verify(tmp_path / "b.gguf").good


@pytest.mark.runtime
def test_all_the_same(tmp_path: Path, cli: Cli) -> None:
    """With --no-load-check it is converted, and verify says what the file is."""
    source, out = write_llama(tmp_path / "a.gguf", block_count=2), tmp_path / "b.gguf"
    done = cli("convert", source, out, "-q")
    assert done.returncode == 1 and MISSING in done.stderr and done.stderr.count("\n") == 1
    assert cli("convert", source, out, "-q", "--no-load-check").returncode == 0
    done = cli("verify", out, "-q")
    assert done.returncode == 1
    assert "the runtime cannot load this file: tensor 'blk.1.attn_norm.weight' not found" in done.stderr


@pytest.mark.runtime
def test_types_that_fell_back_are_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime takes them, and it is asked only where types are others than it has seen."""
    source = write_llama(tmp_path / "a.gguf")
    with Reader(source) as r:
        at = r.by_name["blk.0.ffn_up.weight"].offset
    raw = bytearray(source.read_bytes())
    raw[at : at + 4] = np.float32(2e7).tobytes()
    (tmp_path / "large.gguf").write_bytes(raw)
    asked: list[list[int]] = []
    ask: Callable[..., str | None] = why_header_not_loadable

    def spy(kvs: object, tensors: list, alignment: int) -> str | None:
        asked.append([t.type for t in tensors if t.name == "blk.0.ffn_up.weight"])
        return ask(kvs, tensors, alignment)

    monkeypatch.setattr(checking, "why_header_not_loadable", spy)
    convert(source, tmp_path / "b.gguf")
    assert asked == [[252]]
    asked.clear()
    summary = convert(tmp_path / "large.gguf", tmp_path / "c.gguf")
    assert asked == [[252], [30]] and not summary.notes
    assert verify(tmp_path / "c.gguf").good


def test_where_it_cannot_be_asked(tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The conversion goes on, and says so."""
    notes = convert(tiny_gguf, tmp_path / "b.gguf").notes
    assert notes == ["no tokenizer in it (tokenizer.ggml.model): no model that the runtime loads as it is; not tried"]
    source = write_llama(tmp_path / "a.gguf", block_count=2)
    with monkeypatch.context() as m:
        m.setattr(importlib.metadata, "version", lambda name: "0.3.36")
        (note,) = convert(source, tmp_path / "c.gguf").notes
        assert note.startswith("not tried whether the runtime loads it: llama-cpp-python 0.3.36 is a stock build")

    def full(*_: object) -> None:
        raise OSError(27, "File too large")

    monkeypatch.setattr(checking, "why_header_not_loadable", full)
    assert convert(source, tmp_path / "d.gguf").notes == ["not tried whether the runtime loads it: File too large"]


@pytest.mark.hf
@pytest.mark.runtime
def test_a_checkpoint_whose_parts_do_not_fit(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """As after tokens were added: the list of tokens is not as long as the embedding has rows."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    rows = config["vocab_size"]
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": rows - 32}))
    with pytest.raises(InputError) as e:
        convert(folder, tmp_path / "b.gguf")
    assert f"expected 128, {rows - 32}, got 128, {rows}; the list of tokens (vocab_size) must be" in str(e.value)
    assert left(tmp_path) == ["model"]
