"""Windows of tokens and their states between blocks, for the calibration in order; and what a parameter becomes."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CalibrationError
from ..files import read_bytes
from . import mapping
from .model import Blocks

if TYPE_CHECKING:
    import torch

BATCH_CPU = 256 << 20  # bytes of activations of a batch of windows
BATCH_GPU = 0.3  # of the memory that is free
MAX_BATCH = 64  # windows
MIN_HEAD = 64  # values of an attention head, where the configuration does not tell how many heads there are

# transformers' parameters that hold the experts of several GGUF tensors, or of one, with the same input
_EXPERTS = {
    "gate_up_proj": ("ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps"),
    "down_proj": ("ffn_down_exps",),
}
_SAME = {"attn_kv_b": "attn_v_b"}  # what the converter makes of one matrix, with its input


class Batches:
    """Windows of tokens, as many at a time as memory takes, and their states in files, in the model's type."""

    def __init__(self, blocks: Blocks, tokens: NDArray[np.int64]) -> None:
        self.blocks, self.tokens = blocks, tokens
        self.size = 0  # 0 = not decided yet

    def _slices(self) -> Iterator[slice]:
        self.size = self.size or self._fitting()
        for first in range(0, len(self.tokens), self.size):
            yield slice(first, min(len(self.tokens), first + self.size))

    def of_tokens(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Which windows, and their tokens (B, T)."""
        import torch

        for rows in self._slices():
            yield rows, torch.from_numpy(np.ascontiguousarray(self.tokens[rows]))

    def of_file(self, path: Path) -> Iterator[tuple[slice, torch.Tensor]]:
        """Which windows, and their states (B, T, C) on the device."""
        import torch

        n, window = self.tokens.shape
        dtype, device = self.blocks.dtype, self.blocks.device
        each = path.stat().st_size // n
        for rows in self._slices():
            with open(path, "rb", buffering=0) as file:  # opened each time: it is removed when the last is read
                raw = torch.from_numpy(
                    read_bytes(file, each * rows.start, each * (rows.stop - rows.start), f"{path}: the states")
                )
            states = raw.view(dtype).reshape(-1, window, each // (window * dtype.itemsize))
            yield rows, states.to(device, torch.float32 if device.type == "cpu" else dtype)

    def write(self, file: Any, y: torch.Tensor) -> None:
        """Append the states of the windows that are next."""
        import torch

        file.write(y.to("cpu", self.blocks.dtype).contiguous().view(torch.uint8).numpy().data)

    def halve(self, detail: str) -> None:
        """After running out of memory. Raises CalibrationError where one window is too much."""
        import torch

        if self.blocks.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.size <= 1:
            raise CalibrationError(
                f"{self.blocks.folder}: out of memory on {self.blocks.device} in {detail} with one window of "
                f"{self.tokens.shape[1]} tokens; use a smaller window, or --device cpu"
            )
        self.size //= 2

    def _fitting(self) -> int:
        """Windows that fit into memory together, roughly."""
        import torch

        window, model = self.tokens.shape[1], self.blocks.model
        hidden = model.get_input_embeddings().weight.shape[-1]
        widest = max((n for p in self.blocks.blocks.parameters() if p.ndim > 1 for n in p.shape[-2:]), default=hidden)
        heads = getattr(self.blocks.config.get_text_config(), "num_attention_heads", None)  # a model of states has none
        values = 12 * hidden + 4 * widest + (heads if isinstance(heads, int) else hidden // MIN_HEAD) * window
        room: float = BATCH_CPU
        if self.blocks.device.type == "cuda":
            room = BATCH_GPU * torch.cuda.mem_get_info(self.blocks.device)[0]
        return max(1, min(MAX_BATCH, int(room // (4 * values * window))))


def targets(
    blocks: Blocks, gguf_name: Callable[[str], str | None], wanted: Collection[str] | None, i: int, name: str
) -> tuple[tuple[str, ...], int, int]:
    """What a parameter of block i becomes, of what is wanted; if it is one expert alone, which of how many."""
    one_of = re.compile(r"experts\.(\d+)\.")  # a module an expert, as before transformers 5
    match, n = one_of.search(name), 0
    if match:
        all_names = (m for m, _ in blocks.blocks[i].named_parameters())
        n = 1 + max(int(m[1]) for m in map(one_of.search, all_names) if m)
    expert = int(match[1]) if match else -1
    full = f"{blocks.prefix}.{i}.{name}"
    leaf = name.rpartition("experts.")[2]
    if "experts." in name and leaf in _EXPERTS:
        found = [f"blk.{i}.{t}.weight" for t in _EXPERTS[leaf]]
    else:
        one = gguf_name(one_of.sub("experts.", full))
        found = [one] if one and one.endswith(".weight") else []
        found += [f"blk.{i}.{t}.weight" for t in mapping.FUSED.get(name.removesuffix(".weight"), ())]
    for made, other in _SAME.items():
        found += [t.replace(made, other) for t in found if made in t]
    return tuple(t for t in dict.fromkeys(found) if wanted is None or t in wanted), expert, n
