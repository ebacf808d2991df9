"""The entry point, and python -m ptqtp_gguf: what ends before anything is loaded ends in one line too."""

from __future__ import annotations

import sys
from typing import NoReturn

# what Python and the system say where memory ends while something is loaded, and mean nothing else by
_MEMORY = "failed to map segment", "can't start new thread", "error return without exception set"


def main() -> NoReturn:
    """Entry point of the console script."""
    try:
        from .commands.app import main as run

        run()
    except KeyboardInterrupt:  # OpenBLAS sends it too where it can start no thread
        print("Error: interrupted", file=sys.stderr)
        sys.exit(130)
    except (MemoryError, ImportError, SystemError, RuntimeError) as e:
        if not isinstance(e, MemoryError) and not any(sign in str(e) for sign in _MEMORY):
            raise
        sys.exit("Error: out of memory; close other programs, or give --max-memory")


if __name__ == "__main__":
    main()
