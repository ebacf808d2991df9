"""tools/stress/soak.py for a few seconds: all that clients do to a server, and that the tool sees what it must."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from helpers import REPO
from talking_model import write_talking_model

from ptqtp_gguf.conversion import pipeline as conversion
from ptqtp_gguf.serve.server import Server

sys.path.insert(0, str(REPO / "tools" / "stress"))
tool = importlib.import_module("soak")

pytestmark = pytest.mark.runtime


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("soak")
    return conversion.convert(write_talking_model(folder / "f32.gguf"), folder / "talking.gguf").path


def arguments(model: Path, **more: object) -> Namespace:
    usual = {"clients": 4, "minutes": 8 / 60, "parallel": 2, "ctx": 256, "threads": 1, "seed": 3, "large": 20_000}
    return Namespace(model=model, **{**usual, **more})


def test_a_short_soak(ours: Path) -> None:
    found = tool.soak(arguments(ours))
    assert not found["wrong"] and found["exit"] == 0
    assert found["answers_equal"] >= 3 and not found["answers_other"]
    seen = {name.partition(":")[0] for name in found["outcomes"]}
    assert seen == {act.__name__ for act in tool.ACTS}
    assert found["memory_mib"]["highest"] > found["memory_mib"]["idle"] > 5 and found["threads"]["idle"] > 1


def test_connections_that_say_nothing_block_nobody(ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama-server's own pool of threads would answer nobody for an hour."""
    monkeypatch.setattr(tool, "TIMEOUT", 30.0)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Server(ours, ctx=64, threads=1))
        for _ in range(40):
            stack.enter_context(tool.connect(server.port)).sendall(b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n{")
        assert tool.whole(server.port, "Hello")


def test_a_server_that_dies_is_seen(ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a client that gets another answer, and a leak."""

    def kills(c: Any) -> str:
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and f"--port\0{c.port}\0".encode() in (folder / "cmdline").read_bytes():
                    os.kill(int(folder.name), signal.SIGKILL)
            except OSError:
                continue
        return "killed"

    monkeypatch.setattr(tool, "ACTS", {kills: 1, tool.reads_a_stream: 5})
    found = tool.soak(arguments(ours, minutes=0.2, clients=2))
    assert "llama-server is gone" in found["wrong"] and any("serve ended" in x for x in found["wrong"])
    client = tool.Client(1, tool.random.Random(1), {"q": "yes"})
    assert client.check("q", "yes") == "equal" and client.check("q", "no") == "other text"
    seconds = [float(i) for i in range(100)]
    assert tool.growth(seconds, [50 + 0.1 * s for s in seconds]) == pytest.approx(4.9)
    assert tool.growth(seconds, [50 + 20 * (s < 50) for s in seconds]) == pytest.approx(0, abs=1e-9)
