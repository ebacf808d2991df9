"""The patched llama.cpp, found and checked: tools, converter, ggml's quantizers, a model that gives text or logits."""

from __future__ import annotations

from . import ggml, install
from .model import (
    Context,
    Model,
    chat_template,
    context_for,
    cores,
    encode,
    generate,
    load,
    pieces,
    render_template,
    system_info,
)
from .rpc import check, endpoints, lost
from .tap import Probe, Product, Tap

__all__ = [
    "Context",
    "Model",
    "Probe",
    "Product",
    "Tap",
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
    "render_template",
    "system_info",
]
