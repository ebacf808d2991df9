"""Scale codes and levels in torch. The roundings equal those of codec/reference.py and search.py.

torch is imported inside functions, so the face of the room loads without it.
"""

from __future__ import annotations

from typing import Any

from ..codec import MAX_LEVEL, SMALLEST_SCALE, TP2_1

GROUP = TP2_1.group
_MANTISSA_SHIFT, _BIAS = 19, 112 << 23  # of the 8-bit scale code inside a float32
_LOW = (-0.5, 0.5, 1.5, 2.5, 2.5, 4.0)  # cell of level magnitude 0..5 in units of the scale
_HIGH = (0.5, 1.5, 2.5, 4.0, 4.0, MAX_LEVEL + 0.5)
_INSIDE = 1e-3  # of a cell's border: a latent weight begins as the level that it stands for


# torch is untyped here (see pyproject.toml)
Tensor = Any


def scale_codes(s: Tensor) -> Tensor:
    """packing.scale_from_float in torch: float32 -> uint8, any shape."""
    import torch

    bits = s.clamp_min(SMALLEST_SCALE).view(torch.int32) - _BIAS
    low, code, half = bits & ((1 << _MANTISSA_SHIFT) - 1), bits >> _MANTISSA_SHIFT, 1 << (_MANTISSA_SHIFT - 1)
    up = (low > half) | ((low == half) & ((code & 1) == 1))
    return (code + up).clamp_(0, 255).to(torch.uint8)


def code_scales(codes: Tensor) -> Tensor:
    """packing.scale_to_float in torch: uint8 -> float32, any shape."""
    import torch

    return ((codes.to(torch.int32) << _MANTISSA_SHIFT) + _BIAS).view(torch.float32)


def nearest_levels(v: Tensor) -> Tensor:
    """Nearest level of weights in units of their scale, ties to the smaller: float32 -> int8, any shape."""
    import torch

    a = v.abs()
    level = (a > 0.5).to(torch.int8) + (a > 1.5) + (a > 2.5) + 2 * (a > 4).to(torch.int8)
    return torch.where(v < 0, -level, level)


def latent_start(weight: Tensor, levels: Tensor, scale: Tensor, share: float) -> Tensor:
    """Latent weights in units of their scale, float32 (R, C), each inside the cell of its level."""
    import torch

    with torch.no_grad():
        a = levels.abs().long()
        sign = torch.where(levels < 0, -1.0, 1.0)
        low, high = (torch.tensor(t, device=levels.device)[a] for t in (_LOW, _HIGH))
        v = (weight.float().unflatten(1, (-1, GROUP)) / scale[..., None]).flatten(1) * sign
        v = torch.maximum(torch.minimum(v, high - _INSIDE), low + _INSIDE)
        return (a + share * (v - a)) * sign


def change_unit(v: Tensor) -> Tensor:
    """What a change of 1 means for each value of a norm or bias: its magnitude, at least the tensor's median."""
    typical = v.abs().median()
    if typical == 0:
        typical = v.abs().mean()
    return v.abs().clamp_min(float(typical) or 0.01)
