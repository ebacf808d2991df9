"""`convert --calib` and `--hessians`: what they make, killed and taken up again, and what they refuse."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibrated_files import TOKENS, WINDOW, converted_before, leftovers, planes_of, prose, seen_prose, with_
from gathered_models import by_tensor, gather, squares

from ptqtp_gguf.calibrate import texts
from ptqtp_gguf.calibrate.store import PlaneStore, planes_folder
from ptqtp_gguf.calibrate.work import MIN_TOKENS
from ptqtp_gguf.codec import types as fmt
from ptqtp_gguf.codec.tp2_1 import TP2_1
from ptqtp_gguf.codec.tp2_2 import TP2_2
from ptqtp_gguf.conversion.pipeline import convert
from ptqtp_gguf.errors import CalibrationError, Interrupted, ResumeError
from ptqtp_gguf.files.gguf import Reader, TensorInfo
from ptqtp_gguf.inspect.check import verify
from ptqtp_gguf.plan.options import Calibration, Options
from ptqtp_gguf.plan.tuning import TuneSettings
from ptqtp_gguf.quantize.methods import METHODS, quantize
from ptqtp_gguf.source import checkpoint
from ptqtp_gguf.source.opening import open_source

pytestmark = [pytest.mark.hf, pytest.mark.runtime]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prepare")


@pytest.fixture(scope="module")
def how(folder: Path) -> Options:
    return prose(folder)


@pytest.fixture(scope="module")
def seen_how(folder: Path) -> Options:
    return seen_prose(folder)


@pytest.fixture(scope="module")
def in_order_file(folder: Path, how: Options, tiny_checkpoint: Path) -> tuple[Path, Path]:
    """The tiny Llama calibrated in order, and its bf16 GGUF."""
    out, bf16 = folder / "in-order.gguf", folder / "bf16.gguf"
    convert(tiny_checkpoint, out, replace(how, keep_bf16=bf16))
    return out, bf16


@pytest.fixture
def again(in_order_file: tuple[Path, Path]) -> Iterator[None]:
    with converted_before(in_order_file[1]):
        yield


@pytest.fixture(scope="module")
def moments_file(
    folder: Path, seen_how: Options, in_order_file: tuple[Path, Path], tiny_checkpoint: Path
) -> tuple[Path, Path]:
    """The same from second moments that the runtime gathers, and their folder."""
    out, kept = folder / "moments.gguf", folder / "moments"
    with converted_before(in_order_file[1]):
        convert(tiny_checkpoint, out, with_(seen_how, hessians=kept))
    return out, kept


@pytest.fixture(scope="module")
def h(folder: Path, how: Options, in_order_file: tuple[Path, Path], tiny_checkpoint: Path) -> dict[str, np.ndarray]:
    """Second moments over the whole text, by which files are judged."""
    windows = windows_of(how, tiny_checkpoint)
    assert windows.shape == (TOKENS // WINDOW, WINDOW)
    return squares(gather(in_order_file[1], windows, folder / "judge"))


def windows_of(how: Options, found: Path) -> np.ndarray:
    loaded = [texts.load(t) for t in how.calibration.texts]
    return texts.tokens(loaded, checkpoint.check(found), WINDOW, TOKENS)


# ---- what is made ----


def test_a_calibrated_file_is_better(
    folder: Path, in_order_file: tuple[Path, Path], moments_file: tuple[Path, Path], h: dict[str, np.ndarray]
) -> None:
    (ours, bf16), search = in_order_file, folder / "search.gguf"
    convert(bf16, search, Options(device="cpu"))
    assert not leftovers(folder)
    with Reader(ours) as r:
        assert r.get(fmt.Key.METHOD) == "calibrated"
        told = "prose.txt: at most 1024 tokens, windows of 64, effort "
        assert r.get(fmt.Key.CALIBRATION) == f"{told}best"
    with Reader(moments_file[0]) as r:
        assert r.get(fmt.Key.METHOD) == "calibrated" and r.get(fmt.Key.CALIBRATION) == f"{told}normal"
    with open_source(bf16) as source:
        assert verify(ours, source).good
    errors: dict[Path, list[float]] = {ours: [], moments_file[0]: [], search: []}
    for path, sums in errors.items():
        with Reader(path) as q, Reader(bf16) as full:
            for name in planes_of(ours):
                e = (q.rows_f32(q.by_name[name]) - full.rows_f32(full.by_name[name])).astype(np.float64)
                sums.append(float(((e @ h[name]) * e).sum()))
    assert len(errors[ours]) == 14
    assert all(np.array(errors[moments_file[0]]) < 0.8 * np.array(errors[search]))
    # in order the weights are moved towards an aim of their own: worse by this measure
    assert sum(errors[ours]) < 0.8 * sum(errors[search])


def test_moments_serve_a_gguf(
    folder: Path, seen_how: Options, in_order_file: tuple[Path, Path], moments_file: tuple[Path, Path]
) -> None:
    """Gathered from the checkpoint and the text once; the GGUF with them alone becomes the same."""
    out = folder / "from-gguf.gguf"
    convert(in_order_file[1], out, with_(seen_how, hessians=moments_file[1], texts=()))
    with Reader(out) as a, Reader(moments_file[0]) as b:
        assert a.get(fmt.Key.CALIBRATION) == "second moments of an earlier calibration"
        assert a.get(fmt.Key.TENSOR_HASHES) == b.get(fmt.Key.TENSOR_HASHES)
        assert all(np.array_equal(a.bytes_of(t), b.bytes_of(b.by_name[t.name])) for t in a.tensors)
    first, second = planes_of(out), planes_of(in_order_file[0])
    assert not any(np.array_equal(first[n], second[n]) for n in first)

    # with the text, too: the model is the same, whatever file it is in
    told: list[tuple[str, str]] = []
    convert(
        in_order_file[1],
        folder / "again.gguf",
        with_(seen_how, hessians=moments_file[1]),
        lambda stage, done, total, what: told.append((stage, what)),
    )
    assert ("quantizing by moments", "") in told and ("calibrating", "windows of text") not in told
    again = planes_of(folder / "again.gguf")
    assert again.keys() == first.keys() and all(np.array_equal(again[n], first[n]) for n in first)


def test_a_gguf_is_calibrated_by_calib(
    cli: Callable[..., Any],
    seen_how: Options,
    in_order_file: tuple[Path, Path],
    moments_file: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    """As its checkpoint is, by the runtime; what only a checkpoint can is refused in one line."""
    args = ["--calib", seen_how.calibration.texts[0], "--calib-tokens", TOKENS, "--calib-window", WINDOW]
    args += ["--recipe", seen_how.recipe, "--device", "cpu", "-j", "1"]
    done = cli("convert", in_order_file[1], tmp_path / "x.gguf", *args)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]
    got, want = planes_of(tmp_path / "x.gguf"), planes_of(moments_file[0])
    assert got.keys() == want.keys() and all(np.array_equal(got[n], want[n]) for n in want)


def test_what_only_a_checkpoint_can(
    how: Options, in_order_file: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a GGUF it is refused, in one line, before anything long begins."""
    for options, message in (
        (with_(how, texts=("self",)), "--calib self runs the model, which takes a checkpoint folder"),
        (with_(how, tune=True, tune_tokens=TOKENS), "--tune runs the model, which takes a checkpoint folder"),
    ):
        told: list[tuple[str, str]] = []

        def progress(stage: str, done: int, total: int, what: str, told: list[tuple[str, str]] = told) -> None:
            told.append((stage, what))

        with pytest.raises(CalibrationError, match=message) as e:
            convert(in_order_file[1], tmp_path / "y.gguf", options, progress)
        assert "\n" not in str(e.value)
        assert list(tmp_path.iterdir()) == [] and ("calibrating", "windows of text") not in told


