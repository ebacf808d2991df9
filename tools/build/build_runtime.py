#!/usr/bin/env python3
"""Build the runtime: llama-cpp-python with our tensor types, as a wheel.

    sdist (patches/UPSTREAM) -> check SHA-256 -> extract -> patches/*.patch -> native/ -> pip wheel

With --upstream VERSION, UPSTREAM and the patches in patches/older/VERSION stand in for those of the same name.

One CMake tree makes the Python bindings' libraries and llama.cpp's tools; both lie in the wheel, with the converter.
A second run compiles what changed, or nothing. Needs a C++ compiler, git (or patch), and in this Python: pip,
scikit-build-core, cmake and ninja. The build itself uses no network.
"""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

REPO = Path(__file__).resolve().parents[2]
PATCHES = REPO / "patches"
NATIVE = REPO / "native"
# What goes into ggml, whole folders and whatever a file is called. The others are tests, benchmarks, and what only a
# converter needs.
NATIVE_ROOMS = ("codec", "kernels", "quantize", "simd", "ggml")
NATIVE_TOP = ("ptqtp.h", "sources.cmake")
NATIVE_IN_TREE = "vendor/llama.cpp/ggml/src/ptqtp"
TREE_STAMP = ".ptqtp-tree"

# A portable build: ggml-cpu once for each of upstream's lists of instruction sets, the best of them chosen when it
# starts. Without OpenMP: its library is not on every system, and a variant that cannot be loaded is skipped silently.
PORTABLE = {"GGML_NATIVE": "OFF", "GGML_BACKEND_DL": "ON", "GGML_CPU_ALL_VARIANTS": "ON", "GGML_OPENMP": "OFF"}
# Environment that changes what the compiler makes, so part of the stamp.
BUILD_ENVIRONMENT = ("CMAKE_ARGS", "CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "SOURCE_DATE_EPOCH")


class BuildError(Exception):
    """What went wrong and the way out, in one line."""


@dataclass(frozen=True)
class Upstream:
    """A file UPSTREAM: of patches/, or of an older version's folder below it."""

    folder: Path
    package: str
    version: str
    sdist: str
    sha256: str
    ggml: str
    local: str

    @property
    def wheel_version(self) -> str:
        return f"{self.version}+{self.local}"

    @property
    def patches(self) -> list[Path]:
        """patches/*.patch, or the older version's own file of that name."""
        files = {path.name: path for place in (PATCHES, self.folder) for path in place.glob("[0-9]*.patch")}
        return [files[name] for name in sorted(files)]

    def home(self, build: Path) -> Path:
        """Where tree, objects and wheels lie: an older version's apart."""
        return build if self.folder == PATCHES else build / "older" / self.version


def read_upstream(folder: Path = PATCHES) -> Upstream:
    path = folder / "UPSTREAM"
    fields = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            key, _, value = line.partition("=")
            fields[key.strip()] = value.strip()
    try:
        return Upstream(folder, **fields)
    except TypeError as error:
        raise BuildError(f"{path}: {error}") from error


def upstreams() -> dict[str, Upstream]:
    """By version, the pinned one first."""
    folders = [PATCHES, *(path.parent for path in sorted(PATCHES.glob("older/*/UPSTREAM")))]
    return {upstream.version: upstream for upstream in map(read_upstream, folders)}


def choose_upstream(version: str | None) -> Upstream:
    if version is None:
        return read_upstream()
    known = upstreams()
    if version not in known:
        raise BuildError(f"no patches for llama-cpp-python {version}, only for {', '.join(known)}")
    return known[version]


def patched_files(patches: Sequence[Path]) -> list[str]:
    """The files that the patches touch, relative to the sdist's root."""
    names = set()
    for patch in patches:
        names.update(re.findall(r"^\+\+\+ b/(\S+)", patch.read_text(encoding="utf-8"), re.MULTILINE))
    return sorted(names)


def native_files() -> list[Path]:
    """The files of native/ that are copied into ggml."""
    inside = (path for room in NATIVE_ROOMS for path in sorted((NATIVE / room).rglob("*")) if path.is_file())
    return [*(NATIVE / name for name in NATIVE_TOP), *inside]


def say(text: str) -> None:
    print(text, flush=True)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(paths: Sequence[Path], *more: str) -> str:
    """Of the files' contents and of where they lie in the repository."""
    digest = hashlib.sha256()
    for path in paths:
        place = Path(os.path.relpath(path, REPO)).as_posix()
        digest.update(f"{place} {sha256(path)}\n".encode())
    for text in more:
        digest.update(f"{text}\n".encode())
    return digest.hexdigest()


# ---- the sdist ----


def check_sdist(sdist: Path, upstream: Upstream) -> None:
    if not sdist.is_file():
        raise BuildError(f"{sdist}: no such file")
    found = sha256(sdist)
    if found != upstream.sha256:
        wanted = f"{upstream.folder.relative_to(REPO).as_posix()}/UPSTREAM has {upstream.sha256}"
        raise BuildError(f"{sdist}: SHA-256 is {found}, {wanted}; delete the file")


def find_sdist(given: Path | None, build: Path, upstream: Upstream) -> Path:
    """A checked sdist: the one given, one downloaded before, or a download."""
    places = [given] if given else [build / "sdist" / upstream.sdist, build / upstream.sdist]
    for place in places:
        if given or place.is_file():
            check_sdist(place, upstream)
            return place
    say(f"download {upstream.sdist}")
    target = build / "sdist" / upstream.sdist
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        # with hashes required, pip compares before it runs anything of the sdist
        requirements = Path(scratch) / "requirements.txt"
        requirements.write_text(f"{upstream.package}=={upstream.version} --hash=sha256:{upstream.sha256}\n")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        pip += ["--no-binary", upstream.package, "--no-build-isolation", "--require-hashes"]
        result = run([*pip, "--dest", scratch, "--requirement", str(requirements)])
        if result.returncode != 0:
            raise BuildError(f"cannot download {upstream.package} {upstream.version}: {last_error(result.stdout)}")
        got = Path(scratch) / upstream.sdist
        check_sdist(got, upstream)
        got.replace(target)
    return target


def extract(sdist: Path, into: Path) -> Path:
    """Extract below `into`, without the sdist's stale .git; returns the top directory."""
    tops = set()
    with tarfile.open(sdist) as archive:
        members = []
        for member in archive.getmembers():
            path = PurePosixPath(member.name)
            if path.is_absolute() or ".." in path.parts or not (member.isfile() or member.isdir()):
                raise BuildError(f"{sdist}: unexpected member {member.name!r}")
            if ".git" not in path.parts:
                members.append(member)
                tops.add(path.parts[0])
        safe: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(into, members, **safe)
    if len(tops) != 1:
        raise BuildError(f"{sdist}: expected one top directory, found {sorted(tops)}")
    return into / tops.pop()


# ---- the patched tree ----


def run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **options}
    return subprocess.run(list(command), check=False, **options)


