"""The text that files are measured on: a file of the user's, or a small one in the package; its windows of tokens.

And what has to hold before files are measured together: the same vocabulary.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..codec import I32
from ..errors import InputError
from ..files import file_sha256, read_whole
from ..llamacpp import Model
from ..progress import Progress, no_progress
from ..source import GgufSource

BUILTIN_FILE = Path(__file__).with_name("data") / "eval.txt.gz"
BUILTIN_WARNING = (
    "the built-in text is small: its figures compare these files with each other only; give --text for more"
)
MAX_BYTES = 256 << 20
SAME = ("tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens", "tokenizer.ggml.merges")


@dataclass(frozen=True)
class Text:
    """A text in UTF-8. sha256 of its bytes, in hex."""

    name: str
    sha256: str
    builtin: bool
    text: str


@dataclass(frozen=True)
class TextFacts:
    """What was measured on: windows of ctx tokens, `tokens` in all; of each window the second half is scored."""

    name: str
    sha256: str
    builtin: bool
    windows: int
    ctx: int
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def load_text(path: Path | None) -> Text:
    """A text file, or the built-in text for None. Raises InputError: missing, too large, binary, empty."""
    if path is None:
        raw = gzip.decompress(BUILTIN_FILE.read_bytes())
        return Text("built-in", hashlib.sha256(raw).hexdigest(), True, raw.decode())
    try:
        raw = read_whole(path, MAX_BYTES)
    except InputError as e:
        raise InputError(f"{e}; --text takes a text file, or a part of it") from None
    try:
        text = raw.decode()
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not UTF-8 (byte {e.start}); --text takes a text file") from None
    if "\0" in text:
        raise InputError(f"{path}: holds zero bytes; --text takes a text file")
    if not text.strip():
        raise InputError(f"{path}: holds no text")
    return Text(path.name, hashlib.sha256(raw).hexdigest(), False, text)


def windows_of(model: Model, text: Text, ctx: int, windows: int) -> I32:
    """The text in windows as llama-perplexity cuts it: int32 (N, ctx).

    One after the other, the rest is left; the first token of each becomes BOS where the model uses one, and one line
    break at the end of the text does not count.

    windows  at most so many, 0 = all
    Raises InputError for a text of less than one window.
    """
    tokens = model.tokens(text.text.removesuffix("\n"))
    n = len(tokens) // ctx
    if not n:
        raise InputError(
            f"text {text.name}: {len(tokens)} tokens, a window needs {ctx}; give more text, or a smaller --ctx"
        )
    n = min(n, windows) if windows else n
    out = tokens[: n * ctx].reshape(n, ctx).copy()
    if model.bos is not None:
        out[:, 0] = model.bos
    return np.ascontiguousarray(out)


@dataclass(frozen=True)
class File:
    """A file to measure.

    parts   of a split GGUF, in order; else itself
    sha256  in hex; of a split file, of its parts' hashes
    """

    path: Path
    parts: tuple[Path, ...]
    sha256: str


def whole(path: Path) -> File:
    """A GGUF file, or all parts of a split one, hashed; its path is then the first part's. Raises InputError."""
    with GgufSource(path) as source:
        parts = tuple(r.path for r in source.readers)
    return File(parts[0], parts, _joined(parts))


def _joined(parts: Sequence[Path]) -> str:
    digests = [file_sha256(part) for part in parts]
    return digests[0] if len(parts) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def open_files(paths: Sequence[Path], progress: Progress = no_progress) -> list[File]:
    """Check, before anything is loaded, that the files can be compared; hash them.

    Reads headers first, and only then whole files. progress: stage "hashing", files done.
    Raises InputError: a damaged file, an unknown ptqtp.format_version, no vocabulary, or another one than the first's.
    """
    first: dict[str, bytes] = {}
    parts = []
    for path in paths:
        with GgufSource(path) as source:
            parts.append(tuple(r.path for r in source.readers))
            found = {key: source.kvs[key].raw for key in SAME if key in source.kvs}
            rows = next((t.shape[1] for t in source.tensors if t.name == "token_embd.weight" and len(t.shape) == 2), 0)
            found["rows of token_embd.weight"] = str(rows).encode()
        if "tokenizer.ggml.tokens" not in found:
            raise InputError(f"{path}: holds no vocabulary (tokenizer.ggml.tokens); convert the model again")
        first = first or found
        for key in (*SAME, "rows of token_embd.weight"):
            if found.get(key) != first.get(key):
                raise InputError(
                    f"{path}: its vocabulary is not that of {paths[0]} ({key} differs); compare files of one model"
                )
    files = []
    for i, (path, of) in enumerate(zip(paths, parts, strict=True)):
        progress("hashing", i, len(paths), path.name)
        files.append(File(path, of, _joined(of)))
    progress("hashing", len(paths), len(paths), "")
    return files
