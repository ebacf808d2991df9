"""`run`, and what `chat` shares with it: adapters, grammars, and templates that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from talking_model import write_adapter, write_talking_model

pytestmark = pytest.mark.runtime
BROKEN = "{% for m in messages %}{{ m.content }}{% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_talking_model(folder / "m.gguf")
    write_talking_model(folder / "broken.gguf", BROKEN)
    write_adapter(folder / "lora.gguf")
    write_adapter(folder / "narrow.gguf", width=32)
    (folder / "yes.gbnf").write_text('root ::= " yes"')
    (folder / "bad.gbnf").write_text("root ::= [")
    (folder / "ab.json").write_text('{"type": "object", "properties": {"a": {"const": "b"}}, "required": ["a"]}')
    (folder / "mine.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    (folder / "mute.jinja").write_text("Hello.")
    return folder


def test_run(cli: Callable[..., Any], folder: Path) -> None:
    def said(*args: object) -> str:
        done = cli("run", "m.gguf", "-p", "hello", "-n", 24, "--temp", 0, *args, cwd=folder)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        assert done.stdout.startswith("hello")
        return str(done.stdout.removeprefix("hello"))

    assert said("--grammar", "yes.gbnf") == " yes\n"
    assert json.loads(said("--json-schema", "ab.json")) == {"a": "b"}
    assert said("--lora", "lora.gguf") == said("--lora", "lora.gguf:0.5", "--lora", "lora.gguf:0.5") != said()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--grammar", "absent"], "absent: No such file or directory"),
        (
            ["--grammar", "bad.gbnf"],
            "bad.gbnf: the runtime does not take the grammar: error parsing grammar: ",
        ),
        (["--json-schema", "yes.gbnf"], "yes.gbnf: cannot be read as a JSON schema: "),
        (["--json-schema", "ab.json", "--grammar", "yes.gbnf"], "give one of them"),
        (["--lora", "absent.gguf:0.5"], "absent.gguf: No such file or directory"),
        (["--lora", "m.gguf"], "m.gguf: no LoRA adapter, but of the kind 'model'"),
        (["--lora", "narrow.gguf"], "narrow.gguf: the runtime cannot use this LoRA adapter: "),
    ],
)
def test_what_run_refuses(cli: Callable[..., Any], folder: Path, args: list[str], message: str) -> None:
    done = cli("run", "m.gguf", "-p", "hello", "-n", 4, *args, cwd=folder)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1 and message in done.stderr


def test_a_template_that_cannot_be_read(cli: Callable[..., Any], folder: Path) -> None:
    """Only `chat` needs it, and takes another one."""
    done = cli("run", "broken.gguf", "-p", "hello", "-n", 3, cwd=folder)
    assert done.returncode == 0 and len(done.stdout) == len("hello") + 3 + 1 and done.stderr == ""
    done = cli("bench", "broken.gguf", "--prompt", 4, "--generate", 2, "-r", 1, "-q", cwd=folder)
    assert done.returncode == 0, done.stderr
    done = cli("convert", "broken.gguf", "out.gguf", "-q", "--effort", "none", cwd=folder)
    assert done.returncode == 0, done.stderr
    done = cli("chat", "out.gguf", "-p", "hello", cwd=folder)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("Error: out.gguf: the chat template cannot be read: ")
    assert "give another with --chat-template FILE" in done.stderr
    done = cli("chat", "out.gguf", "-p", "hello", "-n", 3, "--chat-template", "mine.jinja", cwd=folder)
    assert done.returncode == 0 and len(done.stdout) == 3 + 1, done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--chat-template", "absent"], "absent: No such file or directory"),
        (["--chat-template", "mute.jinja"], "the chat template leaves out what the user says; give another"),
        (["--lora", "absent.gguf"], "absent.gguf: No such file or directory"),
    ],
)
def test_what_chat_refuses(cli: Callable[..., Any], folder: Path, args: list[str], message: str) -> None:
    done = cli("chat", "m.gguf", "-p", "hello", "-n", 3, *args, cwd=folder)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1 and message in done.stderr


def test_chat_with_an_adapter(cli: Callable[..., Any], folder: Path) -> None:
    asked = ("chat", "m.gguf", "-p", "hello", "-n", 12, "--temp", 0)
    answers = [cli(*asked, *more, cwd=folder).stdout for more in ((), ("--lora", "lora.gguf"))]
    assert len(answers[0]) == len(answers[1]) == 13 and answers[0] != answers[1]
