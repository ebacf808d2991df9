"""Why the converter failed, in one sentence with a way out; no name of an exception is all of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ptqtp_gguf.source.converter_log import ConverterLog, architectures, unknown

LLAMA = "LlamaForCausalLM"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint's folder; logs are kept beside it."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    made = tmp_path / "model"
    made.mkdir()
    (made / "tokenizer.json").write_text("{}")
    return made


def mark(log: ConverterLog) -> str:
    return str(json.loads(log.job(False, ""))["mark"])


def failed(folder: Path, **what: object) -> str:
    """The reason for an exception that the hooks have told."""
    log = ConverterLog()
    log.take("Traceback (most recent call last):")
    told = {"type": "ValueError", "text": "", "file": "x.py", "line": 7, "code": "", "steps": [], "tensor": None}
    assert log.take(mark(log) + json.dumps({"failed": {**told, "tokens": None, **what}}))
    return log.reason(folder, LLAMA, 1)


LAST_WORDS = {
    "ERROR:hf-to-gguf:Model X is not supported": (1, "does not know the architecture LlamaForCausalLM"),
    "ModuleNotFoundError: No module named 'torch'": (1, r"pip install 'ptqtp-gguf\[hf\]'"),
    "x" * 1000: (1, "failed .exit code 1.: x{300}$"),
    "": (-9, r"killed by signal 9 \(SIGKILL\); out of memory\?"),
}


@pytest.mark.parametrize("line", LAST_WORDS)
def test_last_words(folder: Path, line: str) -> None:
    code, message = LAST_WORDS[line]
    log = ConverterLog()
    assert not any(log.take(text) for text in ("before", line, ""))
    assert re.search(message, log.reason(folder, LLAMA, code))


def test_tokens_beyond_the_embedding(folder: Path) -> None:
    said = failed(folder, type="AssertionError", steps=["set_vocab", "get_vocab_base"], tokens=[49152, 49152])
    assert "tokens up to number 49152, its embedding 49152 rows" in said and "resize_token_embeddings" in said


def test_entries_that_config_json_lacks(folder: Path) -> None:
    said = failed(folder, type="KeyError", text="'rotary_pct'", code="self.hparams['rotary_pct']", file="gptneox.py")
    assert re.search(r"config.json lacks the entry 'rotary_pct', .* for LlamaForCausalLM \(gptneox.py:7\); take", said)
    said = failed(folder, type="KeyError", text="\"could not find any of: ['n_layers']\"")
    assert "config.json lacks one of the entries ['n_layers']" in said


def test_a_key_that_is_no_entry(folder: Path) -> None:
    said = failed(folder, type="KeyError", text="'<|user|>'", code='added["<|user|>"]', steps=["set_vocab"])
    assert "failed while reading the tokenizer (LlamaForCausalLM): KeyError: '<|user|>' (x.py:7)" in said


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.0.mlp.down_proj.weight.absmax", "quantized already"),
        ("base_model.model.layers.0.q_proj.lora_A.weight", "merge it first"),
        ("lm_head.weight", "tie_word_embeddings"),
        ("model.what.weight", "name the right architecture"),
    ],
)
def test_tensors_that_it_does_not_know(folder: Path, name: str, message: str) -> None:
    said = failed(folder, text=f"Can not map tensor {name!r}")
    assert f"tensor {name} is none that llama.cpp's converter knows in {LLAMA}" in said and message in said


def test_no_tokenizer(folder: Path) -> None:
    steps = ["write", "prepare_metadata", "set_vocab", "_set_vocab_gpt2"]
    assert "failed while reading the tokenizer" in failed(folder, steps=steps, text="need sentencepiece")
    (folder / "tokenizer.json").unlink()
    said = failed(folder, steps=steps, text="need sentencepiece")
    assert "no tokenizer.json and no tokenizer.model in the folder; save the tokenizer there" in said


@pytest.mark.parametrize(
    "text", ["[Errno 2] No such file or directory: '/a b/model/tokenizer.model'", "File not found: /a/tokenizer.model"]
)
def test_missing_files(folder: Path, text: str) -> None:
    said = failed(folder, type="FileNotFoundError", text=text, steps=["prepare_tensors", "modify_tensors"])
    assert said.startswith(f"{folder}: the folder lacks tokenizer.model, which llama.cpp's converter reads for {LLAMA}")


def test_tokenizers_of_another_format(folder: Path) -> None:
    text = "data did not match any variant of untagged enum ModelWrapper at line 3 column 1"
    said = failed(folder, type="Exception", text=text, steps=["set_vocab", "get_vocab_base"])
    assert "another format than the installed package" in said and "pip install -U tokenizers transformers" in said


def test_broken_json(folder: Path) -> None:
    (folder / "broken.json").write_text("{")
    (folder / "list.json").write_text("[1]")
    said = failed(folder, type="JSONDecodeError", text="Expecting value", steps=["set_vocab"])
    assert "llama.cpp's converter cannot read broken.json: not valid JSON" in said


@pytest.mark.parametrize(
    ("steps", "tensor", "doing"),
    [
        (["main", "write", "prepare_tensors", "dequant_model"], None, "undoing the quantization of the weights"),
        (["main", "write", "prepare_tensors", "modify_tensors"], "model.norm.weight", "converting tensor model.norm"),
        (["main", "write_tensors_to_file", "serve", "pieces"], "blk.0.attn_q.weight", "converting tensor blk.0.attn_q"),
        (["main", "__init__", "index_tensors"], None, "listing the tensors"),
        (["prepare_tensors", "_generate_nvfp4_tensors"], None, "undoing the quantization of the weights"),
        (["main", "load_hparams"], None, "reading config.json"),
        (["main"], None, "reading the checkpoint"),
    ],
)
def test_anything_else_says_what_was_being_done_and_keeps_the_log(
    folder: Path, steps: list[str], tensor: str | None, doing: str
) -> None:
    said = failed(folder, type="AssertionError", code="assert scale.ndim == 2", steps=steps, tensor=tensor)
    assert f"failed while {doing}" in said and "takes for granted: assert scale.ndim == 2 (x.py:7)" in said
    (log,) = (folder.parent / "tmp").iterdir()
    assert said.endswith(f"all that it said is in {log}")
    ways = {"undoing": "; convert the original model;", "converting": "; do config.json and tensors belong"}
    assert all((way in said) == doing.startswith(verb) for verb, way in ways.items())
    assert log.read_text() == "Traceback (most recent call last):\n"


def test_a_checkpoint_cannot_speak_for_the_hooks(folder: Path) -> None:
    log, other = ConverterLog(), ConverterLog()
    assert not log.take(mark(other) + json.dumps({"config": {"a": 1}}))
    assert not log.take("ptqtp " + json.dumps({"config": {"a": 1}}))
    assert log.config == {} and log.take(mark(log) + json.dumps({"config": {"a": 1}})) and log.config == {"a": 1}


@pytest.mark.runtime
def test_nearest_names() -> None:
    assert {"LlamaForCausalLM", "Qwen3MoeForCausalLM"} <= set(architectures())
    assert "nearest names that it knows: LlamaForCausalLM" in unknown("LlamaForCasualLM")
    assert "nearest" not in unknown("Frobnicator")
    assert unknown("Qwen9ForSequenceClassification").endswith("Qwen9ForSequenceClassification; it is a classifier")
    assert "a model of speech" in unknown("WhisperForConditionalGeneration")
