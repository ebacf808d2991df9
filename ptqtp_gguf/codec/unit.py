"""The unit that all types are made of: 32 base-9 digits and a side byte in 14 bytes, in numpy.

    byte   0 1   2 3   4 5   6 7   8 9  10 11   12     13
         [ q0  | q1  | q2  | q3  | q4  | q5  | side | r ]      q: little-endian uint16, r: uint8

q_j = ceil(N * 65536 / 9**5), N = its five base-9 digits, most significant first; r = ceil(N * 256 / 81), two digits.
Example: digits of word 0 (weights 0, 1, 14, 15, 26) = 8, 0, 4, 4, 1 -> N = 8*6561 + 0*729 + 4*81 + 4*9 + 1 = 52849
-> q0 = ceil(52849 * 65536 / 59049) = 58655 = 0xe51f -> bytes 1f e5. Back: 58655*9 = 8*65536 + 3607: digit 8, and so on.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import QuantizeError
from .arrays import U8

UNIT = 32  # weights a unit
UNIT_WORDS = 6  # uint16 words of five digits a unit; a remainder byte holds the last two
UNIT_BYTES = 2 * UNIT_WORDS + 1 + 1  # words, side byte (scale), remainder byte
SIDE = 2 * UNIT_WORDS  # place of the side byte
POW5 = 9**5
POW2 = 9**2

# Weight index, inside the unit, of digit k of word j (word 6 is the remainder byte).
PAIR01 = [(2 * j, 2 * j + 1) for j in range(UNIT_WORDS + 1)]
PAIR23 = [(14 + 2 * j, 15 + 2 * j) for j in range(UNIT_WORDS)]
LAST = [26 + j for j in range(UNIT_WORDS)]

_WORD_SLOTS = np.array([[*PAIR01[j], *PAIR23[j], LAST[j]] for j in range(UNIT_WORDS)])  # (6, 5) weight index
_REST_SLOTS = np.array(PAIR01[UNIT_WORDS])  # (2,)


def pack_units(digits: U8, side: U8) -> U8:
    """digits (U, 32), side (U,) -> bytes (U, 14). Raises QuantizeError for a digit above 8."""
    if digits.size and digits.max() > 8:
        raise QuantizeError(f"digit {digits.max()} above 8")
    powers = 9 ** np.arange(4, -1, -1)
    n = digits[:, _WORD_SLOTS].astype(np.int64) @ powers  # (U, 6)
    words = -(-n * 65536 // POW5)
    rest = digits[:, _REST_SLOTS].astype(np.int64) @ powers[3:]
    out = np.empty((len(digits), UNIT_BYTES), np.uint8)
    out[:, 0:SIDE] = words.astype("<u2").view(np.uint8)
    out[:, SIDE] = side
    out[:, SIDE + 1] = -(-rest * 256 // POW2)
    return out


def unpack_units(units: U8) -> U8:
    """bytes (U, 14) -> digits (U, 32). Any bytes give digits 0..8."""
    words = np.ascontiguousarray(units).view("<u2").astype(np.uint32)  # (U, 7); the last is side + 256*r
    digits = np.empty((len(units), UNIT), np.uint8)
    for k in range(5):
        words *= 9
        d = words >> 16
        words &= 0xFFFF
        if k < 4:
            slots = (PAIR01, PAIR23)[k // 2]
            digits[:, [s[k % 2] for s in slots]] = d[:, : len(slots)]
        else:
            digits[:, LAST] = d[:, :UNIT_WORDS]
    return digits


def bad_units(units: U8) -> NDArray[np.bool_]:
    """bytes (U, 14) -> (U,): whether a word or the remainder byte is one that no packer writes."""
    words = np.ascontiguousarray(units[:, :SIDE]).view("<u2").astype(np.int64)
    n = words * POW5 >> 16
    bad: NDArray[np.bool_] = (-(-n * 65536 // POW5) != words).any(axis=1)
    rest = units[:, SIDE + 1].astype(np.int64)
    bad |= -(-(rest * POW2 >> 8) * 256 // POW2) != rest
    return bad
