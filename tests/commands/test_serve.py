"""`serve`: what is behind `--` reaches llama-server, and what must not is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from talking_model import write_talking_model

pytestmark = pytest.mark.runtime
SCRIPT = str(Path(sys.executable).with_name("ptqtp-gguf"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talking_model(tmp_path_factory.mktemp("serve") / "m.gguf")


def test_serve_with_options_of_llama_server(model: Path) -> None:
    args = ["--port", "0", "--ctx", "64", "-j", "1", "--embeddings", "--json", "--", "--no-warmup", "--metrics"]
    with subprocess.Popen([SCRIPT, "serve", str(model), *args], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        ready = next(e for e in map(json.loads, process.stdout) if e["event"] == "ready")
        with urllib.request.urlopen(ready["url"] + "/metrics") as reply:
            assert b"llamacpp:" in reply.read()
        with urllib.request.urlopen(ready["url"] + "/v1/embeddings", b'{"input": ["a", "b"]}') as reply:
            a, b = (d["embedding"] for d in json.load(reply)["data"])
        assert len(a) == 64 and a != b
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--", "--absent-option"], 1, "llama-server ended with exit code 1: invalid argument: --absent-option"),
        (["--", "--host", "0.0.0.0"], 1, "--host: is not passed on to llama-server; give --host before the --"),
        (["--", "--cache-ram", "1", "-m", "x"], 1, "-m: is not passed on to llama-server; the file to serve is FILE"),
        (["--absent-option"], 2, "No such option: --absent-option"),
        (["other.gguf"], 2, "unexpected 'other.gguf'; one file is served"),
        (["--lora", "absent.gguf"], 1, "absent.gguf: No such file or directory"),
        (["--chat-template-file", "absent"], 1, "absent: No such file or directory"),
        (["--pooling", "mean"], 1, "give --embeddings, too"),
    ],
)
def test_what_serve_refuses(cli: Callable[..., Any], model: Path, args: list[str], code: int, message: str) -> None:
    done = cli("serve", model, "--port", 0, "--ctx", 64, *args)
    assert done.returncode == code and done.stdout == ""
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1 and message in done.stderr


def test_the_help_shows_how(cli: Callable[..., Any]) -> None:
    shown = cli("serve", "--help").stdout
    for text in (
        "[-- OPTIONS]",
        "-- --cache-type-k q8_0",
        "--embeddings",
        "--reranking",
        "--lora",
        "--draft",
        "--slots",
    ):
        assert text in shown
