"""A checkpoint's tensors straight out of llama.cpp's converter, without an intermediate file.

The converter runs in a process of its own (_converter_child.py) and sends over a pipe the header that its bf16 GGUF
would have, and then the bytes of each tensor that is asked for. They are the bytes of the file that
checkpoint.to_bf16_gguf writes, which stays the way out where the converter cannot be hooked.
"""

from __future__ import annotations

import fcntl
import os
import queue
import select
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, BinaryIO

import numpy as np

from ..codec import U8
from ..errors import CheckpointError
from ..files import (
    Header,
    TensorInfo,
    check_space,
    file_size,
    parse_header,
    partial_file,
    read_bytes,
    read_header,
    write_all,
)
from ..llamacpp import install
from ..progress import Progress
from . import _converter_child as child
from . import checkpoint, pre_tokenizers, settings
from .base import Source
from .checkpoint import Checkpoint, to_bf16_gguf
from .converter_log import ConverterLog

PIPE = 1 << 20  # bytes; what an ordinary user may ask for
MAX_HEAD = 1 << 28  # bytes; far beyond any vocabulary
READY = 30.0  # seconds for lines that are in the pipe already


class ConverterStream:
    """The bf16 GGUF of a checkpoint as the converter would write it, served tensor by tensor. A context manager.

    header        parsed and checked; offsets as in the file
    header_bytes  everything before the first tensor, padding included
    size          bytes of the whole file
    said          what the converter told of itself
    """

    header: Header
    header_bytes: bytes
    size: int

    def __init__(self, checkpoint: Checkpoint, log: Callable[[str], None], fallback: Path | None = None) -> None:
        """Start the converter and wait for the header, which takes seconds.

        log       gets the converter's lines, always in the caller's thread
        fallback  where to put the bf16 GGUF if the converter cannot be hooked; removed at the end
        Raises CheckpointError if the converter fails, or cannot be hooked and there is no fallback.
        """
        self._checkpoint, self._log = checkpoint, log
        self.said = ConverterLog()
        job = self.said.job(checkpoint.trust_code, checkpoint.pre_tokenizer)
        self._unlogged: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._left = 0  # bytes of the tensor last asked for that are not read yet
        self._turn = 0
        self._file: BinaryIO | None = None
        self._scratch: Path | None = None
        script = install.converter()
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-I",
                "-u",
                child.__file__,
                str(script),
                os.path.abspath(checkpoint.folder),
                job,
            ],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._asks, self._data = self._process.stdin, self._process.stdout
        self._drain = threading.Thread(target=self._drain_log, args=(self._process.stderr,), daemon=True)
        self._drain.start()
        try:
            _enlarge(self._data.fileno())
            absent = self._read_head()
            if absent:
                self._fall_back(absent, fallback)
            self.header = parse_header(memoryview(self.header_bytes), str(checkpoint.folder), self.size)
            self._index = {t.name: i for i, t in enumerate(self.header.tensors)}
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ConverterStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the converter, in the middle of a tensor too. Idempotent."""
        self._turn += 1
        self._left = 0
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._drain.join()
        for pipe in (self._asks, self._data, self._process.stderr, self._file):
            if pipe is not None:
                pipe.close()
        if self._scratch is not None:
            self._scratch.unlink(missing_ok=True)

    def chunks(self, t: TensorInfo, size: int) -> Iterator[U8]:
        """The raw bytes of a tensor of header.tensors in arrays of `size` bytes, the last one smaller.

        Any tensor in any order, again too; the converter makes it while it is read. One reading at a time: starting
        another ends this one, which may be left in the middle (its rest is read and thrown away).
        Raises CheckpointError if the converter fails.
        """
        if size < 1 or t != self.header.tensors[self._index[t.name]]:
            raise ValueError(f"{size} bytes of {t}")
        self._turn += 1
        turn = self._turn
        if self._file is None:
            rest = np.empty(min(PIPE, self._left), np.uint8)
            while self._left:
                self._fill(rest[: self._left])
            self._ask(self._index[t.name], t.nbytes)
        done = 0
        while done < t.nbytes:
            if turn != self._turn:
                raise RuntimeError(f"tensor {t.name}: another reading of the stream has begun")
            chunk = np.empty(min(size, t.nbytes - done), np.uint8)
            if self._file is None:
                self._fill(chunk)
            else:
                chunk = read_bytes(self._file, t.offset + done, chunk.size, f"{self._scratch}: tensor {t.name}")
            done += chunk.nbytes
            yield chunk
        self._flush_log()

    def _ask(self, index: int, nbytes: int) -> None:
        try:
            self._asks.write(b"%d\n" % index)
        except (BrokenPipeError, ValueError):  # died, or closed
            raise self._failure() from None
        self._left = nbytes

    def _fill(self, chunk: U8) -> None:
        """Read exactly chunk.nbytes from the child. The lock is let go while the system copies."""
        view = memoryview(chunk.data)
        while view:
            n = self._data.readinto(view)  # type: ignore[attr-defined]  # unbuffered: a FileIO
            if not n:
                raise self._failure()
            self._left -= n
            view = view[n:]
        self._flush_log()

    def _read_head(self) -> str:
        """Wait for the child's first words: the header is set, or the reason is returned why there is none."""
        while not select.select([self._data], [], [], 0.1)[0]:
            self._flush_log()
        magic, length, self.size = struct.unpack("<8sQQ", self._take(24))
        if magic not in (child.MAGIC, child.REFUSAL) or length > MAX_HEAD:
            raise CheckpointError(f"{self._checkpoint.folder}: the converter's process sends what it should not")
        self.header_bytes = self._take(length)
        if magic == child.MAGIC:
            self.said.ready.wait(READY)  # it was told before, on another pipe
        return self.header_bytes.decode() if magic == child.REFUSAL else ""

    def _take(self, n: int) -> bytes:
        buffer = np.empty(n, np.uint8)
        self._left = n
        self._fill(buffer)
        return buffer.tobytes()

    def _fall_back(self, absent: str, path: Path | None) -> None:
        why = f"this llama.cpp converter cannot be read as a stream ({absent} is missing)"
        if path is None:
            raise CheckpointError(f"{self._checkpoint.folder}: {why}; keep the bf16 GGUF and convert that")
        self._log(f"{why}; writing {path} first")
        self._scratch = path
        for line in to_bf16_gguf(self._checkpoint, path):
            self._log(line)
        self._file = open(path, "rb", buffering=0)
        self.size = file_size(self._file, str(path))
        header, head = read_header(self._file, str(path))
        self.header_bytes = head[: header.data_offset].tobytes()

    def _drain_log(self, pipe: IO[bytes]) -> None:
        for raw in pipe:
            line = raw.decode(errors="replace").rstrip()
            if not self.said.take(line):
                self._unlogged.put(line)

    def _flush_log(self) -> None:
        while not self._unlogged.empty():
            self._log(self._unlogged.get())

    def _failure(self) -> CheckpointError:
        """Why the child ended."""
        code = self._process.wait()
        self._drain.join()
        self._flush_log()
        return CheckpointError(self.said.reason(self._checkpoint.folder, self._checkpoint.architecture, code))


