"""The installed command, as a user types it: output, one line on error, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import Cli

from ptqtp_gguf import __version__


@pytest.mark.slow
def test_help_names_every_command_with_an_example(cli: Cli) -> None:
    done = cli("--help")
    assert done.returncode == 0
    for command in ("convert", "export-q4_0", "inspect", "run", "chat", "serve"):
        assert command in done.stdout
        page = cli(command, "--help")
        assert page.returncode == 0
        assert f"ptqtp-gguf {command}" in page.stdout and "Example" in page.stdout
    assert cli("--version").stdout == f"ptqtp-gguf {__version__}\n"


@pytest.mark.slow
def test_convert_inspect_export(cli: Cli, tiny_gguf: Path, tmp_path: Path) -> None:
    out, twin = tmp_path / "out.gguf", tmp_path / "twin.gguf"
    done = cli("convert", tiny_gguf, out)
    assert done.returncode == 0, done.stderr
    assert "bits per weight" in done.stdout
    assert "fallback: blk.0.odd.weight is F16: rows of 40 are not a multiple of 32 (TP2_2)" in done.stdout
    done = cli("inspect", out, "--tensors")
    assert done.returncode == 0
    for text in ("TP2_2", "3.500", "Q8_0", "blk.0.ffn_gate_exps.weight", "64 x 16 x 3", "ptqtp.method = search"):
        assert text in done.stdout
    report = json.loads(cli("inspect", out, "--json").stdout)
    assert report["bytes"] == out.stat().st_size
    assert report["bpw"] == pytest.approx(8 * report["bytes"] / report["weights"], abs=1e-4)
    assert report["metadata"]["ptqtp.type_ids"] == [252]
    assert sum(p["weights"] for p in report["parts"]) == report["weights"]
    done = cli("export-q4_0", out, twin)
    assert done.returncode == 0 and "bit for bit" in done.stdout
    assert cli("convert", tiny_gguf, out, "--force", "--quiet").stdout == ""


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["convert", "absent", "b.gguf"], 1, "absent: no such file or folder"),
        (["convert", "tiny.gguf", "b.txt"], 1, "must end in .gguf"),
        (["convert", "tiny.gguf", "tiny.gguf"], 1, "output and input are the same file"),
        (["convert", "tiny.gguf", "b.gguf", "--method", "magic"], 1, "no method 'magic'; there are search, paper"),
        (["convert", "tiny.gguf", "b.gguf", "--threads", "-3"], 2, "threads"),
        (["convert", "tiny.gguf"], 2, "Missing argument 'out'"),
        (["convert", "."], 2, "Missing argument"),
        (["convert", ".", "b.gguf"], 1, "a folder of GGUF files"),
        (["inspect", "absent.gguf"], 1, "absent.gguf: No such file or directory"),
        (["inspect", "noise.gguf"], 1, "noise.gguf: not a GGUF file"),
        (["inspect", "cut.gguf"], 1, "truncated"),
        (["run", "cut.gguf", "-p", "x"], 1, "truncated"),
        (["export-q4_0", "tiny.gguf", "b.gguf"], 1, "no TP2_1 or TP2_2 tensor"),
        (["frobnicate"], 2, "No such command 'frobnicate'"),
        (["--frobnicate"], 2, "No such option"),
    ],
)
def test_errors_are_one_line(cli: Cli, tiny_gguf: Path, args: list[str], code: int, message: str) -> None:
    folder = tiny_gguf.parent
    (folder / "noise.gguf").write_bytes(b"\xff" * 500)
    (folder / "cut.gguf").write_bytes(tiny_gguf.read_bytes()[:-500])
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    done = cli(*args, cwd=folder)
    assert done.returncode == code
    assert message in done.stderr
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
