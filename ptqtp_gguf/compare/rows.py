"""From what other rooms found out about a file to the rows of a comparison's document."""

from __future__ import annotations

from pathlib import Path

from ..inspect import PlaneStatistics, inspect
from ..measure import Bench as Measured
from ..measure import File
from ..source import stem_of
from .candidates import Made
from .document import Bench, Digits, Model, Row, Scales


def model_of(source: Path, reference: Path) -> Model:
    """What is compared. source: what the user named; reference: its GGUF in 16 or 32 bits. Raises InputError."""
    report = inspect(reference)
    tokens = report.metadata.get("tokenizer.ggml.tokens")
    return Model(
        name=str(report.metadata.get("general.name") or (source.name if source.is_dir() else stem_of(source))),
        source=source.name,
        weights=report.weights,
        vocab=len(tokens) if isinstance(tokens, list) else None,
        architecture=str(report.metadata.get("general.architecture")),
    )


def row_of(made: Made, weights: int) -> Row:
    """A row before anything is measured. Raises InputError.

    weights  of the reference: a head that the file stores apart counts as what it costs
    """
    report = inspect(made.path)
    return Row(
        label=made.label,
        kind=made.kind,
        file=made.path.name,
        sha256=made.sha256,
        made=made.made,
        size=report.size,
        bpw=8 * report.size / weights,
        bpw_blocks=report.bpw_blocks,
        types=report.types,
    )


def set_planes(row: Row, found: PlaneStatistics | None) -> None:
    """Fill in digits and scales, where the file has trit planes."""
    if found:
        planes = found.as_dict()
        row.digits, row.scales = Digits(**planes["digits"]), Scales(**planes["scales"])


def bench_of(done: Measured) -> Bench:
    """How speed was measured."""
    s = done.settings
    bandwidth: dict[str, float | None] = {str(t): b * 1e-9 for t, b in done.bandwidth.items()}
    return Bench(list(s.prompt), list(s.generate), list(s.threads), len(done.rounds), s.first, bandwidth)


def set_speed(row: Row, done: Measured, file: File) -> None:
    """Fill in speed, memory and energy. file: the row's, one of those measured."""
    row.file, row.size, row.token_bytes = file.path.name, file.size, file.token_bytes
    row.speed, row.ratios = done.speeds(file), done.ratios(file)
    row.load_s, row.ttft_s = done.start(file, "load_s"), done.start(file, "ttft_s")
    row.peak_memory, row.energy = done.peak_memory(file), done.start(file, "energy")
