"""What decides the output's bytes: source, options, program. Two runs with the same fingerprint make the same file."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from .. import __version__
from ..codec import FORMAT_VERSION
from ..errors import RuntimeMissing
from ..llamacpp import install
from .base import Source


def fingerprint(source: Source, options: dict[str, object]) -> dict[str, Any]:
    """Everything that decides the output's bytes, as JSON."""
    try:
        used = install.version()  # its converter and its quantizers
    except RuntimeMissing:
        used = "none"
    job = {
        "ptqtp-gguf": __version__,
        "format": FORMAT_VERSION,
        "llama-cpp-python": used,
        "header": header_hash(source),
        "stamp": source.stamp,
        "options": options,
    }
    return json.loads(json.dumps(job))  # type: ignore[no-any-return]  # tuples become lists, as in the journal


def changed_option(then: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first option that differs, or that only one of them has."""
    return next((k for k in [*now, *then] if (k in then, then.get(k)) != (k in now, now.get(k))), None)


def header_hash(source: Source) -> str:
    """SHA-256 over the source's metadata and its tensors' names, shapes and types."""
    sha = hashlib.sha256()
    for kv in source.kvs.values():
        sha.update(json.dumps([kv.key, kv.type, len(kv.raw)]).encode() + kv.raw)
    for t in source.tensors:
        sha.update(json.dumps([t.name, t.shape, t.type]).encode())
    return sha.hexdigest()
