"""The stage `tune`: the planes in the store, norms and biases, trained end to end (end_to_end.py)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..calibrate import ENDS, HELD_OUT, Work, explained, mapping, quiet, rows_in, whole_model
from ..codec import F32
from ..files import F32_ID, FLOAT_IDS, TensorInfo
from ..llamacpp import ggml
from ..plan import role_of
from .end_to_end import tune

MOST_HELD_OUT = 64  # windows; a measure of more would cost as much as the steps between


def run(work: Work) -> None:
    """Tune the planes in the store, norms and biases. Raises TuneError, CalibrationError, OutputError."""
    import torch

    found = work.checkpoint("--tune")
    windows = work.tune_tokens()
    held = _held_out(len(windows))
    work.progress("tuning", 0, work.how.tune_steps, "finding the model's tensors")
    with quiet(), explained(found.folder, "transformers cannot load it"):
        model = whole_model(found.folder, found.trust_code)
    params = dict(model.named_parameters())
    links: dict[str, tuple[TensorInfo, mapping.Link]] = {}  # by parameter
    fixed: dict[str, F32] = {}
    unlinked = []
    for t in work.source.tensors:
        vector = len(t.shape) == 1 and t.type == F32_ID
        planned = t.name in work.tensors and work.store.has(t.name)
        rounded = not planned and _is_rounded(work, t)
        if not (vector or planned or rounded):
            continue
        link = mapping.link(work.source, t, params.__getitem__)
        if link is None or params[link.hf].numel() != t.n_weights:
            if planned:
                unlinked.append(t.name)
        elif rounded:
            values = _rounded(work, t)
            fixed[link.hf] = np.empty_like(values)
            fixed[link.hf][rows_in(link, len(values))] = values
        else:
            links[link.hf] = (t, link)
    if unlinked:
        n = f"{len(unlinked)} tensors, e.g. {unlinked[0]}" if len(unlinked) > 1 else unlinked[0]
        work.store.say(f"{n}: not tuned, no parameter of the model is the same matrix")
    planes = {}
    for hf, (t, link) in links.items():
        if t.name in work.tensors:
            levels, codes = work.store.planes(t)
            at = rows_in(link, len(levels))
            planes[hf] = (np.empty_like(levels), np.empty_like(codes))
            planes[hf][0][at], planes[hf][1][at] = levels, codes
    del model, params
    result = tune(
        found.folder,
        planes,
        torch.from_numpy(windows[~held]),
        torch.from_numpy(windows[held]),
        work.how.tuning,
        work.device,
        work.progress,
        work.store.folder / "tuning.safetensors",
        {hf for hf, (t, _) in links.items() if len(t.shape) == 1},
        found.trust_code,
        fixed,
        work.store.kind,
    )
    for note in result.notes:
        work.store.say(note)
    for hf, tuned in result.planes.items():
        t, link = links[hf]
        at = rows_in(link, len(tuned.levels))
        work.store.put(t, tuned.levels[at], tuned.codes[at])
    for hf, values in result.vectors.items():
        t, link = links[hf]
        work.store.put_vector(t, values.numpy()[rows_in(link, t.shape[0])] + np.float32(link.offset))


def _is_rounded(work: Work, t: TensorInfo) -> bool:
    """Whether it is an embedding or output that a stock type rounds: tuning then sees what the file will hold."""
    known = work.types[t.name] in ggml.WRITABLE - ggml.NEEDS_IMPORTANCE - FLOAT_IDS
    return known and role_of(t.name) in ENDS


def _rounded(work: Work, t: TensorInfo) -> F32:
    """What the type leaves of its values without an importance, float32 (R, C)."""
    kind, w = work.types[t.name], work.weights(t)
    return ggml.dequantize(kind, ggml.quantize(kind, w, None, work.options.threads), work.options.threads)


def _held_out(n: int) -> NDArray[np.bool_]:
    """Which of n windows are measured, not tuned on. Texts take turns, so the place moves: no text has them all."""
    each = max(HELD_OUT, -(-n // MOST_HELD_OUT))
    place = np.arange(n)
    held: NDArray[np.bool_] = (place + place // each) % each == each - 1
    return held
