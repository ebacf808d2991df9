"""What torchrun tells a rank."""

from __future__ import annotations

import os

import pytest

from ptqtp_gguf.distributed import ranks

pytest.importorskip("torch.distributed")


@pytest.mark.parametrize(("local", "device"), [(0, "4"), (1, "7"), (3, "7")])
def test_each_rank_has_its_gpu(local: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setenv("LOCAL_RANK", str(local))
    ranks.own_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == device
