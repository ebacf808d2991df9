#!/usr/bin/env python3
"""Write requirements/*.lock: exact versions, and the SHA-256 of every file that an index has of them.

    setup.lock  setup.in and all that it needs, on every platform and from Python 3.10 on
    cpu.lock    torch, the CPU builds ("+cpu") that pip found when a lock was written: an index of its own has them
    torch.lock  torch, the index' builds
    cuda.lock   what its build for Linux needs besides: NVIDIA's libraries
    wheels.lock wheels.in, for `make wheels`: packs and audits wheels, without what setup.lock has

Versions that a lock holds stay unless setup.in asks for others; --upgrade looks for newer ones. Needs uv and pip in
this Python. No address of an index gets into a lock: pip's own settings say where to look.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "requirements"
TORCH = "torch==2.13.0"
OLDEST = "3.10"
HEADER = "# By `make lock`, not by hand. pip install --no-deps --require-hashes -r requirements/{name}\n"
AT_HAND = re.compile(r"^# (\S+\.whl) sha256:([0-9a-f]{64})$", re.MULTILINE)


class LockError(Exception):
    """What went wrong, in one line."""


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise LockError(f"{' '.join(command[:5])} ...: {' '.join(lines)[:600]}")
    return done.stdout


def resolve(requirements: Sequence[str], out: Path | None, *options: str, excluding: Sequence[str] = ()) -> str:
    """The lock of some requirements, by uv, for every platform. out: the lock in use, whose versions stay."""
    with tempfile.TemporaryDirectory() as scratch:
        given, left_out = Path(scratch) / "in.txt", Path(scratch) / "excluded.txt"
        given.write_text("\n".join(requirements) + "\n")
        left_out.write_text("\n".join(excluding) + "\n")
        output = Path(scratch) / "out.txt"
        if out and out.exists():
            output.write_text(out.read_text())
        command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal", "--generate-hashes"]
        command += ["--no-header", "--no-annotate", "--no-python-downloads", "--python-version", OLDEST]
        run(*command, "--excludes", str(left_out), *options, str(given), "--output-file", str(output))
        return output.read_text()


def names(lock: str) -> list[str]:
    return re.findall(r"^([A-Za-z0-9][\w.-]*)==", lock, re.MULTILINE)


def cpu_builds(lock: Path) -> dict[str, str]:
    """SHA-256 by file name of torch's CPU builds: those the lock knows, and the one that pip would take here."""
    version = TORCH.partition("==")[2]
    known = dict(AT_HAND.findall(lock.read_text())) if lock.exists() else {}
    known = {name: digest for name, digest in known.items() if name.startswith(f"torch-{version}+")}
    with tempfile.TemporaryDirectory() as scratch:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch]
        # never the index' own: gigabytes, and in the lock anyway
        done = subprocess.run([*download, f"{TORCH}+cpu"], capture_output=True, check=False)
        if done.returncode == 0:
            for wheel in Path(scratch).glob("*.whl"):
                known[wheel.name] = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return dict(sorted(known.items()))


def cpu_lock(out: Path) -> str:
    """Apart from torch.lock: of files that a lock allows, pip prefers one whose hash an index tells."""
    builds = cpu_builds(out)
    comments = "".join(f"# {name} sha256:{digest}\n" for name, digest in builds.items())
    hashes = [f"    --hash=sha256:{digest}" for digest in sorted(builds.values())]
    return comments + " \\\n".join([f"{TORCH}+cpu", *hashes]) + "\n"


def write(name: str, text: str) -> None:
    if "://" in text or "--index" in text or "--find-links" in text:
        raise LockError(f"{name}: would hold the address of an index")
    (FOLDER / name).write_text(HEADER.format(name=name) + text)
    print(f"{name}: {len(names(text))} files' versions, {text.count('--hash=')} hashes")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--upgrade", action="store_true", help="newer versions of what setup.in leaves open")
    args = parser.parse_args(arguments)
    options = ["--upgrade"] if args.upgrade else []
    try:
        wanted = (FOLDER / "setup.in").read_text().splitlines()
        setup = resolve(wanted, FOLDER / "setup.lock", *options, excluding=["torch"])
        write("setup.lock", setup)
        write("cpu.lock", cpu_lock(FOLDER / "cpu.lock"))
        write("torch.lock", resolve([TORCH], FOLDER / "torch.lock", "--no-deps"))
        not_again = [arg for name in ["torch", *dict.fromkeys(names(setup))] for arg in ("--no-emit-package", name)]
        wanted = (FOLDER / "wheels.in").read_text().splitlines()
        write("wheels.lock", resolve(wanted, FOLDER / "wheels.lock", *options, *not_again))
        write("cuda.lock", resolve([TORCH], FOLDER / "cuda.lock", *options, *not_again))
    except (LockError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
