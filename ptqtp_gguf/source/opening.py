"""From what the user names to an open source: a path, or the id of a model on the hub."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError
from ..progress import Progress, no_progress
from . import checkpoint, hub, kinds, pre_tokenizers
from .base import Source
from .converter import StreamSource
from .gguf import GgufSource


def local(source: Path, progress: Progress = no_progress, revision: str | None = None) -> Path:
    """The source on this machine: fetched, if it is the id of a model on the hub. Raises InputError."""
    if source.exists():
        if revision:
            raise InputError(f"{source}: --revision is for models on the hub, this is here already")
        return source
    if hub.looks_like_id(str(source)):
        return hub.fetch(str(source), revision, lambda text: progress("download", 0, 0, text))
    raise InputError(f"{source}: no such file or folder")


def open_source(
    source: Path,
    progress: Progress = no_progress,
    scratch: Path | None = None,
    trust_code: bool = False,
    pre_tokenizer: str = "",
) -> Source:
    """A GGUF file or a checkpoint folder, ready to be read. Raises InputError.

    scratch        where the bf16 GGUF may lie for the time being if the converter cannot be read as a stream
    trust_code     run Python code that a checkpoint brings, if the converter wants it
    pre_tokenizer  of a checkpoint with a byte-level BPE, by the runtime's name; "" = found
    """
    if pre_tokenizer:
        pre_tokenizers.check_name(pre_tokenizer)
    if checkpoint.is_gguf(source):
        if pre_tokenizer:
            raise InputError(f"{source}: {pre_tokenizers.OPTION} is for checkpoints; --override-kv changes a GGUF's")
        return GgufSource(source)
    if not source.is_dir():
        raise InputError(kinds.file_reason(source))
    found = checkpoint.check(source, trust_code, pre_tokenizer)
    progress("converter", 0, 0, found.architecture)
    return StreamSource(found, lambda line: progress("converter", 0, 0, line), scratch)
