"""A plain `convert` calibrates on the text in the package, and goes without where that cannot be."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibrated_files import leftovers, planes_of
from gathered_models import as_gguf, squares
from helpers import rewritten, write_gguf
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ptqtp_gguf
from ptqtp_gguf.calibrate import by_moments
from ptqtp_gguf.calibrate.moments import Moments, read_index
from ptqtp_gguf.calibrate.seen import moments_folder
from ptqtp_gguf.codec import TYPES
from ptqtp_gguf.codec import types as fmt
from ptqtp_gguf.conversion.pipeline import convert
from ptqtp_gguf.conversion.summary import Summary
from ptqtp_gguf.errors import CalibrationError, Interrupted, OutputError, ResumeError
from ptqtp_gguf.files.gguf import Reader
from ptqtp_gguf.inspect.check import verify
from ptqtp_gguf.llamacpp import install
from ptqtp_gguf.plan.options import Calibration, Options
from ptqtp_gguf.plan.request import Request
from ptqtp_gguf.quantize.methods import METHODS, quantize
from ptqtp_gguf.source.opening import open_source

pytestmark = [pytest.mark.hf, pytest.mark.runtime]

LITTLE = Calibration(tokens=1024, window=64)  # of the text that nobody asked for
QUICK = Options(calibration=LITTLE, device="cpu", threads=1)


@pytest.fixture(autouse=True)
def _as_users_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PTQTP_EFFORT")


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama in bf16, with its tokenizer."""
    return as_gguf(tiny_checkpoint, tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def one_go(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The file that the plain call makes of it, and its moments."""
    folder = tmp_path_factory.mktemp("one-go")
    out, kept = folder / "out.gguf", folder / "moments"

    def progress(stage: str, *_: object) -> None:
        if stage == "quantizing" and not kept.exists():
            shutil.copytree(moments_folder(out) / "moments", kept)

    with pytest.MonkeyPatch.context() as m:
        m.delenv("PTQTP_EFFORT")
        convert(tiny, out, QUICK, progress)
    assert not leftovers(folder)
    return out, kept


def method_of(path: Path) -> object:
    with Reader(path) as r:
        return r.get(fmt.Key.METHOD)


def error(path: Path, source: Path, h: dict[str, np.ndarray]) -> dict[str, float]:
    """Of each matrix of planes, what its error does to the outputs."""
    found = {}
    with Reader(path) as q, Reader(source) as full:
        for t in q.tensors:
            if t.type in TYPES and t.name in h:
                e = (q.rows_f32(t) - full.rows_f32(full.by_name[t.name])).astype(np.float64)
                found[t.name] = float(((e @ h[t.name]) * e).sum())
    return found


# ---- what it makes ----


def test_a_plain_conversion_calibrates(tiny: Path, one_go: tuple[Path, Path], tmp_path: Path) -> None:
    """The error by its own moments is below that of a file without text."""
    out, kept = one_go
    with Reader(out) as r:
        assert r.get(fmt.Key.METHOD) == "calibrated"
        assert r.get(fmt.Key.CALIBRATION) == "builtin: at most 1024 tokens, windows of 64, effort normal"
    with open_source(tiny) as source:
        assert verify(out, source).good
    h = squares(Moments(kept))
    plain = tmp_path / "plain.gguf"
    convert(tiny, plain, Options(calibration=Calibration(effort="none")))
    assert method_of(plain) == "search"
    ours, search = error(out, tiny, h), error(plain, tiny, h)
    both = ours.keys() & search.keys()
    assert len(both) >= 10
    assert all(ours[n] < search[n] for n in both)
    assert sum(ours[n] for n in both) < 0.8 * sum(search[n] for n in both)
    size = Path(plain).stat().st_size
    assert out.stat().st_size < 1.02 * size  # as large as the default recipe's, whatever types were chosen


@pytest.mark.slow
def test_a_plain_checkpoint_by_the_command(cli: Callable[..., Any], tiny_checkpoint: Path, tmp_path: Path) -> None:
    """As many tokens as users get by default; nothing is left beside the file."""
    done = cli("convert", tiny_checkpoint, tmp_path / "out.gguf", "--device", "cpu", env=without_effort())
    assert done.returncode == 0, done.stderr
    assert "not calibrated" not in done.stdout + done.stderr
    with Reader(tmp_path / "out.gguf") as r:
        assert r.get(fmt.Key.METHOD) == "calibrated"
        assert r.get(fmt.Key.CALIBRATION) == "builtin: effort normal"
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]


def test_a_checkpoint_becomes_what_its_gguf_becomes(
    tiny: Path, one_go: tuple[Path, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    convert(tiny_checkpoint, tmp_path / "out.gguf", QUICK)
    got, want = planes_of(tmp_path / "out.gguf"), planes_of(one_go[0])
    assert got.keys() == want.keys() and all(np.array_equal(got[n], want[n]) for n in want)
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]


def test_again_the_same_bytes(tiny: Path, one_go: tuple[Path, Path], tmp_path: Path) -> None:
    convert(tiny, tmp_path / "out.gguf", QUICK)
    assert (tmp_path / "out.gguf").read_bytes() == one_go[0].read_bytes()


def test_effort_none_is_the_file_without_text(
    tiny: Path, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By option or by environment: matrices as `search` alone makes them, and nothing of text in the file."""
    convert(tiny, tmp_path / "option.gguf", Options(calibration=Calibration(effort="none")))
    done = cli("convert", tiny, tmp_path / "command.gguf", "--effort", "none", env=without_effort())
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("PTQTP_EFFORT", "none")
    convert(tiny, tmp_path / "environment.gguf")
    convert(tiny, tmp_path / "method.gguf", Options(method="search"))
    files = {p.name: p.read_bytes() for p in tmp_path.glob("*.gguf")}
    assert len(files) == 4 and len(set(files.values())) == 1
    with Reader(tmp_path / "option.gguf") as q, Reader(tiny) as full:
        assert q.get(fmt.Key.METHOD) == "search" and q.get(fmt.Key.CALIBRATION) == "none"
        blocks = [t for t in q.tensors if t.type in TYPES]
        assert len(blocks) == 14
        for t in blocks:
            made = quantize(TYPES[t.type], METHODS["search"], full.rows_f32(full.by_name[t.name]))
            assert np.array_equal(q.bytes_of(t).reshape(-1), made.reshape(-1))


# ---- what is meant ----


def without_effort() -> dict[str, str]:
    """For `cli`: an empty name means that none is given."""
    return {"PTQTP_EFFORT": ""}


def test_what_asks_for_a_calibration(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Calibration(texts=("builtin",))
    for options, environment, method, by_default in (
        (Options(), None, "calibrated", True),
        (Options(), "quick", "calibrated", True),
        (Options(), "none", "search", False),
        (Options(calibration=Calibration(effort="quick")), "none", "calibrated", False),
        (Options(calibration=Calibration(effort="none")), "best", "search", False),
        (Options(calibration=text), "none", "calibrated", False),
        (Options(method="search"), None, "search", False),
        (Options(type="TP2_1"), None, "calibrated", True),
        (Options(type="TP2_0"), None, "search", False),
        (Options(use_reference=True), None, "search", False),
    ):
        if environment is None:
            monkeypatch.delenv("PTQTP_EFFORT", raising=False)
        else:
            monkeypatch.setenv("PTQTP_EFFORT", environment)
        request = Request.of(options)
        assert (request.method.name, request.calibration.by_default) == (method, by_default), (options, environment)
        assert request.calibration.wanted == (method == "calibrated")
        plain = request.without_text()
        assert plain.method.name == "search" and not plain.calibration.wanted and not plain.calibration.by_default


def test_without_the_runtime_nobody_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from ptqtp_gguf.errors import RuntimeMissing

    def missing() -> str:
        raise RuntimeMissing("no runtime")

    monkeypatch.setattr(install, "version", missing)
    assert Request.of(Options()).method.name == "search"
    with pytest.raises(RuntimeMissing, match="no runtime"):
        Request.of(Options(calibration=Calibration(effort="normal")))


def test_an_effort_that_is_none_is_told_in_one_line(cli: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:
    for more, env, message in (
        ([], {"PTQTP_EFFORT": "bad"}, "PTQTP_EFFORT bad: is none of none, quick, normal, best"),
        (["--effort", "bad"], without_effort(), "--effort bad: is none of none, quick, normal, best"),
        (["--effort", "none", "--calib", "builtin"], without_effort(), "--effort none looks at no text"),
    ):
        done = cli("convert", tiny, tmp_path / "out.gguf", *more, env=env)
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and message in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


# ---- where it cannot be done ----


def fallen_back(source: Path, out: Path, options: Options = QUICK) -> Summary:
    """A conversion that goes on without text, and is what one that never asked for it is."""
    told: list[str] = []
    summary = convert(source, out, options, lambda stage, done, total, what: told.append(what))
    notes = [n for n in summary.notes if n.startswith("not calibrated: ")]
    assert len(notes) == 1 and "\n" not in notes[0] and notes[0] in told
    assert method_of(out) == "search" and not leftovers(out.parent)
    other = out.with_name("other.gguf")
    convert(source, other, replace(options, calibration=Calibration(effort="none")))
    assert other.read_bytes() == out.read_bytes()
    other.unlink()
    return summary


def test_without_a_tokenizer(tiny_gguf: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    """A GGUF that is just weights. Who asks for it is told that it cannot be."""
    summary = fallen_back(tiny_gguf, tmp_path / "out.gguf")
    assert any("has no tokenizer" in n for n in summary.notes)
    done = cli("convert", tiny_gguf, tmp_path / "shown.gguf", "--device", "cpu", env=without_effort())
    assert done.returncode == 0, done.stderr
    assert re.search(r"not calibrated: .*has no tokenizer", " ".join((done.stdout + done.stderr).split()))
    for how in (Calibration(effort="normal"), Calibration(texts=("builtin",))):
        with pytest.raises(CalibrationError, match="has no tokenizer") as e:
            convert(tiny_gguf, tmp_path / "asked.gguf", Options(calibration=how))
        assert "\n" not in str(e.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.gguf", "shown.gguf", "tiny.gguf"]


def test_killed_without_a_tokenizer(tiny_gguf: Path, tmp_path: Path) -> None:
    """Taken up again it gives the same reason: a model card that is there already is the same."""
    out = tmp_path / "out.gguf"
    killed(tiny_gguf, out, "quantizing", 3)
    assert convert(tiny_gguf, out).notes == fallen_back(tiny_gguf, tmp_path / "plain.gguf").notes


def test_a_model_that_the_runtime_cannot_run(tiny: Path, tmp_path: Path) -> None:
    """A tensor is lost, so that it cannot be loaded; or the process that runs it dies."""
    lost = rewritten(tiny, tmp_path / "lost.gguf", [], {"blk.1.attn_q.weight": "blk.1.something.weight"})
    options = replace(QUICK, load_check=False)
    assert any("cannot load" in n for n in fallen_back(lost, tmp_path / "out.gguf", options).notes)


def test_the_process_dies(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crash = tmp_path / "crash"
    crash.write_text("#!/bin/sh\necho 'GGML_ASSERT(things) failed' >&2\nkill -ABRT $$\n")
    crash.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(crash))
    notes = fallen_back(tiny, tmp_path / "out.gguf", replace(QUICK, load_check=False)).notes
    assert any("the runtime died" in n and "GGML_ASSERT(things) failed" in n for n in notes)


def test_no_planes_come_of_it(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails when some planes are made: they are thrown away, too."""
    names: list[str] = []
    real = by_moments._Planes._matrices

    def fails(self: Any, of: Any, tensors: list[str], kind: Any) -> None:
        if names:
            raise CalibrationError("things are bad")
        names.extend(tensors)
        real(self, of, tensors, kind)

    monkeypatch.setattr(by_moments._Planes, "_matrices", fails)
    assert "not calibrated: things are bad" in fallen_back(tiny, tmp_path / "out.gguf").notes
    assert names


# ---- killed and taken up again ----

KILLED = """
import os, sys
from pathlib import Path
from ptqtp_gguf.conversion import convert
from ptqtp_gguf.plan import Calibration, Options
source, out, stage, number, effort = sys.argv[1:]
seen = []
def progress(s, done, total, what):
    seen.append(s)
    if s == stage and seen.count(s) == int(number):
        os.kill(os.getpid(), 9)
how = Calibration(effort=effort) if effort else Calibration(tokens=1024, window=64)
convert(Path(source), Path(out), Options(calibration=how, device="cpu", threads=1), progress)
"""


def killed(source: Path, out: Path, stage: str, number: int, effort: str = "") -> None:
    args = [sys.executable, "-c", KILLED, str(source), str(out), stage, str(number), effort]
    # not in the repository, whose package may lack its library
    assert subprocess.run(args, timeout=300, check=False, cwd=out.parent).returncode == -signal.SIGKILL
    for _ in range(100):  # the process that runs the model ends by itself, when nobody listens any more
        if not any(str(out).encode() in line for line in processes()):
            return
        time.sleep(0.1)
    pytest.fail("a process is left")


def processes() -> list[bytes]:
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes())
        except OSError:  # it has ended
            continue
    return lines


@pytest.mark.parametrize(
    ("stage", "number"),
    [("calibrating", 4), ("calibrating", 13), ("quantizing by moments", 4), ("quantizing", 8), ("verifying", 3)],
)
def test_killed_and_taken_up_again(
    tiny: Path, one_go: tuple[Path, Path], tmp_path: Path, stage: str, number: int
) -> None:
    """By SIGKILL; the plain call makes the same bytes as in one go, and what was there is not made again."""
    out = tmp_path / "out.gguf"
    killed(tiny, out, stage, number)
    assert not out.exists() and moments_folder(out).exists()
    index = read_index(moments_folder(out) / "moments")  # the model's process may have been ahead of what was told
    gathered = index is not None and index.complete
    assert gathered or stage == "calibrating"
    told: list[tuple[str, str]] = []
    summary = convert(tiny, out, QUICK, lambda stage, done, total, what: told.append((stage, what)))
    assert out.read_bytes() == one_go[0].read_bytes()
    assert not leftovers(tmp_path) and not any("not calibrated" in n for n in summary.notes)
    assert (("calibrating", "windows of text") in told) == (not gathered)
    assert any(s == "quantizing by moments" for s, _ in told) == (stage in ("calibrating", "quantizing by moments"))


def test_begun_without_text_and_finished_by_the_plain_call(tiny: Path, tmp_path: Path) -> None:
    """And the other way it is refused: what calibration has made is not thrown away."""
    out, plain = tmp_path / "out.gguf", tmp_path / "plain.gguf"
    convert(tiny, plain, Options(calibration=Calibration(effort="none")))
    killed(tiny, out, "quantizing", 12, effort="none")
    summary = convert(tiny, out, QUICK)
    assert summary.resumed > 0 and out.read_bytes() == plain.read_bytes()
    assert summary.notes == ["not calibrated: an earlier run began without text"]
    assert not leftovers(tmp_path)
    out.unlink()
    killed(tiny, out, "quantizing", 12)
    with pytest.raises(ResumeError, match=r"begun with --calib \['builtin'\] \(now none\)"):
        convert(tiny, out, Options(calibration=Calibration(effort="none")))
    convert(tiny, out, QUICK)
    assert method_of(out) == "calibrated"


def test_interrupted(tiny: Path, one_go: tuple[Path, Path], tmp_path: Path) -> None:
    """Ctrl-C is no reason to go on without."""
    out = tmp_path / "out.gguf"

    def progress(stage: str, done: int, total: int, what: str) -> None:
        if stage == "calibrating" and what == "windows of text" and done == 10:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="what calibration has finished is kept; run the same command again"):
        convert(tiny, out, QUICK, progress)
    assert not any(str(tmp_path).encode() in line for line in processes())
    convert(tiny, out, QUICK)
    assert out.read_bytes() == one_go[0].read_bytes() and not leftovers(tmp_path)


def test_a_full_disk_is_no_reason_to_go_without(
    tiny: Path, one_go: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was gathered stays, and the same call goes on: another file than that of yesterday would be a surprise."""
    out = tmp_path / "out.gguf"
    names: list[str] = []
    real = by_moments._Planes._put

    def full(self: Any, tensors: list[str], found: Any) -> None:
        names.extend(tensors)
        if len(names) > 4:
            raise OutputError("no room")
        real(self, tensors, found)

    with monkeypatch.context() as m:
        m.setattr(by_moments._Planes, "_put", full)
        with pytest.raises(OutputError, match="no room"):
            convert(tiny, out, QUICK)
    convert(tiny, out, QUICK)
    assert out.read_bytes() == one_go[0].read_bytes()


# ---- without torch ----


def test_no_package_of_the_current_folder_is_run(
    tiny: Path, one_go: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ptqtp_gguf").mkdir()
    (tmp_path / "ptqtp_gguf" / "__init__.py").write_text("raise SystemExit('run')")
    monkeypatch.chdir(tmp_path)
    convert(tiny, tmp_path / "out.gguf", QUICK)
    assert (tmp_path / "out.gguf").read_bytes() == one_go[0].read_bytes()


def needed(name: str, extras: tuple[str, ...] = ()) -> set[str]:
    """The distributions that one asks for, and those that they ask for."""
    found = {str(canonicalize_name(name))}
    for text in metadata.requires(name) or ():
        asked = Requirement(text)
        if asked.marker is None or any(asked.marker.evaluate({"extra": extra}) for extra in extras or ("",)):
            found |= needed(asked.name) if asked.name not in found else set()
    return found


BARE = """
import importlib.util, sys
from pathlib import Path
assert not any(importlib.util.find_spec(n) for n in ("torch", "transformers", "pytest", "safetensors"))
from ptqtp_gguf.conversion import convert
from ptqtp_gguf.plan import Calibration, Options
source, out = map(Path, sys.argv[1:])
convert(source, out, Options(calibration=Calibration(tokens=1024, window=64), threads=1, device="cpu"))
"""


def test_an_environment_with_what_is_asked_for_alone(tiny: Path, one_go: tuple[Path, Path], tmp_path: Path) -> None:
    """Another one, of links to the packages that pyproject.toml names for a plain conversion: torch is none of them."""
    bare, out = tmp_path / "bare", tmp_path / "out.gguf"
    venv.create(bare, symlinks=True)
    site = next(bare.glob("lib/python*/site-packages"))
    for name in needed("ptqtp-gguf", ("run",)):
        of = metadata.distribution(name)
        for top in {f.parts[0] for f in of.files or ()} - {"..", "__pycache__"}:
            if not top.startswith("_editable") and not (site / top).exists():
                (site / top).symlink_to(str(of.locate_file(top)))
    if not (site / "ptqtp_gguf").exists():
        (site / "ptqtp_gguf").symlink_to(Path(ptqtp_gguf.__file__).parent)
    args = [str(bare / "bin" / "python"), "-c", BARE, str(tiny), str(out)]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(args, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == one_go[0].read_bytes()


def test_weights_that_are_no_model(tmp_path: Path, rng: np.random.Generator) -> None:
    """An architecture that llama.cpp does not know is converted as before."""
    source = write_gguf(tmp_path / "a.gguf", {"blk.0.a.weight": rng.normal(size=(8, 64)).astype(np.float32)}, arch="x")
    fallen_back(source, tmp_path / "out.gguf")
