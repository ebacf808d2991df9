"""Bytes of a file that may change, or be cut, while it is read."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from .errors import InputError
from .packing import U8

_CHUNK = 1 << 24


def read_bytes(file: BinaryIO, at: int, n: int, what: str) -> U8:
    """n bytes from byte `at` on, wherever the file stands. what: names them in errors, with the file.

    Raises InputError where the file does not hold them (any more), or cannot be read.
    """
    out = np.empty(n, np.uint8)
    done = 0
    while done < n:
        try:
            got = os.preadv(file.fileno(), [out[done:].data], at + done)
        except OSError as e:
            raise InputError(f"{what}: {e.strerror}") from None
        if got == 0:
            raise InputError(f"{what}: the file has become shorter while it was read")
        done += got
    return out


def file_size(file: BinaryIO, what: str) -> int:
    """Bytes of an open file. Raises InputError where the disk does not tell."""
    try:
        return os.fstat(file.fileno()).st_size
    except OSError as e:
        raise InputError(f"{what}: {e.strerror}") from None


def sha256_of(file: BinaryIO, what: str) -> str:
    """SHA-256 of a whole open file, in hex. Raises InputError as read_bytes."""
    size, sha = file_size(file, what), hashlib.sha256()
    for at in range(0, size, _CHUNK):
        sha.update(read_bytes(file, at, min(_CHUNK, size - at), what).data)
    return sha.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex; read once as long as it stays the same. Raises InputError."""
    try:
        found = path.stat()
        return _file_sha256(path.resolve(), found.st_ino, found.st_size, found.st_mtime_ns)
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}") from None


@functools.lru_cache(maxsize=256)
def _file_sha256(path: Path, inode: int, size: int, changed: int) -> str:
    with open(path, "rb", buffering=0) as f:
        return sha256_of(cast(BinaryIO, f), str(path))
