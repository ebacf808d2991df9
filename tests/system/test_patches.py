"""The patches, by version of llama-cpp-python: well-formed, few files, and they apply exactly where they belong."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from helpers import REPO

TOOL = REPO / "tools" / "build" / "build_runtime.py"
MAX_FILES = 17  # of llama.cpp; 16 were planned, docs/results/kernels.md says what the one more is for


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_runtime", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


tool = load_tool()
UPSTREAMS = tool.upstreams()
PINNED, *OLDER = UPSTREAMS


def hunks(patch: Path) -> Iterator[tuple[str, int, list[str]]]:
    """File, index of the first line, and the lines of each hunk as they are before it."""
    for part in re.split(r"^--- a/", patch.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        name = part.partition("\n")[0]
        for start, body in re.findall(r"^@@ -(\d+).*\n((?:[ +-].*\n)+)", part, re.MULTILINE):
            yield name, int(start) - 1, [line[1:] for line in body.splitlines() if line[0] != "+"]


def test_an_older_version_holds_only_its_own_variants() -> None:
    assert OLDER
    for version in OLDER:
        folder = tool.PATCHES / "older" / version
        names = {path.name for path in folder.iterdir()}
        assert names - {"UPSTREAM"} <= {path.name for path in UPSTREAMS[PINNED].patches}
        for patch in folder.glob("*.patch"):
            pinned = tool.PATCHES / patch.name
            assert patch.read_bytes() != pinned.read_bytes(), f"{patch.name} is the pinned version's: delete it"
            assert tool.patched_files([patch]) == tool.patched_files([pinned])


@pytest.mark.parametrize("version", UPSTREAMS)
def test_upstream(version: str) -> None:
    upstream = UPSTREAMS[version]
    assert re.fullmatch(r"[0-9a-f]{64}", upstream.sha256)
    assert upstream.sdist == f"llama_cpp_python-{version}.tar.gz"
    wheel = next(path for path in upstream.patches if "python-wheel" in path.name)
    assert f'+__version__ = "{upstream.wheel_version}"\n' in wheel.read_text()
    listed = subprocess.run(
        [sys.executable, str(TOOL), "--upstream", version, "--list-patched"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()[:-1]
    assert listed == tool.patched_files(upstream.patches)
    assert 0 < sum(name.startswith("vendor/llama.cpp/") for name in listed) <= MAX_FILES


def test_a_version_without_patches_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, str(TOOL), "--upstream", "../0.3.0", "--list-patched"], capture_output=True, text=True
    )
    assert done.returncode == 1 and f"only for {PINNED}" in done.stderr


@pytest.mark.parametrize("version", UPSTREAMS)
def test_the_patches_apply(version: str, tmp_path: Path) -> None:
    """To the pristine sdist, without fuzz. A hunk that is not at its line must fit there alone: the same switch cases
    stand in seven functions of ops.cpp, and a shifted hunk would silently go into the wrong one."""
    upstream = UPSTREAMS[version]
    try:
        sdist = tool.find_sdist(None, REPO / "build", upstream)
    except tool.BuildError as error:
        if str(error).startswith("cannot download"):
            pytest.skip(str(error))
        raise
    tree = tool.extract(sdist, tmp_path)
    for patch in upstream.patches:
        for name, start, before in hunks(patch):
            lines = (tree / name).read_text(encoding="utf-8").splitlines()
            fits = [i for i in range(len(lines)) if lines[i : i + len(before)] == before]
            assert start in fits or len(fits) == 1, f"{patch.name}: {name}:{start + 1} fits at {fits}"
    tool.apply_patches(tree, upstream.patches)  # raises on a reject, and where a file stays as it was
