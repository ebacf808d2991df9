"""Regular expressions from files: only those whose matching is bounded.

Python's `re` goes back and tries again: a repeat within a repeat can take longer than anybody waits, on a name of 63
letters. So the ways in which a pattern can be laid over a name are counted before it is used.
"""

from __future__ import annotations

import functools
import math
import re
import sys
import warnings
from typing import Any

if sys.version_info >= (3, 11):
    from re import _parser as _sre  # type: ignore[attr-defined]
else:
    import sre_parse as _sre

LETTERS = 64  # of a name, a little more than ggml allows
MAX_WAYS = 10**6  # some ten milliseconds a name
MAX_COUNT = 255  # of {n,m}

_REPEATS = {"MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"}


def compile_bounded(pattern: str) -> re.Pattern[str]:
    """The compiled pattern. Raises ValueError for none, and for one that could take too long to match."""
    try:
        with warnings.catch_warnings():  # of what may mean something else in a later Python
            warnings.simplefilter("ignore")
            compiled = re.compile(pattern)
            ways, repeats = _ways(_sre.parse(pattern), False)
    except (re.error, OverflowError, RecursionError) as e:
        raise ValueError(f"is not a regular expression: {e}") from None
    if ways * math.comb(LETTERS + repeats, repeats) > MAX_WAYS:
        raise ValueError(
            f"could take too long to match: {repeats} repeats and {ways} choices at once; use fewer of * + ? |"
        )
    return compiled


def _ways(items: Any, repeated: bool) -> tuple[int, int]:
    """(choices, repeats) of a sequence: in how many ways its branches and `?` can be taken; * and + that may meet.

    repeated: it stands within a repeat, where nothing may leave a choice.
    """
    ways, repeats = 1, 0
    for op, argument in items:
        name = str(op)
        inner = (1, 0)
        if name in _REPEATS:
            least, most, inside = argument
            inner = _repeat(least, most, inside, repeated)
        elif name == "BRANCH":
            if repeated:
                raise ValueError("has a choice (|) within a repeat, which could take too long to match; write it out")
            parts = [_ways(part, False) for part in argument[1]]
            inner = sum(w for w, _ in parts), max(r for _, r in parts)
        elif name == "SUBPATTERN":
            inner = _ways(argument[-1], repeated)
        elif name in ("ASSERT", "ASSERT_NOT"):
            inner = _ways(argument[1], repeated)
        elif name == "ATOMIC_GROUP":
            inner = _ways(argument, repeated)
        elif name.startswith("GROUPREF"):
            raise ValueError("refers back to a group, which could take too long to match; write it out")
        ways, repeats = min(ways * inner[0], MAX_WAYS + 1), repeats + inner[1]
    return ways, repeats


def _repeat(least: int, most: Any, items: Any, repeated: bool) -> tuple[int, int]:
    endless = int(most) >= int(_sre.MAXREPEAT)
    if least > MAX_COUNT or not (endless or int(most) <= MAX_COUNT):
        raise ValueError(f"repeats more than {MAX_COUNT} times; use * or +")
    if repeated:
        raise ValueError("has a repeat within a repeat, which could take too long to match; write it out")
    ways, repeats = _ways(items, int(most) > 1)
    if least == most:
        return ways, repeats
    return (ways + 1, repeats) if int(most) == 1 else (ways, repeats + 1)


@functools.cache
def regex(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)
