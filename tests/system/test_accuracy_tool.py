"""tools/accuracy/accuracy.py: the whole of it on a tiny model with the real tools, and what it refuses."""

from __future__ import annotations

import importlib
import json
import math
import random
import re
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from helpers import REPO

from ptqtp_gguf.conversion.pipeline import convert
from ptqtp_gguf.llamacpp import install
from ptqtp_gguf.plan.options import Options

sys.path.insert(0, str(REPO / "tools" / "accuracy"))
accuracy, base, page = (importlib.import_module(name) for name in ("accuracy", "accuracy_base", "accuracy_page"))

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


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run over everything: DIR and the arguments that made it."""
    folder = tmp_path_factory.mktemp("accuracy")
    reference, ours = tiny_model(folder / "tiny-bf16.gguf"), folder / "ours.gguf"
    convert(reference, ours, Options())
    sources = "tools/fixtures/sample.txt", "tools/build/build_runtime.py", "docs/format.md"
    texts = dict(zip(("wiki.txt", "code.txt", "calib.txt"), sources, strict=True))
    for name, source in texts.items():
        shutil.copy(REPO / source, folder / name)
    argv = [
        "--model",
        f"tiny={reference}",
        "--text",
        folder / "wiki.txt",
        "--text2",
        folder / "code.txt",
        "--calib",
        folder / "calib.txt",
        "--calib-chunks",
        2,
        "--out",
        folder / "out",
        "--chunks",
        CHUNKS,
        "--ctx",
        CTX,
        "--types",
        "Q8_0,Q4_K_M",
        "--jobs",
        2,
        "--threads",
        1,
        "--ours",
        f"search={ours}",
        "--make",
        "tiny/paper=convert {reference} {out} -m paper -t TP2_0 -q -j {threads}",
    ]
    assert accuracy.main([str(a) for a in argv]) == 0
    return folder / "out", [str(a) for a in argv]


def rows_of(out: Path) -> dict[tuple[str, str], dict]:
    return {(r["label"], r["role"]): r for r in json.loads((out / "results.json").read_text())["rows"].values()}


@pytest.mark.runtime
def test_every_file_is_measured(run: Run) -> None:
    out, _ = run
    rows = rows_of(out)
    labels = {"reference", "search", "paper", "Q8_0", "Q8_0 imatrix", "Q4_K_M", "Q4_K_M imatrix"}
    assert set(rows) == {(label, role) for label in labels for role in ("text", "text2")}
    for r in rows.values():
        assert r["ppl_ratio"] == pytest.approx(r["ppl"] / r["ppl_reference"], rel=1e-4)
        assert r["kld_median"] <= r["kld_999"] and 0 < r["same_top"] <= 100
    wiki = {label: rows[label, "text"] for label in labels}
    assert wiki["reference"]["kld"] < wiki["Q8_0"]["kld"] < wiki["Q4_K_M"]["kld"] < wiki["search"]["kld"]
    assert wiki["reference"]["same_top"] > 99 and wiki["reference"]["ppl_ratio"] == pytest.approx(1, abs=1e-3)
    # an importance matrix means nothing to Q8_0: the same tensors, so not measured twice
    same = {wiki[label].get("same_as") for label in ("Q8_0", "Q8_0 imatrix")}
    assert len(same) == 2 and same < {None, "Q8_0", "Q8_0 imatrix"}
    # rows of 224 cannot be Q4_K, but TP2_1
    matrices = 4 * WIDTH * WIDTH + 3 * WIDTH * INNER
    for label in ("Q4_K_M", "Q4_K_M imatrix"):
        assert wiki[label]["fell_back"] == pytest.approx(WIDTH * INNER / matrices) and "same_as" not in wiki[label]
        shares = wiki[label]["shares"]
        assert sum(share for kind, share in shares.items() if "_K" not in kind) == pytest.approx(
            wiki[label]["fell_back"]
        )
    assert wiki["search"]["fell_back"] == 0 and wiki["search"]["shares"] == {"TP2_1": 1.0}
    assert wiki["paper"]["shares"]["TP2_0"] == pytest.approx(1 - WIDTH * INNER / matrices)
    size = (out.parent / "ours.gguf").stat().st_size
    assert wiki["search"]["size"] == size
    assert wiki["search"]["bpw"] == pytest.approx(8 * size / wiki["reference"]["weights"])
    # what was made is gone, what was given is not
    assert {p.suffix for p in out.iterdir()} == {".json", ".gguf"} and len(list(out.glob("*.gguf"))) == 1
    assert next(out.glob("*.gguf")).name.endswith(".imatrix.gguf")


@pytest.mark.runtime
def test_finished_rows_are_not_run_again(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, argv = run
    copy, empty = tmp_path / "elsewhere", tmp_path / "bin"
    shutil.copytree(out, copy)
    empty.mkdir()
    again = [*argv, "--out", str(copy), "--bin", str(empty), "--bin-ours", str(empty)]  # no tool to be found
    assert accuracy.main(again) == 0
    held = json.loads((copy / "results.json").read_text())
    gone = next(key for key, r in held["rows"].items() if (r["label"], r["role"]) == ("Q8_0", "text2"))
    lost = held["rows"].pop(gone)
    (copy / "results.json").write_text(json.dumps(held))
    capsys.readouterr()
    assert accuracy.main(again) == 1
    assert "holds no llama-perplexity" in capsys.readouterr().err
    assert accuracy.main([*argv, "--out", str(copy), "--minutes", "1e-6"]) == accuracy.UNFINISHED
    assert gone not in json.loads((copy / "results.json").read_text())["rows"]
    # the row comes back from another machine's results, or by measuring
    assert accuracy.main([*again, "--merge", str(out / "results.json")]) == 0
    (copy / "results.json").write_text(json.dumps(held))
    assert accuracy.main([*argv, "--out", str(copy)]) == 0
    fresh = json.loads((copy / "results.json").read_text())["rows"][gone]
    assert fresh["kld"] == pytest.approx(lost["kld"], rel=1e-3) and fresh["data"] == lost["data"]
    # other windows are other rows
    assert accuracy.main([*again, "--chunks", "1"]) == 1


@pytest.mark.runtime
def test_the_page_keeps_words(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(page, "figure", lambda rows, model, path: drawn.append(path.name))
    target = tmp_path / "accuracy.md"
    argv = ["--out", str(run[0]), "--render-only", "--page", str(target)]
    assert accuracy.main(argv) == 0
    text = target.read_text()
    rows = rows_of(run[0])
    for r in rows.values():
        assert page.with_error(r["kld"], r["kld_se"]) in text
    assert re.search(r"\| reference \|[^|]*\|[^|]*\|[^|]*\| 1\.000 \|", text)
    assert re.search(r"\| \*\*search\*\* \| \d+\.\d \| \d+\.\d{3} \|", text) and "| Q4_K_M imatrix\u2020 |" in text
    assert "python tools/accuracy/accuracy.py --model tiny=tiny-bf16.gguf --text wiki.txt" in text
    assert str(tmp_path) not in text
    assert str(run[0].parent) not in text and drawn == ["accuracy-tiny.svg"]
    target.write_text(text.replace("## Published", "Words of mine.\n\n## Published").replace("0.", "9."))
    assert accuracy.main(argv) == 0
    assert (
        target.read_text().replace("Words of mine.\n\n", "").split("## Published")[0]
        == (text.replace("0.", "9.").split("<!-- accuracy:how")[0] + text[text.index("<!-- accuracy:how") :]).split(
            "## Published"
        )[0]
    )
    assert "Words of mine." in target.read_text()
    target.write_text("no markers")
    assert accuracy.main(argv) == 1 and target.read_text() == "no markers"


@pytest.mark.runtime
def test_what_llama_perplexity_prints(run: Run, tmp_path: Path) -> None:
    folder = run[0].parent
    common = ["-c", str(CTX), "--chunks", str(CHUNKS), "-t", "1", "--kl-divergence-base", str(tmp_path / "base")]
    install.run_tool("llama-perplexity", "-m", str(folder / "tiny-bf16.gguf"), "-f", str(folder / "wiki.txt"), *common)
    ours = ["-m", str(folder / "ours.gguf"), *common, "--kl-divergence"]
    tools = base.Tools(None)
    out = tools.run(install.tool("llama-perplexity"), *ours, linger=True)
    tools.halt()
    found, row = base.parse(out), rows_of(run[0])["search", "text"]
    assert all(found[key] == pytest.approx(row[key], rel=0.02, abs=1e-3) for key in found)
    assert f"{found['kld']:10.6f} \u00b1 {found['kld_se']:10.6f}" in out
    broken = re.sub(r"(Mean    KLD:\s+)\S+", r"\1-nan", out)
    assert base.parse(broken)["kld"] is None
    assert not base.is_whole(out.replace("Same top p", "Another line"))
    with pytest.raises(base.Stop, match="no figure for same_top; its last line: "):
        base.parse(out.replace("Same top p", "Another line"))


# ---- without a runtime ----


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--calib", "text.txt"], "--calib text.txt is the scored text text.txt"),
        (["--types", "Q4_0,Q9_X"], "Q9_X is no type"),
        (["--ours", "a=missing.gguf"], "--ours a: missing.gguf: no such file"),
        (["--make", "a=convert {reference}"], "has no {out}"),
        (["--make", "a=convert {source} {out}"], "unknown {source}; known are calib"),
        (["--make", "a=convert {checkpoint} {out}"], "tiny has no checkpoint"),
        (["--make", "a=convert {reference} {out} --imatrix {imatrix}"], "give --calib"),
        (["--model", "other"], "want NAME=REFERENCE.gguf"),
        (["--render-only"], "results.json has no rows"),
    ],
)
def test_one_line_says_what_is_wrong(
    extra: list[str], message: str, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tiny_gguf.parent)
    Path("text.txt").write_text("Some words.")
    Path("bin").mkdir()
    command = ["--model", "tiny=tiny.gguf", "--text", "text.txt", "--out", "out", "--bin", "bin", "--bin-ours", "bin"]
    assert accuracy.main([*command, *extra]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_peers_with_and_without_importance_matrix(tiny_gguf: Path) -> None:
    kinds = {}
    for calib in (None, tiny_gguf):
        argv = ["--types", "Q4_0,IQ3_XXS", "--out", ".", *(["--calib", str(calib)] if calib else [])]
        work = accuracy.Work(accuracy.parser().parse_args(argv), base.Results(Path("none.json")), base.Tools(None))
        model = accuracy.Model("tiny", tiny_gguf, None)
        accuracy.items_of(work, [model])
        kinds[calib] = [(i.label, i.imatrix is not None) for i in model.items]
    assert kinds[None] == [("reference", False), ("Q4_0", False)]
    assert kinds[tiny_gguf] == [*kinds[None], ("Q4_0 imatrix", True), ("IQ3_XXS imatrix", True)]


def test_what_a_file_holds(tiny_gguf: Path) -> None:
    blocks = {"q": 48 * 64, "down": 64 * 96, "gate_exps": 3 * 16 * 64, "odd": 8 * 40}
    held = base.facts(tiny_gguf, 32)
    assert held["fell_back"] == pytest.approx(blocks["odd"] / sum(blocks.values()))
    assert base.facts(tiny_gguf, 256)["fell_back"] == 1
    assert held["shares"] == {"F32": 1.0} and held["bpw_blocks"] == 32 and held["head"] == "F32"
    assert base.facts(tiny_gguf, 32, weights=1000)["bpw"] == 8 * tiny_gguf.stat().st_size / 1000
    assert [base.block_of(kind) for kind in ("Q4_K_M", "IQ3_M", "IQ3_XXS", "TQ1_0", "Q4_0", "IQ4_NL", "Q8_0")] == [
        256,
        256,
        256,
        256,
        32,
        32,
        32,
    ]


def test_bits_for_the_same_divergence() -> None:
    rows = [{"kind": "stock", "bpw": b, "kld": k} for b, k in ((4.0, 0.1), (3.0, 1.0), (3.5, 2.0), (5.0, 0.1))]
    line = page.frontier([*rows, {"kind": "ours", "bpw": 2.0, "kld": 1e-9}])
    assert line == [(3.0, 1.0), (4.0, 0.1)]
    assert page.bits_for(math.sqrt(0.1), line) == pytest.approx(3.5)
    assert page.bits_for(0.01, line) is None and page.bits_for(1.1, line) is None


def test_the_last_of_a_label_counts() -> None:
    """A file made again by a later commit, after a failure, or scored on other windows."""
    about = {"model": "m", "role": "text", "reference": "r", "text": "t", "text_name": "t.txt", "chunks": 2, "ctx": 128}
    rows = [
        about | {"label": "a", "kind": "ours", "n": 1, "chunks": 1},
        about | {"label": "a", "kind": "ours", "error": "e"},
        about | {"label": "b", "kind": "stock", "n": 2},
        about | {"label": "a", "kind": "ours", "n": 3},
        about | {"label": "a", "kind": "ours", "n": 4, "role": "text2"},
    ]
    assert sorted(r["n"] for r in page.latest(rows, "m", "text")) == [2, 3]
    assert [r["n"] for r in page.latest(rows, "m", "text2")] == [4] and page.latest(rows, "other", "text") == []


def test_numbers() -> None:
    cases = {0.012345: "0.0123", 12.345: "12.3", 1234.5: "1234", 2e-6: "2.0e-06", 0.0: "0", None: "-", 3.2e7: "3.2e+07"}
    assert {x: page.number(x) for x in cases} == cases
    assert page.with_error(0.70712, 0.0123) == "0.707 \u00b1 0.012" and page.with_error(None, None) == "-"


def test_labels_do_not_overlap() -> None:
    rng = random.Random(1)
    at = [(rng.gauss(400, 90), rng.gauss(300, 90)) for _ in range(25)]
    sizes = [(rng.uniform(25, 90), 12.0) for _ in at]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in at]
    corners = page.place(sizes, at, taken, (0, 0, 800, 600))
    boxes = [(x, y, x + w, y + h) for (x, y), (w, h) in zip(corners, sizes, strict=True)]
    assert taken[25:] == boxes
    assert not [(i, j) for i, a in enumerate(taken) for j in range(max(25, i + 1), 50) if page.overlaps(a, taken[j])]
    assert all(0 <= x and 0 <= y and right <= 800 and high <= 600 for x, y, right, high in boxes)


def test_the_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        {"kind": kind, "label": label, "type": t, "imatrix": m, "bpw": b, "kld": k}
        for kind, label, t, m, b, k in (
            ("reference", "reference", "", None, 16, 1e-6),
            ("stock", "Q4_0", "Q4_0", None, 4.5, 0.2),
            ("stock", "Q4_0 imatrix", "Q4_0", "x", 4.5, 0.1),
            ("stock", "TQ1_0", "TQ1_0", None, 2.1, 9.0),
            ("ours", "search", "", None, 3.9, 0.3),
        )
    ]
    for name in ("a.svg", "b.svg"):
        page.figure(rows, "tiny", tmp_path / name)
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn == (tmp_path / "b.svg").read_text()  # nothing of the day or the run in it
    far = "Off the figure: TQ1_0 2.1 bpw, KLD 9.0"
    for label in ("search", "Q4_0", far, "ours", "stock, importance matrix"):
        assert f"<!-- {label} -->" in drawn
    assert "reference" not in drawn
