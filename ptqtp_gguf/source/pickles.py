"""PyTorch .bin files, checked without running what is in them.

A .bin file is a zip archive whose data.pkl is a pickle, a program that can call anything. It is taken only if it calls
nothing but what rebuilds tensors. The opcodes are read first (pickletools), names and limits checked; then the pickle
is replayed with harmless stand-ins to learn names and sizes of the tensors. The converter itself reads the file with
torch.load(weights_only=True); this is the clear message before it.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CheckpointError
from ..files import open_regular

MAX_PICKLE = 4 << 20  # bytes; one of a few thousand tensors takes a few hundred kilobytes
MAX_DIRECTORY = 32 << 20  # bytes of the archive's list of members; each costs memory many times its bytes
WAY_OUT = "save the model as safetensors"

# bytes a value of a storage class, and of what a converter reads
_STORAGES = {
    "DoubleStorage": 8,
    "FloatStorage": 4,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "LongStorage": 8,
    "IntStorage": 4,
    "ShortStorage": 2,
    "CharStorage": 1,
    "ByteStorage": 1,
    "BoolStorage": 1,
}
_OPCODES = frozenset(
    "PROTO STOP MARK GLOBAL REDUCE BUILD BINPERSID EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND "
    "APPENDS SETITEM SETITEMS NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 BINFLOAT LONG1 BINUNICODE SHORT_BINSTRING "
    "BINGET LONG_BINGET BINPUT LONG_BINPUT".split()
)


@dataclass(frozen=True)
class _Storage:
    key: str
    size: int  # bytes of the archive's member
    width: int  # bytes a value


@dataclass(frozen=True)
class _Tensor:
    nbytes: int


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Tensor:
    """Stand-in of torch._utils._rebuild_tensor and _v2: checks that the tensor lies within its storage."""
    ints = isinstance(storage, _Storage) and isinstance(size, tuple) and isinstance(stride, tuple)
    if not ints or len(size) != len(stride) or not all(type(i) is int and i >= 0 for i in (offset, *size, *stride)):
        raise ValueError("a tensor of damaged shape, stride or storage")
    if any(d == 0 for d in size):
        raise ValueError(f"a tensor of shape {list(size)}, which holds nothing")
    last = offset + sum((d - 1) * s for d, s in zip(size, stride, strict=True))
    count = 1
    for d in size:
        count *= d
    if (last + 1) * storage.width > storage.size:
        raise ValueError(f"a tensor of shape {list(size)} that reaches beyond its storage of {storage.size} bytes")
    return _Tensor(count * storage.width)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _ordered_dict(*args: Any) -> OrderedDict[Any, Any]:
    if args:
        raise ValueError("a dictionary made in an unusual way")
    return OrderedDict()


_CALLS = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "collections.OrderedDict": _ordered_dict,
}


def bin_tensors(path: Path) -> dict[str, int]:
    """Names and byte sizes of the tensors of a PyTorch .bin file (a zip as torch.save writes it since 1.6).

    Raises CheckpointError: damaged, of the older format, or holding anything but tensors.
    """
    try:
        with open_regular(path, CheckpointError) as file, _archive(path, file) as archive:
            root, raw = _member(path, archive)
            members = {i.filename: i.file_size for i in archive.infolist()}
    except zipfile.BadZipFile:
        if _starts_as_pickle(path):
            raise CheckpointError(f"{path}: a .bin file of PyTorch before 1.6, a bare pickle; {WAY_OUT}") from None
        raise CheckpointError(f"{path}: damaged or truncated: no whole zip archive") from None
    except (NotImplementedError, RuntimeError, EOFError, ValueError, OverflowError, struct.error) as e:
        raise CheckpointError(f"{path}: damaged: {e}") from None
    except OSError as e:
        raise CheckpointError(f"{path}: {e.strerror}") from None
    _scan(path, raw)
    try:
        state = _Replay(raw, root, members).load()
    except CheckpointError as e:
        raise CheckpointError(f"{path}: {e}") from None
    except Exception as e:  # whatever a hostile pickle makes of the stand-ins
        raise CheckpointError(f"{path}: damaged: {str(e)[:200] or type(e).__name__}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds no dictionary of tensors; {WAY_OUT}")
    tensors: dict[str, int] = {}
    for name, value in state.items():
        if not isinstance(value, _Tensor):
            raise CheckpointError(f"{path}: entry {name[:80]!r} is not a tensor; {WAY_OUT}")
        tensors[name] = value.nbytes
    return tensors


def _archive(path: Path, file: BinaryIO) -> zipfile.ZipFile:
    """The archive, after a look at how long its list of members is: zipfile reads it whole."""
    end: Any = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    if end is not None and end[_LIST_BYTES] > MAX_DIRECTORY:
        raise CheckpointError(
            f"{path}: its list of members takes {end[_LIST_BYTES]} bytes; the limit is {MAX_DIRECTORY}; {WAY_OUT}"
        )
    return zipfile.ZipFile(file)


_LIST_BYTES = 5  # index in zipfile's end record


def _starts_as_pickle(path: Path) -> bool:
    with open_regular(path, CheckpointError) as f:
        return f.read(1) == b"\x80"


def _member(path: Path, archive: zipfile.ZipFile) -> tuple[str, bytes]:
    """The archive's root folder, and its data.pkl."""
    infos = archive.infolist()
    size = path.stat().st_size
    names = {i.filename for i in infos}
    if len(names) != len(infos):
        raise CheckpointError(f"{path}: damaged: a member stands twice")
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise CheckpointError(f"{path}: member {info.filename[:80]!r} is compressed; torch.save stores plainly")
        if info.header_offset + info.file_size > size:
            raise CheckpointError(f"{path}: truncated: member {info.filename[:80]!r} ends beyond the file")
    found = [n for n in names if n.endswith("/data.pkl") and n.count("/") == 1]
    if len(found) != 1:
        raise CheckpointError(f"{path}: {len(found)} members data.pkl; a file of torch.save has one")
    info = archive.getinfo(found[0])
    if info.file_size > MAX_PICKLE:
        raise CheckpointError(f"{path}: its pickle takes {info.file_size} bytes; the limit is {MAX_PICKLE}; {WAY_OUT}")
    return found[0].removesuffix("/data.pkl"), archive.read(info)


