"""What a conversion will do, and what it has done."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from .. import __version__
from ..codec import types as fmt
from ..files.gguf import KV, type_name
from ..plan.options import Options, method_name, recipe_of, resolved
from ..plan.recipe import Recipe
from ..plan.rows import PlanRow
from .card import CardFacts, OutFile, TypeLine, origin_of
from .output_files import Part

FLOATS = ("F32", "F16", "BF16", "F64")


@dataclass
class Summary:
    """What was written.

    size         bytes of all files
    files        the files, one unless split
    sha256       by file name
    resumed      tensors that were done before
    source_hash  of the source's metadata and tensors, as in ptqtp.source_hash
    kvs          metadata of the (first) file
    unweighted   (tensor, what of it) that a method with importance had to treat without
    notes        what calibration and tuning had to leave as it was
    """

    path: Path
    size: int
    seconds: float
    rows: list[PlanRow] = field(default_factory=list)
    source_types: dict[str, int] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    sha256: dict[str, str] = field(default_factory=dict)
    resumed: int = 0
    device: str = "cpu"
    source_hash: str = ""
    kvs: list[KV] = field(default_factory=list)
    unweighted: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def n_weights(self) -> int:
        return sum(r.tensor.n_weights for r in self.rows)

    @property
    def bpw(self) -> float:
        """Bits per weight of the whole file, metadata counted."""
        return 8 * self.size / self.n_weights

    def weights_by_type(self) -> dict[str, int]:
        """Weights in each target type."""
        count: Counter[str] = Counter()
        for r in self.rows:
            count[type_name(r.choice.type)] += r.tensor.n_weights
        return dict(count)

    @property
    def fallbacks(self) -> list[PlanRow]:
        return [r for r in self.rows if r.choice.fallback]


@dataclass
class Plan:
    """What a conversion will do: the table, the files, and what it needs. memory in bytes."""

    rows: list[PlanRow]
    parts: list[Part]
    memory: int
    recipe: Recipe

    @property
    def size(self) -> int:
        return sum(p.size for p in self.parts)


def card_facts(summary: Summary, source: Path, options: Options) -> CardFacts:
    """What the model card tells of a conversion."""
    options = resolved(options)
    recipe = recipe_of(options)
    types: dict[str, list[int]] = {}
    for r in summary.rows:
        line = types.setdefault(type_name(r.choice.type), [0, 0, 0])
        for i, n in enumerate((1, r.tensor.n_weights, r.out.nbytes)):
            line[i] += n
    meta = {kv.key: kv.value() for kv in summary.kvs}
    return CardFacts(
        files=[OutFile(p.name, p.stat().st_size, summary.sha256[p.name]) for p in summary.files],
        types=[TypeLine(kind, *line) for kind, line in types.items()],
        method=method_name(options),
        recipe=recipe.name,
        version=__version__,
        source=source.name,
        origin=origin_of(meta),
        source_type=str(meta[fmt.Key.SOURCE_TYPE]),
        quantized_source=str(meta[fmt.Key.SOURCE_TYPE]) not in FLOATS,
        calibration=str(meta[fmt.Key.CALIBRATION]),
        recipe_text=recipe.canonical(),
        recipe_description=recipe.description,
        errors=[(r.tensor.name, r.rel_mse) for r in summary.rows if r.rel_mse is not None],
        fallbacks=[(r.tensor.name, type_name(r.choice.type), r.choice.reason) for r in summary.fallbacks],
        provenance=[(fmt.Key.SOURCE_HASH, summary.source_hash), (fmt.Key.FORMAT_VERSION, str(fmt.FORMAT_VERSION))],
        q4_0_twin=not any(r.choice.type == fmt.TP2_0.id for r in summary.rows),
    )
