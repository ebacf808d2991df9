"""Chat templates: messages -> the prompt that llama-server makes of them, and no text lost on the way.

A template is a Jinja program out of a file. What it is given follows llama.cpp's common/chat.cpp: content as a text or
as a list of parts, a system message that it refuses at the head of the next message, today's date, no tools.
"""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ..errors import ChatError, InputError
from ..files import read_whole

Messages = Sequence[Mapping[str, Any]]
TEMPLATE = "tokenizer.chat_template"  # its key in a GGUF file; those with names have ".NAME" behind it
ANOTHER = "give another with --chat-template FILE"
MAX_TEMPLATE = 1 << 24  # bytes; the largest today have 20 thousand
MARK = "q7zk{}vx3"  # stands for a message's text while it is seen what a template does with it
AS_DATA = r"(?<!['\"]text['\"]: ['\"])"  # not where a list of parts was printed as one
TRIMMED = "You have access to the following functions in JSONSchema format"  # StepFun's; llama.cpp trims texts for it
TAIL = 64  # characters; as llama.cpp


def chat_template(model: Any, template: str | None = None) -> Callable[[Messages], str] | None:
    """The chat template of a file that `load` opened, or another: messages of {"role", "content"} -> prompt. None if
    there is none.

    Raises ChatError if it cannot be read. What is returned raises ChatError as render_template does.
    """
    source = model.metadata.get(TEMPLATE) if template is None else template
    if not source:
        return None
    try:
        _compiled(source)
    except ChatError as e:
        raise ChatError(f"{model.model_path}: {e}; run needs none") from None
    return functools.partial(
        render_template, source, bos=begin(model), eos=token_text(model, model.token_eos()), answer=True
    )


def read_template(path: Path) -> str:
    """A chat template out of a file of its own. Raises InputError, and ChatError where it is none."""
    try:
        text = read_whole(path, MAX_TEMPLATE).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path}: cannot be read as a chat template: not UTF-8; give a text file") from None
    if not text.strip():
        raise InputError(f"{path}: cannot be read as a chat template: it is empty; give one that shows messages")
    try:
        _compiled(text)
    except ChatError as e:
        raise ChatError(f"{path}: {e}") from None
    return text


def encode(model: Any, prompt: str) -> list[int]:
    """Tokens of a rendered prompt: special tokens are meant, and it begins as the tokenizer wants it, once."""
    bos = begin(model)
    add = not (bos and prompt.startswith(bos))
    return list(model.tokenize(prompt.encode(errors="replace"), add_bos=add, special=True))


def begin(model: Any) -> str:
    """The text of a model's token that begins a text."""
    return token_text(model, model.token_bos())


def token_text(model: Any, token: int) -> str:
    """The text of a token, "" for none."""
    return "" if token < 0 else bytes(model.detokenize([token], special=True)).decode(errors="replace")


def render_template(
    template: str, messages: Messages, bos: str, eos: str, answer: bool = False, strict: bool = True, **more: Any
) -> str:
    """Messages of {"role", "content"} by a chat template (Jinja).

    bos, eos  the texts of these tokens
    answer    ends where the model's answer begins
    strict    as of `fitted`
    more      what the template shall know besides, such as tools
    Raises ChatError if the template cannot be read, refuses the messages, or leaves out what the system or the last
    user says.
    """
    date = datetime.now()
    known = {
        "bos_token": bos,
        "eos_token": eos,
        "add_generation_prompt": answer,
        "enable_thinking": _thinks(template),
        "datetime": date.strftime("%b %d %Y"),
        "date_string": date.strftime("%d %b %Y"),
        **dict.fromkeys(("preserve_reasoning", "preserve_thinking"), True),
        **dict.fromkeys(("clear_thinking", "truncate_history_thinking", "drop_thinking"), False),
        **more,
    }
    compiled = _compiled(template)
    if TRIMMED in template:
        messages = [m if (text := _text(m)) is None else {**m, "content": text.strip()} for m in messages]
    return fitted(messages, lambda form: str(compiled.render(messages=copy.deepcopy(form), **known)), strict)


