"""Evaluation on real files: llama-perplexity's own figures, what is taken up again, what is refused."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Cli

from ptqtp_gguf.conversion import pipeline as conversion
from ptqtp_gguf.errors import InputError, Interrupted, RuntimeMissing
from ptqtp_gguf.llamacpp import install
from ptqtp_gguf.llamacpp import model as runtime
from ptqtp_gguf.measure import evaluate_by_tool, generation
from ptqtp_gguf.measure import quality as evaluation
from ptqtp_gguf.measure.quality import evaluate
from ptqtp_gguf.measure.text import load_text, windows_of
from ptqtp_gguf.plan.options import Options

pytestmark = pytest.mark.runtime
CTX, WINDOWS = 64, 4


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(load_text(None).text[:3000])
    return path


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    files = {name: folder / f"{name}.gguf" for name in ("bf16", "ours", "other")}
    conversion.convert(tiny_checkpoint, files["ours"], Options(keep_bf16=files["bf16"]))
    conversion.convert(files["bf16"], files["other"], Options(type="TP2_0"))
    return files


# ---- llama-perplexity ----


def test_llama_perplexity_agrees(demo_files: dict[str, Path], text: Path, tmp_path: Path) -> None:
    """The same batches give the same logits, so our figures of the file alone differ by float32 rounding.

    Those against the reference differ by how llama-perplexity stores it: logits in 65535 steps over at most 16, so ln p
    is off by h = 8 / 65535 at most (and rounding of float32), and what lies more than 16 below the top counts nothing.
    With l and c the two ln p, a token's divergence sum p (l - c) is then off by at most
    b = h (1 + h) (1 + sum p |l - c|) + sum of p |l - c| where l < -16 + h.
    Its mean is off by at most mean(b), a quantile by max(b). ln PPL(base) is off by h, the RMS of p's changes by h
    (p is at most 1), and a token's top differs only where the reference's two likeliest are within 2 h.
    """
    reference, ours = tmp_path / "q8.gguf", demo_files["ours"]
    install.run_tool("llama-quantize", str(demo_files["bf16"]), str(reference), "Q8_0", "2")
    found = evaluate(reference, [ours], text=text, ctx=CTX, windows=WINDOWS, threads=2)
    how: dict[str, Any] = {"text": text, "ctx": CTX, "windows": WINDOWS, "threads": 2}
    told = evaluate_by_tool(reference, [ours], **how, state=tmp_path / "logits")
    assert told.text == found.text and told.sha256 == found.sha256
    assert [p.suffix for p in (tmp_path / "logits").iterdir()] == [".logits"]
    theirs: dict[str, Any] = told.quality[0].as_dict()
    q: dict[str, Any] = found.quality[0].as_dict()
    assert told.reference and told.reference.ppl == theirs["ppl_reference"]
    h = 8 / 65535 + 4e-6
    b, close = bounds(reference, ours, text, h)
    n = len(b)
    assert q["tokens"] == n == WINDOWS * (CTX // 2 - 1)
    tolerance = {
        "ppl": 6e-6 * q["ppl"],
        "ppl_se": 6e-6 * q["ppl"],
        "ppl_reference": h * q["ppl_reference"] * 1.01,
        "ppl_ratio": h * q["ppl_ratio"] * 1.01,
        "ppl_ratio_se": 2 * h * q["ppl_ratio"] / (n - 1) ** 0.5,
        "kld": b.mean(),
        "kld_se": b.max() / (n - 1) ** 0.5,
        "kld_median": b.max(),
        "kld_99": b.max(),
        "kld_max": b.max(),
        "kld_999": b.max(),
        "rms_dp": 100 * h,
        "rms_dp_se": 4 * 100 * h / (n - 1) ** 0.5 / (q["rms_dp"] / 100),
        "same_top": 100 * close / n,
        "same_top_se": 100 * close / n,
        "windows": 0,
        "tokens": 0,
    }
    assert set(tolerance) == set(theirs)
    for key, value in theirs.items():
        printed_to = 5.1e-4 if key.startswith(("rms", "same")) else 5.1e-7
        assert abs(q[key] - value) <= tolerance[key] + printed_to, (key, q[key], value, tolerance[key])
    assert tolerance["kld"] < 0.01 * q["kld"] and close <= 2  # the bounds bind
    assert found.reference is not None and found.reference.ppl == q["ppl_reference"]


def bounds(reference: Path, ours: Path, text: Path, h: float) -> tuple[np.ndarray, int]:
    """b of each token, and how many tokens' two likeliest are within 2 h."""
    logp = []
    for path in (reference, ours):
        with runtime.Model(path) as model:
            tokens = windows_of(model, load_text(text), CTX, WINDOWS)
            rows = []
            for window in tokens:
                with model.context(CTX, threads=2) as context:
                    rows += [part.astype(np.float64) for part in evaluation.scored(context, window)]
        x = np.concatenate(rows)
        x -= x.max(1, keepdims=True)
        logp.append(x - np.log(np.exp(x).sum(1, keepdims=True)))
    p = np.exp(logp[0])
    apart = p * np.abs(logp[0] - logp[1])
    b = h * (1 + h) * (1 + apart.sum(1)) + np.where(logp[0] < -16 + h, apart, 0).sum(1) + 4e-6
    two = np.sort(logp[0], axis=1)[:, -2:]
    return b, int(np.count_nonzero(two[:, 1] - two[:, 0] <= 2 * h))


