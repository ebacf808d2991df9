"""Models by id, from a local server that speaks what huggingface_hub asks of the Hub."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import safetensors_bytes

from ptqtp_gguf.errors import CheckpointError
from ptqtp_gguf.source.checkpoint import check
from ptqtp_gguf.source.hub import looks_like_id

pytest.importorskip("huggingface_hub")

SHA = "1234567890abcdef1234567890abcdef12345678"
CONFIG = b'{"architectures": ["LlamaForCausalLM"]}'


def weights(n: int) -> bytes:
    return safetensors_bytes({"a": {"dtype": "U8", "shape": [n], "data_offsets": [0, n]}}, bytes(range(7)) * (n // 7))


WEIGHTS, LARGE = weights(700_000), weights(28_000_000)  # huggingface_hub writes pieces of 10 MiB
GOOD = {
    "config.json": CONFIG,
    "tokenizer.json": b"{}",
    "README.md": b"# tiny",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"left out",
    "consolidated.safetensors": b"left out",
    "original/params.json": b"left out",
    "modeling.py": b"left out",
    "picture.png": b"left out",
}
REPOS: dict[str, dict[str, bytes]] = {
    "org/good": GOOD,
    "org/cut": GOOD | {"model.safetensors": LARGE},
    "org/old": {"config.json": CONFIG, "pytorch_model.bin": b"PK", "optimizer.bin": b"left out"},
    "org/adapter": {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": b"left out"},
    "org/gated": GOOD,
    "org/forbidden": GOOD,
    "org/broken": GOOD,
}


class Hub(BaseHTTPRequestHandler):
    """A tree, and files by HEAD and by GET with ranges. org/cut breaks off once in each file's middle."""

    seen: list[tuple[str, str, str | None]]
    cut: set[str]

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.seen.append((self.command, self.path, self.headers.get("Range")))
        parts = self.path.split("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repo, rest = "/".join(parts[2:4] if api else parts[:2]), parts[4:] if api else parts[2:]
        if repo not in REPOS:
            return self.answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        if repo == "org/gated":
            return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        if repo == "org/forbidden":
            return self.answer(403)
        if rest[0] in ("revision", "tree", "resolve") and rest[1] not in ("main", SHA):
            return self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev")
        files = REPOS[repo]
        if api and rest[0] == "tree":
            tree = [
                {"type": "file", "path": p, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                for p, d in files.items()
            ]
            return self.answer(200, json.dumps(tree).encode())
        if api:
            return self.answer(200, json.dumps({"id": repo, "modelId": repo, "sha": SHA, "siblings": []}).encode())
        name = "/".join(rest[2:])
        data = files[name]
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X_Repo_Commit": SHA, "Accept_Ranges": "bytes"}
        if repo == "org/broken" and name == "model.safetensors" and self.command == "GET":
            return self.answer(404, X_Error_Code="EntryNotFound")
        if given := self.headers.get("Range"):
            start = int(given.removeprefix("bytes=").split("-")[0])
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return self.answer(206, data[start:], **headers)
        if repo == "org/cut" and self.command == "GET" and name not in self.cut and len(data) > 1000:
            self.cut.add(name)
            self.answer(200, data[:0], **headers, Content_Length=str(len(data)))
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return None
        return self.answer(200, data, **headers)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    Hub.seen, Hub.cut = [], set()
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()
    thread.join()


FETCH = """
import sys
from ptqtp_gguf.errors import InputError
from ptqtp_gguf.source.hub import fetch
for arg in sys.argv[1:]:
    repo, _, revision = arg.partition("@")
    try:
        print("GOT", fetch(repo, revision or None))
    except InputError as e:
        print("ERR", repr(str(e))[1:-1])
"""


def run(home: Path, endpoint: str, *repos: str, prefix: tuple[str, ...] = (), **env: str) -> list[str]:
    """fetch() of each repo in a process of its own, for huggingface_hub reads its settings once."""
    clean = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("HF_")}
    done = subprocess.run(
        [*prefix, sys.executable, "-I", "-c", FETCH, *repos],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**clean, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **env},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(("GOT", "ERR"))]
    assert done.returncode == 0 and len(lines) == len(repos), done.stdout + done.stderr
    return lines


