"""A process of its own that runs text through a model: moments of its matrices' inputs, or what errors there do.

gather.py runs it with the name of a file that holds the job.

Apart, because the runtime may abort the process, and because the threads of BLAS and of the runtime must not spin while
the others work, which is said in the environment. Prints a JSON object a line: {"done": n, "of": n},
{"worth": {...}}, or {"error": text}.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import PtqtpError
from ..llamacpp import Model, Product, Tap
from .moments import HELD_EVERY, Gathering
from .probing import measure

SAVE_SECONDS = 90.0


def held_out(window: int, windows: int) -> bool:
    """Whether a window is kept apart to judge by; of fewer than two, none."""
    return windows > 1 and window % HELD_EVERY == min(HELD_EVERY, windows) - 1


def gather(job: dict[str, Any]) -> None:
    """The job as gather.py writes it. Raises CalibrationError, InputError, OutputError, OSError."""
    tokens = np.fromfile(job["tokens"], "<i8").reshape(-1, job["window"]).astype(np.int32)
    experts: dict[str, int] = job["wanted"]
    work = Gathering(Path(job["folder"]), job["key"], len(tokens), tokens.size)
    window, saved = work.index.done, time.monotonic()

    def seen(p: Product) -> None:
        work.add(p.weight, p.x, p.experts, experts[p.weight], held_out(window, len(tokens)))

    with (
        Model(Path(job["model"])) as model,
        Tap(model, experts, seen, job["window"], job["batch"], job["threads"]) as tap,
    ):
        while window < len(tokens):
            tap.run(tokens[window])
            window += 1
            if window == len(tokens):
                work.share(tap.same)
            if window == len(tokens) or time.monotonic() > saved + SAVE_SECONDS:
                work.checkpoint(window)
                saved = time.monotonic()
            say(done=window, of=len(tokens))


def probe(job: dict[str, Any]) -> None:
    """As gather.py writes it. Raises InputError."""
    tokens = np.array(job["tokens"], np.int32)
    found = measure(
        Path(job["model"]), tokens, job["names"], job["threads"], lambda done, total: say(done=done, of=total)
    )
    say(worth=found)


def end_with_parent() -> None:
    """The parent holds the other end of standard input for as long as it lives."""
    while os.read(0, 1):
        pass
    os._exit(1)


def say(**what: Any) -> None:
    """One line for gather.py."""
    print(json.dumps(what), flush=True)


def main() -> None:
    """Gather; an error is a line too."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        job = json.loads(Path(sys.argv[1]).read_text())
        if "names" in job:
            probe(job)
        else:
            gather(job)
    except PtqtpError as e:
        say(error=str(e), kind=type(e).__name__)
        sys.exit(1)
    except OSError as e:
        say(error=f"{e.filename or 'writing'}: {e.strerror}", kind="OutputError")
        sys.exit(1)


if __name__ == "__main__":
    main()
