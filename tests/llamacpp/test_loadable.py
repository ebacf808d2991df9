"""Whether the runtime loads a file is asked of the runtime itself, and its reason comes back in one line."""

from __future__ import annotations

import importlib.metadata
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from bench_models import write_llama
from helpers import Cli, rewritten
from talking_model import write_talking_model

from ptqtp_gguf.errors import InputError, RuntimeMissing
from ptqtp_gguf.files.gguf import OutTensor, Reader, kv_u32
from ptqtp_gguf.llamacpp import install, loadable, model

pytestmark = pytest.mark.runtime

REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "shape": (
        lambda p: write_llama(p, None, **{"attention.head_count_kv": 1}),
        "tensor 'blk.0.attn_k.weight' has wrong shape; expected 64, 32, got 64, 64",
    ),
    "missing": (lambda p: write_llama(p, block_count=2), "tensor 'blk.1.attn_norm.weight' not found"),
    "too many": (
        lambda p: write_llama(p, {"odd": (8, 64)}),
        "done_getting_tensors: wrong number of tensors; expected 12, got 11",
    ),
    "metadata": (
        lambda p: write_llama(p, None, **{"attention.key_length": 8}),
        "error loading model hyperparameters: invalid n_rot: 32, expected 8",
    ),
    "abort": (lambda p: write_llama(p, expert_count=4), "it dies of SIGABRT: llama-model.cpp:"),
    "architecture": (
        lambda p: changed(write_llama(p), b"\5\0\0\0\0\0\0\0llama", b"\5\0\0\0\0\0\0\0lxama"),
        "unknown model architecture: 'lxama'",
    ),
    "no GGUF": (
        lambda p: changed(write_llama(p), b"GGUF", b"GGXF"),
        "invalid magic characters: 'GGXF', expected 'GGUF'",
    ),
}


def changed(path: Path, old: bytes, new: bytes) -> Path:
    """The file with other bytes where `old` stands first."""
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    return path


@pytest.mark.parametrize("case", REFUSED)
def test_the_reason_is_the_runtimes(case: str, tmp_path: Path) -> None:
    make, why = REFUSED[case]
    path = make(tmp_path / "m.gguf")
    said = loadable.why_not_loadable(path)
    assert said is not None and said.startswith(why) and "\n" not in said
    if case not in ("abort", "no GGUF"):  # of the first, the process would be this one
        with pytest.raises(InputError, match="the runtime cannot load this file") as e:
            model.Model(path)
        assert str(e.value).endswith(f": {said}")
        with pytest.raises(InputError, match="the runtime cannot load this file") as e:
            model.load(path)
        assert str(e.value).endswith(f": {said}")


def test_a_header_by_itself(tmp_path: Path) -> None:
    """As of the file, though there are no weights, and 2 TB of them would have no room."""

    def header(path: Path) -> str | None:
        with Reader(path) as r:
            tensors = [OutTensor(t.name, t.shape, t.type) for t in r.tensors]
            return loadable.why_header_not_loadable(r.header.kvs.values(), tensors, r.header.alignment)

    good = write_llama(tmp_path / "good.gguf")
    assert loadable.why_not_loadable(good) is None and header(good) is None
    bad = write_llama(tmp_path / "bad.gguf", block_count=2)
    assert header(bad) == "tensor 'blk.1.attn_norm.weight' not found"
    with Reader(good) as r:
        huge = [
            OutTensor(t.name, (1 << 26, 1 << 13) if t.name == "blk.0.ffn_up.weight" else t.shape, 0) for t in r.tensors
        ]
        why = loadable.why_header_not_loadable(r.header.kvs.values(), huge, r.header.alignment)
    assert why == "tensor 'blk.0.ffn_up.weight' has wrong shape; expected 64, 96, got 67108864, 8192"


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ([], "no reason given"),
        (["llama_model_load: error loading model: it is so", "llama_model_load_from_file_impl: failed"], "it is so"),
        (["gguf_init_from_reader: key 'x' is empty", "llama_model_load: error loading model: y"], "key 'x' is empty"),
        (["llama_init_from_model: failed to initialize the context: no"], "no"),
        (
            ["f: tensor 'a' has wrong shape; expected   1,   1, got   1,   2,   1,   1"],
            "tensor 'a' has wrong shape; expected 1, 1, got 1, 2",
        ),
    ],
)
def test_reasons(said: list[str], why: str) -> None:
    assert loadable.reason(said) == why


@pytest.mark.parametrize("why", ["unordered_map::at", "_Map_base::at", "vector::_M_range_check: __n", "stoi"])
def test_an_exception_without_a_cause_is_explained(why: str) -> None:
    text = loadable.reason([f"llama_model_load: error loading model: error loading model vocabulary: {why}"])
    assert text.startswith(f"error loading model vocabulary: {why} (an exception without a cause: ")


def test_a_process_that_does_not_end_or_cannot_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = write_llama(tmp_path / "good.gguf")
    with monkeypatch.context() as m:
        m.setattr(loadable, "SECONDS", 0.001)
        assert loadable.why_not_loadable(good) == "it was not through with the header after 0 s"
    with monkeypatch.context() as m:
        m.setattr(install, "package_dir", lambda: tmp_path)
        with pytest.raises(RuntimeMissing, match=r"its bindings cannot be loaded: .*llama_cpp"):
            loadable.why_not_loadable(good)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.3.36")
    with pytest.raises(RuntimeMissing, match="is a stock build"):
        loadable.why_not_loadable(good)


@pytest.mark.slow
def test_the_commands_tell_it(tmp_path: Path, cli: Cli) -> None:
    """Each in one line, also where the runtime aborts in the command's own process."""
    good = write_talking_model(tmp_path / "good.gguf")
    bad = rewritten(good, tmp_path / "bad.gguf", [kv_u32("llama.block_count", 3)])
    aborts = rewritten(good, tmp_path / "aborts.gguf", [kv_u32("llama.expert_count", 4)])

    def error(done: subprocess.CompletedProcess[str]) -> str:
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        return done.stderr.strip()

    missing, asserts = "tensor 'blk.2.attn_norm.weight' not found", "GGML_ASSERT(n_expert_used_max > 0) failed"
    assert error(cli("run", bad, "-p", "x")).endswith(missing)
    assert error(cli("chat", bad, stdin=subprocess.DEVNULL)).endswith(missing)
    assert error(cli("eval", bad, "--windows", "1", "--no-generation")).endswith(missing)
    assert asserts in error(cli("run", aborts, "-p", "x"))
