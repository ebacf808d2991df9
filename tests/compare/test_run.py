"""compare: real files, real measurements, small; what is kept when it is stopped; what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
from helpers import REPO, write_gguf

from ptqtp_gguf.compare import candidates as peers
from ptqtp_gguf.compare import run as comparison
from ptqtp_gguf.compare.document import read_document
from ptqtp_gguf.compare.run import ROUNDS_FILE, Settings, Stopped, compare
from ptqtp_gguf.conversion import pipeline as conversion
from ptqtp_gguf.errors import CalibrationError, InputError, OutputError, RecipeError
from ptqtp_gguf.inspect.contents import inspect
from ptqtp_gguf.llamacpp import install
from ptqtp_gguf.measure.quality import evaluate
from ptqtp_gguf.plan.options import Calibration, Options

pytestmark = pytest.mark.runtime


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path, cache: Path) -> Path:
    path = cache / "tiny.gguf"
    conversion.convert(tiny_checkpoint, cache / "x.gguf", Options(keep_bf16=path))
    return path


@pytest.fixture
def settings(cache: Path) -> Settings:
    return Settings(
        against=("Q4_0",),
        ours=("TP2_1", "TP2_0"),
        text=REPO / "tools" / "fixtures" / "sample.txt",
        ctx=64,
        windows=2,
        generation=False,
        prompt=(16,),
        generate=(4,),
        threads=(1,),
        rounds=1,
        cache=cache,
        command="ptqtp-gguf ...",
    )


def refuse(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        monkeypatch.setattr(comparison, name, lambda *a, name=name, **k: pytest.fail(f"{name} was called"))


def test_a_comparison(tiny_checkpoint: Path, reference: Path, settings: Settings, tmp_path: Path) -> None:
    found = compare(tiny_checkpoint, tmp_path / "report", settings)
    doc = read_document(found)
    assert doc == found and doc.finished
    assert [(r.label, r.kind) for r in doc.rows] == [
        ("reference", "reference"),
        ("TP2_1", "ours"),
        ("TP2_0", "ours"),
        ("Q4_0", "stock"),
    ]
    assert doc.model.weights == inspect(reference).weights and doc.model.vocab == 384
    rows = {r.label: r for r in doc.rows}
    files = {p.name: p for p in settings.cache.rglob("*.gguf")} if settings.cache else {}
    for row in doc.rows:
        assert row.size == files[row.file].stat().st_size
        assert row.bpw == pytest.approx(8 * row.size / doc.model.weights)
    assert rows["TP2_1"].bpw_blocks == 3.5 and rows["TP2_1"].types == {"TP2_1": 1.0}
    direct = evaluate(reference, [files[rows["Q4_0"].file]], text=settings.text, ctx=64, windows=2)
    assert found.rows[3].quality == direct.quality[0]
    assert rows["reference"].quality and rows["reference"].quality.ppl == direct.quality[0].ppl_reference
    assert doc.text and doc.text.windows == 2
    for row in doc.rows[1:]:
        assert [s.test for s in row.speed] == ["pp16", "tg4"] and all(s.median > 0 for s in row.speed)
        assert set(row.ratios) == set(rows) - {row.label, "reference"} and row.peak_memory
        assert 0 < max(t.rel_mse or 0 for t in row.tensors if t.role == "block matrix") < 0.1
    assert rows["TP2_1"].digits and sum(rows["TP2_1"].digits.counts) == sum(
        t.weights for t in rows["TP2_1"].tensors if t.type == "TP2_1"
    )
    assert rows["Q4_0"].digits is None and any("rounds" in w for w in doc.warnings)
    assert not (tmp_path / "report" / ROUNDS_FILE).exists()


def test_what_is_finished_is_kept(
    reference: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second round of the benchmark: the first stands in the document, and is not measured again."""
    settings = replace(settings, ours=("TP2_1",), rounds=2)
    rounds: list[str] = []

    def stop(stage: str, done: int, total: int, detail: str) -> None:
        if stage == "measuring" and detail.startswith("round 2"):
            raise KeyboardInterrupt

    with pytest.raises(Stopped, match="what is finished is kept; run the same command again") as e:
        compare(reference, tmp_path, settings, progress=stop)
    doc = read_document(e.value.document)
    assert not doc.finished
    assert doc.bench and doc.bench.rounds == 1 and doc.rows[1].quality and len(doc.rows[1].speed[0].samples) == 1
    first = doc.rows[1].speed[0].samples

    def watch(stage: str, done: int, total: int, detail: str) -> None:
        if stage == "measuring" and detail:
            rounds.append(detail.partition(":")[0])

    monkeypatch.setattr(conversion, "convert", lambda *a: pytest.fail("converted again"))
    monkeypatch.setattr(install, "stream_tool", lambda *a: pytest.fail("quantized again"))
    doc = read_document(compare(reference, tmp_path, settings, progress=watch))
    assert set(rounds) == {"round 2 of 2"} and doc.rows[1].speed[0].samples[:1] == first
    assert len(doc.rows[1].speed[0].samples) == 2 and not (tmp_path / ROUNDS_FILE).exists()
    (tmp_path / ROUNDS_FILE).write_text('{"key": 3, "rounds": "damaged"')
    assert read_document(compare(reference, tmp_path, replace(settings, rounds=1))).bench


