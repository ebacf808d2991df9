"""What fault_test.py is made of: the fault layer, commands run under it, and what must hold after each run."""

from __future__ import annotations

import atexit
import ctypes
import errno
import hashlib
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
OPS = "open create read write sync rename truncate mmap stat unlink mkdir list lock chmod space".split()
SHORT, KILL, TORN, BUS, CLOCK = -1, -2, -3, -4, -5
_STATE = struct.Struct(f"<{len(OPS)}QQQq16s1000s")
TIMEOUT = 180.0  # s; beyond it a run hangs

_REAL = {  # what can happen to a call on a real machine
    "open": "EIO EACCES EMFILE ENFILE EINTR KILL",
    "create": "EIO ENOSPC EDQUOT EACCES EROFS EINTR KILL TORN",
    "read": "EIO SHORT EINTR KILL",
    "write": "EIO ENOSPC EDQUOT SHORT EINTR KILL TORN",
    "sync": "EIO ENOSPC KILL TORN",
    "rename": "EIO ENOSPC EACCES KILL TORN",
    "truncate": "EIO ENOSPC KILL TORN",
    "mmap": "ENOMEM ENODEV BUS",
    "stat": "EIO KILL",
    "unlink": "EIO EACCES KILL TORN",
    "mkdir": "EIO ENOSPC KILL TORN",
    "list": "EIO EMFILE",
    "lock": "EIO ENOLCK KILL",
    "chmod": "EIO EPERM",
    "space": "EIO",
}
_OWN = {"SHORT": SHORT, "KILL": KILL, "TORN": TORN, "BUS": BUS, "CLOCK": CLOCK}
ACTIONS = {op: [_OWN.get(a) or getattr(errno, a) for a in text.split()] for op, text in _REAL.items()}
SURVIVED = {SHORT, CLOCK, errno.EINTR}  # must not be noticed at all
# a full disk takes no new data, a dead one nothing
LASTING = {
    errno.ENOSPC: "write create mkdir sync".split(),
    errno.EDQUOT: "write create mkdir".split(),
    errno.EIO: OPS,
    errno.EROFS: "create write rename unlink mkdir truncate chmod".split(),
}


def action_name(action: int) -> str:
    return next((n for n, a in _OWN.items() if a == action), errno.errorcode.get(action, str(action)))


def action_of(name: str) -> int:
    """The opposite. Raises AttributeError."""
    return _OWN.get(name) or int(getattr(errno, name))


@dataclass(frozen=True)
class Fault:
    """What fails: the k-th call of `op`; `lasting`: calls of these ops after it too; with p, any of them so often."""

    op: str = "open"
    k: int = 0
    action: int = 0
    lasting: tuple[str, ...] = ()
    p: float = 0.0
    seed: int = 0
    jump: int = 0  # s

    def spec(self) -> str:
        mask = sum(1 << OPS.index(op) for op in self.lasting)
        return f"{OPS.index(self.op)} {self.k} {self.action} {mask} {self.p} {self.seed} {self.jump}"

    def __str__(self) -> str:
        name = action_name(self.action) + (f" {self.jump:+} s" if self.jump else "")
        if self.p:
            return f"{name} at {self.p:.0%} of {'/'.join(self.lasting)}, seed {self.seed}"
        return f"{name} at {self.op} {self.k}" + (" and after" if self.lasting else "")


@dataclass(frozen=True)
class Outcome:
    """How a run ended. code: as subprocess has it, negative for a signal; hit: the call that failed first, or ""."""

    code: int
    out: str
    err: str
    hit: str = ""
    hung: bool = False
    survivors: bool = False
    calls: tuple[tuple[str, str], ...] = ()  # (op, path), where they were asked for

    @property
    def lines(self) -> list[str]:
        return self.err.splitlines()


