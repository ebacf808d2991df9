"""Writing a file so that nothing is lost or half-written: check early, write beside the target, verify, rename."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from .errors import OutputError


def check_target(out: Path, source: Path, force: bool) -> None:
    """Refuse a target that cannot or must not be written. Raises OutputError."""
    if out.suffix.lower() != ".gguf":
        raise OutputError(f"{out}: the output's name must end in .gguf")
    if out.is_dir():
        raise OutputError(f"{out}: is a folder; name the file to write")
    if not out.parent.is_dir():
        raise OutputError(f"{out}: the folder {out.parent} does not exist")
    if out.exists():
        if out.samefile(source):
            raise OutputError(f"{out}: output and input are the same file")
        if not force:
            raise OutputError(f"{out}: exists already; use --force to replace it")
    try:
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as e:
        raise OutputError(f"{out}: cannot write in {out.parent}: {e.strerror}") from None


def check_space(folder: Path, needed: int) -> None:
    """Refuse early if the disk is too small. needed in bytes. Raises OutputError."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(f"{folder}: {needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free on the disk")


class Partial:
    """The temporary file that becomes the target by `publish`."""

    def __init__(self, path: Path, file: BinaryIO, target: Path) -> None:
        self.path, self.file, self.target = path, file, target

    def sync(self) -> None:
        """Push what is written to the disk, and close the file."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def publish(self) -> None:
        """Give the finished, verified file its name."""
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(self.path, 0o666 & ~umask)
        os.replace(self.path, self.target)
        with contextlib.suppress(OSError):  # not every system lets a folder be synced
            fd = os.open(self.target.parent, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


@contextlib.contextmanager
def partial_file(target: Path) -> Iterator[Partial]:
    """A temporary file beside the target; gone, whatever happens, unless it was published.

    Turns the system's errors on the way (disk full, no rights) into OutputError.
    """
    try:
        fd, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    except OSError as e:
        raise OutputError(f"{target}: cannot write in {target.parent}: {e.strerror}") from None
    partial = Partial(Path(name), cast(BinaryIO, os.fdopen(fd, "wb")), target)
    try:
        yield partial
    except OSError as e:
        raise OutputError(f"{target}: writing failed: {e.strerror or e}; nothing was left behind") from None
    finally:
        with contextlib.suppress(OSError):
            partial.file.close()
        with contextlib.suppress(FileNotFoundError):
            partial.path.unlink()


@contextlib.contextmanager
def scratch_path(target: Path, suffix: str) -> Iterator[Path]:
    """A name beside the target for an intermediate file; removed at the end, whoever wrote it."""
    path = target.with_name(f".{target.name}.{os.getpid()}{suffix}")
    try:
        yield path
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
