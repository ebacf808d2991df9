"""A file behind an OpenAI-compatible HTTP server: llama.cpp's llama-server as a child that does not outlive us."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import os
import re
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, BinaryIO

from ..errors import InputError, OutputError, ServerError
from ..files import read_whole, write_all
from ..llamacpp import Adapter, check, context_for, endpoints, install, lost
from ..progress import Progress, no_progress
from .options import arguments, prefix

STOP_SECONDS = 5.0  # for a server to end by itself; it has nothing to save
MAX_KEYS = 1 << 20  # bytes of a file of API keys
ALL_LAYERS = 9999
# A connection holds a thread of llama-server until its request is there, by default for an hour. Its pool of threads
# grows, but not in time where many connections come at once, and then nobody is answered.
HTTP_THREADS = 64  # and one for each request that is answered
HTTP_SECONDS = 60  # without a byte of a request, or with a client that takes none of its answer
PROMPT_CACHE = 1024  # MiB; llama-server's own default of 8 GiB is more than many machines have
# Errors in its log ("0.00.083 E srv  init: text") and of its command line ("error: text"), and what stands before them.
ERROR = re.compile(r"[\d.]+ E |error\b")
PLACE = re.compile(r"^(?:[\d.]+ [A-Z] (?:(?:\w+ +)?(?:\w+: )+)?)?(?:error: )?")
# Ends the server when our end of the pipe closes without a word, however we died; needs a shell, so not on Windows.
# The server tells its number itself, before it becomes llama-server: so there is no moment at which nobody knows it.
GUARD = 'read -r pid && { read -r word || kill -KILL "$pid"; }'
GUARDED = 'echo $$ >&0 && exec "$@" < /dev/null'


class Server:
    """Serves a GGUF file. Use as a context manager, or start() and stop().

        with Server(Path("model.gguf")) as server:
            client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")

    host          address to listen on; anything but a loopback address needs expose=True
    port          0 = any free one; then see .port
    ctx           tokens of context a request may use, prompt and answer; 0 = as trained, at most 4096
    threads       0 = llama.cpp's default
    parallel      requests answered at the same time, each with a context of its own
    api_key_file  a key a line, one of which a client must then send; the environment's LLAMA_API_KEY does the same
    alias         the model's name for clients, else the file's without .gguf
    log           file to append the server's log to
    rpc           "host:port" of rpc-servers that hold and compute layers, shared out by their memory
    rpc_layers    how many layers, the last ones, they get; the output counts as one; -1 = all
    embeddings    answer /v1/embeddings; pooling, how a text becomes one vector: "none", "mean", "cls", "last", "rank",
                  None = as the file says, else "mean"
    reranking     answer /v1/rerank, with a model made for it
    lora          (file, scale) of LoRA adapters, GGUF files; 1.0 = as it was trained
    draft         a small GGUF file with the same tokens that guesses ahead; answers stay those of the model
    chat_template_file  a chat template instead of the file's own
    slots         answer /slots, which tells what is being answered
    grammar, json_schema  a file that says what every answer must look like (GBNF; JSON schema), unless a request does
    options       further options of llama-server, passed on as they are

    The files named here are all that it reads, the network is not asked for anything, web pages of other origins than
    localhost may not use it, and LLAMA_ARG_* of the environment do not count. Where there is a POSIX shell the server
    ends even if this process is killed; on Windows only stop() ends it.
    """

    def __init__(
        self,
        path: Path,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        ctx: int = 0,
        threads: int = 0,
        parallel: int = 1,
        expose: bool = False,
        api_key_file: Path | None = None,
        alias: str | None = None,
        log: Path | None = None,
        rpc: Sequence[str] = (),
        rpc_layers: int = -1,
        embeddings: bool = False,
        pooling: str | None = None,
        reranking: bool = False,
        lora: Sequence[Adapter] = (),
        draft: Path | None = None,
        chat_template_file: Path | None = None,
        slots: bool = False,
        grammar: Path | None = None,
        json_schema: Path | None = None,
        options: Sequence[str] = (),
    ) -> None:
        self.path, self.host, self.port = path, host, port
        self.threads, self.parallel, self.api_key_file, self.log = threads, parallel, api_key_file, log
        self.rpc, self.rpc_layers = endpoints(rpc), rpc_layers
        self.name = alias or path.name.removesuffix(".gguf")
        if not (is_loopback(host) or expose):
            raise ServerError(
                f"--host {host} would let other machines use the server; if that is meant, give --expose and an "
                "--api-key-file, else leave the host at 127.0.0.1"
            )
        self.ctx = context_for(path, ctx)
        self.embeddings, self.reranking, self._prefix = embeddings, reranking, prefix(options)
        self._more = arguments(
            path,
            self.ctx,
            embeddings=embeddings,
            pooling=pooling,
            reranking=reranking,
            lora=lora,
            draft=draft,
            chat_template_file=chat_template_file,
            slots=slots,
            grammar=grammar,
            json_schema=json_schema,
            options=options,
        )
        self.has_key = bool(_keys(api_key_file) or os.environ.get("LLAMA_API_KEY"))
        self.process: subprocess.Popen[bytes] | None = None
        self.log_fault = ""  # why the log has ended
        self._guard: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._lines: deque[str] = deque(maxlen=40)
        self._ready = False

    @property
    def url(self) -> str:
        """Where this machine reaches it; clients of OpenAI's API want "/v1" behind it."""
        host = f"[{self._reached}]" if ":" in self._reached else self._reached
        return f"http://{host}:{self.port}{self._prefix}"

    @property
    def _reached(self) -> str:
        """The address under which this machine reaches it."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)

    @property
    def pid(self) -> int | None:
        """Of llama-server, while it runs."""
        return self.process.pid if self.process else None

    def start(self, progress: Progress = no_progress, timeout: float = 600.0) -> None:
        """Start the server and wait until it has loaded the model; timeout in seconds.

        Raises ServerError if the port cannot be had or the server dies, RuntimeMissing without the patched runtime.
        """
        program = install.tool("llama-server")
        self.port = free_port(self.host, self.port)
        for endpoint in self.rpc:
            check(endpoint)
        layers = self.rpc_layers if self.rpc_layers >= 0 else ALL_LAYERS
        command = [
            str(program),
            "--model",
            str(self.path),
            "--host",
            self.host,
            "--port",
            str(self.port),
            "--alias",
            self.name,
            "--ctx-size",
            str(self.ctx * self.parallel),
            "--parallel",
            str(self.parallel),
            "--cache-ram",
            str(PROMPT_CACHE),
            "--cors-origins",
            "localhost",
            "--offline",
            "--no-ui",
            "--threads-http",
            str(HTTP_THREADS + self.parallel),
            "--timeout",
            str(HTTP_SECONDS),
            *(["--threads", str(self.threads)] if self.threads else []),
            *(["--rpc", ",".join(self.rpc), "--n-gpu-layers", str(layers)] if self.rpc else []),
            *(["--api-key-file", str(self.api_key_file)] if self.api_key_file else []),
            *self._more,  # last, as the last of two counts
        ]
        # what the caller said is what runs; a key that is set but empty would let everybody in who sends none
        env = {
            k: v for k, v in os.environ.items() if not k.startswith("LLAMA_ARG_") and (k, v) != ("LLAMA_API_KEY", "")
        }
        # glibc keeps for each of many threads what the largest request needed there: half the memory under load
        env.setdefault("MALLOC_ARENA_MAX", "2")
        env.setdefault("GGML_NO_BACKTRACE", "1")  # where it gives up it would start gdb, which may hang
        log = self._open_log()
        try:
            self._guard = _guard()
            pipe: IO[bytes] | int = subprocess.DEVNULL
            if self._guard is not None and self._guard.stdin is not None:
                pipe, command = self._guard.stdin, ["/bin/sh", "-c", GUARDED, "sh", *command]
            # a session of its own: Ctrl-C in the terminal is for us, and we end it in order
            self.process = subprocess.Popen(
                command, stdin=pipe, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )
        except BaseException as e:
            self._end_guard()
            if log:
                log.close()
            if not isinstance(e, OSError):
                raise
            raise ServerError(f"{program}: cannot be started: {e.strerror}; build the runtime again") from None
        try:
            self._reader = threading.Thread(target=self._read, args=(self.process.stdout, log), daemon=True)
            self._reader.start()
            self._until_ready(progress, timeout)
        except BaseException:
            self.stop()
            raise

    def wait(self) -> None:
        """Wait for as long as it serves. Raises ServerError when it has died."""
        assert self.process is not None
        self.process.wait()
        raise self._died()

    def stop(self) -> None:
        """End it, and what belongs to it. Does nothing if it does not run."""
        if (process := self.process) is None:
            return
        self.process = None
        try:
            process.terminate()
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:  # also when a second Ctrl-C comes while it waits
            process.kill()
            process.wait()
            self._end_guard()
            if self._reader is not None:
                self._reader.join()

    def __enter__(self) -> Server:
        if self.process is None:
            self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _end_guard(self) -> None:
        guard, self._guard = self._guard, None
        if guard is not None and guard.stdin is not None:
            with contextlib.suppress(OSError):
                guard.stdin.write(b"done\n")
            guard.stdin.close()
            guard.wait()

    def _open_log(self) -> BinaryIO | None:
        try:
            return open(self.log, "ab", buffering=0) if self.log else None
        except OSError as e:
            raise OutputError(f"{self.log}: cannot write the log: {e.strerror}") from None

    def _read(self, pipe: BinaryIO, log: BinaryIO | None) -> None:
        with pipe, log or contextlib.nullcontext():
            for raw in pipe:
                if b"api_keys:" in raw:  # the end of a key
                    continue
                if log:
                    try:
                        write_all(log, raw)
                    except OSError as e:  # a full disk ends the log, not the server
                        self.log_fault = f"{self.log}: {e.strerror}; the log ends here"
                        log.close()
                        log = None
                if text := raw.decode(errors="replace").strip():
                    self._lines.append(text)

    def _until_ready(self, progress: Progress, timeout: float) -> None:
        assert self.process is not None
        end = time.monotonic() + timeout
        while not (self._healthy() and self.process.poll() is None):
            if self.process.poll() is not None:
                raise self._died()
            if time.monotonic() > end:
                raise ServerError(f"{self.path}: the server was not ready within {timeout:.0f} s; {self._last()}")
            progress("loading", 0, 0, self.path.name)
            time.sleep(0.05)
        self._ready = True

    def _healthy(self) -> bool:
        connection = http.client.HTTPConnection(self._reached, self.port, timeout=5)
        try:
            connection.request("GET", f"{self._prefix}/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _died(self) -> ServerError:
        assert self.process is not None
        if self._reader is not None:
            self._reader.join(5)
        if any("/ggml-rpc.cpp:" in x for x in self._lines):  # where llama.cpp gives up
            return ServerError(f"{self.path}: {lost(self.rpc)}")
        code = self.process.returncode
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        if any("chat template parsing error" in x for x in self._lines):
            why = f"cannot read the chat template: {self._first()}; give another with --chat-template-file FILE"
            return ServerError(f"{self.path}: llama-server {why}")
        return ServerError(f"{self.path}: llama-server {how}: {self._last() if self._ready else self._first()}")

    def _first(self) -> str:
        """The first complaint of the log, to which those after it are due."""
        lines = list(self._lines)
        at = next((i for i, x in enumerate(lines) if ERROR.match(x)), -1)
        if at < 0:
            return self._last()
        more = next((x for x in lines[at + 1 :] if x.startswith("Error: ")), "") if lines[at].endswith(":") else ""
        return f"{PLACE.sub('', lines[at])} {more}".strip()

    def _last(self) -> str:
        """The line of the log that tells most of what has just happened."""
        lines = list(self._lines)
        errors = [x for x in lines if ERROR.match(x)]
        return PLACE.sub("", (errors or lines or ["it has printed nothing"])[-1])


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there. Names but localhost count as not."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def free_port(host: str, port: int) -> int:
    """The port, or a free one for 0, tried before a model is loaded. Raises ServerError if it cannot be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as s:
            if os.name != "nt":  # there it would share the port
                s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind(address)
            return int(s.getsockname()[1])
    except socket.gaierror:
        raise ServerError(f"--host {host}: no such address; give an address of this machine") from None
    except OSError as e:
        reason = (e.strerror or str(e)).lower()
        raise ServerError(f"{host} port {port}: {reason}; give another --port, or 0 for any free one") from None


def _keys(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        lines = read_whole(path, MAX_KEYS).decode().splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path}: cannot read API keys: not text") from None
    keys = [line for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise InputError(f"{path}: holds no API key; write one a line")
    return keys


def _guard() -> subprocess.Popen[bytes] | None:
    if os.name == "nt":
        return None
    command = ["/bin/sh", "-c", GUARD]
    nowhere = subprocess.DEVNULL
    try:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=nowhere, stderr=nowhere, bufsize=0, start_new_session=True
        )
    except FileNotFoundError:  # no shell, no guard
        return None
