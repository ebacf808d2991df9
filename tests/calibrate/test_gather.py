"""Second moments by the runtime, against a whole model run by transformers with hooks; kept, and taken up again."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gathered_models import Seen, as_gguf, by_tensor, gather, in_f32, matrices, squares
from helpers import REPO, rewritten
from tiny_models import DENSE, EXPERTS, FAMILIES, Family, build
from walked_models import WINDOW, N, distance, some_tokens

from ptqtp_gguf.calibrate import _gather_child as child
from ptqtp_gguf.calibrate import gather as gathering
from ptqtp_gguf.calibrate import moments as kept_moments
from ptqtp_gguf.calibrate.moments import Gathering, Moments
from ptqtp_gguf.errors import CalibrationError, InputError, OutputError
from ptqtp_gguf.files.gguf import KV, Reader

pytestmark = [pytest.mark.hf, pytest.mark.runtime]

MODELS = {
    **{name: FAMILIES[name] for name in ("llama", "llama-tied", "phi3", "falcon", "gemma3", "qwen3moe")},
    "gemma2": Family(
        "Gemma2",
        "gemma2",
        config=dict(tie_word_embeddings=True, head_dim=64, sliding_window=8, query_pre_attn_scalar=64),
        table=True,
    ),
    "mixtral": Family("Mixtral", "llama", (EXPERTS,), config=dict(num_local_experts=4, num_experts_per_tok=2)),
}
MAMBA = "ssm_in ssm_out"
CALLED = {  # what transformers computes in a form of its own
    **{name: FAMILIES[name] for name in ("deepseek3", "gpt-oss")},
    "mamba": Family(
        "Mamba",
        "mamba",
        (f"{MAMBA} ssm_x ssm_dt",),
        dict(intermediate_size=256, state_size=16, tie_word_embeddings=True),
        bpe=True,
    ),
    "falcon-h1": Family(
        "FalconH1",
        "falcon-h1",
        (f"{MAMBA} {DENSE}",),
        dict(
            mamba_d_ssm=128,
            mamba_n_heads=4,
            mamba_d_head=32,
            mamba_d_state=16,
            mamba_n_groups=1,
            mamba_chunk_size=32,
            head_dim=32,
        ),
        bpe=True,
    ),
}
SAME, BY_TABLE = 3e-6, 1e-3  # of float32; where the runtime looks GELU up in a table of fp16
EXACT = 1e-6  # before the first attention
SUMMED = N - 1  # the last of five windows is held out


def made(family: Family, folder: Path) -> Path:
    """A random model of the family in a GGUF file of float32; its checkpoint is beside it."""
    (folder / "checkpoint").mkdir(parents=True)
    build(family, folder / "checkpoint", [3, 4, 5])
    return in_f32(as_gguf(folder / "checkpoint", folder / "bf16.gguf"), folder / "model.gguf")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three blocks; inputs of 128 and 192 values."""
    return made(Family("Llama", "llama", config=dict(num_hidden_layers=3)), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(MODELS["mixtral"], tmp_path_factory.mktemp("mixtral"))


def in_this_process(job: Path, *_: object) -> None:
    """In the place of gather._run: what is patched here is patched there."""
    child.gather(json.loads(job.read_text()))


@pytest.mark.parametrize("name", MODELS)
def test_equals_a_forward_of_the_whole_model(tmp_path: Path, name: str) -> None:
    family, tokens = MODELS[name], some_tokens()
    model = made(family, tmp_path)
    told: list[tuple[object, ...]] = []
    moments = gather(model, tokens, tmp_path / "kept", progress=lambda *a: told.append(a))
    got, of = squares(moments), by_tensor(moments)
    assert [t[:2] for t in told] == [("calibrating", i) for i in range(N + 1)] and told[-1][2] == N
    assert got.keys() == matrices(model).keys() >= family.matrices()
    seen = Seen(tmp_path / "checkpoint", family, tokens[:SUMMED])
    expected, counts = seen.squares(), seen.counts()
    assert len(expected) > (8 if "attn_qkv" in family.blocks[0] else 12)
    for n, h in expected.items():
        assert distance(got[n], h) < (BY_TABLE if family.table else SAME), n
        assert of[n].counts == counts[n]
        assert sum(of[n].counts) == SUMMED * WINDOW * (2 if "_exps" in n else 1)  # two experts a token
    first = "blk.0.attn_qkv.weight" if "attn_qkv" in family.blocks[0] else "blk.0.attn_q.weight"
    assert distance(got[first], expected[first]) < EXACT
    for shared in (("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up"), ("ffn_gate_exps", "ffn_up_exps")):
        inputs = {id(of[n]) for s in shared if (n := f"blk.1.{s}.weight") in of}
        assert len(inputs) <= 1, shared
    held = Seen(tmp_path / "checkpoint", family, tokens[SUMMED:])
    for n, x in held.x.items():
        if isinstance(x, list):
            assert [len(moments.rows(of[n], e, held=True)) for e in range(len(x))] == [len(part) for part in x]
            x = np.concatenate(x)
            parts = [moments.rows(of[n], e, held=True) for e in range(len(of[n].counts))]
            # the order of tokens within an expert is the text's in both
            assert distance(np.concatenate(parts), x) < 5e-3, n
        else:
            assert distance(moments.rows(of[n], held=True), x.reshape(-1, x.shape[-1])) < 5e-3, n  # bf16


def test_experts_are_seen_one_by_one(mixtral: Path, tmp_path: Path) -> None:
    moments = gather(mixtral, some_tokens(), tmp_path / "kept")
    up = by_tensor(moments)["blk.0.ffn_up_exps.weight"]
    assert up.tensors == ["blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"] and up.used == 2
    assert len(set(up.counts)) > 1
    down = by_tensor(moments)["blk.0.ffn_down_exps.weight"]
    assert down.counts == up.counts and down.used == 1 and down.cols == 192
    assert np.linalg.norm(moments.second(up, 0) - moments.second(up, 1)) > 0.1 * np.linalg.norm(moments.second(up, 0))


@pytest.mark.parametrize("name", CALLED)
def test_every_matrix_is_called_for_every_token(tmp_path: Path, name: str) -> None:
    """Also of models with states instead of attention, or beside it, and of matrices for each head."""
    family = CALLED[name]
    model = made(family, tmp_path)
    moments = gather(model, some_tokens(), tmp_path / "kept")
    of = by_tensor(moments)
    assert of.keys() == matrices(model).keys() >= family.matrices()
    for n, found in of.items():
        assert found.cols == matrices(model)[n].shape[0]
        if found.used:
            assert sum(found.counts) == 2 * SUMMED * WINDOW and len(found.counts) == 4
        else:
            assert set(found.counts) == {SUMMED * WINDOW}
            assert len(found.counts) == (4 if found.heads else 1) and found.heads == (n.split(".")[-2] in HEADS)
        for e in range(len(found.counts)):
            h = moments.second(found, e).astype(np.float64)
            assert np.isfinite(h).all() and np.trace(h) > 0
            assert np.linalg.eigvalsh((h + h.T) / 2)[0] > -1e-4 * np.trace(h)


HEADS = ("attn_k_b", "attn_v_b")  # of multi-head latent attention


# ---- rows instead of sums ----


def test_wide_inputs_are_kept_as_rows(mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them as long as there are few; of more, so many that are spread over the text."""
    tokens = some_tokens()
    sums = gather(mixtral, tokens, tmp_path / "sums")
    monkeypatch.setattr(gathering, "_run", in_this_process)
    monkeypatch.setattr(kept_moments, "SUM_COLS", 100)
    rows = gather(mixtral, tokens, tmp_path / "rows")
    want, of = by_tensor(sums), by_tensor(rows)
    assert want.keys() == of.keys() and all(want[n].summed and not of[n].summed for n in of)
    for n in of:
        assert of[n].tensors == want[n].tensors and of[n].counts == want[n].counts
        for e in range(len(of[n].counts)):
            assert rows.tokens(of[n], e) == sums.tokens(want[n], e) == of[n].counts[e]
            assert distance(rows.second(of[n], e), sums.second(want[n], e)) < 4e-3
            assert np.array_equal(rows.rows(of[n], e, held=True), sums.rows(want[n], e, held=True))
    monkeypatch.setattr(kept_moments, "ROWS", 50)
    monkeypatch.setattr(kept_moments, "EXPERT_ROWS", 100)
    some = gather(mixtral, tokens, tmp_path / "some")
    for n, found in by_tensor(some).items():
        every = 2 if "ffn_" in n and "_exps" in n else 4  # of 200 tokens, in whole steps
        assert found.counts == of[n].counts
        if found.used == 1:  # rows of a token's experts one by one
            continue
        assert found.rows == SUMMED * WINDOW // every, n
        assert np.array_equal(some.rows(found, 0), rows.rows(of[n], 0)[::every]) or found.used


def test_sums_take_no_more_than_they_may(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "_run", in_this_process)
    monkeypatch.setattr(kept_moments, "SUM_BYTES", 3 * 4 * 128 * 128 + 5)
    moments = gather(llama, some_tokens(), tmp_path / "kept")
    assert sum(of.sum_bytes for of in moments) == 3 * 4 * 128 * 128
    assert [of.summed for of in moments] == [True] * 3 + [False] * (len(list(moments)) - 3)
    assert all(moments.tokens(of) == SUMMED * WINDOW for of in moments)


# ---- kept, and taken up again ----

KILLED = """
import os, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_gather import killed_in_the_middle
killed_in_the_middle(Path(sys.argv[1]))
"""


def killed_in_the_middle(folder: Path) -> None:
    """By SIGKILL within the fourth window, some of whose rows are written."""
    patch_for_both(pytest.MonkeyPatch())
    child.SAVE_SECONDS = 0.0
    real, windows = Gathering.add, [0]

    def add(self: Gathering, name: str, *args: Any) -> None:
        windows[0] += name == "blk.0.attn_q.weight"
        real(self, name, *args)
        if windows[0] == 4 and name == "blk.1.ffn_down.weight":
            for file in self._files.values():
                file.flush()
            os.kill(os.getpid(), 9)

    pytest.MonkeyPatch().setattr(Gathering, "add", add)
    gather(folder / "model.gguf", some_tokens(), folder / "kept")


def patch_for_both(m: pytest.MonkeyPatch) -> None:
    """In this process, and inputs of ffn_down kept as rows."""
    m.setattr(gathering, "_run", in_this_process)
    m.setattr(kept_moments, "SUM_COLS", 150)


def same(a: Moments, b: Moments) -> bool:
    """Bit by bit."""
    one, other = list(a), list(b)
    return [vars(i) for i in one] == [vars(i) for i in other] and all(
        np.array_equal(a.second(x, e), b.second(y, e)) and np.array_equal(a.rows(x, e, True), b.rows(y, e, True))
        for x, y in zip(one, other, strict=True)
        for e in range(len(x.counts))
    )


def test_killed_and_taken_up_again(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is gathered afterwards is what one go gathers, bit by bit."""
    (tmp_path / "model.gguf").symlink_to(llama)
    kept = tmp_path / "kept"
    folders = [str(Path(__file__).parent), str(REPO / "tests" / "support")]
    command = [sys.executable, "-c", KILLED, str(tmp_path), *folders]
    killed = subprocess.run(
        command,
        timeout=300,
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=tmp_path,  # not in the repository, whose package may lack its library
    )
    assert killed.returncode == -9, killed.stderr
    assert json.loads((kept / "index.json").read_text())["done"] == 3
    with pytest.raises(CalibrationError, match=r"was not finished; give --calib TEXT as before"):
        Moments(kept)
    seen: list[int] = []
    got = gather(llama, some_tokens(), kept, progress=lambda stage, done, *_: seen.append(done))
    assert seen == [0, 4, 5]
    patch_for_both(monkeypatch)
    assert same(got, gather(llama, some_tokens(), tmp_path / "one go"))
    names = sorted(p.name for p in kept.iterdir())
    assert [n for n in names if not re.fullmatch(r"\d+\.(rows|held)", n)] == ["index.json", names[-1]]
    assert re.fullmatch(r"sums\.\d", names[-1]) and any(n.endswith(".rows") for n in names)

    # and what is complete runs no model
    monkeypatch.setattr(gathering, "_run", lambda *_: pytest.fail("run again"))
    assert same(gather(llama, some_tokens(), kept), got)
    elsewhere = tmp_path / "elsewhere.gguf"
    elsewhere.write_bytes(llama.read_bytes())
    assert same(gather(elsewhere, some_tokens(), kept), got)
    for how, message in (
        (dict(tokens=some_tokens() + 1), "gathered from another text"),
        (dict(tokens=some_tokens()[:, :20]), "gathered from (another text|other windows)"),
        (dict(wanted=["blk.0.attn_q.weight"]), "gathered from other tensors"),
        (dict(model=other_weights(llama, tmp_path / "other.gguf")), "gathered from another model"),
    ):
        args: dict[str, Any] = dict(model=llama, tokens=some_tokens(), folder=kept)
        with pytest.raises(CalibrationError, match=message) as e:
            gather(**{**args, **how})
        assert "name a new folder" in str(e.value) and "\n" not in str(e.value)


def other_weights(model: Path, out: Path) -> Path:
    raw = bytearray(model.read_bytes())
    with Reader(model) as r:
        at = r.by_name["blk.1.ffn_up.weight"].offset
    raw[at : at + 4] = np.float32(0.5).tobytes()
    out.write_bytes(raw)
    return out


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda k: sums_of(k).write_bytes(sums_of(k).read_bytes()[:-9]), r"sums\.\d: damaged; remove the folder"),
        (lambda k: (k / "0.held").write_bytes(b"xyz"), r"0\.held: damaged; remove the folder"),
        (lambda k: changed(k, done=-1), r"index\.json: damaged"),
        (lambda k: (k / "index.json").unlink(), "holds no second moments; give --calib TEXT"),
    ],
)
def test_damage_is_told_in_one_line(
    llama_kept: Path, tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    for p in llama_kept.iterdir():
        (kept / p.name).write_bytes(p.read_bytes())
    damage(kept)
    with pytest.raises(CalibrationError, match=message) as e:
        moments = Moments(kept)
        for of in moments:
            moments.second(of)
            moments.rows(of, held=True)
    assert "\n" not in str(e.value) and str(kept) in str(e.value)


@pytest.fixture(scope="module")
def llama_kept(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kept = tmp_path_factory.mktemp("kept") / "moments"
    gather(llama, some_tokens(), kept)
    return kept


def sums_of(kept: Path) -> Path:
    return next(kept.glob("sums.*"))


def changed(kept: Path, **values: object) -> None:
    found = json.loads((kept / "index.json").read_text())
    (kept / "index.json").write_text(json.dumps({**found, **values}))


# ---- what cannot be gathered ----


def text_kv(key: str, value: str) -> KV:
    raw = value.encode()
    return KV(key, 8, struct.pack("<Q", len(raw)) + raw)


def test_what_cannot_be_gathered(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line each; and the process that the runtime ends is not ours."""
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious.txt").write_text("mine")
    unknown = rewritten(llama, tmp_path / "unknown.gguf", [text_kv("general.architecture", "no-such")])
    for model, tokens, folder, message in (
        (llama, np.full((2, 8), 400), tmp_path / "a", "the runtime cannot run 8 tokens"),
        (llama, some_tokens(), full, "full: holds other files and no index.json; name a new folder"),
        (unknown, some_tokens(), tmp_path / "b", "the runtime cannot load this file: .*no-such"),
    ):
        with pytest.raises((CalibrationError, InputError), match=message) as e:
            gather(model, tokens, folder)
        assert "\n" not in str(e.value)
    assert [p.name for p in full.iterdir()] == ["precious.txt"]
    with pytest.raises(OutputError, match=r"nowhere.kept: No such file"):
        gather(llama, some_tokens(), tmp_path / "nowhere" / "kept")
    crash = tmp_path / "crash"
    crash.write_text("#!/bin/sh\necho 'GGML_ASSERT(things) failed' >&2\nkill -ABRT $$\n")
    crash.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(crash))
    with pytest.raises(CalibrationError, match=r"the runtime died while text ran .*: GGML_ASSERT\(things\) failed"):
        gather(llama, some_tokens(), tmp_path / "c")


def test_interrupted_the_process_ends(llama: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle: no process stays behind, and the same call goes on."""

    def progress(stage: str, done: int, total: int, what: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gather(llama, some_tokens(), tmp_path / "kept", progress=progress)
    lines = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()]
    assert not any(str(tmp_path).encode() in line for line in lines)
    assert same(gather(llama, some_tokens(), tmp_path / "kept"), gather(llama, some_tokens(), tmp_path / "b"))
