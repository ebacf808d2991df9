"""What a conversion will do, and what it has done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..files import KV, type_name
from ..plan import PlanRow, Recipe
from .output_files import Part


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
    notes        what the file does not carry of its source; what calibration and tuning had to leave as it was
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
    """What a conversion will do: the table, the files, and what it needs. memory in bytes; notes: of the source."""

    rows: list[PlanRow]
    parts: list[Part]
    memory: int
    recipe: Recipe
    notes: Sequence[str] = ()

    @property
    def size(self) -> int:
        return sum(p.size for p in self.parts)