def _enlarge(fd: int) -> None:
    """A larger pipe where the system has that; fewer turns between two processes."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE)
    except (AttributeError, OSError):
        pass


class StreamSource(Source):
    """A checked checkpoint folder, converted tensor by tensor as it is read. Raises CheckpointError."""

    def __init__(self, found: Checkpoint, log: Callable[[str], None], scratch: Path | None = None) -> None:
        """scratch: see stream.ConverterStream's fallback."""
        self.path = found.folder
        self._stream = ConverterStream(found, log, scratch)
        try:
            said = self._stream.said
            if said.unknown_pre:
                name = pre_tokenizers.required(self._stream.header.kvs.values(), said.sample, str(found.folder))
                self._stream.close()
                self._stream = ConverterStream(replace(found, pre_tokenizer=name), log, scratch)
            header = self._stream.header
            self.kvs, self.tensors, self.alignment = header.kvs, header.tensors, header.alignment
            self.stamp = checkpoint.stamp(found.folder)
            self.notes = [
                *pre_tokenizers.notes(self.kvs, self._stream.said.sample, found.pre_tokenizer, said.unknown_pre),
                *settings.notes(found.folder, self, self._stream.said.config),
            ]
        except BaseException:
            self._stream.close()
            raise

    def chunks(self, t: TensorInfo, size: int) -> Iterator[U8]:
        return self._stream.chunks(t, size)

    def as_file(self, scratch: Path, progress: Progress) -> Path:
        check_space(scratch.parent, self._stream.size)
        done, total = 0, sum(t.n_weights for t in self.tensors)
        with partial_file(scratch) as partial:
            file = partial.file
            write_all(file, self._stream.header_bytes)
            for t in sorted(self.tensors, key=lambda t: t.offset):
                progress("model for calibration", done, total, t.name)
                write_all(file, bytes(t.offset - file.tell()))
                for chunk in self.chunks(t, PIPE):
                    write_all(file, chunk.data)
                done += t.n_weights
            write_all(file, bytes(self._stream.size - file.tell()))
            partial.sync()
            partial.publish()
        return scratch

    def close(self) -> None:
        self._stream.close()
