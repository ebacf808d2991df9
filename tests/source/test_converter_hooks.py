"""What is done around the converter: entries where it looks for them, metadata that it leaves out, failures told."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ptqtp_gguf.llamacpp import install
from ptqtp_gguf.source import _converter_hooks as hooks

ADAPTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "deepseek_v3": ({}, {"scoring_func": "sigmoid"}),
    "deepseek_v3, given": ({"scoring_func": "softmax"}, {"scoring_func": "softmax"}),
    "gpt_neox": ({"rope_parameters": {"partial_rotary_factor": 0.25}}, {"rotary_pct": 0.25}),
    "gpt2": ({"n_positions": 1024}, {"n_ctx": 1024}),
    "gpt2, given": ({"n_positions": 1024, "n_ctx": 512}, {"n_ctx": 512}),
    "cohere2": ({}, {"rotary_pct": 1.0}),
    "falcon_h1": ({"hidden_size": 96, "num_attention_heads": 3}, {"head_dim": 32}),
    "minimax_m2": (
        {"head_dim": 64, "rope_parameters": {"partial_rotary_factor": 0.5}},
        {"rotary_dim": 32, "scoring_func": "sigmoid"},
    ),
    "hunyuan_v1_moe": (
        {"num_hidden_layers": 2, "intermediate_size": 96, "moe_topk": 2},
        {"moe_topk": [2, 2], "moe_intermediate_size": [96, 96], "num_shared_expert": [1, 1]},
    ),
    "llama": ({"rope_parameters": {"rope_theta": 1.0}}, {}),
}


@pytest.mark.parametrize("name", ADAPTED)
def test_entries_are_put_where_they_are_looked_for(name: str) -> None:
    given, added = ADAPTED[name]
    config = {"model_type": name.partition(",")[0], **given}
    before = dict(config)
    hooks.adapt(config)
    assert config == {**before, **added}


def test_rotary_embedding_that_kinds_of_layers_have_for_themselves() -> None:
    assert hooks.flat_rope({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}) == {}
    assert hooks.flat_rope({"rope_scaling": {"type": "linear"}}) == {"type": "linear"}
    assert hooks.flat_rope({"rope_parameters": [1]}) == hooks.flat_rope({}) == {}


def test_factor_of_attention_of_yarn() -> None:
    """Against transformers' own function."""
    usual = 0.1 * math.log(4) + 1
    yarn = {"rope_type": "yarn", "factor": 4.0}
    assert hooks.yarn_attention(yarn) == 1
    assert hooks.yarn_attention({**yarn, "attention_factor": 1.3}) == pytest.approx(1.3 / usual)
    both = (0.07 * math.log(4) + 1) / usual
    assert hooks.yarn_attention({**yarn, "mscale": 0.7, "mscale_all_dim": 1.0}) == pytest.approx(both / usual)
    assert hooks.yarn_attention({"rope_type": "linear", "factor": 4.0, "attention_factor": 2.0}) == 1


@pytest.mark.hf
@pytest.mark.parametrize("more", [{}, {"attention_factor": 1.3}, {"mscale": 0.7, "mscale_all_dim": 1.0}])
def test_the_same_as_transformers(more: dict[str, float]) -> None:
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4, **more}
    config = transformers.LlamaConfig(hidden_size=128, num_attention_heads=4, rope_parameters=rope)
    _, wanted = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    assert hooks.yarn_attention(rope) * (0.1 * math.log(4) + 1) == pytest.approx(wanted)


def test_layers_of_granite_hybrids() -> None:
    for told in (["linear_attention", "full_attention"], ["mamba", "attention"]):
        config = {"model_type": "granitemoehybrid", "layer_types": told}
        hooks.adapt(config)
        assert config["layer_types"] == ["mamba", "attention"]


def test_windows() -> None:
    assert hooks.windowed({"layer_types": ["full_attention", "sliding_attention"]}) == [False, True]
    assert hooks.windowed({"layer_types": ["conv", "full_attention"]}) == hooks.windowed({}) == []


class Tokenizer:
    """Has letters for ASCII only."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [b for b in text.encode() if b < 128]

    def decode(self, ids: list[int], clean_up_tokenization_spaces: bool) -> str:
        return bytes(ids).decode()


def test_the_sample_that_a_tokenizer_can_spell() -> None:
    text = hooks.spelt(Tokenizer())
    assert text.isascii() and text.startswith("The river ran") and "0x7F" in text and len(text) > 300


FAILING = """
def get_vocab_base(hparams):
    vocab_size = hparams["vocab_size"]
    tokenizer = hparams["tokenizer"]
    assert max(tokenizer.get_vocab().values()) < vocab_size

