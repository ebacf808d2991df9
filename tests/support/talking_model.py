"""A model that is small and made in a moment, and talks: random letters, by a chat template, never an end."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

WIDTH, HIDDEN, HEADS, LAYERS = 64, 96, 2, 2
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BLANK = "\u2581"  # as SentencePiece writes it
SPECIAL = ["<unk>", "<s>", "<|im_end|>", "<|im_start|>"]
LETTERS = [BLANK, *"abcdefghijklmnopqrstuvwxyz"]


def write_talking_model(
    path: Path, template: str | None = TEMPLATE, context: int = 2048, without: str | None = None
) -> Path:
    """A Llama of two layers with random weights and a tokenizer of letters and bytes, in F32. without: the name of a
    tensor that it lacks, so that no runtime loads it."""
    rng = np.random.default_rng(5)
    tokens = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), *LETTERS]
    kinds = [2, 3, 3, 3, *[6] * 256, *[1] * len(LETTERS)]  # unknown, control, byte, normal
    w = gguf.GGUFWriter(path, "llama")
    w.add_name("talking")
    w.add_context_length(context)
    w.add_embedding_length(WIDTH)
    w.add_block_count(LAYERS)
    w.add_feed_forward_length(HIDDEN)
    w.add_head_count(HEADS)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_vocab_size(len(tokens))
    w.add_tokenizer_model("llama")
    w.add_token_list(tokens)
    w.add_token_scores([0.0] * len(tokens))
    w.add_token_types(kinds)
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    if template is not None:
        w.add_chat_template(template)
    embedding = rng.normal(size=(len(tokens), WIDTH)).astype(np.float32)
    head = rng.normal(size=(len(tokens), WIDTH)).astype(np.float32)
    embedding[:, 0] = 5  # the same for all, so that the head's first column is a bias: letters only
    head[:, 0] = np.where(np.array(kinds) == 1, 0, -9)
    w.add_tensor("token_embd.weight", embedding)
    w.add_tensor("output.weight", head)
    w.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for i in range(LAYERS):
        for name, rows, columns in (
            ("attn_q", WIDTH, WIDTH),
            ("attn_k", WIDTH, WIDTH),
            ("attn_v", WIDTH, WIDTH),
            ("attn_output", WIDTH, WIDTH),
            ("ffn_gate", HIDDEN, WIDTH),
            ("ffn_up", HIDDEN, WIDTH),
            ("ffn_down", WIDTH, HIDDEN),
        ):
            matrix = (rng.normal(size=(rows, columns)) * 0.1).astype(np.float32)
            if f"blk.{i}.{name}.weight" != without:
                w.add_tensor(f"blk.{i}.{name}.weight", matrix)
        for name in ("attn_norm", "ffn_norm"):
            w.add_tensor(f"blk.{i}.{name}.weight", np.ones(WIDTH, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def write_adapter(path: Path, rank: int = 4, strength: float = 0.3, width: int = WIDTH) -> Path:
    """A LoRA adapter for it, in F32: random matrices for three of each layer's. width: another one fits no model."""
    rng = np.random.default_rng(9)
    w = gguf.GGUFWriter(path, "llama")
    w.add_type("adapter")
    w.add_string("adapter.type", "lora")
    w.add_float32("adapter.lora.alpha", float(rank))  # so that the product counts once
    for i in range(LAYERS):
        for name, rows, columns in (("attn_q", width, width), ("ffn_up", HIDDEN, width), ("ffn_down", width, HIDDEN)):
            for part, shape in (("lora_a", (rank, columns)), ("lora_b", (rows, rank))):
                matrix = (rng.normal(size=shape) * strength).astype(np.float32)
                w.add_tensor(f"blk.{i}.{name}.weight.{part}", matrix)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path
