"""The versions that RELEASE.md names stand in several places each, and these agree."""

from __future__ import annotations

import re
import sys

from helpers import REPO

import ptqtp_gguf
from ptqtp_gguf.codec import FORMAT_VERSION

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
UPSTREAM = dict(re.findall(r"^(\w+) = (.+)$", (REPO / "patches" / "UPSTREAM").read_text(), re.MULTILINE))


def test_the_package() -> None:
    newest = re.search(r"^## (\S+) - (.+)$", (REPO / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and re.fullmatch(r"unreleased|\d{4}-\d\d-\d\d", newest[2])
    assert PROJECT["version"] == ptqtp_gguf.__version__ == newest[1]


def test_the_runtime() -> None:
    """The extra asks for the version that the patches are for; the wheel says whose it is."""
    assert PROJECT["optional-dependencies"]["run"] == [f"{UPSTREAM['package']}=={UPSTREAM['version']}"]
    wheel = next((REPO / "patches").glob("*-python-wheel.patch")).read_text()
    assert f'+__version__ = "{UPSTREAM["version"]}+{UPSTREAM["local"]}"\n' in wheel
    assert re.fullmatch(r"ptqtp\.[1-9]\d*", UPSTREAM["local"])


def test_the_format() -> None:
    native = re.search(r"\bPTQTP_FORMAT_VERSION\b\D+(\d+)", (REPO / "native" / "ptqtp.h").read_text())
    assert native and int(native[1]) == FORMAT_VERSION
