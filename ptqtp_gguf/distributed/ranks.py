"""The ranks of a conversion on several processes: who they are, what they tell each other, and how one ends them all.

torchrun starts them. What they tell each other is a few kilobytes, gathered by torch.distributed over gloo when all
have come; the waiting before that, of hours if need be, is done at torchrun's store, so that no timeout of gloo's
counts, an interrupt is heard, and a rank that has failed or is gone ends the others with one line.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from ..errors import OutputError, RankError
from ..progress import Progress

ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
JOIN = 600.0  # seconds to wait until all ranks have started
BEAT = 0.5  # seconds between signs of life
SILENCE = "PTQTP_RANK_SILENCE"  # seconds without one, after which a rank is given up
FAREWELL = 5.0  # seconds that one who has failed stays, so that the others hear why before they are ended

T = TypeVar("T")


def number(name: str, default: int) -> int:
    """A whole number of the environment; the default where there is none."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def world() -> tuple[int, int]:
    """(rank, ranks) as torchrun tells them; (0, 1) where nobody does."""
    if not all(os.environ.get(name) for name in ENVIRONMENT):
        return 0, 1
    return number("RANK", 0), max(1, number("WORLD_SIZE", 1))


def own_gpu() -> None:
    """Let this process see only the GPU of its LOCAL_RANK; where there are fewer than ranks they take turns."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    folder = Path("/proc/driver/nvidia/gpus")
    devices = given.split(",") if given else [str(i) for i in range(len(list(folder.glob("*"))))]
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[number("LOCAL_RANK", 0) % len(devices)]


class Ranks:
    """All ranks, from the point of view of one. A context manager: what ends it with an error ends all ranks.

    rank   this one, 0 .. size-1
    hosts  name of each rank's host
    """

    def __init__(self, progress: Progress) -> None:
        """Waits for all ranks. progress: of rank 0, for what all do together. Raises OutputError."""
        self.rank, self.size = world()
        self._progress = progress
        self._turn = 0
        self._stage: tuple[str, int] | None = None
        self._done, self._detail = 0, ""
        self._lost = ""
        self._over = threading.Event()
        self._silence = float(number(SILENCE, 120))
        try:
            import torch.distributed as dist
        except ImportError as e:
            raise OutputError(f"{e}: several ranks need torch; pip install 'ptqtp-gguf[hf]'") from None
        try:
            wait = timedelta(seconds=JOIN)
            self._store: Any = next(dist.rendezvous("env://", timeout=wait))[0]
            self._beat()
            dist.init_process_group(
                "gloo", store=dist.PrefixStore("gloo", self._store), rank=self.rank, world_size=self.size, timeout=wait
            )
        except (RuntimeError, ValueError) as e:
            raise OutputError(
                f"rank {self.rank} of {self.size}: the ranks did not come together at {os.environ['MASTER_ADDR']}:"
                f"{os.environ['MASTER_PORT']}: {_first_line(e)}; of several network interfaces, name one in "
                "GLOO_SOCKET_IFNAME"
            ) from None
        self._dist = dist
        self._thread = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self.hosts: list[str] = []
        self._thread.start()
        self.hosts = self.exchange(socket.gethostname())

    def name(self, rank: int) -> str:
        """A rank as messages call it."""
        host = f" on {self.hosts[rank]}" if self.hosts else ""
        return f"rank {rank} of {self.size}{host}"

    # ---- what is said ----

    def exchange(self, value: Any) -> list[Any]:
        """What each rank says, by rank, when all have come here. value: JSON. Raises RankError if one never will."""
        self._turn += 1
        keys = [f"turn {self._turn} {r}" for r in range(self.size)]
        try:
            self._store.set(keys[self.rank], "here")
            while not self._store.check(keys):
                self.check()
                time.sleep(0.02)
            return self._gather(json.dumps(value).encode())
        except RuntimeError as e:
            time.sleep(2 * BEAT)  # whoever has failed may have said why
            self.check()
            raise RankError(f"the connection to the other ranks is lost: {_first_line(e)}") from None

    def _gather(self, data: bytes) -> list[Any]:
        import torch

        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self._dist.all_gather(sizes, torch.tensor([len(data)]))
        most = max(int(n) for n in sizes)
        texts = [torch.zeros(most, dtype=torch.uint8) for _ in range(self.size)]
        self._dist.all_gather(texts, torch.frombuffer(bytearray(data.ljust(most)), dtype=torch.uint8))
        return [json.loads(text.numpy()[: int(n)].tobytes()) for text, n in zip(texts, sizes, strict=True)]

    def from_first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, for all ranks; they wait for it. It must be JSON."""
        made: T = self.exchange(make() if self.rank == 0 else None)[0]
        return made

    def check(self) -> None:
        """Raises RankError if another rank has failed or is gone."""
        if self._lost:
            raise RankError(self._lost)

    # ---- what is shown, and signs of life ----

    def begin(self, stage: str, total: int) -> Progress:
        """A stage that all ranks do together: total weights, of all of them. Returns this rank's progress."""
        self._done, self._detail = 0, ""
        self._stage = (stage, total)

        def report(_: str, done: int, __: int, detail: str) -> None:
            self._done, self._detail = done, detail
            self.check()

        return report

    def end(self) -> None:
        """The stage is over."""
        self._stage = None

    def _beat(self) -> None:
        self._store.set(f"beat {self.rank}", f"{time.monotonic()} {self._done}")

    def _watch(self) -> None:
        """Runs in a thread: tells that we are here, hears who is not. Rank 0 watches all, all watch rank 0."""
        others = range(1, self.size) if self.rank == 0 else range(1)
        seen = {r: (time.monotonic(), "") for r in others}
        try:
            while not self._over.wait(BEAT):
                self._beat()
                done = self._done
                for r in others:
                    now, said = time.monotonic(), self._store.get(f"beat {r}").decode()
                    if said != seen[r][1]:
                        seen[r] = now, said
                    elif now - seen[r][0] > self._silence:
                        self._lost = f"nothing was heard of {self.name(r)} for {now - seen[r][0]:.0f} s"
                    done += int(said.split()[1])
                if self._store.check(["failed"]):
                    self._lost = self._store.get("failed").decode()
                if self.rank == 0 and (stage := self._stage):
                    self._progress(stage[0], min(done, stage[1]), stage[1], f"{self.size} ranks, {self._detail}")
        except RuntimeError as e:
            self._lost = self._lost or f"torchrun's store at {os.environ['MASTER_ADDR']} is gone: {_first_line(e)}"

    # ---- the end ----

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if e is None:
                self._dist.destroy_process_group()
            else:
                with contextlib.suppress(RuntimeError):
                    self._say_why(e)
        finally:
            self._over.set()
            self._thread.join(2)

    def _say_why(self, e: BaseException) -> None:
        """Tell the others why they must end; whoever is not the first to fail only tells that it has heard."""
        if self._store.check(["failed"]):
            self._lost = self._lost or self._store.get("failed").decode()
        # an interrupt is torchrun's answer to a rank that has died, or the user's: it comes to every rank
        if self._lost or isinstance(e, KeyboardInterrupt) or self._store.add("failing", 1) > 1:
            self._store.add("heard", 1)
            return
        self._store.set("failed", f"{self.name(self.rank)}: {str(e) or type(e).__name__}")
        until = time.monotonic() + FAREWELL
        while self._store.add("heard", 0) < self.size - 1 and time.monotonic() < until:
            time.sleep(0.05)

    @property
    def lost(self) -> str:
        """Why another rank's end was ours, or ""."""
        return self._lost


def _first_line(e: BaseException) -> str:
    return str(e).strip().partition("\n")[0][:200] or type(e).__name__
