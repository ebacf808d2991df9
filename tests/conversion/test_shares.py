"""Shares of a conversion."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptqtp_gguf.conversion import shares

pytest.importorskip("torch.distributed")


@given(st.lists(st.integers(0, 1000), max_size=60), st.integers(1, 9))
def test_shares_are_assigned_once_and_evenly(weights: list[int], n: int) -> None:
    mine = shares.assign(weights, n)
    assert sorted(i for m in mine for i in m) == list(range(len(weights))) and len(mine) == n
    loads = [sum(weights[i] for i in m) for m in mine]
    assert max(loads) - min(loads) <= max(weights, default=0)
