"""What is in a file: what `inspect` says of it holds, also as a command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from helpers import rewritten

from ptqtp_gguf.codec.types import DEFAULT
from ptqtp_gguf.conversion.pipeline import convert
from ptqtp_gguf.errors import InputError
from ptqtp_gguf.files.gguf import kv_string, kv_u32
from ptqtp_gguf.inspect.contents import inspect
from ptqtp_gguf.inspect.histograms import plane_statistics
from ptqtp_gguf.plan.options import Options


@pytest.fixture
def converted(tmp_path: Path, tiny_gguf: Path) -> Path:
    special = [
        kv_u32("tokenizer.ggml.bos_token_id", 0),
        kv_u32("tokenizer.ggml.eos_token_id", 99),
        kv_string("tokenizer.ggml.model", "gpt2"),
        kv_string("tokenizer.ggml.pre", "smollm"),
        kv_string("tokenizer.chat_template", "{% first %}\n\tsecond \x1b[31m" + "x" * 5000),
    ]
    convert(rewritten(tiny_gguf, tmp_path / "source.gguf", special), tmp_path / "ours.gguf", Options(load_check=False))
    return tmp_path / "ours.gguf"


def test_facts(converted: Path, tmp_path: Path) -> None:
    report = inspect(converted)
    assert (report.gguf_version, report.format_version, report.alignment) == (3, DEFAULT.since, 32)
    assert report.tokenizer.special == {"bos": (0, "<s>"), "eos": (99, None)}
    assert (report.tokenizer.model, report.tokenizer.pre, report.tokenizer.tokens) == ("gpt2", "smollm", 4)
    assert report.template and report.template.startswith("{% first %}")
    matrices = [t for t in report.tensors if t.name.startswith("blk.") and len(t.shape) > 1]
    weights = sum(t.n_weights for t in matrices)
    assert report.bpw_blocks == 8 * sum(t.nbytes for t in matrices) / weights
    assert report.types[DEFAULT.name] == sum(t.n_weights for t in matrices if t.type == DEFAULT.id) / weights
    assert sum(report.types.values()) == pytest.approx(1)
    parts = convert(
        converted.parent / "source.gguf", tmp_path / "m.gguf", Options(split_max_size=6000, load_check=False)
    ).files
    whole = inspect(parts[-1])
    assert [t.name for t in whole.tensors] == [t.name for t in report.tensors] and whole.types == report.types
    assert whole.files == {p.name: p.stat().st_size for p in parts} and whole.size == sum(whole.files.values())
    assert plane_statistics(parts[0]) == plane_statistics(converted)


def test_the_command(run: Callable[..., str], converted: Path) -> None:
    shown = run("inspect", converted)
    for text in ("gpt2 (smollm): 4 tokens", "bos = 0 <s>", "eos = 99 which is not a token", "chat template of"):
        assert text in shown
    assert "\x1b" not in shown and "x" * 300 not in shown and "tokenizer.ggml.tokens" not in shown
    assert "tokenizer.ggml.tokens = [<s>, a, \u00fc, b]" in run("inspect", converted, "--kvs")
    assert run("inspect", converted, "--kv", "tokenizer.ggml.tokens") == "<s>\na\n\u00fc\nb\n"
    template = "{% first %}\n\tsecond \x1b[31m" + "x" * 5000
    assert run("inspect", converted, "--template") == template.replace("\x1b", "\\x1b") + "\n"
    assert json.loads(run("inspect", converted, "--template", "--json")) == template
    with pytest.raises(InputError, match="no metadata key nothing in it"):
        run("inspect", converted, "--kv", "nothing")
    table = run("inspect", converted, "--tensors", "--sort", "zeros").splitlines()
    names = [line.split()[1] for line in table if line.startswith("\u2502 blk.")]
    zeros = {k: sum(s.zero_share) for k, s in plane_statistics(converted).tensors.items()}
    assert names[: len(zeros)] == sorted(zeros, key=lambda k: -zeros[k])
    drawn = run("inspect", converted, "--histograms")
    assert "zeros in plane 1" in drawn and "\u2588" * 40 in drawn and "scales: smallest" in drawn
    report = json.loads(run("inspect", converted, "--json", "--histograms"))
    total = report["planes"]["total"]
    assert total["digits"]["values"] == list(range(-4, 5)) and sum(total["digits"]["counts"]) == sum(
        t["weights"] for t in report["tensors"] if t["type"] == DEFAULT.name
    )
    assert len(total["scales"]["edges"]) == len(total["scales"]["counts"]) + 1
    assert report["metadata"]["tokenizer.chat_template"]["length"] == len(template)
    assert report["tokenizer"]["special"]["bos"] == {"id": 0, "text": "<s>"}
    assert json.loads(run("inspect", converted, "--json", "--kvs"))["chat_template"] == template


def test_three_planes(run: Callable[..., str], tiny_gguf: Path, tmp_path: Path) -> None:
    """The third plane of TP2_2 has its histogram, and its column where a file has other types beside it."""
    ours = tmp_path / "ours.gguf"
    convert(tiny_gguf, ours, Options(type="TP2_2", tensor_types=("attn_q=TP2_1",)))
    planes = plane_statistics(ours)
    assert planes.total and len(planes.total.zero_share) == 3
    drawn = run("inspect", ours, "--histograms")
    assert f"in plane 3 {100 * planes.total.zero_share[2]:.1f} %" in drawn
    for trit, n in zip((-1, 0, 1), planes.total.third, strict=True):
        assert f" {trit:2}  {100 * n / sum(planes.total.third):.2f} %  \u2588" in drawn
    assert f"; the {sum(planes.total.third) / 1e6:.2f} M weights of TP2_2 have one" in drawn
    table = run("inspect", ours, "--tensors", "--sort", "zeros")
    rows = {line.split()[1]: line.split("\u2502") for line in table.splitlines() if line.startswith("\u2502 blk.")}
    assert "in plane 3" in table and rows["blk.0.attn_q.weight"][9].strip() == rows["blk.0.odd.weight"][9].strip() == ""
    share = planes.tensors["blk.0.ffn_down.weight"].zero_share[2]
    assert rows["blk.0.ffn_down.weight"][9].strip() == f"{100 * share:.1f} %"
    counted = json.loads(run("inspect", ours, "--json", "--histograms"))["planes"]["total"]
    assert counted["third"] == {"values": [-1, 0, 1], "counts": list(planes.total.third)}
    assert len(counted["digits"]["zero_share"]) == 3


def test_a_terminal_without_unicode(cli: Callable, converted: Path) -> None:
    done = cli("inspect", converted, "-H", "-K", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "#" * 40 in done.stdout and "\\xfc" in done.stdout


def test_stock_reader_sees_the_same(converted: Path) -> None:
    """gguf-py's own reader of the file's metadata and tensors, as a witness."""
    from ptqtp_gguf.files.gguf import register_types

    register_types()
    stock, report = gguf.GGUFReader(converted), inspect(converted)
    assert {t.name: (t.tensor_type.name, int(t.n_bytes)) for t in stock.tensors} == {
        t.name: (t.type_name, t.nbytes) for t in report.tensors
    }
    for key in ("tokenizer.ggml.tokens", "general.architecture", "test.floats", "ptqtp.method"):
        assert stock.fields[key].contents() == report.metadata[key]


def test_missing_part(tmp_path: Path, tiny_gguf: Path) -> None:
    parts = convert(tiny_gguf, tmp_path / "m.gguf", Options(split_max_size=6000)).files
    parts[1].unlink()
    with pytest.raises(InputError, match="is missing"):
        inspect(parts[0])


def test_share_of_rows_that_are_too_short(tiny_gguf: Path) -> None:
    blocks = {"q": 48 * 64, "down": 64 * 96, "gate_exps": 3 * 16 * 64, "odd": 8 * 40}
    report = inspect(tiny_gguf)
    assert report.fell_back(32) == pytest.approx(blocks["odd"] / sum(blocks.values()))
    assert report.fell_back(8) == 0 and report.fell_back(256) == 1
