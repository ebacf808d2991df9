"""Which tensor gets which type, as data with a reason column.

Rules are tried in order; the first whose pattern matches the whole tensor name decides. A rule that asks for a type
which the tensor cannot take falls back, and the plan says why.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from .errors import RecipeError
from .format import BY_NAME, TP2_0, TP2_1, TYPES, TensorType
from .gguf_io import F16_ID, FLOAT_IDS, Q8_0_ID, TYPE_IDS, TensorInfo, type_block, type_name

KEEP = "keep"


class Role(Enum):
    """What a tensor is for, in size tables."""

    EMBEDDING = "embedding"
    OUTPUT = "output"
    BLOCK = "block matrix"
    OTHER = "other"


@dataclass(frozen=True)
class Rule:
    """Tensors whose name matches `pattern` get `target` ("keep", or a type name)."""

    pattern: str
    target: str
    reason: str


# What stays as it is inside a block: llama-quantize leaves the same tensors alone (src/llama-quant.cpp,
# tensor_allows_quantization): they are small, and the graph reads some of them as F32.
_KEEP_IN_BLOCKS = (
    r".*_norm(_[a-z0-9]+)?\.weight",
    r".*ffn_gate_(inp(_shexp)?|tid2eid)\.weight",
    r".*(altup|laurel|per_layer_model_proj).*",
    r".*(ssm_conv1d|shortconv\.conv|ssm_(a|d|dt|f_a|f_b|g_a|g_b|beta)\.|ssm_(a|d)$).*",
    r".*(indexer\.|indexer_|\.hc_).*",
    r".*time_mix_(first|w[012]|v[012]|a[012]|g[012]|decay_w[12]|lerp.*)\.weight",
    r".*(attn_rel_b|pos_embd|position_embd|token_types).*",
    r"(v|mm|a)\..*",
)

EMBEDDING = r"token_embd\.weight"
OUTPUT = r"output\.weight"


def default_rules(block_type: TensorType) -> list[Rule]:
    """The default recipe: every block matrix in block_type, embedding and output in Q8_0, the rest untouched."""
    return [
        *(Rule(p, KEEP, "small, or read as F32 by the graph") for p in _KEEP_IN_BLOCKS),
        Rule(EMBEDDING, "Q8_0", "embedding: looked up, and often the output too"),
        Rule(OUTPUT, "Q8_0", "output: errors here reach every logit"),
        Rule(r"(blk|enc\.blk|dec\.blk|block)\.\d+\..*\.weight", block_type.name, "block matrix"),
        Rule(r".*", KEEP, "as the converter gave it"),
    ]


@dataclass(frozen=True)
class Choice:
    """The decision on one tensor: target type id and the reason in words."""

    type: int
    reason: str
    fallback: bool = False


def role_of(name: str) -> Role:
    """Role of a tensor by its name."""
    if re.fullmatch(EMBEDDING, name):
        return Role.EMBEDDING
    if re.fullmatch(OUTPUT, name):
        return Role.OUTPUT
    if re.fullmatch(r"(blk|enc\.blk|dec\.blk|block)\.\d+\..*\.weight", name):
        return Role.BLOCK
    return Role.OTHER


def choose(t: TensorInfo, rules: list[Rule]) -> Choice:
    """Apply the rules to one tensor. Raises RecipeError if no rule matches or one names an unknown type."""
    for rule in rules:
        if re.fullmatch(rule.pattern, t.name):
            return _apply(t, rule)
    raise RecipeError(f"no rule of the recipe matches tensor {t.name}; end the recipe with a rule for '.*'")


def _apply(t: TensorInfo, rule: Rule) -> Choice:
    if rule.target == KEEP:
        return Choice(t.type, rule.reason)
    if rule.target not in TYPE_IDS:
        raise RecipeError(f"recipe: unknown tensor type {rule.target}")
    if len(t.shape) < 2 or t.n_weights == t.shape[0]:
        return Choice(t.type, "a vector, not a matrix")
    target = TYPE_IDS[rule.target]
    if t.type not in FLOAT_IDS and target not in TYPES:
        return Choice(t.type, f"{rule.reason}; already {t.type_name} in the source")
    return fit(t, target, rule.reason)


def fit(t: TensorInfo, target: int, reason: str) -> Choice:
    """target if the rows divide into its blocks, else Q8_0, else F16."""
    for type_id in (target, Q8_0_ID, F16_ID):
        block = type_block(type_id)
        if t.shape[0] % block == 0:
            if type_id == target:
                return Choice(type_id, reason)
            wanted = type_block(target)
            why = f"rows of {t.shape[0]} are no multiple of {wanted} ({type_name(target)})"
            return Choice(type_id, why, fallback=True)
    raise AssertionError("F16 has blocks of one")


def fall_back(t: TensorInfo, why: str) -> Choice:
    """The type for a tensor whose values the trit-plane type cannot hold."""
    c = fit(t, Q8_0_ID, why)
    return Choice(c.type, why, fallback=True)


def block_type(name: str) -> TensorType:
    """TP2_0 or TP2_1 by name, any case. Raises RecipeError."""
    try:
        return BY_NAME[name.upper()]
    except KeyError:
        raise RecipeError(f"no trit-plane type '{name}'; there are {TP2_1.name} and {TP2_0.name}") from None
