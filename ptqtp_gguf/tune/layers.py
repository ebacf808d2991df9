"""Layers in torch whose weights are s * level, and leaves that share flat tensors.

Imports torch: import it inside functions only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..quantize import GROUP, Tensor


class PlaneLinear(torch.autograd.Function):  # type: ignore[misc]
    """x @ (scale * levels)^T. The weights are made again in the backward pass and never kept."""

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
