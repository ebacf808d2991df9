"""`inspect`: what it says of a file holds, digits and scales are counted right, and hostile text does no harm."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest
from helpers import rewritten, write_gguf
from rich.console import Console

from ptqtp_gguf.codec import native
from ptqtp_gguf.codec import reference as packing
from ptqtp_gguf.codec.tp2_0 import TP2_0
from ptqtp_gguf.codec.tp2_1 import TP2_1, scale_to_float
from ptqtp_gguf.conversion.pipeline import convert
from ptqtp_gguf.errors import InputError, QuantizeError
from ptqtp_gguf.files.gguf import KV, OutTensor, Reader, kv_string, kv_u32, write_stream
from ptqtp_gguf.inspect.contents import inspect
from ptqtp_gguf.inspect.histograms import PlaneStatistics, plane_statistics
from ptqtp_gguf.plan.options import Options
from ptqtp_gguf.plan.roles import Role
from ptqtp_gguf.terminal import console as terminal

MARKUP = "[red]a[/nothing]"
HOSTILE = MARKUP + "\x1b[31m\nb\x07\u202e"


def counted_by_numpy(data: np.ndarray, kind: str) -> tuple[list[int], np.ndarray]:
    """Digits' counts and the |scales| that are not of an empty group, by the reference decoder."""
    if kind == "TP2_1":
        digits, codes = packing.unpack(TP2_1, data)
        scales = scale_to_float(codes).reshape(-1)
        empty = (digits.reshape(-1, 32) == 4).all(axis=1) & (codes.reshape(-1) == 0)
        scales = scales[~empty]
    else:
        digits, alphas = packing.unpack(TP2_0, data)
        scales = np.abs(alphas.astype(np.float32)).reshape(-1)
        scales = scales[scales > 0]
    return np.bincount(digits.reshape(-1), minlength=9).tolist(), scales


