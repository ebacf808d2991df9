"""What is in a GGUF file: tensors, types, sizes by role, and what was used to make it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from .gguf_io import Reader, TensorInfo
from .recipe import Role, role_of


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
class Report:
    """A file, read: sizes in bytes."""

    path: Path
    size: int
    tensors: list[TensorInfo]
    parts: list[Part]
    metadata: dict[str, object]

    @property
    def weights(self) -> int:
        return sum(t.n_weights for t in self.tensors)

    @property
    def bpw(self) -> float:
        """Bits per weight of the whole file, metadata, embedding and head counted."""
        return 8 * self.size / self.weights if self.weights else 0.0

    def as_dict(self) -> dict[str, object]:
        """For JSON: everything, long metadata arrays shortened."""
        return {
            "file": str(self.path),
            "bytes": self.size,
            "weights": self.weights,
            "bpw": round(self.bpw, 4),
            "parts": [
                {"role": p.role.value, "type": p.type, "tensors": p.tensors, "weights": p.weights, "bytes": p.nbytes,
                 "bpw": round(p.bpw, 4)}
                for p in self.parts
            ],
            "tensors": [
                {"name": t.name, "shape": list(t.shape), "type": t.type_name, "bytes": t.nbytes} for t in self.tensors
            ],
            "metadata": {k: _short(v) for k, v in self.metadata.items()},
        }  # fmt: skip


def _short(value: object) -> object:
    if isinstance(value, list) and len(value) > 8:
        return {"length": len(value), "first": value[:3]}
    return value


def inspect(path: Path) -> Report:
    """Read a GGUF file's header. Raises InputError if it is damaged."""
    with Reader(path) as reader:
        sums: dict[tuple[Role, str], list[int]] = defaultdict(lambda: [0, 0, 0])
        for t in reader.tensors:
            s = sums[role_of(t.name), t.type_name]
            s[0] += 1
            s[1] += t.n_weights
            s[2] += t.nbytes
        order = list(Role)
        parts = [Part(role, kind, *s) for (role, kind), s in sums.items()]
        parts.sort(key=lambda p: (order.index(p.role), -p.nbytes))
        metadata = {key: kv.value() for key, kv in reader.header.kvs.items()}
        return Report(path, path.stat().st_size, reader.tensors, parts, metadata)
