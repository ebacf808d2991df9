"""chat and serve, on a small model: through the library, a pipe, a terminal, and OpenAI's own client."""

from __future__ import annotations

import http.client
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from talking_model import write_talking_model

from ptqtp_gguf.conversion import pipeline as conversion
from ptqtp_gguf.errors import ChatError, InputError, OutputError, ServerError
from ptqtp_gguf.llamacpp import model as runtime
from ptqtp_gguf.serve import server
from ptqtp_gguf.serve.chat import Chat, harmless
from ptqtp_gguf.serve.server import Server

pytestmark = pytest.mark.runtime
SCRIPT = str(Path(sys.executable).with_name("ptqtp-gguf"))
TEMPLATE = "tokenizer.chat_template"
KEY = "correct-horse-battery"
N_CTX = 256


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("talk")
    summary = conversion.convert(write_talking_model(folder / "f32.gguf"), folder / "talking.gguf")
    assert "TP2_1" in summary.weights_by_type()
    return summary.path


@pytest.fixture(scope="module")
def model(ours: Path) -> Iterator[Any]:
    with closing(runtime.load(ours, n_ctx=N_CTX, threads=2)) as model:
        yield model


# ---- the conversation ----


def test_prompt_is_the_template_s_and_history_is_seen(model: Any) -> None:
    chat = Chat(model, temperature=0, max_tokens=12)
    assert chat.has_template
    answer = "".join(chat.ask("Hello"))
    assert len(answer) == 12 and chat.turns[-1] == {"role": "assistant", "content": answer}
    assert chat.pace and chat.pace.reason == "length" and chat.pace.tokens in (11, 12)
    user, begin = "<|im_start|>user\nHello<|im_end|>\n", "<|im_start|>assistant\n"
    seen = f"{user}{begin}{answer}<|im_end|>\n{begin}"
    assert chat.prompt() == model.tokenize(seen.encode(), add_bos=True, special=True)
    assert chat.prompt().count(model.token_bos()) == 1
    chat.system = "Be brief."
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert chat.prompt() == model.tokenize((system + seen).encode(), add_bos=True, special=True)


def test_a_seed_repeats_a_conversation(model: Any) -> None:
    def talk(seed: int) -> list[str]:
        chat = Chat(model, temperature=1.5, seed=seed, max_tokens=20)
        return ["".join(chat.ask(text)) for text in ("Name a colour.", "And another.")]

    assert talk(7) == talk(7) != talk(8)


def test_a_stopped_answer_is_kept_and_can_be_taken_back(model: Any) -> None:
    chat = Chat(model, temperature=0)
    with closing(chat.ask("Count to twenty.")) as pieces:
        first = next(pieces)
    assert [m["content"] for m in chat.turns] == ["Count to twenty.", first]
    assert chat.pace and chat.pace.reason == "interrupted"
    assert chat.undo() == {"role": "user", "content": "Count to twenty."}
    assert not chat.turns and chat.undo() is None


def test_when_the_context_is_full_the_oldest_turns_go_first(model: Any, tmp_path: Path) -> None:
    notes: list[str] = []
    chat = Chat(model, system="Be brief.", temperature=0, max_tokens=3, notice=notes.append)
    for i in range(6):
        chat.turns += [
            {"role": "user", "content": f"Message {i}."},
            {"role": "assistant", "content": f"Answer {i}. " * 2},
        ]
    before = list(chat.turns)
    assert "".join(chat.ask("The last?"))
    seen = model.detokenize(chat.prompt(), special=True).decode()
    assert len(notes) == 1 and f"no longer sees the {chat.first // 2} oldest turns" in notes[0]
    assert "Be brief." in seen and "The last?" in seen and "Answer 5." in seen and "Message 0." not in seen
    assert chat.pace and chat.pace.prompt <= N_CTX // 2
    assert chat.turns[:12] == before  # what the model does not see is not forgotten
    chat.save(tmp_path / "c.json")
    assert "Message 0." in (tmp_path / "c.json").read_text()


def test_an_answer_ends_with_the_context(model: Any) -> None:
    chat = Chat(model)
    "".join(chat.ask("Hello"))
    assert chat.pace and chat.pace.reason == "full" and chat.pace.speed
    assert N_CTX - 2 <= chat.pace.prompt + chat.pace.tokens <= N_CTX


