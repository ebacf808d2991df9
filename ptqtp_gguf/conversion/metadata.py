"""The output's metadata: the source's in its order, what the user overrides, and where the file comes from."""

from __future__ import annotations

import hashlib
import json
import struct
from collections import Counter

from .. import __version__
from ..codec import FILE_TYPE, TYPES, Key, format_version
from ..errors import RecipeError
from ..files import BOOL, FLOAT32, INT64, KV, STRING, UINT32, UINT64, kv_list, kv_scalar, kv_string, kv_u32, kv_u32_list
from ..plan import PlanRow
from ..source import SPLIT_KEYS, Imatrix, Source

OURS = "ptqtp."
IMATRIX = "quantize.imatrix."  # llama-quantize's
FIXED = ("general.architecture", "general.alignment", "general.file_type", "general.quantization_version", *SPLIT_KEYS)
MAX_OVERRIDE = 1 << 20


def parse_override(text: str, old: KV | None) -> KV:
    """`KEY=TYPE:VALUE`, TYPE one of int, float, bool, str, as llama-quantize --override-kv has it.

    old: the entry that it replaces; its type is kept, so that the runtime finds what it expects. Raises RecipeError.
    """
    key, equals, rest = text.partition("=")
    kind, colon, value = rest.partition(":")
    if not (equals and colon and key and kind in ("int", "float", "bool", "str")):
        raise RecipeError(f"--override-kv {text!r}: write KEY=TYPE:VALUE with TYPE int, float, bool or str")
    if key.startswith(OURS) or key in FIXED:
        raise RecipeError(f"--override-kv {key}: this key describes the file itself and cannot be overridden")
    if len(text) > MAX_OVERRIDE:
        raise RecipeError(f"--override-kv {key}: {len(text)} characters; the limit is {MAX_OVERRIDE}")
    number: int | float | bool
    try:
        if kind == "str":
            if old and old.type != STRING:
                raise RecipeError(f"--override-kv {key}: the source holds no text there")
            return kv_string(key, value)
        if kind == "bool":
            number, default = {"true": True, "false": False}[value.lower()], BOOL
        elif kind == "int":
            number = int(value, 0)
            default = UINT32 if 0 <= number < 1 << 32 else INT64
        else:
            number, default = float(value), FLOAT32
        return kv_scalar(key, old.type if old else default, number)
    except (KeyError, ValueError, struct.error):
        raise RecipeError(f"--override-kv {key}: {value!r} is not of type {kind}, or does not fit the entry") from None


def build(
    source: Source,
    rows: list[PlanRow],
    method: str,
    type_name: str,
    recipe: str,
    overrides: tuple[str, ...],
    imatrix: Imatrix | None = None,
    calibration: str = "",
) -> list[KV]:
    """Metadata of the output before a weight is read; checksums and the source's hash are zeros until `complete`.

    Raises RecipeError for a bad override.
    """
    used = sorted({r.choice.type for r in rows if r.choice.type in TYPES})
    source_types = Counter(r.tensor.type_name for r in rows if r.choice.type in TYPES)
    learned = "; ".join(filter(None, [calibration, imatrix.text if imatrix else ""]))
    ours = [
        kv_u32("general.file_type", FILE_TYPE[type_name.upper()]),
        kv_u32("general.quantization_version", 2),
        kv_u32(Key.FORMAT_VERSION, format_version(TYPES[i] for i in used)),
        kv_u32_list(Key.TYPE_IDS, used),
        kv_u32_list(Key.GROUP_SIZE, [TYPES[i].group for i in used]),
        kv_string(Key.METHOD, method),
        kv_string(Key.VERSION, __version__),
        kv_string(Key.RECIPE, recipe),
        kv_string(Key.CALIBRATION, learned or "none"),
        kv_string(Key.SOURCE_TYPE, source_types.most_common(1)[0][0]),
        kv_string(Key.SOURCE_HASH, "0" * 64),
        kv_list(Key.TENSOR_HASHES, UINT64, [0] * len(rows)),
    ]
    new = {kv.key: kv for kv in [*ours, *(_upstream(imatrix) if imatrix else [])]}
    for text in overrides:
        kv = parse_override(text, source.kvs.get(text.partition("=")[0]))
        new[kv.key] = kv
    # what the source says of an imatrix of its own must not mix with ours
    stale = [key for key in source.kvs if imatrix and key.startswith(IMATRIX) and key not in new]
    kept = [new.pop(kv.key, kv) for kv in source.kvs.values() if kv.key not in stale]
    return kept + list(new.values())


def _upstream(imatrix: Imatrix) -> list[KV]:
    """The keys that llama-quantize writes, the names without folders."""
    told = [kv_string(f"{IMATRIX}file", imatrix.name)]
    if imatrix.datasets:
        told.append(kv_string(f"{IMATRIX}dataset", imatrix.datasets[0]))
    told.append(kv_u32(f"{IMATRIX}entries_count", len(imatrix.values)))
    if imatrix.chunks:
        told.append(kv_u32(f"{IMATRIX}chunks_count", imatrix.chunks))
    return told


def complete(kvs: list[KV], source_hash: str, hashes: list[int]) -> list[KV]:
    """The same metadata, of the same size, with what is known at the end."""
    known = {
        Key.SOURCE_HASH: kv_string(Key.SOURCE_HASH, source_hash),
        Key.TENSOR_HASHES: kv_list(Key.TENSOR_HASHES, UINT64, hashes),
    }
    return [known.get(kv.key, kv) for kv in kvs]


def source_hash(header: str, sums: list[int]) -> str:
    """SHA-256 over the source's header_hash and the checksums of its tensors' bytes."""
    return hashlib.sha256((header + json.dumps(sums)).encode()).hexdigest()
