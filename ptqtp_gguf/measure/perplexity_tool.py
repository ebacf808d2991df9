"""The same figures by llama.cpp's own llama-perplexity, which most published ones are made with.

It keeps the reference's logits on the disk, in 16 bits, and leaves out of the divergence what the reference gives less
than exp(-16): its figures differ from those of quality.py by that, and a file's divergence from itself is not quite 0.
"""

from __future__ import annotations

import contextlib
import math
import re
import struct
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from ..errors import BenchError, InputError, Interrupted, OutputError, RuntimeMissing
from ..files import check_space, file_size, open_regular, write_text
from ..llamacpp import install, why_not_loadable
from ..progress import Progress, no_progress
from ..source import GgufSource
from .quality import Evaluation
from .scoring import Quality
from .text import File, Text, TextFacts, load_text, open_files

NUMBER = r"(-?(?:[0-9.]+(?:[eE][+-]?[0-9]+)?|nan|inf))"
PRINTED = {  # what llama-perplexity --kl-divergence prints; "x +/- its standard error" where the second name is given
    r"Mean PPL\(Q\)\s*": ("ppl", "ppl_se"),
    r"Mean PPL\(base\)\s*": ("ppl_reference", None),
    r"Mean PPL\(Q\)/PPL\(base\)\s*": ("ppl_ratio", "ppl_ratio_se"),
    r"Mean\s+KLD": ("kld", "kld_se"),
    r"Maximum KLD": ("kld_max", None),
    r"Median\s+KLD": ("kld_median", None),
    r"99\.0%\s+KLD": ("kld_99", None),
    r"99\.9%\s+KLD": ("kld_999", None),
    r"RMS \u0394p\s*": ("rms_dp", "rms_dp_se"),
    r"Same top p": ("same_top", "same_top_se"),
}
LAST = re.compile(r"^Same top p:", re.MULTILINE)
RETRIES = 5  # it prints from a thread that it does not wait for: on a busy machine the last lines get lost
_HEAD = struct.Struct("<8sIII")  # of a file of logits: magic, tokens a window, vocabulary, windows
_MAGIC = b"_logits_"
_SHORT = 12  # bytes of one of a text that is shorter than a window: it ends behind the first number


def evaluate_by_tool(
    reference: Path,
    candidates: Sequence[Path],
    *,
    text: Path | None = None,
    ctx: int = 512,
    windows: int = 0,
    threads: int = 0,
    state: Path | None = None,
    progress: Progress = no_progress,
) -> Evaluation:
    """What quality.evaluate measures, by llama-perplexity. Its parameters, but `state`.

    state  folder where the reference's logits are kept, 16 bits for each of (ctx / 2, vocabulary) a window; None: a
           temporary one

    Of the reference only its perplexity is known. Raises InputError, OutputError, RuntimeMissing; BenchError where the
    tool does not print its figures; Interrupted.
    """
    found, files = load_text(text), open_files([reference, *candidates], progress)
    words = ["-c", str(ctx), "-b", str(ctx), *(["-t", str(threads)] if threads else [])]
    words += ["--chunks", str(windows)] if windows else []
    steps = 1 + len(candidates)
    with ExitStack() as stack:
        folder = state or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ptqtp-")))
        try:
            progress("evaluating", 0, steps, f"the reference, {reference.name}")
            logits, n = _logits(files[0], found, ctx, windows, words, folder)
            quality = []
            for i, path in enumerate(candidates, 1):
                progress("evaluating", i, steps, path.name)
                quality.append(_figures(path, [*words, "--kl-divergence-base", str(logits)], n, ctx))
        except KeyboardInterrupt:
            raise Interrupted("interrupted; the reference's logits are kept" if state else "interrupted") from None
    progress("evaluating", steps, steps, "")
    base = Quality(ppl=quality[0].ppl_reference, windows=n, tokens=quality[0].tokens) if quality else None
    facts = TextFacts(found.name, found.sha256, found.builtin, n, ctx, n * ctx)
    return Evaluation(quality, base, facts, [f.sha256 for f in files], n * len(candidates))


