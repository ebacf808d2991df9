"""Tokenizers to calibrate with: the runtime's, out of a GGUF file, and transformers', out of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import CalibrationError, ChatError, InputError
from ..llamacpp import Model, fitted, render_template
from ..source import Checkpoint, transformers_reason

Messages = Sequence[Mapping[str, str]]


class Tokenizer(Protocol):
    """bos: the token that it puts before a text, or None; unknown: the token for what it does not know."""

    bos: int | None
    unknown: int | None

    def encode(self, parts: list[str], special: bool = False) -> list[NDArray[np.int64]]:
        """Tokens of each part, none added. special: names of special tokens in it mean these.

        Raises CalibrationError."""

    def stray(self, token: int) -> bool:
        """Whether a token is but a part of a character."""

    def render(self, messages: Messages) -> str | None:
        """A conversation by the model's chat template; None where it has none, or refuses it."""


class RuntimeTokenizer:
    """That of a GGUF file, by the runtime. model: opened, with its vocabulary at least. template: its chat template."""

    def __init__(self, model: Model, template: str | None) -> None:
        self._model, self._template = model, template
        self.bos, self.unknown = model.bos, model.unknown
        if not model.n_vocab:
            raise CalibrationError(f"{model.path}: has no tokenizer; give a file that has one")

    def encode(self, parts: list[str], special: bool = False) -> list[NDArray[np.int64]]:
        try:
            return [self._model.tokens(p, special=False, parse=special).astype(np.int64) for p in parts]
        except InputError as e:
            raise CalibrationError(str(e)) from None

    def stray(self, token: int) -> bool:
        return "\ufffd" in self._model.piece(token).decode(errors="replace")

    def render(self, messages: Messages) -> str | None:
        if not self._template:
            return None
        try:
            return render_template(self._template, messages, self._model.bos_text, self._model.eos_text, strict=False)
        except ChatError:
            return None


class TransformersTokenizer:
    """That of a checkpoint. Raises CalibrationError."""

    def __init__(self, found: Checkpoint) -> None:
        import transformers

        self._folder = found.folder
        try:
            self._it: Any = transformers.AutoTokenizer.from_pretrained(
                found.folder, local_files_only=True, trust_remote_code=found.trust_code
            )
            ids = self._it("a").input_ids
        except Exception as e:
            text = transformers_reason(e)
            raise CalibrationError(f"{found.folder}: transformers cannot load its tokenizer: {text}") from None
        self.bos = int(ids[0]) if ids and ids[0] == self._it.bos_token_id else None
        self.unknown = self._it.unk_token_id

    def encode(self, parts: list[str], special: bool = False) -> list[NDArray[np.int64]]:
        try:
            found = self._it(parts, add_special_tokens=False, verbose=False).input_ids
        except Exception as e:
            what = f"transformers' tokenizer fails on a text of {sum(map(len, parts))} characters"
            text = transformers_reason(e)
            raise CalibrationError(f"{self._folder}: {what}: {type(e).__name__}: {text}; give other text") from e
        return [np.array(ids, np.int64) for ids in found]

    def stray(self, token: int) -> bool:
        return "\ufffd" in self._it.decode([token])

    def render(self, messages: Messages) -> str | None:
        try:
            return fitted(messages, lambda form: str(self._it.apply_chat_template(form, tokenize=False)), strict=False)
        except ChatError:  # no template, or one that refuses them
            return None
