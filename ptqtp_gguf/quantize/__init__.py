"""From weights to planes: one module a method, one encoder a device."""

from __future__ import annotations

from . import gptq, methods, second_order
from .encode import make_encoder
from .gptq import Settings, nearest_in_chain
from .methods import Method
from .pieces import FLOOR, MASK, Done, Encoded, Encoder, Pending, checksum, to_float
from .second_order import SecondOrder
from .torch_codec import GROUP, Tensor, change_unit, code_scales, latent_start, nearest_levels, scale_codes
from .values import beyond, first_not_finite, reach

__all__ = [
    "FLOOR",
    "GROUP",
    "MASK",
    "Done",
    "Encoded",
    "Encoder",
    "Method",
    "Pending",
    "SecondOrder",
    "Settings",
    "Tensor",
    "beyond",
    "change_unit",
    "checksum",
    "code_scales",
    "first_not_finite",
    "gptq",
    "latent_start",
    "make_encoder",
    "methods",
    "nearest_in_chain",
    "nearest_levels",
    "reach",
    "scale_codes",
    "second_order",
    "to_float",
]
