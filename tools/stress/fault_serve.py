"""The serve case of tools/stress/fault_test.py: a server under faults and kills, and what is left when it has ended.

Whatever happens to `ptqtp-gguf serve`: it ends, by itself with one line or 0, or killed; and then no process of its own
lives, nobody listens on its port, and nothing lies in its folder but the log that was asked for, nor in TMPDIR.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from fault_base import HERE, KILL, TORN, Fault, Layer, Outcome, message_faults

MARK = "FAULTS_MARK"  # in the environment of all that belongs to one run
READY = 60.0  # s; beyond it a start hangs
GONE = 10.0  # s for what belongs to a killed run to end


def talking(path: Path) -> Path:
    """A tiny model that llama-server loads; made in another process, without the layer."""
    code = "import sys; from pathlib import Path; from talking_model import write_talking_model;"
    code += "write_talking_model(Path(sys.argv[1]))"
    support = str(HERE.parents[1] / "tests" / "support")
    env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"} | {"PYTHONPATH": support}
    subprocess.run([sys.executable, "-c", code, str(path)], env=env, check=True, capture_output=True)
    return path


class Serving:
    """Runs of `ptqtp-gguf serve MODEL`, each with something done to it."""

    def __init__(self, layer: Layer, model: Path) -> None:
        self.layer, self.model, self.n = layer, model, 0
        self.ready = 0.0  # s from the start of an undisturbed run to its being ready

    def run(
        self, folder: Path, fault: Fault | None = None, kill_after: float | None = None, log: bool = False
    ) -> tuple[Outcome, list[str]]:
        """One server, until it is ready and told to end, or has ended, or was killed after so many seconds.

        Returns how it ended, and what is wrong.
        """
        self.n += 1
        mark = f"{os.getpid()}-{self.n}"
        scratch = self.layer.work / "tmp"
        scratch.mkdir(exist_ok=True)
        log_path = self.layer.work / "log" if log else None
        env = {**os.environ, **self.layer.env(fault, log_path), MARK: mark, "TMPDIR": str(scratch)}
        err_path, words = self.layer.work / "stderr", ["--port", "0", "--json", "--log", str(folder / "server.log")]
        started = time.monotonic()
        with open(err_path, "wb") as err:
            process = subprocess.Popen(
                [str(Path(sys.executable).with_name("ptqtp-gguf")), "serve", str(self.model), *words],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=err,
                start_new_session=True,
            )
            assert process.stdout is not None
            event, hung = self._until_ready(process, process.stdout, started, kill_after)
        if event and not self.ready:
            self.ready = time.monotonic() - started
        if event and kill_after is None:
            process.send_signal(signal.SIGTERM)
        elif kill_after is not None and process.poll() is None:
            time.sleep(max(0.0, started + kill_after - time.monotonic()))
            process.kill()
        try:
            process.wait(GONE)
        except subprocess.TimeoutExpired:
            process.kill()
            hung = True
        process.wait()
        process.stdout.close()
        calls = [line.split(" ", 1) for line in log_path.read_text().splitlines()] if log_path else []
        done = Outcome(
            process.returncode,
            "",
            err_path.read_text(errors="replace"),
            self.layer.hit(),
            hung,
            calls=tuple((a, b) for a, b in calls),
        )
        return done, list(self._complaints(folder, scratch, done, fault, kill_after, event, mark))

    def _until_ready(
        self, process: subprocess.Popen[bytes], out: IO[bytes], started: float, kill_after: float | None
    ) -> tuple[dict[str, object], bool]:
        """The event of being ready, {} where the process ends, or its time is over, before it; and whether it hangs."""
        os.set_blocking(out.fileno(), False)
        data = b""
        while True:
            data += out.read() or b""
            for line in data.splitlines(keepends=True):
                if line.endswith(b"\n") and b'"ready"' in line:
                    return dict(json.loads(line)), False
            passed = time.monotonic() - started
            if process.poll() is not None or (kill_after is not None and passed >= kill_after):
                return {}, False
            if passed > READY:
                return {}, True
            time.sleep(0.002)

    def _complaints(
        self,
        folder: Path,
        scratch: Path,
        done: Outcome,
        fault: Fault | None,
        kill_after: float | None,
        event: dict[str, object],
        mark: str,
    ) -> Iterator[str]:
        action = fault.action if fault else 0
        if done.hung:
            yield "it hangs"
        if not wait_until(lambda: not alive(mark), GONE):
            yield f"processes outlive it: {alive(mark)}"
        killed = done.code == -signal.SIGKILL and (kill_after is not None or action in (KILL, TORN))
        if not killed and done.code not in (0, 1):
            yield f"exit code {done.code}"
        if "Traceback" in done.err:
            yield "a traceback"
        if done.code == 1:
            yield from message_faults(folder, done, 0, self.layer.watched)
        if not fault and kill_after is None and (done.code != 0 or not event):
            yield f"undisturbed, yet exit code {done.code}"
        if event and not wait_until(lambda: free(int(str(event["port"]))), GONE):
            yield f"somebody listens on port {event['port']}"
        found = sorted(p.name for p in [*folder.iterdir(), *scratch.iterdir()])
        if found not in ([], ["server.log"]):
            yield f"left behind: {found}"


def alive(mark: str) -> list[str]:
    """Command lines of the processes that carry the mark."""
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            with contextlib.suppress(OSError):
                if f"{MARK}={mark}".encode() in (place / "environ").read_bytes().split(b"\0"):
                    found.append((place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200])
    return found


def free(port: int) -> bool:
    """Whether nobody listens there."""
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) != 0


def wait_until(true: Callable[[], bool], seconds: float) -> bool:
    """Whether it becomes true in time."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