# ---- what is kept ----


def test_a_stopped_evaluation_goes_on(tiny: dict[str, Path], text: Path, tmp_path: Path) -> None:
    files = [tiny["ours"], tiny["other"]]
    whole = evaluate(tiny["bf16"], files, text=text, ctx=CTX, windows=3, threads=2)
    assert whole.measured == 6 and whole.text.windows == 3 and not whole.warnings

    def stop(stage: str, done: int, total: int, detail: str) -> None:
        if done == 5:
            raise KeyboardInterrupt

    state = tmp_path / "state"
    with pytest.raises(Interrupted, match=r"3 windows are kept; run the same command again"):
        evaluate(tiny["bf16"], files, text=text, ctx=CTX, windows=3, threads=2, state=state, progress=stop)
    again = evaluate(tiny["bf16"], files, text=text, ctx=CTX, windows=3, threads=2, state=state)
    assert again.measured == 3 and again.quality == whole.quality and again.reference == whole.reference
    third = evaluate(tiny["bf16"], files[:1], text=text, ctx=CTX, windows=3, threads=2, state=state)
    assert third.measured == 0 and third.quality == whole.quality[:1]
    alone = evaluate(None, files[:1], text=text, ctx=CTX, windows=3, threads=2, state=state)
    assert alone.measured == 3 and alone.quality[0].ppl == whole.quality[0].ppl and alone.quality[0].kld is None


# ---- what is refused ----


def test_refusals_before_anything_is_loaded(
    tiny: dict[str, Path], tiny_gguf: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=rf"{tiny_gguf.name}: its vocabulary is not that of .*ours.gguf"):
        evaluate(tiny["ours"], [tiny_gguf], text=text)
    old = tmp_path / "old.gguf"
    raw = bytearray(tiny["ours"].read_bytes())
    at = raw.index(b"ptqtp.format_version") + len(b"ptqtp.format_version") + 4
    raw[at] = 9
    old.write_bytes(raw)
    with pytest.raises(InputError, match=r"old.gguf: ptqtp.format_version is 9"):
        evaluate(tiny["bf16"], [old], text=text)
    with pytest.raises(InputError, match=r"text text.txt: \d+ tokens, a window needs 4096; give more .*--ctx"):
        evaluate(None, [tiny["ours"]], text=text, ctx=4096)
    with pytest.raises(InputError, match=r"missing\.txt"):
        evaluate(None, [tiny["ours"]], text=tmp_path / "missing.txt")
    with pytest.raises(InputError, match="not UTF-8"):
        evaluate(None, [tiny["ours"]], text=tiny["ours"])
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.3.36")
    with pytest.raises(RuntimeMissing, match="is a stock build that does not know TP2_0"):
        evaluate(None, [tmp_path / "is-not-even-looked-at.gguf"])

    def nothing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", nothing)
    with pytest.raises(RuntimeMissing, match="is not installed; build it"):
        generation.generate(None, [tmp_path / "is-not-even-looked-at.gguf"])


# ---- command, text, cache ----


def test_command(cli: Cli, tiny: dict[str, Path], text: Path, tmp_path: Path) -> None:
    args = ["eval", tiny["ours"], "--reference", tiny["bf16"], "--text", text, "--ctx", 32, "--windows", 2, "-j", 2]
    args += ["--state", tmp_path]
    done = cli(*args, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    (row,) = result["rows"]
    assert row["quality"]["windows"] == 2 and row["quality"]["tokens"] == 30 and row["quality"]["kld"] > 0
    cloze, agreement = row["generation"]["cloze"], row["generation"]["agreement"]
    assert cloze["of"] == 60 and 0 <= cloze["same_answer"] <= 60 and agreement["prompts"] == 24
    again = cli(*args)
    assert again.returncode == 0 and "ours.gguf" in again.stdout and "+/-" in again.stdout and not again.stderr
    missing = cli("eval", tmp_path / "none.gguf")
    assert missing.returncode == 1 and len(missing.stderr.splitlines()) == 1 and "none.gguf" in missing.stderr