def agrees(found: PlaneStatistics, digits: list[int], scales: np.ndarray) -> None:
    assert list(found.digits) == digits
    n = sum(digits)
    assert found.zero_share == (sum(digits[3:6]) / n, (digits[1] + digits[4] + digits[7]) / n)
    assert (found.smallest, found.largest) == (scales.min(), scales.max())
    assert found.median == np.sort(scales)[(len(scales) - 1) // 2]
    edges = np.array(found.edges)
    assert list(found.scales) == [int(((scales >= a) & (scales < b)).sum()) for a, b in pairwise(edges)]
    assert sum(found.scales) == len(scales) and found.scales[0] and found.scales[-1]
    assert set(np.round(np.log2(edges) % 1, 6)) <= set(np.round(np.log2([1, 1.25, 1.5, 1.75]), 6))


def test_share_of_rows_that_are_too_short(tiny_gguf: Path) -> None:
    blocks = {"q": 48 * 64, "down": 64 * 96, "gate_exps": 3 * 16 * 64, "odd": 8 * 40}
    report = inspect(tiny_gguf)
    assert report.fell_back(32) == pytest.approx(blocks["odd"] / sum(blocks.values()))
    assert report.fell_back(8) == 0 and report.fell_back(256) == 1


@pytest.mark.parametrize("kind", ["TP2_1", "TP2_0"])
def test_digits_and_scales_of_a_file(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    shapes = {
        "blk.0.attn_q": (48, 256),
        "blk.1.ffn_down": (40, 384),
        "blk.1.exps": (3, 16, 128),
        "token_embd": (50, 128),
    }
    tensors = {f"{n}.weight": (rng.laplace(size=s) * 0.05).astype(np.float32) for n, s in shapes.items()}
    tensors["blk.0.attn_q.weight"][5:9] = 0  # empty groups
    tensors["blk.0.attn_norm.weight"] = np.ones(64, np.float32)
    source = write_gguf(tmp_path / "a.gguf", tensors)
    out = tmp_path / "b.gguf"
    convert(source, out, Options(type=kind, tensor_types=(f"token_embd={kind}",)))
    seen: list[tuple[str, int, int, str]] = []
    found = plane_statistics(out, lambda *x: seen.append(x))
    assert seen[-1][1] == seen[-1][2] == found.total.weights == sum(tensors[n].size for n in found.tensors)
    assert found.tensors.keys() == tensors.keys() - {"blk.0.attn_norm.weight"}
    with Reader(out) as r:
        each = {name: counted_by_numpy(r.bytes_of(r.by_name[name]), kind) for name in found.tensors}
    for name, expected in each.items():
        agrees(found.tensors[name], *expected)
    blocks = [v for k, v in each.items() if k.startswith("blk")]
    digits = np.sum([d for d, _ in blocks], axis=0).tolist()
    agrees(found.roles[Role.BLOCK], digits, np.concatenate([s for _, s in blocks]))
    assert found.total.empty == found.tensors["blk.0.attn_q.weight"].empty > 0
    assert found.total.digits == tuple(a + b for a, b in zip(digits, found.roles[Role.EMBEDDING].digits, strict=True))
    assert plane_statistics(out, threads=1) == plane_statistics(out, threads=3) == found
    assert plane_statistics(source).total is None


def test_any_bytes_are_counted_as_they_decode(rng: np.random.Generator) -> None:
    """Also words that no packer writes, whose digits the side byte may disturb."""
    data = rng.integers(0, 256, (500, 14), dtype=np.uint8)
    counts = [np.zeros(65536, np.uint64) for _ in range(4)]
    for threads, (five, last) in zip((1, 3), (counts[:2], counts[2:]), strict=True):
        native.count_words(data, five, last, threads)
        native.count_words(data[:10], five, last, threads)
    assert np.array_equal(counts[0], counts[2]) and np.array_equal(counts[1], counts[3])
    words = np.concatenate([data, data[:10]]).view("<u2")
    assert np.array_equal(counts[0], np.bincount(words[:, :6].reshape(-1), minlength=65536))
    assert np.array_equal(counts[1], np.bincount(words[:, 6], minlength=65536))
    with pytest.raises(QuantizeError, match="15 bytes; units have 14"):
        native.count_words(np.zeros(15, np.uint8), *counts[:2])
    with pytest.raises(QuantizeError, match="65536 contiguous uint64"):
        native.count_words(data, counts[0][:5], counts[1])


def test_damaged_scales_are_told(tmp_path: Path) -> None:
    kvs = [kv_string("general.architecture", "x"), kv_u32("ptqtp.format_version", 1)]
    digits = np.full((1, 256), 8, np.uint8)
    alphas = np.array([[[np.inf, 1], [-2, np.nan]]], np.float16)
    path = tmp_path / "a.gguf"
    with path.open("wb") as f, np.errstate(all="ignore"):
        tensors = [OutTensor("blk.0.a.weight", (256, 1), TP2_0.id)]
        list(write_stream(f, kvs, tensors, 32, iter([packing.pack(TP2_0, digits, alphas)])))
    total = plane_statistics(path).total
    assert total and (total.damaged, total.smallest, total.median, total.largest) == (2, 1, 1, 2)
    assert total.digits[8] == 256 and sum(total.scales) == 2
    json.dumps(plane_statistics(path).as_dict(), allow_nan=False)


@pytest.fixture
def converted(tmp_path: Path, tiny_gguf: Path) -> Path:
    special = [
        kv_u32("tokenizer.ggml.bos_token_id", 0),
        kv_u32("tokenizer.ggml.eos_token_id", 99),
        kv_string("tokenizer.ggml.model", "gpt2"),
        kv_string("tokenizer.ggml.pre", "smollm"),
        kv_string("tokenizer.chat_template", "{% first %}\n\tsecond \x1b[31m" + "x" * 5000),
    ]
    convert(rewritten(tiny_gguf, tmp_path / "source.gguf", special), tmp_path / "ours.gguf")
    return tmp_path / "ours.gguf"


def test_facts(converted: Path, tmp_path: Path) -> None:
    report = inspect(converted)
    assert (report.gguf_version, report.format_version, report.alignment) == (3, 1, 32)
    assert report.tokenizer.special == {"bos": (0, "<s>"), "eos": (99, None)}
    assert (report.tokenizer.model, report.tokenizer.pre, report.tokenizer.tokens) == ("gpt2", "smollm", 4)
    assert report.template and report.template.startswith("{% first %}")
    matrices = [t for t in report.tensors if t.name.startswith("blk.") and len(t.shape) > 1]
    weights = sum(t.n_weights for t in matrices)
    assert report.bpw_blocks == 8 * sum(t.nbytes for t in matrices) / weights
    assert report.types["TP2_1"] == sum(t.n_weights for t in matrices if t.type == TP2_1.id) / weights
    assert sum(report.types.values()) == pytest.approx(1)
    parts = convert(converted.parent / "source.gguf", tmp_path / "m.gguf", Options(split_max_size=6000)).files
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
        t["weights"] for t in report["tensors"] if t["type"] == "TP2_1"
    )
    assert len(total["scales"]["edges"]) == len(total["scales"]["counts"]) + 1
    assert report["metadata"]["tokenizer.chat_template"]["length"] == len(template)
    assert report["tokenizer"]["special"]["bos"] == {"id": 0, "text": "<s>"}
    assert json.loads(run("inspect", converted, "--json", "--kvs"))["chat_template"] == template


def test_a_terminal_without_unicode(cli: Callable, converted: Path) -> None:  # type: ignore[type-arg]
    done = cli("inspect", converted, "-H", "-K", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "#" * 40 in done.stdout and "\\xfc" in done.stdout


def test_hostile_text(run: Callable[..., str], tiny_gguf: Path, tmp_path: Path) -> None:
    """Markup is shown, not obeyed; control characters are escaped; what is not a number, or not UTF-8, is no crash.

    Names with control characters are refused by the reader (tests/attacks); values may hold them.
    """
    bad = [
        kv_string("general." + MARKUP, HOSTILE * 100),
        kv_string("general.architecture", HOSTILE),
        kv_string("tokenizer.ggml.pre", HOSTILE),
        kv_string("tokenizer.chat_template." + MARKUP, HOSTILE),
        KV("general.broken", 8, b"\x02" + bytes(7) + b"\xff\xfe"),
        KV("general.nan", 6, np.float32("nan").tobytes()),
        KV("general.infinities", 9, b"\6\0\0\0\2" + bytes(7) + np.array([np.inf, 1], "<f4").tobytes()),
    ]
    source = rewritten(tiny_gguf, tmp_path / "bad.gguf", bad, {"blk.0.attn_q.weight": "blk.0." + MARKUP + ".weight"})
    ours = tmp_path / "ours.gguf"
    convert(source, ours)
    options = ((), ("-T", "-H", "-K"), ("--kv", "general." + MARKUP), ("--json", "-T"), ("--json", "-K"))
    pages = [run("inspect", ours, *o) for o in options]
    pages += [run("verify", ours, "--against", source), run("diff", source, ours, "-T")]
    pages += [run("convert", source, tmp_path / "not.gguf", "--dry-run")]
    for page in pages:
        assert not set("\x1b\x07\u202e") & set(page)
        assert "[red]a[/nothing]" in page
    assert "[red]a[/nothing]\\x1b[31m" in pages[0] and f"({100 * len(HOSTILE)} characters)" in pages[0]
    assert "[red]a[/nothing]\\x1b[31m" in pages[1] and "not UTF-8" in pages[1]
    report = json.loads(pages[3])
    assert report["metadata"]["general.nan"] == "nan" and report["metadata"]["general.infinities"] == ["inf", 1.0]
    assert len(json.loads(pages[4])["metadata"]["general." + MARKUP]) == 100 * len(HOSTILE)


def test_a_progress_bar_takes_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As markup the closing tag would be an error."""
    screen = io.StringIO()
    monkeypatch.setattr(terminal, "err_console", Console(file=screen, force_terminal=True, width=150))
    with terminal.Bar(quiet=False) as bar:
        bar("counting", 2, 2, HOSTILE)
    shown = screen.getvalue()
    assert "[red]a[/nothing]\\x1b[31m\\nb" in shown and "\x07" not in shown


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
