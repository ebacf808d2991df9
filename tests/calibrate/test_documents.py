"""Documents out of files in the forms that people have text in, told by content."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
from collections.abc import Callable
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
        '["not closed\n',
        "{curly} prose\nand more\n",
        "{",
        "{%- a template %}\n",
        "{'text': 'a line of Python'}\n",
        '{"a", "b"};\n',
        '"text"\n',
        "null\n",
        "7\n",
        "text\nThe first line is a word.\n",
        "The text, as it is\n",
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


def test_lists_in_lines(tmp_path: Path) -> None:
    for name in ("text", "text.jsonl"):
        assert texts(tmp_path, '["a", "b"]\n\n["c"]\n', name) == ["a", "b", "c"]
        talks = [[dict(TALK[0]), dict(TALK[1])], [{"from": "human", "value": "Again."}]]
        for data in (lines(*talks), json.dumps(talks)):
            assert [d.messages for d in found(tmp_path, data, name)] == [
                (("user", "Hi."), ("assistant", "Hello!")),
                (("user", "Again."),),
            ]


def test_objects_over_several_lines(tmp_path: Path) -> None:
    """As editors and jq write them: one, or one behind the other; an array in a file of another name."""
    for name in ("text", "text.json", "text.jsonl"):
        one = json.dumps({"id": 1, "text": "a"}, indent=2)
        assert texts(tmp_path, one, name) == ["a"]
        assert texts(tmp_path, one + "\n" + one + "\n", name) == ["a", "a"]
        assert texts(tmp_path, json.dumps([{"text": "a"}, {"text": "b"}], indent=2), name) == ["a", "b"]


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
        (r"a\u0000b", "a\ufffdb"),
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


# ---- packed, encoded ----


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, bytes])
def test_packed_by_content(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    """Whatever the name says."""
    for data, want in (("One\ntwo.", ["One\ntwo."]), (lines({"text": "a"}), ["a"]), ('["a", "b"]', ["a", "b"])):
        for name in ("text", "text.gz", "text.txt", "text.xz", "text.jsonl.gz"):
            if name != "text.jsonl.gz" or data[0] in "[{":
                assert texts(tmp_path, pack(data.encode()), name) == want


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_other_encodings_with_a_mark(tmp_path: Path, encoding: str) -> None:
    """As PowerShell and Excel write."""
    for data, want in (
        ("\u00dcber\r\n\U0001f600.", ["\u00dcber\n\U0001f600."]),
        (lines({"text": "a"}, {"text": "\u00e4"}), ["a", "\u00e4"]),
        ("id\ttext\r\n1\ta\r\n2\tb\r\n", ["a", "b"]),
    ):
        marked = data if encoding in ("utf-16", "utf-32") else "\ufeff" + data  # the first two write it themselves
        assert texts(tmp_path, marked.encode(encoding)) == want
        assert texts(tmp_path, gzip.compress(marked.encode(encoding))) == want


# ---- tables ----


def test_tables(tmp_path: Path) -> None:
    """By the header: a column that we know, or the name of the file; quotes, line breaks and empty cells in it."""
    rows = [["id", "Text"], ["1", 'She said "a, b".'], ["2", ""], ["3", "two\nlines"], ["4"], ["5", "c"]]
    for delimiter in ",;\t":
        out = io.StringIO()
        csv.writer(out, delimiter=delimiter).writerows(rows)
        for name in ("text", "text.csv" if delimiter != "\t" else "text.tsv"):
            if (name, delimiter) != ("text.csv", ";"):
                assert texts(tmp_path, out.getvalue(), name) == ['She said "a, b".', "two\nlines", "c"]
    assert texts(tmp_path, "text\na\nb, c\n", "one.csv") == ["a", "b"]
    assert texts(tmp_path, "text\na\nb\n", "one.txt") == ["text\na\nb\n"]
    got = found(tmp_path, "instruction,input,output\nAdd.,1 and 2,3\n")
    assert got[0].messages == (("user", "Add.\n\n1 and 2"), ("assistant", "3"))
    before = csv.field_size_limit()
    assert texts(tmp_path, f"id,text\n1,{'x' * 200_000}\n") == ["x" * 200_000]
    assert csv.field_size_limit() == before
    for name, data in (("a.csv", "label,sentence\n1,x\n"), ("a.tsv", "x\n")):
        with pytest.raises(CalibrationError, match=rf'{name}: no column "text"; it has: ') as e:
            found(tmp_path, data, name)
        assert "\n" not in str(e.value)


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = pa.table({"n": [1, 2, 3], "text": ["a", None, "b"]})
    pq.write_table(table, tmp_path / "any.name")
    assert [d.text for d in read(tmp_path / "any.name", "x")] == ["a", "b"]
    pq.write_table(pa.table({"messages": [TALK, None]}), tmp_path / "talk.parquet")
    assert [d.messages for d in read(tmp_path / "talk.parquet", "x")] == [(("user", "Hi."), ("assistant", "Hello!"))]
    pq.write_table(pa.table({"n": [1]}), tmp_path / "none.parquet")
    with pytest.raises(CalibrationError, match=r'none\.parquet: no column "text"; it has: n'):
        read(tmp_path / "none.parquet", "x")
    (tmp_path / "damaged").write_bytes(b"PAR1" + bytes(20))
    with pytest.raises(CalibrationError, match="damaged: damaged parquet: ") as e:
        read(tmp_path / "damaged", "x")
    assert "\n" not in str(e.value)


# ---- folders ----


def test_folders(tmp_path: Path) -> None:
    """All files of text in it, in order of their names, each by its content; what is none is told of."""
    folder = tmp_path / "texts"
    (folder / "deeper").mkdir(parents=True)
    (folder / "b.txt").write_text("Prose.")
    (folder / "a.jsonl").write_text(lines({"text": "one"}, {"text": "two"}))
    (folder / "deeper" / "c").write_bytes(gzip.compress(b'["three"]'))
    for name, data in (("empty.txt", b""), ("picture.png", b"\x89PNG\r\n\x1a\n\xff"), (".hidden", b"not this")):
        (folder / name).write_bytes(data)
    told: list[str] = []
    assert [d.text for d in read(folder, "it", told.append)] == ["one", "two", "Prose.", "three"]
    assert [re.sub(r"^left out: .*/", "", t).split(":")[0] for t in told] == ["empty.txt", "picture.png"]
    (folder / "damaged.jsonl").write_text('{"text": "a"}\nno JSON\n')
    with pytest.raises(CalibrationError, match=r"damaged\.jsonl: line 2: not valid JSON"):
        read(folder, "it")
    (tmp_path / "none").mkdir()
    with pytest.raises(CalibrationError, match=r"^it: a folder without a file of text$"):
        read(tmp_path / "none", "it")


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
        ('{"key": "no text of ours"}\n{"key": 2}\n', "line 1", 'no "text" in it; it has: key$'),
        ("{}", "line 1", 'no "text" in it; it has: nothing$'),
        ('{"text": "not closed\n', "line 1", "not valid JSON"),
        ('{"text": "a"} and more\n', "line 1", "not valid JSON"),
        ('[{"text": "a"},\n{"te', "line 1", "not valid JSON"),
        ('["a",\n"b"', "line 1", "not valid JSON"),
        ('{"text": "a"}\n7\n', "line 2", 'no "text" in it; it has: int$'),
        ('{"text": "a"}\n{"messages": ["x"]}\n', "line 2", 'no "text" in it; it has: messages$'),
        ('{"text": "a"}\n{"messages": [{"from": "tool", "value": "x"}]}\n', "line 2", 'no "text" in it'),
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
    with pytest.raises(CalibrationError, match=r'a\.jsonl: line 1: no "text" in it; it has: int'):
        found(tmp_path, "7\n", "a.jsonl")
    with pytest.raises(CalibrationError, match=r"a\.json: line 1: not valid JSON"):
        found(tmp_path, "[Chorus]\n", "a.json")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "holds no text"),
        (b" \r\n\t\n", "holds no text"),
        (b"\xef\xbb\xbf", "holds no text"),
        (gzip.compress(b" "), "holds no text"),
        (b'[""]', "holds no text"),
        (b"text\0text", r"holds zero bytes; is it a binary file, or UTF-16 without a mark\?"),
        ("text".encode("utf-16-le"), "holds zero bytes"),
        (b"text \xff", r"no UTF-8 text; is it a binary file, or of another encoding\? Save it as UTF-8$"),
        (b"\xff\xfet\0e\0x", "no UTF-8 text"),
        (b"PK\3\4rest", "is a zip archive or an Office document"),
        (b"\x28\xb5\x2f\xfdrest", "is packed with zstd; unpack it"),
        (b"%PDF-1.7", "is a PDF"),
        (b"{\\rtf1 text}", "is an RTF document"),
        (b"GGUF\3\0\0\0", "is a GGUF file, a model"),
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


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"^it: no such file; --calib takes a text file or a folder"):
        read(tmp_path / "none", "it")
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
        name = ("text", "text.jsonl", "text.txt")[i % 3]
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
