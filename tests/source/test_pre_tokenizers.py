"""Tokenizers whose hash the converter does not know: the runtime's pre-tokenizer is found by its tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers import demo_folder

from ptqtp_gguf.errors import CheckpointError, InputError
from ptqtp_gguf.files import KV, Reader, kv_string
from ptqtp_gguf.source import _converter_hooks as hooks
from ptqtp_gguf.source import checkpoint, pre_tokenizers
from ptqtp_gguf.source.checkpoint import to_bf16_gguf
from ptqtp_gguf.source.opening import open_source
from ptqtp_gguf.source.pre_tokenizers import KEY, check_name, differs, find, names, notes, required

pytestmark = [pytest.mark.runtime, pytest.mark.hf]


@pytest.fixture(scope="module")
def sample() -> tuple[str, list[int]]:
    """By the demo model's tokenizer, from its file."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(demo_folder() / "tokenizer.json"))
    return hooks.SAMPLE, tokenizer.encode(hooks.SAMPLE, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def kvs(demo_files: dict[str, Path]) -> dict[str, KV]:
    with Reader(demo_files["bf16"]) as reader:
        return dict(reader.header.kvs)


def named(kvs: dict[str, KV], name: str) -> dict[str, KV]:
    return {**kvs, KEY: kv_string(KEY, name)}


def test_names() -> None:
    assert {"gpt-2", "llama-bpe", "qwen2", "smollm", "deepseek-v3"} <= set(names()) and len(names()) > 50
    check_name("tekken")
    with pytest.raises(InputError, match=r"--pre-tokenizer tekkken: the runtime has none of that name; it has gpt-2, "):
        check_name("tekkken")


def test_differences(kvs: dict[str, KV], sample: tuple[str, list[int]]) -> None:
    assert kvs[KEY].value() == "smollm" and differs(kvs.values(), sample) is None
    # Llama 3's takes three digits together, this tokenizer one
    assert "cuts a sample text into other tokens" in str(differs(named(kvs, "llama-bpe").values(), sample))
    with pytest.raises(InputError, match=r"unknown pre-tokenizer type: 'nonsense'"):
        differs(named(kvs, "nonsense").values(), sample)


def test_find(kvs: dict[str, KV], sample: tuple[str, list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    assert pre_tokenizers.FIRST.index("llama-bpe") < pre_tokenizers.FIRST.index("smollm")
    found = find(named(kvs, "default").values(), sample)
    assert found is not None and differs(named(kvs, found).values(), sample) is None
    monkeypatch.setattr(pre_tokenizers, "names", lambda: ["nonsense", "llama-bpe"])
    assert find(kvs.values(), sample) is None
    with pytest.raises(CheckpointError, match=r"that llama.cpp does not know: of 2 .* --pre-tokenizer NAME takes one"):
        required(kvs.values(), sample, "model")
    assert find(kvs.values(), ("", [])) is None


def test_notes(kvs: dict[str, KV], sample: tuple[str, list[int]]) -> None:
    assert notes(kvs, sample, "", False) == []
    (found,) = notes(kvs, sample, "", True)
    assert found.startswith("pre-tokenizer smollm: llama.cpp's converter does not know this tokenizer")
    (told,) = notes(named(kvs, "llama-bpe"), sample, "llama-bpe", False)
    assert told.startswith("pre-tokenizer llama-bpe: the runtime cuts a sample text into other tokens")
    (unused,) = notes({}, ("", []), "gpt-2", False)
    assert unused == "--pre-tokenizer gpt-2 is not used: the tokenizer is no byte-level BPE"


@pytest.fixture(scope="module")
def own(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with a byte-level BPE of its own, which no list of hashes has; it puts a blank before a text.

    Its alphabet is that of the text it was trained on.
    """
    import tokenizers
    import transformers

    folder = tmp_path_factory.mktemp("own") / "model"
    shutil.copytree(tiny_checkpoint, folder, ignore=shutil.ignore_patterns("token*"))
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = tokenizers.decoders.ByteLevel()
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab, special_tokens=["<|end|>"], show_progress=False)
    made.train_from_iterator([hooks.SAMPLE.encode("ascii", "ignore").decode()], trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>").save_pretrained(folder)
    return folder


def test_a_tokenizer_of_ones_own(own: Path, tmp_path: Path) -> None:
    with open_source(own) as source:
        assert source.get(KEY) == "gpt-2"
        assert [note.partition(": ")[0] for note in source.notes] == ["pre-tokenizer gpt-2"] * 2
        assert "does not know this tokenizer" in source.notes[0] and "puts a blank before a text" in source.notes[1]
    lines = list(to_bf16_gguf(checkpoint.check(own), tmp_path / "bf16.gguf"))
    assert "again, with the pre-tokenizer gpt-2" in lines
    with Reader(tmp_path / "bf16.gguf") as reader:
        assert reader.get(KEY) == "gpt-2"


def test_a_name_that_is_given(own: Path) -> None:
    with open_source(own, pre_tokenizer="llama-bpe") as source:
        assert source.get(KEY) == "llama-bpe"
        assert [note for note in source.notes if "pre-tokenizer llama-bpe: " in note]
    with pytest.raises(InputError, match=r"--pre-tokenizer no-such: the runtime has none of that name"):
        open_source(own, pre_tokenizer="no-such")
