"""A Modelfile for Ollama: what a GGUF file says of prompts and sampling, in Ollama's words.

A file's chat template is a Jinja program; Ollama's are Go's text/template, of which it knows some by themselves. Here
the program is tried with marks for messages. Where it puts constant texts before and after what each role says, as
most do, those are written as a Go template; where it does more, it is left out, and Ollama looks for one that it knows.

Source: Ollama's documentation, docs/modelfile.md and docs/template.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from ..errors import ChatError, OutputError
from ..files import Reader, system_errors, write_text
from ..llamacpp import render_template

SAMPLING = {  # general.sampling.* -> PARAMETER
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_last_n": "repeat_last_n",
    "penalty_repeat": "repeat_penalty",
}
ENDS = ("eos", "eot", "eom")  # tokens that end an answer
USUAL_CONTEXT = 4096  # Ollama's own
QUOTES = '"""'
Render = Callable[[Sequence[Mapping[str, str]], bool], str]


@dataclass(frozen=True)
class Turns:
    """Constant texts around what is said.

    head     before all, where no system message is there; with one, system[0] begins the text
    system   before and after a system message; joined: what is after it stands in place of what is before the user's
    """

    head: str
    system: tuple[str, str]
    joined: bool
    user: tuple[str, str]
    assistant: tuple[str, str]
    answer: str

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt, up to where the answer begins, for messages that may begin with the system's."""
        out, after = "", False
        if messages[0]["role"] != "system":
            out = self.head
        for m in messages:
            before, behind = getattr(self, m["role"])
            out += ("" if after else before) + m["content"] + behind
            after = self.joined and m["role"] == "system"
        return out + self.answer

    def go(self) -> str:
        """The same as Ollama's template."""
        user = f"{self.user[0]}{{{{ .Content }}}}{self.user[1]}"
        system = f"{self.system[0]}{{{{ .Content }}}}{self.system[1]}"
        start = ""
        if self.joined:
            start, system = "{{ $joined := false }}", system + "{{ $joined = true }}"
            user = "{{ if not $joined }}" + self.user[0] + "{{ end }}{{ .Content }}" + self.user[1]
            user += "{{ $joined = false }}"
        if self.head:
            start += '{{ if ne (index .Messages 0).Role "system" }}' + self.head + "{{ end }}"
        assistant = f"{self.assistant[0]}{{{{ .Content }}}}{self.assistant[1]}"
        turns = f'{{{{ if eq .Role "system" }}}}{system}{{{{ else if eq .Role "user" }}}}{user}'
        turns += f'{{{{ else if eq .Role "assistant" }}}}{assistant}{{{{ end }}}}'
        return f"{start}{{{{ range .Messages }}}}{turns}{{{{ end }}}}{self.answer}"


def turns_of(render: Render) -> Turns | None:
    """The constant texts of a template; None where it is not of this kind.

    render  messages, whether the text ends where an answer begins -> prompt; raises ChatError
    """
    roles = ("system", "user", "assistant", "user")
    s, u, a, v = ({"role": r, "content": f"q{c}zk7vx{c}"} for r, c in zip(roles, "suav", strict=True))
    try:
        pre, first, second, end = _around(render([u, a, v], False), u, a, v)
        _, _, after = _around(render([u, a], False), u, a)
        answer = render([u, a, v], True).partition(v["content"])[2].removeprefix(end)
        head, ask, reply = pre.removesuffix(before := second.removeprefix(after)), before, first.removeprefix(end)
        begin, middle, _ = _around(render([s, u], False), s, u)
        joined = not middle.endswith(ask)
        system = begin, middle if joined else middle.removesuffix(ask)
        found = Turns(head, system, joined, (ask, end), (reply, after), answer)
        w, x = {"role": "assistant", "content": "two\nlines {x}"}, {"role": "user", "content": "one more"}
        for messages in ([u], [s, u], [u, a, v], [s, u, a, v], [u, a, v, w, x], [s, u, w, x]):
            if found.render(messages) != render(messages, True):
                return None
    except (ChatError, ValueError):
        return None
    return found


