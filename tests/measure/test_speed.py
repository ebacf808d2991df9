"""Speed: figures and warnings from made-up rounds, and a real llama-bench on a tiny model."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bench_models import FFN, HERE, VOCAB, WIDTH, made_up, write_llama

from ptqtp_gguf.conversion.pipeline import convert
from ptqtp_gguf.errors import BenchError, InputError
from ptqtp_gguf.measure import _load_child, machine, rounds
from ptqtp_gguf.measure.energy import Rapl
from ptqtp_gguf.measure.rounds import File, Settings
from ptqtp_gguf.measure.speed import bench, token_bytes
from ptqtp_gguf.source.gguf import GgufSource

bench_module = importlib.import_module("ptqtp_gguf.measure.speed")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A tiny model as F32 and as TP2_1."""
    folder = tmp_path_factory.mktemp("bench")
    full = write_llama(folder / "tiny-f32.gguf")
    convert(full, folder / "tiny.gguf")
    return [folder / "tiny.gguf", full]


# ---- mathematics ----


def test_figures_of_a_row() -> None:
    b = made_up({"a": [10.0, 12.0, 11.0, 14.0, 13.0], "b": [5.0, 6.0, 5.5, 7.0, 6.5]})
    data = json.loads(json.dumps(b.as_dict(), allow_nan=False))
    row = data["rows"][0]
    assert row["label"] == "a" and row["file"] == "a.gguf" and row["token_bytes"] == 500_000_000
    assert row["speed"] == [
        {
            "test": "tg8",
            "n_prompt": 0,
            "n_gen": 8,
            "threads": 1,
            "median": 12.0,
            "low": 10.0,
            "high": 14.0,
            "samples": [10.0, 12.0, 11.0, 14.0, 13.0],
            "share": pytest.approx(0.6),
        },
    ]
    assert row["ratios"] == {"b": {"tg8 t1": {"median": 2.0, "low": 2.0, "high": 2.0, "clear": True}}}
    assert data["rows"][1]["ratios"]["a"]["tg8 t1"]["median"] == 0.5
    assert (row["load_s"], row["ttft_s"], row["peak_memory"], row["energy"]) == (0.5, 2.0, 1000, None)
    assert data["bench"]["bandwidth"] == {"1": 10.0} and data["bench"]["rounds"] == 5
    assert data["machine"]["load"] == [0.0, 0.8] and data["warnings"] == []


def test_warnings_name_what_is_doubtful(monkeypatch: pytest.MonkeyPatch) -> None:
    even = {"a": [10.0] * 5, "b": [5.0] * 5}
    assert made_up(even).warnings == []
    assert "up to 30% of the CPUs in 5 of 5 rounds" in made_up(even, busy=0.3).warnings[0]
    assert made_up(even, busy=None).warnings == []
    slow = replace(made_up(even), machine=replace(HERE, governor="performance, powersave", cpus=1), free=999)
    assert [w.split(":")[0] for w in slow.warnings[:1]] == ["the CPU's governor is powersave"]
    assert sum("of memory are free" in w for w in slow.warnings) == 2
    threads = made_up(even)
    threads.machine = replace(HERE, cpus=0)
    assert threads.warnings == ["1 threads on 0 CPUs: they wait for one another"]
    threads.machine = replace(HERE, quota=0.5)
    assert threads.warnings == ["1 threads, but the container may take 0.5 CPUs' worth of time: they are held up"]
    wide = made_up({"a": [10.0, 9.0, 10.0, 10.0, 10.0], "b": [8.0, 20.0, 9.0, 8.0, 12.0], "c": [10.0] * 5})
    (text, other) = [w for w in wide.warnings if "differ too much" in w] + [""]
    assert "tg8 t1" in text and "b / a 0.80 to 2.22" in text and "c / a" not in text and not other
    assert "2 rounds: intervals hold the true median with 50% only" in made_up({"a": [1.0, 1.0]}).warnings[0]
    assert "108% of memory's bandwidth" in made_up({"a": [21.6] * 5}).warnings[0]
    monkeypatch.setenv("PTQTP_KERNEL", "scalar")
    assert made_up(even).warnings == ["PTQTP_KERNEL=scalar forces a kernel"]


# ---- bytes a token ----


def test_bytes_of_a_token(tmp_path: Path) -> None:
    def count(name: str, extra: dict[str, tuple[int, ...]] | None = None, **numbers: int) -> int:
        with GgufSource(write_llama(tmp_path / name, extra, **numbers)) as source:
            return token_bytes(source)

    block = 4 * (4 * WIDTH * WIDTH + 3 * WIDTH * FFN)
    head = 4 * VOCAB * WIDTH
    assert count("tied.gguf") == block + head  # the embedding is the head; norms are no matrices
    assert count("untied.gguf", {"output": (VOCAB, WIDTH)}) == block + head
    experts: dict[str, tuple[int, ...]] = {"blk.0.ffn_up_exps": (8, FFN, WIDTH)}
    assert count("moe.gguf", experts, expert_count=8, expert_used_count=2) == block + head + 4 * 2 * FFN * WIDTH
    assert count("all.gguf", experts) == block + head + 4 * 8 * FFN * WIDTH
    more: dict[str, tuple[int, ...]] = {"per_layer_token_embd": (VOCAB, 256), "blk.1.attn_q": (WIDTH, WIDTH)}
    assert count("mtp.gguf", more, block_count=2, nextn_predict_layers=1) == block + head