def test_fetch(server: str, tmp_path: Path) -> None:
    repos = [
        "org/good",
        "org/good@main",
        "org/cut",
        "org/old",
        "org/adapter",
        "org/gated",
        "org/forbidden",
        "org/absent",
        "org/good@nope",
        "org/broken",
    ]
    out = dict(zip(repos, run(tmp_path, server, *repos), strict=True))
    folder = Path(out["org/good"].removeprefix("GOT "))
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS and check(folder).nbytes == 700_000
    assert out["org/good@main"] == out["org/good"]
    adapter = Path(out["org/adapter"].removeprefix("GOT "))
    assert [p.name for p in adapter.iterdir()] == ["adapter_config.json"]
    with pytest.raises(CheckpointError, match=r"a LoRA adapter, no model; merge it first"):
        check(adapter)
    assert sum(1 for m, p, _ in Hub.seen if m == "GET" and p.startswith("/org/good/") and "model" in p) == 1
    # a download that broke off goes on where it stopped
    cut = Path(out["org/cut"].removeprefix("GOT "))
    assert (cut / "model.safetensors").read_bytes() == LARGE
    ranges = [r for m, p, r in Hub.seen if m == "GET" and p.startswith("/org/cut/") and "model" in p]
    assert ranges[0] is None and ranges[1] and int(ranges[1].removeprefix("bytes=").rstrip("-")) > 0
    old = Path(out["org/old"].removeprefix("GOT "))
    assert sorted(p.name for p in old.iterdir()) == ["config.json", "pytorch_model.bin"]
    for repo, words in {
        "org/gated": f"ERR org/gated: access is gated; accept its terms at {server}/org/gated, then set HF_TOKEN",
        "org/forbidden": f"ERR org/forbidden: {server} refuses access (403); set HF_TOKEN",
        "org/absent": f"ERR org/absent: no such model on {server}, or a private one, and no local folder",
        "org/good@nope": f"ERR org/good: no revision nope on {server}",
        "org/broken": f"ERR org/broken: {server} answers with the status 404",
    }.items():
        assert out[repo].startswith("ERR") and words in out[repo] and "\\n" not in out[repo], out[repo]


def test_offline_and_unreachable(server: str, tmp_path: Path) -> None:
    (got,) = run(tmp_path, server, "org/good")
    offline = run(tmp_path, server, "org/good", "org/cut", "no id/at all", HF_HUB_OFFLINE="1")
    assert offline[0] == got
    assert offline[1] == (
        "ERR org/cut: not, or not wholly, in the cache, and HF_HUB_OFFLINE is set; unset it, or give a local folder"
    )
    assert "'no id/at all' is not a model id of the form org/name, nor a local folder" in offline[2].replace("\\'", "'")
    nowhere = "http://127.0.0.1:9"
    unreachable = run(tmp_path, nowhere, "org/good", "org/cut")
    assert unreachable[0] == got
    assert unreachable[1].startswith(f"ERR org/cut: {nowhere} cannot be reached") and "local folder" in unreachable[1]


def test_disk_full(server: str, tmp_path: Path) -> None:
    """In a file system of half a megabyte, where the system lets us make one."""
    mount = ("unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=512k none "$0" && exec "$@"', str(tmp_path))
    if not shutil.which("unshare") or subprocess.run([*mount, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no user namespaces here")
    (line,) = run(tmp_path, server, "org/good", prefix=mount)
    assert line.startswith("ERR org/good: the disk is full at ") and "HF_HOME" in line


def test_what_looks_like_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "model").mkdir()
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "x").symlink_to("x")
    for text in ("HuggingFaceTB/SmolLM2-135M", "a/b", "org_1/n.a-m_e", "here/other"):
        assert looks_like_id(text), text
    for text in ("here/model", "loop/x", "./a/b", "/a/b", "a", "a/b/c", "../b", "a/..", "a/b\n", "a b/c", "a/", "ü/b"):
        assert not looks_like_id(text), text
    assert not looks_like_id("a/" + "b" * 100)
