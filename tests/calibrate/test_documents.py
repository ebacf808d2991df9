"""Documents out of files in the forms that people have text in, told by content."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from ptqtp_gguf.calibrate import documents
from ptqtp_gguf.calibrate.documents import Document, read, whole
from ptqtp_gguf.errors import CalibrationError

TALK = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}]


def found(folder: Path, data: str | bytes, name: str = "text") -> list[Document]:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return read(path, name)


def texts(folder: Path, data: str | bytes, name: str = "text") -> list[str]:
    return [d.text for d in found(folder, data, name)]


def lines(*records: object) -> str:
    return "".join(json.dumps(r) + "\n" for r in records)


# ---- one text ----


def test_plain_text(tmp_path: Path) -> None:
    text = "One line.\n\n  \u00dcber zwei,\n\U0001f600 and three.\n"
    assert found(tmp_path, text) == [Document(text, ())]
    assert texts(tmp_path, text, "text.md") == [text]
    assert texts(tmp_path, "no end of line") == ["no end of line"]


def test_bom(tmp_path: Path) -> None:
    for name in ("text", "text.jsonl"):
        assert texts(tmp_path, b"\xef\xbb\xbf" + lines({"text": "a"}).encode(), name) == ["a"]
    assert texts(tmp_path, b"\xef\xbb\xbfword") == ["word"]
    assert texts(tmp_path, b'\xef\xbb\xbf["a", "b"]') == ["a", "b"]
    assert texts(tmp_path, gzip.compress(b"\xef\xbb\xbfword")) == ["word"]


def test_ends_of_lines(tmp_path: Path) -> None:
    assert texts(tmp_path, "one\r\ntwo\r\n\r\nthree") == ["one\ntwo\n\nthree"]
    assert texts(tmp_path, '{"text": "a\\r\\nb"}\r\n\r\n{"text": "c"}\r\n') == ["a\r\nb", "c"]
    assert texts(tmp_path, '[\r\n"a",\r\n"b"\r\n]\r\n') == ["a", "b"]
    assert texts(tmp_path, gzip.compress(b"one\r\ntwo")) == ["one\ntwo"]


@pytest.mark.parametrize(
    "text",
    [
        "[1] A note.\n[2] Another.\n",
        "[Chorus]\nLa la.\n",
        "[",
        "[]",
        "[1, 2, 3]",
        "[null]",
        '["a", "b"]\n["c"]\n',
        '["not closed\n',
        "{curly} prose\nand more\n",
        "{",
        "{}",
        '{"key": "no text of ours"}\n{"key": 2}\n',
        '{"text": "not closed\n',
        '{\n"text": "an object over lines"\n}\n',
        "{%- a template %}\n",
        '"text"\n',
        "null\n",
        "7\n",
        '{"text": "a"} and more\n',
    ],
)
def test_prose_that_begins_like_json(tmp_path: Path, text: str) -> None:
    assert found(tmp_path, text) == [Document(text, ())]
    assert found(tmp_path, gzip.compress(text.encode())) == [Document(text, ())]


def test_blank_lines_before(tmp_path: Path) -> None:
    assert texts(tmp_path, "\n  \n\n" + lines({"text": "a"}, {"text": "b"})) == ["a", "b"]
    assert texts(tmp_path, '\n\n  ["a", "b"]') == ["a", "b"]
    assert [t.strip() for t in texts(tmp_path, "\n\n word")] == ["word"]


# ---- JSON ----


def test_json_lines_by_content(tmp_path: Path) -> None:
    """Whatever the name; other keys are let be, blank lines too."""
    data = '{"n": 1, "text": "one"}\n\n  \n{"content": "tw\\u00f6", "text": null}\n{"text": "three", "content": "x"}'
    for name in ("text", "text.txt", "text.json", "text.jsonl", "text.jsonl.txt"):
        assert texts(tmp_path, data, name) == ["one", "tw\u00f6", "three"]


def test_the_name_decides_where_the_first_line_does_not(tmp_path: Path) -> None:
    data = '"one"\n{"text": "two"}\n'
    assert texts(tmp_path, data, "a.jsonl") == ["one", "two"]
    assert texts(tmp_path, data, "a.txt") == [data]


def test_json_arrays(tmp_path: Path) -> None:
    for indent in (None, 2):
        of_all = ["one", {"text": "two"}, {"content": "three"}, {"messages": TALK}]
        got = found(tmp_path, json.dumps(of_all, indent=indent))
        assert [d.text for d in got] == ["one", "two", "three", "Hi.\n\nHello!"]
        assert got[3].messages == (("user", "Hi."), ("assistant", "Hello!")) and not got[0].messages


def test_records_without_text_are_left_out(tmp_path: Path) -> None:
    empty: list[dict[str, object]] = [
        {"text": None},
        {"text": ""},
        {"text": " \n"},
        {"content": None},
        {"messages": []},
        {"messages": None},
        {"conversations": []},
        {"messages": [{"role": "user", "content": ""}]},
    ]
    for record in empty:
        assert texts(tmp_path, lines(record, {"text": "a"}, record, {"text": "b"}, record)) == ["a", "b"]
        assert texts(tmp_path, json.dumps([record, "a", record, "", "b"])) == ["a", "b"]
    assert texts(tmp_path, lines({"text": None, "content": "c"}, {"messages": None, "conversation": TALK})) == [
        "c",
        "Hi.\n\nHello!",
    ]
    with pytest.raises(CalibrationError, match=r"^text: holds no text$"):
        found(tmp_path, lines(*empty))


@pytest.mark.parametrize(
    ("escapes", "text"),
    [
        (r"a\ud83d", "a\ufffd"),
        (r"\ud83da", "\ufffda"),
        (r"a\ude00b", "a\ufffdb"),
        (r"\ud83d\ud83d", "\ufffd\ufffd"),
        (r"\ude00\ud83d", "\ufffd\ufffd"),
        (r"\ud83d\ude00\ud83d", "\U0001f600\ufffd"),
        (r"x\ud83d\ude00y", "x\U0001f600y"),
    ],
)
def test_halves_of_pairs(tmp_path: Path, escapes: str, text: str) -> None:
    """json.loads lets them pass; no tokenizer takes them."""
    as_talk = f'{{"messages": [{{"role": "user", "content": "{escapes}"}}]}}'
    for data in (f'{{"text": "{escapes}"}}\n', f'["{escapes}"]', as_talk):
        got = found(tmp_path, data)
        assert [d.text for d in got] == [text]
        assert got[0].messages in ((), (("user", text),))
    assert found(tmp_path, as_talk)[0].messages == (("user", text),)
    assert whole(json.loads(f'"{escapes}"')) == text


def test_whole() -> None:
    for text in ("", "word", "\ufeffword", "\U0001f600\u00fc", "\ufffe\uffff"):
        assert whole(text) == text
    assert whole("\ud83d") == whole("\ude00") == "\ufffd"


# ---- conversations ----


@pytest.mark.parametrize("key", ["messages", "conversations", "conversation"])
@pytest.mark.parametrize(("role", "content"), [("role", "content"), ("from", "value")])
@pytest.mark.parametrize(("user", "answerer"), [("user", "assistant"), ("human", "gpt")])
def test_conversations(tmp_path: Path, key: str, role: str, content: str, user: str, answerer: str) -> None:
    turns = [{role: "system", content: "Be."}, {role: user, content: "Hi."}, {role: answerer, content: "Yes?\n"}]
    got = found(tmp_path, lines({"id": 1, key: turns}, {key: turns[1:]}))
    messages = (("system", "Be."), ("user", "Hi."), ("assistant", "Yes?\n"))
    assert got == [Document("Be.\n\nHi.\n\nYes?\n", messages), Document("Hi.\n\nYes?\n", messages[1:])]


def test_parts_of_messages(tmp_path: Path) -> None:
    parts = [{"type": "image", "url": "x"}, {"type": "text", "text": "What "}, "no part", {"text": "is it?"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"text": "A cat."}]}]
    got = found(tmp_path, lines({"messages": turns}))
    assert got == [Document("What is it?\n\nA cat.", (("user", "What is it?"), ("assistant", "A cat.")))]


def test_a_part_whose_text_is_null(tmp_path: Path) -> None:
    """As data sets with one form for all parts have pictures."""
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]
    assert texts(tmp_path, lines({"messages": [{"role": "user", "content": parts}]})) == ["What is it?"]


def test_other_roles_are_left_out(tmp_path: Path) -> None:
    tool = [{"role": "tool", "content": "42"}, {"from": "observation", "value": "x"}, {"content": "of nobody"}]
    no_text = [{"role": "assistant", "content": None, "tool_calls": []}, {"role": "user", "content": 7}]
    got = found(tmp_path, lines({"messages": [TALK[0], *tool, *no_text, TALK[1]]}))
    assert got == [Document("Hi.\n\nHello!", (("user", "Hi."), ("assistant", "Hello!")))]


def test_text_goes_before_messages(tmp_path: Path) -> None:
    assert found(tmp_path, lines({"messages": TALK, "text": "rendered"})) == [Document("rendered")]
    assert texts(tmp_path, lines({"messages": 7, "conversations": TALK})) == ["Hi.\n\nHello!"]


# ---- gzip ----


def test_gzip_by_content(tmp_path: Path) -> None:
    for data, want in (("One\ntwo.", ["One\ntwo."]), (lines({"text": "a"}), ["a"]), ('["a", "b"]', ["a", "b"])):
        for name in ("text", "text.gz", "text.txt", "text.jsonl.gz"):
            if name != "text.jsonl.gz" or data.startswith("{"):
                assert texts(tmp_path, gzip.compress(data.encode()), name) == want


# ---- refused ----


@pytest.mark.parametrize(
    ("data", "where", "why"),
    [
        ('{"text": "a"}\n{"text": \n', "line 2", "not valid JSON"),
        ('{"text": "a"}\n\n\nplain\n', "line 4", "not valid JSON"),
        ('{"text": "a"}\n{"txt": "b", "n": 1}\n', "line 2", 'no "text" in it; it has: txt, n$'),
        ('{"text": "a"}\n{"text": 1}\n', "line 2", 'no "text" in it; it has: text$'),
        ('{"text": "a"}\n{}\n', "line 2", 'no "text" in it; it has: nothing$'),
        ('{"text": "a"}\n[1]\n', "line 2", 'no "text" in it; it has: list$'),
        ('{"text": "a"}\n7\n', "line 2", 'no "text" in it; it has: int$'),
        ('{"text": "a"}\n{"messages": ["x"]}\n', "line 2", 'no "text" in it; it has: messages$'),
        ('{"text": "a"}\n{"messages": [{"role": "tool", "content": "x"}]}\n', "line 2", 'no "text" in it'),
        ('["a", "b", 7]', "record 3", 'no "text" in it; it has: int$'),
        ('["a", {"txt": 7}]', "record 2", 'no "text" in it; it has: txt$'),
        ('{"text": "a"}\n' + "[" * 100_000, "line 2", r"not valid JSON \(nested too deeply\)$"),
        ('{"text": "a"}\n{"a\\nb\\u001b": 1}\n', "line 2", r'no "text" in it; it has: a\?b\?$'),
    ],
)
def test_records_that_are_none(tmp_path: Path, data: str, where: str, why: str) -> None:
    with pytest.raises(CalibrationError, match=f"text: {where}: {why}") as e:
        found(tmp_path, data)
    assert "\n" not in str(e.value)


def test_lines_are_counted_from_the_first(tmp_path: Path) -> None:
    """Blank ones too, before the first record."""
    with pytest.raises(CalibrationError, match="line 4: not valid JSON"):
        found(tmp_path, '\n\n{"text": "a"}\nplain\n')


def test_a_first_line_that_is_none_in_jsonl(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"a\.jsonl: line 1: not valid JSON"):
        found(tmp_path, "plain\n", "a.jsonl")
    with pytest.raises(CalibrationError, match=r'a\.jsonl: line 1: no "text" in it; it has: list'):
        found(tmp_path, '["a"]\n', "a.jsonl")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "holds no text"),
        (b" \r\n\t\n", "holds no text"),
        (b"\xef\xbb\xbf", "holds no text"),
        (gzip.compress(b" "), "holds no text"),
        (b'[""]', "holds no text"),
        (b"text\0text", r"holds zero bytes; is it a binary file\?"),
        (b'{"text": "a\\u0000"}', "holds zero bytes"),
        (b"text \xff", r"no UTF-8 text \(byte 5 of a part\); is it a binary file\?"),
        (b"\xff\xfet\0e\0x\0t\0", "no UTF-8 text"),
        ("f\u00fcr".encode("latin-1"), "no UTF-8 text"),
        (b"\xed\xa0\xbd", "no UTF-8 text"),
        (gzip.compress(b"text \xff"), "no UTF-8 text"),
        (gzip.compress(b"text" * 999, mtime=0)[:-9], "ended before"),
        (gzip.compress(b"text", mtime=0)[:-1] + b"\1", "Incorrect length|CRC check failed"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\3\xff\xff\xff", "invalid|Error"),
        (b"\x1f\x8b", "ended before"),
        (b"\x1f\x8bxx" + bytes(20), "compression method"),
    ],
)
def test_files_without_text(tmp_path: Path, data: bytes, why: str) -> None:
    with pytest.raises(CalibrationError, match=f"^text: .*({why})") as e:
        found(tmp_path, data)
    assert "\n" not in str(e.value)


def test_a_name_that_promises_gzip(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"^text\.gz: Not a gzipped file"):
        found(tmp_path, "plain", "text.gz")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"^it: no such file; --calib takes a text file, builtin, self"):
        read(tmp_path / "none", "it")
    with pytest.raises(CalibrationError, match=r"^it: is a folder; --calib takes"):
        read(tmp_path, "it")
    with pytest.raises(CalibrationError, match=r"^it: File name too long$"):
        read(tmp_path / ("x" * 300), "it")


# ---- limits ----


def test_text_is_cut_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_TEXT", 100)
    text = "0123456789" * 30
    assert texts(tmp_path, text) == [text[:100]]
    assert texts(tmp_path, "one\n" + text) == [("one\n" + text)[:100]]
    assert texts(tmp_path, gzip.compress(text.encode())) == [text[:100]]
    assert texts(tmp_path, text[:100]) == [text[:100]]


def test_documents_end_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes behind it is not even read: the last line is none."""
    monkeypatch.setattr(documents, "MAX_TEXT", 100)
    records = [{"text": str(i) * 40} for i in range(4)]
    assert texts(tmp_path, lines(*records[:3]) + "no JSON\n") == ["0" * 40, "1" * 40, "2" * 20]
    assert texts(tmp_path, lines(*records[:2])) == ["0" * 40, "1" * 40]
    assert texts(tmp_path, json.dumps([str(i) * 20 for i in range(6)])) == [str(i) * 20 for i in range(5)]
    talk = {"messages": [{"role": "user", "content": "u" * 30}]}
    got = found(tmp_path, lines(records[0], {"text": "1" * 40}, talk))
    assert got[2] == Document("u" * 20)  # half a conversation is but a text


