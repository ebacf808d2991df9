"""Tiny random checkpoints of many architectures, made by transformers, and the matrices that each must have."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from helpers import REPO, copy_tokenizer

BPE_VOCAB, SPM_VOCAB = 49152, 384
COMMON: dict[str, object] = dict(
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=None,
)
ATTENTION = "attn_q attn_k attn_v attn_output"
DENSE = f"{ATTENTION} ffn_gate ffn_up ffn_down"
EXPERTS = f"{ATTENTION} ffn_gate_exps ffn_up_exps ffn_down_exps"
FUSED = "attn_qkv attn_output ffn_up ffn_down"  # phi3: ffn_up holds gate and up
MLA = "attn_q_a attn_q_b attn_kv_a_mqa attn_k_b attn_v_b attn_output"
DEEPSEEK = (
    f"{MLA} ffn_gate ffn_up ffn_down",
    f"{MLA} ffn_gate_exps ffn_up_exps ffn_down_exps ffn_gate_shexp ffn_up_shexp ffn_down_shexp",
)


@dataclass(frozen=True)
class Family:
    """One architecture.

    model     prefix of transformers' classes: <model>Config, <model>ForCausalLM
    arch      general.architecture of the GGUF
    blocks    matrices of a block, by their names in the GGUF: one entry for every block, or one a block
    config    what differs from COMMON
    fallback  matrices whose rows do not divide by 32, and the type that they get instead
    bpe       tokenizer: the demo model's BPE, where the converter insists; else a tiny SentencePiece model
    shards    max_shard_size
    table     the runtime looks GELU up in a table of fp16 (ggml_vec_gelu_f32)
    """

    model: str
    arch: str
    blocks: tuple[str, ...] = (DENSE,)
    config: dict[str, object] = field(default_factory=dict)
    fallback: dict[str, str] = field(default_factory=dict)
    bpe: bool = False
    shards: str = "50GB"
    table: bool = False

    @property
    def settings(self) -> dict[str, object]:
        return {**COMMON, "vocab_size": BPE_VOCAB if self.bpe else SPM_VOCAB, **self.config}

    @property
    def experts(self) -> bool:
        return any("exps" in names for names in self.blocks)

    def matrices(self) -> set[str]:
        """Names of all block matrices."""
        layers = int(str(self.settings["num_hidden_layers"]))
        blocks = self.blocks * layers if len(self.blocks) == 1 else self.blocks
        assert len(blocks) == layers
        return {f"blk.{i}.{name}.weight" for i, names in enumerate(blocks) for name in names.split()}


FAMILIES = {
    # rows of 144 and 200 fall back; 200 rows are not a multiple of the 16 that a panel interleaves
    "llama": Family(
        "Llama",
        "llama",
        config=dict(num_key_value_heads=1, head_dim=36, intermediate_size=200),
        fallback={"attn_output": "F16", "ffn_down": "F16"},
        shards="100KB",
    ),
    "llama-tied": Family("Llama", "llama", config=dict(tie_word_embeddings=True)),
    "mistral": Family("Mistral", "llama", config=dict(head_dim=64, sliding_window=None)),
    "granite": Family(
        "Granite",
        "granite",
        config=dict(embedding_multiplier=6.0, residual_multiplier=0.5, attention_multiplier=0.125, logits_scaling=4.0),
    ),
    "qwen2": Family("Qwen2", "qwen2", config=dict(tie_word_embeddings=True)),  # biases of q, k, v
    "qwen3": Family("Qwen3", "qwen3", config=dict(head_dim=64)),  # norms of q, k
    "qwen3moe": Family(
        "Qwen3Moe",
        "qwen3moe",
        (EXPERTS,),
        dict(
            head_dim=32,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=128,
            norm_topk_prob=True,
            tie_word_embeddings=True,
        ),
        bpe=True,
        shards="8MB",
    ),
    # six layers, because the runtime takes every sixth to be without a window
    "gemma3": Family(
        "Gemma3",
        "gemma3",
        config=dict(
            tie_word_embeddings=True, head_dim=64, sliding_window=8, num_hidden_layers=6, query_pre_attn_scalar=64
        ),
        table=True,
    ),
    "phi3": Family("Phi3", "phi3", (FUSED,), dict(num_key_value_heads=4, original_max_position_embeddings=256)),
    "olmo2": Family("Olmo2", "olmo2", bpe=True),
    # scoring_func: DeepSeek's own configs have it, transformers' class does not; the converter goes by it
    "deepseek3": Family(
        "DeepseekV3",
        "deepseek2",
        DEEPSEEK,
        dict(
            num_key_value_heads=4,
            q_lora_rank=96,
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            moe_intermediate_size=96,
            first_k_dense_replace=1,
            routed_scaling_factor=1.5,
            n_group=1,
            topk_group=1,
            scoring_func="sigmoid",
        ),
        bpe=True,
    ),
    "falcon": Family(
        "Falcon",
        "falcon",
        (FUSED,),
        dict(new_decoder_architecture=True, num_kv_heads=2, alibi=False, bias=False, tie_word_embeddings=True),
        bpe=True,
        table=True,
    ),
    # biases of experts, attention sinks
    "gpt-oss": Family(
        "GptOss",
        "gpt-oss",
        (EXPERTS,),
        dict(
            num_local_experts=4,
            num_experts_per_tok=2,
            head_dim=32,
            sliding_window=8,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        ),
        bpe=True,
    ),
}


def build(family: Family, folder: Path, tokens: list[int]) -> np.ndarray:
    """Save a random bf16 checkpoint in `folder`; its logits of `tokens` by transformers in float32: (T, vocabulary).

    Every matrix keeps the size of its input, and every vector (norms, biases) is off its neutral value: whatever part
    of an architecture a conversion lost, the logits would show it.
    """
    import torch
    import transformers

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # transformers about itself
        config_class = getattr(transformers, f"{family.model}TextConfig", None)
        config_class = config_class or getattr(transformers, f"{family.model}Config")
        model_class = getattr(transformers, f"{family.model}ForCausalLM")
        torch.manual_seed(0)
        model = model_class(config_class(**family.settings))
        for _, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape)
            p.copy_(p + 0.2 * noise if p.ndim == 1 else noise * p.shape[-1] ** -0.5)
        model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=family.shards)
        # read again, because .to(bfloat16) rounded tables too (rope frequencies), for good
        model = model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        logits: np.ndarray = model(torch.tensor([tokens]), use_cache=False).logits[0].double().numpy()
    if family.bpe:
        copy_tokenizer(folder)
    else:
        write_tokenizer(folder)
    return logits


def write_tokenizer(folder: Path) -> None:
    """Give a checkpoint a SentencePiece tokenizer of SPM_VOCAB pieces, trained on the spot in a moment.

    A byte-level BPE cannot be made so: the converter knows one by the hash of its tokens of a long text, that is by its
    vocabulary. Where an architecture must have one, the demo model's is copied.
    """
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        input=str(REPO / "tools" / "fixtures" / "sample.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=SPM_VOCAB,
        byte_fallback=True,
        minloglevel=2,
        num_threads=1,
    )
    (folder / "tokenizer.vocab").unlink()
