"""Grammars that bind what a model says: GBNF, llama.cpp's notation (its grammars/README.md), or a JSON schema."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import read_whole
from . import _load_child, bindings
from .install import package_dir, version

MAX_BYTES = 1 << 24  # of a file
REFUSED = 70
SHOWN = 160  # characters of a complaint, which may quote the rest of the grammar
# llama-cpp-python does not look whether the runtime took a grammar, and ends by a signal where it did not. So it is
# tried first, in a process of its own: the runtime prints its complaint past its log.
TRY = f"""
import os, runpy, sys
del sys.path[0]  # the current folder
_, bindings, name, folder, path = sys.argv
lib = runpy.run_path(bindings)["bindings"](name, folder)
params = lib.llama_model_default_params()
params.vocab_only = True
model = lib.llama_model_load_from_file(os.fsencode(path), params)
if model:
    print("grammar:", file=sys.stderr, flush=True)
    vocab, text = lib.llama_model_get_vocab(model), sys.stdin.buffer.read()
    os._exit(0 if lib.llama_sampler_init_grammar(vocab, text, b"root") else {REFUSED})
"""


def read_grammar(path: Path, schema: bool = False) -> str:
    """A grammar (GBNF) out of a file, or with `schema` that of a file that holds a JSON schema.

    Raises InputError, RuntimeMissing.
    """
    kind = "JSON schema" if schema else "grammar"
    try:
        text = read_whole(path, MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path}: cannot be read as a {kind}: not UTF-8; give a text file") from None
    if "\0" in text or not text.strip():
        what = "it is empty" if not text.strip() else "it holds a zero byte"
        raise InputError(f"{path}: cannot be read as a {kind}: {what}; give a text file")
    if not schema:
        return text
    version()
    try:
        return str(bindings.load("llama_grammar").json_schema_to_gbnf(text))
    except Exception as e:  # an assertion, a missing key: a translator, not a validator
        raise InputError(f"{path}: cannot be read as a JSON schema: {e or type(e).__name__}") from None


def check_grammar(text: str, model: Path, where: str = "") -> None:
    """Raises InputError where the runtime does not take the grammar for a model, a GGUF file; RuntimeMissing. where:
    begins the error."""
    if why := _refusal(text, model):
        raise InputError(f"{where}the runtime does not take the grammar: {why}; see llama.cpp's grammars/README.md")


@functools.lru_cache(32)
def _refusal(text: str, model: Path) -> str:
    """Why the runtime does not take the grammar; "" = it does."""
    done = subprocess.run(
        [sys.executable, "-c", TRY, _load_child.__file__, bindings.name(), str(package_dir()), str(model)],
        input=text.encode(errors="replace"),
        capture_output=True,
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        check=False,
    )
    if done.returncode in (0, 1):  # 1: Python's own failure, which says nothing of the grammar
        return ""
    said = done.stderr.decode(errors="replace").partition("grammar:")[2].split("\n\n")[0]
    why = re.sub(r"^parse: ", "", " ".join(said.split())) or f"it ends its process, exit code {done.returncode}"
    return why if len(why) <= SHOWN else f"{why[:SHOWN]} ..."


def bound(text: str, model: Any) -> Any:
    """A grammar as llama-cpp-python takes it, for a model that `load` opened. Raises InputError."""
    check_grammar(text, Path(model.model_path))
    return bindings.load().LlamaGrammar.from_string(text, verbose=False)
