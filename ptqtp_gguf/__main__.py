"""The entry point, and python -m ptqtp_gguf: what ends before anything is loaded ends in one line too."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Entry point of the console script."""
    try:
        from .cli import main as run
    except MemoryError:
        sys.exit(_NO_MEMORY)
    except ImportError as e:
        if "failed to map segment" not in str(e):
            raise
        sys.exit(_NO_MEMORY)
    except KeyboardInterrupt:  # OpenBLAS sends it too where it can start no thread
        print("Error: interrupted", file=sys.stderr)
        sys.exit(130)
    run()


_NO_MEMORY = "Error: out of memory; close other programs"

if __name__ == "__main__":
    main()
