"""What `inspect` prints of hostile text does no harm."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from helpers import rewritten

from ptqtp_gguf.conversion.pipeline import convert
from ptqtp_gguf.files.gguf import KV, kv_string

MARKUP = "[red]a[/nothing]"
HOSTILE = MARKUP + "\x1b[31m\nb\x07\u202e"


def test_hostile_text(run: Callable[..., str], tiny_gguf: Path, tmp_path: Path) -> None:
    """Markup is shown, not obeyed; control characters are escaped; what is not a number, or not UTF-8, is no crash.

    Names with control characters are refused by the reader (tests/attacks); values may hold them.
    """
    bad = [
        kv_string("general." + MARKUP, HOSTILE * 100),
        kv_string("general.architecture", HOSTILE),
        kv_string("tokenizer.ggml.pre", HOSTILE),
        kv_string("tokenizer.chat_template." + MARKUP, HOSTILE),
        KV("general.broken", 8, b"\x02" + bytes(7) + b"\xff\xfe"),
        KV("general.nan", 6, np.float32("nan").tobytes()),
        KV("general.infinities", 9, b"\6\0\0\0\2" + bytes(7) + np.array([np.inf, 1], "<f4").tobytes()),
    ]
    source = rewritten(tiny_gguf, tmp_path / "bad.gguf", bad, {"blk.0.attn_q.weight": "blk.0." + MARKUP + ".weight"})
    ours = tmp_path / "ours.gguf"
    convert(source, ours)
    options = ((), ("-T", "-H", "-K"), ("--kv", "general." + MARKUP), ("--json", "-T"), ("--json", "-K"))
    pages = [run("inspect", ours, *o) for o in options]
    pages += [run("verify", ours, "--against", source), run("diff", source, ours, "-T")]
    pages += [run("convert", source, tmp_path / "not.gguf", "--dry-run")]
    for page in pages:
        assert not set("\x1b\x07\u202e") & set(page)
        assert "[red]a[/nothing]" in page
    assert "[red]a[/nothing]\\x1b[31m" in pages[0] and f"({100 * len(HOSTILE)} characters)" in pages[0]
    assert "[red]a[/nothing]\\x1b[31m" in pages[1] and "not UTF-8" in pages[1]
    report = json.loads(pages[3])
    assert report["metadata"]["general.nan"] == "nan" and report["metadata"]["general.infinities"] == ["inf", 1.0]
    assert len(json.loads(pages[4])["metadata"]["general." + MARKUP]) == 100 * len(HOSTILE)
