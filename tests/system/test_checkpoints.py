"""The whole way from a checkpoint to text, and checkpoints that have none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import BPE_VOCAB, FAMILIES, build

from ptqtp_gguf.conversion import pipeline as conversion
from ptqtp_gguf.errors import CheckpointError, InputError, OutputError
from ptqtp_gguf.files.gguf import Reader
from ptqtp_gguf.plan.options import Options
from ptqtp_gguf.serve.server import Server
from ptqtp_gguf.source import checkpoint

pytestmark = pytest.mark.runtime


def test_checkpoint_to_text(cli: Callable[..., subprocess.CompletedProcess[str]], demo_files: dict[str, Path]) -> None:
    with Reader(demo_files["ours"]) as r:
        matrices = [t for t in r.tensors if t.name.startswith("blk.") and len(t.shape) == 2]
        assert len(matrices) == 210 and {t.type_name for t in matrices} == {"TP2_2"}
        assert {t.shape[0] for t in matrices} == {576, 1536}
    done = cli("run", demo_files["ours"], "-p", "The capital of France is", "-n", "12", "--temp", "0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The capital of France is") and len(done.stdout.split()) > 8
    # plain llama-cpp-python, nothing of ours imported: the same greedy text
    code = (
        "import sys; from llama_cpp import Llama;"
        f"m = Llama({str(demo_files['ours'])!r}, n_ctx=2048, verbose=False);"
        "print('The capital of France is' + m('The capital of France is', max_tokens=12, temperature=0)"
        "['choices'][0]['text']); assert 'ptqtp_gguf' not in sys.modules"
    )
    plain = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert plain.stdout.split() == done.stdout.split()


def test_chat_and_serve_answer(
    cli: Callable[..., subprocess.CompletedProcess[str]], demo_files: dict[str, Path]
) -> None:
    question = "What is the capital of France?"
    done = cli("chat", demo_files["ours"], "-p", question, "--temp", "0", "-n", "12")
    assert done.returncode == 0 and "Paris" in done.stdout, done.stderr
    with Server(demo_files["ours"], ctx=256) as server:
        body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 12}
        with urllib.request.urlopen(server.url + "/v1/chat/completions", json.dumps(body).encode()) as reply:
            assert "Paris" in json.load(reply)["choices"][0]["message"]["content"]


def test_two_pass_equals_the_kept_intermediate(demo_files: dict[str, Path], tmp_path: Path) -> None:
    """A checkpoint and its bf16 GGUF give the same bytes: the converter adds nothing of the moment."""
    conversion.convert(demo_files["bf16"], tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == demo_files["ours"].read_bytes()


def test_random_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny.gguf"
    summary = conversion.convert(tiny_checkpoint, out)
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.gguf"]
    assert summary.weights_by_type()["TP2_2"] == 2 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 192)


def test_unknown_architecture(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(tiny_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["FrobnicatorForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="does not know the architecture FrobnicatorForCausalLM"):
        conversion.convert(folder, tmp_path / "out.gguf")
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*"))


def test_checkpoint_without_tokenizer(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mute"
    shutil.copytree(tiny_checkpoint, folder)
    for path in folder.glob("token*"):
        path.unlink()
    with pytest.raises(
        CheckpointError, match=r"no tokenizer\.json and no tokenizer\.model .* save the tokenizer there"
    ) as e:
        conversion.convert(folder, tmp_path / "out.gguf")
    assert "\n" not in str(e.value)
    assert not list(tmp_path.glob("*out*"))


def changed(checkpoint: Path, folder: Path, **entries: object) -> Path:
    """A copy of a checkpoint with other entries in its config.json."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))
    return folder


def test_more_tokens_than_the_embedding_has_rows(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build(replace(FAMILIES["llama-tied"], bpe=True), folder, [5, 6])
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    added = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"].append({"id": BPE_VOCAB, "content": "<|tool|>", "special": True, **added})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = rf"tokens up to number {BPE_VOCAB}, its embedding {BPE_VOCAB} rows .*resize_token_embeddings"
    with pytest.raises(CheckpointError, match=message):
        conversion.convert(folder, tmp_path / "out.gguf")


def test_an_entry_that_only_the_original_configuration_has(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = changed(tiny_checkpoint, tmp_path / "minicpm", architectures=["MiniCPMForCausalLM"])
    message = r"config.json lacks the entry 'scale_emb', .* for MiniCPMForCausalLM \(minicpm.py:\d+\); take it over"
    with pytest.raises(CheckpointError, match=message):
        conversion.convert(folder, tmp_path / "out.gguf")


def test_what_the_file_does_not_carry_is_told(
    cli: Callable[..., subprocess.CompletedProcess[str]], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = changed(tiny_checkpoint, tmp_path / "model", hidden_act="gelu")
    told = "config.json says hidden_act gelu: the runtime computes silu in a llama"
    out, card = tmp_path / "out.gguf", tmp_path / "card.md"
    done = cli("convert", folder, out, "--model-card", card)
    assert done.returncode == 0, done.stderr
    assert f"  note: {told}" in done.stdout and "verify FILE --against FOLDER --logits" in done.stdout
    assert f"- {told}".replace("_", r"\_") in card.read_text() or f"- {told}" in card.read_text()
    done = cli("convert", folder, tmp_path / "b.gguf", "--dry-run", "--json")
    assert told in json.loads(done.stdout.splitlines()[-1])["notes"]
    kept = conversion.convert(folder, tmp_path / "c.gguf", Options(keep_bf16=tmp_path / "bf16.gguf"))
    assert told in kept.notes and not conversion.convert(tiny_checkpoint, tmp_path / "d.gguf").notes


def test_keep_bf16_does_not_overwrite(demo_checkpoint: Path, demo_files: dict[str, Path], tmp_path: Path) -> None:
    before = demo_files["bf16"].stat()
    with pytest.raises(OutputError, match="exists already"):
        conversion.convert(demo_checkpoint, tmp_path / "x.gguf", Options(keep_bf16=demo_files["bf16"]))
    assert demo_files["bf16"].stat() == before
    assert checkpoint.is_gguf(demo_files["bf16"])


def test_nan_in_a_checkpoint_is_named_by_its_folder(tiny_checkpoint: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "damaged"
    shutil.copytree(tiny_checkpoint, folder)
    shard = next(p for p in sorted(folder.glob("*.safetensors")) if any("down_proj" in n for n in load_file(p)))
    tensors = load_file(shard)
    name = next(n for n in tensors if "down_proj" in n)
    tensors[name][3, 4] = torch.nan
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"damaged: tensor blk\.\d\.ffn_down\.weight holds nan at row 3, column 4"):
        conversion.convert(folder, tmp_path / "out.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["damaged"]
