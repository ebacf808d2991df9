"""A conversion that ends with an error that is not ours leaves nothing that the next, different run is refused for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from calibrated_files import converted_before, leftovers, prose, with_
from gathered_models import as_gguf

from ptqtp_gguf.calibrate import by_moments, tokenizers
from ptqtp_gguf.calibrate.store import PlaneStore, planes_folder
from ptqtp_gguf.conversion import loop, pipeline
from ptqtp_gguf.conversion.pipeline import convert
from ptqtp_gguf.errors import CalibrationError, InputError, Interrupted, ResumeError
from ptqtp_gguf.files.gguf import TensorInfo
from ptqtp_gguf.plan.options import Calibration, Options

pytestmark = [pytest.mark.hf, pytest.mark.runtime]

ONE = Options(calibration=Calibration(effort="quick", tokens=512, window=64), device="cpu", threads=1)
OTHER = replace(ONE, calibration=Calibration(effort="quick", tokens=256, window=64))


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama in bf16, with its tokenizer."""
    return as_gguf(tiny_checkpoint, tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def wanted(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What each of two runs makes in one go."""
    folder = tmp_path_factory.mktemp("one-go")
    for name, options in (("one", ONE), ("other", OTHER)):
        convert(tiny, folder / f"{name}.gguf", options)
    found = {p.stem: p.read_bytes() for p in folder.glob("*.gguf")}
    assert found["one"] != found["other"]
    return found


def raises(e: BaseException, after: int = 0, real: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """A function that works so many times."""
    calls = [0]

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] > after:
            raise e
        assert real
        return real(*args, **kwargs)

    return call


WHERE: dict[str, tuple[Any, str, int]] = {  # what is called, and how often it works
    "text": (tokenizers.RuntimeTokenizer, "encode", 0),
    "planes": (by_moments._Planes, "_put", 3),
    "the stage's end": (PlaneStore, "end_stage", 0),
    "writing": (loop, "_tensor", 4),
    "reading back": (pipeline, "verify_written", 0),
}


@pytest.mark.parametrize("error", [TypeError("of a library"), RuntimeError("of torch"), MemoryError()], ids=repr)
@pytest.mark.parametrize("where", WHERE)
def test_another_run_begins(
    tiny: Path, wanted: dict[str, bytes], tmp_path: Path, where: str, error: BaseException
) -> None:
    out = tmp_path / "out.gguf"
    owner, name, after = WHERE[where]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(owner, name, raises(error, after, getattr(owner, name)))
        with pytest.raises(type(error)):
            convert(tiny, out, ONE)
    assert not out.exists()
    convert(tiny, out, OTHER)
    assert out.read_bytes() == wanted["other"] and not leftovers(tmp_path)


@pytest.mark.parametrize("where", ["planes", "writing"])
def test_the_same_run_goes_on(tiny: Path, wanted: dict[str, bytes], tmp_path: Path, where: str) -> None:
    """With the planes that are there."""
    out = tmp_path / "out.gguf"
    owner, name, after = WHERE[where]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(owner, name, raises(TypeError("of a library"), after, getattr(owner, name)))
        for _ in range(2):  # the second one finds what the first has left
            with pytest.raises(TypeError):
                convert(tiny, out, ONE)
    put: list[str] = []
    real = PlaneStore.put

    def counted(self: PlaneStore, t: TensorInfo, *args: Any) -> None:
        put.append(t.name)
        real(self, t, *args)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(PlaneStore, "put", counted)
        convert(tiny, out, ONE)
    assert out.read_bytes() == wanted["one"] and not leftovers(tmp_path)
    assert len(put) == (0 if where == "writing" else len(set(put))) < 14


def test_stopped_before_anything_was_finished(tiny: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    """Ctrl-C while text becomes tokens: another run begins. With finished planes it is refused."""
    out = tmp_path / "out.gguf"

    def stopped(where: str) -> None:
        owner, name, after = WHERE[where]
        with pytest.MonkeyPatch.context() as m:
            m.setattr(owner, name, raises(KeyboardInterrupt(), after, getattr(owner, name)))
            with pytest.raises(Interrupted):
                convert(tiny, out, ONE)

    stopped("text")
    convert(tiny, out, OTHER)
    assert out.read_bytes() == wanted["other"] and not leftovers(tmp_path)
    out.unlink()
    stopped("planes")
    with pytest.raises(ResumeError, match=r"begun with --calib-tokens 512 \(now 256\)"):
        convert(tiny, out, OTHER)
    convert(tiny, out, ONE)
    assert out.read_bytes() == wanted["one"] and not leftovers(tmp_path)


def test_a_failure_is_not_that_of_another_run(tiny: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    """What a stopped run has left stays guarded, moments and planes, when another call fails beside it."""
    out, bad = tmp_path / "out.gguf", tmp_path / "bad.gguf"
    owner, name, after = WHERE["planes"]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(owner, name, raises(KeyboardInterrupt(), after, getattr(owner, name)))
        with pytest.raises(Interrupted):
            convert(tiny, out, ONE)
    bad.write_bytes(tiny.read_bytes()[:1000])
    with pytest.raises(InputError):
        convert(bad, out, OTHER)
    with pytest.raises(ResumeError, match="begun with"):
        convert(tiny, out, OTHER)
    told: list[str] = []
    convert(tiny, out, ONE, lambda stage, *_: told.append(stage))
    assert out.read_bytes() == wanted["one"] and "calibrating" not in told


@pytest.mark.parametrize("error", [TypeError("of a\nlibrary"), MemoryError()], ids=repr)
def test_nobody_asked_for_it(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Then an error that is not ours ends no conversion either; it is told."""
    monkeypatch.delenv("PTQTP_EFFORT")
    options, out = Options(calibration=Calibration(tokens=512, window=64), device="cpu"), tmp_path / "out.gguf"
    owner, name, after = WHERE["planes"]
    with monkeypatch.context() as m:
        m.setattr(owner, name, raises(error, after, getattr(owner, name)))
        summary = convert(tiny, out, options)
    (note,) = (n for n in summary.notes if n.startswith("not calibrated: "))
    assert type(error).__name__ in note and "\n" not in note and not leftovers(tmp_path)
    convert(tiny, tmp_path / "none.gguf", Options(calibration=Calibration(effort="none"), device="cpu"))
    assert out.read_bytes() == (tmp_path / "none.gguf").read_bytes()


# ---- in order, by transformers ----


def test_in_order(tiny: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers raises is told in one line, and another run begins: also where a block was finished."""
    from transformers import PreTrainedTokenizerBase
    from transformers.models.llama.modeling_llama import LlamaMLP

    options = with_(prose(tmp_path), fisher=False, tokens=4 * 64)
    other, out = with_(options, tokens=2 * 64), tmp_path / "out.gguf"
    with converted_before(tiny):
        convert(tiny_checkpoint, tmp_path / "other.gguf", other)
        for owner, name, after, message in (
            (PreTrainedTokenizerBase, "__call__", 1, "tokenizer fails on a text of [0-9]+ characters: TypeError: odd"),
            (LlamaMLP, "forward", 0, "its forward cannot be followed: TypeError: odd; give an importance matrix"),
            (LlamaMLP, "forward", 8, "its forward cannot be followed: TypeError: odd; give an importance matrix"),
        ):
            with monkeypatch.context() as m:
                m.setattr(owner, name, raises(TypeError("odd"), after, getattr(owner, name)))
                with pytest.raises(CalibrationError, match=message) as e:
                    convert(tiny_checkpoint, out, options)
            assert "\n" not in str(e.value)
            assert planes_folder(out).exists() == (after == 8)
            convert(tiny_checkpoint, out, other)
            assert out.read_bytes() == (tmp_path / "other.gguf").read_bytes() and not leftovers(tmp_path)
            out.unlink()
