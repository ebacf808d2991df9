"""Tiny checkpoints without a tokenizer and tokens for them: what walks a model layer by layer is held against them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from tiny_models import Family

VOCAB, WINDOW, N = 384, 40, 5  # windows longer than the sliding windows, and more than fit a batch of two


def save(family: Family, folder: Path, **changes: object) -> Path:
    """A random float32 checkpoint without a tokenizer."""
    import torch
    import transformers

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        config = getattr(transformers, f"{family.model}TextConfig", None) or getattr(
            transformers, f"{family.model}Config"
        )
        torch.manual_seed(0)
        model = getattr(transformers, f"{family.model}ForCausalLM")(
            config(**{**family.settings, "vocab_size": VOCAB, **changes})
        )
        for _, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape)
            p.copy_(p + 0.2 * noise if p.ndim == 1 else noise * p.shape[-1] ** -0.5)
        model.save_pretrained(folder, max_shard_size="500KB")
    return folder


def some_tokens(n: int = N) -> np.ndarray:
    return np.random.default_rng(3).integers(3, VOCAB, (n, WINDOW))


def distance(a: Any, b: Any) -> float:
    return float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b))
