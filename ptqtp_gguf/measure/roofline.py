"""How many bytes of weights decoding has to read: what memory bandwidth alone allows."""

from __future__ import annotations

from ..source.base import Source

LOOKED_UP = ("position_embd.weight", "token_types.weight", "per_layer_token_embd.weight")  # only rows of them are read


def token_bytes(source: Source) -> int:
    """Bytes of the matrices that a decoded token reads.

    All but tables of which only rows are looked up (an embedding that is the head too is read as a head); of experts
    those that a token uses; not the blocks that only predict further tokens. Vectors and the cache of keys and values
    are not counted.
    """
    arch = source.get("general.architecture")

    def number(key: str) -> int:
        value = source.get(f"{arch}.{key}")
        return value if isinstance(value, int) else 0

    used, experts = number("expert_used_count"), number("expert_count")
    last = number("block_count") - number("nextn_predict_layers")
    tied = all(t.name != "output.weight" for t in source.tensors)
    total = 0
    for t in source.tensors:
        if len(t.shape) < 2 or t.name in LOOKED_UP or (t.name == "token_embd.weight" and not tied):
            continue
        head, _, rest = t.name.partition(".")
        block = rest.partition(".")[0]
        if head == "blk" and last > 0 and block.isdigit() and int(block) >= last:
            continue
        share = used / experts if "_exps." in t.name and 0 < used <= experts else 1.0
        total += round(t.nbytes * share)
    return total
