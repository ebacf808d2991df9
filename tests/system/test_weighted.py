"""Conversions weighed by an importance matrix: bytes, metadata, and what is refused."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import REPO, write_gguf
from imatrix_files import make_imatrix, tiny_table, write_imatrix

from ptqtp_gguf.codec.tensor_type import TensorType
from ptqtp_gguf.codec.tp2_0 import TP2_0
from ptqtp_gguf.codec.tp2_1 import TP2_1
from ptqtp_gguf.codec.tp2_2 import TP2_2
from ptqtp_gguf.codec.types import TYPES
from ptqtp_gguf.conversion import loop as transcode
from ptqtp_gguf.conversion import pipeline as conversion
from ptqtp_gguf.conversion.facts import card_facts
from ptqtp_gguf.errors import (
    InputError,
    Interrupted,
    OutputError,
    QuantizeError,
    RecipeError,
    ResumeError,
    RuntimeMissing,
)
from ptqtp_gguf.files.gguf import TYPE_IDS, Reader
from ptqtp_gguf.files.journal import Journal
from ptqtp_gguf.llamacpp import ggml, install
from ptqtp_gguf.plan.options import Options
from ptqtp_gguf.quantize import methods
from ptqtp_gguf.source.imatrix import read

SEARCH = methods.find("search")


def rows_of(path: Path, name: str) -> np.ndarray:
    with Reader(path) as r:
        return np.array(r.bytes_of(r.by_name[name]))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "readme.txt"
    path.write_text((REPO / "docs" / "architecture.md").read_text() * 2)
    return path


@pytest.mark.runtime
def test_experts_get_the_bytes_of_llama_quantize_and_of_quantize(
    moe_checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    model, out, small = tmp_path / "moe.gguf", tmp_path / "ours.gguf", tmp_path / "small.gguf"
    conversion.convert(moe_checkpoint, out, Options(keep_bf16=model))
    table = make_imatrix(model, text, tmp_path / "moe.imatrix.gguf")
    wanted = ("blk.0.ffn_down_exps=Q5_0", "blk.0.attn_q=Q4_1", "blk.1.ffn_up_exps=IQ4_NL", "blk.1.attn_k=Q4_0")
    options = Options(imatrix=table, tensor_types=wanted)
    conversion.convert(model, out, Options(**{**vars(options), "force": True}))
    args = [arg for w in wanted for arg in ("--tensor-type", w.lower())] + ["--token-embedding-type", "q4_0"]
    install.run_tool(
        "llama-quantize", "--imatrix", str(table), *args, str(model), str(tmp_path / "stock.gguf"), "Q8_0", "2"
    )
    with Reader(model) as source, Reader(out) as ours, Reader(tmp_path / "stock.gguf") as stock, read(table) as found:
        weighted = 0
        for t in ours.tensors:
            if t.type_name in ("Q5_0", "Q4_1", "IQ4_NL", "Q4_0"):
                assert np.array_equal(ours.bytes_of(t), stock.bytes_of(stock.by_name[t.name])), t.name
                weighted += 1
            elif t.type in TYPES:
                w = source.rows_f32(source.by_name[t.name]).reshape(*t.shape[2:], t.shape[1], t.shape[0])
                values = found.values[t.name]
                assert values.shape == (*t.shape[2:], t.shape[0])
                pairs = zip(w, values, strict=True) if w.ndim == 3 else [(w, values)]
                expected = np.concatenate([methods.quantize(TP2_2, SEARCH, np.array(x), h) for x, h in pairs])
                assert np.array_equal(ours.bytes_of(t), expected), t.name
                assert not np.array_equal(expected, methods.quantize(TP2_2, SEARCH, w.reshape(-1, t.shape[0])))
        assert weighted == 5  # among them the embedding, of which llama-imatrix tells nothing
        keys = ("file", "dataset", "entries_count", "chunks_count")
        told = [stock.get(f"quantize.imatrix.{k}") for k in keys]
        assert [ours.get(f"quantize.imatrix.{k}") for k in keys] == [table.name, "readme.txt", *told[2:]]
        assert told[:2] == [str(table), str(text)]
        kinds = [stock.header.kvs[f"quantize.imatrix.{k}"].type for k in keys]
        assert [ours.header.kvs[f"quantize.imatrix.{k}"].type for k in keys] == kinds
    # pieces of 512 rows end within an expert of 224
    conversion.convert(model, small, Options(**{**vars(options), "max_memory": 102 << 20, "threads": 1}))
    assert small.read_bytes() == out.read_bytes()


@pytest.fixture
def table(tmp_path: Path, rng: np.random.Generator) -> Path:
    return tiny_table(tmp_path / "t.imatrix", rng)


@pytest.mark.parametrize("kind", [TP2_2, TP2_1, TP2_0], ids=["TP2_2", "TP2_1", "TP2_0"])
@pytest.mark.parametrize("reference", [False, True])
def test_experts_and_what_goes_unweighted(
    table: Path, weights: dict[str, np.ndarray], tmp_path: Path, kind: TensorType, reference: bool
) -> None:
    if kind == TP2_0:  # rows of 128
        weights = {n: np.tile(w, 2) if w.ndim > 1 else w for n, w in weights.items()}
        with read(table) as m:
            wide = {n: (np.tile(np.atleast_2d(v), 2), np.array([0 if not v.any() else 1])) for n, v in m.values.items()}
        wide["blk.0.ffn_gate_exps.weight"] = (wide["blk.0.ffn_gate_exps.weight"][0], np.array([1, 0, 1]))
        table = write_imatrix(tmp_path / "wide", wide)
    source = write_gguf(tmp_path / "source.gguf", weights)
    out = tmp_path / "out.gguf"
    done = conversion.convert(source, out, Options(imatrix=table, type=kind.name, use_reference=reference))
    with read(table) as m:
        h = {n: m.values[n] for n in m.values}

    def q(w: np.ndarray, h: np.ndarray | None) -> np.ndarray:
        return methods.quantize(kind, SEARCH, w, h)

    name = "blk.0.attn_q.weight"
    assert np.array_equal(rows_of(out, name), q(weights[name], h[name]))
    name = "blk.0.ffn_gate_exps.weight"
    each = [h[name][0], None, h[name][2]]
    assert np.array_equal(
        rows_of(out, name), np.concatenate([q(w, x) for w, x in zip(weights[name], each, strict=True)])
    )
    lacks = dict(done.unweighted)
    assert lacks[name] == "experts 1 unweighted, the imatrix has seen no token there"
    reasons = {r.tensor.name: r.choice.reason for r in done.rows}
    assert reasons[name].endswith(f"; {lacks[name]}") and ";" not in reasons["output.weight"]
    assert "output.weight" not in lacks and "blk.0.attn_q.weight" not in lacks
    if kind != TP2_0:
        name = "blk.0.ffn_down.weight"
        assert np.array_equal(rows_of(out, name), q(weights[name], None))
        assert lacks[name] == "unweighted, the imatrix has seen no token there"


def test_default_conversion_without_the_runtime(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes, and no importance for an embedding that is only looked up, whatever the imatrix holds."""
    table = {n: (np.arange(1.0, 65.0), np.array([1])) for n in ("token_embd.weight", "output.weight")}
    table["blk.0.attn_q.weight"] = table["output.weight"]
    both = [Options(), Options(imatrix=write_imatrix(tmp_path / "t.imatrix", table))]
    for i, options in enumerate(both):
        conversion.convert(tiny_gguf, tmp_path / f"with{i}.gguf", options)

    def gone() -> None:
        raise RuntimeMissing("the patched llama-cpp-python is not installed; build it")

    monkeypatch.setattr(install, "ggml_library", gone)
    for i, options in enumerate(both):
        done = conversion.convert(tiny_gguf, tmp_path / f"without{i}.gguf", options)
        assert (tmp_path / f"without{i}.gguf").read_bytes() == (tmp_path / f"with{i}.gguf").read_bytes()
        assert not {"token_embd.weight", "output.weight"} & {name for name, _ in done.unweighted}
    made = []
    for i in range(2):
        with Reader(tmp_path / f"without{i}.gguf") as r:
            made.append({n: np.array(r.bytes_of(r.by_name[n])) for n in ("token_embd.weight", "blk.0.attn_q.weight")})
    assert [np.array_equal(made[0][n], made[1][n]) for n in made[0]] == [True, False]
    before = sorted(tmp_path.iterdir())
    with pytest.raises(RuntimeMissing, match=r"^Q5_0 is quantized by the patched runtime"):  # at once
        conversion.convert(tiny_gguf, tmp_path / "no.gguf", replace(both[1], tensor_types=("attn_q=Q5_0",)))
    assert sorted(tmp_path.iterdir()) == before


