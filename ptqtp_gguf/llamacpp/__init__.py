"""The patched llama.cpp, found and checked: tools, converter, ggml's quantizers, a model that gives text or logits."""

from __future__ import annotations

from . import ggml, install
from .aborts import end_in_one_line
from .grammar import check_grammar, read_grammar
from .install import point_llama_cpp
from .loadable import why_header_not_loadable, why_not_loadable
from .lora import Adapter, adapter
from .model import (
    Context,
    Model,
    context_for,
    cores,
    generate,
    load,
    pieces,
    system_info,
)
from .rpc import check, endpoints, lost
from .tap import Probe, Product, Tap
from .templates import chat_template, encode, fitted, keeps, read_template, render_template

__all__ = [
    "Adapter",
    "Context",
    "Model",
    "Probe",
    "Product",
    "Tap",
    "adapter",
    "chat_template",
    "check",
    "check_grammar",
    "context_for",
    "cores",
    "encode",
    "end_in_one_line",
    "endpoints",
    "fitted",
    "generate",
    "ggml",
    "install",
    "keeps",
    "load",
    "lost",
    "pieces",
    "point_llama_cpp",
    "read_grammar",
    "read_template",
    "render_template",
    "system_info",
    "why_header_not_loadable",
    "why_not_loadable",
]
