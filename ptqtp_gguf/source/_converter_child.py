"""Runs in the converter's own process: llama.cpp's converter, serving its tensors instead of writing a file.

    python -I -u _converter_child.py CONVERT_HF_TO_GGUF.PY CHECKPOINT_FOLDER JOB

Not imported by the package; JOB is that of _converter_hooks.py, whose hooks are in place here, too. The converter runs
unchanged up to the point where it would write: two methods of its GGUFWriter are replaced, so that header and metadata
go to memory by its own code, and the tensors stay lazy until asked for. On the original standard output: MAGIC, header
length and size of the whole file as uint64, the header; then the bytes of one tensor for each index that comes in as a
line on standard input. Where the converter lacks a name that this needs: REFUSAL, length of the reason, 0, the reason.
What the converter prints goes to standard error. End of standard input ends the process at once, so none outlives its
parent.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import io
import json
import mmap
import os
import queue
import signal
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MAGIC, REFUSAL = b"PTQTPbf\x01", b"PTQTPno\x01"
PIECE = 1 << 19  # weights made at a time

_WRITER = "open_output_file write_header_to_file write_kv_data_to_file write_ti_data_to_file write_tensors_to_file"
NEEDED = {
    "GGUFWriter": f"{_WRITER} write_padding ggml_pad".split(),
    "LazyBase": ["_recurse_apply"],
    "LazyNumpyTensor": [],
    "LazyChunkedTensor": ["tofile"],
    "quants": ["quantize"],
    "gguf_writer": ["WriterState"],
}
ATTRIBUTES = {
    "GGUFWriter": "fout state tensors kv_data data_alignment",
    "LazyBase": "_data _func _args _kwargs",
    "LazyChunkedTensor": "_chunks _qtype _byteswap",
}


def main(script: str, folder: str, job: dict[str, Any]) -> None:
    out = os.dup(1)
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends this process
    wanted: queue.SimpleQueue[int] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(wanted,), daemon=True).start()
    hooks = _hooks()
    hooks.converter_first(script)
    import gguf

    if absent := missing(gguf):
        send(out, struct.pack("<8sQQ", REFUSAL, len(absent.encode()), 0) + absent.encode())
        return
    hooks.install(job)
    Server(gguf, out, wanted, lambda: hooks.say(job, ready=True)).install()
    hooks.run(script, [folder, "--outtype", "bf16", "--outfile", os.devnull], job)


def _hooks() -> Any:
    """The module beside this one; its folder is not on the path, since names in it are the converter's too."""
    path = Path(__file__).with_name("_converter_hooks.py")
    spec = importlib.util.spec_from_file_location("_converter_hooks", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _listen(wanted: queue.SimpleQueue[int]) -> None:
    try:
        with open(0, "rb", buffering=0) as asks:  # unbuffered: no lock that a dying interpreter would wait for
            for line in asks:
                wanted.put(int(line))
    finally:
        os._exit(0)


def missing(gguf: Any) -> str:
    """The first name that the converter's gguf-py lacks, or ""."""
    for owner, names in NEEDED.items():
        for name in ["", *names]:
            if not hasattr(getattr(gguf, owner, None), name or "__name__"):
                return f"gguf.{owner}.{name}".rstrip(".")
    for owner, names_set in ATTRIBUTES.items():
        for name in names_set.split():
            if name not in getattr(gguf, owner).__init__.__code__.co_names:
                return f"gguf.{owner}().{name}"
    return ""


def send(fd: int, data: Any) -> None:
    """Write all of a buffer to a pipe."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(fd, view) :]


class Server:
    """Makes one tensor's bytes after another, as the converter would have written them, in bounded memory.

    Lazy tensors are evaluated without keeping the result, so each can be asked for again. Where a tensor is a shard's
    data that is only cast, rounded to bf16 or stacked from experts, it is made piece by piece and never whole.
    """

    def __init__(
        self, gguf: Any, out: int, wanted: queue.SimpleQueue[int], ready: Callable[[], None] = lambda: None
    ) -> None:
        """ready: called when all that the hooks tell before the first tensor has been told."""
        import torch
        from conversion import LazyTorchTensor  # from the converter's folder

        self.gguf, self.torch, self.lazy_torch = gguf, torch, LazyTorchTensor
        self.out, self.wanted, self.ready = out, wanted, ready
        self.maps: list[mmap.mmap] = []
        self.quantize = gguf.quants.quantize

    def install(self) -> None:
        """Replace the writer's file by memory and its tensor loop by ours; note on lazy tensors how they came about."""
        writer, lazy_torch, torch = self.gguf.GGUFWriter, self.lazy_torch, self.torch
        empty = self.gguf.gguf_writer.WriterState.EMPTY

        def open_output_file(w: Any, path: Path | None = None) -> None:
            w.fout, w.state = [io.BytesIO()], empty

        def write_tensors_to_file(w: Any, *, progress: bool = False) -> None:
            w.write_ti_data_to_file()
            w.write_padding(w.fout[0], w.fout[0].tell())
            header = w.fout[0].getvalue()
            tensors = [info for part in w.tensors for info in part.values()]
            size = len(header) + sum(w.ggml_pad(info.nbytes, w.data_alignment) for info in tensors)
            w.kv_data, w.fout = [{}], [io.BytesIO()]
            self.serve(header, size, tensors)

        writer.open_output_file, writer.write_tensors_to_file = open_output_file, write_tensors_to_file

        def quantize(data: Any, qtype: Any) -> Any:
            made = self.quantize(data, qtype)
            if qtype == self.gguf.GGMLQuantizationType.BF16 and isinstance(made, self.gguf.LazyNumpyTensor):
                made.rounded_from = data
            return made

        def to(t: Any, *args: Any, **kwargs: Any) -> Any:
            made = lazy_torch.__getattr__(t, "to")(*args, **kwargs)
            if len(args) == 1 and isinstance(args[0], torch.dtype) and not kwargs:
                made.cast_from = t
            return made

        plain_numpy = lazy_torch.numpy

        def numpy(t: Any) -> Any:
            made = plain_numpy(t)
            made.torch_form = t
            return made

        self.gguf.quants.quantize, lazy_torch.to, lazy_torch.numpy = quantize, to, numpy

        local = getattr(getattr(self.gguf, "utility", None), "LocalTensor", None)
        if local and hasattr(local, "mmap_bytes"):
            plain_map = local.mmap_bytes

            def mmap_bytes(t: Any) -> Any:
                data = plain_map(t)
                self.maps = [data.base] if isinstance(data.base, mmap.mmap) else []
                return data

            local.mmap_bytes = mmap_bytes

    def serve(self, header: bytes, size: int, tensors: list[Any]) -> None:
        """Send the header, then tensors as they are asked for; never returns."""
        gc.collect()  # the tokenizer
        _give_back()
        self.ready()
        send(self.out, struct.pack("<8sQQ", MAGIC, len(header), size))
        send(self.out, header)
        while True:
            info = tensors[self.wanted.get()]
            sent = 0
            for piece in self.pieces(info.tensor):
                data = self.contiguous(piece)
                send(self.out, data)
                sent += data.nbytes
                del piece, data
            if sent != info.nbytes:
                raise ValueError(f"a tensor of {info.nbytes} bytes was made with {sent}")
            self.maps = []
            _give_back()

    @staticmethod
    def contiguous(a: Any) -> Any:
        return a if a.flags.c_contiguous else a.copy(order="C")

    def pieces(self, t: Any) -> Iterator[Any]:
        """Arrays whose bytes, joined, are those that t.tofile() would write."""
        if isinstance(t, self.gguf.LazyChunkedTensor):
            for load in t._chunks:
                piece = load()
                if t._qtype is not None:
                    piece = self.quantize(piece, t._qtype)
                yield piece.byteswap(inplace=False) if t._byteswap else piece
        elif not isinstance(t, self.gguf.LazyNumpyTensor):
            yield t
        elif (source := vars(t).get("rounded_from")) is not None and t._data is None:
            form = vars(source).get("torch_form") if source._data is None else None
            if form is not None:
                yield from (self.bf16(p) for p in self.flat(form))
            else:
                whole = self.contiguous(self.eager(source)).reshape(-1)
                yield from (self.bf16(self.torch.from_numpy(p)) for p in _split(whole, len(whole)))
        else:
            yield self.eager(t)

    def flat(self, node: Any) -> Iterator[Any]:
        """A lazy torch tensor as one-dimensional pieces in row-major order."""
        lazy = isinstance(node, self.lazy_torch) and node._data is None
        if lazy and (source := vars(node).get("cast_from")) is not None:
            yield from (p.to(node.dtype) for p in self.flat(source))
        elif lazy and node._func is self.torch.stack and node._kwargs in ({}, {"dim": 0}) and len(node._args) == 1:
            for part in node._args[0]:
                yield from self.flat(part)
        else:
            self.maps = []
            whole = self.eager(node).reshape(-1)
            # the pages of a shard that nobody but us looks at are dropped as soon as they are read
            local = lazy and len(node._args) == 1 and type(node._args[0]).__name__ == "LocalTensor"
            maps = self.maps if local else []
            for piece in _split(whole, len(whole)):
                yield piece
                for m in maps:
                    m.madvise(mmap.MADV_DONTNEED)

    def bf16(self, piece: Any) -> Any:
        """Torch tensor of floats -> its bf16 bytes as gguf-py rounds them: to nearest even, NaN kept and made quiet."""
        piece = piece.to(self.torch.float32)
        if self.torch.isnan(piece.sum()):  # a NaN survives every sum; a false alarm only costs time
            return self.quantize(piece.numpy(), self.gguf.GGMLQuantizationType.BF16)
        return piece.to(self.torch.bfloat16).view(self.torch.uint8).numpy()

    def eager(self, node: Any) -> Any:
        """The value of a lazy tensor. What is used once is dropped once used; the lazy tensors stay as they were."""
        if not isinstance(node, self.gguf.LazyBase):
            return node
        walk = self.gguf.LazyBase._recurse_apply
        uses: Counter[int] = Counter()
        kept: dict[int, Any] = {}

        def count(n: Any) -> Any:
            if n._data is None:
                uses[id(n)] += 1
                if uses[id(n)] == 1:
                    walk(n._args, count)
            return n

        def value(n: Any) -> Any:
            if n._data is not None:
                return n._data
            if id(n) in kept:
                return kept[id(n)]
            made = n._func(*walk(n._args, value), **n._kwargs)
            if uses[id(n)] > 1:
                kept[id(n)] = made
            return made

        count(node)
        return value(node)


def _split(whole: Any, n: int) -> Iterator[Any]:
    for i in range(0, n, PIECE):
        yield whole[i : i + PIECE]


def _give_back() -> None:
    """Give freed memory back to the system, where the C library can."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        pass


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
