"""The patched llama.cpp, found and checked: tools, converter, ggml's quantizers, a model that gives text or logits."""

from __future__ import annotations

from . import ggml, install
from .model import Context, Model, chat_template, context_for, cores, encode, generate, load, pieces, system_info
from .rpc import check, endpoints, lost

__all__ = [
    "Context",
    "Model",
    "chat_template",
    "check",
    "context_for",
    "cores",
    "encode",
    "endpoints",
    "generate",
    "ggml",
    "install",
    "load",
    "lost",
    "pieces",
    "system_info",
]
