"""What every stage that makes planes is given: the source, the plan, the store, text in windows of tokens.

A stage is a module with a function `run(work)` that leaves better planes in the store: calibrate/run.py, tune/run.py.
quantize/methods.py says which stages a method has.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..codec import F32, I8, TYPES, U8, TensorType, native
from ..errors import CalibrationError, QuantizeError
from ..files import TensorInfo
from ..plan import TOKENS_CPU, TOKENS_GPU, Below, Calibration, PlanRow, Request
from ..progress import Progress
from ..quantize import FLOOR, methods, to_float
from ..source import Checkpoint, Source, checkpoint
from . import texts
from .mapping import Link
from .seen import Seen
from .store import PlaneStore, unpacked
from .texts import Text

NEEDS_FOLDER = "runs the model, which takes a checkpoint folder; for a GGUF give --calib TEXT alone"
GPU_NODES = "nvidia[0-9]*"
MIN_TOKENS = 64  # a matrix, or an expert, that saw fewer is quantized by search
FEW = f"fewer than {MIN_TOKENS} tokens were seen"
HELD_OUT = 16  # one window of so many is never tuned on, but measured


class Work:
    """The common ground of the stages of one conversion.

    kinds    name -> type, of those that become planes by a stage
    direct   the data-free method for what a stage cannot do
    tensors  name -> tensor, of the same
    types    name -> ggml type id that each tensor becomes
    seen     what the runtime has seen, where the model is not calibrated in order
    arch, layers  the model's architecture by GGUF's name, and its number of blocks
    Raises CalibrationError, QuantizeError, InputError.
    """

    def __init__(
        self,
        source: Source,
        rows: list[PlanRow],
        request: Request,
        store: PlaneStore,
        progress: Progress,
        seen: Seen | None = None,
    ) -> None:
        self.source, self.options, self.store, self.progress = source, request.options, store, progress
        self.how: Calibration = request.calibration
        self.seen, self.window = seen, self.how.window or texts.WINDOW
        self.kinds, self.direct = planned(rows, request), request.direct
        self.tensors = {r.tensor.name: r.tensor for r in rows if r.tensor.name in self.kinds}
        self.types = {r.tensor.name: r.choice.type for r in rows}
        self._found = (
            None if checkpoint.is_gguf(source.path) else checkpoint.check(source.path, self.options.trust_code)
        )
        if seen is None:
            _ = self.tune_texts  # what cannot be read is told before anything long begins
        arch, layers = source.get("general.architecture"), None
        if isinstance(arch, str):
            layers = source.get(f"{arch}.block_count")
        if not isinstance(arch, str) or not isinstance(layers, int) or not 0 < layers <= len(source.tensors):
            raise CalibrationError(f"{source.path}: the metadata do not tell architecture and number of blocks")
        self.arch, self.layers = arch, layers

    @functools.cached_property
    def device(self) -> str:
        """torch's device; its threads are set. Raises QuantizeError."""
        import torch

        if self.options.threads:
            torch.set_num_threads(self.options.threads)
        return _device(self.options.device)

    @property
    def n_tokens(self) -> int:
        """Tokens to calibrate on in order, at most."""
        return self.how.tokens or (TOKENS_CPU if self.device == "cpu" else TOKENS_GPU)

    @functools.cached_property
    def texts(self) -> list[Text]:
        """What to calibrate on."""
        return self._load(self.how.texts)

    @functools.cached_property
    def tune_texts(self) -> list[Text]:
        """What to tune on."""
        return self._load(self.how.tune_texts) or self.texts

    def _load(self, specs: tuple[str, ...]) -> list[Text]:
        return [texts.load(t, lambda line: self.progress("calibration text", 0, 0, line)) for t in specs]

    def checkpoint(self, why: str) -> Checkpoint:
        """The checkpoint folder behind the source. why: the option that needs it. Raises CalibrationError."""
        if self._found is None:
            raise CalibrationError(f"{self.source.path}: {why} {NEEDS_FOLDER}")
        return self._found

    def tokens(self) -> NDArray[np.int64]:
        """Windows to calibrate on, int64 (N, window)."""
        if self.how.tune:
            self.tune_tokens()  # too little of it should be reported before anything long begins
        most = max(self.n_tokens, self.how.tune_tokens if self.how.tune and not self.how.tune_texts else 0)
        return self._windows("tokens", self.texts, most)[: max(1, self.n_tokens // self.window)]

    def tune_tokens(self) -> NDArray[np.int64]:
        """Windows to tune on, int64 (N, window); of the same text, those of the calibration are the first of these."""
        n, own = self.how.tune_tokens, bool(self.how.tune_texts)
        name, most = ("tune-tokens", n) if own else ("tokens", max(self.n_tokens, n))
        windows = self._windows(name, self.tune_texts, most)[: n // self.window]
        if len(windows) < HELD_OUT:
            raise CalibrationError(
                f"--tune: {len(windows)} windows of {self.window} tokens; at least {HELD_OUT} are needed, give "
                "more text"
            )
        return windows

    def _windows(self, name: str, of: list[Text], n: int) -> NDArray[np.int64]:
        def made() -> NDArray[np.int64]:
            found = self.checkpoint("--calib")
            return texts.tokens(of, found, self.window, n, device=self.device, progress=self.progress)

        windows = texts.kept(self.store.folder / name, self.window, self.store.marked(name), made)
        if not self.store.marked(name):
            self.store.mark(name)
        return windows

    def weights(self, t: TensorInfo) -> F32:
        """All of a tensor, float32 (R, C)."""
        return np.concatenate([to_float(raw, t.type, self.options.threads) for raw in self.source.pieces(t)])

    def say_experts(self, name: str, experts: list[int], why: str) -> None:
        """Keep for the user which experts of a tensor are quantized by search."""
        if experts:
            shown = ", ".join(map(str, experts[:5])) + (" ..." if len(experts) > 5 else "")
            self.store.say(f"{name}: {len(experts)} experts ({shown}) by search: {why}")

    def fits(self, name: str, w: F32) -> bool:
        """Whether a tensor's type can hold its weights; what it cannot, the conversion lets fall back."""
        kind = self.kinds[name]
        below = Below(kind.id)
        seen = native.scan(w.reshape(-1), kind.group, FLOOR, self.options.threads)
        return seen.bad < 0 and not (below.why(seen.largest, seen.groups, seen.below) or below.why_at_end())

    def searched(self, name: str, w: F32) -> tuple[I8, U8]:
        """Planes without calibration: float32 (R, C) -> levels int8 (R, C), codes uint8 (R, C/32)."""
        return self.searched_as(self.kinds[name], w)

    def searched_as(self, kind: TensorType, w: F32) -> tuple[I8, U8]:
        """The same for a type with levels."""
        return unpacked(kind, methods.quantize(kind, self.direct, w, threads=self.options.threads))


def goes_in_order(source: Source, request: Request) -> bool:
    """Whether a model is calibrated in order, by transformers; else from what the runtime sees."""
    how = request.calibration
    if how.hessians or checkpoint.is_gguf(source.path) or importlib.util.find_spec("torch") is None:
        return False
    if how.tune or how.effort == "best" or texts.SELF in how.texts:
        return True
    device = request.options.device
    return _gpu_here(device) and _device(device) == "cuda"


def require_checkpoint(source: Source, request: Request) -> None:
    """Before anything long begins. Raises CalibrationError where transformers is to run a model that it cannot."""
    how = request.calibration
    why = "--tune" if how.tune else "--calib self" if texts.SELF in how.texts and not Path(texts.SELF).exists() else ""
    if why and checkpoint.is_gguf(source.path):
        raise CalibrationError(f"{source.path}: {why} {NEEDS_FOLDER}")
    if why and importlib.util.find_spec("torch") is None:
        raise CalibrationError(f"{source.path}: {why} runs the model by transformers; pip install 'ptqtp-gguf[hf]'")


def planned(rows: list[PlanRow], request: Request) -> dict[str, TensorType]:
    """Names and types of the tensors that become planes by the method's stages; tuning knows one type at a time."""
    types = {r.tensor.name: TYPES[r.choice.type] for r in rows if r.choice.type in TYPES}
    return {n: t for n, t in types.items() if t == request.kind or (t.calibratable and not request.calibration.tune)}


def rows_in(link: Link, n: int) -> NDArray[np.int64]:
    """Where the n rows of a GGUF tensor stand in the parameter."""
    return np.arange(link.start, link.start + n) if link.rows is None else link.rows


def _device(name: str) -> str:
    """torch's device for --device. Raises QuantizeError."""
    import torch

    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        raise QuantizeError("--device cuda: torch sees no CUDA device here; use --device cpu")
    return "cuda"


def _gpu_here(device: str) -> bool:
    """Whether it is worth it to ask torch for a GPU, which takes seconds."""
    return device == "cuda" or (device == "auto" and any(Path("/dev").glob(GPU_NODES)))