def test_stopped_while_files_are_made(reference: Path, settings: Settings, tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int, detail: str) -> None:
        if stage == "evaluating":
            raise KeyboardInterrupt

    with pytest.raises(Stopped) as e:
        compare(reference, tmp_path, replace(settings, ctx=48), progress=stop)
    assert [r.quality for r in read_document(e.value.document).rows] == [None] * 4


def test_calibrated_text_is_for_all(reference: Path, settings: Settings, tmp_path: Path) -> None:
    """From a GGUF, ours is calibrated on the text, and the peers have an importance matrix of it."""
    text = tmp_path / "calib.txt"
    text.write_text(
        "\n".join(f"Line {i} tells of {i * 7 % 13} things that nobody else has counted." for i in range(900))
    )
    options = Options(calibration=Calibration(texts=(str(text),), tokens=512, window=64))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(peers, "IMATRIX_CHUNKS", 2)
        found = compare(reference, tmp_path / "a", replace(settings, ours=("TP2_1",), rounds=0), options)
        tuned = replace(options, calibration=replace(options.calibration, tune=True))
        same = compare(reference, tmp_path / "t", replace(settings, ours=("TP2_1",), rounds=0), tuned)
    plain = compare(reference, tmp_path / "b", replace(settings, ours=("TP2_1",), rounds=0))
    for with_text, without in zip(found.rows[1:], plain.rows[1:], strict=True):
        how = "--calib calib.txt" if with_text.kind == "ours" else "--imatrix imatrix.gguf"
        assert how in with_text.made and "imatrix" not in without.made and "--calib" not in without.made
        assert with_text.sha256 != without.sha256
    assert found.bench is None and found.rows[1].speed == []
    assert not any("--tune" in w for w in found.warnings) and any("--tune was left out" in w for w in same.warnings)
    assert [r.sha256 for r in same.rows] == [r.sha256 for r in found.rows]
    scored = replace(settings, text=text, ours=("TP2_1",))
    with pytest.raises(CalibrationError, match=r"is the scored text calib\.txt"):
        compare(reference, tmp_path / "c", scored, options)
    with pytest.raises(CalibrationError, match="--calib makes TP2_1, TP2_2 only"):
        compare(reference, tmp_path / "c", settings, options)
    assert not (tmp_path / "c").exists()


