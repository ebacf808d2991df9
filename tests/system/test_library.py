"""The library's front door, and its page: docs/library.md runs as it stands."""

from __future__ import annotations

import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPO

import ptqtp_gguf

HEAVY = {"torch", "transformers", "numpy", "gguf", "llama_cpp", "rich", "typer"}
PAGE = (REPO / "docs" / "library.md").read_text()


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys; before = set(sys.modules); import ptqtp_gguf; dir(ptqtp_gguf);"
        "print(*(m for m in set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "ptqtp_gguf" in loaded
    assert not {m.split(".")[0] for m in loaded} & HEAVY
    assert not [m for m in loaded if m.startswith("ptqtp_gguf.")]


def test_no_public_name_is_a_module() -> None:
    """Importing a module sets it as an attribute of its package: it would take the place of the name."""
    modules = {m.name for m in pkgutil.iter_modules(ptqtp_gguf.__path__)}
    assert {"inspect", "compare"} <= modules
    assert not modules & set(ptqtp_gguf.__all__)


@pytest.mark.parametrize("name", ptqtp_gguf.__all__)
def test_each_name_is_there_with_its_docstring(name: str) -> None:
    value = getattr(ptqtp_gguf, name)
    assert value.__module__.startswith("ptqtp_gguf.") and value.__name__ == name
    assert len(value.__doc__) > 20
    assert value is getattr(ptqtp_gguf, name) and name in dir(ptqtp_gguf)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'frobnicate'"):
        _ = ptqtp_gguf.frobnicate


def test_every_name_is_on_the_page() -> None:
    assert not [name for name in ptqtp_gguf.__all__ if f"`{name}" not in PAGE and f"{name}(" not in PAGE]


@pytest.mark.runtime
@pytest.mark.hf
def test_the_page_runs(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "SmolLM2-135M")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 6
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        line = PAGE[: PAGE.index(block)].count("\n")
        exec(compile("\n" * line + block, "docs/library.md", "exec"), names)
    out = capsys.readouterr().out
    assert "bits per weight" in out and "no such file" in out
    assert (tmp_path / "model.gguf").exists() and not list(tmp_path.glob(".*"))
