"""Calibration in order: the inputs of a matrix come through all that is quantized before it, in its own block too.

A block's matrices fall into stages by their input (in Llama: q k v, o, gate up, down). For each stage all windows run
through the block with what is quantized so far, and beside it through the unquantized block on the unquantized stream;
the caller gets the second moments h of the inputs, and `cross` with the unquantized ones, quantizes, and hands the new
weights back before the next stage is gathered.

In memory are, at a time: one block twice (as it was and as it becomes), a stage's h and cross, and a batch of windows.
Both streams lie in files between blocks: tokens times hidden size, in the model's type, twice each.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import OutputError
from ..progress import Progress, no_progress
from ..source import Checkpoint
from .model import Blocks, Stop
from .streams import Batches, targets
from .sums import Moment, Sums

if TYPE_CHECKING:
    import torch

Weights = dict[str, NDArray[np.float32]]


@dataclass
class Stage:
    """Matrices of one block with one input.

    index    of the block
    moments  by GGUF tensor name
    cross    float32 (C, C): sum of c * x_full xT, x as in the moments; None for experts
    params   GGUF tensor name -> full name of the parameter of transformers
    """

    index: int
    moments: dict[str, Moment]
    cross: torch.Tensor | None
    params: dict[str, str]
    _held: dict[str, torch.Tensor] = field(default_factory=dict)
    _new: dict[str, torch.Tensor] = field(default_factory=dict)

    def parameter(self, name: str) -> torch.Tensor:
        """A weight of the block, unquantized, by its full name. Raises KeyError."""
        return self._held[name]

    def replace(self, weights: dict[str, torch.Tensor]) -> None:
        """What the weights have become, by full name, of the same shapes."""
        self._new.update(weights)


def in_order(
    found: Checkpoint,
    tokens: NDArray[np.int64],
    name: Callable[[str], str | None],
    wanted: Collection[str],
    folder: Path,
    *,
    first: int = 0,
    finished: Callable[[int], None] = lambda _: None,
    weights: Weights | None = None,
    device: str = "cpu",
    progress: Progress = no_progress,
) -> Iterator[Stage]:
    """Yields the stages of all blocks in the order of their use.

    tokens   int64 (N, T): N windows of T tokens
    name     from parameters to GGUF tensors (mapping.names)
    wanted   GGUF tensors to be quantized
    folder   exists; for the streams between blocks
    first    the block to continue with, after an earlier run; its streams lie in the folder
    finished is called with each block when the streams behind it are on the disk: the one to continue with is the next
    weights  of tokens (sensitivity.token_weights), by the first linear layer of those with one input
    Raises CalibrationError, OutputError.
    """
    work = _InOrder(found, tokens, name, wanted, folder, finished, weights or {}, device, progress)
    try:
        yield from work.blocks_from(first)
    except OSError as e:
        raise OutputError(f"{folder}: {e.strerror or e}; run again to resume") from None


def has_streams(folder: Path, index: int) -> bool:
    """Whether the streams that block `index` begins with lie in the folder."""
    return all(path.exists() for path in _streams(folder, index))


def _streams(folder: Path, index: int) -> tuple[Path, Path]:
    return folder / f"states.{index}.bin", folder / f"full.{index}.bin"


class _InOrder:
    def __init__(
        self,
        found: Checkpoint,
        tokens: NDArray[np.int64],
        name: Callable[[str], str | None],
        wanted: Collection[str],
        folder: Path,
        finished: Callable[[int], None],
        weights: Weights,
        device: str,
        progress: Progress,
    ) -> None:
        self.folder, self.name, self.wanted = folder, name, wanted
        self.finished, self.weights, self.progress = finished, weights, progress
        self.blocks = Blocks(found, device)
        self.batches = Batches(self.blocks, tokens)
        self.tokens = tokens

    def blocks_from(self, first: int) -> Iterator[Stage]:
        blocks = self.blocks
        blocks.load(-1)
        if first == 0:
            a, b = _streams(self.folder, 0)
            with open(a, "wb") as f, open(b, "wb") as g:
                for rows, ids in self.batches.of_tokens():
                    self._report(-1, 0, rows.start, "embedding")
                    y = blocks.embed(ids)
                    self.batches.write(f, y)
                    self.batches.write(g, y)
        else:
            blocks.load(first - 1)  # how a block returns is known once one has run
            blocks.run(first - 1, next(self.batches.of_file(_streams(self.folder, first)[0]))[1][:1])
            blocks.unload(first - 1)
        blocks.unload(-1)
        for i in range(first, blocks.n):
            yield from self._block(i)
            self.finished(i)
            for path in _streams(self.folder, i):
                path.unlink(missing_ok=True)

    def _report(self, block: int, stage: int, window: int, detail: str) -> None:
        n = len(self.tokens)
        done = ((block + 1) * 5 + stage) * n + window
        self.progress("calibrating", done, (self.blocks.n + 1) * 5 * n, detail)

    def _block(self, i: int) -> Iterator[Stage]:
        blocks = self.blocks
        blocks.load(i)
        try:
            params = dict(blocks.blocks[i].named_parameters())
            full = {n: p.data for n, p in params.items()}
            now = dict(full)
            prefix = f"{blocks.prefix}.{i}."
            for k, (group, c) in enumerate(self._stages(i)):
                detail = f"block {i}, {group[0].removesuffix('.weight')}"
                moments, cross = self._retried(
                    functools.partial(self._gather, i, k, group, c, params, full, now, detail), detail
                )
                names = {t: prefix + n for n in group for t in self._targets(i, n)[0]}
                held = {prefix + n: full[n] for n in group}
                stage = Stage(i, moments, cross, names, held)
                del moments, cross
                yield stage
                for full_name, w in stage._new.items():
                    n = full_name.removeprefix(prefix)
                    now[n] = w.to(full[n].device, full[n].dtype).reshape(full[n].shape)
                del stage
            self._retried(functools.partial(self._advance, i, params, full, now), f"block {i}")
            for n, p in params.items():
                p.data = full[n]
        finally:
            blocks.unload(i)

    def _targets(self, i: int, name: str) -> tuple[tuple[str, ...], int, int]:
        return targets(self.blocks, self.name, self.wanted, i, name)

    def _stages(self, i: int) -> list[tuple[list[str], NDArray[np.float32] | None]]:
        """The wanted parameters of block i, those with one input together, in the order of their use; and the weights
        of their tokens, which stand under the first of all parameters with that input, wanted or not."""
        groups: dict[Any, list[str]] = {}
        weights: dict[Any, NDArray[np.float32]] = {}
        keep: list[Any] = []

        def tap(x: torch.Tensor, name: str, expert: int, n_experts: int) -> None:
            keep.append(x)  # so that no other gets its id
            key = name if n_experts else id(x)
            if (c := self.weights.get(f"{self.blocks.prefix}.{i}.{name}")) is not None:
                weights.setdefault(key, c)
            if self._targets(i, name)[0] and not any(name in g for g in groups.values()):
                groups.setdefault(key, []).append(name)

        self.blocks.run(i, next(self.batches.of_file(_streams(self.folder, i)[0]))[1][:1], tap)
        return [(group, weights.get(key)) for key, group in groups.items()]

    def _retried(self, work: Callable[[], Any], detail: str) -> Any:
        """Again with half the windows at a time where memory ran out."""
        import torch

        while True:
            try:
                with torch.no_grad():
                    return work()
            except (torch.OutOfMemoryError, MemoryError):
                pass  # leave the handler first: its traceback holds the tensors
            self.batches.halve(detail)

    def _gather(
        self,
        i: int,
        k: int,
        group: list[str],
        weight: NDArray[np.float32] | None,
        params: dict[str, Any],
        full: dict[str, Any],
        now: dict[str, Any],
        detail: str,
    ) -> tuple[dict[str, Moment], Any]:
        """Moments of the inputs of one stage, and their cross moments with the unquantized stream."""
        import torch

        sums = Sums(lambda name: self._targets(i, name) if name in group else ((), -1, 0))
        seen: dict[str, Any] = {}
        cross: Any = None
        left = set(group)
        experts = False

        def tap_full(x: torch.Tensor, name: str, expert: int, n_experts: int) -> None:
            if name == group[0] and not n_experts:
                seen["x"] = x
                raise Stop

        def tap(x: torch.Tensor, name: str, expert: int, n_experts: int) -> None:
            nonlocal cross, experts
            if name not in group:
                return
            if n_experts:
                experts = True
                sums.tap(x, name, expert, n_experts)
                return
            if name == group[0]:
                flat = x.reshape(-1, x.shape[-1]).float()
                scaled = flat if seen["c"] is None else flat * seen["c"]
                sums.tap(x, name, expert, n_experts, scaled)
                other = seen["x"].reshape(flat.shape).float()
                if cross is None:
                    cross = torch.zeros((flat.shape[1], flat.shape[1]), device=flat.device)
                cross.addmm_(other.T, scaled)
            else:
                sums.tap(x, name, expert, n_experts)
            left.discard(name)
            if not left:
                raise Stop

        quantized, unquantized = _streams(self.folder, i)
        both = zip(self.batches.of_file(quantized), self.batches.of_file(unquantized), strict=True)
        with self.blocks.fast_products():
            for (rows, x), (_, x_full) in both:
                self._report(i, k, rows.start, detail)
                sums.next()
                left.update(group)
                seen["c"] = None
                if weight is not None:
                    seen["c"] = torch.from_numpy(weight[rows].reshape(-1, 1)).to(x.device)
                _set(params, full)
                self.blocks.run(i, x_full, tap_full)
                _set(params, now)
                self.blocks.run(i, x, tap)
                seen.clear()
        return sums.moments(), None if experts else cross

    def _advance(self, i: int, params: dict[str, Any], full: dict[str, Any], now: dict[str, Any]) -> None:
        """Both streams through block i."""
        for source, out, held in zip(_streams(self.folder, i), _streams(self.folder, i + 1), (now, full), strict=True):
            _set(params, held)
            with open(out, "wb") as file:
                for rows, x in self.batches.of_file(source):
                    self._report(i, 4, rows.start, f"block {i}")
                    y = self.blocks.run(i, x)
                    assert y is not None
                    self.batches.write(file, y)
                file.flush()
                os.fsync(file.fileno())


def _set(params: dict[str, Any], held: dict[str, Any]) -> None:
    for n, p in params.items():
        p.data = held[n]
