"""Text that the model itself writes, to calibrate with where there is none like what it was trained on."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CalibrationError
from ..progress import Progress, no_progress
from ..source import Checkpoint
from .model import explained, quiet, whole_model

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
    Written by transformers' `generate`, which knows what each family keeps of the tokens before. Deterministic for one
    seed and device. Raises CalibrationError.
    """
    import torch
    import transformers

    out = np.empty((n, window), np.int64)
    begin = 0

    def watch(ids: Any, logits: Any) -> Any:
        progress("writing", begin * window + ids.numel(), n * window, "the model's own text")
        if not bool(torch.isfinite(logits).any(dim=-1).all()) or bool(logits.isnan().any()):
            raise CalibrationError(f"{found.folder}: its logits are not finite; is the model damaged?")
        return logits

    how = transformers.GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_length=window, pad_token_id=0, use_cache=True
    )
    with quiet(), explained(found.folder, "transformers cannot write with it"), torch.random.fork_rng():
        model = whole_model(found.folder, found.trust_code).eval().to(device)
        model.generation_config = how  # in place of what the checkpoint asks for
        torch.manual_seed(seed)
        if bos is not None:
            first = torch.full((n, 1), bos)
        else:
            first = torch.from_numpy(common)[torch.randint(len(common), (n, 1))]
        for begin in range(0, n, BATCH):
            ids = first[begin : begin + BATCH].to(device)
            mask = torch.ones_like(ids)  # or token 0 would be taken for padding
            made = model.generate(ids, attention_mask=mask, generation_config=how, logits_processor=[watch])
            out[begin : begin + BATCH] = made.cpu().numpy()
    progress("writing", n * window, n * window, "")
    return out
