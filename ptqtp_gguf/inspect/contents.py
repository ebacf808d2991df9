"""What is in a GGUF file: tensors, types, sizes by role, metadata, tokenizer, and what was used to make it.

Only headers are read; how digits and scales are distributed is in histograms.py.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from ..codec import Key
from ..errors import InputError
from ..files import KV, TensorInfo
from ..plan import Role, layer_of, role_of
from ..source import GgufSource

FEW = 8  # entries up to which an array is shown whole
LONG = 1000  # characters up to which a text is shown whole
TEMPLATE = "tokenizer.chat_template"
_SPECIAL = re.compile(r"tokenizer\.ggml\.(\w+)_token_id")


@dataclass(frozen=True)
class Part:
    """A line of the size table: tensors of one role and type."""

    role: Role
    type: str
    tensors: int
    weights: int
    nbytes: int

    @property
    def bpw(self) -> float:
        return 8 * self.nbytes / self.weights


@dataclass(frozen=True)
class Tokenizer:
    """What a file says of its tokenizer; None where it says nothing."""

    model: str | None
    pre: str | None
    tokens: int
    merges: int
    special: dict[str, tuple[int, str | None]]  # "bos" -> (id, its text, None if there is no such token)


@dataclass(frozen=True)
class Report:
    """A file, or all parts of a split one, read: sizes in bytes."""

    path: Path
    size: int  # of all parts
    tensors: list[TensorInfo]
    parts: list[Part]
    metadata: dict[str, object]
    files: dict[str, int]  # bytes of each part, by name
    gguf_version: int
    alignment: int

    @property
    def weights(self) -> int:
        return sum(t.n_weights for t in self.tensors)

    @property
    def bpw(self) -> float:
        """Bits per weight of the whole file, metadata, embedding and head counted."""
        return 8 * self.size / self.weights if self.weights else 0.0

    @property
    def bpw_blocks(self) -> float | None:
        """Bits per weight of the matrices in the blocks; None if there are none."""
        found = self._matrices
        return 8 * sum(t.nbytes for t in found) / sum(t.n_weights for t in found) if found else None

    @property
    def types(self) -> dict[str, float]:
        """Share of each type in the weights of the blocks' matrices, the largest first."""
        count: Counter[str] = Counter()
        for t in self._matrices:
            count[t.type_name] += t.n_weights
        return {kind: n / count.total() for kind, n in count.most_common()}

    def fell_back(self, block: int) -> float:
        """Share of the weights in the blocks' matrices whose rows are not a multiple of `block` weights."""
        short = sum(t.n_weights for t in self._matrices if t.shape[0] % block)
        return short / max(1, sum(t.n_weights for t in self._matrices))

    @property
    def _matrices(self) -> list[TensorInfo]:
        return [t for t in self.tensors if role_of(t.name) is Role.BLOCK and len(t.shape) > 1]

    @property
    def format_version(self) -> int | None:
        found = self.metadata.get(Key.FORMAT_VERSION)
        return found if isinstance(found, int) else None

    @property
    def tokenizer(self) -> Tokenizer:
        meta = self.metadata
        tokens, merges = meta.get("tokenizer.ggml.tokens"), meta.get("tokenizer.ggml.merges")
        tokens = tokens if isinstance(tokens, list) else []
        special: dict[str, tuple[int, str | None]] = {}
        for key, value in meta.items():
            if (match := _SPECIAL.fullmatch(key)) and isinstance(value, int):
                special[match[1]] = (value, str(tokens[value]) if 0 <= value < len(tokens) else None)
        return Tokenizer(
            _text(meta.get("tokenizer.ggml.model")),
            _text(meta.get("tokenizer.ggml.pre")),
            len(tokens),
            len(merges) if isinstance(merges, list) else 0,
            special,
        )

    @property
    def template(self) -> str | None:
        """The chat template, whole."""
        return _text(self.metadata.get(TEMPLATE))

    def as_dict(self, whole: bool = False) -> dict[str, object]:
        """For JSON: everything. whole: long arrays and texts of the metadata too, which are cut otherwise."""
        tok = self.tokenizer
        value = plain if whole else short
        return {
            "file": str(self.path),
            "files": self.files,
            "bytes": self.size,
            "weights": self.weights,
            "bpw": round(self.bpw, 4),
            "bpw_blocks": None if self.bpw_blocks is None else round(self.bpw_blocks, 4),
            "types": {kind: round(share, 6) for kind, share in self.types.items()},
            "gguf_version": self.gguf_version,
            "format_version": self.format_version,
            "alignment": self.alignment,
            "parts": [
                {
                    "role": p.role.value,
                    "type": p.type,
                    "tensors": p.tensors,
                    "weights": p.weights,
                    "bytes": p.nbytes,
                    "bpw": round(p.bpw, 4),
                }
                for p in self.parts
            ],
            "tensors": [
                {
                    "name": t.name,
                    "shape": list(t.shape),
                    "type": t.type_name,
                    "role": role_of(t.name).value,
                    "block": layer_of(t.name),
                    "weights": t.n_weights,
                    "bytes": t.nbytes,
                    "bpw": round(8 * t.nbytes / t.n_weights, 4),
                }
                for t in self.tensors
            ],
            "tokenizer": {
                "model": value(tok.model),
                "pre": value(tok.pre),
                "tokens": tok.tokens,
                "merges": tok.merges,
                "special": {k: {"id": i, "text": value(text)} for k, (i, text) in tok.special.items()},
            },
            "chat_template": value(self.template),
            "metadata": {k: value(v) for k, v in self.metadata.items()},
        }


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def plain(value: object) -> object:
    """A metadata value for JSON, which knows no NaN and no Inf: those become text."""
    if isinstance(value, list):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def short(value: object) -> object:
    """`plain`, and cut where it is long: {"length": entries or characters, "first": some of them}."""
    if isinstance(value, list):
        cut = len(value) > FEW
        first = [short(v) for v in (value[:3] if cut else value)]
        return {"length": len(value), "first": first} if cut else first
    if isinstance(value, str) and len(value) > LONG:
        return {"length": len(value), "first": value[:LONG]}
    return plain(value)


def value_of(kv: KV) -> object:
    """The value in Python; of one that is damaged, what is wrong with it, in words."""
    try:
        return kv.value()
    except InputError as e:
        return f"<{e}>"


def inspect(path: Path) -> Report:
    """Read the header of a GGUF file, or of all parts of a split one. Raises InputError if it is damaged."""
    with GgufSource(path) as source:
        sums: dict[tuple[Role, str], list[int]] = defaultdict(lambda: [0, 0, 0])
        for t in source.tensors:
            s = sums[role_of(t.name), t.type_name]
            s[0] += 1
            s[1] += t.n_weights
            s[2] += t.nbytes
        order = list(Role)
        parts = [Part(role, kind, *s) for (role, kind), s in sums.items()]
        parts.sort(key=lambda p: (order.index(p.role), -p.nbytes))
        files = {name: size for name, size, _ in source.stamp}
        metadata = {key: value_of(kv) for key, kv in source.kvs.items()}
        version = int.from_bytes(source.readers[0].read(4, 4, "version").tobytes(), "little")
        return Report(path, sum(files.values()), source.tensors, parts, metadata, files, version, source.alignment)
