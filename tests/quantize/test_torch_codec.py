"""Scale codes and levels in torch: the format's own."""

from __future__ import annotations

import numpy as np
import pytest

from ptqtp_gguf.codec.tp2_1 import scale_from_float, scale_to_float
from ptqtp_gguf.quantize import search
from ptqtp_gguf.quantize.torch_codec import code_scales, nearest_levels, scale_codes

torch = pytest.importorskip("torch")


def test_codes_and_scales_are_the_formats() -> None:
    codes = np.arange(256, dtype=np.uint8)
    assert np.array_equal(code_scales(torch.from_numpy(codes)).numpy(), scale_to_float(codes))
    assert torch.equal(scale_codes(code_scales(torch.from_numpy(codes))), torch.from_numpy(codes))
    s = np.random.default_rng(0).lognormal(-4, 3, 4000).clip(2.0**-15, 1.9).astype(np.float32)
    assert np.array_equal(scale_codes(torch.from_numpy(s)).numpy(), scale_from_float(s))


def test_codes_and_levels_round_as_the_format_does() -> None:
    codes = np.arange(256, dtype=np.uint8)
    s = scale_to_float(codes)
    assert np.array_equal(code_scales(torch.from_numpy(codes)).numpy(), s)
    middle = (s[1:] + s[:-1]) / 2
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [s, middle, np.nextafter(middle, 9), np.nextafter(middle, 0), rng.lognormal(-4, 3, 4000), [0, 1e9]]
    )
    x = np.concatenate([x, [-1.0, 1e-30]]).astype(np.float32)
    assert np.array_equal(scale_codes(torch.from_numpy(x)).numpy(), scale_from_float(x))
    v = np.concatenate([rng.normal(size=2000) * 3, [0, 0.5, 1.5, 2.5, 4, 7]]).astype(np.float32)
    v = np.concatenate([v, -v])
    expected = np.sign(v) * search.nearest_level(np.abs(v)[:, None], np.ones(len(v), np.float32))[:, 0]
    assert np.array_equal(nearest_levels(torch.from_numpy(v)).numpy(), expected)
