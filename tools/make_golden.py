#!/usr/bin/env python3
"""Write tests/golden/packing.json: digits, scales, bytes and weights of hand-picked blocks. Review the diff."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ptqtp_gguf.codec import reference as packing
from ptqtp_gguf.codec.tensor_type import TensorType
from ptqtp_gguf.codec.tp2_0 import TP2_0
from ptqtp_gguf.codec.tp2_1 import TP2_1

TARGET = Path(__file__).resolve().parent.parent / "tests" / "golden" / "packing.json"


def case(name: str, t: TensorType, digits: list[int], scales: list[float]) -> dict[str, object]:
    d = np.array(digits, np.uint8)[None]
    if t is TP2_1:
        packed = packing.pack(TP2_1, d, np.array(scales, np.uint8)[None])
    else:
        packed = packing.pack(TP2_0, d, np.array(scales, np.float16).reshape(1, -1, 2))
    values = [float(v) for v in packing.dequantize(t, packed)[0]]
    return {
        "name": name,
        "type": t.name,
        "digits": digits,
        "scales": scales,
        "hex": packed.tobytes().hex(),
        "values": values,
    }


def main() -> None:
    cases = [
        case("zeros", TP2_1, [4] * 32, [0]),
        case("lowest", TP2_1, [0] * 32, [255]),
        case("highest", TP2_1, [8] * 32, [0xF0]),
        case("counting", TP2_1, [i % 9 for i in range(32)], [0x87]),
        *(case(f"one at weight {i}", TP2_1, [5 if j == i else 4 for j in range(32)], [0xF0]) for i in range(32)),
        case("two blocks", TP2_1, [(7 * i) % 9 for i in range(64)], [1, 254]),
        case("free scales", TP2_0, [(5 * i) % 9 for i in range(128)], [0.13354, 0.09045]),
        case("negative scale", TP2_0, [i % 9 for i in range(128)], [-1.5, 0.25]),
    ]
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text("[\n" + ",\n".join(json.dumps(c) for c in cases) + "\n]\n")


if __name__ == "__main__":
    main()