def last_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    return (errors or lines or ["no output"])[0 if errors else -1]


def apply_patches(tree: Path, patches: Sequence[Path]) -> None:
    """Apply with exact context, and make sure that each file named has changed: git skips silently what it takes to
    lie outside its repository."""
    if shutil.which("git"):
        command = ["git", "apply", "--whitespace=nowarn"]
    elif shutil.which("patch"):
        command = ["patch", "--strip=1", "--fuzz=0", "--batch", "--forward", "--silent", "--input"]
    else:
        raise BuildError("neither git nor patch found; install one of them (Debian: apt install git)")
    # no repository around the tree, and no settings of the user's
    clean = {"GIT_CEILING_DIRECTORIES": str(tree.parent.resolve()), "GIT_CONFIG_NOSYSTEM": "1"}
    clean |= {"GIT_CONFIG_GLOBAL": os.devnull, "LC_ALL": "C"}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | clean
    for patch in patches:
        files = [tree / name for name in patched_files([patch])]
        before = [file.read_bytes() if file.exists() else b"" for file in files]
        result = run([*command, str(patch)], cwd=tree, env=environment)
        if result.returncode != 0:
            raise BuildError(f"{patch.name} does not apply: {last_error(result.stdout)}")
        for file, old in zip(files, before, strict=True):
            if not file.exists() or file.read_bytes() == old:
                raise BuildError(f"{patch.name} left {file.relative_to(tree)} as it was")


def keep_times(new: Path, old: Path) -> None:
    """Give files that are equal to the last tree's their times, all others now: ninja then compiles what changed."""
    for file in new.rglob("*"):
        if file.is_file():
            last = old / file.relative_to(new)
            if last.is_file() and filecmp.cmp(file, last, shallow=False):
                os.utime(file, ns=(last.stat().st_atime_ns, last.stat().st_mtime_ns))
            else:
                os.utime(file)


