"""Trit planes of one matrix, unpacked: what calibration and tuning hand to each other."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .arrays import U8


class TritPlanes(NamedTuple):
    """One matrix: levels of its type int8 (R, C), and scale codes uint8 (R, C/32). Rows as in HF."""

    levels: NDArray[np.int8]
    codes: U8
