"""Text to calibrate with, and the windows of tokens that it gives."""

from __future__ import annotations

import gzip
import warnings
from pathlib import Path

import numpy as np
import pytest
from helpers import copy_tokenizer

from ptqtp_gguf.calibrate import texts
from ptqtp_gguf.calibrate.sampling import written
from ptqtp_gguf.calibrate.texts import Text, load, tokens
from ptqtp_gguf.errors import CalibrationError, InputError
from ptqtp_gguf.source.checkpoint import Checkpoint, check

pytestmark = pytest.mark.hf


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The demo model's tokenizer, byte-level, without BOS."""
    folder = tmp_path_factory.mktemp("bpe")
    copy_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return Checkpoint(folder, "LlamaForCausalLM", (), 0)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tiny model and its tokenizer of a hundred words, with BOS and an unknown token."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("words")
    vocab = {"<unk>": 0, "<s>": 1, "a": 2, **{f"w{i}": 3 + i for i in range(100)}}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>")
        tokenizer.save_pretrained(folder)
    return check(folder)


def numbered(n: int) -> str:
    return " ".join(f"w{i % 100}" for i in range(n))


def test_windows(words: Checkpoint) -> None:
    got = tokens([Text("t", numbered(70))], words, window=11, n_tokens=110)
    assert got.dtype == np.int64 and got.shape == (7, 11)
    assert (got[:, 0] == 1).all() and got[:, 1:].reshape(-1).tolist() == [3 + i for i in range(70)]
    assert tokens([Text("t", numbered(70))], words, window=11, n_tokens=33).shape == (3, 11)


def test_windows_of_a_long_text_are_spread_over_it(words: Checkpoint) -> None:
    text = " ".join(["w1"] * 5000 + ["w2"] * 5000)
    got = tokens([Text("t", text)], words, window=8, n_tokens=80)
    assert got.shape == (10, 8) and [int(w[1]) - 3 for w in got] == [1] * 5 + [2] * 5


def test_texts_take_turns_and_fill_up(words: Checkpoint) -> None:
    one, two = Text("one", "w1 " * 700), Text("two", "w2 " * 14)
    got = tokens([one, two], words, window=8, n_tokens=64)
    assert [int(w[1]) - 3 for w in got] == [1, 2, 1, 2, 1, 1, 1, 1]


def test_long_texts_are_tokenized_in_parts(words: Checkpoint) -> None:
    """The tokens are those of the whole: cut at the end of a line, at a blank in a line without an end."""
    for text in ("\n".join([numbered(40)] * 1200), " ".join([numbered(40)] * 1200)):
        assert len(text) > 2 * texts.TOGETHER
        got = tokens([Text("t", text)], words, window=11, n_tokens=11 * 4800)
        assert got[:, 1:].reshape(-1).tolist() == [3 + i % 40 for i in range(48000)]
    with pytest.raises(CalibrationError, match="unknown"):
        tokens([Text("t", "w" * 3 * texts.TOGETHER)], words, window=2, n_tokens=10)


def test_builtin(bpe: Checkpoint) -> None:
    builtin = load("builtin")
    assert builtin.text and len(builtin.text) > 700_000
    got = tokens([builtin], bpe, window=256, n_tokens=256 * 100)
    assert got.shape == (100, 256) and len(np.unique(got)) > 2000


def test_files(tmp_path: Path) -> None:
    plain, lines, packed = tmp_path / "a.txt", tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    plain.write_text("one\ntwo")
    lines.write_text('{"text": "one", "n": 1}\n\n{"text": "tw\\u00f6"}\n')
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    assert load(str(plain)).text == "one\ntwo"
    assert load(str(lines)).text == load(str(packed)).text == "one\n\ntw\u00f6"
    assert load("self").text is None


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("missing.txt", None, r"missing\.txt: no such file; --calib takes"),
        ("empty.txt", b" \n", r"empty\.txt: holds no text"),
        ("binary", b"\x80\x81GGUF", "no UTF-8 text"),
        ("zeros.txt", b"text\0text", "holds zero bytes"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "x"}\n', r'line 2: no "text" in it; it has: txt'),
        ("b.jsonl", b'{"text": 1}\n', 'no "text"'),
        ("c.jsonl", b"{text\n", "line 1: not valid JSON"),
        ("d.jsonl.gz", b"no gzip", "line 1: not valid JSON"),
        ("e.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9999, mtime=0)[:-20], "ended before"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, data: bytes | None, message: str) -> None:
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(CalibrationError, match=message) as e:
        load(str(path))
    assert "\n" not in str(e.value)


def test_no_data_set_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        load("some/data")


def test_the_file_of_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the cache of the hub: not what is about the data; what is for training first."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "datasets--some--data"
    files = cached / "snapshots" / ("0" * 40)
    files.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    for name in ("README.txt", "dataset_infos.json", "dataset_dict.json", "requirements.txt"):
        (files / name).write_text("{}")
    (files / "eval.csv").write_text("id,text\n1,eval\n")
    assert load("some/data").text == "eval"
    (files / "z-train.json").write_text('[{"instruction": "a", "output": "b"}]')
    assert load("some/data").text == "a\n\nb"


def test_bad_texts(words: Checkpoint, bpe: Checkpoint, tmp_path: Path) -> None:
    for found, text, window, message in (
        (words, numbered(9), 11, "t: 9 tokens; a window needs 10; give more text"),
        (words, "was ist das " * 99, 11, r"t: 1\.00 of its tokens are unknown ones, the limit is 0\.2"),
        (bpe, "\u1e3c\ua015\U00012345" * 500, 64, "are but parts of a character"),
        (bpe, numbered(99), 1, "at least one window, of two tokens"),
        (Checkpoint(tmp_path, "x", (), 0), "text", 8, "transformers cannot load its tokenizer"),
    ):
        with pytest.raises(CalibrationError, match=message) as e:
            tokens([Text("t", text)], found, window=window, n_tokens=64)
        assert "\n" not in str(e.value)


def test_what_the_model_writes(words: Checkpoint) -> None:
    """Each token is drawn by the probabilities that all before it in the window give."""
    import torch
    import transformers

    got = tokens([Text("self", None)], words, window=48, n_tokens=48 * 40)
    assert got.shape == (40, 48) and (got[:, 0] == 1).all()
    assert np.array_equal(got, tokens([Text("self", None)], words, window=48, n_tokens=48 * 40))
    model = transformers.AutoModelForCausalLM.from_pretrained(words.folder, dtype=torch.float32)
    with torch.no_grad():
        log_p = torch.log_softmax(model(torch.from_numpy(got)).logits[:, :-1].double(), dim=-1)
    drawn = log_p.gather(2, torch.from_numpy(got[:, 1:, None]))[..., 0]
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    # surprise is the entropy on average; of a distribution this far from uniform, other tokens would be far from that
    spread = float((drawn + entropy).std()) / drawn.numel() ** 0.5
    assert abs(float((drawn + entropy).mean())) < 4 * spread
    assert float(log_p.mean() + entropy.mean()) < -10 * spread

    first = written(words, 40, 2, None, np.array([5, 6, 7]))[:, 0]
    assert set(first.tolist()) == {5, 6, 7}


def test_the_model_takes_its_share(words: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "written", lambda found, n, window, *rest: np.full((n, window), 7))
    got = tokens([Text("self", None), Text("t", numbered(999))], words, window=16, n_tokens=16 * 9)
    assert [bool((w == 7).all()) for w in got] == [True, False] * 4 + [True]
