"""What talks with a file."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from threading import Event
from types import FrameType
from typing import Annotated, NoReturn

import typer

from ..errors import PtqtpError
from ..llamacpp import adapter, context_for, load, read_template
from ..serve import Chat, harmless
from ..terminal import err_console, event
from .common import AsJson, Lora, Quiet, Rpc, RpcLayers, Threads, fail, reporter


class _Terminated(BaseException):
    """SIGTERM, which must not be taken for the Ctrl-C that only stops an answer."""


def chat(
    file: Annotated[Path, typer.Argument(help="A GGUF file.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Send this one message, print the answer, end.")
    ] = None,
    system: Annotated[str, typer.Option("--system", "-s", help="What the model is told before all messages.")] = "",
    temperature: Annotated[float, typer.Option("--temp", min=0.0, help="0 = always the likeliest token.")] = 0.8,
    seed: Annotated[int | None, typer.Option(min=0, help="The same answers every time.")] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", min=0, help="Tokens of an answer; 0 = until the context is full.")
    ] = 0,
    threads: Threads = 0,
    ctx: Annotated[int, typer.Option(min=0, help="Tokens of context; 0 = as trained, at most 4096.")] = 0,
    chat_template: Annotated[
        Path | None, typer.Option(help="A file with a chat template, not the model's own.")
    ] = None,
    lora: Lora = None,
    rpc: Rpc = None,
    rpc_layers: RpcLayers = -1,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Talk with a file, by its own chat template.

    /help lists what can be typed besides messages. Ctrl-C stops an answer; at the prompt it leaves, as Ctrl-D does. If
    the input is not a terminal each line of it is a message, and an error ends the run.

    Examples:

      ptqtp-gguf chat model.gguf

      ptqtp-gguf chat model.gguf --system "Answer in one sentence." -p "Why is the sky blue?" --temp 0

      ptqtp-gguf chat model.gguf --seed 1 --json < questions.txt

      ptqtp-gguf chat model.gguf --chat-template mine.jinja --lora pirate.gguf
    """
    signal.signal(signal.SIGTERM, _terminated)
    try:
        with reporter(quiet, as_json) as progress:
            progress("loading", 0, 0, file.name)
            n_ctx = context_for(file, ctx)
            template = read_template(chat_template) if chat_template else None
            adapters = [adapter(text) for text in lora or ()]
            cores = threads or os.cpu_count()
            model = load(file, n_ctx=n_ctx, threads=cores, rpc=rpc or (), rpc_layers=rpc_layers, lora=adapters)
        with closing(model):
            conversation = Chat(
                model,
                system=system,
                template=template,
                temperature=temperature,
                seed=seed,
                max_tokens=max_tokens,
                notice=_note,
            )
            if not conversation.has_template:
                _note("the file has no chat template: the model continues a written dialogue of User and Assistant")
            shell = _Shell(conversation, prompt is None and sys.stdin.isatty(), quiet, as_json)
            if prompt is None:
                shell.run()
            else:
                shell.ask(prompt)
    except _Terminated:
        fail("interrupted by SIGTERM", 130)


