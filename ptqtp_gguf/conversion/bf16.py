"""The source of a conversion, ready to be read; with --keep-bf16 its intermediate GGUF is made first, and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import InputError, OutputError
from ..files import check_space, check_target, scratch_path, system_errors
from ..plan import Options
from ..progress import Progress, no_progress
from ..source import GgufSource, Source, checkpoint, notes, open_source
from .records import ConversionJournal


@contextmanager
def ready_source(source: Path, out: Path, options: Options, progress: Progress, finished: bool) -> Iterator[Source]:
    """The source, ready to be read; with keep_bf16 its intermediate GGUF is made first, unless it was before.

    finished: the conversion was killed when only names were missing, so the GGUF's note may be gone already
    """
    bf16 = options.keep_bf16
    if bf16 is None:
        scratch = out.with_name(f".{out.name}.bf16.gguf")
        with open_source(source, progress, scratch, options.trust_code, options.pre_tokenizer) as opened:
            yield opened
        return
    if checkpoint.is_gguf(source):
        raise InputError(f"{source}: is a GGUF already; --keep-bf16 is for checkpoint folders")
    if bf16.resolve() == out.resolve():
        raise OutputError(f"{out}: is also the name to keep the bf16 GGUF under; give it one of its own")
    found = checkpoint.check(source, options.trust_code, options.pre_tokenizer)
    with ConversionJournal(bf16) as note:
        files = [list(s) for s in checkpoint.stamp(source)]
        mine = note.job == {"bf16": files, "made": _identity(bf16)}
        if not (mine or (finished and bf16.exists())):
            check_target(bf16, source, options.force)
            note.clear()
            # noted before it gets its name: of one without a note nobody knows where it comes from
            make_bf16(found, bf16, progress, lambda work: note.begin({"bf16": files, "made": _identity(work)}))
        with GgufSource(bf16, source) as opened:
            opened.stamp, opened.notes = checkpoint.stamp(source), notes(source, opened)
            yield opened
        note.clear()


def _identity(path: Path) -> list[int]:
    """What a file keeps when it gets another name: bytes, time of change in ns; nothing of one that is not there."""
    with suppress(FileNotFoundError):
        found = path.stat()
        return [found.st_size, found.st_mtime_ns]
    return []


def make_bf16(
    found: checkpoint.Checkpoint,
    bf16: Path,
    progress: Progress = no_progress,
    made: Callable[[Path], None] = lambda _: None,
) -> None:
    """llama.cpp's own bf16 GGUF of a checked folder, whole or not at all. Raises CheckpointError, OutputError.

    made: called with the whole file before it gets its name
    """
    with system_errors(bf16):
        check_space(bf16.parent, found.nbytes + found.nbytes // 3)
        progress("converter", 0, 0, found.architecture)
        with scratch_path(bf16, ".work") as work:
            for line in checkpoint.to_bf16_gguf(found, work):
                progress("converter", 0, 0, line)
            made(work)
            work.replace(bf16)
