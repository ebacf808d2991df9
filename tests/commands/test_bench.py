"""`bench` as a user types it."""

from __future__ import annotations

import importlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from bench_models import made_up, write_llama

from ptqtp_gguf.conversion.pipeline import convert
from ptqtp_gguf.measure import rounds
from ptqtp_gguf.measure.rounds import File, Settings

command = importlib.import_module("ptqtp_gguf.commands.bench")
bench_module = importlib.import_module("ptqtp_gguf.measure.speed")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A tiny model as F32 and as TP2_1."""
    folder = tmp_path_factory.mktemp("bench")
    full = write_llama(folder / "tiny-f32.gguf")
    convert(full, folder / "tiny.gguf")
    return [folder / "tiny.gguf", full]


@pytest.mark.runtime
def test_command(files: list[Path], cli: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = cli("bench", files[0], "--prompt", "", "--generate", "4", "--threads", "1", "--rounds", "1", "--json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and events[0]["event"] == "progress" and events[-1]["event"] == "done", done.stderr
    assert events[-1]["rows"][0]["speed"][0]["test"] == "tg4"
    assert cli("bench", files[0], "--threads", "two").returncode == 2


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    command.print_bench(made_up({"ours": [1200.0] * 5, "theirs": [600.0, 700.0, 600.0, 600.0, 601.0]}))
    command.print_bench(made_up({"ours": [12.0, 9.0], "theirs": [6.0, 8.0]}))
    out = " ".join(capsys.readouterr().out.split())
    for text in (
        "tg8 t1 t/s",
        "first token s",
        " 1200 ",
        "600.0 (0.50x) ",
        "7.0 (0.69x?)",
        "median of 2 rounds; in brackets",
        "memory, 1 thread: 10.0 GB/s; decoding reaches ours 6000%, theirs 3000% of it",
        "2 cores, 17.2 GB, os, kernel",
        "warning: 2 rounds: ",
    ):
        assert text in out
    assert "J/token" not in out  # nothing is known of it


@pytest.mark.runtime
def test_interrupted_command_shows_what_is_finished(
    files: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finished = made_up({"tiny": [10.0] * 3}).rounds[0]
    finished["sizes"]["tiny"] = files[0].stat().st_size

    def one_round(settings: Settings, known: list[File], number: int, report: object) -> rounds.Round:
        if number == 2:
            raise KeyboardInterrupt
        return finished

    monkeypatch.setattr(bench_module, "one_round", one_round)
    with pytest.raises(SystemExit) as stop:
        command.bench(files[:1], prompt="", generate="8", threads="1", rounds=5)
    told = capsys.readouterr()
    assert stop.value.code == 130 and "2 of 5 rounds were measured" in told.err
    assert "median of 2 rounds" in told.out
