"""What `bench` is tried on: a random llama that runs, and rounds with made-up samples."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from ptqtp_gguf.measure import machine
from ptqtp_gguf.measure.rounds import File, Settings
from ptqtp_gguf.measure.speed import Bench

VOCAB, WIDTH, FFN = 64, 64, 96
HERE = machine.Machine("cpu", 2, 2, 1 << 34, "os", (), "scalar", None)


def write_llama(path: Path, extra: dict[str, tuple[int, ...]] | None = None, **numbers: int) -> Path:
    """A random llama of one block that llama.cpp runs. extra: tensors besides; numbers: llama.* in the metadata."""
    rng = np.random.default_rng(1)
    w = gguf.GGUFWriter(path, "llama")
    w.add_context_length(512)
    w.add_embedding_length(WIDTH)
    w.add_block_count(numbers.pop("block_count", 1))
    w.add_feed_forward_length(FFN)
    w.add_head_count(2)
    w.add_head_count_kv(2)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_dimension_count(32)
    for key, value in numbers.items():
        w.add_uint32(f"llama.{key}", value)
    w.add_tokenizer_model("llama")
    w.add_token_list([f"t{i}" for i in range(VOCAB)])
    w.add_token_scores([0.0] * VOCAB)
    w.add_token_types([gguf.TokenType.NORMAL] * VOCAB)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (VOCAB, WIDTH), "output_norm": (WIDTH,)}
    shapes |= {f"blk.0.attn_{n}": (WIDTH, WIDTH) for n in ("q", "k", "v", "output")}
    shapes |= {"blk.0.attn_norm": (WIDTH,), "blk.0.ffn_norm": (WIDTH,), "blk.0.ffn_down": (WIDTH, FFN)}
    shapes |= {"blk.0.ffn_gate": (FFN, WIDTH), "blk.0.ffn_up": (FFN, WIDTH), **(extra or {})}
    for name, shape in shapes.items():
        w.add_tensor(f"{name}.weight", (rng.normal(size=shape) * 0.05).astype(np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def made_up(speeds: dict[str, list[float]], **changes: object) -> Bench:
    """Rounds of one test from samples by label; changes: to each round."""
    n = len(next(iter(speeds.values())))
    settings = Settings((), (8,), (1,), n)
    files = [File(Path(f"{label}.gguf"), label, 1000, 500_000_000) for label in speeds]
    start = {"load_s": 0.5, "ttft_s": 2.0, "peak_memory": 1000, "energy": None}
    made = [
        {
            "number": i,
            "sizes": dict.fromkeys(speeds, 1000),
            "bandwidth": {"1": 10e9 - i},
            "busy": 0.0,
            "speed": {label: {"tg8 t1": s[i]} for label, s in speeds.items()},
            "start": {label: dict(start) for label in speeds},
            "load": [0.1 * i, 0.2 * i],
            "first_of": [128, 1],
            **changes,
        }
        for i in range(n)
    ]
    return Bench(settings, files, made, HERE, 0)