def test_metadata_and_card(table: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    options = Options(imatrix=table)
    done = conversion.convert(tiny_gguf, tmp_path / "a.gguf", options)
    with Reader(tmp_path / "a.gguf") as r:
        assert r.get("ptqtp.calibration") == "imatrix t.imatrix, 7 chunks, wiki.txt"
        keys = {k: kv.value() for k, kv in r.header.kvs.items() if k.startswith("quantize.")}
        assert keys == {
            "quantize.imatrix.file": "t.imatrix",
            "quantize.imatrix.dataset": "wiki.txt",
            "quantize.imatrix.entries_count": 4,
            "quantize.imatrix.chunks_count": 7,
        }
    assert card_facts(done, tiny_gguf, options).calibration == "imatrix t.imatrix, 7 chunks, wiki.txt"
    # what a source, whose planes are taken over as they are, says of its own imatrix goes with another, stays with none
    other = write_imatrix(tmp_path / "o\nther", {"blk.0.attn_q.weight": (np.ones(64), np.array([1]))}, 0, ())
    override = Options(overrides=("quantize.imatrix.dataset=str:old", "quantize.imatrix.chunks_count=int:3"))
    marked = tmp_path / "marked.gguf"
    conversion.convert(tiny_gguf, marked, override)
    conversion.convert(
        marked, tmp_path / "b.gguf", Options(imatrix=other, tensor_types=("attn_q=TP2_0",), type="TP2_1")
    )
    conversion.convert(marked, tmp_path / "c.gguf")
    with Reader(tmp_path / "b.gguf") as b, Reader(tmp_path / "c.gguf") as c:
        assert b.get("ptqtp.calibration") == "imatrix o\ufffdther, chunks not told"
        assert b.get("quantize.imatrix.dataset") is None and b.get("quantize.imatrix.chunks_count") is None
        assert (c.get("quantize.imatrix.dataset"), c.get("ptqtp.calibration")) == ("old", "none")


def test_the_sums_scale_does_not_matter_and_cannot_overflow(tmp_path: Path, rng: np.random.Generator) -> None:
    name, w = "blk.0.a.weight", (rng.normal(size=(16, 256)) * 0.05).astype(np.float32)
    source = write_gguf(tmp_path / "source.gguf", {name: w, "blk.0.b.weight": w})
    sums = rng.exponential(size=256).astype(np.float32)
    made = []
    for power in (0, -120, 120):
        table = write_imatrix(
            tmp_path / f"{power}", {n: (np.ldexp(sums, power), np.array([1])) for n in (name, "blk.0.b.weight")}
        )
        conversion.convert(source, tmp_path / f"{power}.gguf", Options(imatrix=table, tensor_types=("blk.0.b=Q4_0",)))
        made.append([rows_of(tmp_path / f"{power}.gguf", n).tobytes() for n in (name, "blk.0.b.weight")])
    assert made[0] == made[1] == made[2]
    assert made[0][0] == methods.quantize(TP2_2, SEARCH, w, sums).tobytes()


@pytest.mark.runtime
def test_types_that_need_importance(tmp_path: Path, rng: np.random.Generator) -> None:
    names = ["blk.0.a.weight", "blk.1.a.weight", "blk.0.b.weight"]
    w = {n: (rng.normal(size=(8, 256)) * 0.05).astype(np.float32) for n in names}
    source, out, h = write_gguf(tmp_path / "s.gguf", w), tmp_path / "o.gguf", rng.exponential(size=256)
    table = write_imatrix(tmp_path / "i", {names[0]: (h, np.array([1])), names[1]: (h, np.array([0]))})
    conversion.convert(source, out, Options(imatrix=table, tensor_types=(r"blk\.0\.a=iq3_xxs",)))
    assert np.array_equal(rows_of(out, names[0]), ggml.quantize(TYPE_IDS["IQ3_XXS"], w[names[0]], h.astype(np.float32)))
    for imatrix, types, says in (
        (None, "a=IQ3_XXS", "tensor blk.0.a.weight: IQ3_XXS needs an importance matrix; give one with --imatrix, or"),
        (table, "a=IQ3_XXS", "tensor blk.1.a.weight: IQ3_XXS needs an importance matrix; the one given has nothing"),
        (table, r"\.b\.=IQ2_XS", "tensor blk.0.b.weight: IQ2_XS needs an importance matrix; the one given has nothing"),
    ):
        for bpw in (None, 12.0):
            with pytest.raises(RecipeError, match="^" + says):
                conversion.dry_run(
                    source, tmp_path / "p.gguf", Options(imatrix=imatrix, tensor_types=(types,), target_bpw=bpw)
                )


def test_resuming_wants_the_same_file(
    table: Path, tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "o" / "b.gguf", transcode._close_tensor
    out.parent.mkdir()
    conversion.convert(tiny_gguf, tmp_path / "whole.gguf", Options(imatrix=table))

    def close(journal: Journal, *args: object) -> None:
        real(journal, *args)  # type: ignore[arg-type]
        if len(journal.rows) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(Interrupted):
        m.setattr(transcode, "_close_tensor", close)
        conversion.convert(tiny_gguf, out, Options(imatrix=table))
    raw = bytearray(table.read_bytes())
    raw[-1] ^= 1
    with pytest.raises(ResumeError, match=r"begun with --imatrix t\.imatrix \(SHA-256 \w{64}\) \(now none\)"):
        conversion.convert(tiny_gguf, out)
    good = table.read_bytes()
    table.write_bytes(raw)
    with pytest.raises(ResumeError, match=r"begun with --imatrix t\.imatrix \(SHA"):
        conversion.convert(tiny_gguf, out, Options(imatrix=table))
    table.write_bytes(good)
    assert conversion.convert(tiny_gguf, out, Options(imatrix=table)).resumed == 2
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_error_lines(table: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    one = np.array([1])
    files = {
        "short": write_imatrix(tmp_path / "short", {"blk.0.attn_q.weight": (np.ones(32), one)}),
        "experts": write_imatrix(
            tmp_path / "experts", {"blk.0.ffn_gate_exps.weight": (np.ones((2, 64)), one.repeat(2))}
        ),
        "stranger": write_imatrix(tmp_path / "stranger", {"blk.7.attn_q.weight": (np.ones(64), one)}),
        "empty": write_imatrix(tmp_path / "empty", {}),
        "nothing": tmp_path / "nothing",
    }
    (tmp_path / "nothing").write_bytes(b"")
    for name, says in (
        ("short", "blk.0.attn_q.weight has 32 values, the model's tensor 64 inputs; make an imatrix with this model"),
        ("experts", "blk.0.ffn_gate_exps.weight has 128 values, the model's tensor 3 x 64 inputs"),
        ("stranger", "none of its 1 tensors, e.g. blk.7.attn_q.weight, is in the model"),
        ("empty", "an imatrix without a tensor"),
        ("nothing", "the file is empty"),
        ("model", "a GGUF, but no imatrix; llama-imatrix makes one"),
        ("absent", "No such file"),
    ):
        path = {"model": tiny_gguf, "absent": tmp_path / "absent", **files}[name]
        for work in (conversion.convert, conversion.dry_run):
            with pytest.raises(InputError) as e:
                work(tiny_gguf, tmp_path / "x.gguf", Options(imatrix=path))
            assert str(e.value).startswith(f"{path}: {says}") and "\n" not in str(e.value)
    paper = Options(imatrix=table, method="paper", type="TP2_0")
    with pytest.raises(QuantizeError, match=r"^--imatrix: method paper takes no importance; leave it out, or use"):
        conversion.convert(tiny_gguf, tmp_path / "x.gguf", paper)
    assert not list(tmp_path.glob("*x.gguf*"))
    mine = table.rename(tmp_path / "mine.gguf")
    with pytest.raises(OutputError, match="is also the imatrix to read"):
        conversion.convert(tiny_gguf, mine, Options(imatrix=mine, force=True))


def test_the_command(
    cli: Callable[..., subprocess.CompletedProcess[str]], table: Path, tiny_gguf: Path, tmp_path: Path
) -> None:
    done = cli("convert", tiny_gguf, tmp_path / "x.gguf", "--imatrix", table, "--model-card", tmp_path / "card.md")
    assert done.returncode == 0, done.stderr
    assert "note: blk.0.ffn_gate_exps.weight: experts 1 unweighted, the imatrix has seen no token there" in done.stdout
    assert "- calibration: imatrix t.imatrix, 7 chunks, wiki.txt" in (tmp_path / "card.md").read_text()
    done = cli("convert", tiny_gguf, tmp_path / "y.gguf", "--imatrix", tiny_gguf)
    assert done.returncode == 1 and "a GGUF, but no imatrix" in done.stderr and done.stderr.count("\n") == 1