def fitted(messages: Messages, render: Callable[[list[dict[str, Any]]], str], strict: bool = True) -> str:
    """What a template makes of messages, in the form in which most of their texts arrive.

    render  messages -> prompt, by the template; whatever it raises is a refusal
    strict  what the system, the last user and the last message say must arrive
    Raises ChatError where the template refuses every form, or with `strict` where none will do.
    """
    marked, needed = _marked(messages)
    needed = needed if strict else []
    best, most, refusal, lost = None, -1, "", ""
    for form, twin in zip(_forms(messages), _forms(marked), strict=True):
        try:
            shown = render(twin).casefold()
        except Exception as e:  # a template is a program out of a file
            refusal = refusal or str(e) or type(e).__name__
            continue
        if messages and not shown:
            refusal = refusal or "it makes nothing of them"
            continue
        seen = [i for i in range(len(messages)) if re.search(AS_DATA + MARK.format(i), shown)]
        missing = [i for i in needed if i not in seen]
        if missing:
            lost = lost or str(messages[missing[0]].get("role"))
        elif len(seen) > most:
            best, most = form, len(seen)
        if len(seen) == len(messages):
            break
    if best is None and lost:
        raise ChatError(f"the chat template leaves out what the {lost} says; {ANOTHER}")
    if best is None:
        raise ChatError(f"the chat template refuses these messages: {refusal}; {ANOTHER}")
    try:
        prompt = render(best)
    except Exception as e:
        raise ChatError(f"the chat template refuses these messages: {e}; {ANOTHER}") from None
    if strict and (word := _lost(messages, prompt)):
        raise ChatError(f"the chat template leaves out a part of the message, from {word[:40]!r} on; {ANOTHER}")
    return prompt


def keeps(messages: Messages, prompt: str) -> bool:
    """Whether what the last user says is in a prompt."""
    return not _lost(messages, prompt)


def _lost(messages: Messages, prompt: str) -> str:
    users = [m for m in messages if m.get("role") == "user"]
    return _not_in(_text(users[-1]) or "", prompt) if users else ""


def _not_in(text: str, prompt: str) -> str:
    """The first word of a text that is not in the prompt, behind those before it; "" = all are. A template may trim or
    escape a text, not shorten it."""
    if text.strip() in prompt:
        return ""
    at, prompt = 0, prompt.casefold()
    for word in re.findall(r"\w+", text):
        folded = word.casefold()
        if (found := prompt.find(folded, at)) < 0:
            return str(word)
        at = found + len(folded)
    return ""


# ---- forms of messages ----


def _text(message: Mapping[str, Any]) -> str | None:
    """A message's text; None where it has none, or more than text."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        return None
    return "\n".join(str(p.get("text", "")) for p in content)


def _marked(messages: Messages) -> tuple[list[dict[str, Any]], list[int]]:
    """The messages with marks for texts, and which of them must be seen: the last user's, the system's, the last."""
    out = [dict(m) for m in messages]
    for i, m in enumerate(out):
        if _text(m):
            mark = MARK.format(i)
            m["content"] = mark if isinstance(m["content"], str) else [{"type": "text", "text": mark}]
    roles = [m.get("role") for m in out]
    users = [i for i, role in enumerate(roles) if role == "user"]
    needed = [*users[-1:], *(i for i in (0,) if roles[:1] == ["system"]), *range(len(out))[-1:]]
    return out, [i for i in dict.fromkeys(needed) if _text(out[i])]


def _forms(messages: Messages) -> Iterator[list[dict[str, Any]]]:
    """The messages as they are; as texts, as lists of parts, and with a text of the system only; then the same with the
    system's text at the head of the next message."""
    yield [dict(m) for m in messages]
    plain = [m if (text := _text(m)) is None else {**m, "content": text} for m in messages]
    first = plain[0] if plain else {}
    folded = plain
    if len(plain) > 1 and first.get("role") == "system" and None not in (_text(first), _text(plain[1])):
        folded = [{**plain[1], "content": f"{first['content']}\n{plain[1]['content']}"}, *plain[2:]]
    for some in (plain, folded):
        yield [dict(m) for m in some]
        yield [_in_parts(m) for m in some]
        yield [dict(m) if m.get("role") == "system" else _in_parts(m) for m in some]