def prepare_tensors():
    for name in ["a.weight", "b.weight"]:
        modify_tensors(name)

def modify_tensors(name):
    return {"a.weight": 1}[name]
"""


class Vocabulary:
    def get_vocab(self) -> dict[str, int]:
        return {"a": 0, "z": 9}


def test_failures() -> None:
    seen: dict[str, Any] = {}
    exec(compile(FAILING, "/somewhere/conversion/base.py", "exec"), seen)
    with pytest.raises(KeyError) as e:
        seen["prepare_tensors"]()
    told = hooks.failure(e.value)
    assert told["steps"][-2:] == ["prepare_tensors", "modify_tensors"]  # type: ignore[index]
    assert (told["tensor"], told["type"], told["text"]) == ("b.weight", "KeyError", "'b.weight'")
    assert (told["file"], told["line"], told["tokens"]) == ("base.py", 12, None)
    with pytest.raises(AssertionError) as a:
        seen["get_vocab_base"]({"vocab_size": 8, "tokenizer": Vocabulary()})
    assert hooks.failure(a.value)["tokens"] == (9, 8)
    json.dumps([told, hooks.failure(a.value)])


# ---- with the converter's own modules, in a process of their own ----

SUPPLY = """
import sys, json, types
sys.path.insert(0, sys.argv[1])
import gguf
from ptqtp_gguf.source import _converter_hooks as hooks

def supplied(arch, written, **hparams):
    writer = gguf.GGUFWriter(path=None, arch=gguf.MODEL_ARCH_NAMES[arch])
    for method, value in written:
        getattr(writer, method)(value)
    rope = hparams.pop("rope", {})
    hooks.supply(types.SimpleNamespace(gguf_writer=writer, model_arch=arch, hparams=hparams, rope_parameters=rope))
    found = {k.partition(".")[2]: v.value for part in writer.kv_data for k, v in part.items()}
    found.pop("architecture")
    return found

A = gguf.MODEL_ARCH
yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e5}
print(json.dumps([
    supplied(A.GPTNEOX, [], rope={"rope_theta": 5e4, "rope_type": "default"}),
    supplied(A.GPTNEOX, [], rope={"rope_theta": 5e4, "rope_type": "linear", "factor": 2.0}),
    supplied(A.STABLELM, [], rope={**yarn, "attention_factor": 1.3}),
    supplied(A.DEEPSEEK2, [("add_rope_scaling_type", gguf.RopeScalingType.YARN), ("add_rope_scaling_factor", 4.0),
        ("add_rope_scaling_yarn_log_mul", 0.1)], rope={**yarn, "attention_factor": 1.3}),
    supplied(A.CHATGLM, [("add_layer_norm_rms_eps", 1e-5), ("add_rope_freq_base", 1e4)],
        rms_norm_eps=1e-7, rope={"rope_theta": 5e4, "rope_type": "default"}),
    supplied(A.COHERE2, [("add_sliding_window", 8)], sliding_window=8,
        layer_types=["full_attention", "sliding_attention"]),
    supplied(A.COHERE2, [("add_sliding_window", 8)], sliding_window=8,
        layer_types=["sliding_attention"] * 3 + ["full_attention"]),
    supplied(A.GEMMA3, [("add_rope_freq_base", 1e6)],
        rope={"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}),
]))
"""


@pytest.mark.runtime
def test_metadata_that_the_converter_leaves_out() -> None:
    command = [sys.executable, "-c", SUPPLY, str(install.converter().parent / "gguf-py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    neox, linear, yarn, deepseek, glm, cohere, usual, gemma = json.loads(done.stdout)
    assert neox == {"rope.freq_base": 5e4}
    assert linear == {"rope.freq_base": 5e4, "rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    assert yarn.pop("rope.scaling.attn_factor") == pytest.approx(1.3 / (0.1 * math.log(4) + 1))
    scaling = {"type": "yarn", "factor": 4.0, "original_context_length": 64}
    assert yarn == {"rope.freq_base": 1e5, **{f"rope.scaling.{k}": v for k, v in scaling.items()}}
    assert "rope.scaling.attn_factor" not in deepseek
    assert glm == {"attention.layer_norm_rms_epsilon": 1e-7, "rope.freq_base": 5e4}
    assert cohere["attention.sliding_window_pattern"] == [False, True]
    assert usual == {"attention.sliding_window": 8}
    assert gemma == {"rope.freq_base": 1e6}


def test_struct_of_the_line_protocol(capsys: pytest.CaptureFixture[str]) -> None:
    hooks.say({"mark": "m "}, config={"a": Path("x")}, n=struct.calcsize("<Q"))
    assert capsys.readouterr().err == 'm {"config": {"a": "x"}, "n": 8}\n'