def make_tree(sdist: Path, tree: Path, patches: Sequence[Path], stamp: str) -> None:
    """Make the patched tree beside its place and move it there when it is complete."""
    tree.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=tree.parent, prefix="unfinished-") as scratch:
        say(f"extract {sdist.name}")
        fresh = extract(sdist, Path(scratch))
        say(f"apply {len(patches)} patches to {len(patched_files(patches))} files")
        apply_patches(fresh, patches)
        (fresh / TREE_STAMP).write_text(stamp)
        ours = tree / NATIVE_IN_TREE
        if ours.is_dir():
            shutil.copytree(ours, fresh / NATIVE_IN_TREE)
        keep_times(fresh, tree)
        if tree.exists():
            shutil.rmtree(tree)
        fresh.rename(tree)


def copy_native(tree: Path) -> None:
    """Copy the rooms of native/ into the tree, with their subfolders, touching only what changed."""
    target = tree / NATIVE_IN_TREE
    wanted = {target / path.relative_to(NATIVE): path for path in native_files()}
    folders = {folder for file in wanted for folder in file.parents}
    for old in sorted(target.rglob("*"), reverse=True):  # what a folder holds before the folder
        if old.is_dir() and not old.is_symlink():
            if old not in folders:
                old.rmdir()
        elif old not in wanted:
            old.unlink()
    for file, path in wanted.items():
        if not file.is_file() or not filecmp.cmp(path, file, shallow=False):
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, file)


# ---- the wheel ----


def check_tools() -> None:
    have = {
        "pip": importlib.util.find_spec("pip") is not None,
        "scikit-build-core": importlib.util.find_spec("scikit_build_core") is not None,
        "cmake": importlib.util.find_spec("cmake") is not None or shutil.which("cmake") is not None,
        "ninja": importlib.util.find_spec("ninja") is not None or shutil.which("ninja") is not None,
    }
    missing = [name for name, found in have.items() if not found]
    if "pip" in missing:
        raise BuildError(f"{sys.executable} has no pip; make a virtual environment (python3 -m venv) for it")
    if missing:
        raise BuildError(f"missing {', '.join(missing)}; run: {sys.executable} -m pip install {' '.join(missing)}")


def cmake_defines(upstream: Upstream, portable: bool) -> dict[str, str]:
    # upstream asks git for these two and would find our repository
    defines = {"LLAMA_BUILD_NUMBER": "0", "LLAMA_BUILD_COMMIT": upstream.local}
    if portable:
        defines |= PORTABLE
    return defines


@contextlib.contextmanager
def pip_wheel(tree: Path, cmake_dir: Path, defines: dict[str, str], jobs: int, log: Path) -> Iterator[Path]:
    """Run pip; yields the wheel, in a directory that goes away."""
    with tempfile.TemporaryDirectory(dir=cmake_dir.parent, prefix="wheel-") as scratch:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--verbose", "--no-deps"]
        command += ["--no-build-isolation", "--wheel-dir", scratch, f"--config-settings=build-dir={cmake_dir}"]
        command += [f"--config-settings=cmake.define.{key}={value}" for key, value in defines.items()]
        command.append(str(tree))
        environment = os.environ | {"CMAKE_BUILD_PARALLEL_LEVEL": str(jobs)}
        shown = 0
        with log.open("w", encoding="utf-8") as out:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
            )
            assert process.stdout is not None
            for line in process.stdout:
                out.write(line)
                if step := re.match(r"\s*\[(\d+)/(\d+)\]", line):
                    done, total = int(step[1]), int(step[2])
                    if done * 10 // total > shown:
                        shown = done * 10 // total
                        say(f"  {done} of {total}")
        if process.wait() != 0:
            lines = log.read_text(encoding="utf-8").splitlines()
            causes = [
                line.strip() for line in lines if re.search(r"(^|\s)((fatal )?error|ERROR):|\bCMake Error\b", line)
            ]
            cause = causes[0] if causes else "no error line found"
            raise BuildError(f"the build failed: {cause} (all output: {log})")
        wheels = list(Path(scratch).glob("*.whl"))
        if len(wheels) != 1:
            raise BuildError(f"pip made {len(wheels)} wheels (all output: {log})")
        yield wheels[0]


