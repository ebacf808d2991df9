"""Digits and scales of a file are counted right, damaged ones too."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from helpers import write_gguf

from ptqtp_gguf.codec import native
from ptqtp_gguf.codec import reference as packing
from ptqtp_gguf.codec.tp2_0 import TP2_0
from ptqtp_gguf.codec.tp2_1 import scale_to_float
from ptqtp_gguf.codec.tp2_2 import TP2_2, levels_of_digits
from ptqtp_gguf.codec.types import BY_NAME
from ptqtp_gguf.conversion.pipeline import convert
from ptqtp_gguf.errors import QuantizeError
from ptqtp_gguf.files.gguf import OutTensor, Reader, kv_string, kv_u32, write_stream
from ptqtp_gguf.inspect.histograms import PlaneStatistics, plane_statistics
from ptqtp_gguf.plan.options import Options
from ptqtp_gguf.plan.roles import Role


def third_by_numpy(digits: np.ndarray) -> list[int]:
    """How often the third trit is -1, 0, 1: what is left of the levels without the stored trits."""
    units = digits.reshape(-1, 32).astype(np.int64)
    third = levels_of_digits(digits.reshape(-1, 32)) - 3 * (units // 3 - 1) - 2 * (units % 3 - 1)
    return np.bincount(third.reshape(-1) + 1, minlength=3).tolist()


def counted_by_numpy(data: np.ndarray, kind: str) -> tuple[list[int], np.ndarray, list[int]]:
    """Digits' counts, the |scales| that are not of an empty group, and third trits, by the reference decoder."""
    if kind != "TP2_0":
        digits, codes = packing.unpack(BY_NAME[kind], data)
        scales = scale_to_float(codes.astype(np.uint8)).reshape(-1)
        empty = (digits.reshape(-1, 32) == 4).all(axis=1) & (codes.reshape(-1) == 0)
        scales = scales[~empty]
    else:
        digits, alphas = packing.unpack(TP2_0, data)
        scales = np.abs(alphas.astype(np.float32)).reshape(-1)
        scales = scales[scales > 0]
    third = third_by_numpy(digits) if kind == "TP2_2" else []
    return np.bincount(digits.reshape(-1), minlength=9).tolist(), scales, third


