"""tools/accuracy/accuracy.py: the whole of it on a tiny model with the real tools, and what it refuses."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from helpers import REPO

from ptqtp_gguf.compare import findings
from ptqtp_gguf.compare.candidates import Item
from ptqtp_gguf.compare.document import Document
from ptqtp_gguf.conversion.pipeline import convert
from ptqtp_gguf.plan.options import Options

sys.path.insert(0, str(REPO / "tools" / "accuracy"))
accuracy, page = (importlib.import_module(name) for name in ("accuracy", "accuracy_page"))

Run = tuple[Path, list[str]]
CHUNKS, CTX = 2, 128
WIDTH, INNER, VOCABULARY = 256, 224, 259  # K types fit rows of 256, not those of 224


def tiny_model(path: Path) -> Path:
    """A random Llama of one layer whose tokens are bytes, as bf16 GGUF."""
    rng = np.random.default_rng(3)
    w = gguf.GGUFWriter(path, "llama")
    w.add_context_length(256)
    w.add_embedding_length(WIDTH)
    w.add_block_count(1)
    w.add_feed_forward_length(INNER)
    w.add_head_count(4)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_tokenizer_model("llama")
    w.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))])
    w.add_token_scores([0.0] * VOCABULARY)
    w.add_token_types([2, 3, 3, *[6] * 256])
    shapes = {"token_embd": (VOCABULARY, WIDTH), "output": (VOCABULARY, WIDTH), "blk.0.ffn_down": (WIDTH, INNER)}
    shapes |= {f"blk.0.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.ffn_{name}": (INNER, WIDTH) for name in ("gate", "up")}
    for name, shape in shapes.items():
        x = (rng.standard_t(5, shape) * (0.1 if name == "output" else 0.05)).astype(np.float32)
        bf16 = gguf.GGMLQuantizationType.BF16
        w.add_tensor(f"{name}.weight", gguf.quants.quantize(x, bf16), raw_dtype=bf16)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        w.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


@pytest.fixture(scope="module", params=["own", "llama-perplexity"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run over everything: DIR and the arguments that made it."""
    folder = tmp_path_factory.mktemp("accuracy")
    reference, ours = tiny_model(folder / "tiny-bf16.gguf"), folder / "ours.gguf"
    convert(reference, ours, Options())
    sources = "tools/fixtures/sample.txt", "tools/build/build_runtime.py", "docs/format.md"
    texts = {name: folder / name for name in ("wiki.txt", "code.txt", "calib.txt")}
    for path, source in zip(texts.values(), sources, strict=True):
        shutil.copy(REPO / source, path)
    given = {
        "--model": f"tiny={reference}",
        "--text": texts["wiki.txt"],
        "--calib": texts["calib.txt"],
        "--calib-chunks": 2,
        "--out": folder / "out",
        "--scorer": request.param,
        "--chunks": CHUNKS,
        "--ctx": CTX,
        "--types": "Q8_0,Q4_K_M",
        "--threads": 1,
        "--ours": f"search={ours}",
        "--make": "tiny/paper=-m paper -t TP2_0",
    }
    argv = [*(str(word) for pair in given.items() for word in pair), "--text", str(texts["code.txt"])]
    assert accuracy.main(argv) == 0
    return folder / "out", argv


def entries_of(out: Path) -> dict[tuple[str, str], dict]:
    return {(e["label"], e["text"]): e for e in json.loads((out / "results.json").read_text())["rows"].values()}