def test_a_line_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_TEXT", 100)
    data = lines({"text": "a"}, {"text": "b" * 200})
    for packed in (data.encode(), gzip.compress(data.encode())):
        with pytest.raises(CalibrationError, match=r"text: line 2: longer than the limit of 100 characters$"):
            found(tmp_path, packed)
    with pytest.raises(CalibrationError, match=r"line 1: longer than the limit"):
        found(tmp_path, lines({"text": "b" * 200}), "text.jsonl")


def test_an_array_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first records, or an error; brackets, quotes and commas are no text to calibrate with."""
    monkeypatch.setattr(documents, "MAX_TEXT", 100)
    for indent in (None, 0):
        try:
            got = texts(tmp_path, json.dumps([{"text": str(i) * 40} for i in range(10)], indent=indent))
        except CalibrationError as e:
            assert "\n" not in str(e)
        else:
            assert got == ["0" * 40, "1" * 40, "2" * 20]


# ---- whatever comes ----

BEGINNINGS = [b"", b"\x1f\x8b", b"\x1f\x8b\x08\0\0\0\0\0\0\3", b"[", b"{", b'{"text": "', b'["', b"\xef\xbb\xbf", b"\n"]
PIECES = [
    *(b'{"text": "a"}', b'{"messages": [', b'{"role": "user", "content": "x"}', b'{"text": null}', b"[]", b"{}"),
    *(b'"', b"\\ud83d", b"\\", b"\n", b"\r\n", b"\0", b",", b"[", b"]", b"{", b"}", b":", b"1e999", b"NaN", b"null"),
    *(b'"text"', b'"content"', b'"conversations"', b"\xc3\xa4", b"\xed\xa0\x80", b"word ", b"\xe2\x80\xa8", b"-"),
]


@pytest.mark.parametrize("kind", ["bytes", "pieces", "damaged"])
def test_any_bytes(tmp_path: Path, kind: str) -> None:
    """300 of each kind: documents with text, or one line that names the file. Both happen, whatever the kind."""
    rng, outcomes = np.random.default_rng(7), {True: 0, False: 0}
    good = [
        lines({"text": "a\u00fc"}, {"messages": TALK}).encode(),
        json.dumps(["a", {"text": "b"}]).encode(),
        b"Prose.",
    ]
    good += [gzip.compress(g, mtime=0) for g in good]
    for i in range(300):
        if kind == "bytes":
            data = BEGINNINGS[i % len(BEGINNINGS)] + rng.bytes(int(rng.integers(0, 60) if i % 4 else 1))
        elif kind == "pieces":
            data = b"".join(PIECES[k] for k in rng.integers(0, len(PIECES), int(rng.integers(1, 12))))
        else:
            changed = bytearray(good[i % len(good)])
            for _ in range(int(rng.integers(1, 4))):
                changed[int(rng.integers(0, len(changed)))] = int(rng.integers(0, 256))
            data = bytes(changed[: int(rng.integers(1, len(changed) + 1))] if i % 2 else changed)
        name = ("text", "text.jsonl", "text.json")[i % 3]
        try:
            got = found(tmp_path, data, name)
        except CalibrationError as e:
            assert "\n" not in str(e) and name in str(e)
            outcomes[False] += 1
        else:
            assert got and all(d.text.strip() and "\0" not in d.text for d in got)
            assert all(d.text.encode() is not None for d in got)  # no halves of pairs
            outcomes[True] += 1
    assert min(outcomes.values()) >= 10
