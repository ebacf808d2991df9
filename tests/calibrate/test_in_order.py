"""In order: what the inputs are behind what is quantized already, against a plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import Family
from walked_models import distance, save, some_tokens

from ptqtp_gguf.calibrate import mapping
from ptqtp_gguf.calibrate.in_order import in_order
from ptqtp_gguf.source import checkpoint

pytestmark = pytest.mark.hf


def inputs(model: Any, name: str, tokens: np.ndarray) -> Any:
    """What one linear layer is given: float64 (tokens, C)."""
    import torch

    seen: list[Any] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(torch.from_numpy(tokens), use_cache=False)
    hook.remove()
    return seen[0].flatten(0, 1).double()


def test_in_order_is_a_plain_model_with_what_was_replaced(tmp_path: Path) -> None:
    import torch
    import transformers

    def changed(w: Any) -> Any:
        """Quite another matrix."""
        return w.roll(1, 0) * 1.5

    found = checkpoint.check(save(Family("Llama", "llama"), tmp_path / "model"))
    full, now = (transformers.AutoModelForCausalLM.from_pretrained(found.folder, dtype=torch.float32) for _ in range(2))
    tokens, name = some_tokens(), mapping.names("llama", 2)
    wanted = {f"blk.{i}.{n}.weight" for i in range(2) for n in ("attn_k", "attn_output", "ffn_up", "ffn_down")}
    prefix = "model.layers.{}.self_attn.q_proj.weight"  # the first with that input, though it is not wanted
    rng = np.random.default_rng(2)
    weights = {prefix.format(i): rng.uniform(0.2, 3, tokens.shape).astype(np.float32) for i in range(2)}
    (tmp_path / "work").mkdir()
    stages: list[list[str]] = []
    ended: list[int] = []
    for stage in in_order(found, tokens, name, wanted, tmp_path / "work", finished=ended.append, weights=weights):
        stages.append(list(stage.params))
        assert len(ended) == stage.index
        ((gguf_name, of),) = stage.params.items()
        x, x_full = (inputs(m, of.removesuffix(".weight"), tokens) for m in (now, full))
        c = torch.ones(len(x), 1, dtype=torch.float64)
        if gguf_name.endswith("attn_k.weight"):
            c = torch.from_numpy(weights[prefix.format(stage.index)].reshape(-1, 1)).double()
        assert distance(stage.moments[gguf_name].h, (x.T @ (c * x)).numpy()) < 2e-5
        assert distance(stage.cross, (x_full.T @ (c * x)).numpy()) < 2e-5
        assert len(stages) == 1 or distance(stage.cross, stage.moments[gguf_name].h.numpy()) > 0.01
        w = stage.parameter(of)
        assert torch.equal(w, full.get_parameter(of))
        stage.replace({of: changed(w)})
        now.get_parameter(of).data = changed(w)
    assert len(stages) == 8 and {n for s in stages for n in s} == wanted and ended == [0, 1]
    assert [s[0].split(".")[2] for s in stages[:4]] == ["attn_k", "attn_output", "ffn_up", "ffn_down"]
