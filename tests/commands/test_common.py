"""Sizes as a user writes them."""

from __future__ import annotations

from ptqtp_gguf.commands.common import parse_size


def test_sizes() -> None:
    given = {"500M": 500_000_000, "2g": 2 * 10**9, "1.5GiB": 3 << 29, "4096": 4096, "1KB": 1000}
    assert {text: parse_size(text) for text in given} == given