def _around(text: str, *messages: Mapping[str, str]) -> list[str]:
    """The texts before, between and after what messages say. Raises ValueError where one is not there once."""
    parts = []
    for m in messages:
        if text.count(m["content"]) != 1:
            raise ValueError("not there once")
        before, _, text = text.partition(m["content"])
        parts.append(before)
    return [*parts, text]


def modelfile(path: Path) -> tuple[str, str]:
    """The Modelfile for a GGUF file beside it, and what it lacks, "" = nothing. Raises InputError."""
    with Reader(path) as reader:
        lines, why = [f"FROM ./{path.name}"], ""
        tokens = reader.get("tokenizer.ggml.tokens")
        texts = {
            k: tokens[i]
            for k in ("bos", *ENDS)
            if isinstance(i := reader.get(f"tokenizer.ggml.{k}_token_id"), int)
            and isinstance(tokens, list)
            and 0 <= i < len(tokens)
            and isinstance(tokens[i], str)
        }
        template = reader.get("tokenizer.chat_template")
        if isinstance(template, str) and template:
            go, why = _go(template, texts, reader.get("tokenizer.ggml.add_bos_token") is not False)
            lines += [f"TEMPLATE {QUOTES}{go}{QUOTES}"] if go else []
        for key, name in SAMPLING.items():
            value = reader.get(f"general.sampling.{key}")
            if isinstance(value, (int, float)):
                lines.append(f"PARAMETER {name} {value:.6g}")
        trained = reader.get(f"{reader.get('general.architecture')}.context_length")
        if isinstance(trained, int) and 0 < trained < USUAL_CONTEXT:
            lines.append(f"PARAMETER num_ctx {trained}")
        for text in dict.fromkeys(texts[k] for k in ENDS if k in texts):
            if text and '"' not in text and text.isprintable():
                lines.append(f'PARAMETER stop "{text}"')
    return "\n".join(lines) + "\n", why


def _go(template: str, texts: Mapping[str, str], adds_bos: bool) -> tuple[str, str]:
    """Ollama's template for a file's, or "" and why there is none."""
    bos, dates = texts.get("bos", ""), datetime.now()
    last = [""]

    def render(messages: Sequence[Mapping[str, str]], answer: bool) -> str:
        last[0] = render_template(template, messages, bos, texts.get("eos", ""), answer, strict=False)
        return last[0].removeprefix(bos) if adds_bos else last[0]

    turns = turns_of(render)
    if turns is None:
        return "", "the chat template does more than put texts around messages, so Ollama must know it by itself"
    if any(dates.strftime(form) in last[0] for form in ("%d %b %Y", "%b %d %Y", "%Y-%m-%d")):
        return "", "the chat template tells today's date, so Ollama must know it by itself"
    pieces = (turns.head, *turns.system, *turns.user, *turns.assistant, turns.answer)
    if any("{{" in p or QUOTES in p for p in pieces):
        return "", "the chat template's texts hold signs of Ollama's, so Ollama must know it by itself"
    return turns.go(), ""


def modelfile_path(gguf: Path, force: bool = False) -> Path:
    """Where the Modelfile of a GGUF file goes, NAME.Modelfile beside it. Raises OutputError where it may not."""
    out = gguf.with_suffix(".Modelfile")
    if not gguf.name.isprintable():
        raise OutputError(f"{str(gguf)!r}: a Modelfile cannot hold this name; choose another")
    if out.exists() and not force:
        raise OutputError(f"{out}: exists already; use --force to replace it")
    return out


def write_modelfile(gguf: Path, force: bool = False) -> tuple[Path, str]:
    """Write it: its path, and what it lacks, "" = nothing. Raises InputError, OutputError."""
    out = modelfile_path(gguf, force)
    with system_errors(out):
        text, why = modelfile(gguf)
        write_text(out, text, force=force)
    return out, why
