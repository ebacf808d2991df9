"""Two GGUF files compared: metadata, tensors, and how far the weights of one are from those of the other.

Either may be split, and of any ggml type. Weights are compared decoded, so that a file and its twin in another type
show at once how much they share. Memory does not grow with the files.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from ..files import KV, TensorInfo, type_name
from ..plan import Role, layer_of, role_of
from ..progress import Progress, no_progress
from ..source import GgufSource
from .contents import plain, short, value_of
from .tensor_error import NONE, Distance, Meter, decodable

SHOWN = 60  # characters of a metadata value
ARCHITECTURE = "general.architecture"


@dataclass(frozen=True)
class KeyDifference:
    """A metadata key with another value: each in short, and in words what differs where they are long."""

    key: str
    a: object
    b: object
    text: str


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that both files have, in the same shape. Errors are those of B against A."""

    name: str
    shape: tuple[int, ...]
    type_a: str
    type_b: str
    identical: bool  # type and bytes
    distance: Distance | None  # None where a type cannot be decoded

    @property
    def role(self) -> Role:
        return role_of(self.name)

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def rel_mse(self) -> float | None:
        """Relative squared error; None where it has no value: A all zero, or weights that are not finite."""
        return rel_mse(self.distance)

    @property
    def max_abs(self) -> float | None:
        """Largest |difference|; None where a weight is not finite, or cannot be decoded."""
        largest = math.nan if self.distance is None else self.distance.largest
        return largest if math.isfinite(largest) else None


@dataclass(frozen=True)
class RoleDifference:
    """Tensors of one role and the same two types."""

    role: Role
    type_a: str
    type_b: str
    tensors: int
    identical: int
    weights: int
    rel_mse: float | None
    max_abs: float | None


@dataclass
class Difference:
    """What `difference` found. A is the first file, B the second."""

    a: Path
    b: Path
    sizes: tuple[int, int]  # bytes, of all parts
    architectures: tuple[object, object]
    same_file: bool
    keys_equal: int = 0
    keys_only_a: dict[str, object] = field(default_factory=dict)
    keys_only_b: dict[str, object] = field(default_factory=dict)
    keys_changed: list[KeyDifference] = field(default_factory=list)
    only_a: list[TensorInfo] = field(default_factory=list)
    only_b: list[TensorInfo] = field(default_factory=list)
    shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    tensors: list[TensorDifference] = field(default_factory=list)

    @property
    def differs(self) -> bool:
        """Whether anything does: metadata, a tensor's type, shape or bytes."""
        keys = self.keys_only_a or self.keys_only_b or self.keys_changed
        return bool(keys or self.only_a or self.only_b or self.shapes) or not all(t.identical for t in self.tensors)

    @property
    def identical(self) -> int:
        """Tensors with the same type and bytes."""
        return sum(t.identical for t in self.tensors)

    @property
    def equal(self) -> int:
        """Tensors with equal weights in other bytes."""
        return sum(not t.identical and t.distance is not None and t.distance.largest == 0 for t in self.tensors)

    @property
    def roles(self) -> list[RoleDifference]:
        """The summary, roles in their order, larger groups first."""
        groups: dict[tuple[Role, str, str], list[TensorDifference]] = defaultdict(list)
        for t in self.tensors:
            groups[t.role, t.type_a, t.type_b].append(t)
        rows = []
        for (role, kind_a, kind_b), members in groups.items():
            known = [t.distance for t in members if t.distance is not None]
            total = NONE
            for found in known:
                total = total.plus(found)
            whole = TensorDifference("", (), "", "", False, total if len(known) == len(members) else None)
            n, weights = sum(t.identical for t in members), sum(t.weights for t in members)
            rows.append(RoleDifference(role, kind_a, kind_b, len(members), n, weights, whole.rel_mse, whole.max_abs))
        order = list(Role)
        return sorted(rows, key=lambda r: (order.index(r.role), -r.weights))

    def as_dict(self) -> dict[str, object]:
        """For JSON: everything; long values of the metadata cut."""
        return {
            "a": str(self.a),
            "b": str(self.b),
            "bytes": list(self.sizes),
            "architectures": [short(x) for x in self.architectures],
            "same_file": self.same_file,
            "differs": self.differs,
            "metadata": {
                "equal": self.keys_equal,
                "only_a": {k: short(v) for k, v in self.keys_only_a.items()},
                "only_b": {k: short(v) for k, v in self.keys_only_b.items()},
                "changed": [
                    {"key": k.key, "a": short(k.a), "b": short(k.b), "text": k.text} for k in self.keys_changed
                ],
            },
            "only_a": [t.name for t in self.only_a],
            "only_b": [t.name for t in self.only_b],
            "shapes": [{"name": name, "a": list(a), "b": list(b)} for name, a, b in self.shapes],
            "identical": self.identical,
            "equal": self.equal,
            "roles": [
                {
                    "role": r.role.value,
                    "type_a": r.type_a,
                    "type_b": r.type_b,
                    "tensors": r.tensors,
                    "identical": r.identical,
                    "weights": r.weights,
                    "rel_mse": r.rel_mse,
                    "max_abs": r.max_abs,
                }
                for r in self.roles
            ],
            "tensors": [
                {
                    "name": t.name,
                    "shape": list(t.shape),
                    "type_a": t.type_a,
                    "type_b": t.type_b,
                    "role": t.role.value,
                    "block": layer_of(t.name),
                    "weights": t.weights,
                    "identical": t.identical,
                    "rel_mse": t.rel_mse,
                    "max_abs": t.max_abs,
                }
                for t in self.tensors
            ],
        }


