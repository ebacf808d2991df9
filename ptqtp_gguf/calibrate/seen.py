"""What the runtime has seen of one source: text as tokens, moments of its matrices' inputs, what errors are worth.

.NAME.moments/   beside the target; removed when the target is complete
  model.gguf     a checkpoint as the runtime can open it
  tokens         int64, windows
  moments/       unless they have a folder of the user's (`--hessians`)
  worth.json     what an error in each matrix does to the output
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..codec import F32
from ..errors import CalibrationError, InputError, OutputError, RecipeError, RuntimeMissing
from ..files import TYPE_IDS, TensorInfo, parse_json, read_whole, system_errors, write_text
from ..llamacpp import Model, install
from ..plan import DEFAULT_EFFORT, TOKENS_OF, Request, Role, role_of
from ..progress import Progress
from ..source import Importance, Source, checkpoint
from ..system import free_memory
from . import texts
from .gather import gather, identity_of, key_of, probe
from .moments import SUM_BYTES, SUM_COLS, Moments, read_index
from .tokenizers import RuntimeTokenizer

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
WINDOW = 512  # tokens a window; many short ones see more kinds of text than few long ones
BESIDES = 1 << 30  # bytes of memory beside weights and sums
SECOND_ORDER = 0.5  # error of second order over that of search, typically (docs/results/calibration.md)
MAX_WORTH = 16 << 20
STOCK_LINE = re.compile(r"^\[ *\d+/ *\d+\] +(\S+) +- .*-> .*\((\w+)\)", re.MULTILINE)


def moments_folder(out: Path) -> Path:
    return out.with_name(f".{out.name}.moments")


def remove_moments(out: Path) -> None:
    """Raises OSError where something is left."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(moments_folder(out))


