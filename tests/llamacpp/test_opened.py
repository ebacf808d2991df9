"""Files that are loaded leave the process as it was, say their own errors, take adapters, and follow a grammar."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from talking_model import LAYERS, write_adapter, write_talking_model

from ptqtp_gguf.conversion import pipeline as conversion
from ptqtp_gguf.errors import InputError
from ptqtp_gguf.llamacpp import adapter, check_grammar, generate, load, read_grammar

pytestmark = pytest.mark.runtime
HELLO: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "seed": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("opened")
    conversion.convert(write_talking_model(folder / "f32.gguf"), folder / "ours.gguf")
    write_adapter(folder / "lora.gguf")
    write_adapter(folder / "narrow.gguf", width=32)
    return folder


# ---- threads ----


LOADS = """
import os, sys, threading
from pathlib import Path
from ptqtp_gguf import generate, load, PtqtpError
files = [Path(name) for name in sys.argv[1:]]
def descriptors():
    return [(os.fstat(fd).st_dev, os.fstat(fd).st_ino) for fd in (1, 2)]
before, said = descriptors(), {}
ready = threading.Barrier(len(files))
def go(i):
    ready.wait()
    try:
        model = load(files[i], n_ctx=64, threads=1)
        said[i] = "".join(generate(model, "hello", max_tokens=3, temperature=0, seed=1))
        model.close()
    except PtqtpError as e:
        said[i] = str(e)
for _ in range(3):
    threads = [threading.Thread(target=go, args=(i,)) for i in range(len(files))]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert descriptors() == before
print(*(said[i] for i in range(len(files))), sep="\\n")
"""


def test_threads_load_at_once(folder: Path) -> None:
    """Descriptors 1 and 2 stay, nothing is printed, each has its own reason."""
    missing = [f"blk.{i % LAYERS}.{part}.weight" for i, part in enumerate(("attn_q", "ffn_up", "attn_v", "ffn_down"))]
    bad = [write_talking_model(folder / f"bad{i}.gguf", without=name) for i, name in enumerate(missing)]
    files = [folder / "ours.gguf", *bad, folder / "f32.gguf"]
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOADS, *map(str, files)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    first, *reasons, last = done.stdout.splitlines()
    assert len(first) == len(last) == 3
    for reason, path, name in zip(reasons, bad, missing, strict=True):
        assert reason == f"{path}: the runtime cannot load this file: tensor '{name}' not found"


def test_no_descriptor_is_moved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a descriptor of the process is moved")

    with monkeypatch.context() as m:
        m.setattr(os, "dup2", refuse)
        load(folder / "ours.gguf", n_ctx=64).close()


def test_what_is_printed(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing, unless it is asked for; nor by what is done with it later, also after another one that prints."""
    quiet = load(folder / "ours.gguf", n_ctx=64)
    assert "".join(generate(quiet, "hello", **HELLO))
    assert capfd.readouterr() == ("", "")
    loud = load(folder / "ours.gguf", n_ctx=64, verbose=True)
    assert "llama_model_loader" in capfd.readouterr().err
    loud.close()
    assert "llama_context" in capfd.readouterr().err
    quiet.load_state(quiet.save_state())
    assert "".join(generate(quiet, "hello there", **HELLO))
    quiet.close()
    assert capfd.readouterr() == ("", "")


def test_hushed_is_of_a_thread_and_nests(folder: Path) -> None:
    """Others hear what they heard before; who has set a function of his own keeps it."""
    import llama_cpp

    from ptqtp_gguf.llamacpp import log

    heard: list[str] = []

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def listen(level: int, text: bytes, data: object) -> None:
        heard.append(text.decode())

    load(folder / "ours.gguf", n_ctx=64).close()
    kept, data = llama_cpp.llama_log_callback(), llama_cpp.ctypes.c_void_p()
    llama_cpp.llama_log_get(llama_cpp.ctypes.byref(kept), llama_cpp.ctypes.byref(data))
    llama_cpp.llama_log_set(listen, None)

    def fail() -> None:
        assert not llama_cpp.llama_model_load_from_file(b"absent.gguf", llama_cpp.llama_model_default_params())

    try:
        with log.hushed() as outer:
            with log.hushed() as inner:
                fail()
            assert inner and inner == outer and not heard
            other = threading.Thread(target=fail)
            other.start()
            other.join()
            assert heard and outer == inner
            heard.clear()
            fail()
            assert len(outer) == 2 * len(inner) and not heard
        fail()
        assert heard
    finally:
        llama_cpp.llama_log_set(kept, data)