def test_a_message_that_is_too_long(model: Any) -> None:
    chat = Chat(model, max_tokens=3)
    chat.turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ChatError, match=rf"takes \d{{3}} tokens .* a context of {N_CTX} leaves {N_CTX * 3 // 4}"):
        next(chat.ask("word " * 150))
    assert len(chat.turns) == 2 and chat.first == 0
    with pytest.raises(InputError, match=r"cannot continue this prompt: Requested tokens \(\d+\) exceed context"):
        next(runtime.generate(model, "word " * 150, max_tokens=1, temperature=0, seed=1))
    assert "".join(chat.ask("word"))


def test_saved_conversations(model: Any, tmp_path: Path) -> None:
    chat, path = Chat(model, system="S \x1b", max_tokens=2), tmp_path / "c.json"
    assert "".join(chat.ask("H\u00e9llo\nthere"))
    chat.save(path)
    with pytest.raises(OutputError, match="exists already"):
        chat.save(path)
    other = Chat(model)
    other.load(path)
    assert (other.system, other.turns) == (chat.system, chat.turns)
    for bad in (
        b"",
        b"{",
        b"[]",
        b'{"schema": 2, "messages": []}',
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"schema": 1}',
        b'{"schema": 1, "messages": [{"role": "user"}]}',
        b'{"schema": 1, "messages": {"a": 1}}',
        b'{"schema": 1, "messages": [{"role": "user", "content": "x"}]}',
        b'{"schema": 1, "messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": ""}]}',
    ):
        path.write_bytes(bad)
        with pytest.raises(ChatError, match="no saved conversation"):
            other.load(path)
    assert other.turns == chat.turns
    with pytest.raises(InputError, match="No such file"):
        other.load(tmp_path / "absent")


