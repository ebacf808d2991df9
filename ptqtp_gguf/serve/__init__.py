"""A chat in the terminal and an OpenAI-compatible server."""

from __future__ import annotations

from .chat import Chat, harmless
from .server import Server, is_loopback

__all__ = [
    "Chat",
    "Server",
    "harmless",
    "is_loopback",
]
