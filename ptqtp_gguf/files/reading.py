"""Files from outside: regular ones only, whose bytes may change, or be cut, while they are read; and JSON in bounds."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..codec import U8
from ..errors import InputError, PtqtpError

_CHUNK = 1 << 24
MAX_VALUES = 1 << 22  # of a JSON text: each costs memory many times its bytes


def open_regular(path: Path, error: type[PtqtpError] = InputError) -> BinaryIO:
    """Open a file to read. Raises `error`, for a pipe or a device too, where reading might not end."""
    try:
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # opening a pipe would wait
        fd = os.open(path, flags)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise error(f"{path}: no regular file")
            return open(fd, "rb")
        except BaseException:
            os.close(fd)
            raise
    except OSError as e:
        raise error(f"{path}: {e.strerror}") from None


def read_whole(path: Path, limit: int, error: type[PtqtpError] = InputError) -> bytes:
    """A small regular file. limit in bytes. Raises `error` where it is larger, or cannot be read."""
    with open_regular(path, error) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise error(f"{path}: {size} bytes; the limit is {limit}")
            return file.read(size)
        except OSError as e:
            raise error(f"{path}: {e.strerror}") from None


def parse_json(raw: bytes, hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """JSON from outside, UTF-8. hook: object_pairs_hook. Raises ValueError for what is none, is nested too deeply, or
    holds more than MAX_VALUES values."""
    if sum(raw.count(c) for c in (b",", b"[", b"{")) > MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES} values")
    try:
        return json.loads(raw.decode("utf-8-sig"), object_pairs_hook=hook)
    except RecursionError:
        raise ValueError("nested too deeply") from None


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
    with open_regular(path) as f:
        return sha256_of(f, str(path))
