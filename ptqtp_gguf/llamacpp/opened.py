"""llama-cpp-python's Llama, more patient with a file and with less effect on the process. Imported where it is needed:
with it come llama_cpp and the native libraries."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import InputError
from . import bindings
from .loadable import reason
from .log import hushed, is_hushed
from .templates import TEMPLATE, begin, render_template, token_text

llama_cpp, llama_chat_format = bindings.load(), bindings.load("llama_chat_format")
UpstreamLlama: Any = llama_cpp.Llama
UpstreamSuppressing: Any = llama_cpp._utils.suppress_stdout_stderr
QUIET = ("eval", "embed", "sample", "save_state", "load_state", "close")  # methods that may log


class _Descriptors(UpstreamSuppressing):  # type: ignore[misc]
    """Upstream points file descriptors 1 and 2, which all threads share, elsewhere while it loads a model without
    verbose. Not so where a thread's log is hushed: it prints nothing."""

    def __init__(self, disable: bool = True) -> None:
        super().__init__(disable or is_hushed())


llama_cpp.llama.suppress_stdout_stderr = llama_cpp._internals.suppress_stdout_stderr = _Descriptors


class Opened(UpstreamLlama):  # type: ignore[misc]
    """A Llama that without verbose prints nothing, reads a chat template when one is used, fills it in as llama-server
    does, and takes any number of LoRA adapters.

    adapters: (path, scale) of each
    Raises what Llama raises, and InputError for an adapter.
    """

    verbose = False  # until upstream's constructor sets it

    def __init__(self, *args: Any, adapters: Sequence[tuple[str, float]] = (), **more: Any) -> None:
        self._metadata: dict[str, str] = {}
        self._adapters = list(adapters)
        with contextlib.nullcontext() if more.get("verbose", True) else hushed():
            super().__init__(*args, **more)
            self._metadata = self._whole
            self._apply()
        for key, template in self._metadata.items():
            if key.startswith(TEMPLATE):
                form = functools.partial(self._format, template)
                handler = llama_chat_format.chat_formatter_to_chat_completion_handler(form)
                self._chat_handlers["chat_template" + (key.removeprefix(TEMPLATE) or ".default")] = handler

    @property
    def metadata(self) -> dict[str, str]:
        """What the file says of itself."""
        return self._metadata

    @metadata.setter
    def metadata(self, found: dict[str, str]) -> None:
        # upstream's constructor sets this, and compiles each template that it then sees, whether it is used or not
        self._whole = found
        self._metadata = {k: "" if k.startswith(TEMPLATE) else v for k, v in found.items()}

    def _format(self, template: str, *, messages: Any, **more: Any) -> Any:
        """create_chat_completion's prompt. Raises ChatError."""
        bos, eos = begin(self), token_text(self, self.token_eos())
        given = {k: v for k, v in more.items() if v is not None}
        prompt = render_template(template, messages, bos, eos, answer=True, **given)
        return llama_chat_format.ChatFormatterResponse(
            prompt=prompt, stop=[eos] if eos else [], added_special=bool(bos) and prompt.startswith(bos)
        )

    def _apply(self) -> None:
        """Add the adapters to the context."""
        made = []
        for path, _ in self._adapters:
            with hushed() as complaints:
                adapter = llama_cpp.llama_adapter_lora_init(self.model, os.fsencode(path))
            if not adapter:
                self.close()
                raise InputError(f"{path}: the runtime cannot use this LoRA adapter: {reason(complaints)}")
            self._stack.callback(llama_cpp.llama_adapter_lora_free, adapter)
            made.append(adapter)
        if made:
            scales = (ctypes.c_float * len(made))(*(scale for _, scale in self._adapters))
            array = (llama_cpp.llama_adapter_lora_p_ctypes * len(made))(*made)
            llama_cpp.llama_set_adapters_lora(self.ctx, array, len(made), scales)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "adapters": self._adapters}


def _quiet(name: str) -> Callable[..., Any]:
    of_llama = getattr(llama_cpp.Llama, name)

    @functools.wraps(of_llama)
    def method(self: Opened, *args: Any, **more: Any) -> Any:
        with contextlib.nullcontext() if self.verbose or sys.is_finalizing() else hushed():
            return of_llama(self, *args, **more)

    return method


for _name in QUIET:
    setattr(Opened, _name, _quiet(_name))
