#!/usr/bin/env python3
"""Run a model on two hosts by llama.cpp's RPC and compare with one; then let the server die in all ways.

    rpc_hosts.py MODEL.gguf [--loopback] [--vanish] [--stock FOLDER] [--json FILE]

The hosts are two network namespaces of this machine with a virtual cable between them; where the system allows none,
or with --loopback, both are this machine. Compares logits, kills the server in the middle of `run` and of `serve`, and

--stock FOLDER   with the tools of an unpatched llama.cpp in it: they must be refused, and refuse
--vanish         pulls the cable in the middle of `run` (takes half a minute; namespaces only)

Exits 1 unless all went as it must. The servers see no network but the cable: upstream calls RPC insecure.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

TEXT = "once upon a time there was a river that ran from the hills to the sea and nobody knew its name " * 3
FEED = 40, 20  # tokens of the text: together, then one by one
SECONDS = 20.0  # for an error to come after a server's death; it takes far less, but machines are busy


@dataclass
class Hosts:
    """What runs a command on the near and on the far host, and the far one's address."""

    near: list[str]
    far: list[str]
    address: str
    cut: Callable[[], object] | None = None  # pull the cable; None where there is none


@contextlib.contextmanager
def hosts(loopback: bool = False) -> Iterator[Hosts]:
    """Two network namespaces of a user namespace of our own, so no rights are needed; else this machine twice."""
    with contextlib.ExitStack() as stack:
        found = None if loopback else _namespaces(stack)
        yield found or Hosts([], [], "127.0.0.1")