def agrees(found: PlaneStatistics, digits: list[int], scales: np.ndarray, third: list[int]) -> None:
    assert list(found.digits) == digits and list(found.third) == third
    n = sum(digits)
    zeros = (sum(digits[3:6]) / n, (digits[1] + digits[4] + digits[7]) / n)
    assert found.zero_share == (*zeros, third[1] / n) if third else found.zero_share == zeros
    assert (found.smallest, found.largest) == (scales.min(), scales.max())
    assert found.median == np.sort(scales)[(len(scales) - 1) // 2]
    edges = np.array(found.edges)
    assert list(found.scales) == [int(((scales >= a) & (scales < b)).sum()) for a, b in pairwise(edges)]
    assert sum(found.scales) == len(scales) and found.scales[0] and found.scales[-1]
    assert set(np.round(np.log2(edges) % 1, 6)) <= set(np.round(np.log2([1, 1.25, 1.5, 1.75]), 6))


@pytest.mark.parametrize("kind", list(BY_NAME))
def test_digits_and_scales_of_a_file(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    shapes = {
        "blk.0.attn_q": (48, 256),
        "blk.1.ffn_down": (40, 384),
        "blk.1.exps": (3, 16, 128),
        "token_embd": (50, 128),
    }
    tensors = {f"{n}.weight": (rng.laplace(size=s) * 0.05).astype(np.float32) for n, s in shapes.items()}
    tensors["blk.0.attn_q.weight"][5:9] = 0  # empty groups
    tensors["blk.0.attn_norm.weight"] = np.ones(64, np.float32)
    source = write_gguf(tmp_path / "a.gguf", tensors)
    out = tmp_path / "b.gguf"
    convert(source, out, Options(type=kind, tensor_types=(f"token_embd={kind}",)))
    seen: list[tuple[str, int, int, str]] = []
    found = plane_statistics(out, lambda *x: seen.append(x))
    assert found.total
    assert seen[-1][1] == seen[-1][2] == found.total.weights == sum(tensors[n].size for n in found.tensors)
    assert found.tensors.keys() == tensors.keys() - {"blk.0.attn_norm.weight"}
    with Reader(out) as r:
        each = {name: counted_by_numpy(r.bytes_of(r.by_name[name]), kind) for name in found.tensors}
    for name, expected in each.items():
        agrees(found.tensors[name], *expected)
    blocks = [v for k, v in each.items() if k.startswith("blk")]
    digits = np.sum([d for d, _, _ in blocks], axis=0).tolist()
    third = np.sum([t for _, _, t in blocks], axis=0).tolist()
    agrees(found.roles[Role.BLOCK], digits, np.concatenate([s for _, s, _ in blocks]), third)
    assert found.total.empty == found.tensors["blk.0.attn_q.weight"].empty > 0
    assert found.total.digits == tuple(a + b for a, b in zip(digits, found.roles[Role.EMBEDDING].digits, strict=True))
    assert plane_statistics(out, threads=1) == plane_statistics(out, threads=3) == found
    assert plane_statistics(source).total is None


def test_any_bytes_are_counted_as_they_decode(rng: np.random.Generator) -> None:
    """Also words that no packer writes, whose digits the side byte may disturb."""
    data = rng.integers(0, 256, (500, 14), dtype=np.uint8)
    counts = [np.zeros(65536, np.uint64) for _ in range(4)]
    for threads, (five, last) in zip((1, 3), (counts[:2], counts[2:]), strict=True):
        native.count_words(data, five, last, threads)
        native.count_words(data[:10], five, last, threads)
    assert np.array_equal(counts[0], counts[2]) and np.array_equal(counts[1], counts[3])
    words = np.concatenate([data, data[:10]]).view("<u2")
    assert np.array_equal(counts[0], np.bincount(words[:, :6].reshape(-1), minlength=65536))
    assert np.array_equal(counts[1], np.bincount(words[:, 6], minlength=65536))
    with pytest.raises(QuantizeError, match="15 bytes; units have 14"):
        native.count_words(np.zeros(15, np.uint8), counts[0], counts[1])
    with pytest.raises(QuantizeError, match="65536 contiguous uint64"):
        native.count_words(data, counts[0][:5], counts[1])


def test_third_trits_of_any_bytes(rng: np.random.Generator) -> None:
    data = rng.integers(0, 256, (5000, 14), dtype=np.uint8)  # more than a chunk of the threads
    want = third_by_numpy(packing.unpack(TP2_2, data.reshape(1, -1))[0])
    assert native.count_third(data, 1).tolist() == native.count_third(data, 3).tolist() == want
    assert min(want) > 5000 * 32 * 0.33
    rows = packing.pack(TP2_2, np.array([[4] * 32, [5] * 32, [4] * 13 + [5] + [4] * 18], np.uint8), np.zeros((3, 1)))
    # no second trit; +1 everywhere, so -1, -1 stand before; the last of the chain alone, as -1 before the first two
    assert [native.count_third(row).tolist() for row in rows] == [[0, 32, 0], [30, 1, 1], [2, 30, 0]]
    assert native.count_third(rows[:0]).tolist() == [0, 0, 0]
    with pytest.raises(QuantizeError, match="15 bytes; units have 14"):
        native.count_third(np.zeros(15, np.uint8))


def test_a_file_of_two_types(tmp_path: Path, rng: np.random.Generator) -> None:
    """The third plane is that of the TP2_2 weights alone."""
    tensors = {f"blk.0.{n}.weight": (rng.normal(size=(8, 64)) * 0.05).astype(np.float32) for n in ("a", "b")}
    convert(write_gguf(tmp_path / "a.gguf", tensors), tmp_path / "b.gguf", Options(tensor_types=("a=TP2_2", "b=TP2_1")))
    found = plane_statistics(tmp_path / "b.gguf")
    a, b = (found.tensors[n] for n in tensors)
    assert found.total and found.total.weights == 1024 and sum(a.third) == 512 and b.third == ()
    assert found.total.third == a.third and found.total.zero_share[2:] == a.zero_share[2:] == (a.third[1] / 512,)
    assert a.as_dict()["third"] == {"values": [-1, 0, 1], "counts": list(a.third)} and "third" not in b.as_dict()
    json.dumps(found.as_dict(), allow_nan=False)


def test_damaged_scales_are_told(tmp_path: Path) -> None:
    kvs = [kv_string("general.architecture", "x"), kv_u32("ptqtp.format_version", 1)]
    digits = np.full((1, 256), 8, np.uint8)
    alphas = np.array([[[np.inf, 1], [-2, np.nan]]], np.float16)
    path = tmp_path / "a.gguf"
    with path.open("wb") as f, np.errstate(all="ignore"):
        tensors = [OutTensor("blk.0.a.weight", (256, 1), TP2_0.id)]
        list(write_stream(f, kvs, tensors, 32, iter([packing.pack(TP2_0, digits, alphas)])))
    total = plane_statistics(path).total
    assert total and (total.damaged, total.smallest, total.median, total.largest) == (2, 1, 1, 2)
    assert total.digits[8] == 256 and sum(total.scales) == 2
    json.dumps(plane_statistics(path).as_dict(), allow_nan=False)