def test_types_by_tensor(
    seen_how: Options,
    in_order_file: tuple[Path, Path],
    moments_file: tuple[Path, Path],
    h: dict[str, np.ndarray],
    tmp_path: Path,
) -> None:
    """TP2_2 everywhere, or for some tensors beside TP2_1: each is calibrated as what it is planned to be."""
    bf16, options = in_order_file[1], with_(seen_how, hessians=moments_file[1], texts=())

    def errors(name: str, options: Options) -> dict[str, tuple[int, float]]:
        """Of each matrix, its type and what its error does to the outputs."""
        out = tmp_path / name
        convert(bf16, out, options)
        with open_source(bf16) as source:
            assert verify(out, source).good
        result = {}
        with Reader(out) as q, Reader(bf16) as full:
            for t in (q.by_name[n] for n in planes_of(moments_file[0])):
                e = (q.rows_f32(t) - full.rows_f32(full.by_name[t.name])).astype(np.float64)
                result[t.name] = t.type, float(((e @ h[t.name]) * e).sum())
        return result

    ours = errors("ours.gguf", replace(options, type="TP2_2"))
    options = replace(options, type="TP2_1")
    mixed = errors("mixed.gguf", replace(options, tensor_types=("attn_q|ffn_down=TP2_2",)))
    search = errors("search.gguf", Options(type="TP2_2", device="cpu"))
    plain = errors("plain.gguf", options)
    assert all(kind == TP2_2.id for kind, _ in ours.values())
    for name, (kind, error) in mixed.items():
        assert kind == (TP2_2.id if "attn_q" in name or "ffn_down" in name else TP2_1.id)
        assert error == pytest.approx((ours if kind == TP2_2.id else plain)[name][1], rel=0.05)
    # few tokens say little of how 192 inputs go together, so H is shrunk: less is gained on the text itself
    assert all(ours[n][1] < min(0.9 * plain[n][1], 0.7 * search[n][1]) for n in ours)
    assert sum(e for _, e in ours.values()) < 0.5 * sum(e for _, e in search.values())


