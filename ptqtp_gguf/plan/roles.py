"""What a tensor is for, by its name, and which tensors no rule may touch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from enum import Enum

from ..files import TensorInfo
from .patterns import regex


class Role(Enum):
    """What a tensor is for, in size tables."""

    EMBEDDING = "embedding"
    OUTPUT = "output"
    BLOCK = "block matrix"
    OTHER = "other"


class Model:
    """What rules ask about the tensors around one.

    depths  name -> layer / layers, of those that stand in a layer
    """

    def __init__(self, tensors: Sequence[TensorInfo]) -> None:
        self.depths = depths_of(tensors)
        self._names = [t.name for t in tensors]
        self._found: dict[str, bool] = {}

    def has(self, pattern: str) -> bool:
        """Whether the pattern matches the whole name of a tensor."""
        if pattern not in self._found:  # so each pattern goes over the names once
            self._found[pattern] = any(map(regex(pattern).fullmatch, self._names))
        return self._found[pattern]


# Kept before any rule, whatever it says: small, read as F32 by the graph, or no weights of a matrix product
# (the tensors that src/llama-quant.cpp, tensor_allows_quantization, leaves alone).
GUARDS = (
    r".*(?<!weight)",
    r".*_norm(_[a-z0-9]+)?\.weight",
    r".*ffn_gate_(inp(_shexp)?|tid2eid)\.weight",
    r".*(altup|laurel|per_layer_model_proj).*",
    r".*(ssm_conv1d|shortconv\.conv|ssm_(a|d|dt|f_a|f_b|g_a|g_b|beta)\.).*",
    r".*(indexer\.|indexer_|\.hc_).*",
    r".*time_mix_(first|w[012]|v[012]|a[012]|g[012]|decay_w[12]|lerp.*)\.weight",
    r".*(attn_rel_b|pos_embd|position_embd|token_types|\.rel_pos|\.patch_embd|\.patch_merger).*",
    r".*(sam\.(neck\.|net_)|a\.rvq\.codebook|mm\.a\.code_embd).*",
)


_GUARD = re.compile("|".join(f"(?:{g})" for g in GUARDS))
WHY_GUARDED = "small, or read as F32 by the graph"
EMBEDDING = r"token_embd\.weight"
OUTPUT = r"output\.weight"
BLOCK = r"(blk|enc\.blk|dec\.blk|block)\.\d+\..*\.weight"
_LAYER = re.compile(r"((?:[a-z]+\.)*?(?:blk|block))\.(\d+)\.")


def role_of(name: str) -> Role:
    """Role of a tensor by its name."""
    for pattern, role in ((EMBEDDING, Role.EMBEDDING), (OUTPUT, Role.OUTPUT), (BLOCK, Role.BLOCK)):
        if regex(pattern).fullmatch(name):
            return role
    return Role.OTHER


def layer_of(name: str) -> int | None:
    """Number of the layer that a tensor stands in, by its name; None outside the layers."""
    found = _LAYER.match(name)
    return int(found[2]) if found else None


def depths_of(tensors: Iterable[TensorInfo]) -> dict[str, float]:
    """name -> layer / layers for the tensors that stand in one; each stack (blk, enc.blk, v.blk, ...) by itself."""
    found = {t.name: (m[1], int(m[2])) for t in tensors if (m := _LAYER.match(t.name))}
    layers: dict[str, int] = {}
    for stack, layer in found.values():
        layers[stack] = max(layers.get(stack, 0), layer + 1)
    return {name: layer / layers[stack] for name, (stack, layer) in found.items()}


def always_kept(t: TensorInfo) -> bool:
    """Whether no rule can change this tensor: a vector, or one that llama-quantize leaves alone."""
    return len(t.shape) < 2 or t.n_weights == t.shape[0] or _GUARD.fullmatch(t.name) is not None