def test_a_file_without_a_template(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(model.metadata, TEMPLATE)
    chat = Chat(model, system="A dialogue.", temperature=0, max_tokens=24)
    answer = "".join(chat.ask("Hello"))
    assert not chat.has_template and answer and not answer[0].isspace()
    seen = f"A dialogue.\nUser: Hello\nAssistant: {answer}\nAssistant:"
    assert chat.prompt() == model.tokenize(seen.encode(), add_bos=True, special=True)


def test_a_template_that_refuses(model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(model.metadata, TEMPLATE, "{{ raise_exception('System role\\nnot supported') }}")
    chat = Chat(model)
    with pytest.raises(ChatError, match="refuses these messages: System role not supported"):
        next(chat.ask("x"))
    assert not chat.turns
    with pytest.raises(InputError, match="its chat template cannot be read"):
        runtime.load(write_talking_model(tmp_path / "broken.gguf", "{% for x %%}"))


def test_text_cannot_steer_the_terminal() -> None:
    text = "a\x1b[2Jb\r\x07\x9b\u202ec\ud800\td\n\u00e9\u4e2d\U0001f468\u200d\U0001f469"
    shown = harmless(text)
    assert shown == "a\\x1b[2Jb\\r\\x07\\x9b\\u202ec\\ud800\td\n\u00e9\u4e2d\U0001f468\u200d\U0001f469"


# ---- the command chat ----


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


# ---- the server ----


@pytest.fixture(scope="module")
def serving(ours: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """`ptqtp-gguf serve` on a free port, with a key; ended by SIGTERM, which must leave nothing."""
    folder = tmp_path_factory.mktemp("serve")
    (folder / "keys").write_text(f"# a comment\n{KEY}\n")
    command = [
        SCRIPT,
        "serve",
        str(ours),
        "--port",
        "0",
        "--ctx",
        "256",
        "--parallel",
        "2",
        "--api-key-file",
        str(folder / "keys"),
        "--log",
        str(folder / "log"),
        "--json",
    ]
    env = {**os.environ, "LLAMA_ARG_CTX_SIZE": "64", "LLAMA_ARG_ALIAS": "wrong", "LLAMA_API_KEY": ""}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env, text=True) as process:
        assert process.stdout
        events = (json.loads(line) for line in process.stdout)
        ready = next(e for e in events if e["event"] == "ready")
        yield {**ready, "process": process, "log": folder / "log"}
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert gone(ready["pid"])
    assert KEY[-4:] not in (folder / "log").read_text()


def gone(pid: int, seconds: float = 30) -> bool:
    """Whether a process ends within the time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def client(serving: dict[str, Any]) -> Iterator[Any]:
    import openai

    with openai.OpenAI(base_url=serving["url"] + "/v1", api_key=KEY, max_retries=0, timeout=120) as client:
        yield client


QUESTION: Any = [{"role": "user", "content": "Hello"}]
SAME: dict[str, Any] = {"messages": QUESTION, "temperature": 0, "max_tokens": 12, "extra_body": {"cache_prompt": False}}


def test_openai_client(client: Any) -> None:
    assert [m.id for m in client.models.list()] == ["talking"]
    whole = client.chat.completions.create(model="talking", **SAME).choices[0].message.content
    stream = client.chat.completions.create(model="talking", **SAME, stream=True)
    pieces = [c.choices[0].delta.content or "" for c in stream if c.choices]
    assert len(pieces) > 3 and "".join(pieces) == whole and len(whole.strip()) > 8


def test_the_server_outlives_its_clients(client: Any, serving: dict[str, Any]) -> None:
    import openai

    with client.chat.completions.create(model="x", messages=QUESTION, max_tokens=200, stream=True) as stream:
        next(iter(stream))  # and goes away in the middle
    with pytest.raises(openai.BadRequestError, match="exceeds the available context size"):
        client.chat.completions.create(model="x", messages=[{"role": "user", "content": "word " * 500}])
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").chat.completions.create(model="x", messages=QUESTION)
    status, _ = request(serving["port"], "POST", "/v1/chat/completions", b'{"messages": [{"role')
    assert 400 <= status < 600
    done = client.chat.completions.create(model="x", messages=QUESTION, max_tokens=2)
    assert done.usage.completion_tokens == 2
    assert KEY not in Path(f"/proc/{serving['pid']}/cmdline").read_text()


def request(
    port: int, method: str, path: str, body: bytes = b"", **headers: str
) -> tuple[int, http.client.HTTPMessage]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request(method, path, body, {"Authorization": f"Bearer {KEY}", **headers})
        reply = connection.getresponse()
        reply.read()
        return reply.status, reply.headers


def test_web_pages_of_others_may_not_use_it(serving: dict[str, Any]) -> None:
    allowed = {}
    for origin in ("http://evil.example", "http://localhost:3000"):
        _, headers = request(serving["port"], "GET", "/v1/models", Origin=origin)
        allowed[origin] = headers.get("Access-Control-Allow-Origin")
    assert allowed["http://evil.example"] in (None, "") and allowed["http://localhost:3000"] == "http://localhost:3000"


def test_what_serve_refuses(cli: Callable[..., Any], ours: Path, serving: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(ours.read_bytes()[:-100])
    (tmp_path / "none").write_text("# nothing\n")
    port = serving["port"]
    for args, message in [
        (["--port", port], f"127.0.0.1 port {port}: address already in use; give another --port, or 0"),
        (["--host", "0.0.0.0"], "would let other machines use the server; if that is meant, give --expose"),
    ]:
        done = cli("serve", ours, *args)
        assert done.returncode == 1 and done.stdout == "" and message in done.stderr
        assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1
    with pytest.raises(InputError, match="truncated"):
        Server(tmp_path / "cut.gguf")
    with pytest.raises(InputError, match="holds no API key"):
        Server(ours, api_key_file=tmp_path / "none")
    with pytest.raises(ServerError, match=r"192\.0\.2\.1 port \d+: cannot assign requested address"):
        Server(ours, host="192.0.2.1", expose=True).start()
    with pytest.raises(OutputError, match="cannot write the log"):
        Server(ours, log=tmp_path / "absent" / "log").start()


@pytest.mark.parametrize(
    ("host", "only_here"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.2", False),
        ("", False),
        ("127.0.0.1,0.0.0.0", False),
        ("example.org", False),
        ("127.1", False),
    ],
)
def test_loopback(host: str, only_here: bool) -> None:
    assert server.is_loopback(host) == only_here


def test_a_server_that_dies(ours: Path, tiny_gguf: Path) -> None:
    with Server(ours, ctx=64) as running:
        pid = running.pid
        assert pid and running.url == f"http://127.0.0.1:{running.port}"
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ServerError, match="llama-server was ended by signal 9"):
            running.wait()
    assert gone(pid)
    bad = Server(tiny_gguf)
    with pytest.raises(ServerError, match=r"tiny\.gguf: llama-server ended with exit code 1: .*"):
        bad.start()
    assert bad.pid is None
    with socket.socket() as s:  # nothing holds the port
        s.bind(("127.0.0.1", bad.port))


def test_killed_hard_we_leave_no_server(ours: Path) -> None:
    command = [SCRIPT, "serve", str(ours), "--port", "0", "--ctx", "64", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        ready = next(e for e in map(json.loads, process.stdout) if e["event"] == "ready")
        process.kill()
    assert gone(ready["pid"])