def build_runtime(
    upstream: Upstream,
    build: Path,
    wheel_dir: Path | None = None,
    sdist: Path | None = None,
    portable: bool = False,
    jobs: int = 0,
    force: bool = False,
) -> Path:
    """The wheel, built or already there."""
    build = build.resolve()
    home = upstream.home(build)
    wheel_dir = wheel_dir.resolve() if wheel_dir else home / "wheels"
    kind = "portable" if portable else "native"
    tree = home / "runtime" / upstream.sdist.removesuffix(".tar.gz")
    cmake_dir = home / "runtime" / f"cmake-{kind}"  # one each: CMake keeps the instruction sets of its first run
    stamp_file = home / "runtime" / f"{kind}.json"
    defines = cmake_defines(upstream, portable)
    hooks = [upstream.folder / "UPSTREAM", *upstream.patches]
    tree_stamp = fingerprint(hooks)
    options = json.dumps([defines, {key: os.environ.get(key) for key in BUILD_ENVIRONMENT}])
    stamp = fingerprint([*hooks, *native_files()], options)

    if force:
        for path in (tree, cmake_dir, *tree.parent.glob("unfinished-*")):
            shutil.rmtree(path, ignore_errors=True)
        stamp_file.unlink(missing_ok=True)
    if stamp_file.is_file():
        last = json.loads(stamp_file.read_text())
        wheel = wheel_dir / str(last["wheel"])
        if last["stamp"] == stamp and wheel.is_file() and sha256(wheel) == last["sha256"]:
            say(f"up to date: {wheel}")
            return wheel

    check_tools()
    stamped = tree / TREE_STAMP
    if not stamped.is_file() or stamped.read_text() != tree_stamp:
        make_tree(find_sdist(sdist, build, upstream), tree, upstream.patches, tree_stamp)
    copy_native(tree)

    jobs = jobs if jobs > 0 else os.cpu_count() or 1
    say(f"build ({kind}, {jobs} jobs; the first time takes minutes)")
    log = home / "runtime" / f"{kind}.log"
    with pip_wheel(tree, cmake_dir, defines, jobs, log) as made:
        if f"-{upstream.wheel_version}-" not in made.name:
            raise BuildError(f"the wheel is {made.name}, expected version {upstream.wheel_version}")
        wheel_dir.mkdir(parents=True, exist_ok=True)
        for old in wheel_dir.glob("llama_cpp_python-*+ptqtp.*.whl"):
            old.unlink()
        wheel = wheel_dir / made.name
        shutil.move(made, wheel)
    stamp_file.write_text(json.dumps({"stamp": stamp, "wheel": wheel.name, "sha256": sha256(wheel)}))
    say(f"built {wheel}")
    return wheel


def extract_pristine(upstream: Upstream, build: Path, directory: Path, sdist: Path | None) -> None:
    if directory.exists():
        raise BuildError(f"{directory}: exists already")
    found = find_sdist(sdist, build, upstream)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix="unfinished-") as scratch:
        extract(found, Path(scratch)).rename(directory)
    say(f"unpatched: {directory}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--upstream", metavar="VERSION", help="an older llama-cpp-python (the one of patches/UPSTREAM)")
    parser.add_argument("--build-dir", type=Path, default=REPO / "build", help="sdist, tree and objects (build)")
    parser.add_argument("--wheel-dir", type=Path, help="where the wheel goes (<build-dir>/[older/VERSION/]wheels)")
    parser.add_argument("--sdist", type=Path, help="use this file, do not download")
    parser.add_argument("--portable", action="store_true", help="for any x86-64 or 64-bit ARM CPU, not this one alone")
    parser.add_argument("--jobs", type=int, default=0, help="compilers at a time (all cores)")
    parser.add_argument("--force", action="store_true", help="start over: new tree, new objects")
    parser.add_argument("--pristine", type=Path, metavar="DIR", help="extract the unpatched tree to DIR and stop")
    parser.add_argument("--list-patched", action="store_true", help="list the files that the patches touch and stop")
    args = parser.parse_args(arguments)
    try:
        upstream = choose_upstream(args.upstream)
        if args.list_patched:
            files = patched_files(upstream.patches)
            inside = sum(name.startswith("vendor/llama.cpp/") for name in files)
            print("\n".join([*files, f"{len(files)} files, {inside} of them llama.cpp's"]))
        elif args.pristine:
            extract_pristine(upstream, args.build_dir, args.pristine, args.sdist)
        else:
            build_runtime(upstream, args.build_dir, args.wheel_dir, args.sdist, args.portable, args.jobs, args.force)
    except (BuildError, OSError, tarfile.TarError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
