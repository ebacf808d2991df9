"""A module imports only from rows above it, and each foreign thing has one door (docs/architecture.md)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from helpers import REPO

PACKAGE = REPO / "ptqtp_gguf"
ORDER = [
    "errors", "format", "packing", "native", "quantize.lanes", "quantize.paper", "quantize.search", "quantize.blocks",
    "quantize", "quantize.nvidia", "quantize.cuda", "quantize.plane_ops", "quantize.calibrated", "reading",
    "gguf_values", "gguf_io", "output", "rpc", "runtime", "ggml", "imatrix", "pickles", "_converter_child",
    "checkpoint", "hub", "stream", "patterns", "recipe",
    "budget", "card", "encode", "source", "mapping", "plan", "memory", "blocks", "sampling", "texts", "moments",
    "distance",
    "calibration", "inorder", "sensitivity", "quantize.tune_settings", "quantize.student", "quantize.tuner",
    "quantize.tuned", "metadata", "journal", "parts", "stages", "resume", "planes", "transcode", "verify", "shares",
    "options", "prepare", "results", "conversion", "ranks", "distributed", "peers", "export",
    "inspect", "histograms", "difference",
    "scoring", "records", "evaltext", "evaluation", "generation",
    "energy", "_load_child", "machine", "roofline", "rounds", "pairing", "bench",
    "document", "comparison", "findings", "plots", "report", "server", "chatting",
    "terminal", "listing", "tables", "commands.common",
    "commands.bench",
    "commands.chat",
    "commands.compare",
    "commands.convert",
    "commands.diff",
    "commands.evaluate",
    "commands.files",
    "commands.generate",
    "commands.serve",
    "commands", "cli", "__main__",
]  # fmt: skip
DOORS = {  # _converter_child runs in the converter's process, with the converter's own gguf-py
    "gguf": {"gguf_io", "_converter_child"},
    "ctypes": {
        "native",
        "rpc",
        "runtime",
        "_converter_child",
    },  # runtime: ggml's quantizers, from the library of the wheel
    "llama_cpp": {"runtime"},
    "torch": {
        "_converter_child",
        "mapping",
        "texts",
        "sampling",
        "blocks",
        "moments",
        "calibration",
        "inorder",
        "sensitivity",
        "prepare",
        "ranks",
        "quantize.calibrated",
        "quantize.plane_ops",
        "quantize.student",
        "quantize.tuner",
        "quantize.tuned",
    },
    "transformers": {
        "_converter_child",
        "texts",
        "sampling",
        "blocks",
        "calibration",
        "sensitivity",
        "prepare",
        "quantize.student",
    },
    "huggingface_hub": {"hub"},
    "cuda": {"quantize.nvidia"},
    "matplotlib": {"plots"},
    "jinja2": {"report", "runtime"},
    "markupsafe": {"report"},
}
MAX_LINES = 500


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__") if name != "__init__" else ""] = path
    return found


def imports(name: str, path: Path) -> tuple[set[str], set[str]]:
    """Own modules and foreign top-level packages that a module imports, anywhere in it."""
    own, foreign = set(), set()
    package = name.split(".")[:-1] if path.name != "__init__.py" else name.split(".") if name else []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            foreign |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            foreign.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            target = [*base, *(node.module or "").split(".")] if node.module else base
            names = [[*target, a.name] for a in node.names]
            own |= {".".join(n) if ".".join(n) in modules() else ".".join(target) for n in names}
    return own - {""}, foreign


@pytest.mark.parametrize("name", [n for n in modules() if n])
def test_imports_only_from_above(name: str) -> None:
    own, foreign = imports(name, modules()[name])
    row = ORDER.index(name)
    below = {m for m in own if ORDER.index(m) >= row}
    assert not below, f"{name} imports {below}, which stand at or below it"
    for package, doors in DOORS.items():
        assert package not in foreign or name in doors, f"{name} imports {package}; its door is {doors or 'nobody'}"


@pytest.mark.parametrize("name", modules())
def test_modules_stay_small(name: str) -> None:
    assert len(modules()[name].read_text().splitlines()) <= MAX_LINES
