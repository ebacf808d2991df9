"""Which parameter, and which row of it, became which tensor: on checkpoints that llama.cpp's converter converts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_models import FAMILIES, Family, build

from ptqtp_gguf.calibrate.mapping import Link, link, names
from ptqtp_gguf.errors import InputError
from ptqtp_gguf.files.gguf import dequantize
from ptqtp_gguf.source import checkpoint
from ptqtp_gguf.source.base import Source
from ptqtp_gguf.source.converter import StreamSource

pytestmark = [pytest.mark.runtime, pytest.mark.hf]

MODELS = {
    **{name: FAMILIES[name] for name in ("phi3", "gemma3")},
    # biases that are permuted with their matrix
    "llama": Family("Llama", "llama", config=dict(attention_bias=True)),
    "qwen3moe": FAMILIES["qwen3moe"],
}
IN_MEMORY = {"qwen3moe"}  # parameters as transformers holds them, not as the shards do


def parameters(family: Family, folder: Path, name: str) -> Callable[[str], object]:
    if name in IN_MEMORY:
        import transformers

        model = getattr(transformers, f"{family.model}ForCausalLM").from_pretrained(folder, dtype="auto")
        return dict(model.named_parameters()).__getitem__
    from safetensors.torch import load_file

    found: dict[str, object] = {}
    for shard in checkpoint.check(folder).shards:
        found.update(load_file(shard))
    return found.__getitem__


def values(source: Source, name: str) -> np.ndarray:
    t = next(t for t in source.tensors if t.name == name)
    return dequantize(np.concatenate(list(source.pieces(t))), t.type, name)


def through(found: Link, get: Callable[[str], object], n_rows: int, cols: int, vector: bool) -> np.ndarray:
    """The GGUF tensor by its link alone."""
    w = get(found.hf).detach().float().numpy()  # type: ignore[attr-defined]
    w = w.reshape(-1, 1) if vector else w.reshape(-1, w.shape[-1])
    rows = np.arange(found.start, found.start + n_rows) if found.rows is None else found.rows
    return (w[rows] + np.float32(found.offset)).reshape(-1, cols)


@pytest.mark.parametrize("name", MODELS)
def test_links(tmp_path: Path, name: str) -> None:
    family = MODELS[name]
    build(family, tmp_path, [1, 5])
    get = parameters(family, tmp_path, name)
    with StreamSource(checkpoint.check(tmp_path), lambda line: None) as source:
        links = {t.name: link(source, t, get) for t in source.tensors}
        to_gguf = names(family.arch, int(str(family.settings["num_hidden_layers"])))
        for t in source.tensors:
            found = links[t.name]
            made_here = name == "phi3" and t.name.startswith("rope_")
            assert (found is None) == made_here, t.name
            if found is None:
                continue
            vector = len(t.shape) == 1
            n_rows = t.n_weights if vector else t.n_weights // t.shape[0]
            got = through(found, get, n_rows, t.shape[0], vector)
            assert np.array_equal(got, values(source, t.name)), t.name
            if "_exps" not in t.name:
                assert to_gguf(found.hf) == t.name
        check(name, links)


def check(name: str, links: dict[str, Link | None]) -> None:
    """What is known of each architecture beforehand."""

    def of(tensor: str) -> Link:
        found = links[tensor]
        assert found is not None
        return found

    pairs = np.arange(128).reshape(4, 2, 16).swapaxes(1, 2).reshape(-1)
    if name == "llama":
        assert np.array_equal(of("blk.1.attn_q.weight").rows, pairs)  # type: ignore[arg-type]
        assert np.array_equal(of("blk.1.attn_q.bias").rows, pairs)  # type: ignore[arg-type]
        assert of("blk.1.attn_v.bias") == ("model.layers.1.self_attn.v_proj.bias", None, 0, 0.0)
    if name == "phi3":
        assert of("blk.0.attn_qkv.weight") == ("model.layers.0.self_attn.qkv_proj.weight", None, 0, 0.0)
        assert of("blk.0.ffn_up.weight").hf == "model.layers.0.mlp.gate_up_proj.weight"
    if name == "gemma3":
        assert all(found.offset == ("norm" in t) for t, found in links.items() if found)
    if name == "qwen3moe":
        up = of("blk.0.ffn_up_exps.weight")
        assert up.hf == "model.layers.0.mlp.experts.gate_up_proj" and up.start == 128
        assert np.array_equal(up.rows, (np.arange(4)[:, None] * 256 + 128 + np.arange(128)).reshape(-1))  # type: ignore[arg-type]


def test_names() -> None:
    name = names("qwen3", 2)
    assert name("model.layers.1.self_attn.q_proj.weight") == "blk.1.attn_q.weight"
    assert name("model.language_model.layers.1.self_attn.q_proj.bias") == "blk.1.attn_q.bias"
    assert name("lm_head.weight") == "output.weight"
    assert name("model.layers.2.self_attn.q_proj.weight") is None
    assert name("model.layers.1.rotary.weight") is None
    with pytest.raises(InputError, match="architecture no-such"):
        names("no-such", 2)