def _namespaces(stack: contextlib.ExitStack) -> Hosts | None:
    hold = ["sh", "-c", "echo up && read -r word"]  # lives for as long as we do

    def holder(*command: str) -> int:
        pipe = subprocess.PIPE
        process = stack.enter_context(
            subprocess.Popen([*command, *hold], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        )
        stack.callback(process.kill)
        assert process.stdout
        if process.stdout.readline() != b"up\n":
            raise OSError("no namespace")
        return process.pid

    def inside(pid: int) -> list[str]:
        return ["nsenter", "-t", str(pid), "-U", "--preserve-credentials", "-n", "--"]

    def ip(pid: int, *arguments: str) -> None:
        subprocess.run([*inside(pid), "ip", *arguments], check=True, capture_output=True)

    try:
        near = holder("unshare", "-r", "-n")
        far = holder("nsenter", "-t", str(near), "-U", "--preserve-credentials", "unshare", "-n")
        ip(near, "link", "add", "cable0", "type", "veth", "peer", "name", "cable1", "netns", str(far))
        for pid, device, address in ((near, "cable0", "10.77.0.1"), (far, "cable1", "10.77.0.2")):
            ip(pid, "addr", "add", f"{address}/24", "dev", device)
            ip(pid, "link", "set", device, "up")
            ip(pid, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError):
        return None
    return Hosts(inside(near), inside(far), "10.77.0.2", lambda: ip(far, "link", "set", "cable1", "down"))


@contextlib.contextmanager
def rpc_server(on: Hosts, program: Path | None = None, *before: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """An rpc-server on the far host, the patched one unless told; its process and "host:port"."""
    from ptqtp_gguf.llamacpp import install

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [*on.far, str(program or install.tool("rpc-server")), *(before or ("-t", "1"))]
    command += ["-H", on.address, "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            end = time.monotonic() + 60
            while not _listens(process.pid, port):
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"{command} does not listen")
                time.sleep(0.05)
            yield process, f"{on.address}:{port}"
        finally:
            process.kill()


def _listens(pid: int, port: int) -> bool:
    """Whether somebody listens on the port in that process' network; a look that disturbs nobody."""
    try:
        table = Path(f"/proc/{pid}/net/tcp").read_text()
    except OSError:
        return False
    return re.search(rf" [0-9A-F]{{8}}:{port:04X} \S+ 0A ", table) is not None


def logits(on: Hosts, model: Path, server: str | None = None, layers: int = -1, rows: bool = False) -> np.ndarray:
    """Logits of the near host, float32 (tokens, vocabulary), in a process of its own.

    server  "host:port" that gets the last `layers` layers (-1: all)
    rows    weights row by row, as a server holds them, also here
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "logits.npy"
        what = json.dumps([str(model), server, layers, rows, str(out)])
        subprocess.run([*on.near, sys.executable, __file__, "--child", what], check=True)
        found: np.ndarray = np.load(out)
        return found


def _child(path: str, server: str | None, layers: int, rows: bool, out: str) -> None:
    import llama_cpp
    import llama_cpp.llama as module

    from ptqtp_gguf.llamacpp import model

    lib = module.llama_cpp
    defaults = lib.llama_model_default_params

    def without_panels() -> Any:
        params = defaults()
        params.use_extra_bufts = False
        return params

    if rows:
        lib.llama_model_default_params = without_panels
    if server:
        model.use_servers([server])
    loaded = llama_cpp.Llama(
        path,
        n_ctx=256,
        logits_all=True,
        verbose=False,
        n_threads=1,
        n_threads_batch=1,
        n_gpu_layers=layers if server else 0,
    )
    together, alone = FEED
    tokens = loaded.tokenize(TEXT.encode())[: together + alone]
    loaded.eval(tokens[:together])
    for token in tokens[together:]:
        loaded.eval([token])
    np.save(out, loaded.scores[: len(tokens)])


def command(on: Hosts, *arguments: object) -> list[str]:
    return [*on.near, str(Path(sys.executable).with_name("ptqtp-gguf")), *map(str, arguments)]


def run_and(on: Hosts, model: Path, server: str, then: Callable[[], object], limit: float = SECONDS) -> dict[str, Any]:
    """`run` on the server; does something when text comes. How it ends: {"exit", "seconds", "error"}."""
    arguments = command(on, "run", model, "-p", "once upon a time", "-n", 1900, "--ctx", 2048, "-j", 1, "--rpc", server)
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.read(len("once upon a time") + 20)
        start = time.monotonic()
        then()
        return _ending(process, start, limit)


def serve_and(on: Hosts, model: Path, server: str, then: Callable[[], object]) -> dict[str, Any]:
    """The same with `serve`, while nobody asks it anything: the server's death shows at the next request."""
    arguments = command(on, "serve", model, "--port", 0, "--ctx", 256, "-j", 1, "--rpc", server, "--json")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        ready = next((e for e in map(json.loads, process.stdout) if e["event"] == "ready"), None)
        if ready is None:
            return _ending(process, time.monotonic(), SECONDS)
        start = time.monotonic()
        then()
        ask = (
            "import sys, urllib.request as u\n"
            'data = b\'{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 50}\'\n'
            "u.urlopen(sys.argv[1] + '/v1/chat/completions', data, timeout=60)"
        )
        subprocess.run([*on.near, sys.executable, "-c", ask, ready["url"]], stderr=subprocess.DEVNULL)
        return _ending(process, start, SECONDS)


def _ending(process: subprocess.Popen[Any], start: float, limit: float) -> dict[str, Any]:
    try:
        _, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        return {"exit": None, "seconds": None, "error": "it hangs"}
    text = err if isinstance(err, str) else err.decode(errors="replace")
    return {"exit": process.returncode, "seconds": round(time.monotonic() - start, 2), "error": text.strip()}


def as_it_must(ending: dict[str, Any], message: str = "the RPC server died") -> bool:
    """Exit code 1 and one line that says it."""
    error = str(ending["error"])
    return ending["exit"] == 1 and error.startswith("Error: ") and "\n" not in error and message in error


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        _child(*json.loads(sys.argv[2]))
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--loopback", action="store_true")
    parser.add_argument("--vanish", action="store_true")
    parser.add_argument("--stock", type=Path, metavar="FOLDER")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    os.environ["GGML_NO_BACKTRACE"] = "1"
    model = arguments.model.resolve()
    wrong: list[str] = []
    found: dict[str, Any] = {"model": model.name}
    with hosts(arguments.loopback) as on:
        found["hosts"] = "two network namespaces" if on.cut else "loopback"
        with rpc_server(on) as (_, server):
            rows, panels = logits(on, model, rows=True), logits(on, model)
            for name, layers in (("all layers", -1), ("the last 2", 2)):
                there = logits(on, model, server, layers, rows=True)
                found[f"logits, {name} there"] = {
                    "largest difference to rows here": float(np.abs(there - rows).max()),
                    "rms difference to panels here": float(np.sqrt(((there - panels) ** 2).mean())),
                    "rms of the logits": float(panels.std()),
                    "tokens": len(rows),
                    "same top as panels": float((there.argmax(1) == panels.argmax(1)).mean()),
                }
                if not np.array_equal(there, rows):
                    wrong.append(f"{name} there: logits differ from those of rows here")
        for name, act in (("run", run_and), ("serve", serve_and)):
            with rpc_server(on) as (process, server):
                ending = act(on, model, server, process.kill)
            found[f"{name}, server killed"] = ending
            if not as_it_must(ending):
                wrong.append(f"{name} after the server's death: {ending}")
        if arguments.vanish and on.cut:
            with rpc_server(on) as (_, server):
                ending = run_and(on, model, server, on.cut, limit=60)
            found["run, cable pulled"] = ending
            if not as_it_must(ending):
                wrong.append(f"run after the cable was pulled: {ending}")
    if arguments.stock:
        with hosts(arguments.loopback) as on:
            with rpc_server(on, arguments.stock / "ggml-rpc-server") as (_, server):
                done = subprocess.run(
                    command(on, "run", model, "-p", "x", "--rpc", server), capture_output=True, text=True
                )
                ending = {"exit": done.returncode, "error": done.stderr.strip()}
            found["stock server"] = ending
            if not as_it_must(ending, "is a stock llama.cpp's"):
                wrong.append(f"a stock server: {ending}")
            with rpc_server(on) as (process, server):
                client = [*on.near, str(arguments.stock / "llama-bench"), "--rpc", server, "-m", str(model)]
                done = subprocess.run(client, capture_output=True, text=True, timeout=60)
                said = [x for x in (done.stdout + done.stderr).splitlines() if re.search("mismatch|handshake", x)]
                found["stock client"] = {"exit": done.returncode, "says": [x.rpartition("/")[2] for x in said]}
                if done.returncode == 0 or not said or process.poll() is not None:
                    wrong.append(f"a stock client: {found['stock client']}")
    found["wrong"] = wrong
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
