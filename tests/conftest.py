"""Shared fixtures: small GGUF files written by gguf-py, tiny checkpoints made by transformers, the demo model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Cli, demo_folder, write_gguf
from tiny_models import SPM_VOCAB, write_tokenizer

SHAPES = {  # (rows, columns) in numpy order
    "token_embd.weight": (40, 64),
    "blk.0.attn_q.weight": (48, 64),
    "blk.0.attn_norm.weight": (64,),
    "blk.0.ffn_down.weight": (64, 96),
    "blk.0.ffn_gate_exps.weight": (3, 16, 64),
    "blk.0.odd.weight": (8, 40),
    "output.weight": (40, 64),
}


@pytest.fixture(scope="session", autouse=True)
def _environment() -> Iterator[None]:
    """Also of the fixtures of a session or a module, and of the programs that tests start."""
    with pytest.MonkeyPatch.context() as m:
        m.setenv("HF_HUB_OFFLINE", "1")
        m.setenv("GGML_NO_BACKTRACE", "1")  # by gdb, where there is one: it may hang
        m.setenv("PTQTP_EFFORT", "none")  # plain conversions look at no text; those that shall say so
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(1)


@pytest.fixture
def weights(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {name: (rng.normal(size=shape) * 0.05).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.fixture
def tiny_gguf(tmp_path: Path, weights: dict[str, np.ndarray]) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", weights)


@pytest.fixture
def cli() -> Cli:
    """Run the installed console script as a user would."""

    def run(*args: object, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        script = Path(sys.executable).with_name("ptqtp-gguf")
        env = {**os.environ, "COLUMNS": "200", **kwargs.pop("env", {})}
        return subprocess.run(
            [str(script), *map(str, args)], capture_output=True, text=True, env=env, timeout=600, check=False, **kwargs
        )

    return run


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """A command's output on a wide screen, in this process: quicker than `cli`; errors are raised."""
    from ptqtp_gguf.commands import app as cli
    from ptqtp_gguf.terminal import console as terminal

    monkeypatch.setattr(terminal.out_console, "_width", 400)

    def command(*args: object) -> str:
        assert not cli.app([str(a) for a in args], standalone_mode=False)
        return capsys.readouterr().out

    return command


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with a tokenizer of its own, sharded, saved by transformers."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-llama"
    config = transformers.LlamaConfig(
        vocab_size=SPM_VOCAB,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.05,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="250KB")
    write_tokenizer(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="session")
def moe_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral of two layers, four experts of which two are used, with a tokenizer of its own."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-moe"
    config = transformers.MixtralConfig(
        vocab_size=SPM_VOCAB,
        hidden_size=128,
        intermediate_size=224,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.08,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    return demo_folder()


@pytest.fixture(scope="session")
def demo_files(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo model through the whole path: its bf16 GGUF, ours, and the Q4_0 twin."""
    from ptqtp_gguf.conversion.export import export_q4_0
    from ptqtp_gguf.conversion.pipeline import convert
    from ptqtp_gguf.plan.options import Options

    folder = tmp_path_factory.mktemp("demo")
    files = {name: folder / f"{name}.gguf" for name in ("bf16", "ours", "twin")}
    convert(demo_checkpoint, files["ours"], Options(keep_bf16=files["bf16"]))
    export_q4_0(files["ours"], files["twin"])
    return files
