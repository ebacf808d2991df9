"""What the model card says of a conversion."""

from __future__ import annotations

from pathlib import Path

from .. import __version__
from ..codec import TYPES, Key
from ..files import type_name
from ..plan import Options, Request
from .model_card import CardFacts, OutFile, TypeLine, origin_of
from .summary import Summary

FLOATS = ("F32", "F16", "BF16", "F64")


def card_facts(summary: Summary, source: Path, options: Options) -> CardFacts:
    """What the model card tells of a conversion."""
    request = Request.of(options)
    recipe = request.recipe
    types: dict[str, list[int]] = {}
    for r in summary.rows:
        line = types.setdefault(type_name(r.choice.type), [0, 0, 0])
        for i, n in enumerate((1, r.tensor.n_weights, r.out.nbytes)):
            line[i] += n
    meta = {kv.key: kv.value() for kv in summary.kvs}
    return CardFacts(
        files=[OutFile(p.name, p.stat().st_size, summary.sha256[p.name]) for p in summary.files],
        types=[TypeLine(kind, *line) for kind, line in types.items()],
        method=request.method.name,
        recipe=recipe.name,
        version=__version__,
        source=source.name,
        origin=origin_of(meta),
        source_type=str(meta[Key.SOURCE_TYPE]),
        quantized_source=str(meta[Key.SOURCE_TYPE]) not in FLOATS,
        calibration=str(meta[Key.CALIBRATION]),
        recipe_text=recipe.canonical(),
        recipe_description=recipe.description,
        errors=[(r.tensor.name, r.rel_mse) for r in summary.rows if r.rel_mse is not None],
        notes=summary.notes,
        fallbacks=[(r.tensor.name, type_name(r.choice.type), r.choice.reason) for r in summary.fallbacks],
        provenance=[(Key.SOURCE_HASH, summary.source_hash), (Key.FORMAT_VERSION, str(meta[Key.FORMAT_VERSION]))],
        q4_0_twin=all(t.q4_0_twin for r in summary.rows if (t := TYPES.get(r.choice.type))),
    )