class Seen:
    """The text of a request through the source's model, as far as it is asked for.

    Where moments are given without text, they are taken as they are, and no model is run. `begin` comes first. Raises
    CalibrationError, OutputError.
    """

    def __init__(self, source: Source, request: Request, out: Path, progress: Progress) -> None:
        self.source, self.how, self.options, self.progress = source, request.calibration, request.options, progress
        self.folder = moments_folder(out)
        self._moments_in = self.how.hessians or self.folder / "moments"

    def begin(self) -> None:
        """Make the folder, or take up what the same run has left in it; another's, which nothing waits for, goes."""
        with system_errors(self.folder):
            self.folder.mkdir(exist_ok=True)
            stamp = json.dumps([self.source.stamp, self.how.decisive(), self.how.effort], default=str)
            path = self.folder / "of.json"
            if not path.exists() or path.read_text() != stamp:
                shutil.rmtree(self.folder)
                self.folder.mkdir()
                write_text(path, stamp)

    @property
    def wanted(self) -> dict[str, TensorInfo]:
        """Matrices whose inputs can be seen: those of blocks, and the output."""
        tensors = self.source.tensors
        tied = all(t.name != OUTPUT for t in tensors)
        return {
            t.name: t
            for t in tensors
            if len(t.shape) > 1
            and t.name.endswith(".weight")
            and (role_of(t.name) in (Role.BLOCK, Role.OUTPUT) or (tied and t.name == EMBEDDING))
        }

    @functools.cached_property
    def model_file(self) -> Path:
        """The source as a GGUF file, which the runtime can open."""
        path = self.folder / "model.gguf"
        need, free = sum(t.nbytes for t in self.source.tensors), shutil.disk_usage(self.folder).free
        if self.how.by_default and not path.exists() and not checkpoint.is_gguf(self.source.path) and need > free:
            raise CalibrationError(f"{self.folder}: {need / 1e6:.0f} MB needed for the model, {free / 1e6:.0f} MB free")
        with system_errors(path):
            return path if path.exists() else self.source.as_file(path, self.progress)

    @functools.cached_property
    def tokens(self) -> NDArray[np.int64]:
        """Windows, int64 (N, window)."""
        path = self.folder / "tokens"
        return texts.kept(path, self.how.window or WINDOW, path.exists(), self._tokenized)

    def _tokenized(self) -> NDArray[np.int64]:
        n = self.how.tokens or TOKENS_OF[self.how.effort or DEFAULT_EFFORT]
        found = [texts.load(t, lambda line: self.progress("calibration text", 0, 0, line)) for t in self.how.texts]
        template = self.source.get("tokenizer.chat_template")
        if not isinstance(self.source.get("tokenizer.ggml.model"), str):
            raise CalibrationError(f"{self.source.path}: has no tokenizer, so no text can run through it")
        try:
            with Model(self.model_file, vocabulary_only=True) as model:
                by = RuntimeTokenizer(model, template if isinstance(template, str) else None)
                return texts.tokens(found, by, self.how.window or WINDOW, n, progress=self.progress)
        except InputError as e:
            raise CalibrationError(f"{self.source.path}: {e}") from None

    @functools.cached_property
    def moments(self) -> Moments:
        """Complete; gathered now unless they are there."""
        if self.how.texts:
            self._require_memory()
            tokens, wanted = self.tokens, self.wanted
            index = read_index(self._moments_in)
            if index is None or not index.complete:
                way = " (--effort none goes without)" if self.how.by_default else ""
                said = f"{tokens.size} tokens of {', '.join(self.how.texts)} through the model{way}"
                self.progress("calibrating", 0, 0, said)
            key = key_of(identity_of(self.model_file), tokens, wanted)
            gather(
                self.model_file,
                tokens,
                wanted,
                self._moments_in,
                key,
                threads=self.options.threads,
                progress=self.progress,
            )
        return Moments(self._moments_in)

    def _require_memory(self) -> None:
        """Raises CalibrationError where nobody asked for this and the model does not fit into memory."""
        sums = sum(4 * t.shape[0] ** 2 for t in self.wanted.values() if t.shape[0] <= SUM_COLS)
        need = sum(t.nbytes for t in self.source.tensors) + min(SUM_BYTES, sums) + BESIDES
        limit = self.options.max_memory or free_memory()
        if limit and need > limit and self.how.by_default:
            raise CalibrationError(
                f"running the model takes {need / 1e9:.1f} GB of memory, {limit / 1e9:.1f} GB are there; "
                "--effort normal does it all the same, slowly"
            )

    def effects(self) -> Effects:
        """What errors in each matrix do to the output."""
        path = self.folder / "worth.json"
        if not path.exists():
            names = [*self.wanted, *(t.name for t in self.source.tensors if t.name == EMBEDDING)]
            window = self.tokens[len(self.tokens) // 2]
            found = probe(
                self.model_file, window, list(dict.fromkeys(names)), self.folder, self.options.threads, self.progress
            )
            with system_errors(path):
                write_text(path, json.dumps(found))
        return Effects(self.moments, _worth(path), self.model_file)


def _worth(path: Path) -> dict[str, float]:
    try:
        found = dict(parse_json(read_whole(path, MAX_WORTH, OutputError)))
        if not all(isinstance(v, (int, float)) and math.isfinite(v) and v >= 0 for v in found.values()):
            raise ValueError("no numbers")
        return {str(k): float(v) for k, v in found.items()}
    except (ValueError, TypeError, OverflowError):
        raise OutputError(f"{path}: damaged; start over with --restart") from None


class Effects:
    """What fit_budget asks (plan/budget.py): errors by what they do to the model's output."""

    ours = SECOND_ORDER

    def __init__(self, moments: Moments, worth: dict[str, float], model: Path | None = None) -> None:
        self.moments, self._worth, self._model = moments, worth, model
        self._of = {name: of for of in moments for name in of.tensors}
        self._usual = float(np.median(list(worth.values()))) if worth else 1.0

    def worth(self, t: TensorInfo) -> float:
        """KL divergence of the model for a relative squared error of 1 in the outputs of a matrix."""
        return self._worth.get(t.name, self._usual)

    def stock(self, name: str) -> dict[str, int]:
        """Types by tensor of the file that llama-quantize makes as `name`, such as Q4_K_M. Raises RecipeError."""
        assert self._model
        try:
            told = install.run_tool("llama-quantize", "--dry-run", str(self._model), name)
        except RuntimeMissing:
            raise RecipeError(
                f"--as-good-as {name}: llama-quantize knows no such type; give one as Q4_0 or Q4_K_M"
            ) from None
        found = {m[1]: TYPE_IDS.get(m[2].upper()) for m in STOCK_LINE.finditer(told)}
        return {n: t for n, t in found.items() if t is not None}

    def importance(self, t: TensorInfo, kind: int) -> Importance | None:
        """Mean square of each input; None where it was not seen."""
        of = self._of.get(t.name)
        if of is None or of.cols != t.shape[0]:
            return None
        rows = t.n_weights // t.shape[0] // len(of.counts)
        diagonals = np.stack([self.moments.diagonal(of, e) for e in range(len(of.counts))])
        unseen = tuple(e for e, d in enumerate(diagonals) if not (np.isfinite(d).all() and d.max(initial=0) > 0))
        if len(unseen) == len(diagonals):
            return None
        counts = np.array([max(1, self.moments.tokens(of, e)) for e in range(len(diagonals))])
        values = np.ascontiguousarray(diagonals / counts[:, None], np.float32)
        values[list(unseen)] = 1
        return Importance(values, rows, unseen)

    def power(self, t: TensorInfo, expert: int, w: F32) -> float | None:
        """Energy of the outputs of some rows w (R, C) over the text, in the unit of `importance`; None: not seen."""
        of = self._of.get(t.name)
        if of is None or of.cols != t.shape[0]:
            return None
        return self.moments.energy(of, w, expert) / max(1, self.moments.tokens(of, expert))