# ---- the real thing ----


@pytest.mark.runtime
def test_bench_of_two_files_and_taking_up(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[rounds.Round] = []
    order: list[str] = []
    run = rounds._llama_bench

    def noted(f: File, *how: Any) -> Any:
        order.append(f.label)
        return run(f, *how)

    monkeypatch.setattr(rounds, "_llama_bench", noted)
    monkeypatch.setattr(machine, "PROBE_BYTES", 1 << 22)
    monkeypatch.setattr(machine, "MIN_PROBE_BYTES", 1 << 20)
    seen: list[tuple[int, int]] = []

    def progress(stage: str, done: int, total: int, detail: str) -> None:
        seen.append((done, total))

    b = bench(files, prompt=(8,), generate=(4, 4), threads=(1,), rounds=2, keep=kept.append, progress=progress)
    assert order == ["tiny", "tiny-f32", "tiny-f32", "tiny"]  # the order turns
    assert [d for d, _ in seen] == sorted(d for d, _ in seen) and seen[-1] == (10, 10)
    data = json.loads(json.dumps(b.as_dict(), allow_nan=False))
    assert [r["label"] for r in data["rows"]] == ["tiny", "tiny-f32"]
    for row, path in zip(data["rows"], files, strict=True):
        assert [(s["test"], len(s["samples"])) for s in row["speed"]] == [("pp8", 2), ("tg4", 2)]
        assert all(s["low"] > 0 for s in row["speed"]) and row["size"] == path.stat().st_size
        assert row["load_s"] > 0 and row["ttft_s"] > 0 and row["peak_memory"] > 10 << 20
    assert data["rows"][0]["token_bytes"] < data["rows"][1]["token_bytes"]
    assert data["rows"][0]["ratios"]["tiny-f32"].keys() == {"pp8 t1", "tg4 t1"}

    order.clear()
    stored: list[Any] = json.loads(json.dumps(kept))
    again = bench(files, prompt=(8,), generate=(4,), threads=(1,), rounds=2, done=stored)
    assert not order and again.as_dict()["rows"] == b.as_dict()["rows"]  # nothing measured, the same figures
    stored[0]["sizes"]["tiny"] += 1
    del stored[1]["speed"]["tiny"]["tg4 t1"]
    last: list[rounds.Round] = []
    nothing: Any = None
    with pytest.raises(KeyboardInterrupt):  # rounds of another file or setting do not count; Ctrl-C goes through
        bench(
            files,
            prompt=(8,),
            generate=(4,),
            threads=(1,),
            rounds=1,
            done=[*stored, {}, nothing],
            keep=_interrupt(last),
        )
    assert last[0]["number"] == 0


def _interrupt(into: list[rounds.Round]) -> Callable[[rounds.Round], None]:
    def keep(found: rounds.Round) -> None:
        into.append(found)
        raise KeyboardInterrupt

    return keep


@pytest.mark.runtime
def test_bad_arguments_and_files(files: list[Path], tmp_path: Path) -> None:
    for match, changes in (
        ("0 rounds", {"rounds": 0}),
        ("nothing to measure", {"prompt": (), "generate": ()}),
        ("0 threads", {"threads": (0,)}),
        ("-1 tokens", {"prompt": (-1,)}),
        ("each another", {"labels": ["a"]}),
    ):
        with pytest.raises(BenchError, match=match):
            bench(files, **changes)
    with pytest.raises(BenchError, match="name one"):
        bench([])
    with pytest.raises(InputError, match="nowhere"):
        bench([tmp_path / "nowhere.gguf"])
    assert bench_module._labels([files[0], files[0]], None) == ["tiny", "tiny (2)"]


@pytest.mark.runtime
def test_a_file_that_does_not_load_is_named(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "odd.gguf", {"blk.0.attn_odd": (4, 4)})  # one tensor too many
    file = File(path, "odd", 1, 1)
    with pytest.raises(BenchError, match=r"odd\.gguf: llama-bench failed: .*wrong number of tensors"):
        rounds._llama_bench(file, Settings((1,), (), (1,), 1), 1)
    with pytest.raises(BenchError, match=r"odd\.gguf: loading failed: .*wrong number of tensors"):
        rounds._first_token(file, Settings((1,), (), (1,), 1))
    for text in ("", "[]", "[{}]", '[{"n_prompt": 1}]'):
        with pytest.raises(BenchError, match="lacks a test or is not JSON"):
            rounds.parse(text, Settings((1,), (), (1,), 1), 1, path)
    with pytest.raises(BenchError, match="ended by SIGKILL; memory is likely short"):
        rounds._run(["sh", "-c", "kill -9 $$"], file, "it")


@pytest.mark.runtime
def test_energy_of_a_token(files: list[Path]) -> None:
    class Meter(Rapl):  # 3 J between two readings
        readings = 0

        def read(self) -> dict[Path, int]:
            self.readings += 3_000_000
            return {Path(): self.readings}

    assert _load_child.measure(files[0], 1, 4, 6, Meter())["energy"] == pytest.approx(0.5)
    assert _load_child.measure(files[0], 1, 4, 0, Meter())["energy"] is None
