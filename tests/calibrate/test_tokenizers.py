"""The tokenizer of a GGUF file, by the runtime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from bench_models import write_llama
from helpers import rewritten
from talking_model import BLANK, LETTERS, SPECIAL, TEMPLATE, write_talking_model

from ptqtp_gguf.calibrate.documents import Document
from ptqtp_gguf.calibrate.texts import Text, tokens
from ptqtp_gguf.calibrate.tokenizers import RuntimeTokenizer
from ptqtp_gguf.errors import CalibrationError, InputError
from ptqtp_gguf.files.gguf import kv_scalar
from ptqtp_gguf.files.gguf_values import BOOL
from ptqtp_gguf.llamacpp import Model

pytestmark = pytest.mark.runtime
UNKNOWN, BOS, EOS, START = range(4)
BYTES = len(SPECIAL)  # the first of them
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def letters(text: str) -> list[int]:
    return [BYTES + 256 + LETTERS.index(c) for c in text.replace(" ", BLANK)]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talking_model(tmp_path_factory.mktemp("model") / "m.gguf")


@pytest.fixture(params=[False, True], ids=["whole", "vocabulary"])
def model(file: Path, request: pytest.FixtureRequest) -> Iterator[Model]:
    with Model(file, vocabulary_only=request.param) as opened:
        yield opened


def test_encode(model: Model) -> None:
    """Nothing is put around a part; each is encoded by itself."""
    it = RuntimeTokenizer(model, None)
    got = it.encode(["ab c", "", "z"])
    assert [a.dtype for a in got] == [np.int64] * 3
    assert [a.tolist() for a in got] == [letters(" ab c"), [], letters(" z")]
    assert it.encode([]) == []
    assert (it.bos, it.unknown) == (BOS, UNKNOWN)


def test_characters_that_it_has_no_token_for(model: Model) -> None:
    """Bytes stand for them, of which each is a part of a character."""
    it = RuntimeTokenizer(model, None)
    got = it.encode(["a\u00fc"])[0].tolist()
    assert got == [*letters(" a"), BYTES + 0xC3, BYTES + 0xBC]
    assert [it.stray(t) for t in got] == [False, False, True, True]
    assert not it.stray(BYTES + ord("!")) and it.stray(BYTES + 0xFF) and not it.stray(EOS)


def test_names_of_special_tokens(model: Model) -> None:
    text = "<|im_start|>a<|im_end|>"
    it = RuntimeTokenizer(model, None)
    parsed = it.encode([text], special=True)[0].tolist()
    assert [t for t in parsed if t < BYTES] == [START, EOS]
    assert [t for t in parsed if t >= BYTES] in (letters("a"), letters(" a"))
    plain = it.encode([text])[0].tolist()
    assert min(plain) >= BYTES and len(plain) == len(text) + 1
    assert it.encode(["<s>"])[0].tolist() != it.encode(["<s>"], special=True)[0].tolist() == [BOS]


def test_render(model: Model) -> None:
    """By the template that it was given, without the beginning of an answer; the file's own does not count."""
    want = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    assert RuntimeTokenizer(model, TEMPLATE).render(TALK) == want
    assert RuntimeTokenizer(model, "{{ bos_token }}|{{ messages[1].content }}|{{ eos_token }}").render(TALK) == (
        "<s>|yes|<|im_end|>"
    )
    for none in (None, ""):
        assert RuntimeTokenizer(model, none).render(TALK) is None


PARTS = "{% for m in messages %}<|im_start|>{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(("template", "shown"), [(PARTS, "<|im_start|>hi<|im_start|>yes"), ("<|im_start|>", "")])
def test_the_texts_are_calibrated_on(model: Model, template: str, shown: str) -> None:
    """In the form that the template takes; where it loses them, without it."""
    it = RuntimeTokenizer(model, template)
    talk = Document("hi\nyes", (("user", "hi"), ("assistant", "yes")))
    text = Text("t", talk.text * 20, (talk,) * 20)
    ids = set(tokens([text], it, 8, 24).ravel().tolist())
    assert set(letters("hiyes")) <= ids and (START in ids) == bool(shown)
    if shown:
        assert it.render(TALK) == shown


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{% for x %%}", "{{ messages[5].content.x }}", "{{ 1 / 0 }}"]
)
def test_templates_that_refuse(model: Model, template: str) -> None:
    assert RuntimeTokenizer(model, template).render(TALK) is None


def test_a_rendered_conversation_comes_back(model: Model) -> None:
    it = RuntimeTokenizer(model, TEMPLATE)
    text = it.render(TALK)
    assert text
    got = it.encode([text], special=True)[0].tolist()
    assert [t for t in got if t < BYTES] == [START, EOS] * 2
    assert b"".join(model.piece(t, special=True) for t in got).decode().replace(" ", "") == text.replace(" ", "")


def test_no_token_before_a_text(file: Path, tmp_path: Path) -> None:
    none = kv_scalar("tokenizer.ggml.add_bos_token", BOOL, False)
    with Model(rewritten(file, tmp_path / "m.gguf", [none]), vocabulary_only=True) as model:
        it = RuntimeTokenizer(model, TEMPLATE)
        assert it.bos is None and it.encode(["ab"])[0].tolist() == letters(" ab")
        assert RuntimeTokenizer(model, "{{ bos_token }}").render(TALK) == "<s>"  # a template names it all the same


def test_no_unknown_token(tmp_path: Path) -> None:
    """All tokens are plain ones."""
    with Model(write_llama(tmp_path / "m.gguf"), vocabulary_only=True) as model:
        assert RuntimeTokenizer(model, None).unknown is None


def test_a_text_that_its_tokenizer_fails_on(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise InputError("its tokenizer fails")

    monkeypatch.setattr(model, "tokens", fails)
    with pytest.raises(CalibrationError, match=r"^its tokenizer fails$"):
        RuntimeTokenizer(model, None).encode(["a"])


def test_a_file_without_a_tokenizer(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "n_vocab", 0)
    with pytest.raises(CalibrationError, match=r"m\.gguf: has no tokenizer; give a file that has one$"):
        RuntimeTokenizer(model, None)