def rel_mse(found: Distance | None) -> float | None:
    """Relative squared error as a plain number, or None where it has no value."""
    if found is None or (found.error != 0 and not found.power):
        return None
    return found.rel_mse if math.isfinite(found.rel_mse) else None


def difference(a: Path, b: Path, progress: Progress = no_progress, threads: int = 0) -> Difference:
    """Compare two GGUF files; of split ones, any part names the whole. threads: 0 = all cores.

    Raises InputError where one is missing or damaged, or cannot be read.
    """
    with GgufSource(a) as first, GgufSource(b) as second, Meter(threads) as meter:
        sizes = sum(s for _, s, _ in first.stamp), sum(s for _, s, _ in second.stamp)
        names = first.kvs.get(ARCHITECTURE), second.kvs.get(ARCHITECTURE)
        architectures = tuple(value_of(kv) if kv else None for kv in names)
        found = Difference(a, b, sizes, (architectures[0], architectures[1]), a.samefile(b))
        _keys(first.kvs, second.kvs, found)
        theirs = {t.name: t for t in second.tensors}
        found.only_a = [t for t in first.tensors if t.name not in theirs]
        mine = {t.name for t in first.tensors}
        found.only_b = [t for t in second.tensors if t.name not in mine]
        pairs = [(t, theirs[t.name]) for t in first.tensors if t.name in theirs]
        found.shapes = [(t.name, t.shape, u.shape) for t, u in pairs if t.shape != u.shape]
        pairs = [(t, u) for t, u in pairs if t.shape == u.shape]
        total, done = sum(t.n_weights for t, _ in pairs), 0
        for t, u in pairs:
            progress("comparing", done, total, t.name)
            done += t.n_weights
            distance = _distance(meter, second, u, first, t)
            same = distance.identical if distance else meter.identical(first, t, second, u)
            found.tensors.append(TensorDifference(t.name, t.shape, t.type_name, u.type_name, same, distance))
        progress("comparing", total, total, "")
    return found


def _distance(meter: Meter, mine: GgufSource, t: TensorInfo, source: GgufSource, ref: TensorInfo) -> Distance | None:
    if decodable(t.type) and decodable(ref.type):
        return meter.distance(mine, t, source, ref)
    return None


@dataclass(frozen=True)
class TensorError:
    """rel_mse: squared error over the reference tensor's squares; None where there is no such tensor in the reference,
    in this shape, or the error has no value. block: None outside the layers."""

    name: str
    type: str = ""
    role: str = ""
    block: int | None = None
    weights: int = 0
    rel_mse: float | None = None


def tensor_errors(file: Path, reference: Path, progress: Progress = no_progress, threads: int = 0) -> list[TensorError]:
    """Error of each tensor of a GGUF file against the tensor of the same name in another, in the file's order.

    Raises InputError as `difference`.
    """
    rows: list[TensorError] = []
    with GgufSource(file) as mine, GgufSource(reference) as source, Meter(threads) as meter:
        theirs = {t.name: t for t in source.tensors}
        total, done = sum(t.n_weights for t in mine.tensors), 0
        for t in mine.tensors:
            progress("comparing", done, total, t.name)
            done += t.n_weights
            ref = theirs.get(t.name)
            found = _distance(meter, mine, t, source, ref) if ref and ref.shape == t.shape else None
            role, block = role_of(t.name).value, layer_of(t.name)
            rows.append(TensorError(t.name, type_name(t.type), role, block, t.n_weights, rel_mse(found)))
        progress("comparing", total, total, "")
    return rows


# ---- metadata ----


def _keys(a: dict[str, KV], b: dict[str, KV], found: Difference) -> None:
    found.keys_only_a = {key: value_of(kv) for key, kv in a.items() if key not in b}
    found.keys_only_b = {key: value_of(kv) for key, kv in b.items() if key not in a}
    both = [key for key in a if key in b]
    changed = [key for key in both if (a[key].type, a[key].raw) != (b[key].type, b[key].raw)]
    found.keys_equal = len(both) - len(changed)
    for key in changed:
        x, y = value_of(a[key]), value_of(b[key])
        found.keys_changed.append(KeyDifference(key, x, y, _words(x, y)))


def _words(x: object, y: object) -> str:
    """Where two values differ, where showing their beginnings would not tell."""
    if isinstance(x, str) and isinstance(y, str) and max(len(x), len(y)) > SHOWN:
        at = next((i for i, (c, d) in enumerate(zip(x, y, strict=False)) if c != d), min(len(x), len(y)))
        return f"{len(x)} and {len(y)} characters; from character {at} on: {x[at : at + 20]!r} and {y[at : at + 20]!r}"
    if isinstance(x, list) and isinstance(y, list):
        pairs = list(zip(x, y, strict=False))
        others = [i for i, (c, d) in enumerate(pairs) if c != d]
        first = others[0] if others else len(pairs)
        u, v = (repr(plain(z[first]))[:40] if first < len(z) else "none" for z in (x, y))
        return f"{len(x)} and {len(y)} entries, {len(others)} differ; the first, entry {first}: {u} and {v}"
    if x == y:
        return "equal values of different types"
    return ""
