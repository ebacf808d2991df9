"""Models on rpc-servers: two hosts made of network namespaces where the system allows them, else loopback."""

from __future__ import annotations

import importlib
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import REPO
from talking_model import write_talking_model

from ptqtp_gguf.conversion import pipeline as conversion
from ptqtp_gguf.errors import ServerError
from ptqtp_gguf.llamacpp import install, rpc

sys.path.insert(0, str(REPO / "tools" / "stress"))
tool = importlib.import_module("rpc_hosts")

pytestmark = pytest.mark.runtime
# prints what a stock rpc-server or client prints; CPU only, and without upstream's other tools
PEER = """
#include "ggml-rpc.h"
#include "ggml-cpu.h"
#include <cstring>
int main(int n, char ** a) {
    if (n == 3) { return ggml_backend_rpc_add_server(a[2]) ? 0 : 1; }
    ggml_backend_dev_t cpu = ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0);
    char where[99];
    snprintf(where, sizeof(where), "%s:%s", a[n - 3], a[n - 1]); // ... -H host -p port
    ggml_backend_rpc_start_server(where, nullptr, 1, 1, &cpu);
}
"""


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rpc")
    return conversion.convert(write_talking_model(folder / "f32.gguf"), folder / "talking.gguf").path


@pytest.fixture(scope="module")
def hosts() -> Iterator[Any]:
    with tool.hosts() as found:
        yield found


@pytest.fixture(scope="session")
def stock_peer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pristine sdist's RPC code, both sides, over the installed ggml. Kept in build/stock."""
    stock = REPO / "build" / "stock"
    peer = stock / "rpc-peer"
    if peer.exists():
        return peer
    stock.mkdir(parents=True, exist_ok=True)
    if not (tree := stock / "tree").exists():
        builder = REPO / "tools" / "build" / "build_runtime.py"
        words = ["--build-dir", str(REPO / "build"), "--pristine", str(tree)]
        subprocess.run([sys.executable, str(builder), *words], check=True)
    ggml, lib = tree / "vendor" / "llama.cpp" / "ggml", install.package_dir() / "lib"
    (stock / "rpc-peer.cpp").write_text(PEER)
    sources = [stock / "rpc-peer.cpp", *(ggml / "src" / "ggml-rpc" / f"{n}.cpp" for n in ("ggml-rpc", "transport"))]
    libraries = [lib / f"lib{name}.so" for name in ("ggml-base", "ggml-cpu")]
    flags = ["-std=gnu++17", "-O0", "-w", "-D_GNU_SOURCE", f"-I{ggml / 'include'}", f"-I{ggml / 'src'}"]
    partial = stock / "rpc-peer.partial"
    link = [f"-Wl,-rpath,{lib}", f"-Wl,-rpath-link,{lib}", "-o", partial]
    subprocess.run([*map(str, ["g++", *flags, *sources, *libraries, *link])], check=True)
    return partial.rename(peer)


def test_what_is_no_endpoint() -> None:
    assert rpc.endpoints(["a:1", "b.example:65535, c:3", "a:1"]) == ["a:1", "b.example:65535", "c:3"]
    for bad in ("", "a", "a:", ":1", "a:0", "a:65536", "a:x", "a:-1", "::1:5", "a:1,", "a:\u0663"):
        with pytest.raises(ServerError, match=r"is not host:port; give a name or an IPv4 address"):
            rpc.endpoints([bad])


def test_logits_are_those_of_one_host(hosts: Any, ours: Path) -> None:
    """A server holds rows, not panels. So on one CPU model the logits are exactly those of rows here, wherever the
    model is cut; and panels differ from rows by a rounding of activations of the same size (test_model.py)."""
    rows, panels = tool.logits(hosts, ours, rows=True), tool.logits(hosts, ours)
    with tool.rpc_server(hosts) as (_, server):
        for layers in (-1, 1):
            assert np.array_equal(tool.logits(hosts, ours, server, layers, rows=True), rows)
    assert 0 < np.sqrt(((panels - rows) ** 2).mean()) < 0.05 * rows.std()


def test_a_server_that_is_killed_is_an_error_and_no_hang(hosts: Any, ours: Path) -> None:
    for act in (tool.run_and, tool.serve_and):
        with tool.rpc_server(hosts) as (process, server):
            ending = act(hosts, ours, server, process.kill)
        assert tool.as_it_must(ending), ending
        assert f"{server}: the RPC server died or is out of reach" in ending["error"]


def test_stock_servers_are_refused(hosts: Any, ours: Path, stock_peer: Path) -> None:
    with tool.rpc_server(hosts, stock_peer, "-") as (process, server):
        for command in ("run", "serve"):
            more = ["-p", "x"] if command == "run" else ["--port", "0"]
            done = subprocess.run(
                tool.command(hosts, command, ours, *more, "--rpc", server), capture_output=True, text=True
            )
            assert done.returncode == 1 and not done.stdout
            assert re.fullmatch(
                rf"Error: {server}: its RPC version 7\.\d\.\d is a stock llama\.cpp's, .*\n", done.stderr
            )
        assert process.poll() is None


def test_stock_clients_are_refused(hosts: Any, ours: Path, stock_peer: Path) -> None:
    """By their own check of the version, with their own words; our server goes on."""
    with tool.rpc_server(hosts) as (process, server):
        done = subprocess.run([*hosts.near, str(stock_peer), "client", server], capture_output=True, text=True)
        assert done.returncode < 0 and "RPC server version mismatch: 135." in done.stderr
        assert f"RPC handshake failed for {server}" in done.stderr
        assert process.poll() is None
        more = ["-p", "once", "-n", "4", "--temp", "0"]
        again = subprocess.run(tool.command(hosts, "run", ours, *more, "--rpc", server), capture_output=True, text=True)
        assert again.returncode == 0, again.stderr


def test_what_does_not_answer_as_a_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as s:
        here = f"127.0.0.1:{s.getsockname()[1]}"
        with pytest.raises(ServerError, match=r"no RPC server answers within 0 s; one that is in use"):
            rpc.check(here, timeout=0.2)
    with pytest.raises(ServerError, match=r"no RPC server: connection refused; start the patched"):
        rpc.check(here)
    with pytest.raises(ServerError, match=r"no such host"):
        rpc.check("no-such-host.invalid:1")


def test_other_protocols_are_told_apart() -> None:
    """An HTTP server, and one that hangs up as older versions do at a greeting of another size."""
    import threading

    for answer, message in (
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is not an RPC server"),
        (b"", "hangs up at the handshake"),
    ):
        with socket.create_server(("127.0.0.1", 0)) as s:

            def serve(s: socket.socket = s, answer: bytes = answer) -> None:
                c, _ = s.accept()
                with c:
                    c.recv(100)
                    c.sendall(answer)

            thread = threading.Thread(target=serve)
            thread.start()
            with pytest.raises(ServerError, match=message):
                rpc.check(f"127.0.0.1:{s.getsockname()[1]}")
            thread.join()
