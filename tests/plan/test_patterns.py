"""Patterns that people write are taken."""

from __future__ import annotations

from ptqtp_gguf.plan import patterns


def test_patterns_that_people_write_are_taken() -> None:
    usual = [
        ".*",
        "attn_v|attn_k",
        "[qk]{1,2}",
        r"(?<!x)\.\d{1,3}\.",
        r"blk\.\d+\.ffn_(up|gate|down)(_exps|_shexp)?\.weight",
        r"(enc\.)?blk\.(0|1|2|3|1[0-9])\..*(attn|ffn).*\.weight",
    ]
    for text in usual:
        patterns.compile_bounded(text)
