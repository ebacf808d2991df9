"""The server: OpenAI's own client, clients that go away, what it refuses, and nothing left behind."""

from __future__ import annotations

import http.client
import json
import os
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
from ptqtp_gguf.errors import InputError, OutputError, ServerError
from ptqtp_gguf.serve import server
from ptqtp_gguf.serve.server import Server

pytestmark = pytest.mark.runtime
SCRIPT = str(Path(sys.executable).with_name("ptqtp-gguf"))
KEY = "correct-horse-battery"


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("talk")
    summary = conversion.convert(write_talking_model(folder / "f32.gguf"), folder / "talking.gguf")
    assert "TP2_2" in summary.weights_by_type()
    return summary.path


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
