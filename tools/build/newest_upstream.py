#!/usr/bin/env python3
"""What breaks with the newest llama-cpp-python (docs/rebasing.md).

    newest_upstream.py [--version VERSION] [--no-build] [--tests PATH ...]

Downloads the newest sdist from the package index, or VERSION's, tries each patch, and says which hunks of which files
are rejected. If all apply, builds the wheel (minutes), installs it into a virtual environment of its own over this one,
and runs the tests of kernels and runtime there. Everything is below build/newest; patches/ is only read. Exits 1 if
something broke, with a line for each thing. The sdist has no hash in patches/UPSTREAM yet: its SHA-256 is printed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import site
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import build_runtime as builder

HOME = builder.REPO / "build" / "newest"
TESTS = ("tests/llamacpp", "tests/measure", "tests/serve")
LOWEST_ID = 250  # of our types and file types
LOOK = {  # what no compiler reports (patches/README.md): file of llama.cpp, and what to read in it
    "ids of types": ("ggml/include/ggml.h", r"GGML_TYPE_COUNT\s*=\s*(\d+)"),
    "RPC protocol": ("ggml/include/ggml-rpc.h", r"RPC_PROTO_MAJOR_VERSION\s+(\d+)"),
}


def download(version: str | None, pinned: builder.Upstream) -> Path:
    """The sdist of a version, or of the newest, in build/newest/sdist."""
    target = HOME / "sdist"
    target.mkdir(parents=True, exist_ok=True)
    wanted = f"{pinned.package}=={version}" if version else pinned.package
    with tempfile.TemporaryDirectory(dir=target) as scratch:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        pip += ["--no-binary", pinned.package, "--no-build-isolation", "--dest", scratch, wanted]
        done = builder.run(pip)
        found = list(Path(scratch).glob("*.tar.gz"))
        if done.returncode != 0 or len(found) != 1:
            raise builder.BuildError(f"cannot download {wanted}: {builder.last_error(done.stdout)}")
        return found[0].replace(target / found[0].name)


def describe(sdist: Path, pinned: builder.Upstream) -> builder.Upstream:
    """An UPSTREAM for this sdist in build/newest/VERSION, with the version's line of the wheel's patch put right."""
    version = sdist.name.removesuffix(".tar.gz").rpartition("-")[2]
    if version == pinned.version:
        return pinned
    folder = HOME / "patches" / version
    folder.mkdir(parents=True, exist_ok=True)
    fields = {"package": pinned.package, "version": version, "sdist": sdist.name, "sha256": builder.sha256(sdist)}
    fields |= {"ggml": "0", "local": "ptqtp.1"}
    (folder / "UPSTREAM").write_text("".join(f"{key} = {value}\n" for key, value in fields.items()))
    upstream = builder.read_upstream(folder)
    wheel = next(path for path in pinned.patches if "python-wheel" in path.name)
    text = wheel.read_text(encoding="utf-8").replace(pinned.wheel_version, upstream.wheel_version)
    (folder / wheel.name).write_text(text.replace(f'"{pinned.version}"', f'"{version}"'), encoding="utf-8")
    return upstream


def rejected(tree: Path, patches: list[Path]) -> list[str]:
    """Apply the patches as far as they go; a line for each hunk that does not."""
    broken = []
    clean = os.environ | {"GIT_CEILING_DIRECTORIES": str(tree.parent.resolve()), "LC_ALL": "C"}
    for patch in patches:
        command = ["git", "apply", "--whitespace=nowarn", "--reject", "-v", str(patch)]
        done = builder.run(command, cwd=tree, env=clean)
        for name in builder.patched_files([patch]):
            file, left = tree / name, tree / f"{name}.rej"
            if not file.exists():
                broken.append(f"{patch.name}: {name}: upstream has no such file any more")
            elif left.exists():
                broken += [f"{patch.name}: {name}: {hunk}" for hunk in re.findall(r"^@@.*", left.read_text(), re.M)]
                left.unlink()
        if done.returncode != 0 and not any(line.startswith(patch.name) for line in broken):
            broken.append(f"{patch.name}: {builder.last_error(done.stdout)}")
    return broken


def looked_up(tree: Path, pinned: Path | None) -> list[str]:
    """What compiles and may still be wrong: ids that reach ours, another RPC protocol than the pinned version's."""
    broken = []
    for what, (name, pattern) in LOOK.items():
        now = re.search(pattern, (tree / "vendor" / "llama.cpp" / name).read_text(encoding="utf-8"))
        if not now:
            broken.append(f"{what}: {name} does not say it as before")
        elif what == "ids of types" and int(now[1]) >= LOWEST_ID:
            broken.append(f"{what}: upstream has {now[1]}, ours begin with {LOWEST_ID}")
        elif what == "RPC protocol" and pinned:
            before = re.search(pattern, (pinned / "vendor" / "llama.cpp" / name).read_text(encoding="utf-8"))
            if before and before[1] != now[1]:
                broken.append(f"{what}: {before[1]} was, {now[1]} is: choose ours anew (0005)")
    return broken