@pytest.mark.runtime
def test_every_file_is_measured(run: Run) -> None:
    out, _ = run
    entries = entries_of(out)
    labels = {"reference", "search", "paper", "Q8_0", "Q4_K_M", "Q4_K_M imatrix"}  # Q8_0 heeds no importance matrix
    assert set(entries) == {(label, text) for label in labels for text in ("wiki.txt", "code.txt")}
    rows = {key: e["document"]["rows"][0] for key, e in entries.items()}
    for (label, _), row in rows.items():
        q = row["quality"]
        if label != "reference":
            assert q["ppl_ratio"] == pytest.approx(q["ppl"] / q["ppl_reference"], rel=1e-4)
            assert q["kld_median"] <= q["kld_999"] and 0 < q["same_top"] <= 100
    wiki = {label: rows[label, "wiki.txt"] for label in labels}
    kld = {label: row["quality"]["kld"] for label, row in wiki.items()}
    assert 0 < kld["Q8_0"] < kld["Q4_K_M"] < kld["search"] and kld["Q4_K_M imatrix"] < kld["search"]
    document = entries["search", "wiki.txt"]["document"]
    assert document["text"]["windows"] == CHUNKS and document["text"]["ctx"] == CTX and document["machine"]["cpu"]
    # rows of 224 cannot be Q4_K, but TP2_2
    matrices = 4 * WIDTH * WIDTH + 3 * WIDTH * INNER
    for label in ("Q4_K_M", "Q4_K_M imatrix"):
        fell_back = entries[label, "wiki.txt"]["fell_back"]
        assert fell_back == pytest.approx(WIDTH * INNER / matrices)
        others = [share for kind, share in wiki[label]["types"].items() if "_K" not in kind]
        assert sum(others) == pytest.approx(fell_back)
    assert entries["search", "wiki.txt"]["fell_back"] == 0 and wiki["search"]["types"] == {"TP2_2": 1.0}
    assert entries["reference", "wiki.txt"]["head"] == entries["reference", "wiki.txt"]["embedding"] == "BF16"
    assert wiki["paper"]["types"]["TP2_0"] == pytest.approx(1 - WIDTH * INNER / matrices)
    assert wiki["paper"]["made"].endswith("convert -m paper -t TP2_0")
    size = (out.parent / "ours.gguf").stat().st_size
    assert wiki["search"]["size"] == size
    assert wiki["search"]["bpw"] == pytest.approx(8 * size / document["model"]["weights"])
    # what was made is gone, what was given is not
    assert [p.name for p in out.rglob("*.gguf")] == ["imatrix.gguf"] and not list(out.rglob("*.logits"))


