"""Whether the runtime loads a file, or why that was not tried."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass

from ..errors import RuntimeMissing

TOKENIZER = "tokenizer.ggml.model"  # without it llama.cpp loads nothing


@dataclass(frozen=True)
class Loading:
    """why: the runtime does not load the file, None where it does or was not asked. note: why it was not asked."""

    why: str | None = None
    note: str = ""


def ask_runtime(keys: Container[str], ask: Callable[[], str | None]) -> Loading:
    """Ask the runtime, where it can be asked.

    keys  of the metadata. A file without a tokenizer is no whole model (weights of another program, a projector, an
          adapter), and not made for this loader
    ask   llamacpp.why_not_loadable or why_header_not_loadable
    """
    if TOKENIZER not in keys:
        return Loading(note=f"no tokenizer in it ({TOKENIZER}): no model that the runtime loads as it is; not tried")
    try:
        return Loading(ask())
    except RuntimeMissing as e:
        return Loading(note=f"not tried whether the runtime loads it: {e}")
    except OSError as e:
        return Loading(note=f"not tried whether the runtime loads it: {e.strerror or e}")
