#!/usr/bin/env python3
"""A package index of static pages, from a folder of wheels: what pip and uv take as --index-url, by HTTP or as files.

    python tools/build/index.py [--wheel-dir build/dist] [--out build/index]

    OUT/simple/index.html                  the names
    OUT/simple/NAME/index.html             the files, each with its SHA-256 and the Pythons that it is for
    OUT/simple/NAME/FILE, FILE.metadata    the wheels and their METADATA (PEP 658)
    OUT/SHA256SUMS                         as sha256sum -c reads it

PEP 503, the "simple repository API". Made beside its place and moved there when it is complete.
"""

from __future__ import annotations

import argparse
import html
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from build_runtime import REPO, BuildError, sha256

KEYS = ("data-core-metadata", "data-dist-info-metadata")  # of PEP 714 and before it
PAGE = '<!DOCTYPE html>\n<html><head><meta name="pypi:repository-version" content="1.0"><title>{title}</title></head>\n'
PAGE += "<body>\n{lines}\n</body></html>\n"


def normalized(name: str) -> str:
    """PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def metadata(wheel: Path) -> bytes:
    """A wheel's METADATA. Raises BuildError."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
            return archive.read(name)
    except (ValueError, zipfile.BadZipFile) as e:
        raise BuildError(f"{wheel}: not a wheel: {e}; remove it") from None


def page(folder: Path, title: str, links: list[tuple[str, str, dict[str, str]]]) -> None:
    lines = []
    for target, text, attributes in links:
        more = "".join(f' {k}="{html.escape(v)}"' for k, v in attributes.items())
        lines.append(f'<a href="{html.escape(target)}"{more}>{html.escape(text)}</a><br>')
    (folder / "index.html").write_text(PAGE.format(title=html.escape(title), lines="\n".join(lines)))


def make(wheels: list[Path], out: Path) -> None:
    """The index of some wheels at `out`, which is replaced. Raises BuildError, OSError."""
    if not wheels:
        raise BuildError("no wheels to index; run make wheels")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix="unfinished-") as scratch:
        root, sums = Path(scratch) / "index", []
        by_name: dict[str, list[Path]] = {}
        for wheel in wheels:
            by_name.setdefault(normalized(wheel.name.partition("-")[0]), []).append(wheel)
        (root / "simple").mkdir(parents=True)
        page(root / "simple", "Simple index", [(f"{n}/", n, {}) for n in by_name])
        for name, files in by_name.items():
            folder = root / "simple" / name
            folder.mkdir()
            links = []
            for wheel in files:
                about, digest = metadata(wheel), sha256(wheel)
                shutil.copyfile(wheel, folder / wheel.name)
                beside = folder / f"{wheel.name}.metadata"
                beside.write_bytes(about)
                needs = re.search(rb"(?m)^Requires-Python: (.*)$", about)
                attributes = {"data-requires-python": needs[1].decode().strip()} if needs else {}
                attributes |= dict.fromkeys(KEYS, f"sha256={sha256(beside)}")
                links.append((f"{wheel.name}#sha256={digest}", wheel.name, attributes))
                sums.append(f"{digest}  simple/{name}/{wheel.name}\n")
            page(folder, f"Links for {name}", links)
        (root / "SHA256SUMS").write_text("".join(sums))
        if out.exists():
            shutil.rmtree(out)
        root.rename(out)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--wheel-dir", type=Path, default=REPO / "build" / "dist", help="of `make wheels` (build/dist)")
    parser.add_argument("--out", type=Path, default=REPO / "build" / "index", help="the index (build/index)")
    args = parser.parse_args(arguments)
    try:
        wheels = sorted(args.wheel_dir.glob("*.whl"))
        make(wheels, args.out)
    except (BuildError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(wheels)} wheels; pip install --extra-index-url {args.out.resolve().as_uri()}/simple ptqtp-gguf")
    return 0


if __name__ == "__main__":
    sys.exit(main())
