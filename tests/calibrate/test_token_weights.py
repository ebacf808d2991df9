"""The weights of tokens: squared gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import Family
from walked_models import VOCAB, distance, save, some_tokens

from ptqtp_gguf.calibrate.token_weights import token_weights

pytestmark = pytest.mark.hf


def test_token_weights_are_squared_gradients(tmp_path: Path) -> None:
    import torch
    import transformers

    folder = save(Family("Llama", "llama"), tmp_path / "model")
    tokens = some_tokens(3)
    got = token_weights(folder, tokens)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    draw = torch.Generator().manual_seed(1)
    sums: dict[str, list[Any]] = {}
    for ids in torch.from_numpy(tokens).split(1):
        outputs: dict[str, Any] = {}

        def keep(module: Any, args: Any, y: Any, of: str = "", outputs: dict[str, Any] = outputs) -> None:
            y.retain_grad()
            outputs[of] = y

        hooks = [
            m.register_forward_hook(lambda m, a, y, of=n, keep=keep: keep(m, a, y, of))
            for n, m in model.named_modules()
            if isinstance(m, torch.nn.Linear)
        ]
        logits = model(ids, use_cache=False).logits[0]
        noise = torch.empty_like(logits).exponential_(generator=draw).log_()
        drawn = (logits.detach() - noise).argmax(-1)
        (-torch.log_softmax(logits, -1).gather(1, drawn[:, None]).sum()).backward()
        for hook in hooks:
            hook.remove()
        for of, y in outputs.items():
            sums.setdefault(f"{of}.weight", []).append(y.grad[0].double().square().sum(-1))
    g = {of: torch.stack(parts).numpy() for of, parts in sums.items()}
    expected = {"lm_head.weight": g["lm_head.weight"]}
    for i in range(2):
        for first, *others in (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.o_proj",),
            ("mlp.gate_proj", "mlp.up_proj"),
            ("mlp.down_proj",),
        ):
            full = [f"model.layers.{i}.{n}.weight" for n in (first, *others)]
            expected[full[0]] = sum(g[n] for n in full)
    assert got.keys() == expected.keys()
    for of, want in expected.items():
        assert got[of].shape == tokens.shape and got[of].dtype == np.float32
        assert got[of].mean() == pytest.approx(1, rel=1e-5)
        assert distance(got[of], want / want.mean()) < 1e-4, of
    assert VOCAB > tokens.max()