class Layer:
    """Runs commands under the fault layer, which makes calls fail below one folder."""

    def __init__(self, work: Path) -> None:
        """work: a folder made by `under_layer`; `watched` in it is where faults can be."""
        self.work, self.watched, self.library = work, work / "w", work / "faults.so"
        self.watched.mkdir()

    def env(self, fault: Fault | None, log: Path | None) -> dict[str, str]:
        state = self.work / "state"
        state.write_bytes(bytes(_STATE.size))
        env = {"FAULTS_STATE": str(state), "FAULTS_FOLDER": str(self.watched), "FAULTS_SPEC": (fault or Fault()).spec()}
        env |= {"LD_PRELOAD": str(self.library), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
        if log:
            log.unlink(missing_ok=True)
            env["FAULTS_LOG"] = str(log)
        return env

    def hit(self) -> str:
        """The call of the last run that failed first, or ""."""
        state = _STATE.unpack((self.work / "state").read_bytes())
        fired, what, path = state[len(OPS) + 1], state[-2], state[-1]
        return f"{what.split(bytes(1))[0].decode()} {path.split(bytes(1))[0].decode()}" if fired else ""

    def run(
        self,
        args: list[str],
        fault: Fault | None = None,
        *,
        log: bool = False,
        fork: bool = True,
        limits: dict[int, int] | None = None,
    ) -> Outcome:
        """One command line, in a process group of its own.

        fork    by a fork of this process, which has imported the package: saves a second, not for limits of memory
        limits  resource.RLIMIT_...: value
        """
        log_path = self.work / "log" if log else None
        env = self.env(fault, log_path)
        out, err = self.work / "stdout", self.work / "stderr"

        def limit() -> None:
            import resource

            for what, value in (limits or {}).items():
                resource.setrlimit(what, (value, value))

        with open(out, "wb") as o, open(err, "wb") as e:
            process: _Forked | _Executed
            if fork:
                process = _Forked(args, env, o.fileno(), e.fileno(), limit)
            else:
                process = _Executed(args, env, o.fileno(), e.fileno(), limit)
        code = process.wait(TIMEOUT)
        survivors = not _ends(process.pid)
        calls = [line.split(" ", 1) for line in log_path.read_text().splitlines()] if log_path else []
        return Outcome(
            code if code is not None else -signal.SIGKILL,
            out.read_text(errors="replace"),
            err.read_text(errors="replace"),
            self.hit(),
            code is None,
            survivors,
            tuple((a, b) for a, b in calls),
        )


class _Executed:
    def __init__(self, args: list[str], env: dict[str, str], out: int, err: int, limit: Callable[[], None]) -> None:
        self._process = subprocess.Popen(
            [str(Path(sys.executable).with_name("ptqtp-gguf")), *args],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env={**os.environ, **env},
            start_new_session=True,
            preexec_fn=limit,
        )
        self.pid = self._process.pid

    def wait(self, timeout: float) -> int | None:
        """The exit code; None where it had to be killed."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
            return None


class _Forked:
    def __init__(self, args: list[str], env: dict[str, str], out: int, err: int, limit: Callable[[], None]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                os.setsid()
                os.dup2(out, 1)
                os.dup2(err, 2)
                os.environ.update(env)
                limit()
                code = _main(args)
            finally:
                os._exit(code)

    def wait(self, timeout: float) -> int | None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return None


def _main(args: list[str]) -> int:
    """What the console script does, and what the interpreter does behind it."""
    from ptqtp_gguf.__main__ import main

    ctypes.CDLL(None).faults_arm()
    sys.argv = ["ptqtp-gguf", *args]
    code = 1
    try:
        main()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _ends(group: int) -> bool:
    """Whether a process group is gone soon; it is killed where it is not."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    os.killpg(group, signal.SIGKILL)
    return False


def under_layer() -> None:
    """Start this program again with a fault layer in it, unless it has one; for runs by fork."""
    if "FAULTS_WORK" in os.environ:
        return
    import tempfile

    work = Path(os.path.realpath(tempfile.mkdtemp(prefix="faults-")))
    library = work / "faults.so"
    compiler = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*compiler, "-o", str(library), str(HERE / "faults.c"), "-ldl"], check=True)
    env = {**os.environ, "LD_PRELOAD": str(library), "FAULTS_WORK": str(work), "HF_HUB_OFFLINE": "1"}
    os.execve(sys.executable, [sys.executable, *sys.argv], env)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its path from there."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@dataclass
class Case:
    """A command and what it makes.

    args    of the command line
    before  folder whose files lie in the command's folder when it starts, or None
    new     what must lie there in the end, by name; old: what lay there under the same names before
    """

    name: str
    args: list[str]
    before: Path | None = None
    new: dict[str, str] = field(default_factory=dict)
    old: dict[str, str] = field(default_factory=dict)
    calls: tuple[tuple[str, str], ...] = ()

    def fresh(self, folder: Path) -> None:
        """Make the command's folder as it was before."""
        shutil.rmtree(folder, ignore_errors=True)
        if self.before:
            shutil.copytree(self.before, folder)
        else:
            folder.mkdir()


def complaints(case: Case, folder: Path, done: Outcome, fault: Fault | None, watched: Path) -> Iterator[str]:
    """What is wrong after a run that something was done to. Empty where all is as it should be."""
    action = fault.action if fault else 0
    if done.hung:
        yield "it hangs"
        return
    if done.survivors:
        yield "a process outlives it"
    killed = done.code == -signal.SIGKILL and action in (KILL, TORN)
    if not killed and done.code not in (0, 1):
        yield f"exit code {done.code}"
    if "Traceback" in done.err:
        yield "a traceback"
    if done.code == 0 and "Error" in done.err:
        yield "an error, yet exit code 0"
    if done.code == 1:
        yield from message_faults(folder, done, action, watched)
    if action in SURVIVED and done.code != 0:
        yield f"{action_name(action)} was not survived"
    found = digests(folder)
    for name, digest in found.items():
        if name in case.new and digest not in (case.new[name], case.old.get(name)):
            yield f"{name} is neither the old nor the new file"
        elif name not in case.new and not name.startswith("."):
            yield f"{name} lies there"
    for name in case.old:
        if name in case.new and name not in found:
            yield f"the old {name} is lost"
    if done.code == 0 and found != case.new:
        yield f"done, yet the folder holds {sorted(found)}, or other bytes"


def message_faults(folder: Path, done: Outcome, action: int, watched: Path) -> Iterator[str]:
    """What is wrong with what a run that ended with 1 has said."""
    lines = done.lines
    if len(lines) != 1 or not lines[0].startswith("Error: "):
        yield f"{len(lines)} lines on standard error, not one that begins with Error:"
        return
    if str(watched) not in lines[0] and "out of memory" not in lines[0]:
        yield "the message names no file"
    if action > 0 and os.strerror(action).lower() not in lines[0].lower():
        yield f"the message does not say '{os.strerror(action)}'"
    hidden = [n for n in digests(folder) if n.startswith(".")]
    left = [n for n in hidden if n.endswith(".new") or "nothing was left" in lines[0]]
    if "left behind" in lines[0] and left:
        yield f"nothing was 'left behind', but {left}"
    if "are kept" in lines[0] and not any("journal" in n for n in hidden):
        yield "something 'is kept', but there is no journal"
