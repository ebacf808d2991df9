"""A conversation on a small model: the template, the history, a full context, what is saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from talking_model import write_talking_model

from ptqtp_gguf.conversion import pipeline as conversion
from ptqtp_gguf.errors import ChatError, InputError, OutputError
from ptqtp_gguf.llamacpp import model as runtime
from ptqtp_gguf.serve.chat import Chat, harmless

pytestmark = pytest.mark.runtime
TEMPLATE = "tokenizer.chat_template"
N_CTX = 256


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("talk")
    summary = conversion.convert(write_talking_model(folder / "f32.gguf"), folder / "talking.gguf")
    assert "TP2_2" in summary.weights_by_type()
    return summary.path


@pytest.fixture(scope="module")
def model(ours: Path) -> Iterator[Any]:
    with closing(runtime.load(ours, n_ctx=N_CTX, threads=2)) as model:
        yield model


# ---- the conversation ----


def test_prompt_is_the_template_s_and_history_is_seen(model: Any) -> None:
    chat = Chat(model, temperature=0, max_tokens=12)
    assert chat.has_template
    answer = "".join(chat.ask("Hello"))
    assert len(answer) == 12 and chat.turns[-1] == {"role": "assistant", "content": answer}
    assert chat.pace and chat.pace.reason == "length" and chat.pace.tokens in (11, 12)
    user, begin = "<|im_start|>user\nHello<|im_end|>\n", "<|im_start|>assistant\n"
    seen = f"{user}{begin}{answer}<|im_end|>\n{begin}"
    assert chat.prompt() == model.tokenize(seen.encode(), add_bos=True, special=True)
    assert chat.prompt().count(model.token_bos()) == 1
    chat.system = "Be brief."
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert chat.prompt() == model.tokenize((system + seen).encode(), add_bos=True, special=True)


def test_a_seed_repeats_a_conversation(model: Any) -> None:
    def talk(seed: int) -> list[str]:
        chat = Chat(model, temperature=1.5, seed=seed, max_tokens=20)
        return ["".join(chat.ask(text)) for text in ("Name a colour.", "And another.")]

    assert talk(7) == talk(7) != talk(8)


def test_a_stopped_answer_is_kept_and_can_be_taken_back(model: Any) -> None:
    chat = Chat(model, temperature=0)
    with closing(chat.ask("Count to twenty.")) as pieces:
        first = next(pieces)
    assert [m["content"] for m in chat.turns] == ["Count to twenty.", first]
    assert chat.pace and chat.pace.reason == "interrupted"
    assert chat.undo() == {"role": "user", "content": "Count to twenty."}
    assert not chat.turns and chat.undo() is None


def test_when_the_context_is_full_the_oldest_turns_go_first(model: Any, tmp_path: Path) -> None:
    notes: list[str] = []
    chat = Chat(model, system="Be brief.", temperature=0, max_tokens=3, notice=notes.append)
    for i in range(6):
        chat.turns += [
            {"role": "user", "content": f"Message {i}."},
            {"role": "assistant", "content": f"Answer {i}. " * 2},
        ]
    before = list(chat.turns)
    assert "".join(chat.ask("The last?"))
    seen = model.detokenize(chat.prompt(), special=True).decode()
    assert len(notes) == 1 and f"no longer sees the {chat.first // 2} oldest turns" in notes[0]
    assert "Be brief." in seen and "The last?" in seen and "Answer 5." in seen and "Message 0." not in seen
    assert chat.pace and chat.pace.prompt <= N_CTX // 2
    assert chat.turns[:12] == before  # what the model does not see is not forgotten
    chat.save(tmp_path / "c.json")
    assert "Message 0." in (tmp_path / "c.json").read_text()


def test_an_answer_ends_with_the_context(model: Any) -> None:
    chat = Chat(model)
    "".join(chat.ask("Hello"))
    assert chat.pace and chat.pace.reason == "full" and chat.pace.speed
    assert N_CTX - 2 <= chat.pace.prompt + chat.pace.tokens <= N_CTX


def test_a_message_that_is_too_long(model: Any) -> None:
    chat = Chat(model, max_tokens=3)
    chat.turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ChatError, match=rf"takes \d{{3}} tokens .* a context of {N_CTX} leaves {N_CTX * 3 // 4}"):
        next(chat.ask("word " * 150))
    assert len(chat.turns) == 2 and chat.first == 0
    with pytest.raises(InputError, match=r"cannot continue this prompt: Requested tokens \(\d+\) exceed context"):
        next(runtime.generate(model, "word " * 150, max_tokens=1, temperature=0, seed=1))
    assert "".join(chat.ask("word"))


def test_saved_conversations(model: Any, tmp_path: Path) -> None:
    chat, path = Chat(model, system="S \x1b", max_tokens=2), tmp_path / "c.json"
    assert "".join(chat.ask("H\u00e9llo\nthere"))
    chat.save(path)
    with pytest.raises(OutputError, match="exists already"):
        chat.save(path)
    other = Chat(model)
    other.load(path)
    assert (other.system, other.turns) == (chat.system, chat.turns)
    for bad in (
        b"",
        b"{",
        b"[]",
        b'{"schema": 2, "messages": []}',
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"schema": 1}',
        b'{"schema": 1, "messages": [{"role": "user"}]}',
        b'{"schema": 1, "messages": {"a": 1}}',
        b'{"schema": 1, "messages": [{"role": "user", "content": "x"}]}',
        b'{"schema": 1, "messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": ""}]}',
    ):
        path.write_bytes(bad)
        with pytest.raises(ChatError, match="no saved conversation"):
            other.load(path)
    assert other.turns == chat.turns
    with pytest.raises(InputError, match="No such file"):
        other.load(tmp_path / "absent")


def test_a_file_without_a_template(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(model.metadata, TEMPLATE)
    chat = Chat(model, system="A dialogue.", temperature=0, max_tokens=24)
    answer = "".join(chat.ask("Hello"))
    assert not chat.has_template and answer and not answer[0].isspace()
    seen = f"A dialogue.\nUser: Hello\nAssistant: {answer}\nAssistant:"
    assert chat.prompt() == model.tokenize(seen.encode(), add_bos=True, special=True)


def test_a_template_that_refuses(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model.metadata, TEMPLATE, "{{ raise_exception('System role\\nnot supported') }}")
    chat = Chat(model)
    with pytest.raises(ChatError, match="refuses these messages: System role not supported"):
        next(chat.ask("x"))
    assert not chat.turns
    assert "".join(Chat(model, template="{{ messages[-1].content }}", max_tokens=2).ask("x"))


def test_text_cannot_steer_the_terminal() -> None:
    text = "a\x1b[2Jb\r\x07\x9b\u202ec\ud800\td\n\u00e9\u4e2d\U0001f468\u200d\U0001f469"
    shown = harmless(text)
    assert shown == "a\\x1b[2Jb\\r\\x07\\x9b\\u202ec\\ud800\td\n\u00e9\u4e2d\U0001f468\u200d\U0001f469"
