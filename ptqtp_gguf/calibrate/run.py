"""Planes by calibration and tuning, made before a conversion takes them up: text -> moments -> planes (-> tuned ones).

With a checkpoint the model is calibrated in order (inorder.py), and what is finished is kept block by block. With a
folder of second moments (`--hessians`) they are gathered first, or found there, and all is quantized from them.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..codec import native
from ..codec import types as fmt
from ..codec.arrays import F32, U8
from ..errors import CalibrationError, OutputError, QuantizeError
from ..files.gguf import F32_ID, FLOAT_IDS, TensorInfo
from ..files.reading import read_whole
from ..files.writing import partial_file
from ..llamacpp import ggml
from ..plan.options import TOKENS_CPU, TOKENS_GPU, Calibration, Options
from ..plan.roles import Role, role_of
from ..plan.rows import Below, PlanRow
from ..progress import Progress
from ..quantize import gptq as calibrated
from ..quantize.pieces import FLOOR, to_float
from ..source import checkpoint
from ..source.base import Source
from ..source.checkpoint import Checkpoint
from ..source.identity import fingerprint
from ..tune.run import tune
from . import names as mapping
from . import texts
from .gather import walk
from .in_order import Stage, has_streams, in_order
from .model import quiet
from .moments import Moment, open_moments
from .store import PlaneStore, unpacked
from .token_weights import Weights, token_weights

if TYPE_CHECKING:
    import torch

MIN_TOKENS = 64  # an expert that saw fewer is quantized by search
MAX_TOKENS = 1 << 32  # bytes of the tokens that are kept
HELD_OUT = 16  # one window of so many is never tuned on, but measured
ENDS = (Role.EMBEDDING, Role.OUTPUT)  # not in a block: no calibration sees them, tuning does
MOST_HELD_OUT = 64  # windows; a measure of more would cost as much as the steps between


@contextmanager
def prepared(
    source: Source, out: Path, rows: list[PlanRow], options: Options, progress: Progress
) -> Iterator[PlaneStore]:
    """Calibrate, and tune, as the options say. Resumable. The store's notes tell what did not go as it should.

    Raises CalibrationError, QuantizeError, TuneError, OutputError,
    ResumeError.
    """
    how = options.calibration
    job = {**fingerprint(source, how.decisive()), "tensors": _named(rows)}
    with PlaneStore(out, job, options.restart) as store:
        if not store.marked("tuned" if how.tune else "calibrated"):
            work = _Work(source, rows, options, store, progress)
            work.calibrate()
            if how.tune:
                work.tune()
        yield store


def _named(rows: list[PlanRow]) -> str:
    names = "\n".join(r.tensor.name for r in rows if r.choice.type == fmt.TP2_1.id)
    return hashlib.sha256(names.encode()).hexdigest()


class _Work:
    def __init__(
        self, source: Source, rows: list[PlanRow], options: Options, store: PlaneStore, progress: Progress
    ) -> None:
        self.source, self.options, self.store, self.progress = source, options, store, progress
        self.how: Calibration = options.calibration
        self.tensors = {r.tensor.name: r.tensor for r in rows if r.choice.type == fmt.TP2_1.id}
        self.types = {r.tensor.name: r.choice.type for r in rows}
        self.device = _device(options.device)
        self.n_tokens = self.how.tokens or (TOKENS_CPU if self.device == "cpu" else TOKENS_GPU)
        self.found = None if checkpoint.is_gguf(source.path) else checkpoint.check(source.path, options.trust_code)
        self.texts = self._load(self.how.texts)
        self.tune_texts = self._load(self.how.tune_texts) or self.texts
        arch, layers = source.get("general.architecture"), None
        if isinstance(arch, str):
            layers = source.get(f"{arch}.block_count")
        if not isinstance(arch, str) or not isinstance(layers, int) or not 0 < layers <= len(source.tensors):
            raise CalibrationError(f"{source.path}: the metadata do not tell architecture and number of blocks")
        self.arch, self.layers = arch, layers
        _use_threads(options.threads)

    def _load(self, specs: tuple[str, ...]) -> list[texts.Text]:
        return [texts.load(t, lambda line: self.progress("calibration text", 0, 0, line)) for t in specs]

    def _checkpoint(self, why: str) -> Checkpoint:
        if self.found is None:
            raise CalibrationError(
                f"{self.source.path}: {why} runs the model, which takes a checkpoint folder; for a GGUF give "
                "--imatrix, or --hessians with second moments that were gathered from the checkpoint"
            )
        return self.found

    def _tokens(self) -> NDArray[np.int64]:
        """Windows to calibrate on."""
        if self.how.tune:
            self._tune_tokens()  # too little of it should be told before anything long begins
        most = max(self.n_tokens, self.how.tune_tokens if self.how.tune and not self.how.tune_texts else 0)
        return self._windows("tokens", self.texts, most)[: max(1, self.n_tokens // self.how.window)]

    def _tune_tokens(self) -> NDArray[np.int64]:
        """Windows to tune on; where the text is that of the calibration, its windows are the first of these."""
        n, own = self.how.tune_tokens, bool(self.how.tune_texts)
        name, most = ("tune-tokens", n) if own else ("tokens", max(self.n_tokens, n))
        windows = self._windows(name, self.tune_texts, most)[: n // self.how.window]
        if len(windows) < HELD_OUT:
            raise CalibrationError(
                f"--tune: {len(windows)} windows of {self.how.window} tokens; at least {HELD_OUT} are needed, give "
                "more text"
            )
        return windows

    def _windows(self, name: str, of: list[texts.Text], n: int) -> NDArray[np.int64]:
        path = self.store.folder / name
        if not self.store.marked(name):
            found = self._checkpoint("--calib")
            windows = texts.tokens(of, found, self.how.window, n, device=self.device, progress=self.progress)
            with partial_file(path) as partial:
                partial.file.write(np.ascontiguousarray(windows, "<i8").data)
                partial.sync()
                partial.publish()
            self.store.mark(name)
        raw = read_whole(path, MAX_TOKENS, OutputError)
        if not raw or len(raw) % (8 * self.how.window):
            raise OutputError(f"{path}: damaged; begin anew with --restart")
        held: NDArray[np.int64] = np.frombuffer(raw, "<i8").astype(np.int64).reshape(-1, self.how.window)
        return held

    # ---- calibration ----

    def calibrate(self) -> None:
        if self.store.marked("calibrated"):
            return
        if self.how.hessians:
            self._from_moments(self.how.hessians)
        else:
            self._in_order()
        missing = [n for n in self.tensors if not self.store.has(n)]
        if len(missing) == len(self.tensors):
            raise CalibrationError(f"{self.source.path}: no matrix was seen by the calibration; give --imatrix instead")
        if self.how.tune:
            missing = [n for n in missing if not self._begin(self.tensors[n])]
        if missing:
            n = f"{len(missing)} tensors, as {missing[0]}" if len(missing) > 1 else missing[0]
            self.store.say(f"{n}: not seen by the calibration, or not fit for TP2_1; left to search")
        self.store.mark("calibrated")

    def _begin(self, t: TensorInfo) -> bool:
        """Planes by search for an embedding or output, which tuning begins with; whether they were made."""
        if role_of(t.name) not in ENDS or not self._fits(t, w := self._weights(t)):
            return False
        self.store.put(t, *self._searched(w))
        return True

    def _searched(self, w: F32) -> tuple[NDArray[np.int8], U8]:
        return unpacked(native.quantize(fmt.TP2_1, "search", w, None, self.options.threads))

    def _from_moments(self, folder: Path) -> None:
        for moments in self._moments(folder):
            for group in _by_input(moments):
                self._quantize({n: moments[n] for n in group if n in self.tensors}, None)

    def _moments(self, folder: Path) -> Iterator[dict[str, Moment]]:
        """Those of a folder, a layer at a time; gathered first where there is text."""
        if not self.texts:
            yield from open_moments(folder)
            return
        found = self._checkpoint("--calib")
        tokens = self._tokens()
        wanted = list(self.tensors)
        for layer in walk(found, tokens, self.arch, wanted, device=self.device, folder=folder, progress=self.progress):
            yield layer.moments

    def _in_order(self) -> None:
        found = self._checkpoint("--calib")
        tokens = self._tokens()
        first = self.store.blocks
        if first and not has_streams(self.store.folder, first):
            raise CalibrationError(
                f"{self.store.folder}: the streams of block {first} are lost; begin anew with --restart"
            )
        weights = self._token_weights(found, tokens)
        name = mapping.names(self.arch, self.layers)
        for stage in in_order(
            found, tokens, name, self.tensors, self.store.folder, first=first, finished=self.store.end_block,
            weights=weights, device=self.device, progress=self.progress,
        ):  # fmt: skip
            self._quantize(stage.moments, stage.cross)
            stage.replace(self._replaced(stage))

    def _token_weights(self, found: Checkpoint, tokens: NDArray[np.int64]) -> Weights:
        if not self.how.fisher:
            return {}
        path = self.store.folder / "weights.npz"
        if not self.store.marked("weights"):
            weights = token_weights(found.folder, tokens, self.device, self.progress, found.trust_code)
            with open(path, "wb") as f:
                np.savez(f, **{k: v.astype(np.float32) for k, v in weights.items()})  # type: ignore[arg-type]
            self.store.mark("weights")
        try:
            with np.load(path) as held:
                return {k: held[k] for k in held.files}
        except OSError as e:
            raise OutputError(f"{path}: {e.strerror or 'damaged'}; begin anew with --restart") from None
        except (ValueError, EOFError, KeyError, AttributeError, zipfile.BadZipFile):
            raise OutputError(f"{path}: damaged; begin anew with --restart") from None

    def _quantize(self, moments: dict[str, Moment], cross: torch.Tensor | None) -> None:
        """Tensors of one input; all again where one is missing: products of other shapes may round otherwise."""
        import torch

        if all(self.store.has(n) for n in moments):
            return
        todo = {n: self._weights(self.tensors[n]) for n in moments}
        todo = {n: w for n, w in todo.items() if self._fits(self.tensors[n], w)}
        flat = {n: w for n, w in todo.items() if moments[n].h.ndim == 2}
        if flat:
            m = moments[next(iter(flat))]
            w = torch.from_numpy(np.concatenate(list(flat.values()))).to(self.device)
            planes = self._planes(next(iter(flat)), w, m.h.to(self.device), cross)
            cuts = np.cumsum([len(v) for v in flat.values()])[:-1].tolist()
            for n, levels, codes in zip(
                flat,
                np.split(planes.levels.cpu().numpy(), cuts),
                np.split(planes.codes.cpu().numpy(), cuts),
                strict=True,
            ):
                self.store.put(self.tensors[n], levels, codes)
        for n in todo:
            if n not in flat and not self.store.has(n):
                self._experts(n, todo[n], moments[n])

    def _planes(self, name: str, w: torch.Tensor, h: torch.Tensor, cross: torch.Tensor | None) -> calibrated.Planes:
        try:
            return calibrated.calibrate(w, h, cross, self.how.settings, self.options.threads)
        except QuantizeError as e:
            raise QuantizeError(f"tensor {name}: {e}") from None

    def _experts(self, name: str, w: F32, m: Moment) -> None:
        import torch

        few = m.few(MIN_TOKENS)
        levels, codes = [], []
        for e, part in enumerate(np.split(w, len(m.counts))):
            if e in few:
                found, c = self._searched(part)
                levels.append(found)
                codes.append(c)
                continue
            planes = self._planes(name, torch.from_numpy(part).to(self.device), m.h[e].to(self.device), None)
            levels.append(planes.levels.cpu().numpy())
            codes.append(planes.codes.cpu().numpy())
        if few:
            shown = ", ".join(map(str, few[:5])) + (" ..." if len(few) > 5 else "")
            note = f"{name}: {len(few)} experts ({shown}) saw fewer than {MIN_TOKENS} tokens: by search"
            self.store.say(note)
            self.progress("calibrating", 0, 0, note)
        self.store.put(self.tensors[name], np.concatenate(levels), np.concatenate(codes))

    def _weights(self, t: TensorInfo) -> F32:
        """All of a tensor, float32 (R, C)."""
        return np.concatenate([to_float(raw, t.type, self.options.threads) for raw in self.source.pieces(t)])

    def _is_rounded(self, t: TensorInfo) -> bool:
        """Whether it is an embedding or output that a stock type rounds: tuning then sees what the file will hold."""
        known = self.types[t.name] in ggml.WRITABLE - ggml.NEEDS_IMPORTANCE - FLOAT_IDS
        return known and role_of(t.name) in ENDS

    def _rounded(self, t: TensorInfo) -> F32:
        """What the type leaves of its values without an importance, float32 (R, C)."""
        kind, w = self.types[t.name], self._weights(t)
        return ggml.dequantize(kind, ggml.quantize(kind, w, None, self.options.threads), self.options.threads)

    def _fits(self, t: TensorInfo, w: F32) -> bool:
        """Whether TP2_1 can hold it; what it cannot, the conversion lets fall back."""
        below = Below(fmt.TP2_1.id)
        seen = native.scan(w.reshape(-1), fmt.TP2_1.group, FLOOR, self.options.threads)
        return seen.bad < 0 and not (below.why(seen.largest, seen.groups, seen.below) or below.why_at_end())

    def _replaced(self, stage: Stage) -> dict[str, torch.Tensor]:
        """The stage's parameters with the planes in them."""
        import torch

        new: dict[str, torch.Tensor] = {}
        for n, full_name in stage.params.items():
            t = self.tensors[n]
            link = mapping.link(self.source, t, stage.parameter) if self.store.has(n) else None
            if link is None or link.hf != full_name:
                continue
            levels, codes = self.store.planes(t)
            w = calibrated.Planes(torch.from_numpy(levels), torch.from_numpy(codes)).weights()
            if full_name not in new:
                new[full_name] = stage.parameter(full_name).detach().float().cpu().clone()
            flat = new[full_name].reshape(-1, t.shape[0])
            flat[_rows(link, len(w))] = w
        return new

    # ---- tuning ----

    def tune(self) -> None:
        if self.store.marked("tuned"):
            return
        import torch
        import transformers

        found = self._checkpoint("--tune")
        windows = self._tune_tokens()
        held = _held_out(len(windows))
        self.progress("tuning", 0, self.how.tune_steps, "finding the model's tensors")
        with quiet():
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                found.folder, local_files_only=True, trust_remote_code=found.trust_code, dtype="auto"
            )
        params = dict(model.named_parameters())
        links: dict[str, tuple[TensorInfo, mapping.Link]] = {}  # by parameter
        fixed: dict[str, F32] = {}
        unlinked = []
        for t in self.source.tensors:
            vector = len(t.shape) == 1 and t.type == F32_ID
            planned = t.name in self.tensors and self.store.has(t.name)
            rounded = not planned and self._is_rounded(t)
            if not (vector or planned or rounded):
                continue
            link = mapping.link(self.source, t, params.__getitem__)
            if link is None or params[link.hf].numel() != t.n_weights:
                if planned:
                    unlinked.append(t.name)
            elif rounded:
                values = self._rounded(t)
                fixed[link.hf] = np.empty_like(values)
                fixed[link.hf][_rows(link, len(values))] = values
            else:
                links[link.hf] = (t, link)
        if unlinked:
            n = f"{len(unlinked)} tensors, as {unlinked[0]}" if len(unlinked) > 1 else unlinked[0]
            self.store.say(f"{n}: not tuned, no parameter of the model is the same matrix")
        planes = {}
        for hf, (t, link) in links.items():
            if t.name in self.tensors:
                levels, codes = self.store.planes(t)
                at = _rows(link, len(levels))
                planes[hf] = (np.empty_like(levels), np.empty_like(codes))
                planes[hf][0][at], planes[hf][1][at] = levels, codes
        del model, params
        result = tune(
            found.folder, planes, torch.from_numpy(windows[~held]), torch.from_numpy(windows[held]),
            self.how.tuning, self.device, self.progress, self.store.folder / "tuning.safetensors",
            {hf for hf, (t, _) in links.items() if len(t.shape) == 1}, found.trust_code, fixed,
        )  # fmt: skip
        for note in result.notes:
            self.store.say(note)
        for hf, tuned in result.planes.items():
            t, link = links[hf]
            at = _rows(link, len(tuned.levels))
            self.store.put(t, tuned.levels[at], tuned.codes[at])
        for hf, values in result.vectors.items():
            t, link = links[hf]
            self.store.put_vector(t, values.numpy()[_rows(link, t.shape[0])] + np.float32(link.offset))
        self.store.mark("tuned")


def _held_out(n: int) -> NDArray[np.bool_]:
    """Which of n windows are measured, not tuned on. Texts take turns, so the place moves: no text has them all."""
    each = max(HELD_OUT, -(-n // MOST_HELD_OUT))
    place = np.arange(n)
    held: NDArray[np.bool_] = (place + place // each) % each == each - 1
    return held


def _by_input(moments: dict[str, Moment]) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for n, m in moments.items():
        groups.setdefault(m.shared, []).append(n)
    return list(groups.values())


def _rows(link: mapping.Link, n: int) -> NDArray[np.int64]:
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


def _use_threads(threads: int) -> None:
    import torch

    if threads:
        torch.set_num_threads(threads)
