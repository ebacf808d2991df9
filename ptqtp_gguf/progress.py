"""How long work reports on itself: a callback that the caller gives."""

from __future__ import annotations

from collections.abc import Callable

# stage, weights done, weights in all, what is being worked on
Progress = Callable[[str, int, int, str], None]


def no_progress(stage: str, done: int, total: int, detail: str) -> None:
    """Report nothing."""
