"""Planes in torch: scale codes, levels, layers whose weights are s * level, and leaves that share flat tensors.

Imports torch: import it inside functions only. The roundings equal those of packing.py and search.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..codec.types import MAX_LEVEL, SMALLEST_SCALE, TP2_1

GROUP = TP2_1.group
_MANTISSA_SHIFT, _BIAS = 19, 112 << 23  # of the 8-bit scale code inside a float32
_LOW = (-0.5, 0.5, 1.5, 2.5, 2.5, 4.0)  # cell of level magnitude 0..5 in units of the scale
_HIGH = (0.5, 1.5, 2.5, 4.0, 4.0, MAX_LEVEL + 0.5)
_INSIDE = 1e-3  # of a cell's border: a latent weight begins as the level that it stands for

# torch is untyped here (see pyproject.toml)
Tensor = Any


def scale_codes(s: Tensor) -> Tensor:
    """packing.scale_from_float in torch: float32 -> uint8, any shape."""
    bits = s.clamp_min(SMALLEST_SCALE).view(torch.int32) - _BIAS
    low, code, half = bits & ((1 << _MANTISSA_SHIFT) - 1), bits >> _MANTISSA_SHIFT, 1 << (_MANTISSA_SHIFT - 1)
    up = (low > half) | ((low == half) & ((code & 1) == 1))
    return (code + up).clamp_(0, 255).to(torch.uint8)


def code_scales(codes: Tensor) -> Tensor:
    """packing.scale_to_float in torch: uint8 -> float32, any shape."""
    return ((codes.to(torch.int32) << _MANTISSA_SHIFT) + _BIAS).view(torch.float32)


def nearest_levels(v: Tensor) -> Tensor:
    """Nearest level of weights in units of their scale, ties to the smaller: float32 -> int8, any shape."""
    a = v.abs()
    level = (a > 0.5).to(torch.int8) + (a > 1.5) + (a > 2.5) + 2 * (a > 4).to(torch.int8)
    return torch.where(v < 0, -level, level)


@torch.no_grad()  # type: ignore[untyped-decorator]
def latent_start(weight: Tensor, levels: Tensor, scale: Tensor, share: float) -> Tensor:
    """Latent weights in units of their scale, float32 (R, C), each inside the cell of its level."""
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


class PlaneLinear(torch.autograd.Function):  # type: ignore[misc]
    """x @ (scale * levels)^T. The weights are made anew in the backward pass and never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, latent: Tensor | None, levels: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, levels)
        return x @ _weight(levels, scale, x.dtype).t()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, levels = ctx.saved_tensors
        dx = dscale = dlatent = None
        if ctx.needs_input_grad[0]:
            dx = dy @ _weight(levels, scale, dy.dtype)
        if ctx.needs_input_grad[1]:
            dw = (dy.flatten(0, -2).t() @ x.flatten(0, -2)).unflatten(1, (-1, GROUP))
            dscale = (dw * levels.view_as(dw)).sum(-1, dtype=torch.float32)
            if ctx.needs_input_grad[2]:  # straight through the rounding to levels
                dlatent = (dw.float() * scale[..., None]).flatten(1)
        return dx, dscale, dlatent, None


class PlaneEmbedding(torch.autograd.Function):  # type: ignore[misc]
    """Rows `ids` of scale * levels, float32 (*ids.shape, C)."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, scale: Tensor, latent: Tensor | None, levels: Tensor) -> Tensor:
        ctx.save_for_backward(ids, scale, levels)
        flat = ids.flatten()
        return _weight(levels[flat], scale[flat], scale.dtype).view(*ids.shape, -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        ids, scale, levels = ctx.saved_tensors
        flat = ids.flatten()
        dw = dy.reshape(len(flat), -1, GROUP)
        dscale = dlatent = None
        if ctx.needs_input_grad[1]:
            dscale = torch.zeros_like(scale).index_add_(0, flat, (dw * levels[flat].view_as(dw)).sum(-1))
        if ctx.needs_input_grad[2]:  # straight through the rounding to levels
            dlatent = torch.zeros(levels.shape, device=dy.device)
            dlatent.index_add_(0, flat, (dw * scale[flat][..., None]).flatten(1))
        return None, dscale, dlatent, None


def _weight(levels: Tensor, scale: Tensor, dtype: Any) -> Tensor:
    """levels int8 (R, C), scale float32 (R, C/32) -> (R, C); one kernel reads the int8 and writes the product."""
    rows, cols = levels.shape
    return torch.mul(levels.view(rows, -1, GROUP), scale.to(dtype)[..., None]).view(rows, cols)


class Flat:
    """Leaves as views of one flat float32 tensor `value`, their gradients as views of `grad`."""

    def __init__(self, parts: list[Tensor], device: Any, trained: bool = True) -> None:
        self.value = torch.cat([p.detach().float().flatten().to(device) for p in parts] or [torch.empty(0)]).to(device)
        self.grad: Tensor = torch.zeros_like(self.value) if trained else None
        self.shapes = [p.shape for p in parts]
        self.leaves = [nn.Parameter(v, requires_grad=trained) for v in self.views(self.value)]
        if self.grad is not None:
            for leaf, g in zip(self.leaves, self.views(self.grad), strict=True):
                leaf.grad = g

    def views(self, flat: Tensor) -> list[Tensor]:
        """A flat tensor of the same order, cut into the leaves' shapes."""
        parts = flat.split([s.numel() for s in self.shapes]) if self.shapes else ()
        return [v.view(s) for v, s in zip(parts, self.shapes, strict=True)]
