"""Calibration: text -> windows of tokens -> the second moments of what each matrix is given, a layer at a time.

In memory are, at a time: the embedding or one block in float32 (on a GPU in the model's type), that block's moments
(4 C^2 bytes for each distinct input of C values, an expert's counted each), and a batch of windows. What goes from
block to block lies in a file: tokens times hidden size, in the model's type, twice.
"""

from __future__ import annotations

import contextlib
import gc
import re
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CalibrationError, OutputError
from ..files import read_bytes
from ..progress import Progress, no_progress
from ..source import Checkpoint, transformers_reason
from .mapping import names
from .model import Blocks, require_transformers
from .moments import Moment, Store, fingerprint
from .sums import Sums

if TYPE_CHECKING:
    import torch

OUTPUT = "output.weight"
BATCH_CPU = 256 << 20  # bytes of activations of a batch of windows
BATCH_GPU = 0.3  # of the memory that is free
MAX_BATCH = 64  # windows
Step = Callable[["torch.Tensor"], "torch.Tensor | None"]

# transformers' parameters that hold the experts of several GGUF tensors, or of one, with the same input
_EXPERTS = {
    "gate_up_proj": ("ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps"),
    "down_proj": ("ffn_down_exps",),
}
_SAME = {"attn_kv_b": "attn_v_b"}  # what the converter makes of one matrix, with its input


@dataclass
class Layer:
    """One layer that has been seen by all tokens.

    index    of the block; the number of blocks: the output matrix
    moments  by GGUF tensor name
    done     from the folder of an earlier run
    """

    index: int
    moments: dict[str, Moment]
    done: bool = False


def walk(
    found: Checkpoint,
    tokens: NDArray[np.int64],
    arch: str,
    wanted: Collection[str] | None = None,
    *,
    device: str = "cpu",
    folder: Path | None = None,
    progress: Progress = no_progress,
) -> Iterator[Layer]:
    """Run tokens through a model and yield each layer with the moments of its matrices' inputs.

    tokens      int64 (N, T): N windows of T tokens, each on its own
    arch        general.architecture of the GGUF, whose names are used
    wanted      GGUF tensors of interest; None = all that are found. output.weight: the output matrix, tied or not
    folder      where moments are kept and found; a walk that was killed resumes with its first missing layer, one that
                is complete runs no model. None = nothing is kept
    Raises CalibrationError, OutputError.
    """
    require_transformers()
    import transformers

    key = fingerprint(found, tokens, None if wanted is None else list(wanted))
    with contextlib.ExitStack() as stack:
        with _config_errors(found):
            config = transformers.AutoConfig.from_pretrained(
                found.folder, local_files_only=True, trust_remote_code=found.trust_code
            ).get_text_config()
        n_layers = int(config.num_hidden_layers)
        if tokens.ndim != 2 or not tokens.size or not 0 <= tokens.min() <= tokens.max() < config.vocab_size:
            top = int(tokens.max()) if tokens.size else 0
            raise CalibrationError(
                f"{found.folder}: token {top} in the text, the model has {config.vocab_size}; is it its tokenizer?"
            )
        where = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ptqtp-")))
        store = Store(where, key, n_layers + 1, keep=folder is not None)
        for i in range(store.done):
            yield Layer(i, store.load(i), done=True)
        if not store.complete:
            yield from _Walk(found, tokens, names(arch, n_layers), wanted, device, store, progress).layers()


@contextlib.contextmanager
def _config_errors(found: Checkpoint) -> Iterator[None]:
    try:
        yield
    except Exception as e:
        text = transformers_reason(e)
        raise CalibrationError(f"{found.folder}: transformers does not read its config: {text}") from None


