"""GGUF in, GGUF out: the plan, the bytes, and everything that can go wrong on the way."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import write_gguf

from ptqtp_gguf import __version__
from ptqtp_gguf.codec.tp2_0 import TP2_0
from ptqtp_gguf.codec.tp2_2 import TP2_2
from ptqtp_gguf.codec.types import Key
from ptqtp_gguf.conversion import loop as transcode
from ptqtp_gguf.conversion import pipeline as conversion
from ptqtp_gguf.conversion.output_files import finish
from ptqtp_gguf.errors import InputError, Interrupted, OutputError, QuantizeError, RecipeError
from ptqtp_gguf.files.gguf import Reader, quantize_plain
from ptqtp_gguf.files.journal import Journal
from ptqtp_gguf.inspect.check import verify
from ptqtp_gguf.plan.options import Options
from ptqtp_gguf.quantize.methods import find, quantize
from ptqtp_gguf.quantize.pieces import to_float
from ptqtp_gguf.source.gguf import GgufSource

EXPECTED = {
    "token_embd.weight": "Q4_0",
    "blk.0.attn_q.weight": "TP2_2",
    "blk.0.attn_norm.weight": "F32",
    "blk.0.ffn_down.weight": "TP2_2",
    "blk.0.ffn_gate_exps.weight": "TP2_2",
    "blk.0.odd.weight": "F16",
    "output.weight": "Q8_0",
}


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if "partial" in p.name or p.name.startswith(".")]


def test_plan_bytes_and_metadata(tiny_gguf: Path, weights: dict[str, np.ndarray], tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    summary = conversion.convert(tiny_gguf, out)
    assert summary.size == out.stat().st_size
    assert not leftovers(tmp_path)
    with Reader(tiny_gguf) as source, Reader(out) as got:
        assert {t.name: t.type_name for t in got.tensors} == EXPECTED
        assert [t.name for t in got.tensors] == [t.name for t in source.tensors]
        assert [t.shape for t in got.tensors] == [t.shape for t in source.tensors]
        for t in got.tensors:
            w = weights[t.name].reshape(-1, t.shape[0])
            if t.type == TP2_2.id:
                expected = quantize(TP2_2, find("search"), w)
            else:
                expected = quantize_plain(w, t.type).reshape(len(w), -1)
            assert np.array_equal(got.bytes_of(t), expected), t.name
        for key, kv in source.header.kvs.items():
            if key != "general.file_type":
                assert got.header.kvs[key].raw == kv.raw
        assert got.get("general.file_type") == 252
        assert got.get(Key.FORMAT_VERSION) == 2
        assert got.get(Key.TYPE_IDS) == [252] and got.get(Key.GROUP_SIZE) == [32]
        assert (got.get(Key.METHOD), got.get(Key.VERSION), got.get(Key.SOURCE_TYPE)) == ("search", __version__, "F32")
    fallback = {r.tensor.name: r.choice.reason for r in summary.fallbacks}
    assert fallback == {"blk.0.odd.weight": "rows of 40 are not a multiple of 32 (TP2_2)"}


def test_the_format_version_is_the_newest_of_the_types(tiny_gguf: Path, tmp_path: Path) -> None:
    for name, options, ids in (
        ("a.gguf", Options(type="TP2_1"), [251]),
        ("b.gguf", Options(), [252]),
        ("c.gguf", Options(type="TP2_1", tensor_types=("attn_q=TP2_2",)), [251, 252]),
    ):
        conversion.convert(tiny_gguf, tmp_path / name, options)
        with Reader(tmp_path / name) as got:
            assert got.get(Key.TYPE_IDS) == ids and got.get(Key.FORMAT_VERSION) == (2 if TP2_2.id in ids else 1)


def test_tp2_0_and_paper(tmp_path: Path, rng: np.random.Generator) -> None:
    w = {
        "blk.0.a.weight": rng.normal(size=(8, 256)).astype(np.float32),
        "blk.0.exps.weight": rng.normal(size=(2, 8, 128)).astype(np.float32),
    }
    source = write_gguf(tmp_path / "a.gguf", w)
    for method in ("search", "paper"):
        out = tmp_path / f"{method}.gguf"
        summary = conversion.convert(source, out, Options(method=method, type="TP2_0"))
        assert set(summary.weights_by_type()) == {"TP2_0"}
        with Reader(out) as r:
            assert r.get("general.file_type") == 250
            error = r.rows_f32(r.by_name["blk.0.a.weight"]) - w["blk.0.a.weight"]
            assert 0.015 < (error**2).mean() < 0.04
            # experts are matrices of their own to the paper's stopping rule
            both = r.bytes_of(r.by_name["blk.0.exps.weight"])

    parts = [quantize(TP2_0, find("paper"), e) for e in w["blk.0.exps.weight"]]
    assert np.array_equal(both, np.concatenate(parts))


@pytest.mark.runtime
@pytest.mark.hf
def test_an_untied_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Its embedding in Q4_0 beside an output in Q8_0, each with the bytes of gguf-py; without the output in Q8_0."""
    bf16 = tmp_path / "bf16.gguf"
    done = conversion.convert(tiny_checkpoint, tmp_path / "a.gguf", Options(keep_bf16=bf16))
    with Reader(bf16) as source, Reader(tmp_path / "a.gguf") as got:
        for name, kind in (("token_embd.weight", 2), ("output.weight", 8)):
            w = source.rows_f32(source.by_name[name])
            assert got.by_name[name].type == kind
            assert np.array_equal(got.bytes_of(got.by_name[name]).reshape(-1), quantize_plain(w, kind).reshape(-1))
        tied = {t.name: source.rows_f32(t) for t in source.tensors if t.name != "output.weight"}
    assert not done.fallbacks
    conversion.convert(write_gguf(tmp_path / "tied.gguf", tied), tmp_path / "b.gguf")
    with Reader(tmp_path / "a.gguf") as a, Reader(tmp_path / "b.gguf") as b:
        other = {t.name: t.type_name for t in b.tensors if t.type != a.by_name[t.name].type}
        assert other == {"token_embd.weight": "Q8_0"}


