"""The tool that tries a newer llama.cpp: what it says where patches no longer fit."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from helpers import REPO

sys.path.insert(0, str(REPO / "tools" / "build"))
tool = importlib.import_module("newest_upstream")

PATCH = """Why.

--- a/vendor/a.h
+++ b/vendor/a.h
@@ -1,3 +1,4 @@
 one
 two
+ours
 three
--- a/vendor/b.h
+++ b/vendor/b.h
@@ -1,2 +1,3 @@
 four
+ours
 five
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """An upstream of two files and what the tool looks up; the patch lies beside it."""
    (tmp_path / "0001-x.patch").write_text(PATCH)
    include = tmp_path / "tree" / "vendor" / "llama.cpp" / "ggml" / "include"
    include.mkdir(parents=True)
    (include / "ggml.h").write_text("    GGML_TYPE_COUNT   = 43,\n")
    (include / "ggml-rpc.h").write_text("#define RPC_PROTO_MAJOR_VERSION    7\n")
    (tmp_path / "tree" / "vendor" / "a.h").write_text("one\ntwo\nthree\n")
    (tmp_path / "tree" / "vendor" / "b.h").write_text("four\nfive\n")
    return tmp_path / "tree"


def test_patches_that_fit(tree: Path) -> None:
    assert tool.rejected(tree, [tree.parent / "0001-x.patch"]) == []
    assert (tree / "vendor" / "a.h").read_text() == "one\ntwo\nours\nthree\n"
    assert tool.looked_up(tree, tree) == []


def test_a_hunk_that_does_not_fit(tree: Path) -> None:
    """It is named, and the others are applied."""
    (tree / "vendor" / "a.h").write_text("one\nfour\nthree\n")
    (broken,) = tool.rejected(tree, [tree.parent / "0001-x.patch"])
    assert broken.startswith("0001-x.patch: vendor/a.h: @@ -1,3 +1,4 @@")
    assert "ours" in (tree / "vendor" / "b.h").read_text() and not list(tree.rglob("*.rej"))


def test_a_file_that_is_gone(tree: Path) -> None:
    (tree / "vendor" / "a.h").unlink()
    assert "0001-x.patch: vendor/a.h: upstream has no such file any more" in tool.rejected(
        tree, [tree.parent / "0001-x.patch"]
    )


def test_what_no_compiler_reports(tree: Path, tmp_path: Path) -> None:
    include = Path("vendor") / "llama.cpp" / "ggml" / "include"
    before = tmp_path / "before"
    (before / include).mkdir(parents=True)
    (before / include / "ggml-rpc.h").write_text("#define RPC_PROTO_MAJOR_VERSION    6\n")
    (tree / include / "ggml.h").write_text("    GGML_TYPE_COUNT   = 251,\n")
    assert tool.looked_up(tree, before) == [
        "ids of types: upstream has 251, ours begin with 250",
        "RPC protocol: 6 was, 7 is: choose ours anew (0005)",
    ]


def test_the_version_in_the_wheels_patch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another version only that line is put right; of the pinned one nothing."""
    monkeypatch.setattr(tool, "HOME", tmp_path)
    pinned = tool.builder.read_upstream()
    sdist = tmp_path / "llama_cpp_python-9.9.9.tar.gz"
    sdist.write_bytes(b"")
    upstream = tool.describe(sdist, pinned)
    assert upstream.version == "9.9.9" and len(upstream.patches) == len(pinned.patches)
    text = next(path for path in upstream.patches if "python-wheel" in path.name).read_text()
    assert '-__version__ = "9.9.9"\n+__version__ = "9.9.9+ptqtp.1"\n' in text
    assert tool.describe(tmp_path / pinned.sdist, pinned) is pinned
