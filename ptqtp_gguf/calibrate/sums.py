"""Sums of x xT over batches: the second moments of each distinct input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass
class Moment:
    """What one tensor's inputs were.

    h       float32 (C, C): sum over tokens of x xT; (E, C, C) of E experts. Tensors that share it share the object.
    counts  tokens that were summed, one number an expert, or one in all
    shared  its own name, or that of a tensor with the same input
    """

    h: torch.Tensor
    counts: list[int]
    shared: str


class Sums:
    """Sums of x xT over batches, one for each distinct input of the tensors that are wanted.

    targets: from a parameter to what it becomes, and if it is one of E experts, its number and E, else -1 and 0
    """

    def __init__(self, targets: Callable[[str], tuple[tuple[str, ...], int, int]]) -> None:
        self._targets = targets
        self._known: dict[str, tuple[tuple[str, ...], int, int]] = {}
        self._leader: dict[str, str] = {}  # parameter -> the first one with the same input
        self._inputs: dict[int, tuple[Any, str]] = {}  # of this batch; the reference keeps the id from being used again
        self._h: dict[tuple[str, ...], Any] = {}
        self._counts: dict[tuple[str, ...], list[int]] = {}

    def next(self) -> None:
        """A new batch begins."""
        self._inputs.clear()

    def tap(self, x: torch.Tensor, name: str, expert: int, n_experts: int, scaled: torch.Tensor | None = None) -> None:
        """See blocks.Tap. scaled (tokens, C): x times the weights of the tokens, where they have some."""
        import torch

        if name not in self._known:
            self._known[name] = self._targets(name)
        key, own, n_own = self._known[name]
        if not key:
            return
        if n_experts == 0:
            leader = self._leader.setdefault(name, self._inputs.setdefault(id(x), (x, name))[1])
            if leader != name:
                return
            expert, n_experts = own, n_own
        c = x.shape[-1]
        if key not in self._h:
            shape = (n_experts, c, c) if n_experts else (c, c)
            self._h[key] = torch.zeros(shape, dtype=torch.float32, device=x.device)
            self._counts[key] = [0] * max(1, n_experts)
        h, counts = self._h[key], self._counts[key]
        if n_experts and expert < 0:
            for i, part in enumerate(x):  # every token stands with every expert; zero where it was not sent to it
                _add(h[i], part)
                counts[i] += int((part != 0).any(dim=-1).sum())
            return
        _add(h[expert] if n_experts else h, x, scaled)
        counts[max(0, expert)] += x.numel() // c

    def moments(self) -> dict[str, Moment]:
        """By GGUF tensor name."""
        out: dict[str, Moment] = {}
        for name, (key, _, _) in self._known.items():
            lead = self._known[self._leader.get(name, name)][0]
            for tensor in key:
                if lead in self._h:
                    out.setdefault(tensor, Moment(self._h[lead], self._counts[lead], lead[0]))
        return out


def _add(h: torch.Tensor, x: torch.Tensor, scaled: torch.Tensor | None = None) -> None:
    """h += xT scaled, in float32; scaled is x unless given. h (C, C), x (..., C)."""
    x = x.reshape(-1, x.shape[-1]).float()
    h.addmm_(x.T, x if scaled is None else scaled)
