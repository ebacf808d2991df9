"""The console: progress bars."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from ptqtp_gguf.terminal import console as terminal

MARKUP = "[red]a[/nothing]"
HOSTILE = MARKUP + "\x1b[31m\nb\x07\u202e"


def test_a_progress_bar_takes_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As markup the closing tag would be an error."""
    screen = io.StringIO()
    monkeypatch.setattr(terminal, "err_console", Console(file=screen, force_terminal=True, width=150))
    with terminal.Bar(quiet=False) as bar:
        bar("counting", 2, 2, HOSTILE)
    shown = screen.getvalue()
    assert "[red]a[/nothing]\\x1b[31m\\nb" in shown and "\x07" not in shown
