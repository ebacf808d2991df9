"""The patches, by version of llama-cpp-python: well-formed, few files, and they apply exactly where they belong.

And the code that they hook in: which files of native/ go along, and that these need no others.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
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


@pytest.mark.slow
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


# ---- native/ in llama.cpp ----

# by room of native/: what its files may include from besides the room itself; a room that is not here may include all
ROOMS: dict[str, set[str]] = {
    "codec": {"ptqtp.h"},
    "simd": set(),
    "kernels": {"ptqtp.h", "codec"},
    "quantize": {"ptqtp.h", "codec", "simd"},
    "ggml": {"ptqtp.h", "codec", "kernels", "quantize"},
    "bulk": {"ptqtp.h", "codec", "kernels", "quantize", "simd"},
    "host": {"ptqtp.h", "codec", "kernels", "quantize", "bulk"},
}
KINDS = (
    "new.c",
    "new.cpp",
    "new.h",
    "new.inc",
    "new.cmake",
    "new.cu",
    "new.cuh",
    "new.comp",
    "new.metal",
    "new.unknown",
)


@pytest.fixture
def native(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of native/ that the tool takes for the real one."""
    copy = tmp_path / "native"
    shutil.copytree(REPO / "native", copy)
    monkeypatch.setattr(tool, "NATIVE", copy)
    return copy


def copied(tree: Path) -> set[str]:
    """What of native/ lies in a tree, after it was copied there."""
    tool.copy_native(tree)
    target = tree / tool.NATIVE_IN_TREE
    return {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}


def test_a_file_of_any_kind_goes_into_llama_cpp(native: Path, tmp_path: Path) -> None:
    """From the rooms that belong there and their subfolders, and from no other."""
    rooms = {path.name for path in native.iterdir() if path.is_dir()}
    taken = {"codec", "kernels", "quantize", "simd", "ggml"}
    assert rooms - taken == {"bulk", "host", "test", "bench", "fuzz", "toolchains"}
    before = copied(tmp_path / "tree")
    stamp = tool.fingerprint(tool.native_files())
    for room in rooms:
        (native / room / "newroom").mkdir()
        for name in KINDS:
            (native / room / name).write_text("// new\n")
            (native / room / "newroom" / name).write_text("// new\n")
    new = {f"{room}/{sub}{name}" for room in taken for sub in ("", "newroom/") for name in KINDS}
    assert copied(tmp_path / "tree") == before | new
    assert tool.fingerprint(tool.native_files()) != stamp


def test_only_what_changed_is_written_again(native: Path, tmp_path: Path) -> None:
    """So that ninja compiles that alone; what is gone from native/ goes, with the folder that it leaves empty."""
    first = copied(tmp_path / "tree")
    target = tmp_path / "tree" / tool.NATIVE_IN_TREE
    for path in target.rglob("*"):
        os.utime(path, (1, 1))
    (native / "codec" / "codec.c").write_text("// changed\n")
    (native / "ggml" / "cpu.c").unlink()
    shutil.rmtree(native / "kernels" / "arm")
    gone = {name for name in first if name.startswith("kernels/arm/") or name == "ggml/cpu.c"}
    assert copied(tmp_path / "tree") == first - gone
    assert not (target / "kernels" / "arm").exists()
    written = {path.relative_to(target).as_posix() for path in target.rglob("*.*") if path.stat().st_mtime > 1}
    assert written == {"codec/codec.c"}


def test_a_file_that_moved_is_another_file(native: Path) -> None:
    stamp = tool.fingerprint(tool.native_files())
    (native / "codec" / "codec.c").rename(native / "quantize" / "codec.c")
    assert tool.fingerprint(tool.native_files()) != stamp


def test_a_room_of_native_includes_only_from_those_above_it() -> None:
    folder = REPO / "native"
    files = [path for path in folder.rglob("*") if path.suffix in (".c", ".h", ".inc", ".cpp")]
    assert len(files) > 60
    for path in files:
        place = path.relative_to(folder)
        room = place.parts[0]
        for name in re.findall(r'^# *include "(.*)"', path.read_text(encoding="utf-8"), re.MULTILINE):
            if not (folder / name).is_file():  # ggml's own
                assert room in ("ggml", "fuzz") and "/" not in name, f"{place} includes {name}"
            elif room in ROOMS:
                assert Path(name).parts[0] in {room, *ROOMS[room]}, f"{place} includes {name}"
