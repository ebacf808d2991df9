"""What is text in a record of a data set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ptqtp_gguf.calibrate.documents import Document, read
from ptqtp_gguf.errors import CalibrationError

TALK = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}]
SAID = (("user", "Hi."), ("assistant", "Hello!"))


def found(folder: Path, *records: object) -> list[Document]:
    """The same as lines and as an array."""
    lines, array = folder / "lines", folder / "array"
    lines.write_text("".join(json.dumps(r) + "\n" for r in records))
    array.write_text(json.dumps(records))
    got = read(lines, "lines")
    assert read(array, "array") == got
    return got


def texts(folder: Path, *records: object) -> list[str]:
    return [d.text for d in found(folder, *records)]


# ---- conversations ----


@pytest.mark.parametrize("key", ["messages", "conversations", "conversation"])
@pytest.mark.parametrize(("role", "content"), [("role", "content"), ("from", "value")])
@pytest.mark.parametrize(("user", "answerer"), [("user", "assistant"), ("human", "gpt")])
def test_conversations(tmp_path: Path, key: str, role: str, content: str, user: str, answerer: str) -> None:
    turns = [{role: "system", content: "Be."}, {role: user, content: "Hi."}, {role: answerer, content: "Yes?\n"}]
    got = found(tmp_path, {"id": 1, key: turns}, {key: turns[1:]})
    messages = (("system", "Be."), ("user", "Hi."), ("assistant", "Yes?\n"))
    assert got == [Document("Be.\n\nHi.\n\nYes?\n", messages), Document("Hi.\n\nYes?\n", messages[1:])]


def test_parts_of_messages(tmp_path: Path) -> None:
    parts = [{"type": "image", "url": "x"}, {"type": "text", "text": "What "}, "no part", {"text": "is it?"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"text": "A cat."}]}]
    got = found(tmp_path, {"messages": turns})
    assert got == [Document("What is it?\n\nA cat.", (("user", "What is it?"), ("assistant", "A cat.")))]


def test_a_part_whose_text_is_null(tmp_path: Path) -> None:
    """As data sets with one form for all parts have pictures."""
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]
    assert texts(tmp_path, {"messages": [{"role": "user", "content": parts}]}) == ["What is it?"]


def test_other_roles_are_left_out(tmp_path: Path) -> None:
    tool = [{"role": "tool", "content": "42"}, {"from": "observation", "value": "x"}, {"content": "of nobody"}]
    no_text = [{"role": "assistant", "content": None, "tool_calls": []}, {"role": "user", "content": 7}]
    got = found(tmp_path, {"messages": [TALK[0], *tool, *no_text, TALK[1]]})
    assert got == [Document("Hi.\n\nHello!", (("user", "Hi."), ("assistant", "Hello!")))]


def test_text_goes_before_messages(tmp_path: Path) -> None:
    assert found(tmp_path, {"messages": TALK, "text": "rendered"}) == [Document("rendered")]
    assert texts(tmp_path, {"messages": 7, "conversations": TALK}) == ["Hi.\n\nHello!"]


def test_turns_by_role(tmp_path: Path) -> None:
    """{role: content}, roles by other names and in other cases, a whole conversation as JSON in a string."""
    for turns in (
        [{"human": "Hi.", "assistant": "Hello!"}],
        [{"User": "Hi."}, {"Bot": "Hello!"}],
        [{"role": "Human", "content": "Hi."}, {"role": "model", "content": "Hello!"}],
        [{"from": "prompter", "value": "Hi."}, {"from": "ChatGPT", "value": "Hello!"}],
        json.dumps(TALK),
    ):
        assert [d.messages for d in found(tmp_path, {"conversation": turns, "n": 1})] == [SAID]
    assert texts(tmp_path, {"messages": "[no JSON", "text": "a"}) == ["a"]


def test_a_list_of_turns_is_one_conversation(tmp_path: Path) -> None:
    """And records that only look a little like turns are none."""
    assert [d.messages for d in found(tmp_path, TALK, TALK)] == [SAID, SAID]
    (tmp_path / "one").write_text(json.dumps(TALK, indent=1))
    assert [d.messages for d in read(tmp_path / "one", "one")] == [SAID]
    assert texts(tmp_path, {"user": "anna", "text": "a"}, {"user": "ben", "text": "b"}) == ["a", "b"]
    assert texts(tmp_path, {"from": "anna@x.org", "text": "a"}, {"from": "ben@x.org", "text": "b"}) == ["a", "b"]


ASKED, ANSWERED = [{"role": "user", "content": "Add."}], [{"role": "assistant", "content": "3"}]


@pytest.mark.parametrize(
    ("record", "question"),
    [
        ({"instruction": "Add.", "input": "1, 2", "output": "3"}, "Add.\n\n1, 2"),
        ({"instruction": "Add.", "input": "", "output": "3"}, "Add."),
        ({"instruction": "Add.", "input": None, "output": "3"}, "Add."),
        ({"Prompt": "Add.", "Completion": "3"}, "Add."),
        ({"prompt": "Add.", "response": "3", "n": 7}, "Add."),
        ({"question": "Add.", "context": "1, 2", "answer": "3"}, "Add.\n\n1, 2"),
        ({"query": "Add.", "answer": "3"}, "Add."),
        ({"input": "Add.", "output": "3"}, "Add."),
        (
            {"prompt": [{"role": "user", "content": "Add."}], "completion": [{"role": "assistant", "content": "3"}]},
            "Add.",
        ),
        ({"prompt": "Add.", "chosen": "3", "rejected": "4"}, "Add."),
        (
            {"chosen": [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "3"}], "rejected": []},
            "Add.",
        ),
    ],
)
def test_questions_and_answers(tmp_path: Path, record: dict[str, object], question: str) -> None:
    assert found(tmp_path, record) == [Document(f"{question}\n\n3", (("user", question), ("assistant", "3")))]
    with_system = {**record, "system": "Be."}
    if "messages" not in record and isinstance(record.get("output"), str):
        assert found(tmp_path, with_system)[0].messages[0] == ("system", "Be.")


def test_other_texts(tmp_path: Path) -> None:
    assert texts(tmp_path, {"id": 1, "article": "a"}, {"body": "b"}, {"prompt": "c"}, {"CODE": "d"}) == list("abcd")
    assert texts(tmp_path, {"text": ["one", "two"]}) == ["one\ntwo"]
    assert texts(tmp_path, {"output": "", "instruction": ""}, {"text": "a"}) == ["a"]


def test_records_in_records(tmp_path: Path) -> None:
    """As the hub's server, SQuAD and batches of requests have them; strings that are no text are not taken for it."""
    rows = {"features": [{"name": "text", "type": {"dtype": "string"}}], "rows": [{"row": {"text": "a"}, "row_idx": 0}]}
    assert texts(tmp_path, rows) == ["a"]
    squad = {
        "data": [{"title": "t", "paragraphs": [{"context": "a", "qas": []}, {"context": "b", "qas": [{"id": "1"}]}]}]
    }
    assert texts(tmp_path, squad) == ["a", "b"]
    assert [d.messages for d in found(tmp_path, {"id": "1", "body": {"model": "m", "messages": TALK}})] == [SAID]
    assert texts(tmp_path, {"train": [{"text": "a"}, None, {"text": None}, {"text": "b"}]}) == ["a", "b"]
    for record in ({"tags": ["a", "b"], "txt": "c"}, {"meta": {"name": "a"}}, {"a": {"b": [1, 2]}}):
        with pytest.raises(CalibrationError, match='no "text" in it; it has: '):
            found(tmp_path, {"text": "a"}, record)
    deep: object = {"text": "a"}
    for _ in range(300):
        deep = {"a": [deep]}
    with pytest.raises(CalibrationError, match=r'no "text" in it; it has: a$'):
        found(tmp_path, {"text": "a"}, deep)
