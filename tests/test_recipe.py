"""Which tensor gets which type, and why."""

from __future__ import annotations

import pytest

from ptqtp_gguf.errors import RecipeError
from ptqtp_gguf.format import TP2_0, TP2_1
from ptqtp_gguf.gguf_io import TYPE_IDS, TensorInfo, type_name
from ptqtp_gguf.recipe import Rule, block_type, choose, default_rules, fall_back


def info(name: str, *shape: int, kind: str = "BF16") -> TensorInfo:
    return TensorInfo(name, shape, TYPE_IDS[kind], 0, 0)


@pytest.mark.parametrize(
    ("name", "shape", "target"),
    [
        ("blk.0.attn_q.weight", (576, 576), "TP2_1"),
        ("blk.11.ffn_down.weight", (4864, 896), "TP2_1"),
        ("blk.3.attn_qkv.weight", (640, 99), "TP2_1"),
        ("blk.3.ffn_gate_exps.weight", (96, 64, 8), "TP2_1"),
        ("blk.3.ffn_down_shexp.weight", (1536, 64), "TP2_1"),
        ("blk.3.ffn_gate_inp.weight", (896, 60), "BF16"),
        ("blk.3.ffn_gate_inp_shexp.weight", (896,), "BF16"),
        ("blk.0.attn_norm.weight", (576,), "BF16"),
        ("blk.0.attn_q_norm.weight", (64, 2), "BF16"),
        ("blk.0.attn_q.bias", (576,), "BF16"),
        ("blk.0.ssm_conv1d.weight", (4, 512), "BF16"),
        ("blk.0.ssm_in.weight", (512, 512), "TP2_1"),
        ("blk.0.ssm_out.weight", (512, 512), "TP2_1"),
        ("blk.0.time_mix_w1.weight", (512, 64), "BF16"),
        ("blk.0.time_mix_key.weight", (512, 512), "TP2_1"),
        ("token_embd.weight", (576, 49152), "Q8_0"),
        ("output.weight", (576, 49152), "Q8_0"),
        ("output_norm.weight", (576,), "BF16"),
        ("position_embd.weight", (576, 512), "BF16"),
        ("blk.0.odd.weight", (40, 8), "F16"),
        ("blk.0.short.weight", (64, 1), "BF16"),
    ],
)
def test_default_recipe(name: str, shape: tuple[int, ...], target: str) -> None:
    choice = choose(info(name, *shape), default_rules(TP2_1))
    assert type_name(choice.type) == target
    assert choice.reason


def test_rows_that_do_not_fit_fall_back_and_say_so() -> None:
    choice = choose(info("blk.0.a.weight", 96, 8), default_rules(TP2_0))
    assert (type_name(choice.type), choice.fallback) == ("Q8_0", True)
    assert choice.reason == "rows of 96 are no multiple of 128 (TP2_0)"
    choice = choose(info("blk.0.a.weight", 41, 8), default_rules(TP2_1))
    assert (type_name(choice.type), choice.fallback) == ("F16", True)
    assert "rows of 41 are no multiple of 32" in choice.reason
    choice = fall_back(info("blk.0.a.weight", 64, 8), "too large")
    assert (type_name(choice.type), choice.fallback, choice.reason) == ("Q8_0", True, "too large")


def test_a_quantized_embedding_stays_but_a_quantized_block_matrix_is_taken() -> None:
    rules = default_rules(TP2_1)
    choice = choose(info("token_embd.weight", 576, 9, kind="Q6_K"), rules)
    assert type_name(choice.type) == "Q6_K" and "already Q6_K" in choice.reason
    assert type_name(choose(info("blk.0.attn_q.weight", 576, 9, kind="Q5_0"), rules).type) == "TP2_1"


def test_recipes_that_cannot_be_applied() -> None:
    with pytest.raises(RecipeError, match="unknown tensor type NOPE"):
        choose(info("blk.0.a.weight", 64, 8), [Rule(".*", "NOPE", "")])
    with pytest.raises(RecipeError, match="no rule of the recipe matches tensor x"):
        choose(info("x", 64, 8), [Rule("y", "keep", "")])
    with pytest.raises(RecipeError, match="no trit-plane type 'Q4_0'"):
        block_type("Q4_0")
    assert block_type("tp2_0") is TP2_0
