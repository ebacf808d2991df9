#!/usr/bin/env python3
"""Put `ptqtp-gguf serve` under load and look for crashes, growth of memory, hangs and answers that differ.

    soak.py MODEL.gguf [--clients 32] [--minutes 10] [--parallel 1] [--seed 1] [--json FILE]

First takes the answers of the idle server to a fixed set of questions, at temperature 0. Then clients in a loop do what
clients do: read streams and whole answers, vanish midway, read slowly, open connections and say nothing, send prompts
that are too long, broken JSON, wrong types, bytes that are no HTTP. Each full answer is compared with the idle one.
Meanwhile memory, threads and open files of llama-server are read every second; what they grew by in the second half is
fitted. At the end the server must answer as at the beginning, end by SIGTERM with exit code 0, and leave nothing.

Exits 1 unless all of that held. With --parallel above 1 answers are computed together with others', and llama.cpp sums
floats in another order then: differing answers are counted and not an error (docs/serving.md).
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "Write a short story about a river.",
    "Why is the sky blue?",
    "List the planets.",
    "How do I boil an egg?",
    "Explain gravity to a child.",
    "Who wrote Hamlet?",
    "Translate 'good morning' to German.",
    "What is 12 times 12?",
    "Give me a haiku on snow.",
    "Describe a cat in one sentence.",
]
TOKENS = 24  # of an answer
PATH = "/v1/chat/completions"
TIMEOUT = 120.0  # seconds without a byte are a hang; queues of 32 clients are shorter
MiB = 1 << 20
GROWTH = 0.02  # of the memory, in the second half: allocators keep a little, a leak of a request adds up
SMALL = 3000  # words of a prompt
READING = 64  # bytes of memory while a byte of a large prompt is read; glibc keeps what one needs, now or later
LONG = 2  # minutes: in a shorter run buffers and caches still grow to what the load needs
GONE = "llama-server is gone"
Act = Callable[["Client"], str]


def body(question: str, **more: object) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"messages": messages, "temperature": 0, "max_tokens": TOKENS, "cache_prompt": False, **more}


def connect(port: int, receive: int = 0) -> socket.socket:
    """receive: bytes of the receive buffer, if not the usual"""
    s = socket.socket()
    try:
        if receive:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
        s.settimeout(TIMEOUT)
        s.connect(("127.0.0.1", port))
    except OSError:
        s.close()
        raise
    return s


def post(port: int, data: bytes, path: str = PATH, method: str = "POST") -> tuple[int, bytes]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)) as c:
        c.request(method, path, data, {"Content-Type": "application/json"})
        reply = c.getresponse()
        return reply.status, reply.read()


def whole(port: int, question: str) -> str:
    status, data = post(port, json.dumps(body(question)).encode())
    if status != 200:
        raise Wrong(f"status {status} for a good request: {data[:200]!r}")
    return str(json.loads(data)["choices"][0]["message"]["content"])


class Wrong(Exception):
    """The server did what it must not."""


@dataclass
class Client:
    port: int
    rng: random.Random
    idle: dict[str, str]
    large: int = 200_000  # words of the longest prompt, brackets of the deepest JSON
    differing: list[tuple[str, str]] = field(default_factory=list)

    def question(self) -> str:
        return self.rng.choice(QUESTIONS)

    def check(self, question: str, answer: str) -> str:
        if answer == self.idle[question]:
            return "equal"
        self.differing.append((question, answer))
        return "other text"

    def stream(self, question: str, pause: float = 0.0, pieces: int | None = None, **more: object) -> Iterator[str]:
        """Text of a streamed answer as it comes. After so many pieces the connection is cut, half of the times with
        a reset."""
        data = json.dumps(body(question, stream=True, **more)).encode()
        with closing(connect(self.port, 2048 if pause else 0)) as s:
            s.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (PATH.encode(), len(data)) + data)
            reply = http.client.HTTPResponse(s)
            reply.begin()
            if reply.status != 200:
                raise Wrong(f"status {reply.status} for a good stream: {reply.read(200)!r}")
            n = 0
            for line in reply:
                if line.strip() == b"data: [DONE]":
                    return
                if not line.startswith(b"data: "):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise Wrong(f"error in a good stream: {event['error']}")
                for choice in event["choices"]:
                    yield choice["delta"].get("content") or ""
                n += 1
                if pieces is not None and n >= pieces:
                    if self.rng.random() < 0.5:
                        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return
                time.sleep(pause)
            raise Wrong("a stream ended without its end mark")


# ---- what clients do: each returns how it went, and raises Wrong, or OSError where the server failed it ----


def reads_a_stream(c: Client) -> str:
    q = c.question()
    return c.check(q, "".join(c.stream(q)))


def reads_a_whole_answer(c: Client) -> str:
    q = c.question()
    return c.check(q, whole(c.port, q))


def reads_slowly(c: Client) -> str:
    q = c.question()
    return c.check(q, "".join(c.stream(q, pause=0.1)))


def vanishes(c: Client) -> str:
    list(c.stream(c.question(), pieces=c.rng.randrange(1, TOKENS), max_tokens=10 * TOKENS))
    return "gone"


def vanishes_in_the_queue(c: Client) -> str:
    data = json.dumps(body(c.question(), stream=c.rng.random() < 0.5)).encode()
    with closing(connect(c.port)) as s:
        s.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (PATH.encode(), len(data)) + data)
        time.sleep(c.rng.random() * 0.2)
    return "gone"


def wants_a_million_tokens(c: Client) -> str:
    """An answer ends with the context at the latest; it begins like the usual one."""
    q = c.question()
    text = "".join(c.stream(q, max_tokens=1_000_000))
    return c.check(q, text[: len(c.idle[q])])


def refused(c: Client, data: bytes, path: str = PATH, method: str = "POST", codes: range = range(400, 501)) -> str:
    status, text = post(c.port, data, path, method)
    if status not in codes:
        raise Wrong(f"status {status} for {data[:80]!r}: {text[:200]!r}")
    return str(status)


def sends_too_long_a_prompt(c: Client) -> str:
    return refused(c, json.dumps(body("word " * c.rng.choice([SMALL, c.large]))).encode(), codes=range(400, 401))


def sends_broken_json(c: Client) -> str:
    good = json.dumps(body(c.question())).encode()
    return refused(
        c,
        c.rng.choice(
            [
                b"",
                b"{",
                b"null",
                b"[]",
                b"\xff\xfe\x00",
                good[: c.rng.randrange(1, len(good))],
                b"[" * c.large,
                b'{"messages": ' + b"[" * c.large,
                good[:-1] + b',"x":1e999999',
                b'{"messages":[{"role":"user","content":"\\ud8"}]}',
            ]
        ),
    )


def sends_wrong_types(c: Client) -> str:
    wrong: list[dict[str, object]] = [
        {"messages": "hello"},
        {"messages": [1]},
        {"messages": [{"role": 3, "content": "x"}]},
        {"messages": {}},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"max_tokens": "many"},
        {"messages": [{"role": "user", "content": {"a": {}}}]},
        {"stop": {"a": 1}},
        {"temperature": "hot"},
        {"tools": 7},
        {"grammar": "root ::= ("},
        {"response_format": {"type": "json_schema", "json_schema": 5}},
        {"logit_bias": {"x": "y"}, "stream": "perhaps"},
        {"seed": {}},
        {"n_predict": []},
    ]
    return refused(c, json.dumps({**body("x"), **c.rng.choice(wrong)}).encode(), codes=range(200, 501))


def asks_for_what_is_not_there(c: Client) -> str:
    return refused(c, b"{}", *c.rng.choice([("/v2/none", "GET"), ("/%00/../../etc/passwd", "GET"), (PATH, "PUT")]))


def says_nothing(c: Client) -> str:
    """Half a request, or none, and the connection stays for a while."""
    start = c.rng.choice(
        [
            b"",
            b"POST",
            b"POST %s HTTP/1.1\r\nHost:" % PATH.encode(),
            b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\n{" % PATH.encode(),
        ]
    )
    with closing(connect(c.port)) as s:
        s.sendall(start)
        time.sleep(c.rng.random() * 2)
    return "gone"


def speaks_no_http(c: Client) -> str:
    with closing(connect(c.port)) as s:
        try:
            s.sendall(
                c.rng.choice([c.rng.randbytes(5000), b"\x16\x03\x01" + c.rng.randbytes(200), b"\r\n" * 4000])
                + b"\r\n\r\n"
            )
            s.shutdown(socket.SHUT_WR)
            while s.recv(65536):
                pass
        except (BrokenPipeError, ConnectionResetError):
            return "reset"
    return "closed"


ACTS: dict[Act, int] = {  # how often, of 100
    reads_a_stream: 34,
    reads_a_whole_answer: 10,
    reads_slowly: 4,
    vanishes: 14,
    vanishes_in_the_queue: 6,
    wants_a_million_tokens: 2,
    sends_too_long_a_prompt: 6,
    sends_broken_json: 8,
    sends_wrong_types: 6,
    asks_for_what_is_not_there: 2,
    says_nothing: 5,
    speaks_no_http: 3,
}


# ---- the server and what it uses ----


def usage(pid: int) -> tuple[float, int, int]:
    """Memory (VmRSS, MiB), threads, open files of a process."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return int(fields["VmRSS"].split()[0]) / 1024, int(fields["Threads"]), len(os.listdir(f"/proc/{pid}/fd"))


