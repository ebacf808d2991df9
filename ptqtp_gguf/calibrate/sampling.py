"""Text that the model itself writes, to calibrate with where there is none like what it was trained on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import CalibrationError
from ..progress import Progress, no_progress
from ..source import Checkpoint, transformers_reason
from .model import WAY_OUT, quiet

BATCH = 32  # windows written together


def written(
    found: Checkpoint,
    n: int,
    window: int,
    bos: int | None,
    common: NDArray[np.int64],
    device: str = "cpu",
    seed: int = 0,
    progress: Progress = no_progress,
) -> NDArray[np.int64]:
    """n windows of tokens, int64 (n, window), sampled from the whole model at temperature 1, begun with one token each.

    bos     the first token, if the tokenizer has one
    common  tokens of some text, int64 (T,); without BOS each window begins with one of them, drawn at random
    Deterministic for one seed and device. Raises CalibrationError.
    """
    import torch
    import transformers

    with quiet():
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                found.folder, dtype="auto", local_files_only=True, trust_remote_code=found.trust_code
            ).to(device)
        except Exception as e:
            text = transformers_reason(e)
            raise CalibrationError(f"{found.folder}: transformers cannot load it: {text}; {WAY_OUT}") from None
    chance = torch.Generator().manual_seed(seed)
    if bos is not None:
        first = torch.full((n, 1), bos)
    else:
        first = torch.from_numpy(common)[torch.randint(len(common), (n, 1), generator=chance)]
    out = np.empty((n, window), np.int64)
    for begin in range(0, n, BATCH):
        last = first[begin : begin + BATCH]
        rows = out[begin : begin + BATCH]
        rows[:, 0] = last[:, 0]
        cache = None
        for t in range(1, window):
            progress("writing", begin * window + t * len(rows), n * window, "the model's own text")
            with torch.no_grad():
                got = model(last.to(device), past_key_values=cache, use_cache=True)
            cache = got.past_key_values
            weights = torch.softmax(got.logits[:, -1].float().cpu(), dim=-1)
            if not bool(torch.isfinite(weights).all()):
                raise CalibrationError(f"{found.folder}: its logits are not finite; is the model damaged?")
            last = torch.multinomial(weights, 1, generator=chance)
            rows[:, t] = last[:, 0]
    progress("writing", n * window, n * window, "")
    return out
