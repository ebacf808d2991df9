"""Second moments of a model's activations, and the folder where they are kept, so that they are gathered once.

index.json           what they were made from; for each finished layer its tensors, counts and sharing
blk.N.safetensors    of block N: float32 sums of x xT, (C, C), or (E, C, C) of experts, by GGUF tensor name
output.safetensors   of the output matrix, behind the last block
states.N.bin         while gathering: the inputs of layer N, raw; removed at the end
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CalibrationError, OutputError
from ..files import check_space, open_regular, parse_json, read_whole, sync_folder, write_text
from ..source import Checkpoint

if TYPE_CHECKING:
    import torch

VERSION = 1
MAX_INDEX = 1 << 28  # bytes
SAMPLE = 1 << 16  # bytes of each shard's head and tail that stand for it
SYMMETRIC = 1e-3  # of the largest value on the diagonal
_MEANING = {  # of the fingerprint's entries, for messages
    "model": "another model",
    "tokens": "another text",
    "shape": "other windows",
    "tensors": "other tensors",
}


@dataclass
class Moment:
    """What one tensor's inputs were.

    h       float32 (C, C): sum over tokens of x xT; (E, C, C) of E experts. Tensors that share it share the object.
    counts  tokens that were summed, one number an expert, or one in all
    shared  the tensor under whose name it is kept; its own, or that of one with the same input
    """

    h: torch.Tensor
    counts: list[int]
    shared: str

    def few(self, minimum: int) -> list[int]:
        """The experts that saw fewer tokens than `minimum`; [0] for a plain tensor that did."""
        return [i for i, n in enumerate(self.counts) if n < minimum]


def fingerprint(found: Checkpoint, tokens: NDArray[np.int64], wanted: list[str] | None) -> dict[str, Any]:
    """What decides the moments: config, shards' headers and a sample of their data, and tokens."""
    model = hashlib.sha256((found.folder / "config.json").read_bytes())
    for shard in found.shards:
        with open_regular(shard, CalibrationError) as f:
            head = f.read(8)
            length = int.from_bytes(head, "little") if shard.suffix == ".safetensors" else 0
            model.update(head + f.read(length + SAMPLE))
            f.seek(max(f.tell(), os.fstat(f.fileno()).st_size - SAMPLE))
            model.update(f.read())
    tensors = "all" if wanted is None else hashlib.sha256("\n".join(sorted(wanted)).encode()).hexdigest()
    text = hashlib.sha256(np.ascontiguousarray(tokens, "<i8").data).hexdigest()
    return {
        "model": model.hexdigest(),
        "tokens": text,
        "shape": list(tokens.shape),
        "tensors": tensors,
    }


