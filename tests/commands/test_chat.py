"""`chat` through a pipe and in a terminal."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from talking_model import write_talking_model

from ptqtp_gguf.conversion import pipeline as conversion

pytestmark = pytest.mark.runtime
SCRIPT = str(Path(sys.executable).with_name("ptqtp-gguf"))
N_CTX = 256


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("talk")
    summary = conversion.convert(write_talking_model(folder / "f32.gguf"), folder / "talking.gguf")
    assert "TP2_2" in summary.weights_by_type()
    return summary.path


def test_chat_through_a_pipe(cli: Callable[..., Any], ours: Path, tmp_path: Path) -> None:
    mute = write_talking_model(tmp_path / "mute.gguf", None)
    lines = '/system Be brief.\nHello \\\nthere \udcff\n\n/bogus\n"""\na\nb"""\n/stats\n/undo\n/save c.json\n'
    done = cli("chat", mute, "-n", 3, "--ctx", 512, cwd=tmp_path, input=lines, errors="surrogateescape")
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "c.json").read_text())["messages"]
    assert [m["content"] for m in saved[:2]] == ["Be brief.", "Hello \nthere \ufffd"]
    assert done.stdout.startswith(saved[2]["content"] + "\n") and "> " not in done.stdout and len(saved) == 3
    for text in ("has no chat template", "no command /bogus", "in all 2 answers", "of 512 tokens", "taken back: a\nb"):
        assert text in done.stderr


def test_chat_once(cli: Callable[..., Any], ours: Path) -> None:
    done = cli("chat", ours, "-p", "/help", "-s", "Be brief.", "--seed", 3, "-n", 4, "--json")
    assert done.returncode == 0, done.stderr
    answer = next(e for e in map(json.loads, done.stdout.splitlines()) if e["event"] == "answer")
    assert len(answer["text"]) == 4 and answer["reason"] == "length" and answer["prompt_tokens"] > 10
    done = cli("chat", ours, "-p", "word " * 150, "--ctx", N_CTX)
    assert done.returncode == 1 and done.stderr.startswith("Error: the message takes ") and done.stdout == ""


def test_sigterm_is_not_taken_for_ctrl_c(ours: Path) -> None:
    """The one ends the program, the other, in a terminal, only an answer."""
    command = [
        SCRIPT,
        "chat",
        str(ours),
        "--temp",
        "0",
        "--ctx",
        "1024",
        "-p",
        "Write a very long story about a river.",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.read(2)
        process.send_signal(signal.SIGTERM)
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and err == b"Error: interrupted by SIGTERM\n"


class Terminal:
    """A program on a terminal of its own: what is typed goes through the kernel's line discipline, Ctrl-C too."""

    def __init__(self, *command: str) -> None:
        self.master, slave = os.openpty()
        # in a new session the first terminal that is opened becomes the controlling one
        shell = 'tty=$1; shift; exec "$@" <"$tty" >"$tty" 2>&1'
        env = {**os.environ, "TERM": "dumb", "COLUMNS": "200"}
        self.process = subprocess.Popen(
            ["sh", "-c", shell, "sh", os.ttyname(slave), *command], start_new_session=True, env=env
        )
        self.slave, self.seen = slave, ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def expect(self, pattern: str, seconds: float = 60) -> str:
        """Wait for it in what has come since the last one."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < end and self.process.poll() is None, f"{pattern!r} not in {self.seen!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                self.seen += os.read(self.master, 65536).decode(errors="replace")
        self.seen = self.seen[found.end() :]
        return found[0]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.slave)
        os.close(self.master)


def test_chat_in_a_terminal(ours: Path) -> None:
    with closing(Terminal(SCRIPT, "chat", str(ours), "--ctx", "8192")) as t:
        t.expect("> ")
        t.type("/help\n")
        t.expect("/undo +take back")
        t.expect("> ")
        t.type("Hello\n")
        t.expect(r"Hello\r\n\w")
        t.type("\x03")
        t.expect(r"stopped; \d+ tokens")
        t.expect("> ")
        t.type("/stats\n")
        t.expect("sees 2 of 2 messages")
        t.type("/reset\n/load absent.json\n/stats\n")
        t.expect("absent.json: No such file")
        t.expect("sees 0 of 0 messages")
        t.expect("> ")
        t.type("\x04")
        assert t.process.wait(60) == 0
