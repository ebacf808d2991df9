"""What a conversion that failed leaves behind: a state that can be resumed where that makes sense, else nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..calibrate import holds_planes, moments_folder, planes_folder, remove_moments
from ..errors import Interrupted, OutputError, ResumeError
from . import shares
from .output_files import discard
from .records import ConversionJournal


@contextmanager
def kept_on_failure(out: Path, journal: ConversionJournal) -> Iterator[None]:
    """Leaves a state that can be taken up again where that makes sense, and nothing at all where it does not."""
    begun_here = journal.job is None and not moments_folder(out).exists()
    try:
        yield
    except ResumeError:
        raise
    except (KeyboardInterrupt, OutputError, OSError, MemoryError) as e:
        kept = _kept(out, journal)
        if isinstance(e, KeyboardInterrupt):
            raise Interrupted(f"interrupted; {kept}") from None
        if isinstance(e, OSError):
            where = e.filename or f"{out}: writing failed"
            raise OutputError(f"{where}: {e.strerror or e}; {kept}") from None
        raise
    except BaseException:  # also what is not ours: a bug, a library's
        # what this run has begun is of no use; what it found, or has finished, is not for it to throw away
        if begun_here and not shares.left(out):
            with suppress(OSError):  # the first error is the one to tell
                _forget(out, journal)
        raise


def replaceable(out: Path, journal: ConversionJournal) -> bool:
    """Whether another run may begin in the place of an unfinished one: that has failed, or has finished nothing."""
    nothing = not (journal.rows or shares.left(out) or holds_planes(out))
    return journal.verified is None and (journal.failed or nothing)


def _kept(out: Path, journal: ConversionJournal) -> str:
    """Removes what is not worth keeping; what is left, in words."""
    try:
        n = len(journal.rows)
        divided = shares.left(out)
        if n == 0 and not planes_folder(out).exists() and not moments_folder(out).exists() and not divided:
            _forget(out, journal)
            return "nothing was left behind"
        what = f"{n} finished tensors are" if n else "what calibration has finished is"
        what = "what several processes have finished is" if divided else what
        return f"{what} kept; run the same command again to resume"
    except OSError:  # a disk that takes nothing any more
        return "run the same command again"


def _forget(out: Path, journal: ConversionJournal) -> None:
    discard(out)
    remove_moments(out)
    journal.clear()
    journal.remove()