def _scan(path: Path, raw: bytes) -> None:
    """Look at every opcode; refuse names other than those that rebuild tensors. Runs nothing."""
    names: set[str] = set()
    puts = 0
    try:
        for op, arg, _ in pickletools.genops(raw):
            if op.name == "GLOBAL":
                names.add(".".join(str(arg).split(" ")))
            elif op.name not in _OPCODES:
                raise CheckpointError(f"{path}: its pickle uses {op.name}, which no file of tensors does; {WAY_OUT}")
            if op.name in ("BINPUT", "LONG_BINPUT"):
                if not isinstance(arg, int) or arg > puts:  # an index far out would cost memory without end
                    raise CheckpointError(f"{path}: damaged: its pickle keeps entry {arg} after {puts} others")
                puts = max(puts, arg + 1)
    except ValueError as e:
        raise CheckpointError(f"{path}: damaged: {str(e)[:200]}") from None
    for name in sorted(names):
        module, _, cls = name.rpartition(".")
        if name not in _CALLS and not (module == "torch" and cls in _STORAGES):
            raise CheckpointError(f"{path}: holds {name[:100]!r}, which could run code when read; {WAY_OUT}")


_Unpickler: Any = pickle._Unpickler  # the one in Python, whose steps can be replaced


class _Replay(_Unpickler):  # type: ignore[misc]
    """Replays a scanned pickle with stand-ins; finds nothing by import.

    Keys are strings (hashing a tuple nested a million deep would end the process), and attributes are not set.
    """

    def __init__(self, raw: bytes, root: str, members: dict[str, int]) -> None:
        super().__init__(io.BytesIO(raw))
        self.root, self.members = root, members

    def set_items(self) -> None:
        self._set(self.pop_mark())

    def set_item(self) -> None:
        value = self.stack.pop()
        self._set([self.stack.pop(), value])

    def _set(self, items: list[Any]) -> None:
        target, keys = self.stack[-1], items[::2]
        if not isinstance(target, dict) or not all(isinstance(k, str) for k in keys):
            raise CheckpointError(f"holds a dictionary whose keys are not names of tensors; {WAY_OUT}")
        target.update(zip(keys, items[1::2], strict=True))

    def build(self) -> None:
        self.stack.pop()  # torch keeps the version of each module there
        if not isinstance(self.stack[-1], OrderedDict):
            raise ValueError("attributes of what has none")

    dispatch = _Unpickler.dispatch | {
        pickle.SETITEM[0]: set_item,
        pickle.SETITEMS[0]: set_items,
        pickle.BUILD[0]: build,
    }

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _CALLS:
            return _CALLS[full]
        if module == "torch" and name in _STORAGES:
            return name
        raise CheckpointError(f"holds {full[:100]!r}, which could run code when read; {WAY_OUT}")

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) != 5 or not all(isinstance(p, str) for p in pid[:3]):
            raise ValueError("a damaged storage entry")
        what, kind, key, _, count = pid
        if what != "storage" or kind not in _STORAGES:
            raise ValueError("a damaged storage entry")
        width = _STORAGES[kind]
        size = self.members.get(f"{self.root}/data/{key}")
        if size is None:
            raise ValueError(f"storage {key[:40]!r} is missing from the archive")
        if type(count) is not int or count * width != size:
            raise ValueError(f"storage {key[:40]!r} has {size} bytes for {count} values of {width}")
        return _Storage(key, size, width)