class _Walk:
    def __init__(
        self,
        found: Checkpoint,
        tokens: NDArray[np.int64],
        name: Callable[[str], str | None],
        wanted: Collection[str] | None,
        device: str,
        store: Store,
        progress: Progress,
    ) -> None:
        self.tokens, self.name, self.wanted, self.store, self.progress = tokens, name, wanted, store, progress
        self.blocks = Blocks(found, device)
        self.batches = Batches(self.blocks, tokens)
        self.total = len(tokens) * (store.n + 1)  # the embedding, every block, and the output

    def layers(self) -> Iterator[Layer]:
        """The layers from the first that is missing on."""

        blocks, store = self.blocks, self.store
        blocks.load(-1)
        if store.done == 0:
            self._pass("embedding", None, store.states(0), lambda: blocks.embed)
        else:
            blocks.returns = store.returns
            self._check_states(store.states(store.done))
        blocks.unload(-1)
        for i in range(store.done, blocks.n):
            blocks.load(i)
            source, out = store.states(i), store.states(i + 1)
            moments = self._gather(i, source, out)
            store.returns = blocks.returns
            record = store.save(i, moments)
            yield Layer(i, moments)
            del moments
            blocks.unload(i)
            gc.collect()  # frames of passes that were stopped by an exception still hold the moments
            store.advance(record)
        moments = self._output()
        record = store.save(blocks.n, moments)
        yield Layer(blocks.n, moments)
        store.advance(record)
        self.progress("calibrating", self.total, self.total, "")

    def _check_states(self, path: Path) -> None:
        width = self.blocks.config.get_text_config().hidden_size
        if path.stat().st_size != self.tokens.size * width * self.blocks.dtype.itemsize:
            raise CalibrationError(f"{path}: not of the size that it should have; remove the folder to start over")

    def _gather(self, i: int, source: Path, out: Path) -> dict[str, Moment]:
        """Moments of block i; its outputs go to the file `out`."""
        seen: list[Sums] = []

        def fresh() -> Step:
            seen[:] = [Sums(lambda name: targets(self.blocks, self.name, self.wanted, i, name))]

            def step(x: torch.Tensor) -> torch.Tensor | None:
                seen[0].next()
                return self.blocks.run(i, x, seen[0].tap)

            return step

        self._pass(f"block {i}", source, out, fresh)
        made = seen[0].moments()
        if not made and self.wanted is None:
            raise self.blocks.cannot(f"no product with a weight of block {i} was seen")
        return made

    def _output(self) -> dict[str, Moment]:
        if self.wanted is not None and OUTPUT not in self.wanted:
            return {}
        seen: list[Sums] = []

        def fresh() -> Step:
            seen[:] = [Sums(lambda name: ((OUTPUT,), -1, 0))]

            def step(x: torch.Tensor) -> torch.Tensor:
                seen[0].next()
                seen[0].tap(self.blocks.finish(x), OUTPUT, -1, 0)
                return x

            return step

        self._pass("output", self.store.states(self.blocks.n), None, fresh)
        return seen[0].moments()

    # ---- all windows through something, in batches ----

    def _pass(self, detail: str, source: Path | None, out: Path | None, make: Callable[[], Step]) -> None:
        """Every window through a step, (B, T, C) -> (B, T, C), and the results to the file `out`.

        source  file of the windows' states; None: the step is given their tokens, (B, T)
        make    gives the step; once more when memory ran out on the way, and all starts over with smaller batches
        """
        import torch

        while True:
            try:
                with torch.no_grad(), open(out, "wb") if out else contextlib.nullcontext() as file:
                    self._once(detail, source, file, make())
                return
            except (torch.OutOfMemoryError, MemoryError):
                pass  # leave the handler first: its traceback holds the tensors
            except OSError as e:
                raise OutputError(f"{out}: {e.strerror or e}; run again to resume") from None
            self.batches.halve(detail)

    def _once(self, detail: str, source: Path | None, file: Any, step: Step) -> None:
        n = len(self.tokens)
        layer = 0 if source is None else 1 + int(source.stem.rpartition(".")[2])
        with self.blocks.fast_products():
            for rows, x in self.batches.of_file(source) if source else self.batches.of_tokens():
                self.progress("calibrating", layer * n + rows.start, self.total, detail)
                y = step(x)
                if file is not None and y is not None:
                    self.batches.write(file, y)


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

        window = self.tokens.shape[1]
        config = self.blocks.config.get_text_config()
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        values = 12 * config.hidden_size + 4 * (max(inner) if isinstance(inner, list) else inner)
        values += config.num_attention_heads * window
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
    for made, other in _SAME.items():
        found += [t.replace(made, other) for t in found if made in t]
    return tuple(t for t in found if wanted is None or t in wanted), expert, n