@pytest.mark.parametrize("kind", ["BF16", "F16", "Q8_0", "Q4_1", "Q5_0"])
def test_any_source_type(tmp_path: Path, rng: np.random.Generator, kind: str) -> None:
    w = (rng.normal(size=(16, 64)) * 0.05).astype(np.float32)
    source = write_gguf(tmp_path / "a.gguf", {"blk.0.a.weight": w, "token_embd.weight": w}, kind)
    summary = conversion.convert(source, tmp_path / "b.gguf")
    with Reader(source) as a, Reader(tmp_path / "b.gguf") as b:
        values = a.rows_f32(a.by_name["blk.0.a.weight"])
        assert np.array_equal(b.bytes_of(b.by_name["blk.0.a.weight"]), quantize(TP2_2, find("search"), values))
        embedding = b.by_name["token_embd.weight"]
        assert embedding.type_name == ("Q8_0" if kind in ("BF16", "F16") else kind)
    assert summary.source_types == {kind: 1}


def test_same_input_same_bytes(tiny_gguf: Path, tmp_path: Path) -> None:
    outs = []
    for i, threads in enumerate((1, 2, 5)):
        out = tmp_path / f"{i}.gguf"
        conversion.convert(tiny_gguf, out, Options(threads=threads))
        outs.append(out.read_bytes())
    conversion.convert(tiny_gguf, tmp_path / "ref.gguf", Options(use_reference=True))
    assert outs[0] == outs[1] == outs[2] == (tmp_path / "ref.gguf").read_bytes()


def test_values_beyond_the_scales_fall_back(tmp_path: Path, rng: np.random.Generator) -> None:
    w = {f"blk.{i}.a.weight": (rng.normal(size=(8, 64)) * 0.05).astype(np.float32) for i in range(3)}
    w["blk.1.a.weight"][3, 5] = 12
    w["blk.2.a.weight"] *= 1e-4
    summary = conversion.convert(write_gguf(tmp_path / "a.gguf", w), tmp_path / "b.gguf")
    reasons = {r.tensor.name: (r.out.type, r.choice.reason) for r in summary.fallbacks}
    assert reasons["blk.1.a.weight"] == (8, "largest weight 12; TP2_2 reaches 11.62")
    assert "16 of 16 groups lie below the range" in reasons["blk.2.a.weight"][1]
    assert len(reasons) == 2


@pytest.mark.parametrize("split", [0, 4000])
@pytest.mark.parametrize(
    ("cols", "largest", "kind"),
    [(64, 2e7, "BF16"), (64, 7e4, "Q8_0"), (64, 3.4e38, "F32"), (40, 7e4, "BF16"), (40, 3.4e38, "F32")],
)
def test_every_value_finds_a_type_that_holds_it(
    tmp_path: Path, rng: np.random.Generator, cols: int, largest: float, kind: str, split: int
) -> None:
    """In block matrices, and in the head, whose Q8_0 is no fallback."""
    shapes = {"blk.0.ok.weight": (64, 64), "blk.0.a.weight": (64, cols), "output.weight": (64, cols)}
    w = {name: (rng.normal(size=shape) * 0.05).astype(np.float32) for name, shape in shapes.items()}
    for name in ("blk.0.a.weight", "output.weight"):
        w[name][3, 5] = -largest
    source = write_gguf(tmp_path / "a.gguf", w)
    summary = conversion.convert(source, tmp_path / "b.gguf", Options(split_max_size=split))
    with GgufSource(summary.files[0]) as got:
        for t in got.tensors[1:]:
            assert t.type_name == ("Q8_0" if cols == 64 and largest == 7e4 else kind), t.name
            back = to_float(np.concatenate(list(got.pieces(t))), t.type)
            assert np.isfinite(back).all() and back[3, 5] == pytest.approx(-largest, rel=0.01)
    reasons = {r.tensor.name: r.choice.reason for r in summary.fallbacks}
    assert f"largest weight {largest:.4g}; " in reasons["blk.0.a.weight"]
    assert verify(summary.files[0]).good