class Store:
    """The folder of one calibration. Raises CalibrationError where it holds another's, or is damaged.

    done     layers that are finished; of the last one's output, the states are there
    returns  see Blocks.returns
    keep     False: only states are written, in a folder that somebody removes
    """

    def __init__(self, folder: Path, key: dict[str, Any], n_layers: int, keep: bool = True) -> None:
        self.folder, self.n, self.keep = folder, n_layers, keep
        self.returns = 0
        self._key, self._layers = key, list[dict[str, Any]]()
        self._index = folder / "index.json"
        if self._index.exists():
            self._read()
        elif keep:
            try:
                folder.mkdir(exist_ok=True)
                if any(folder.iterdir()):
                    raise CalibrationError(f"{folder}: holds other files and no index.json; name a new folder")
            except OSError as e:
                raise OutputError(f"{folder}: {e.strerror}") from None

    @property
    def done(self) -> int:
        return len(self._layers)

    @property
    def complete(self) -> bool:
        return self.done == self.n

    def _read(self) -> None:
        try:
            index = parse_json(read_whole(self._index, MAX_INDEX, CalibrationError))
            version, key, layers = index["version"], dict(index["key"]), list(index["layers"])
            self.returns = int(index["returns"])
            if not all(_is_record(m) for layer in layers for m in layer.values()):
                raise ValueError("no record")
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            raise CalibrationError(f"{self._index}: damaged; remove the folder to gather the moments again") from None
        if version != VERSION:
            raise CalibrationError(f"{self._index}: version {version}; this program reads {VERSION}; name a new folder")
        for name, value in self._key.items():
            if key.get(name) != value:
                raise CalibrationError(
                    f"{self.folder}: these moments were gathered from {_MEANING.get(name, name)}; name a new folder"
                )
        self.n = self.n or len(layers)
        self._layers = layers[: self.n]
        if not self.complete and self.done and not self.states(self.done).exists():
            self._layers = []  # started over: where the next layer's inputs are lost, they come from the first

    def states(self, layer: int) -> Path:
        return self.folder / f"states.{layer}.bin"

    def _file(self, layer: int) -> Path:
        return self.folder / (f"blk.{layer}.safetensors" if layer < self.n - 1 else "output.safetensors")

    def save(self, layer: int, moments: dict[str, Moment]) -> dict[str, Any]:
        """Write one layer's moments. Raises OutputError. Returns its record for `advance`."""
        record = {name: {"counts": m.counts, "shared": m.shared} for name, m in moments.items()}
        if self.keep:
            from safetensors.torch import save_file

            own = {name: m.h.cpu().contiguous() for name, m in moments.items() if m.shared == name}
            size = sum(h.nbytes for h in own.values())
            check_space(self.folder, size * (max(1, self.n - 1 - layer) if layer == 0 else 1))
            work = self.folder / ".work"
            with _writing(self.folder):
                save_file(own, work)
                work.replace(self._file(layer))
        return record

    def advance(self, record: dict[str, Any]) -> None:
        """Note that a layer is finished, and the next one's states are written; the old states go."""
        self._layers.append(record)
        if self.keep:
            index = {"version": VERSION, "key": self._key, "returns": self.returns, "layers": self._layers}
            with _writing(self.folder):
                sync_folder(self.folder)
                write_text(self._index, json.dumps(index))
        with contextlib.suppress(FileNotFoundError):
            self.states(self.done - 1).unlink()

    def load(self, layer: int) -> dict[str, Moment]:
        """A finished layer's moments, checked, on the CPU. Raises CalibrationError."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path, record = self._file(layer), self._layers[layer]
        try:
            held = load_file(path) if record else {}
            moments = {n: Moment(held[m["shared"]], list(m["counts"]), str(m["shared"])) for n, m in record.items()}
        except (OSError, SafetensorError, KeyError, TypeError) as e:
            text = e.strerror if isinstance(e, OSError) and e.strerror else f"damaged ({e})"
            raise CalibrationError(f"{path}: {text}; remove the folder to gather the moments again") from None
        validate(moments, str(path))
        return moments


def open_moments(folder: Path) -> Iterator[dict[str, Moment]]:
    """The moments of a complete folder, a layer at a time, whatever they were made from. Raises CalibrationError."""
    store = Store(folder, {}, 0, keep=False)
    if not store.done:
        raise CalibrationError(f"{folder}: holds no second moments; give --calib TEXT to gather them there")
    if any(folder.glob("states.*.bin")):
        raise CalibrationError(f"{folder}: was not finished; give --calib TEXT as before to resume it")
    for layer in range(store.n):
        yield store.load(layer)


def _is_record(m: object) -> bool:
    counts = m.get("counts") if isinstance(m, dict) else None
    return isinstance(counts, list) and all(type(n) is int and n >= 0 for n in counts)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Failures to write, the system's and safetensors', as OutputError."""
    try:
        yield
    except OSError as e:
        raise OutputError(f"{folder}: writing failed: {e.strerror or e}; run again to resume") from None
    except Exception as e:
        if type(e).__name__ != "SafetensorError":
            raise
        raise OutputError(f"{folder}: writing failed: {e}; run again to resume") from None


def validate(moments: dict[str, Moment], where: str) -> None:
    """Raises CalibrationError unless each is square, one an expert, finite, symmetric, and not negative on the
    diagonal."""
    import torch

    for name, m in moments.items():
        if m.shared != name:
            continue
        h, n = m.h, len(m.counts)
        if h.dtype != torch.float32 or h.ndim not in (2, 3) or h.shape[-1] != h.shape[-2]:
            raise CalibrationError(
                f"{where}: {name} is {h.dtype} {tuple(h.shape)}, no float32 square; remove the folder"
            )
        if n != (len(h) if h.ndim == 3 else 1):
            raise CalibrationError(f"{where}: {name} has {n} counts for {tuple(h.shape)}; remove the folder")
        for part in h if h.ndim == 3 else h[None]:
            diagonal = part.diagonal()
            if not bool(torch.isfinite(part).all()):
                raise CalibrationError(f"{where}: {name} holds values that are not finite; is the model damaged?")
            if bool((diagonal < 0).any()) or bool((part - part.T).abs().max() > SYMMETRIC * diagonal.max()):
                raise CalibrationError(f"{where}: {name} is not a sum of squares; remove the folder")
