"""Folders and files that are no plain checkpoint: each is told by what it is, with what to give instead."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import safetensors_bytes

from ptqtp_gguf.errors import CheckpointError, InputError
from ptqtp_gguf.source import kinds
from ptqtp_gguf.source.checkpoint import check
from ptqtp_gguf.source.opening import open_source

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 442000\n"
TENSOR = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}


def write(folder: Path, name: str, content: str | bytes = "") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def good(folder: Path, **config: object) -> Path:
    """A checkpoint as far as it is looked at."""
    write(folder, "config.json", json.dumps({"architectures": ["LlamaForCausalLM"], **config}))
    write(folder, "model.safetensors", safetensors_bytes(TENSOR, bytes(16)))
    write(folder, "tokenizer.json", "{}")
    return folder


def test_a_good_one(tmp_path: Path) -> None:
    check(good(tmp_path))


def lora(f: Path) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": "someone/base"}
    write(f, "adapter_config.json", json.dumps(config))
    write(f, "adapter_model.safetensors", safetensors_bytes(TENSOR, bytes(16)))


def lora_with_config(f: Path) -> None:
    lora(f)
    write(f, "config.json", '{"architectures": ["LlamaForCausalLM"]}')


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "lora": (lora, "a LoRA adapter of someone/base, no model; merge it first .*merge_and_unload"),
    "lora beside a config.json": (lora_with_config, "a LoRA adapter of someone/base"),
    "other adapter": (
        lambda f: write(f, "adapter_config.json", '{"peft_type": "IA3"}'),
        "a IA3 adapter, no model; merge it",
    ),
    "empty": (lambda f: None, "an empty folder"),
    "diffusers": (lambda f: write(f, "model_index.json", "{}"), "a pipeline of diffusers"),
    "gguf": (lambda f: write(f, "model-q4.gguf", "GGUF"), "a folder of GGUF files .model-q4.gguf.; name the file"),
    "meta": (lambda f: write(f, "consolidated.00.pth", "x"), "Meta's own format"),
    "mistral": (lambda f: write(f, "consolidated.safetensors", "x"), "Mistral's own format"),
    "deepspeed": (lambda f: write(f, "zero_to_fp32.py"), "DeepSpeed.*run its zero_to_fp32"),
    "tensorflow": (lambda f: write(f, "tf_model.h5"), "TensorFlow's weights"),
    "flax": (lambda f: write(f, "flax_model.msgpack"), "Flax's weights"),
    "onnx": (lambda f: write(f, "model.onnx"), "an ONNX model"),
    "openvino": (lambda f: write(f, "openvino_model.xml"), "an OpenVINO model"),
    "folder above": (lambda f: good(f / "checkpoint-200"), "no config.json here; did you mean .*checkpoint-200"),
    "cache of the hub": (lambda f: good(f / "snapshots" / "0123abcd"), "did you mean .*snapshots/0123abcd"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(name: str, tmp_path: Path) -> None:
    make, message = FOLDERS[name]
    folder = tmp_path / "m"
    folder.mkdir()
    make(folder)
    with pytest.raises(CheckpointError, match=message) as e:
        check(folder)
    assert str(folder) in str(e.value)


def test_tensorflow_beside_a_config(tmp_path: Path) -> None:
    (good(tmp_path) / "model.safetensors").unlink()
    write(tmp_path, "tf_model.h5")
    with pytest.raises(CheckpointError, match=r"TensorFlow's weights"):
        check(tmp_path)


INSTEAD: dict[str, tuple[str, str | bytes, str]] = {
    "pointer for weights": ("model.safetensors", POINTER, "model.safetensors: a Git LFS pointer.*git lfs pull"),
    "pointer for old weights": ("pytorch_model.bin", POINTER, "pytorch_model.bin: a Git LFS pointer"),
    "pointer for the tokenizer": ("tokenizer.json", POINTER, "tokenizer.json: a Git LFS pointer"),
    "pointer for SentencePiece": ("tokenizer.model", POINTER, "tokenizer.model: a Git LFS pointer"),
    "page for weights": ("model.safetensors", "\n<!DOCTYPE html><html>", "model.safetensors: a web page"),
    "page for the config": ("config.json", "<html><body>Sign in", "config.json: a web page"),
    "text for weights": (
        "model.safetensors",
        "Invalid username or password.",
        "no weights, but the text 'Invalid user",
    ),
    "byte order mark": (
        "config.json",
        b'\xef\xbb\xbf{"architectures": ["X"]}',
        "config.json: begins with a byte order",
    ),
    "mark in the tokenizer": ("tokenizer.json", b"\xef\xbb\xbf{}", "tokenizer.json: begins with a byte order mark"),
    "UTF-16": ("tokenizer_config.json", "{}".encode("utf-16"), "tokenizer_config.json: begins with a byte order mark"),
}


@pytest.mark.parametrize("name", INSTEAD)
def test_what_lies_in_the_place_of_a_file(name: str, tmp_path: Path) -> None:
    file, content, message = INSTEAD[name]
    write(good(tmp_path), file, content)
    with pytest.raises(CheckpointError, match=message):
        check(tmp_path)


FILES: dict[str, tuple[str, str | bytes, str]] = {
    "shard": ("model.safetensors", safetensors_bytes(TENSOR, bytes(16)), "give the folder that holds config.json"),
    "config": ("config.json", "{}", "give the folder"),
    "zip": ("model.zip", b"PK\x03\x04....", "an archive"),
    "tar": ("model.tar", bytes(257) + b"ustar", "an archive; unpack it"),
    "gz": ("model.tar.gz", b"\x1f\x8b\x08", "a packed file"),
    "old ggml": ("ggml-model-q4_0.bin.old", b"tjgg\x03\0\0\0", "before GGUF"),
    "cut gguf": ("m.gguf", b"\0\0\0\0", "does not begin as a GGUF file does"),
    "pointer": ("m.gguf", POINTER, "m.gguf: a Git LFS pointer"),
    "page": ("m.gguf", "<!doctype html>", "a web page"),
    "anything": ("m.dat", b"\x01\x02", "neither a GGUF file nor a checkpoint folder"),
}


@pytest.mark.parametrize("name", FILES)
def test_files(name: str, tmp_path: Path) -> None:
    file, content, message = FILES[name]
    path = write(tmp_path, file, content)
    with pytest.raises(InputError, match=message):
        open_source(path)
    with pytest.raises(InputError, match=message):
        check(path)


# ---- quantized ----


def bnb(**more: object) -> dict[str, object]:
    return {"quantization_config": {"quant_method": "bitsandbytes", **more}}


QUANTIZED: dict[str, tuple[dict[str, object], str]] = {
    "nf4": (bnb(load_in_4bit=True), "bitsandbytes, 4 bits"),
    "int8": (bnb(load_in_8bit=True), "bitsandbytes, 8 bits"),
    "bitsandbytes unnamed": ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes, 8 bits"),
    "of the text part": ({"text_config": bnb(load_in_4bit=True)}, "bitsandbytes, 4 bits"),
    "awq": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq, 4 bits"),
    "quanto": ({"quantization_config": {"quant_method": "quanto", "weights": "int8"}}, "quanto"),
    "gptq of 3 bits": ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, "gptq, 3 bits"),
    "mlx": ({"quantization": {"group_size": 64, "bits": 4}}, "MLX, 4 bits"),
    "hqq": ({"quantization_config": {"quant_method": "hqq"}}, "hqq"),
}


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("tensor", ["a.weight.absmax", "a.qweight"])
def test_quantized_checkpoints(name: str, tensor: str, tmp_path: Path) -> None:
    config, by = QUANTIZED[name]
    folder = good(tmp_path, **config)
    (folder / "model.safetensors").write_bytes(safetensors_bytes({tensor: TENSOR["a"]}, bytes(16)))
    with pytest.raises(CheckpointError, match=rf"quantized already .{by}.*convert the original model"):
        check(folder)


def test_quantized_in_a_type_that_we_do_not_know(tmp_path: Path) -> None:
    folder = good(tmp_path, quantization={"group_size": 64, "bits": 4})
    tensor = {"a": {"dtype": "U32", "shape": [2], "data_offsets": [0, 8]}}
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensor, bytes(8)))
    with pytest.raises(CheckpointError, match=r"quantized already .MLX, 4 bits"):
        check(folder)


def test_plain_weights_under_a_quantized_config(tmp_path: Path) -> None:
    """As training tools leave them after a merge."""
    with pytest.raises(CheckpointError, match=r"the weights are plain.*take the entry quantization_config out"):
        check(good(tmp_path, **bnb(load_in_4bit=True)))


@pytest.mark.parametrize("method", kinds.READ)
def test_what_the_converter_reads_passes(method: str, tmp_path: Path) -> None:
    check(good(tmp_path, quantization_config={"quant_method": method, "bits": 4}))


# ---- architectures ----


def test_architecture_where_the_converter_looks(tmp_path: Path) -> None:
    folder = good(tmp_path)
    assert check(folder).architecture == "LlamaForCausalLM"
    for config, name in (
        ({"text_config": {"architectures": ["Qwen2ForCausalLM"]}}, "Qwen2ForCausalLM"),
        ({"ssm_cfg": {}, "d_model": 768}, "MambaForCausalLM"),
        ({"ssm_cfg": {"layer": "Mamba2"}}, "Mamba2ForCausalLM"),
    ):
        write(folder, "config.json", json.dumps(config))
        assert check(folder).architecture == name
    write(folder, "config.json", json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match=r"no 'architectures' entry.*transformers has for model_type 'llama'"):
        check(folder)