def _in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else dict(message)


# ---- Jinja ----


@functools.cache
def _environment() -> Any:
    """Jinja as transformers sets it up for chat templates, as lenient as llama.cpp's where that is."""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %}: what the assistant said, a mark for training."""

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    Generation.tags = {"generation"}

    class Absent(jinja2.ChainableUndefined):
        """What nobody gave: not defined, as llama.cpp says, and none, as transformers says."""

        def __eq__(self, other: object) -> bool:
            return other is None or super().__eq__(other)

        __hash__ = jinja2.ChainableUndefined.__hash__

    def refuse(message: str) -> None:
        raise ValueError(message)

    def tojson(x: Any, ensure_ascii: bool = False, **how: Any) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, **how)

    class Environment(jinja2.sandbox.SandboxedEnvironment):
        intercepted_binops = frozenset(["+"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            """llama.cpp adds nothing to a text without complaint."""
            for one, other in ((left, right), (right, left)):
                if isinstance(one, str) and (other is None or isinstance(other, jinja2.Undefined)):
                    return one
            return left + right

    environment = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, Generation],
        undefined=jinja2.ChainableUndefined,
    )
    for name in ("strip", "lstrip", "rstrip", "split", "rsplit", "startswith", "endswith"):
        environment.filters[name] = getattr(str, name)  # llama.cpp has them
    environment.filters["tojson"] = tojson
    environment.tests["none"] = lambda x: x is None or isinstance(x, Absent)
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "tools": Absent(name="tools"),
        "documents": Absent(name="documents"),
        "functions": Absent(name="functions"),
    }
    return environment


@functools.lru_cache(8)
def _compiled(template: str) -> Any:
    try:
        return _environment().from_string(template)
    except Exception as e:  # jinja2's own, and RecursionError
        raise ChatError(f"the chat template cannot be read: {e}; {ANOTHER}") from None


@functools.lru_cache(8)
def _thinks(template: str) -> bool:
    """Whether llama-server lets the model think: it looks what the switch changes (common/chat-diff-analyzer.cpp)."""
    if "enable_thinking" not in template:
        return False
    user, thought = {"role": "user", "content": TAIL * "U"}, MARK.format("thought")
    answer = {"role": "assistant", "content": "A", "reasoning_content": thought}

    def shown(think: bool, *messages: dict[str, str]) -> str:
        return str(
            _compiled(template).render(
                messages=list(messages),
                enable_thinking=think,
                add_generation_prompt=len(messages) == 1,
                bos_token="",
                eos_token="",
            )
        )

    try:
        if thought in shown(True, user, answer):
            return True
        no, yes = shown(False, user), shown(True, user)
    except Exception:  # it will say so when it is needed
        return False
    left, right = _apart(no, yes)
    if left and right:  # more differs than what begins the answer: look behind what both end with
        return any(a.rpartition(b[-TAIL:])[2].strip() for a, b in ((yes, no), (no, yes)) if b[-TAIL:] in a)
    return bool(left or right) and (no if left else yes).endswith(left or right)


def _apart(one: str, other: str) -> tuple[str, str]:
    """Where two texts differ, trimmed; what stands in <> counts as a whole."""
    a, b = (re.findall(r"<[^<>]*>|[^<]+|<", text) for text in (one, other))
    for at in (0, -1):
        while a and b and a[at] == b[at]:
            del a[at], b[at]
    return "".join(a).strip(), "".join(b).strip()