def growth(seconds: list[float], values: list[float]) -> float:
    """By how much the values rose in the second half of the time, by a line through them."""
    half = len(seconds) // 2
    x, y = np.array(seconds[half:]), np.array(values[half:])
    if len(x) < 2 or x[0] == x[-1]:
        return 0.0
    return float(np.polyfit(x - x[0], y, 1)[0] * (x[-1] - x[0]))


@contextmanager
def serving(arguments: argparse.Namespace, log: Path) -> Iterator[dict[str, Any]]:
    """`ptqtp-gguf serve` as a user starts it; "exit" is its exit code after SIGTERM."""
    command = [
        str(Path(sys.executable).with_name("ptqtp-gguf")),
        "serve",
        str(arguments.model),
        "--port",
        "0",
        "--json",
        "--ctx",
        str(arguments.ctx),
        "--parallel",
        str(arguments.parallel),
        "--threads",
        str(arguments.threads),
        "--log",
        str(log),
    ]
    env = {k: v for k, v in os.environ.items() if k != "LLAMA_API_KEY"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout
        ready = next((e for e in map(json.loads, process.stdout) if e["event"] == "ready"), None)
        if ready is None:
            raise SystemExit("serve did not start")
        threading.Thread(target=process.stdout.read, daemon=True).start()
        try:
            yield ready
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                ready["exit"] = process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                ready["exit"] = None


def left_over(pid: int, port: int) -> list[str]:
    """What must not be there after the end."""
    found = []
    if Path(f"/proc/{pid}").exists():
        found.append(f"process {pid}")
    with socket.socket() as s:
        if s.connect_ex(("127.0.0.1", port)) == 0:
            found.append(f"port {port}")
    return found


def soak(arguments: argparse.Namespace) -> dict[str, Any]:
    """The run; figures and, under "wrong", all that was not as it must be."""
    wrong: list[str] = []
    outcomes: Counter[str] = Counter()
    texts: dict[str, Counter[str]] = {}
    samples: list[tuple[float, float, int, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with serving(arguments, log) as server:
            port, pid = server["port"], server["pid"]
            idle = {q: whole(port, q) for q in QUESTIONS}
            wrong += [f"idle, the answer to {q!r} is not repeated" for q in QUESTIONS if whole(port, q) != idle[q]]
            if arguments.minutes >= LONG:  # the longest of all answers, so that the cache of prompts grows no more
                for q in QUESTIONS:
                    list(Client(port, random.Random(1), idle).stream(q, max_tokens=1_000_000))
            before = usage(pid)
            stop = time.monotonic() + 60 * arguments.minutes
            lock = threading.Lock()

            def client(number: int) -> None:
                rng = random.Random(arguments.seed * 1000 + number)
                c = Client(port, rng, idle, arguments.large)
                first = list(ACTS)[number :: arguments.clients]  # each act happens once at least
                while time.monotonic() < stop and len(wrong) < 20:
                    act = first.pop() if first else rng.choices(list(ACTS), list(ACTS.values()))[0]
                    try:
                        how = act(c)
                    except (OSError, http.client.HTTPException, ValueError, Wrong) as e:
                        how = "failed"
                        with lock:
                            wrong.append(f"{act.__name__}: {type(e).__name__}: {e}")
                            print(wrong[-1], flush=True)
                    with lock:
                        outcomes[f"{act.__name__}: {how}"] += 1
                with lock:
                    for q, text in c.differing:
                        texts.setdefault(q, Counter())[text] += 1

            threads = [threading.Thread(target=client, args=(i,), daemon=True) for i in range(arguments.clients)]
            start = time.monotonic()
            for t in threads:
                t.start()
            told = start
            while any(t.is_alive() for t in threads):
                time.sleep(min(1.0, max(0.05, 60 * arguments.minutes / 20)))
                now = time.monotonic()
                try:
                    samples.append((now - start, *usage(pid)))
                except (OSError, KeyError):
                    wrong.append(GONE)
                    break
                if now > told + 30:
                    told = now
                    print(f"{now - start:5.0f} s  {samples[-1][1]:.0f} MiB  {sum(outcomes.values())} acts", flush=True)
                if now > stop + TIMEOUT + 30:
                    wrong.append(f"{sum(t.is_alive() for t in threads)} clients hang")
                    break
            if GONE not in wrong:
                try:
                    after = {q: whole(port, q) for q in QUESTIONS}
                    wrong += [f"after the load, another answer to {q!r}" for q in QUESTIONS if after[q] != idle[q]]
                except (OSError, http.client.HTTPException):  # it died after the last look at it
                    wrong.append(GONE)
        if server["exit"] != 0:
            wrong.append(f"serve ended by SIGTERM with {server['exit']}")
        wrong += [f"left over: {x}" for x in left_over(pid, port)]
    seconds = [s[0] for s in samples]
    memory = growth(seconds, [s[1] for s in samples])
    limit = max(GROWTH * before[0], 2.0)
    if arguments.large > SMALL:
        limit += READING * len("word ") * arguments.large / MiB
    if arguments.minutes >= LONG and memory > limit:
        wrong.append(f"memory grew by {memory:.1f} MiB in the second half")
    files = growth(seconds, [float(s[3]) for s in samples])
    equal = sum(n for name, n in outcomes.items() if name.endswith(": equal"))
    other = sum(n for name, n in outcomes.items() if name.endswith(": other text"))
    if other and arguments.parallel == 1:
        wrong.append(f"{other} of {equal + other} full answers differ from those of the idle server")
    return {
        "model": arguments.model.name,
        "clients": arguments.clients,
        "minutes": arguments.minutes,
        "parallel": arguments.parallel,
        "seed": arguments.seed,
        "acts": sum(outcomes.values()),
        "outcomes": dict(sorted(outcomes.items())),
        "answers_equal": equal,
        "answers_other": other,
        "texts_other": {q: len(t) for q, t in texts.items()},
        "memory_mib": {
            "idle": round(before[0], 1),
            "highest": round(max((s[1] for s in samples), default=0), 1),
            "end": round(samples[-1][1], 1) if samples else None,
            "growth_second_half": round(memory, 2),
        },
        "threads": {"idle": before[1], "highest": max((s[2] for s in samples), default=0)},
        "files": {
            "idle": before[2],
            "highest": max((s[3] for s in samples), default=0),
            "growth_second_half": round(files, 1),
        },
        "exit": server["exit"],
        "wrong": wrong,
        "memory_by_second": [round(s[1]) for s in samples],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--parallel", type=int, default=1, help="what serve is told")
    parser.add_argument("--ctx", type=int, default=512, help="what serve is told")
    parser.add_argument("--threads", type=int, default=2, help="what serve is told")
    parser.add_argument(
        "--large", type=int, default=200_000, help="words of the longest prompt; 3000 finds small leaks"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    found = soak(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(found) + "\n")
    del found["memory_by_second"]
    print(json.dumps(found, indent=1))
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