def split_by_gguf_py(path: Path, out: Path) -> list[Path]:
    """The same model in parts of five tensors."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, "llama", split_max_tensors=5)
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(field.name, field.contents(), field.types[0], *field.types[1:2])
    for t in reader.tensors:
        writer.add_tensor(t.name, t.data, raw_dtype=t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(out.parent.glob(f"{out.stem}-*.gguf"))


def test_split_files(reference: Path, settings: Settings, tmp_path: Path) -> None:
    """The original, ours and a peer in parts: the same figures as in one file; any part names the whole."""
    whole, parts = tmp_path / "ours.gguf", tmp_path / "split"
    parts.mkdir()
    conversion.convert(reference, whole)
    split = conversion.convert(
        whole, parts / "ours.gguf", Options(tensor_types=(".*=keep",), split_max_size=whole.stat().st_size // 3)
    ).files
    original = split_by_gguf_py(reference, parts / "tiny.gguf")
    assert min(len(split), len(original)) > 2
    settings = replace(settings, ours=(f"a={whole}", str(split[1])), against=("Q4_0", f"b={original[-1]}"), rounds=0)
    doc = compare(original[1], tmp_path / "out", settings)
    by = {r.label: r for r in doc.rows}
    assert list(by) == ["reference", "a", "ours", "Q4_0", "b"]
    assert by["ours"].size == sum(p.stat().st_size for p in split) and by["ours"].file == split[0].name
    same = by["b"].quality
    assert by["ours"].quality == by["a"].quality and same and (same.kld or 0) < 1e-9
    assert by["Q4_0"].made == f"llama-quantize {original[0].name} tiny-Q4_0.gguf Q4_0"
    alone = compare(reference, tmp_path / "alone", settings)
    assert {r.label: r.quality for r in alone.rows}["Q4_0"] == by["Q4_0"].quality


@pytest.mark.hf
def test_ours_of_a_checkpoint_is_calibrated(tiny_checkpoint: Path, settings: Settings, tmp_path: Path) -> None:
    text = tmp_path / "calib.txt"
    text.write_text("\n".join(f"Line {i} tells of {i * 7 % 11} things that nobody else has seen." for i in range(900)))
    options = Options(calibration=Calibration(texts=(str(text),), tokens=512, window=64), device="cpu")
    settings = replace(settings, ours=("TP2_2",), rounds=0)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(peers, "IMATRIX_CHUNKS", 2)
        ours, stock = compare(tiny_checkpoint, tmp_path / "out", settings, options).rows[1:]
    assert ours.made.endswith("--calib calib.txt") and "--imatrix imatrix.gguf" in stock.made
    plain = compare(tiny_checkpoint, tmp_path / "out", settings).rows[1]
    assert plain.sha256 != ours.sha256 and plain.made.endswith("TP2_2.gguf")


def test_what_is_refused(
    reference: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: dict[str, Any]
) -> None:
    refuse(monkeypatch, "evaluate", "bench")
    other = write_gguf(tmp_path / "other.gguf", weights)
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    for changed, kind, message in (
        ({"against": ("Q4_9",)}, RecipeError, "Q4_9: neither a file nor a type"),
        ({"against": (str(other),)}, InputError, r"other\.gguf: its vocabulary is not that of .*tiny\.gguf"),
        ({"against": ("IQ2_XS",)}, RecipeError, "IQ2_XS: made with an importance matrix only"),
        ({"against": (), "ours": ()}, InputError, "nothing to compare"),
        ({"text": tmp_path / "absent"}, InputError, "absent: No such file"),
    ):
        with pytest.raises(kind, match=message):
            compare(reference, tmp_path / "out", replace(settings, **changed))
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"short\.txt: \d+ tokens, a window needs 64"):
        compare(reference, tmp_path / "out", replace(settings, text=short))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file: cannot be made"):
        compare(reference, tmp_path / "file", settings)


def test_the_command(run: Callable[..., str], reference: Path, settings: Settings, cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "report"
    words = ["compare", reference, "--against", "Q4_0", "--cache", cache, "--ctx", 64, "--windows", 2, "--rounds", 0]
    words += ["--no-generation", "--text", settings.text, "--output", out]
    told = run(*words)
    assert "TP2_2" in told and "Q4_0" in told and "KL divergence" in told and "index.html" in told
    page = (out / "index.html").read_text()
    assert "<svg" in page and "TP2_2" in page and (out / "kld-over-size.png").stat().st_size > 1000
    document = (out / "report.json").read_text()
    assert json.loads(document)["finished"] is True and str(cache) not in document
    with pytest.raises(OutputError, match="holds a report already; use --force"):
        run(*words)
    assert run(*words, "--force", "--quiet") == ""
    (out / "index.html").unlink()  # the disk was full before it could be written
    assert run(*words, "--quiet") == "" and "<svg" in (out / "index.html").read_text()
