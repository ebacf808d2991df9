"""What values types hold, and the look at scales that tells whether bytes decode to finite numbers."""

from __future__ import annotations

import numpy as np
import pytest

from ptqtp_gguf.codec.types import TYPES
from ptqtp_gguf.errors import InputError, OutOfReach
from ptqtp_gguf.files.gguf import BF16_ID, F32_ID, GGML_TYPES, TYPE_IDS, type_name
from ptqtp_gguf.llamacpp import ggml
from ptqtp_gguf.quantize import values

STOCK = sorted(set(GGML_TYPES) - set(TYPES))
WHOLE = {"I8", "I16", "I32", "I64"}  # numbers that are always finite
NO_DECODER = {"F64", "Q8_1", "Q8_K"}  # ggml has none; the latter two are for activations, not for files


def blocks(kind: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """Random bytes, of whose scales about every 30th is not finite."""
    return rng.integers(0, 256, (n, GGML_TYPES[kind][2]), dtype=np.uint8)


@pytest.mark.runtime
@pytest.mark.parametrize("kind", [k for k in STOCK if type_name(k) not in WHOLE | NO_DECODER], ids=type_name)
def test_it_agrees_with_the_decoder_of_ggml(kind: int, rng: np.random.Generator) -> None:
    data = blocks(kind, 400, rng)
    with np.errstate(all="ignore"):
        finite = np.isfinite(ggml.dequantize(kind, data)).reshape(400, -1)
    found = [values.first_not_finite(kind, block) == -1 for block in data]
    assert found == finite.all(1).tolist()
    name = type_name(kind)
    assert all(found) == (name == "NVFP4")  # whose scales have no Inf or NaN; of the others the bytes hold some
    if name not in ("MXFP4", "NVFP4"):  # of one block all is lost, or nothing
        assert np.array_equal(finite.any(1), finite.all(1))


@pytest.mark.parametrize("name", sorted(NO_DECODER | WHOLE))
def test_types_that_ggml_does_not_decode(name: str) -> None:
    kind, size = TYPE_IDS[name], GGML_TYPES[TYPE_IDS[name]][2]
    with pytest.raises(InputError):
        ggml.dequantize(kind, np.zeros((1, size), np.uint8))
    assert values.first_not_finite(kind, np.zeros((5, size), np.uint8)) == -1
    all_ones = values.first_not_finite(kind, np.full((5, size), 255, np.uint8))
    assert all_ones == (0 if name in NO_DECODER else -1)


@pytest.mark.parametrize(("name", "first"), [("F32", 70_001), ("BF16", 140_003), ("F16", 1), ("Q8_0", 9000)])
def test_the_first_one_is_named(name: str, first: int) -> None:
    """Also behind the pieces that are looked at together."""
    kind = TYPE_IDS[name]
    block, size = GGML_TYPES[kind][1:]
    data = np.zeros((first + 10, size), np.uint8)
    assert values.first_not_finite(kind, data) == -1
    data[[first, first + 5]] = 255
    assert values.first_not_finite(kind, data) == first * block
    assert values.first_not_finite(kind, data[:0]) == -1


@pytest.mark.runtime
@pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "NVFP4"])
def test_a_type_holds_what_it_reaches_and_refuses_more(name: str) -> None:
    kind = TYPE_IDS[name]
    most = np.float32(values.reach(kind))
    w = np.zeros((2, 256), np.float32)
    w[0, 3], w[1, 7] = most, -most
    back = ggml.dequantize(kind, ggml.quantize(kind, w))
    assert back[0, 3] == pytest.approx(most, rel=0.1) and back[1, 7] == pytest.approx(-most, rel=0.1)
    assert values.beyond(kind, float(most)) is None
    more = np.nextafter(most, np.float32(np.inf))
    w[1, 7] = -more
    with pytest.raises(OutOfReach, match=f"largest weight .*; {name} reaches "):
        ggml.quantize(kind, w)
    assert values.beyond(kind, float(more))


def test_what_is_beyond() -> None:
    assert values.beyond(TYPE_IDS["Q8_0"], 2e7) == "largest weight 2e+07; Q8_0 reaches 8.31901e+06"
    assert values.beyond(TYPE_IDS["TP2_2"], 12) == "largest weight 12; TP2_2 reaches 11.62"
    assert values.beyond(TYPE_IDS["TP2_2"], 11.625) is None
    largest = float(np.finfo(np.float32).max)
    assert values.beyond(BF16_ID, largest) == "largest weight 3.403e+38; BF16 reaches 3.39618e+38"
    assert values.beyond(F32_ID, largest) is None
