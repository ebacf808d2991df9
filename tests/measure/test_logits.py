"""Logits of a file against those of transformers: the numbers, what is a fault, and what cannot be done."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ptqtp_gguf.errors import InputError
from ptqtp_gguf.measure import logits
from ptqtp_gguf.measure.logits import BOUND, against_checkpoint, likeness


def made(rng: np.random.Generator, tokens: int = 40, vocabulary: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Logits and token numbers."""
    return rng.normal(size=(tokens, vocabulary)).astype(np.float32), rng.integers(0, vocabulary, tokens, np.int32)


def test_what_softmax_does_not_see_does_not_count(rng: np.random.Generator) -> None:
    a, ids = made(rng)
    found = likeness(a + rng.normal(size=(40, 1)).astype(np.float32), a, ids)
    assert found.distance < 1e-6 and found.kld == pytest.approx(0, abs=1e-6) and found.same_top == 1
    assert found.fault is None and found.bound == BOUND and found.tokens == 40


def test_the_numbers(rng: np.random.Generator) -> None:
    a, ids = made(rng)
    b = a + 0.1 * rng.normal(size=a.shape).astype(np.float32)
    found = likeness(b, a, ids)
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (a[:-1].astype(np.float64), b[:-1].astype(np.float64)))
    assert found.kld == pytest.approx(float((p * np.log(p / q)).sum(1).mean()), rel=1e-4)
    assert found.same_top == pytest.approx(float((p.argmax(1) == q.argmax(1)).mean()))
    ca, cb = (x - x.mean(1, keepdims=True) for x in (a.astype(np.float64), b.astype(np.float64)))
    each = np.linalg.norm(ca - cb, axis=1) / np.linalg.norm(ca, axis=1)
    assert found.distance == pytest.approx(np.linalg.norm(ca - cb) / np.linalg.norm(ca), rel=1e-5)
    assert found.median == pytest.approx(np.median(each)) and found.late == pytest.approx(np.median(each[-10:]))
    assert "another function is computed" in str(found.fault)
    assert likeness(b, a, ids, ["TP2_2"]).fault is None  # nobody knows what is normal
    assert set(found.as_dict()) >= {"distance", "median", "late", "kld", "same_top", "bound"}


def test_one_token_by_a_hair_is_no_fault_and_the_last_ones_are(rng: np.random.Generator) -> None:
    a, ids = made(rng)
    b = a.copy()
    b[7] = -b[7]
    assert likeness(b, a, ids).fault is None
    b = a.copy()
    b[-9:] = -b[-9:]  # as beyond a window
    found = likeness(b, a, ids)
    assert found.median < BOUND < found.late and "another function" in str(found.fault)


def test_padded_vocabulary_and_what_is_not_finite(rng: np.random.Generator) -> None:
    a, ids = made(rng)
    padded = np.concatenate([a, np.full((40, 3), -9, np.float32)], axis=1)
    assert likeness(padded, a, ids).distance < 1e-6
    b = a.copy()
    b[3, 4] = np.nan
    assert likeness(b, a, ids, ["TP2_2"]).fault == "its logits are not finite"


# ---- for real ----


@pytest.fixture(scope="module")
def bf16(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ptqtp_gguf.source.checkpoint import check, to_bf16_gguf

    file = tmp_path_factory.mktemp("logits") / "bf16.gguf"
    for _ in to_bf16_gguf(check(tiny_checkpoint), file):
        pass
    return file


@pytest.mark.runtime
@pytest.mark.hf
def test_the_same_function_and_another(bf16: Path, tiny_checkpoint: Path, tmp_path: Path, run: Any) -> None:
    """By the command, too; more tokens than the text's are the text again."""
    import json
    import shutil

    seen: list[tuple[str, int, int, str]] = []
    found = against_checkpoint(bf16, tiny_checkpoint, threads=2, progress=lambda *args: seen.append(args))
    assert found.fault is None and found.distance < BOUND and found.quantized == () and found.same_top > 0.9
    assert [s[:3] for s in seen] == [("logits", i, 2) for i in range(3)]
    shown = run("verify", bf16, "--against", tiny_checkpoint, "--logits", "--logits-tokens", "60")
    assert "sound" in shown and "logits against transformers, 60 tokens: 0.00" in shown
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    with pytest.raises(SystemExit) as e:
        run("verify", bf16, "--against", other, "--logits", "--json")
    assert e.value.code == 1


@pytest.mark.runtime
@pytest.mark.hf
def test_what_cannot_be_done(
    bf16: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"no checkpoint folder; the logits of two GGUF files"):
        against_checkpoint(bf16, bf16)
    with monkeypatch.context() as m:
        m.setattr(logits, "free_memory", lambda: 1000)
        with pytest.raises(InputError, match=r"needs about 0\.0 GB of memory .* leave out --logits"):
            against_checkpoint(bf16, tiny_checkpoint)
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "transformers", None)
        with pytest.raises(InputError, match=r"--logits needs torch and transformers .*'ptqtp-gguf\[hf\]'"):
            against_checkpoint(bf16, tiny_checkpoint)
    import shutil

    from safetensors.torch import load_file, save_file

    lame = tmp_path / "lame"
    shutil.copytree(tiny_checkpoint, lame)
    index = lame / "model.safetensors.index.json"
    whole = {k: v for p in sorted(lame.glob("*.safetensors")) for k, v in load_file(p).items()}
    for path in [index, *lame.glob("model-*.safetensors")]:
        path.unlink()
    whole.pop("model.layers.1.mlp.up_proj.weight")
    save_file(whole, lame / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"transformers finds no model\.layers\.1\.mlp\.up_proj\.weight in it"):
        against_checkpoint(bf16, lame)
    (lame / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "no-such"}')
    with pytest.raises(InputError, match=r"lame: transformers cannot run it: .*; leave out --logits"):
        against_checkpoint(bf16, lame)


def test_logits_need_a_folder(tiny_gguf: Path, cli: Any) -> None:
    done = cli("verify", tiny_gguf, "--logits")
    assert done.returncode == 2 and "--against FOLDER" in done.stderr