def test_hushed_where_the_garbage_collector_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may close a model, which hushes, in the middle of another one's hushing: no lock may be held there."""
    import llama_cpp

    from ptqtp_gguf.llamacpp import log

    get, depth = llama_cpp.llama_log_get, [0]

    def collect(*args: Any) -> None:
        depth[0] += 1
        if depth[0] == 1:
            with log.hushed():
                pass
        get(*args)

    def hush() -> None:
        with log.hushed():
            depth.append(depth[0])

    monkeypatch.setattr(llama_cpp, "llama_log_get", collect)
    thread = threading.Thread(target=hush, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive() and depth == [2, 2]


def test_it_is_a_llama_still(folder: Path) -> None:
    with closing(load(folder / "ours.gguf", n_ctx=64, lora=[(folder / "lora.gguf", 0.5)])) as model:
        text = "".join(generate(model, "hello", **HELLO))
        with closing(pickle.loads(pickle.dumps(model))) as other:
            assert other.metadata == model.metadata and other.chat_format == "chat_template.default"
            assert "".join(generate(other, "hello", **HELLO)) == text


# ---- adapters ----


def logits(path: Path, lora: list[tuple[Path, float]]) -> np.ndarray:
    with closing(load(path, n_ctx=64, threads=1, lora=lora)) as model:
        model.eval(model.tokenize(b"hello there"))
        return np.array(model._ctx.get_logits_ith(-1)[: model.n_vocab()], np.float64)


def test_adapters_have_the_effect_that_they_have_on_the_original(folder: Path, tmp_path: Path) -> None:
    lora = folder / "lora.gguf"
    merged = write_talking_model(tmp_path / "merged.gguf")
    parts = {t.name: t.data for t in gguf.GGUFReader(lora).tensors}
    for t in gguf.GGUFReader(merged, "r+").tensors:
        if f"{t.name}.lora_a" in parts:
            t.data[:] += parts[f"{t.name}.lora_b"] @ parts[f"{t.name}.lora_a"]
            t.data.flush()
    plain, want = logits(folder / "f32.gguf", []), logits(merged, [])
    effect = want - plain
    assert np.abs(effect).max() > 1
    assert np.abs(logits(folder / "f32.gguf", [(lora, 1.0)]) - want).max() < 1e-3 * np.abs(effect).max()
    halves = logits(folder / "f32.gguf", [(lora, 0.25), (lora, 0.75)])
    assert np.abs(halves - want).max() < 1e-3 * np.abs(effect).max()
    ours = logits(folder / "ours.gguf", [(lora, 1.0)]) - logits(folder / "ours.gguf", [])
    assert np.corrcoef(ours, effect)[0, 1] > 0.9
    assert np.array_equal(logits(folder / "ours.gguf", [(lora, 0.0)]), logits(folder / "ours.gguf", []))


def test_what_is_no_adapter(folder: Path) -> None:
    lora = folder / "lora.gguf"
    assert adapter(str(lora)) == (lora, 1.0) and adapter(f"{lora}:-0.5") == (lora, -0.5)
    for text, message in (
        (f"{folder / 'absent.gguf'}:0.5", r"absent\.gguf: No such file"),
        (f"{lora}:much", "No such file"),
        (f"{lora}:nan", "the scale nan is not finite"),
        (str(folder / "ours.gguf"), "no LoRA adapter, but of the kind 'model'; make one"),
        (str(folder), "a folder, no LoRA adapter as a GGUF file; make one"),
    ):
        with pytest.raises(InputError, match=message):
            adapter(text)
    with pytest.raises(InputError, match=r"narrow\.gguf: the runtime cannot use this .*attn_q.weight' has incorrect"):
        load(folder / "ours.gguf", n_ctx=64, lora=[adapter(str(folder / "narrow.gguf"))])


# ---- grammars ----


@pytest.fixture
def model(folder: Path) -> Iterator[Any]:
    with closing(load(folder / "ours.gguf", n_ctx=128)) as model:
        yield model


def test_a_grammar_holds(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "rules"
    path.write_text('root ::= "yes" | "no, " [a-z]{3}\n')
    said = "".join(generate(model, "hello", **HELLO, grammar=read_grammar(path)))
    assert said == "yes" or (said.startswith("no, ") and len(said) == 7)
    path.write_text('{"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}')
    said = "".join(generate(model, "hello", **{**HELLO, "max_tokens": 60}, grammar=read_grammar(path, schema=True)))
    assert json.loads(said)["a"] in ("x", "y")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("root ::= [", "unexpected end of input"),
        ('tree ::= "x"', "does not contain a 'root' symbol"),
        ("root ::= absent", "Undefined rule identifier 'absent'"),
        ('root ::= root "a"', "left recursion"),
        ("root ::= ((" * 300, r"expecting '\)' at"),
    ],
)
def test_a_grammar_that_the_runtime_does_not_take(model: Any, folder: Path, text: str, why: str) -> None:
    """llama-cpp-python would end the process."""
    with pytest.raises(InputError, match=rf"^f: the runtime does not take the grammar: .*{why}.*; see") as e:
        check_grammar(text, folder / "ours.gguf", "f: ")
    assert len(str(e.value)) < 300
    with pytest.raises(InputError, match=why):
        next(generate(model, "hello", **HELLO, grammar=text))


def test_files_that_hold_no_grammar(tmp_path: Path) -> None:
    path = tmp_path / "f"
    for raw, schema, message in (
        (b"", False, "it is empty"),
        (b"root ::= \0", False, "it holds a zero byte"),
        (b"\xff", True, "as a JSON schema: not UTF-8"),
        (b"{", True, "as a JSON schema: Expecting property name"),
        (b'{"type": "nonsense"}', True, "as a JSON schema: Unrecognized schema"),
        (b"[1]", True, "as a JSON schema: "),
    ):
        path.write_bytes(raw)
        with pytest.raises(InputError, match=message):
            read_grammar(path, schema)
    with pytest.raises(InputError, match="No such file"):
        read_grammar(tmp_path / "absent")