def _logits(file: File, text: Text, ctx: int, windows: int, words: list[str], folder: Path) -> tuple[Path, int]:
    """The reference's logits, made unless they are there, and their number of windows."""
    path = folder / f"{file.sha256[:16]}-{text.sha256[:16]}-{windows}x{ctx}.logits"
    n = None
    with contextlib.suppress(OutputError):  # what is damaged is made again
        n = windows_of(path) if path.exists() else None
    if n is None:
        folder.mkdir(parents=True, exist_ok=True)
        with GgufSource(file.parts[0]) as source:
            vocabulary = max((t.shape[1] for t in source.tensors if t.name == "token_embd.weight"), default=0)
        most = windows or len(text.text.encode()) // ctx + 1
        check_space(folder, most * (ctx // 2) * 2 * (vocabulary + 8))
        part, scored = path.with_suffix(".partial"), path.with_suffix(".txt")
        write_text(scored, text.text)
        line = ["-m", str(file.parts[0]), "-f", str(scored), "--kl-divergence-base", str(part), *words]
        _tool(file.parts[0], *line)
        scored.unlink()
        try:
            n = windows_of(part)
        except OutputError as e:  # llama-perplexity does not look whether it could write
            part.unlink()
            raise OutputError(f"{e}; is the disk full? Give another --state") from None
        part.replace(path)
    if not n:
        raise InputError(f"text {text.name}: less than a window of {ctx} tokens; give more text, or a smaller --ctx")
    return path, n


def windows_of(path: Path) -> int:
    """Windows in a file of logits of llama-perplexity; 0: the text was too short. Raises OutputError for others.

    Upstream's format (tools/perplexity/perplexity.cpp): the head, int32 tokens (windows, ctx), and for the second half
    of each window but its last token 2 * ceil(vocabulary / 2) + 4 numbers of 16 bits.
    """
    with open_regular(path, OutputError) as f:
        size, head = file_size(f, str(path)), f.read(_HEAD.size)
    if head[:8] == _MAGIC and size == _SHORT:
        return 0
    if len(head) == _HEAD.size:
        magic, ctx, vocabulary, n = _HEAD.unpack(head)
        rows = ctx - 1 - ctx // 2
        if magic == _MAGIC and n and size == _HEAD.size + n * (4 * ctx + 2 * rows * ((vocabulary + 1) // 2 * 2 + 4)):
            return int(n)
    raise OutputError(f"{path}: not all logits are in it, {size} bytes")


def _tool(path: Path, *words: str) -> str:
    """What llama-perplexity prints. Raises InputError where the runtime does not load the file, RuntimeMissing."""
    try:
        return install.run_tool("llama-perplexity", *words)
    except RuntimeMissing:
        if why := why_not_loadable(path):
            raise InputError(f"{path}: the runtime cannot load this file: {why}") from None
        raise


def _figures(path: Path, words: list[str], windows: int, ctx: int) -> Quality:
    """One file against the logits; again where the tool lost the end of what it printed."""
    for _ in range(RETRIES):
        printed = _tool(path, "-m", str(path), *words, "--kl-divergence")
        if LAST.search(printed):
            break
    return parse(printed, windows, windows * (ctx - ctx // 2 - 1))


def parse(printed: str, windows: int, tokens: int) -> Quality:
    """The figures of llama-perplexity --kl-divergence; None for nan and inf. Raises BenchError where a line is missing.

    windows, tokens  that were scored, which it does not print
    """
    found: dict[str, float | None] = {}
    for pattern, (name, error) in PRINTED.items():
        match = re.search(rf"^{pattern}:\s*{NUMBER}(?:\s*\u00b1\s*{NUMBER})?", printed, re.MULTILINE)
        if not match or (error and match[2] is None):
            last = next((line for line in reversed(printed.splitlines()) if line.strip()), "nothing")
            raise BenchError(f"llama-perplexity printed no figure for {name}; its last line: {last.strip()}")
        for key, value in ((name, match[1]), (error, match[2])):
            if key:
                found[key] = float(value) if math.isfinite(float(value)) else None
    return Quality(windows=windows, tokens=tokens, **found)