@pytest.mark.runtime
@pytest.mark.parametrize("name", ["Q8_0", "F16", "Q4_0", "Q6_K", "IQ4_NL", "BF16"])
def test_a_type_that_the_user_names_must_hold_the_values(tmp_path: Path, rng: np.random.Generator, name: str) -> None:
    w = {f"blk.0.{n}.weight": (rng.normal(size=(8, 256)) * 0.05).astype(np.float32) for n in ("a", "b")}
    w["blk.0.b.weight"][3, 5] = 3.4e38
    source = write_gguf(tmp_path / "a.gguf", w)
    for split in (0, 4000):
        with pytest.raises(QuantizeError) as e:
            conversion.convert(
                source, tmp_path / "b.gguf", Options(tensor_types=(f"b.weight={name}",), split_max_size=split)
            )
        assert re.fullmatch(
            rf"tensor blk.0.b.weight: largest weight 3.4e\+38; {name} reaches [\d.e+]+; "
            "give F32 in --tensor-type, which holds it",
            str(e.value),
        )
        assert not leftovers(tmp_path)


def test_a_stock_tensor_that_is_kept_must_be_finite(tmp_path: Path, weights: dict[str, np.ndarray]) -> None:
    source = write_gguf(tmp_path / "a.gguf", weights | {"blk.0.odd.weight": np.ones((8, 64), np.float32)}, "Q8_0")
    with Reader(source) as r:
        at = r.by_name["token_embd.weight"].offset + 5 * 2 * 34 + 34  # row 5, the second block
    raw = bytearray(source.read_bytes())
    raw[at : at + 2] = b"\x00\x7c"
    source.write_bytes(raw)
    with pytest.raises(InputError, match=r"tensor token_embd.weight holds (nan|-?inf) at row 5, column 32"):
        conversion.convert(source, tmp_path / "b.gguf")
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("name", ["blk.0.ffn_down.weight", "blk.0.attn_norm.weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_damaged_weights_are_named(tmp_path: Path, weights: dict, name: str, value: float) -> None:
    weights[name].reshape(-1, weights[name].shape[-1])[-1, 7] = value
    source = write_gguf(tmp_path / "a.gguf", weights)
    row = weights[name].size // weights[name].shape[-1] - 1
    with pytest.raises(InputError, match=rf"tensor {name} holds {value} at row {row}, column 7"):
        conversion.convert(source, tmp_path / "b.gguf")
    assert not (tmp_path / "b.gguf").exists() and not leftovers(tmp_path)


def test_nothing_to_quantize(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "a.gguf", {"blk.0.a.weight": np.ones((4, 40), np.float32)})
    with pytest.raises(RecipeError, match=r"no tensor takes TP2_2; blk\.0\.a\.weight: rows of 40"):
        conversion.convert(source, tmp_path / "b.gguf")


# ---- targets ----


def test_bad_targets(tiny_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "old.gguf").write_bytes(b"old")
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "same.gguf").symlink_to(tiny_gguf)
    for name, message in {
        "out.bin": r"must end in \.gguf",
        "old.gguf": "exists already; use --force",
        "folder.gguf": "is a folder",
        "absent/out.gguf": "does not exist",
        "tiny.gguf": "output and input are the same file",
        "same.gguf": "output and input are the same file",
    }.items():
        with pytest.raises(OutputError, match=message):
            conversion.convert(tiny_gguf, tmp_path / name, Options(force=name in ("tiny.gguf", "same.gguf")))
    assert (tmp_path / "old.gguf").read_bytes() == b"old"
    conversion.convert(tiny_gguf, tmp_path / "old.gguf", Options(force=True))
    assert (tmp_path / "old.gguf").read_bytes()[:4] == b"GGUF"


def test_folder_without_rights(tiny_gguf: Path) -> None:
    with pytest.raises(OutputError, match=r"/proc/out\.gguf: cannot write in /proc"):
        conversion.convert(tiny_gguf, Path("/proc/out.gguf"))


def test_small_disk_is_refused_early(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match="0 MB free on the disk"):
        conversion.convert(tiny_gguf, tmp_path / "b.gguf")


def test_a_disk_that_lies_is_noticed(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bit that flips on the disk is found when the file is read back, and the next run mends it."""
    conversion.convert(tiny_gguf, tmp_path / "good.gguf")
    real = finish

    def flip(parts: list) -> None:
        real(parts)
        with open(parts[0].work, "r+b") as f:
            f.seek(-100, os.SEEK_END)
            byte = f.read(1)
            f.seek(-1, os.SEEK_CUR)
            f.write(bytes([byte[0] ^ 1]))

    with monkeypatch.context() as m, pytest.raises(OutputError, match="reads back differently than it was written"):
        m.setattr(conversion, "finish", flip)
        conversion.convert(tiny_gguf, tmp_path / "b.gguf")
    assert not (tmp_path / "b.gguf").exists()
    assert conversion.convert(tiny_gguf, tmp_path / "b.gguf").resumed == 6  # all but the last
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "good.gguf").read_bytes()


def test_unknown_method_and_type(tiny_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match="no method 'magic'"):
        conversion.convert(tiny_gguf, tmp_path / "b.gguf", Options(method="magic"))
    with pytest.raises(RecipeError, match="no trit-plane type"):
        conversion.convert(tiny_gguf, tmp_path / "b.gguf", Options(type="TP9"))
    with pytest.raises(QuantizeError, match="paper makes TP2_0, not TP2_2"):
        conversion.convert(tiny_gguf, tmp_path / "b.gguf", Options(method="paper"))
    with pytest.raises(InputError, match="no such file or folder"):
        conversion.convert(tmp_path / "absent", tmp_path / "b.gguf")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(InputError, match="does not begin as a GGUF file does"):
        conversion.convert(tmp_path / "text.gguf", tmp_path / "b.gguf")


def test_memory_stays_with_the_largest_tensor(tmp_path: Path, rng: np.random.Generator) -> None:
    """Peak memory of a conversion does not grow with the number of tensors."""
    one = rng.normal(size=(1024, 1024)).astype(np.float32) * np.float32(0.05)
    peaks = []
    for n in (2, 24):
        source = write_gguf(tmp_path / f"{n}.gguf", {f"blk.{i}.a.weight": one for i in range(n)}, "F16")
        code = (
            "import resource, sys; from pathlib import Path; from ptqtp_gguf.conversion import convert;"
            f"convert(Path({str(source)!r}), Path({str(tmp_path / f'{n}-out.gguf')!r}));"
            "maps = [l for l in open('/proc/self/status') if l.startswith('VmHWM')]; print(maps[0].split()[1])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
        peaks.append(int(done.stdout) * 1024)
    mapped = 24 * 2 * one.size * 1.25  # the source's own pages and the output read back count while they are mapped
    assert peaks[1] - peaks[0] < mapped + 2 * one.nbytes


# ---- checkpoints ----


@pytest.mark.runtime
@pytest.mark.hf
def test_one_pass_gives_the_bytes_of_two(moe_checkpoint: Path, tmp_path: Path) -> None:
    """Without an intermediate file, with one, and from that file: the same output."""
    folder = moe_checkpoint
    one = conversion.convert(folder, tmp_path / "one.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["one.gguf"]
    bf16 = tmp_path / "bf16.gguf"
    two = conversion.convert(folder, tmp_path / "two.gguf", Options(keep_bf16=bf16))
    three = conversion.convert(bf16, tmp_path / "three.gguf")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "three.gguf").read_bytes()
    assert one.source_hash == two.source_hash == three.source_hash
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bf16.gguf", "one.gguf", "three.gguf", "two.gguf"]


@pytest.mark.runtime
@pytest.mark.hf
def test_a_checkpoint_goes_on_where_it_was(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversion.convert(tiny_checkpoint, tmp_path / "whole.gguf")
    real = transcode._close_tensor

    def close(journal: Journal, *args: object) -> None:
        real(journal, *args)  # type: ignore[arg-type]
        if len(journal.rows) == 7:
            raise KeyboardInterrupt

    stages: list[str] = []
    for options in (Options(), Options(keep_bf16=tmp_path / "bf16.gguf")):
        out = tmp_path / "out.gguf"
        with monkeypatch.context() as m, pytest.raises(Interrupted, match="7 finished tensors are kept"):
            m.setattr(transcode, "_close_tensor", close)
            conversion.convert(tiny_checkpoint, out, options)
        stages.clear()
        summary = conversion.convert(tiny_checkpoint, out, options, lambda *a: stages.append(a[0]))
        assert summary.resumed == 7
        assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
        assert ("converter" in stages) == (options.keep_bf16 is None)  # the bf16 file was whole already
        out.unlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bf16.gguf", "whole.gguf"]
