"""The options of `convert` through the installed command: plans, recipes, budgets, memory, machine-readable output."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import Cli, write_gguf

from ptqtp_gguf.files.gguf import Reader


def types(path: Path) -> dict[str, str]:
    with Reader(path) as r:
        return {t.name: t.type_name for t in r.tensors}


def events(done: subprocess.CompletedProcess[str]) -> list[dict]:
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def model(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Rows of 256, so that every type fits."""
    shapes = {"token_embd": (64, 256), "output": (64, 256)}
    for i in range(4):
        shapes |= {f"blk.{i}.attn_v": (64, 256), f"blk.{i}.ffn_down": (256, 256)}
    return write_gguf(
        tmp_path / "model.gguf",
        {f"{n}.weight": (rng.normal(size=s) * 0.05).astype(np.float32) for n, s in shapes.items()},
    )


@pytest.mark.runtime
def test_dry_run_is_what_happens(cli: Cli, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    done = cli("convert", model, out, "--dry-run", "--recipe", "quality")
    assert done.returncode == 0 and not out.exists()
    for text in ("blk.0.ffn_down.weight", "256 x 256", "of disk", "of memory", "recipe quality"):
        assert text in done.stdout
    plan = events(cli("convert", model, out, "--dry-run", "--recipe", "quality", "--json"))[-1]
    result = events(cli("convert", model, out, "--recipe", "quality", "--json"))
    assert plan["event"] == "plan" and result[-1]["event"] == "done"
    assert plan["bytes"] == result[-1]["bytes"] == out.stat().st_size
    assert {t["name"]: t["type"] for t in plan["tensors"]} == types(out)
    assert {e["stage"] for e in result[:-1]} >= {"quantizing", "verifying"}
    assert result[-1]["sha256"]["out.gguf"] and all(t["reason"] for t in plan["tensors"])


def test_dry_run_into_nowhere(cli: Cli, model: Path, tmp_path: Path) -> None:
    done = cli("convert", model, tmp_path / "absent" / "out.gguf", "--dry-run")
    assert done.returncode == 1 and "does not exist" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.runtime
def test_types_by_hand(cli: Cli, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    done = cli("convert", model, out, "--tensor-type", "attn_v=q6_k", "--tensor-type", "blk.3.*down=TP2_0")
    assert done.returncode == 0, done.stderr
    found = types(out)
    assert {found[f"blk.{i}.attn_v.weight"] for i in range(4)} == {"Q6_K"}
    assert (found["blk.3.ffn_down.weight"], found["blk.2.ffn_down.weight"]) == ("TP2_0", "TP2_2")
    with Reader(out) as r:
        assert r.get("ptqtp.recipe") == "default, --tensor-type attn_v=q6_k, --tensor-type blk.3.*down=TP2_0"
        assert r.get("ptqtp.type_ids") == [250, 252] and r.get("ptqtp.group_size") == [128, 32]
    assert cli("verify", out, "--against", model).returncode == 0
    done = cli("convert", model, tmp_path / "b.gguf", "--tensor-type", "nothing=Q8_0")
    assert done.returncode == 1 and "matches no tensor" in done.stderr and done.stderr.count("\n") == 1


def test_a_recipe_of_ones_own(cli: Cli, model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.json"
    rules = [{"pattern": r".*ffn_down\.weight", "type": "{type}", "reason": "large"}]
    recipe.write_text(json.dumps({"name": "mine", "description": "only these", "rules": rules}))
    done = cli("convert", model, tmp_path / "out.gguf", "--recipe", recipe)
    assert done.returncode == 0, done.stderr
    assert {n for n, t in types(tmp_path / "out.gguf").items() if t != "F32"} == {
        f"blk.{i}.ffn_down.weight" for i in range(4)
    }
    with Reader(tmp_path / "out.gguf") as r:
        assert r.get("ptqtp.recipe") == "mine"


@pytest.mark.slow
def test_a_budget_is_kept(cli: Cli, model: Path, tmp_path: Path) -> None:
    sizes = []
    for bpw in ("3.8", "4.2", "4.4"):
        out = tmp_path / f"{bpw}.gguf"
        done = cli("convert", model, out, "--target-bpw", bpw)
        assert done.returncode == 0, done.stderr
        with Reader(out) as r:
            sizes.append(8 * out.stat().st_size / sum(t.n_weights for t in r.tensors))
        assert sizes[-1] <= float(bpw)
    assert sizes == sorted(sizes) and sizes[2] > sizes[0]
    for bpw, message in (("2", "the smallest that this recipe reaches"), ("30", "leave nothing in TP2_2; lower it")):
        done = cli("convert", model, tmp_path / "b.gguf", "--target-bpw", bpw)
        assert done.returncode == 1 and message in done.stderr


@pytest.mark.slow
def test_metadata_overrides(cli: Cli, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    given = ["general.name=str:Other: name", "llama.block_count=int:4", "my.flag=bool:true", "my.rate=float:0.25"]
    done = cli("convert", model, out, *(x for g in given for x in ("--override-kv", g)))
    assert done.returncode == 0, done.stderr
    with Reader(out) as r:
        keys = ("general.name", "llama.block_count", "my.flag", "my.rate")
        assert [r.get(k) for k in keys] == ["Other: name", 4, True, 0.25]
    for bad, message in {
        "general.name": "write KEY=TYPE:VALUE",
        "general.name=int:4": "is not of type int, or does not fit the entry",
        "llama.block_count=str:x": "the source holds no text there",
        "llama.block_count=int:-1": "is not of type int",
        "ptqtp.method=str:magic": "describes the file itself",
        "general.architecture=str:gpt2": "describes the file itself",
    }.items():
        done = cli("convert", model, tmp_path / "b.gguf", "--override-kv", bad)
        assert done.returncode == 1 and message in done.stderr, bad


def test_memory_limit(cli: Cli, model: Path, tmp_path: Path) -> None:
    assert cli("convert", model, tmp_path / "a.gguf", "-q").returncode == 0
    assert cli("convert", model, tmp_path / "b.gguf", "-q", "--max-memory", "200M").returncode == 0
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    big = write_gguf(tmp_path / "big.gguf", {"blk.0.w.weight": np.full((8192, 4096), 0.01, np.float32)})  # 134 MB
    peaks = []
    for limit in ("140M", "1G"):  # VmHWM, not ru_maxrss, which a process inherits from the one that starts it
        code = (
            f"import sys; sys.argv = ['x', 'convert', {str(big)!r}, {str(tmp_path / 'd.gguf')!r}, '-q', '-f',"
            f"'--max-memory', {limit!r}]\nfrom ptqtp_gguf.__main__ import main\n"
            "try: main()\nfinally: print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
        peaks.append(int(done.stdout) << 10)
    assert peaks[0] < 140e6 and peaks[0] < peaks[1] < 300e6
    done = cli("convert", model, tmp_path / "c.gguf", "--max-memory", "10M")
    assert done.returncode == 1 and "--max-memory 10 MB: at least" in done.stderr
    assert cli("convert", model, tmp_path / "c.gguf", "--max-memory", "lots").returncode == 2


def test_model_card(cli: Cli, model: Path, tmp_path: Path) -> None:
    card, out = tmp_path / "README.md", tmp_path / "out.gguf"
    done = cli("convert", model, out, "--model-card", card, "--json")
    assert done.returncode == 0, done.stderr
    text = card.read_text()
    assert text.startswith("---\n") and events(done)[-1]["sha256"]["out.gguf"] in text
    assert "TP2_2" in text and "search" in text and str(tmp_path) not in text
    done = cli("convert", model, tmp_path / "b.gguf", "--model-card", card)
    assert done.returncode == 1 and "README.md: exists already" in done.stderr and not (tmp_path / "b.gguf").exists()


def test_devices(cli: Cli, model: Path, tmp_path: Path) -> None:
    done = cli("convert", model, tmp_path / "a.gguf", "--device", "abacus")
    assert done.returncode == 1 and "no device 'abacus'; there are auto, cpu, cuda" in done.stderr
    assert not list(tmp_path.glob(".*"))


def test_errors_as_json(cli: Cli, tmp_path: Path) -> None:
    done = cli("convert", tmp_path / "absent", tmp_path / "b.gguf", "--json")
    assert done.returncode == 1
    assert events(done) == [{"event": "error", "message": f"{tmp_path}/absent: no such file or folder", "exit_code": 1}]
