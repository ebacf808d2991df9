"""Writing a file so that nothing is lost or half-written: check early, write beside the target, verify, rename."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from ..codec import U8
from ..errors import OutputError, PtqtpError
from .gguf import KV, OutTensor, total_size, write_stream

try:
    import fcntl
except ImportError:  # not a POSIX system: no lock there
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def system_errors(path: Path, kind: type[PtqtpError] = OutputError) -> Iterator[None]:
    """Turns the system's errors (disk full, no rights, a dying disk) into one of ours. path: where none is told."""
    try:
        yield
    except OSError as e:
        raise kind(f"{e.filename or path}: {e.strerror or e}") from None


def open_locked(path: Path, busy: str) -> BinaryIO:
    """Open a file to read and write, unbuffered, made where it is absent, for this process alone until it is closed.

    The lock goes with the process, however that dies. Raises OutputError with `busy` if another holds it, OSError.
    """
    # neither a link, which may lead to somebody's file, nor a pipe, which would wait for ever
    flags = os.O_RDWR | os.O_CREAT | sum(getattr(os, f"O_{name}", 0) for name in ("BINARY", "NOFOLLOW", "NONBLOCK"))
    while True:
        file = open(os.open(path, flags, 0o666), "r+b", buffering=0)
        try:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OutputError(f"{path}: no regular file; remove it")
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the one who held it may have finished, and removed or renamed it, in between
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
            file.close()
        except FileNotFoundError:
            file.close()
        except BlockingIOError:
            file.close()
            raise OutputError(busy) from None
        except BaseException:
            file.close()
            raise


def write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write it all; a raw file may take less at a time. Raises OSError."""
    view = memoryview(data).cast("B")
    while view:
        view = view[file.write(view) :]


def check_target(out: Path, source: Path, force: bool) -> None:
    """Refuse a target that cannot or must not be written. Raises OutputError.

    source: what it is made from, which it must not be; need not exist
    """
    if out.suffix.lower() != ".gguf":
        raise OutputError(f"{out}: the output's name must end in .gguf")
    if out.is_dir():
        raise OutputError(f"{out}: is a folder; name the file to write")
    if not out.parent.is_dir():
        raise OutputError(f"{out}: the folder {out.parent} does not exist")
    if out.exists():
        if source.exists() and out.samefile(source):
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


def cache_folder(name: str) -> Path:
    """The user's folder for what can be made again, made where it is missing: PTQTP_CACHE/name, or the system's place.

    Without PTQTP_CACHE: XDG_CACHE_HOME/ptqtp-gguf/name, or ~/.cache/ptqtp-gguf/name. Raises OutputError.
    """
    given, xdg = os.environ.get("PTQTP_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        base = Path(given) if given else Path(xdg) / "ptqtp-gguf" if xdg else Path.home() / ".cache" / "ptqtp-gguf"
        (base / name).mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as e:  # RuntimeError: no home
        why = getattr(e, "strerror", None) or e
        raise OutputError(f"the cache folder cannot be made: {why}; set PTQTP_CACHE to a folder of yours") from None
    return base / name


def sync_folder(folder: Path) -> None:
    """Push the names in a folder to the disk, where the system lets us."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class Partial:
    """The temporary file that becomes the target by `publish`."""

    def __init__(self, path: Path, file: BinaryIO, target: Path) -> None:
        self.path, self.file, self.target = path, file, target
        self.published = False

    def sync(self) -> None:
        """Push what is written to the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def publish(self) -> None:
        """Give the finished, verified file its name."""
        os.replace(self.path, self.target)
        self.published = True
        sync_folder(self.target.parent)


@contextlib.contextmanager
def partial_file(target: Path) -> Iterator[Partial]:
    """A temporary file beside the target, locked; gone, whatever happens, unless it was published.

    Its name is always the same, so what a killed process left is written over. Turns the system's errors on the way
    (disk full, no rights) into OutputError, and raises one if another process is writing the same file.
    """
    path = target.with_name(f".{target.name}.new")
    try:
        file = open_locked(path, f"{target}: another process is writing this file; wait for it, or use another name")
    except OSError as e:
        raise OutputError(f"{target}: cannot write in {target.parent}: {e.strerror}") from None
    left = "nothing of it was left behind"
    partial = Partial(path, file, target)
    try:
        try:
            file.truncate(0)
            buffered = open(os.dup(file.fileno()), "wb")
            partial.file = buffered
            yield partial
        finally:
            if not partial.published:
                try:
                    path.unlink(missing_ok=True)
                except OSError:
                    left = f"{path} is left"
            with contextlib.suppress(OSError):
                partial.file.close()
            file.close()
    except OSError as e:
        where = e.filename if e.filename and str(e.filename) != str(path) else target
        raise OutputError(f"{where}: writing failed: {e.strerror or e}; {left}") from None


@contextlib.contextmanager
def scratch_path(target: Path, suffix: str) -> Iterator[Path]:
    """A name beside the target for an intermediate file; removed at the end, whoever wrote it.

    The name is always the same, so what a killed process left is written over. Hold the target's journal.
    """
    path = target.with_name(f".{target.name}{suffix}")
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def check_text_target(path: Path, force: bool) -> None:
    """Refuse a text file that must not be written, before the long work. Raises OutputError."""
    if path.exists() and not force:
        raise OutputError(f"{path}: exists already; use --force to replace it")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: the folder {path.parent} does not exist")


def write_text(path: Path, text: str, force: bool = True) -> None:
    """Write a small text file, whole or not at all. Raises OutputError, without force where another text is there."""
    if not force and path.exists() and path.read_bytes() != text.encode():
        raise OutputError(f"{path}: exists already; use --force to replace it")
    with partial_file(path) as partial:
        partial.file.write(text.encode())
        partial.sync()
        partial.publish()


def write_verified(
    out: Path,
    kvs: list[KV],
    tensors: list[OutTensor],
    alignment: int,
    data: Iterator[U8],
    verify: Callable[[Path], None],
    force: bool = False,
) -> int:
    """Write a whole GGUF beside `out`, check its size, let `verify` read it back, and only then give it its name.

    force: replace what has come to lie there. Returns its bytes. verify raises OutputError where the file at the path
    it is given is not what it should be.
    """
    size = total_size(kvs, tensors, alignment)
    check_space(out.parent, size)
    with partial_file(out) as partial:
        if not force and out.exists():
            raise OutputError(f"{out}: exists already; use --force to replace it")
        for _ in write_stream(partial.file, kvs, tensors, alignment, data):
            pass
        partial.sync()
        written = partial.path.stat().st_size
        if written != size:
            raise OutputError(f"{out}: {written} bytes were written instead of {size}; try again")
        verify(partial.path)
        partial.publish()
    return size
