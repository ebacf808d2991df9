"""The files of a comparison: made by the real tools from a tiny checkpoint, kept by what decides their bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ptqtp_gguf.compare import candidates
from ptqtp_gguf.compare import candidates as peers
from ptqtp_gguf.compare.candidates import Item, Store, Workshop, check_apart, parse_items, reference_of
from ptqtp_gguf.conversion import pipeline as conversion
from ptqtp_gguf.errors import CalibrationError, InputError, OutputError, RecipeError, RuntimeMissing
from ptqtp_gguf.files.gguf import Reader
from ptqtp_gguf.files.reading import file_sha256
from ptqtp_gguf.llamacpp import install
from ptqtp_gguf.plan.options import Options
from ptqtp_gguf.progress import no_progress


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference")
    conversion.convert(tiny_checkpoint, out / "x.gguf", Options(keep_bf16=out / "tiny.gguf"))
    return out / "tiny.gguf"


def workshop(reference: Path, folder: Path, options: Options | None = None, **more: object) -> Workshop:
    of: dict[str, Any] = {"source": reference, "imatrix": None, "imatrix_sha": "", "progress": no_progress, **more}
    return Workshop(
        reference=reference,
        reference_sha=file_sha256(reference),
        store=Store(folder),
        options=options or Options(),
        **of,
    )


def refuse(monkeypatch: pytest.MonkeyPatch, where: object, name: str) -> Callable[[], None]:
    """From now on the function must not be called; the answer undoes that."""
    real = getattr(where, name)
    monkeypatch.setattr(where, name, lambda *a, **k: pytest.fail(f"{name} was called"))
    return lambda: monkeypatch.setattr(where, name, real)


@pytest.mark.runtime
@pytest.mark.hf
def test_what_is_named(reference: Path, tmp_path: Path) -> None:
    ours = tmp_path / "b.gguf"
    conversion.convert(reference, ours)
    found = parse_items(["q4_k_m", "TP2_1", f"mine={ours}", str(reference), "tp2_0"])
    assert found == [
        Item("Q4_K_M", "stock", "Q4_K_M"),
        Item("TP2_1", "ours", "TP2_1"),
        Item("mine", "ours", "", ours),
        Item("tiny", "stock", "", reference),
        Item("TP2_0", "ours", "TP2_0"),
    ]
    with pytest.raises(
        RecipeError, match=r"Q9_Z: neither a file nor a type of llama-quantize's; it makes .*Q4_0, .*IQ4"
    ):
        parse_items(["Q9_Z"])
    with pytest.raises(InputError, match="Q4_0 is named twice"):
        parse_items(["Q4_0", "q4_0"])
    with pytest.raises(RecipeError, match="IQ3_XXS: made with an importance matrix only; give --calib"):
        peers.require_imatrix(parse_items(["IQ3_XXS", "Q4_0"]), False)
    peers.require_imatrix(parse_items(["IQ3_XXS"]), True)


def test_blocks_of_stock_types() -> None:
    names = ("Q4_K_M", "IQ3_M", "IQ3_XXS", "TQ1_0", "Q4_0", "IQ4_NL", "Q8_0")
    assert [peers.block_of(name) for name in names] == [256, 256, 256, 256, 32, 32, 32]
    with pytest.raises(RecipeError, match="Q9_X: no type of llama-quantize's"):
        peers.block_of("Q9_X")


@pytest.mark.runtime
@pytest.mark.hf
def test_the_reference_of_a_checkpoint(
    tiny_checkpoint: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    path, sha = reference_of(tiny_checkpoint, store, no_progress)
    assert path.read_bytes() == reference.read_bytes() and sha == file_sha256(reference)
    allow = refuse(monkeypatch, candidates, "make_bf16")
    assert reference_of(tiny_checkpoint, store, no_progress) == (path, sha)
    assert reference_of(reference, store, no_progress) == (reference, sha)
    allow()
    path.write_bytes(b"cut")
    assert reference_of(tiny_checkpoint, store, no_progress) == (path, sha)
    assert path.read_bytes() == reference.read_bytes()


@pytest.mark.runtime
@pytest.mark.hf
def test_a_quantized_reference_is_refused(reference: Path, tmp_path: Path) -> None:
    conversion.convert(reference, tmp_path / "q.gguf")
    with pytest.raises(InputError, match=r"q\.gguf: is quantized \(TP2_2\); give the original"):
        reference_of(tmp_path / "q.gguf", Store(tmp_path), no_progress)
    with pytest.raises(InputError, match=r"[Nn]o such file"):
        reference_of(tmp_path / "absent", Store(tmp_path), no_progress)


@pytest.mark.runtime
@pytest.mark.hf
def test_files_are_made_once(reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[str, int, int]] = []
    shop = workshop(reference, tmp_path / "kept", progress=lambda *a: steps.append(a[:3]))
    items = parse_items(["Q4_0", "TP2_2", "TP2_0", f"same={reference}"])
    made = [shop.make(i) for i in items]
    assert [m.kind for m in made] == ["stock", "ours", "ours", "stock"] and made[3].path == reference
    with Reader(reference) as r:
        assert ("making Q4_0", len(r.tensors), len(r.tensors)) in steps
    conversion.convert(reference, tmp_path / "direct.gguf")
    assert made[1].path.read_bytes() == (tmp_path / "direct.gguf").read_bytes()
    install.run_tool("llama-quantize", str(reference), str(tmp_path / "q4.gguf"), "Q4_0")
    assert made[0].path.read_bytes() == (tmp_path / "q4.gguf").read_bytes() and made[0].sha256 == file_sha256(
        made[0].path
    )
    assert made[0].made == f"llama-quantize tiny.gguf {made[0].path.name} Q4_0"
    assert made[2].made == f"ptqtp-gguf convert tiny.gguf {made[2].path.name} --type TP2_0"
    allow = [refuse(monkeypatch, conversion, "convert"), refuse(monkeypatch, install, "stream_tool")]
    assert [shop.make(i) for i in items] == made
    keys = [json.dumps(shop.key(i), sort_keys=True) for i in items]
    assert len(set(keys)) == 4 and shop.key(items[3]) == {"file": file_sha256(reference)}
    for again in allow:
        again()
    other = workshop(reference, tmp_path / "kept", Options(tensor_types=("attn_q=Q8_0",)))
    assert other.make(items[1]).path != made[1].path  # another recipe is another file
    note = made[0].path.with_suffix(".json")
    for damaged in ("", "[]", '{"key": 1}', json.dumps({**json.loads(note.read_text()), "key": "x"})):
        note.write_text(damaged)
        made[0].path.write_bytes(b"")
        assert shop.make(items[0]) == made[0] and file_sha256(made[0].path) == made[0].sha256


@pytest.mark.runtime
@pytest.mark.hf
def test_a_tool_that_fails_leaves_nothing(reference: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeMissing, match=r"llama-quantize failed with exit code \d+: "):
        workshop(reference, tmp_path).make(Item("Q4_9", "stock", "Q4_9"))
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    lines = install.stream_tool("llama-quantize", "--help")
    assert "usage" in next(lines)
    lines.close()  # type: ignore[attr-defined]


@pytest.mark.runtime
@pytest.mark.hf
def test_importance_of_a_text(reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "calib.txt"
    text.write_text(" ".join(f"word{i} and then {i * i % 97}" for i in range(3000)))
    monkeypatch.setattr(peers, "IMATRIX_CHUNKS", 2)
    store = Store(tmp_path / "kept")
    path, sha = peers.imatrix_of([str(text)], reference, file_sha256(reference), store, 1, no_progress)
    plain = workshop(reference, tmp_path / "kept")
    weighed = workshop(reference, tmp_path / "kept", imatrix=path, imatrix_sha=sha)
    for name in ("Q4_0", "TP2_1"):
        item = parse_items([name])[0]
        a, b = plain.make(item), weighed.make(item)
        assert a.sha256 != b.sha256 and "--imatrix imatrix.gguf" in b.made and "imatrix" not in a.made
    tool = install.run_tool

    def full(name: str, *words: str) -> str:
        said = tool(name, *words)
        made = Path(words[words.index("-o") + 1])
        made.write_bytes(made.read_bytes()[:1000])
        return said

    with monkeypatch.context() as m:  # llama-imatrix does not look whether it could write
        m.setattr(install, "run_tool", full)
        with pytest.raises(OutputError, match=r"has not written all of it; is the disk full\?"):
            peers.imatrix_of([str(text)], reference, file_sha256(reference), Store(tmp_path / "b"), 1, no_progress)
    assert [p for p in (tmp_path / "b").rglob("*") if p.is_file()] == []
    refuse(monkeypatch, install, "run_tool")
    assert peers.imatrix_of([str(text)], reference, file_sha256(reference), store, 1, no_progress) == (path, sha)
    with pytest.raises(CalibrationError, match="--calib self: llama-imatrix needs text"):
        peers.imatrix_of(["self"], reference, "", store, 1, no_progress)


def test_calibration_is_not_the_scored_text() -> None:
    lines = [f"Line {i} of a text that is long enough to be told from every other line there is." for i in range(200)]
    scored = "\n".join(lines[:100])
    check_apart("\n".join(lines[100:]), "calib.txt", scored, "text.txt")
    with pytest.raises(CalibrationError, match=r"2\.0 % of its long lines stand in the scored text text\.txt"):
        check_apart("\n".join(lines[98:198]), "calib.txt", scored, "text.txt")
    with pytest.raises(CalibrationError, match=r"--calib calib\.txt is the scored text text\.txt"):
        check_apart(scored, "calib.txt", scored, "text.txt")
