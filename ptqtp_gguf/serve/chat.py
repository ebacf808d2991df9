"""A conversation with a file: its history, its chat template, and what is left out when the context is full."""

from __future__ import annotations

import json
import random
import time
import unicodedata
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ChatError, OutputError
from ..files import parse_json, read_whole, write_text
from ..llamacpp import chat_template, encode, pieces

SCHEMA = 1  # of a saved conversation
MAX_SAVED = 64 << 20  # bytes of one
Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
JOINERS = "\u200c\u200d"  # invisible, harmless, and part of emoji and of scripts
SPEAKERS = {"user": "User", "assistant": "Assistant"}


@dataclass(frozen=True)
class Pace:
    """How an answer came about. Times in seconds.

    prompt   tokens of everything the model saw
    wait     until the first text
    tokens   of the answer
    seconds  from the first text to the last
    reason   why it ended: "stop", "length" (max_tokens), "full" (the context is) or "interrupted"
    """

    prompt: int
    wait: float
    tokens: int
    seconds: float
    reason: str

    @property
    def speed(self) -> float | None:
        """Tokens per second after the first; None if there were too few to tell."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 and self.seconds > 0 else None


class Chat:
    """A conversation.

    model        as runtime.load returns it; its context bounds prompt and answer together
    system       what the model is told before the first message; "" = what its template says by itself
    template     a chat template instead of the file's own
    temperature  0 = always the likeliest token
    seed         the same conversation has the same answers; None = others each time
    max_tokens   of an answer; 0 = until the context is full
    notice       called with a line for the user when something was left out

    turns: messages of user and assistant by turns, all of them; the model sees those from `first` on.
    Raises ChatError if the template cannot be read.
    """

    def __init__(
        self,
        model: Any,
        *,
        system: str = "",
        template: str | None = None,
        temperature: float = 0.8,
        seed: int | None = None,
        max_tokens: int = 0,
        notice: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.model, self.system, self.temperature, self.notice = model, system, temperature, notice
        self.max_tokens = max_tokens
        self.turns: list[Message] = []
        self.first = 0
        self.pace: Pace | None = None
        self.n_ctx = int(model.n_ctx())
        self._seeds = random.Random(seed)
        self._template = chat_template(model, template)
        model.reset()  # what an earlier conversation left behind would be reused, and rounds in another way

    @property
    def has_template(self) -> bool:
        """Whether the file has a chat template; without one the model continues a written dialogue."""
        return self._template is not None

    def prompt(self) -> list[int]:
        """Tokens of what the model sees now. Raises ChatError if the template refuses the messages, or loses them."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*system, *self.turns[self.first :]]
        return encode(self.model, self._template(messages) if self._template else dialogue(messages))

    def ask(self, text: str) -> Generator[str, None, None]:
        """Send a message; yields the answer as it comes. Closed or interrupted, what was said so far is kept.

        If the context is full the oldest turns are left out, the system message never. Raises ChatError if the
        message alone is too long, or the template refuses it; it is not part of the conversation then.
        """
        kept, self.pace = len(self.turns), None
        self.turns.append({"role": "user", "content": text})
        said: list[str] = []
        reason = "interrupted"
        try:
            tokens = self._fit()
            room = self.n_ctx - len(tokens)
            limit = min(self.max_tokens or room, room)
            started = begun = time.monotonic()
            stream = pieces(
                self.model,
                tokens,
                max_tokens=limit,
                temperature=self.temperature,
                seed=self._seeds.randrange(1 << 31),
                stop=[] if self._template else [f"\n{SPEAKERS['user']}:"],
            )
            for piece, end in stream:
                if end:
                    reason = "full" if end == "length" and limit == room else end
                if not (said or self._template):
                    piece = piece.lstrip()  # a written dialogue has a blank behind the colon
                if piece:
                    begun = begun if said else time.monotonic()
                    said.append(piece)
                    yield piece
        finally:
            if said or reason != "interrupted":
                self.turns.append({"role": "assistant", "content": "".join(said).rstrip("\ufffd")})
                now = time.monotonic()
                made = max(0, self.model.n_tokens - len(tokens))
                self.pace = Pace(len(tokens), begun - started, made, now - begun if said else 0.0, reason)
            else:
                del self.turns[kept:]

    def _fit(self) -> list[int]:
        """The prompt, with room for an answer: a quarter of the context. Leaves out turns until it is so."""
        room = self.n_ctx - self.n_ctx // 4
        tokens = self.prompt()
        if len(tokens) <= room:
            return tokens
        before, last = self.first, len(self.turns) - 1
        # down to half, or each further message would drop a turn and compute all the others again
        while self.first < last and len(tokens) > self.n_ctx // 2:
            self.first += 2
            tokens = self.prompt()
        if len(tokens) > room:
            self.first = before
            raise ChatError(
                f"the message takes {len(tokens)} tokens with the system message, and a context of {self.n_ctx} leaves "
                f"{room} of them; shorten it, or give a larger --ctx"
            )
        n = (self.first - before) // 2
        self.notice(
            f"the context of {self.n_ctx} tokens is full: the model no longer sees the {n} oldest "
            f"turn{'s' * (n > 1)} (/stats, --ctx)"
        )
        return tokens

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self.turns, self.first, self.pace = [], 0, None
        self.model.reset()

    def undo(self) -> Message | None:
        """Take back the last message with its answer; returns it, or None if there is none."""
        if not self.turns:
            return None
        message = self.turns[-2]
        del self.turns[-2:]
        self.first = min(self.first, len(self.turns))
        return message

    def save(self, path: Path) -> None:
        """Write the conversation as JSON. Raises OutputError if the file exists or cannot be written."""
        if path.exists():
            raise OutputError(f"{path}: exists already; give another name")
        system = [{"role": "system", "content": self.system}] if self.system else []
        write_text(path, json.dumps({"schema": SCHEMA, "messages": system + self.turns}, indent=1) + "\n")

    def load(self, path: Path) -> None:
        """Take up a conversation that save() wrote, instead of this one. Raises InputError or ChatError."""
        try:
            saved = parse_json(read_whole(path, MAX_SAVED))
        except ValueError:
            raise ChatError(f"{path}: no saved conversation: not JSON") from None
        messages = saved.get("messages") if isinstance(saved, dict) and saved.get("schema") == SCHEMA else None
        good = isinstance(messages, list) and all(
            isinstance(m, dict) and m.keys() == {"role", "content"} and isinstance(m["content"], str) for m in messages
        )
        if not good or not isinstance(messages, list):
            raise ChatError(f"{path}: no saved conversation: wants schema {SCHEMA} and messages of role and content")
        system = messages[0]["content"] if messages and messages[0]["role"] == "system" else ""
        turns = messages[bool(messages and messages[0]["role"] == "system") :]
        if len(turns) % 2 or any(m["role"] != ("user", "assistant")[i % 2] for i, m in enumerate(turns)):
            raise ChatError(f"{path}: no saved conversation: user and assistant must take turns")
        self.reset()
        self.system, self.turns = system, turns


def dialogue(messages: list[Message]) -> str:
    """A prompt for a model without a template: a written dialogue, which it continues."""
    lines = [f"{SPEAKERS[m['role']]}: {m['content']}" if m["role"] in SPEAKERS else m["content"] for m in messages]
    return "\n".join([*lines, f"{SPEAKERS['assistant']}:"])


def harmless(text: str) -> str:
    """Text for a terminal: what could steer it (escape sequences, text that runs backwards) is shown as \\x1b."""
    return "".join(c if _shown(c) else ascii(c)[1:-1] for c in text)


def _shown(c: str) -> bool:
    return c in "\n\t" or c in JOINERS or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
