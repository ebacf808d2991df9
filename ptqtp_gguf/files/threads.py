"""Reading, quantizing and writing at once: a thread that reads ahead, and one that writes behind.

Both hold a fixed number of items, so memory is bounded; an error in a thread is raised where its items are used.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")
_END = object()


class ReadAhead(Generic[T]):
    """Runs a generator in a thread of its own, `depth` items ahead. Iterate over it inside a with statement."""

    def __init__(self, items: Generator[T, None, None], depth: int = 1) -> None:
        self._items = items
        self._queue: queue.Queue[object] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="read", daemon=True)
        self._error: BaseException | None = None

    def __enter__(self) -> ReadAhead[T]:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def __iter__(self) -> Generator[T, None, None]:
        while (item := self._queue.get()) is not _END:
            yield item  # type: ignore[misc]
        if self._error:
            raise self._error

    def _run(self) -> None:
        try:
            for item in self._items:
                if not self._put(item):
                    break
        except BaseException as e:
            self._error = e
        finally:
            self._items.close()
        self._put(_END)

    def _put(self, item: object) -> bool:
        """False if nobody wants items any more."""
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False


class WriteBehind:
    """Runs calls one after the other in a thread of its own; `put` waits while `depth` of them are waiting.

    The first error ends the work: it is raised by the next `put`, or by the end of the with statement. Where the with
    statement ends by an error of its own, what is still waiting is dropped.
    """

    def __init__(self, depth: int = 2) -> None:
        self._queue: queue.Queue[Callable[[], object] | None] = queue.Queue(depth)
        self._thread = threading.Thread(target=self._run, name="write", daemon=True)
        self._error: BaseException | None = None
        self._drop = False

    def __enter__(self) -> WriteBehind:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._drop = kind is not None
        self._queue.put(None)
        self._thread.join()
        if self._error and kind is None:
            raise self._error

    def put(self, call: Callable[[], object]) -> None:
        if self._error:
            raise self._error
        self._queue.put(call)

    def _run(self) -> None:
        while (call := self._queue.get()) is not None:
            if self._error or self._drop:
                continue
            try:
                call()
            except BaseException as e:
                self._error = e
