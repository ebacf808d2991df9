"""What gets in, and what gets out: hashes of all that is installed, no network unless asked, no secrets told."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import REPO

from ptqtp_gguf.llamacpp import install

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LOCKS = sorted((REPO / "requirements").glob("*.lock"))
TOKEN = "hf_SecretSecretSecretSecretSecretSec"


def pins(lock: str) -> dict[str, set[str]]:
    """Versions by normalized name."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==([\w.+!-]+)", lock, re.MULTILINE):
        found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), set()).add(version)
    return found


# ---- what make installs ----


@pytest.mark.parametrize("lock", LOCKS, ids=lambda p: p.name)
def test_every_pin_has_hashes_and_no_index(lock: Path) -> None:
    text = lock.read_text()
    assert "://" not in text and not re.search(r"^\s*(-i|-f|--(extra-)?index|--find-links)", text, re.MULTILINE)
    entries = re.sub(r"\s*\\\n\s*", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    assert entries
    for entry in entries:
        assert re.match(r"[\w.-]+==[^ ]+ ", entry) and re.search(r" --hash=sha256:[0-9a-f]{64}( |$)", entry), entry


def test_the_locks_hold_what_is_asked_for() -> None:
    setup = pins((REPO / "requirements" / "setup.lock").read_text())
    torch = pins((REPO / "requirements" / "torch.lock").read_text())
    for name, versions in pins((REPO / "requirements" / "setup.in").read_text()).items():
        assert versions <= setup[name], f"{name}: run make lock"
    assert "torch" not in setup and list(torch) == ["torch"]
    cpu = pins((REPO / "requirements" / "cpu.lock").read_text())
    assert cpu == {"torch": {f"{version}+cpu" for version in torch["torch"]}}
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for spec in [*project["dependencies"], *extras["hf"], *extras["report"], *extras["dev"]]:
        name = re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", spec)[0]).lower()  # type: ignore[index]
        assert name in setup or name in torch, f"{name}: add it to requirements/setup.in"


def test_make_installs_nothing_unchecked() -> None:
    """From an index only with hashes; without them only what was built here."""
    lines = (REPO / "Makefile").read_text().replace("\\\n", " ").splitlines()
    installs = [line for line in lines if "$(PIP) install" in line]
    assert any("--require-hashes" in line for line in installs)
    unhashed = [line for line in installs if "--require-hashes" not in line]
    assert all(line.split()[-1] == "." or "build/wheels/" in line for line in unhashed), unhashed


def test_a_lock_refuses_another_file(tmp_path: Path) -> None:
    """pip and a wheel of the right name and version with other bytes."""
    wheel = tmp_path / "iniconfig-2.3.1-py3-none-any.whl"
    wheel.write_bytes(b"PK\x05\x06" + bytes(18))
    line = re.search(r"^iniconfig==2\.3\.1 .*\n(    --hash.*\n)+", (REPO / "requirements/setup.lock").read_text(), re.M)
    assert line
    lock = tmp_path / "one.lock"
    lock.write_text(line[0])
    pip = [sys.executable, "-m", "pip", "--isolated", "download", "--no-deps", "--no-index", "--require-hashes"]
    done = subprocess.run(
        [*pip, "--find-links", str(tmp_path), "-d", str(tmp_path / "out"), "-r", str(lock)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0 and "DO NOT MATCH THE HASHES" in done.stderr


# ---- what it loads ----


@pytest.mark.runtime
@pytest.mark.skipif(not sys.platform.startswith("linux") or not shutil.which("cc"), reason="needs a C compiler, Linux")
def test_no_library_of_the_current_folder_is_loaded(tmp_path: Path) -> None:
    """Upstream's llama-bench loads libggml-blas.so from wherever it is started."""
    source = tmp_path / "it.c"
    source.write_text('#include <stdio.h>\n__attribute__((constructor)) static void f(void) { puts("LOADED"); }\n')
    for name in ("libggml-blas.so", "libggml-cpu-x.so", "libggml-cpu.so"):
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(tmp_path / name), str(source)], check=True)
    for command in (["llama-bench", "--list-devices"], ["llama-completion", "--list-devices"]):
        program = [str(install.tool(command[0])), *command[1:]]
        done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and "LOADED" not in done.stdout + done.stderr, command


# ---- the network, and secrets ----

# Whoever connects to more than this machine, or asks for a name, dies loudly. The converter's isolated process does not
# load it: the namespace is for that.
NO_NETWORK = """
import os, sys
def look(event, args):
    asked = event in ("socket.getaddrinfo", "socket.gethostbyname") and args[0]
    asked = asked or event == "socket.connect" and isinstance(args[1], tuple) and args[1][0]
    if asked and asked not in ("localhost", "127.0.0.1", "::1"):
        os.write(2, b"NETWORK " + repr((event, asked)).encode()); os._exit(99)
sys.addaudithook(look)
"""


def no_network(tmp_path: Path) -> tuple[list[str], dict[str, str]]:
    """A namespace without any network where we may make one, and in any case the hook."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(NO_NETWORK)
    unshare = ["unshare", "-rn"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        unshare = []
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}  # HF_HUB_OFFLINE would hide what we look for
    return unshare, env | {"PYTHONPATH": str(site), "HF_TOKEN": TOKEN, "COLUMNS": "200"}


def command(*args: object) -> list[str]:
    return [str(Path(sys.executable).with_name("ptqtp-gguf")), *map(str, args)]


def holds_token(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]


def test_the_hook_sees_the_network(tmp_path: Path) -> None:
    _, env = no_network(tmp_path)
    code = "import socket; socket.create_connection(('example.org', 443))"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 99 and "NETWORK" in done.stderr


@pytest.mark.hf
@pytest.mark.runtime
def test_local_models_need_no_network(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A checkpoint calibrated, converted, verified, run and measured; no word of the token is left."""
    prefix, env = no_network(tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    text, out = work / "text.txt", work / "out.gguf"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 400)
    env |= {"PTQTP_CACHE": str(work / "cache"), "HF_HOME": str(work / "hf")}
    calibrate = ["--calib", text, "--calib-tokens", "256", "--calib-window", "128"]
    for args in (
        ["convert", tiny_checkpoint, out, "--model-card", work / "README.md", *calibrate],
        ["run", out, "-p", "Once", "-n", "4"],
        ["eval", out, "--text", text, "--windows", "1", "--ctx", "64", "--no-generation", "--json"],
    ):
        done = subprocess.run(
            [*prefix, *command(*args)], env=env, cwd=work, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (args, done.stdout[-2000:], done.stderr[-2000:])
        assert TOKEN not in done.stdout + done.stderr
    assert (work / "README.md").is_file() and (work / "cache").is_dir() and not holds_token(work)


class Refusing(BaseHTTPRequestHandler):
    """A hub that answers org/STATUS with that status, and notes who came with which token."""

    tokens: set[str]

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.tokens.add(self.headers.get("Authorization", ""))
        status = re.search(r"/org/(\d+)", self.path)
        self.send_response(int(status[1]) if status else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET


@pytest.fixture
def refusing() -> Iterator[str]:
    Refusing.tokens = set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.hf
def test_no_error_tells_the_token(refusing: str, tiny_gguf: Path, tmp_path: Path) -> None:
    """A hub that refuses it in several ways, one that cannot be reached, a broken source; a conversion cut short."""
    _, env = no_network(tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    env |= {"PTQTP_CACHE": str(work / "cache"), "HF_HOME": str(work / "hf")}
    (work / "broken.gguf").write_bytes(tiny_gguf.read_bytes()[:300])
    nowhere = "http://127.0.0.1:9"
    for endpoint, args in (
        (refusing, ["convert", "org/401", "out.gguf"]),
        (refusing, ["convert", "org/403", "out.gguf", "--json"]),
        (nowhere, ["convert", "org/model", "out.gguf"]),
        (refusing, ["convert", "broken.gguf", "out.gguf"]),
        (refusing, ["convert", tiny_gguf, "no-folder/out.gguf"]),
    ):
        done = subprocess.run(
            command(*args), env=env | {"HF_ENDPOINT": endpoint}, cwd=work, capture_output=True, text=True, check=False
        )
        told = done.stdout + done.stderr
        assert done.returncode == 1 and TOKEN not in told and "Traceback" not in told, (args, told)
    assert f"Bearer {TOKEN}" in Refusing.tokens  # it was in use
    assert not holds_token(work)


@pytest.mark.runtime
@pytest.mark.skipif(not Path("/proc/net/tcp").is_file(), reason="needs Linux' /proc")
def test_the_server_listens_on_loopback_only(demo_files: dict[str, Path]) -> None:
    with subprocess.Popen(
        command("serve", demo_files["ours"], "--port", "0", "--ctx", "64", "--json"), stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout
            events = map(json.loads, process.stdout)
            ready = next(e for e in events if e.get("event") == "ready" or "url" in e)
            assert ready["host"] == "127.0.0.1" and ready["url"].startswith("http://127.0.0.1:")
            listening = []
            for table in ("/proc/net/tcp", "/proc/net/tcp6"):
                rows = (
                    [line.split() for line in Path(table).read_text().splitlines()[1:]] if Path(table).is_file() else []
                )
                listening += [
                    row[1] for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == ready["port"]
                ]
            assert listening == [f"0100007F:{ready['port']:04X}"]
            with pytest.raises(OSError):  # the same port of another address of this machine
                socket.create_connection(("127.0.0.2", ready["port"]), timeout=2)
        finally:
            process.terminate()