def test_planes_of_another_type_are_not_taken(
    seen_how: Options, in_order_file: tuple[Path, Path], moments_file: tuple[Path, Path], tmp_path: Path
) -> None:
    """Also where the conversion's own journal is lost."""
    out, options = tmp_path / "t.gguf", with_(seen_how, hessians=moments_file[1], texts=())

    def progress(stage: str, *_: object) -> None:
        if stage == "quantizing":
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        convert(in_order_file[1], out, options, progress)
    for path in tmp_path.glob(".t.gguf.*"):
        if path.is_file():
            path.unlink()
        elif path != planes_folder(out):
            shutil.rmtree(path)
    with pytest.raises(ResumeError, match="unfinished calibration exists beside it, begun with another --type;"):
        convert(in_order_file[1], out, replace(options, type="TP2_1"))


def test_experts_with_few_tokens_are_left_to_search(
    folder: Path, how: Options, moe_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And told of; as is, when tuning, that it leaves experts as they are."""
    monkeypatch.setattr(Calibration, "tuning", TuneSettings(steps=1, lr=1e-6))
    out, bf16 = folder / "moe.gguf", folder / "moe-bf16.gguf"
    # 64 an expert, if they were sent evenly
    few_tokens = with_(how, tokens=2 * WINDOW, fisher=False, tune=True, tune_tokens=TOKENS)
    summary = convert(moe_checkpoint, out, replace(few_tokens, keep_bf16=bf16))
    name = "blk.0.ffn_gate_exps.weight"
    counts = np.zeros(4, int)
    for i, window in enumerate(windows_of(how, moe_checkpoint)[:2]):  # one by one: of two, one were held out
        moments = gather(bf16, window[None], folder / f"experts-{i}", [name])
        counts += by_tensor(moments)[name].counts
    # of the unquantized block; attention changes a little before it
    few = np.flatnonzero(counts < MIN_TOKENS).tolist()
    assert few and len(few) < 4 and counts.sum() == 4 * WINDOW
    notes = {n.partition(":")[0]: n for n in reversed(summary.notes)}
    assert "not tuned" in notes["4 tensors, e.g. blk.0.ffn_gate_exps.weight"]
    assert sum("experts.down_proj: not tuned" in n for n in summary.notes) == 2
    assert name in notes and f"({', '.join(map(str, few))}) by search: fewer than 64 tokens were seen" in notes[name]
    with Reader(out) as q, Reader(bf16) as full:
        made = q.bytes_of(q.by_name[name]).reshape(4, 224, -1)
        w = full.rows_f32(full.by_name[name])
    plain = quantize(TP2_2, METHODS["search"], w).reshape(made.shape)
    assert [e for e in range(4) if np.array_equal(made[e], plain[e])] == few
    assert not leftovers(folder)


# ---- killed and taken up again ----

KILLED = """
import os, sys
from pathlib import Path
from ptqtp_gguf.conversion import bf16 as bf16_module
from ptqtp_gguf.conversion import pipeline
from ptqtp_gguf.plan import Calibration, Options
from ptqtp_gguf.source import GgufSource
source, bf16, out, text = sys.argv[1:]
bf16_module.open_source = lambda source, *_: GgufSource(Path(bf16), source)
calibration = Calibration(effort="best", texts=(text,), tokens=1024, window=64)
options = Options(calibration=calibration, device="cpu", threads=1)
pipeline.convert(Path(source), Path(out), options,
    lambda stage, done, total, what: what == "block 1, mlp.gate_proj" and os.kill(os.getpid(), 9))
"""


@pytest.mark.usefixtures("again")
def test_killed_in_a_block(
    folder: Path, how: Options, in_order_file: tuple[Path, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """SIGKILL; other options are refused by name; then the same bytes as in one go."""
    out = tmp_path / "k.gguf"
    args = [str(tiny_checkpoint), str(in_order_file[1]), str(out), how.calibration.texts[0]]
    killed = subprocess.run([sys.executable, "-c", KILLED, *args], timeout=300, check=False, cwd=tmp_path)
    assert killed.returncode == -9  # not in the repository, whose package may lack its library
    kept = planes_folder(out)
    assert (kept / "states.1.bin").exists() and not (kept / "states.0.bin").exists()
    other = folder / "other.txt"
    other.write_text("Other text. " * 2000)
    for options, message in (
        (with_(how, window=32), r"--calib-window 64 \(now 32\)"),
        (with_(how, fisher=False), r"--fisher True \(now False\)"),
        (with_(how, texts=(str(other),)), r"--calib \['prose.txt \(SHA-256"),
        (replace(how, calibration=Calibration()), r"--calib \[.* \(now none\)"),
        (replace(how, calibration=Calibration(tokens=TOKENS)), r"--calib \[.* \(now none\)"),
        (with_(how, tune=True), r"--tune False \(now True\)"),
    ):
        with pytest.raises(ResumeError, match=f"begun with {message}") as e:
            convert(tiny_checkpoint, out, options)
        assert "--restart" in str(e.value) and "\n" not in str(e.value)
    seen: list[str] = []
    convert(tiny_checkpoint, out, how, lambda stage, done, total, what: seen.append(what))
    assert "block 1, mlp.gate_proj" in seen and not any(w.startswith(("embedding", "block 0", "tokens")) for w in seen)
    assert out.read_bytes() == in_order_file[0].read_bytes()
    assert not leftovers(tmp_path)


@pytest.mark.usefixtures("again")
def test_interrupted_again_and_again(
    how: Options,
    in_order_file: tuple[Path, Path],
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C while the streams go through a finished block, between tensors of one input, and while writing."""
    out = tmp_path / "i.gguf"

    def go(stop: str) -> set[str]:
        seen = set()

        def progress(stage: str, done: int, total: int, what: str) -> None:
            seen.add(f"{stage} {what}")
            if f"{stage} {what}" == stop:
                raise KeyboardInterrupt

        with pytest.raises(Interrupted, match=r"(what calibration has finished is|tensors are) kept; run the same"):
            convert(tiny_checkpoint, out, how, progress)
        return seen

    go("calibrating block 0")
    assert "calibrating block 0" in go("calibrating block 1, self_attn.q_proj")  # not taken for finished
    real = PlaneStore.put
    names: list[str] = []

    def put(self: PlaneStore, t: TensorInfo, *args: Any) -> None:
        if names:
            raise KeyboardInterrupt
        names.append(t.name)
        real(self, t, *args)

    with monkeypatch.context() as m:
        m.setattr(PlaneStore, "put", put)
        seen = go("")
    assert names == ["blk.1.attn_q.weight"] and "calibrating block 0" not in seen
    seen = go("quantizing blk.0.attn_q.weight")
    assert "calibrating block 1" in seen and "calibrating block 0" not in seen
    with monkeypatch.context() as m:
        m.setattr("ptqtp_gguf.conversion.pipeline.transcode", lambda *_: pytest.fail("begun"))
        with pytest.raises(ResumeError, match="--calib-tokens 1024"):
            convert(tiny_checkpoint, out, with_(how, tokens=512))
    convert(tiny_checkpoint, out, how)
    assert out.read_bytes() == in_order_file[0].read_bytes()
    assert not leftovers(tmp_path)


# ---- what is refused ----


@pytest.mark.usefixtures("again")
def test_text_that_does_not_do(how: Options, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """And nothing is left that would refuse the next text."""
    short, out = tmp_path / "short.txt", tmp_path / "x.gguf"
    short.write_text("Too short a text.")
    for options, message in (
        (with_(how, texts=(str(short),)), "short.txt: [0-9]+ tokens; a window needs 6[34]; give more text"),
        (with_(how, texts=(str(tmp_path / "no.txt"),)), "no such file"),
        (with_(how, tune=True, tune_tokens=15 * WINDOW), "--tune: 15 windows of 64 .* 16 are needed"),
    ):
        with pytest.raises(CalibrationError, match=message) as e:
            convert(tiny_checkpoint, out, options)
        assert "\n" not in str(e.value)
        assert [p.name for p in tmp_path.iterdir()] == ["short.txt"]