def environment(wheel: Path) -> Path:
    """A virtual environment with this wheel, and all else of the one that runs this; its Python."""
    folder = HOME / "venv"
    venv.create(folder, clear=True, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    done = builder.run([str(python), "-m", "pip", "-q", "install", "--no-deps", str(wheel)])
    if done.returncode != 0:
        raise builder.BuildError(f"{wheel.name}: {builder.last_error(done.stdout)}")
    own = next((folder / "lib").glob("python*/site-packages"))
    (own / "over.pth").write_text("\n".join(site.getsitepackages()) + "\n")  # behind its own packages
    for name, module in {"ptqtp-gguf": "ptqtp_gguf.__main__ import main", "pytest": "pytest import main"}.items():
        script = folder / "bin" / name
        script.write_text(f"#!{python}\nimport sys\nfrom {module}\nsys.exit(main())\n")
        script.chmod(0o755)
    return python


def failed(python: Path, tests: list[str]) -> list[str]:
    """Run the tests that need the runtime; a line for each that fails."""
    pytest = python.with_name(
        "pytest"
    )  # not -m pytest, which would find this folder's package before the installed one
    command = [str(pytest), "-q", "-m", "runtime", "-p", "no:cacheprovider", "-rfE", *tests]
    done = subprocess.run(command, cwd=builder.REPO, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.splitlines()
    broken = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    builder.say(f"tests: {lines[-1] if lines else 'no output'}")
    return broken or ([] if done.returncode == 0 else [f"tests: pytest ends with {done.returncode}"])


def check(version: str | None, build: bool, tests: list[str]) -> list[str]:
    """A line for each thing that broke."""
    pinned = builder.read_upstream()
    sdist = download(version, pinned)
    upstream = describe(sdist, pinned)
    builder.say(f"{upstream.package} {upstream.version}, SHA-256 {builder.sha256(sdist)}; pinned is {pinned.version}")
    with tempfile.TemporaryDirectory(dir=HOME) as scratch:
        tree = builder.extract(sdist, Path(scratch) / "new")
        ours = builder.REPO / "build" / "sdist" / pinned.sdist
        old = builder.extract(ours, Path(scratch) / "old") if ours.is_file() else None
        broken = looked_up(tree, old) + (hunks := rejected(tree, upstream.patches))
    builder.say(f"{len(upstream.patches)} patches, {len(hunks)} hunks rejected")
    if hunks or not build:
        return broken
    home = builder.REPO / "build" if upstream is pinned else HOME
    return broken + failed(environment(builder.build_runtime(upstream, home, sdist=sdist)), tests)


def main() -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", help="of llama-cpp-python (the newest)")
    parser.add_argument("--no-build", action="store_true", help="try the patches only")
    parser.add_argument("--tests", nargs="+", default=[*TESTS], metavar="PATH", help=f"({' '.join(TESTS)})")
    args = parser.parse_args()
    if not shutil.which("git"):
        parser.error("git is missing (Debian: apt install git)")
    try:
        broken = check(args.version, not args.no_build, args.tests)
    except builder.BuildError as error:
        broken = [str(error)]
    for line in broken:
        print(f"broken: {line}")
    print("nothing broke" if not broken else f"{len(broken)} things broke")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
