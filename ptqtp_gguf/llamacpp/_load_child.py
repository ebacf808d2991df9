"""A process of its own in which the runtime opens a GGUF file without its weights, since it may abort there.

    _load_child.py NAME FOLDER FILE      (loadable.py runs it; NAME and FOLDER are those of the bindings' package)

What the runtime logs as an error goes to standard error. Exit code 0: it loads the file and makes a context; 70: it
does not. Imports nothing of ours and of llama-cpp-python only the bindings: that is a quarter of a second less.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from typing import Any

REFUSED = 70  # not 3, with which an abort ends on Windows
ERROR = 4  # GGML_LOG_LEVEL_ERROR
CONTEXT = 64  # tokens: enough for the runtime to lay out its graphs, in which further shapes must agree
DRAFT = "requires ctx_other"  # a model that only drafts for another makes no context of its own


def bindings(name: str, folder: str) -> Any:
    """The module llama_cpp of a package, without what the package imports."""
    parts = name.split(".")
    for n in range(1, len(parts) + 1):
        package = types.ModuleType(".".join(parts[:n]))
        package.__path__ = [folder] if n == len(parts) else []
        sys.modules[package.__name__] = package
    return importlib.import_module(f"{name}.llama_cpp")


def main() -> None:
    """Open the file of the command line, and end with what became of it."""
    name, folder, path = sys.argv[1:]
    lib = bindings(name, folder)
    said: list[str] = []

    @lib.llama_log_callback  # type: ignore[untyped-decorator]
    def listen(level: int, text: bytes, _: object) -> None:
        if level == ERROR and text.strip():
            said.append(text.decode(errors="replace").strip())
            print(said[-1], file=sys.stderr, flush=True)

    lib.llama_log_set(listen, None)
    lib.llama_backend_init()
    params = lib.llama_model_default_params()
    params.no_alloc, params.load_mode, params.n_gpu_layers = True, lib.LLAMA_LOAD_MODE_NONE, 0
    model = lib.llama_model_load_from_file(os.fsencode(path), params)
    if model:
        how = lib.llama_context_default_params()
        how.n_ctx = how.n_batch = how.n_ubatch = CONTEXT
        how.n_threads = how.n_threads_batch = 1
        context = lib.llama_init_from_model(model, how)
    good = model and (context or any(DRAFT in text for text in said))
    os._exit(0 if good else REFUSED)  # freeing is of no use, and one place more to abort


if __name__ == "__main__":
    main()