def _terminated(signum: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated


@contextmanager
def _stoppable() -> Iterator[Event]:
    """Ctrl-C sets the event meanwhile, the second is raised.

    Raised, it could come inside of one of the runtime's callbacks into Python, which swallows exceptions.
    """
    stopped = Event()

    def stop(signum: int, frame: FrameType | None) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def _note(text: str) -> None:
    err_console.print(text, soft_wrap=True, markup=False, style="dim")


class _Shell:
    """Reads messages and commands, prints answers."""

    def __init__(self, chat: Chat, terminal: bool, quiet: bool, as_json: bool) -> None:
        self.chat, self.terminal, self.quiet, self.as_json = chat, terminal, quiet, as_json
        self.answers = self.tokens = 0
        self.commands: dict[str, tuple[str, Callable[[str], None]]] = {
            "/help": ("this list", self.help),
            "/reset": ("forget all messages; the system message stays", lambda _: chat.reset()),
            "/system": ("TEXT: tell the model this before all messages; without a text, nothing", self.system),
            "/save": ("FILE: write the conversation", lambda name: chat.save(self.file(name))),
            "/load": ("FILE: continue a saved one", lambda name: chat.load(self.file(name))),
            "/undo": ("take back the last message and its answer", self.undo),
            "/stats": ("speed and room", self.stats),
            "/quit": ("leave; Ctrl-C and Ctrl-D do, too", self.leave),
        }
        if hasattr(sys.stdin, "reconfigure"):  # bytes that are not UTF-8 must not end a conversation
            sys.stdin.reconfigure(errors="replace")
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")
        if terminal:
            try:
                import readline  # noqa: F401  (input() has history and editing from here on)
            except ImportError:
                pass
            if not quiet:
                _note('a message, or /help; a \\ at the end of a line or """ around several join them')

    def run(self) -> None:
        while True:
            try:
                text = self.read()
                if not text.strip():
                    continue
                if text.startswith("/"):
                    self.command(text)
                else:
                    self.ask(text)
            except EOFError:
                if self.terminal:
                    print()
                return
            except KeyboardInterrupt:  # at the prompt: an answer's own is caught where it is printed
                if not self.terminal:
                    raise
                print()
                return
            except PtqtpError as e:
                if not self.terminal:
                    raise
                err_console.print(str(e), soft_wrap=True, markup=False, style="red")

    def read(self) -> str:
        """A message: a line, several after a backslash or between triple quotes. Raises EOFError at the end."""
        text = self.line("> ")
        if text.lstrip().startswith('"""'):
            text = text.lstrip()[3:]
            while not text.rstrip().endswith('"""'):
                text += "\n" + self.line(". ")
            return text.rstrip()[:-3].strip("\n")
        while text.endswith("\\"):
            text = text[:-1] + "\n" + self.line(". ")
        return text

    def line(self, prompt: str) -> str:
        return input(prompt if self.terminal and sys.stdout.isatty() else "")

    def ask(self, text: str) -> None:
        answer = []
        try:
            with ExitStack() as stack:
                stopped = stack.enter_context(_stoppable()) if self.terminal else Event()
                for piece in stack.enter_context(closing(self.chat.ask(text))):
                    answer.append(piece)
                    if not self.as_json:
                        print(harmless(piece), end="", flush=True)
                    if stopped.is_set():
                        break
        except KeyboardInterrupt:
            if not self.terminal:
                raise
        pace = self.chat.pace
        if not self.as_json:
            print()
        if pace is None:
            _note("stopped before the answer began; the message was taken back")
            return
        self.answers += 1
        self.tokens += pace.tokens
        if self.as_json:
            event(
                "answer",
                text="".join(answer),
                reason=pace.reason,
                prompt_tokens=pace.prompt,
                tokens=pace.tokens,
                wait_s=round(pace.wait, 4),
                tokens_per_second=pace.speed and round(pace.speed, 3),
            )
            return
        if pace.reason == "full":
            _note("the context is full, the answer ends here; /reset, or start with a larger --ctx")
        if self.terminal and not self.quiet:
            _note(("stopped; " if pace.reason == "interrupted" else "") + self.speed())

    def command(self, text: str) -> None:
        name, _, rest = text.strip().partition(" ")
        if name not in self.commands:
            err_console.print(
                f"no command {harmless(name)}; /help lists them, a message that begins with / wants a blank before it",
                soft_wrap=True,
                markup=False,
                style="red",
            )
            return
        self.commands[name][1](rest.strip())

    def help(self, _: str) -> None:
        for name, (what, _do) in self.commands.items():
            err_console.print(f"  {name:8} {what}", soft_wrap=True, markup=False)
        err_console.print(
            '  a \\ at the end of a line, or """ around several, join lines', markup=False, soft_wrap=True
        )

    def system(self, text: str) -> None:
        self.chat.system = text
        _note("told before all messages" if text else "no system message")

    def file(self, name: str) -> Path:
        if not name:
            raise PtqtpError("the name of a file is missing: /save FILE, /load FILE")
        return Path(name).expanduser()

    def undo(self, _: str) -> None:
        message = self.chat.undo()
        _note(f"taken back: {harmless(message['content'])}" if message else "there is no message to take back")

    def speed(self) -> str:
        pace = self.chat.pace
        if pace is None:
            return "no answer yet"
        speed = "" if pace.speed is None else f", {pace.speed:.1f} tokens/s"
        return f"{pace.tokens} tokens{speed}, first after {pace.wait:.2f} s"

    def stats(self, _: str) -> None:
        seen = self.chat.turns[self.chat.first :]
        _note(f"last answer: {self.speed()}; in all {self.answers} answers, {self.tokens} tokens")
        _note(
            f"the model sees {len(seen)} of {len(self.chat.turns)} messages, {len(self.chat.prompt())} of "
            f"{self.chat.n_ctx} tokens"
        )

    def leave(self, _: str) -> None:
        raise EOFError