@pytest.mark.runtime
def test_finished_rows_are_not_run_again(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, argv = run
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    shutil.copy(out / "results.json", copy)
    again = [*argv, "--out", str(copy)]

    def measured(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    with monkeypatch.context() as nothing:
        for scorer in accuracy.SCORERS:
            nothing.setitem(accuracy.SCORERS, scorer, measured)
        assert accuracy.main(again) == 0
        held = json.loads((copy / "results.json").read_text())
        gone = next(key for key, e in held["rows"].items() if (e["label"], e["text"]) == ("Q8_0", "code.txt"))
        lost = held["rows"].pop(gone)
        (copy / "results.json").write_text(json.dumps(held))
        for more in ([], ["--chunks", "1"]):  # other windows are other rows
            with pytest.raises(AssertionError, match="measured again"):
                accuracy.main([*again, *more])
        # the row comes back from another machine's results, or by measuring
        (copy / "results.json").write_text(json.dumps(held))
        assert accuracy.main([*again, "--merge", str(out / "results.json")]) == 0
    (copy / "results.json").write_text(json.dumps(held))

    def killed(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)  # as `timeout` does

    with monkeypatch.context() as stopping:
        for scorer in accuracy.SCORERS:
            stopping.setitem(accuracy.SCORERS, scorer, killed)
        assert accuracy.main(again) == accuracy.UNFINISHED
    assert gone not in json.loads((copy / "results.json").read_text())["rows"]
    assert accuracy.main(again) == 0
    fresh, before = (
        e["document"]["rows"][0] for e in (json.loads((copy / "results.json").read_text())["rows"][gone], lost)
    )
    assert fresh["quality"]["kld"] == pytest.approx(before["quality"]["kld"], rel=1e-3)
    assert fresh["sha256"] == before["sha256"]


@pytest.mark.runtime
def test_a_file_that_cannot_be_measured_is_a_row_that_says_why(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, argv = run
    copy, broken = tmp_path / "out", tmp_path / "broken.gguf"
    copy.mkdir()
    shutil.copy(out / "results.json", copy)
    broken.write_bytes((out.parent / "ours.gguf").read_bytes()[:5000])
    more = ["--ours", f"broken={broken}", "--make", "refused=--target-bpw 0.5"]
    assert accuracy.main([*argv, "--out", str(copy), *more]) == 1
    said = capsys.readouterr().out
    for label in ("broken", "refused"):
        for text in ("wiki.txt", "code.txt"):
            assert f"Not measured: {label} on {text}: {entries_of(copy)[label, text]['error']}" in said
    assert "0.5" in entries_of(copy)["refused", "wiki.txt"]["error"]


@pytest.mark.runtime
def test_the_page_keeps_words(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "accuracy.md"
    argv = ["--out", str(run[0]), "--render-only", "--page", str(target)]
    assert accuracy.main(argv) == 0
    text = target.read_text()
    doc = page.document_of(page.latest(list(entries_of(run[0]).values()), "tiny", "wiki.txt"))
    shown = [row.label for row in findings.ordered(doc)]
    table = text[text.index("| PPL ") :].split("\n\n")[0]
    names = [f"{x}†" if "K_M" in x else x if x[0] == "Q" else f"**{x}**" for x in shown]
    places = [table.index(f"\n| {name} |") for name in names]
    assert places == sorted(places)  # by size
    for row in doc.rows:
        if row.quality.kld is not None:
            assert " ± ".join(findings.with_error(row.quality.kld, findings.Z95 * row.quality.kld_se)) in table
    assert "| stock types reach it at |" in text and "code.txt: 2 windows of 128 tokens" in text
    assert "bpw: TP2_2 100 % |" in table and "% fell back | " in table
    assert "python tools/accuracy/accuracy.py --model tiny=tiny-bf16.gguf --text wiki.txt" in text
    assert f", commit {accuracy.commit()}, " in text and " cores of " in text
    assert str(tmp_path) not in text and str(run[0].parent) not in text
    assert "](accuracy-tiny.svg)" in text and "search" in (tmp_path / "accuracy-tiny.svg").read_text()
    target.write_text(f"Words of mine.\n\n{text}Last words.\n".replace("0.", "9."))
    assert accuracy.main(argv) == 0
    how = text.index("<!-- accuracy:how")
    before = text[:how].replace("0.", "9.")
    assert target.read_text() == f"Words of mine.\n\n{before}{text[how:]}Last words.\n"
    target.write_text("no markers")
    assert accuracy.main(argv) == 1 and target.read_text() == "no markers"


@pytest.mark.runtime
@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--calib", "text.txt"], "--calib text.txt is the scored text text.txt"),
        (["--types", "Q4_0,Q9_X"], "Q9_X: neither a file nor a type of llama-quantize's"),
        (["--types", "Q4_0,Q4_0"], "Q4_0 is named twice"),
        (["--ours", "Q4_0=tiny.gguf", "--types", "Q4_0"], "Q4_0 is named twice"),
        (["--ours", "a=missing.gguf"], "--ours a: missing.gguf: no such file"),
        (["--make=-t TP2_1"], "--make -t TP2_1: want [NAME/]LABEL=..."),
        (["--make", "a=-t TP9"], "TP9"),
        (["--make", "a=--threads many"], "--make a: Invalid value for '--threads'"),
        (["--make", "a=--out b.gguf"], "--make a: No such option: --out"),
        (["--make", "a=--calib {source}"], "unknown {source}; known are {calib}"),
        (["--make", "a=--calib builtin"], "tiny has no checkpoint"),
        (["--make", "a=--imatrix {imatrix}"], "give --calib"),
        (["--model", "other"], "want NAME=REFERENCE.gguf"),
        (["--text", "other/text.txt"], "text.txt is named twice"),
        (["--model", "tiny=tiny.gguf"], "tiny is named twice"),
        (["--render-only"], "results.json has no rows"),
        (["--merge", "old.json"], "old.json: of an older version"),
    ],
)
def test_one_line_says_what_is_wrong(
    extra: list[str], message: str, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tiny_gguf.parent)
    Path("text.txt").write_text("Some words.")
    Path("other").mkdir()
    shutil.copy("text.txt", "other")
    Path("old.json").write_text('{"runs": [], "rows": {"a": {"label": "a"}}}')
    command = ["--model", "tiny=tiny.gguf", "--text", "text.txt", "--out", "out"]
    assert accuracy.main([*command, *extra]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# ---- without a runtime ----


def test_peers_with_and_without_importance_matrix() -> None:
    items = [Item(name, "stock", name) for name in ("Q4_0", "Q8_0", "IQ3_XXS")]
    plain = [("Q4_0", False), ("Q8_0", False)]
    assert [(w.item.label, w.imatrix) for w in accuracy.peers_of(items, False)] == plain
    weighed = [*plain, ("Q4_0 imatrix", True), ("IQ3_XXS imatrix", True)]
    assert [(w.item.label, w.imatrix) for w in accuracy.peers_of(items, True)] == weighed


def test_the_last_of_a_label_counts() -> None:
    """A file made again by a later commit, after a failure, or scored on other windows."""
    about = {"model": "m", "text": "wiki", "settings": ["reference", "text", 2, 128, "own"]}
    entries = [
        about | {"label": "a", "n": 1, "settings": ["reference", "text", 1, 128, "own"]},
        about | {"label": "a", "error": "e"},
        about | {"label": "b", "n": 2},
        about | {"label": "a", "n": 3},
        about | {"label": "a", "n": 4, "text": "code"},
    ]
    assert sorted(e["n"] for e in page.latest(entries, "m", "wiki").values()) == [2, 3]
    assert [e["n"] for e in page.latest(entries, "m", "code").values()] == [4]
    assert not page.latest(entries, "other", "wiki")


def document(rows: list[tuple[str, str, float, float | None]]) -> dict:
    """kind, label, MB, KLD"""
    figures = [
        {"kind": kind, "label": label, "size": int(mb * 1e6), "bpw": mb / 10, "quality": {"kld": kld, "kld_se": 0.001}}
        for kind, label, mb, kld in rows
    ]
    return {"schema": 1, "model": {"name": "tiny"}, "machine": {"cpu": "any"}, "rows": figures}


ROWS = [
    ("reference", "reference", 160, None),
    ("stock", "Q4_0", 45, 0.2),
    ("stock", "Q4_0 imatrix", 45.1, 0.1),
    ("stock", "TQ1_0", 21, 9.0),
    ("ours", "search", 39, 0.3),
]


def test_ours_against_the_frontier() -> None:
    table = page.ours_table(findings_of(ROWS))
    need = findings.size_for(0.3, [(21e6, 9.0), (45e6, 0.2)])
    assert need
    assert (
        f"| search | 39.0 | 0.300 | {need / 1e6:.1f} MB, ours {100 * (39e6 / need - 1):+.1f} % | TQ1_0 | 0.0333x ("
        in table
    )
    assert "| none |" in page.ours_table(findings_of([*ROWS[:3], ("ours", "small", 20, 0.3)]))
    assert page.ours_table(findings_of(ROWS[:4])) == "" == page.ours_table(findings_of([ROWS[0], ROWS[4]]))


def findings_of(rows: list[tuple[str, str, float, float | None]]) -> Document:
    return page.read_document(document(rows))


def test_the_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    captions = {page.figure(findings_of(ROWS), tmp_path / name) for name in ("a.svg", "b.svg")}
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn == (tmp_path / "b.svg").read_text()  # nothing of the day or the run in it
    assert "search" in drawn and "Q4_0 imatrix" in drawn and "TQ1_0" not in drawn and "reference" not in drawn
    assert len(captions) == 1 and captions.pop().endswith("Off the figure: TQ1_0 2.10 bpw, KLD 9.00.")
    assert page.figure(findings_of(ROWS[:2]), tmp_path / "none.svg") == "" and not (tmp_path / "none.svg").exists()
