"""`tuned`: end to end against the full-precision model: KL divergence of the logits, on given text.

Trained are the scales, as a relative change, rounded to their 8-bit code in the forward pass with a straight-through
gradient, and what GGUF keeps as float32: norm weights and biases, as a change in units of max(|value|, the median
magnitude of their tensor). Adam with warm-up and a cosine rate. `train_planes` trains levels too: latent weights in
units of their scale, rounded to the nearest level, straight-through.

Embedding and head are trained likewise where they are planes; else the student has what the file will hold of them.

Held-out windows are measured at the start and every `every` steps; the state that was best there is the result, and
training ends when `patience` measures in a row did not improve it: the loss on the trained text falls far below.

Rates are relative, so gradients need no scale: Adam's epsilon is tiny, and a step is clipped when its gradient is
`clip` times as large as such steps have been. torch is imported inside functions only.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import __version__
from ..codec import DEFAULT, TensorType, TritPlanes
from ..errors import PtqtpError, TuneError
from ..plan import TuneSettings
from ..progress import Progress, no_progress
from ..source import stamp, transformers_reason
from .trainer import Batches, Measure, Run

if TYPE_CHECKING:
    from .student import Student

__all__ = ["Measure", "TritPlanes", "TuneSettings", "Tuned", "evaluate_kl", "tune"]

CHECK_POSITIONS = 8  # of the first window, on which logits made in pieces are compared with the model's own
_HOW = ("micro_batch", "logits_bytes", "save_seconds")  # settings that do not decide the result


@dataclass
class Tuned:
    """The best state by the held-out text. planes: the keys of the input, untouched where a note says so.
    vectors: HF name -> float32 CPU tensor of every norm weight and bias, {} if they were not trained."""

    planes: dict[str, TritPlanes]
    vectors: dict[str, Any]
    history: list[Measure]
    notes: list[str] = field(default_factory=list)


def tune(
    folder: Path,
    planes: Mapping[str, Any],
    windows: Any,
    held_out: Any,
    settings: TuneSettings | None = None,
    device: str = "cpu",
    progress: Progress = no_progress,
    state: Path | None = None,
    only_vectors: Collection[str] | None = None,
    trust_code: bool = False,
    fixed: Mapping[str, Any] | None = None,
    kind: TensorType = DEFAULT,
) -> Tuned:
    """Tune the planes of the model in a folder.

    planes    HF parameter name -> TritPlanes (or a pair alike)
    windows   int64 (N, L) token ids to train on; held_out: (M, L) to measure on, other text
    device    "cpu", "cuda", "cuda:1"
    state     file to resume from and to leave the state in, every save_seconds, on Ctrl-C and at the end (the same call
              then returns at once); the caller removes it
    only_vectors  HF names of the norms and biases that may be trained, None = all; name those that you can store
    trust_code  run Python code that the folder brings
    fixed     HF name -> embedding or head as the file holds it, (R, C), where that is neither the original nor planes
    kind      type of the planes
    Raises TuneError: what does not fit, memory, a start that is not finite; OutputError where state cannot be written.
    """
    import torch

    settings = settings or TuneSettings()
    _check_settings(settings)
    train, held = _windows(windows, "windows"), _windows(held_out, "held-out windows")
    student = _student(folder, planes, train, held, settings, device, only_vectors, trust_code, fixed, kind)
    try:
        run = Run(student, settings, train, held, progress)
        if state is not None:
            run.keep_in(state, _fingerprint(folder, planes, train, held, settings, only_vectors, fixed))
        run.go()
    except torch.cuda.OutOfMemoryError:
        raise TuneError(
            f"{folder}: the variables of tuning do not fit in the memory of {device}; use a larger GPU"
        ) from None
    except KeyboardInterrupt:
        run.save()
        raise
    return Tuned(*run.result(planes), run.history, run.notes)


def evaluate_kl(
    folder: Path,
    planes: Mapping[str, Any],
    windows: Any,
    vectors: Mapping[str, Any] | None = None,
    settings: TuneSettings | None = None,
    device: str = "cpu",
    progress: Progress = no_progress,
    kind: TensorType = DEFAULT,
) -> float:
    """Mean KL(original || planes and vectors), nats, over all positions of windows int64 (N, L). Raises TuneError."""
    import torch

    settings = settings or TuneSettings()
    ids = _windows(windows, "windows")
    student = _student(folder, planes, ids, ids, settings, device, kind=kind)
    known = {v.name: v.student for v in student.vectors}
    for name, value in (vectors or {}).items():
        if name not in known or tuple(np.shape(value)) != tuple(known[name].shape):
            raise TuneError(f"{folder}: no norm or bias {name} of shape {tuple(np.shape(value))} in this model")
        with torch.no_grad():
            known[name].copy_(torch.as_tensor(value))
    batches = Batches(student, settings)
    return batches.mean(ids, lambda done: progress("measuring", done, len(ids), ""))


def _check_settings(s: TuneSettings) -> None:
    for name in ("steps", "batch", "every", "patience", "logits_bytes"):
        if getattr(s, name) < 1:
            raise TuneError(f"tuning: {name} {getattr(s, name)}; at least 1 is needed")
    if s.form not in ("linear", "log"):
        raise TuneError(f"tuning: form '{s.form}'; there are linear, log")


def _windows(ids: Any, what: str) -> Any:
    import torch

    ids = torch.as_tensor(ids)
    if ids.ndim != 2 or ids.dtype != torch.int64 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise TuneError(
            f"tuning: {what} of shape {tuple(ids.shape)}, {ids.dtype}; expected int64 (N, L), N >= 1, L >= 2"
        )
    return ids.cpu()


def _student(
    folder: Path,
    planes: Mapping[str, Any],
    train: Any,
    held: Any,
    settings: TuneSettings,
    device: str,
    only: Collection[str] | None = None,
    trust_code: bool = False,
    fixed: Mapping[str, Any] | None = None,
    kind: TensorType = DEFAULT,
) -> Student:
    import torch

    from .student import Student

    gc.collect()  # a student refers to itself; the one before may still hold memory
    try:
        student = Student(
            folder,
            planes,
            device,
            bf16=settings.bf16 and device.startswith("cuda"),
            vectors=settings.train_vectors,
            latent=settings.latent_start if settings.train_planes else None,
            logits_bytes=settings.logits_bytes,
            only=only,
            trust_code=trust_code,
            fixed=fixed,
            kind=kind,
        )
        for ids in (train, held):
            if int(ids.min()) < 0 or int(ids.max()) >= student.embeddings:
                raise TuneError(
                    f"tuning: token {int(ids.max())}, and the model of {folder} has {student.embeddings}; was the text "
                    "tokenized for another model?"
                )
        student.check(train[0, :CHECK_POSITIONS])
    except torch.cuda.OutOfMemoryError:
        raise TuneError(
            f"{folder}: the model does not fit in the memory of {device}; take a larger GPU, or cpu"
        ) from None
    except (PtqtpError, MemoryError):
        raise
    except Exception as e:  # of a family that is not as this expects
        why = transformers_reason(e) or "no reason given"
        raise TuneError(f"{folder}: this model cannot be tuned: {type(e).__name__}: {why}") from e
    return student


def _fingerprint(
    folder: Path,
    planes: Mapping[str, Any],
    train: Any,
    held: Any,
    settings: TuneSettings,
    only: Collection[str] | None,
    fixed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that decides the result, as JSON."""
    of_planes = hashlib.sha256()
    for name, values in sorted((fixed or {}).items()):
        of_planes.update(name.encode())
        of_planes.update(np.ascontiguousarray(values).data)
    for name in sorted(planes):
        of_planes.update(name.encode())
        for part in planes[name][:2]:
            of_planes.update(np.ascontiguousarray(part).data)
    text = hashlib.sha256(np.ascontiguousarray(train).data)
    text.update(np.ascontiguousarray(held).data)
    job = {
        "ptqtp-gguf": __version__,
        "model": stamp(folder),
        "vectors": "all" if only is None else sorted(only),
        "planes": of_planes.hexdigest(),
        "text": [list(train.shape), list(held.shape), text.hexdigest()],
        "settings": {k: v for k, v in asdict(settings).items() if k not in _HOW},
    }
    return json.loads(json.dumps(job))  # type: ignore[no-any-return]  # tuples become lists, as in the file
