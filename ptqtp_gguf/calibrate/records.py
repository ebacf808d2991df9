"""What is text in a record of a data set: a JSON value, a row of a table. Told by its keys, as data sets have them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import CalibrationError
from ..files import parse_json
from ..source import show

TEXT_KEYS = ("text", "content")
TALK_KEYS = ("messages", "conversations", "conversation", "chosen")
QUESTIONS = ("instruction", "prompt", "question", "query", "input")
ANSWERS = ("output", "completion", "response", "answer", "chosen")
OTHER_KEYS = ("document", "article", "body", "passage", "context", "code", *QUESTIONS, *ANSWERS)
KEYS = frozenset((*TEXT_KEYS, *TALK_KEYS, *OTHER_KEYS))
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "ai", "chatgpt"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
DEPTH = 6  # records within records


@dataclass(frozen=True)
class Document:
    """text, or a conversation: messages of ("user", "assistant" or "system", content)."""

    text: str
    messages: tuple[tuple[str, str], ...] = ()


def of_record(record: object, where: str) -> Iterator[Document]:
    """The documents of a record; none of one whose text is null or empty. Raises CalibrationError where it has none.

    A string; an object with text, a conversation, or a question and its answer, or objects with such; a conversation,
    or strings, in a list.
    """
    found = _documents(record, DEPTH)
    if found is not None:
        yield from found
        return
    keys = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
    raise CalibrationError(f'{where}: no "text" in it; it has: {show(keys) or "nothing"}')


def whole(text: str) -> str:
    """Halves of surrogate pairs, which no tokenizer takes, and zeros become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", "\ufffd")


def conversation(record: list[object]) -> Document | None:
    """A list that is one: each of its turns says whose it is."""
    return _talk(record) if all(isinstance(t, dict) and {"role", "from"} & t.keys() for t in record) else None


def _documents(record: object, depth: int) -> list[Document] | None:
    """None: nothing here is known. An empty list: what is known is null or empty."""
    if isinstance(record, str):
        return [Document(whole(record))]
    if isinstance(record, list) and record:
        if talk := conversation(record):
            return [talk]
        if all(isinstance(r, str) for r in record):
            return [Document(whole(r)) for r in record]
        return _within(record, depth)
    if not isinstance(record, dict):
        return [] if record is None else None
    by_key = {str(k).lower(): v for k, v in record.items()}
    for key in TEXT_KEYS:
        if (text := _text(by_key.get(key))) is not None:
            return [Document(text)]
    for key in TALK_KEYS:
        if talk := _talk(by_key.get(key)):
            return [talk]
    if talk := _answered(by_key):
        return [talk]
    for key in OTHER_KEYS:
        if (text := _text(by_key.get(key))) is not None:
            return [Document(text)]
    found = _within([v for v in record.values() if isinstance(v, (dict, list))], depth)
    if found is None and any(k in by_key and not by_key[k] for k in KEYS):
        return []
    return found


def _within(values: list[object], depth: int) -> list[Document] | None:
    """The documents of objects in a list, or in lists in it; None where none of them is known."""
    found: list[Document] | None = None
    for value in values if depth else ():
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, (dict, list)) for v in value)):
            more = _documents(value, depth - 1)
            found = found if more is None else [*(found or []), *more]
    return found


def _text(value: object) -> str | None:
    """A text, or lines of it in a list."""
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        value = "\n".join(value)
    return whole(value) if isinstance(value, str) else None


def _answered(record: dict[str, object]) -> Document | None:
    """A question and its answer as a conversation."""
    asked = next((k for k in QUESTIONS if record.get(k)), None)
    given = next((k for k in ANSWERS if record.get(k)), None)
    if asked is None or given is None:
        return None
    question, answer = record[asked], record[given]
    if isinstance(question, list) and isinstance(answer, list):
        return _talk([*question, *answer])
    if not (isinstance(question, str) and isinstance(answer, str)):
        return None
    more = record.get("input") or record.get("context")
    if asked != "input" and isinstance(more, str) and more:
        question = f"{question}\n\n{more}"
    turns: list[object] = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if isinstance(record.get("system"), str):
        turns.insert(0, {"role": "system", "content": record["system"]})
    return _talk(turns)


def _talk(turns: object) -> Document | None:
    """A conversation: turns of {"role", "content"}, {"from", "value"}, or {role: content}; as JSON in a string too."""
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        try:
            turns = parse_json(turns.encode(errors="surrogatepass"))
        except ValueError:
            return None
    if not isinstance(turns, list) or not all(isinstance(t, dict) for t in turns):
        return None
    messages = [m for turn in turns for m in _messages(turn)]
    return Document("\n\n".join(content for _, content in messages), tuple(messages)) if messages else None


def _messages(turn: dict[str, object]) -> Iterator[tuple[str, str]]:
    named = next((k for k in ("role", "from") if k in turn), None)
    if named:
        said = [(turn[named], turn.get("content", turn.get("value")))]
    else:
        said = [(k, v) for k, v in turn.items() if str(k).lower() in ROLES]
    for name, content in said:
        role = ROLES.get(str(name).lower())
        if isinstance(content, list):  # parts, as of models that see pictures too
            content = "".join(str(p.get("text") or "") for p in content if isinstance(p, dict))
        if role and isinstance(content, str):
            yield role, whole(content)
