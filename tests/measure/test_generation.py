"""Greedy text and questions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ptqtp_gguf.conversion import pipeline as conversion
from ptqtp_gguf.llamacpp import model as runtime
from ptqtp_gguf.measure import generation
from ptqtp_gguf.plan.options import Options

pytestmark = pytest.mark.runtime


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    files = {name: folder / f"{name}.gguf" for name in ("bf16", "ours", "other")}
    conversion.convert(tiny_checkpoint, files["ours"], Options(keep_bf16=files["bf16"]))
    conversion.convert(files["bf16"], files["other"], Options(type="TP2_0"))
    return files


def test_agreement_is_greedy_generation(tiny: dict[str, Path]) -> None:
    """Feeding the reference's text finds the very token at which free writing differs."""
    texts, limit = generation.prompts()[:10], 24
    with runtime.Model(tiny["ours"]) as model:
        told = np.array(generation.continued(model, texts, 2, limit=limit), np.int32).reshape(-1, limit)
        assert generation.agreed(model, texts, told, 2) == [limit] * len(texts)
    with runtime.Model(tiny["other"]) as model:
        own = np.array(generation.continued(model, texts, 2, limit=limit), np.int32).reshape(-1, limit)
        free = [int(np.argmin([*(own[i] == told[i]), False])) for i in range(len(texts))]
        assert generation.agreed(model, texts, told, 2) == free
    assert 0 < sum(free) < limit * len(texts)


def test_questions_are_sound() -> None:
    asked = generation.questions()
    assert len(asked) == 60 and len({q.context for q in asked}) == 60 and len(set(generation.prompts())) == 24
    assert all(len(set(q.endings)) == 4 and all(e[0] == " " and e[1] != " " for e in q.endings) for q in asked)
    assert [sum(q.right == i for q in asked) for i in range(4)] == [15] * 4  # "always the first" gets a quarter


def test_the_model_knows_the_answers(demo_files: dict[str, Path]) -> None:
    """One who chose blindly would have 5 of 20 right, and 12 or more once in a thousand times."""
    asked = generation.questions()[20:40]
    with runtime.Model(demo_files["ours"]) as model:
        answers = generation.answered(model, asked, 2)
    assert sum(a == q.right for a, q in zip(answers, asked, strict=True)) >= 12
