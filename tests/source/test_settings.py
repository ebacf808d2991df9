"""Settings of config.json that neither file nor runtime carries: each is told, and what is carried is not.

First by metadata alone. Then for real: a tiny random model with one entry changed is converted, and its unquantized
file is far from transformers exactly where something is told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import FAMILIES, build

from ptqtp_gguf.measure.logits import against_checkpoint
from ptqtp_gguf.source import settings
from ptqtp_gguf.source.checkpoint import check, to_bf16_gguf
from ptqtp_gguf.source.gguf import GgufSource


class Tensor:
    def __init__(self, name: str) -> None:
        self.name = name


class Fake:
    """Metadata and names of tensors, as a source has them."""

    def __init__(self, arch: str, kvs: Mapping[str, object], tensors: tuple[str, ...] = ("output.weight",)) -> None:
        self._kvs = {"general.architecture": arch, **{f"{arch}.{k}": v for k, v in kvs.items()}}
        self.tensors = [Tensor(t) for t in tensors]

    def get(self, key: str) -> object:
        return self._kvs.get(key)


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
IN_YARN: dict[str, object] = {"rope.scaling.type": "yarn"}
LLAMA3 = {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4}}

# config.json; architecture, metadata; what is told, or None; tensors
CASES: dict[str, tuple[dict[str, Any], str, dict[str, object], str | None]] = {
    "silu": ({"hidden_act": "silu"}, "llama", {}, None),
    "swish": ({"hidden_act": "swish"}, "llama", {}, None),
    "gelu for silu": ({"hidden_act": "gelu"}, "llama", {}, "hidden_act gelu: the runtime computes silu in a llama"),
    "gelus": ({"hidden_activation": "gelu_pytorch_tanh", "hidden_act": "silu"}, "gemma2", {}, None),
    "gpt2": ({"activation_function": "gelu_new"}, "gpt2", {}, None),
    "unknown architecture": ({"hidden_act": "relu"}, "newer", {}, None),
    "not normalised": ({"norm_topk_prob": False}, "qwen3moe", {"expert_count": 4}, "norm_topk_prob False: .* always"),
    "normalised": ({"norm_topk_prob": True}, "qwen3moe", {"expert_count": 4}, None),
    "default of the class": ({"model_type": "qwen3_moe"}, "qwen3moe", {"expert_count": 4}, "norm_topk_prob False"),
    "one expert": ({"norm_topk_prob": False, "num_experts_per_tok": 1}, "qwen3moe", {"expert_count": 4}, None),
    "never": ({"norm_topk_prob": True}, "olmoe", {"expert_count": 4}, "norm_topk_prob True: .* leaves them"),
    "by metadata": (
        {"norm_topk_prob": True},
        "deepseek2",
        {"expert_count": 4, "expert_weights_norm": True},
        None,
    ),
    "groups": ({"model_type": "deepseek_v2", "n_group": 8}, "deepseek2", {}, "n_group 8: the runtime ranks groups"),
    "window": (
        {"model_type": "mistral", "sliding_window": 16, "num_hidden_layers": 2},
        "llama",
        {"context_length": 256},
        "sliding_window 16: the runtime does not apply it in a llama; right up to 16 tokens",
    ),
    "window left out": ({"model_type": "mistral", "num_hidden_layers": 2}, "llama", {}, "sliding_window 4096"),
    "window that is none": (
        {"model_type": "mistral", "sliding_window": None, "num_hidden_layers": 2},
        "llama",
        {},
        None,
    ),
    "window of the context": (
        {"model_type": "mistral", "sliding_window": 4096, "num_hidden_layers": 2},
        "llama",
        {"context_length": 4096},
        None,
    ),
    "Qwen2's": (
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "num_hidden_layers": 2},
        "qwen2",
        {},
        "sliding_window 8",
    ),
    "Qwen2's, not used": (
        {"use_sliding_window": False, "sliding_window": 8, "num_hidden_layers": 2},
        "qwen2",
        {},
        None,
    ),
    "Gemma's": (
        {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        "gemma2",
        {"attention.sliding_window": 8},
        None,
    ),
    "Gemma's, other layers": (
        {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]},
        "gemma2",
        {"attention.sliding_window": 8},
        "applies it in other layers",
    ),
    "Gemma's, other layers, carried": (
        {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]},
        "gemma2",
        {"attention.sliding_window": 8, "attention.sliding_window_pattern": [False, True]},
        None,
    ),
    "theta": ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}, "llama", {}, "rope_theta 50000"),
    "theta, carried": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
        "llama",
        {"rope.freq_base": 5e4},
        None,
    ),
    "no rope": ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}, "bloom", {}, None),
    "linear": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        "llama",
        {},
        "rope type 'linear', factor 2",
    ),
    "linear, carried": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "llama",
        {"rope.scaling.type": "linear"},
        None,
    ),
    "llama3": (LLAMA3, "qwen2", {}, "rope type 'llama3', factor 8.0: the file of a qwen2 does not carry it"),
    "dynamic": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "llama", {}, "right up to"),
    "unknown rope": ({"rope_parameters": {"rope_type": "spiral"}}, "llama", {}, "'spiral': the runtime does not know"),
    "yarn": ({"rope_parameters": {**YARN, "beta_fast": 32, "beta_slow": 1}}, "llama", IN_YARN, None),
    "yarn's betas": ({"rope_parameters": {**YARN, "beta_fast": 16.0}}, "llama", IN_YARN, "beta_fast 16.0"),
    "yarn's betas, read": ({"rope_parameters": {**YARN, "beta_fast": 16.0}}, "mistral3", IN_YARN, None),
    "yarn's borders": ({"rope_parameters": {**YARN, "truncate": False}}, "gpt-oss", IN_YARN, "truncate False"),
    "DeepSeek's yarn": (
        {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
        "deepseek2",
        IN_YARN,
        None,
    ),
    "DeepSeek's yarn, not its own": ({"rope_parameters": YARN}, "deepseek2", IN_YARN, "mscale None"),
    "eps": ({"rms_norm_eps": 0.3}, "llama", {"attention.layer_norm_rms_epsilon": 1e-5}, "rms_norm_eps 0.3: .*1e-05"),
    "eps of float32": (
        {"rms_norm_eps": 1e-5},
        "llama",
        {"attention.layer_norm_rms_epsilon": float(np.float32(1e-5))},
        None,
    ),
    "clip": ({"clip_qkv": 8.0}, "olmoe", {}, "clip_qkv 8.0: the file of a olmoe does not carry it"),
    "no clip": ({"clip_qkv": None}, "olmoe", {}, None),
    "softcap": ({"attn_logit_softcapping": 50.0}, "gemma3", {}, "attn_logit_softcapping 50.0"),
    "logits scaled by the inverse": ({"logits_scaling": 4.0}, "granite", {"logit_scale": 4.0}, None),
    "Gemma's scale": ({"query_pre_attn_scalar": 256}, "gemma2", {"attention.key_length": 128}, "computes with 128"),
    "Gemma's scale, 27B": (
        {"query_pre_attn_scalar": 144},
        "gemma2",
        {"attention.key_length": 128, "block_count": 46, "embedding_length": 4608, "attention.head_count": 32},
        None,
    ),
    "layers without rope": ({"no_rope_layers": [1, 0, 1, 0]}, "smollm3", {}, "leaves out every fourth layer"),
    "every fourth": ({"no_rope_layers": [1, 1, 1, 0]}, "smollm3", {}, None),
    "heads rotated in part": (
        {"model_type": "bamba", "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "granitehybrid",
        {},
        "partial_rotary_factor 0.5: llama.cpp's converter orders",
    ),
    "layers of afmoe": ({"layer_types": ["full_attention"] * 4}, "afmoe", {}, "every fourth layer of an afmoe"),
    "only": (
        {"scale_attn_weights": False},
        "gpt2",
        {},
        "scale_attn_weights False: the runtime computes a gpt2 as with",
    ),
    "entries of odd kinds": ({"rms_norm_eps": "x", "sliding_window": [], "rope_parameters": 7}, "llama", {}, None),
}


@pytest.mark.parametrize("name", CASES)
def test_by_metadata(name: str, tmp_path: Path) -> None:
    config, arch, kvs, told = CASES[name]
    source: Any = Fake(arch, kvs)
    found = settings.notes(tmp_path, source, {"some": "entry", **config})
    if told is None:
        assert found == []
    else:
        assert len(found) == 2 and found[1] == settings.HINT
        assert found[0].startswith("config.json ") and re.search(told, found[0])


def test_what_stands_in_tensors(tmp_path: Path) -> None:
    rope: Any = Fake("llama", {}, ("output.weight", "rope_freqs.weight"))
    assert settings.notes(tmp_path, rope, LLAMA3) == []
    longrope = {"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}
    phi: Any = Fake("phi3", {}, ("output.weight", "blk.0.rope_factors_long.weight"))
    assert settings.notes(tmp_path, phi, longrope) == []
    assert "does not carry it" in settings.notes(tmp_path, rope, longrope)[0]
    untied = {"architectures": ["GemmaForCausalLM"], "tie_word_embeddings": False}
    gemma: Any = Fake("gemma", {}, ("token_embd.weight",))
    assert "tie_word_embeddings False" in settings.notes(tmp_path, gemma, untied)[0]
    assert settings.notes(tmp_path, gemma, {**untied, "architectures": ["BertModel"]}) == []
    assert settings.notes(tmp_path, gemma, {**untied, "tie_word_embeddings": True}) == []


def test_config_of_the_folder_and_its_text_part(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_act": "silu", "text_config": {"hidden_act": "gelu"}}))
    source: Any = Fake("llama", {})
    assert "hidden_act gelu" in settings.notes(tmp_path, source)[0]
    assert settings.notes(tmp_path / "absent", source) == []


# ---- for real ----

BASE_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
# family; entries changed, entries taken out of the saved config.json; told: the entry, or None where it is carried
REAL: dict[str, tuple[str, dict[str, Any], tuple[str, ...], str | None]] = {
    "window": ("mistral", {"sliding_window": 16}, (), "sliding_window"),
    "experts": ("qwen3moe", {"norm_topk_prob": False}, (), "norm_topk_prob"),
    "activation": ("llama-tied", {"hidden_act": "gelu"}, (), "hidden_act"),
    "yarn's attention": ("llama-tied", {"rope_parameters": {**BASE_YARN, "attention_factor": 1.3}}, (), None),
    "DeepSeek-V3 as transformers 5 saves it": ("deepseek3", {}, ("scoring_func",), None),
}


@pytest.mark.runtime
@pytest.mark.hf
@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_for_real(name: str, tmp_path: Path) -> None:
    family, changed, out, told = REAL[name]
    of = FAMILIES[family]
    folder, file = tmp_path / "model", tmp_path / "bf16.gguf"
    build(replace(of, config={**of.config, **changed}), folder, [5, 6, 7])
    config = json.loads((folder / "config.json").read_text())
    for entry in out:
        del config[entry]
    (folder / "config.json").write_text(json.dumps(config))
    for _ in to_bf16_gguf(check(folder), file):
        pass
    with GgufSource(file) as source:
        found = settings.notes(folder, source)
    likeness = against_checkpoint(file, folder, threads=2)
    if told is None:
        assert not found and likeness.fault is None
    else:
        assert f"config.json says {told} " in found[0] and likeness.median > 0.1
        assert "another function is computed" in str(likeness.fault)
