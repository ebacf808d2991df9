"""Second moments, a block at a time, against a whole model run by transformers with hooks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import REPO
from tiny_models import FAMILIES, Family
from walked_models import distance, save, some_tokens

from ptqtp_gguf.calibrate.gather import OUTPUT, walk
from ptqtp_gguf.calibrate.mapping import names
from ptqtp_gguf.errors import CalibrationError
from ptqtp_gguf.source import checkpoint

pytestmark = pytest.mark.hf

MODELS = {
    **{name: FAMILIES[name] for name in ("llama", "phi3", "falcon")},
    "gemma2": Family("Gemma2", "gemma2", config=dict(head_dim=64, sliding_window=8, query_pre_attn_scalar=64)),
    "mixtral": Family("Mixtral", "llama", config=dict(num_local_experts=4, num_experts_per_tok=2)),
}
SAME = 2e-5  # float32 sums in another order, two to six blocks deep


def whole_model(folder: Path, family: Family, tokens: np.ndarray, change: Callable[[Any], None] | None = None) -> dict:
    """The same moments from one forward of the whole model: {GGUF name: float64 (C, C) or (E, C, C)}."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if change:
        change(model)
    name = names(family.arch, int(str(family.settings["num_hidden_layers"])))
    out: dict[str, np.ndarray] = {}

    def square(x: Any) -> np.ndarray:
        flat = x.detach().double().reshape(-1, x.shape[-1]).numpy()
        return flat.T @ flat

    def linear(of: str) -> Callable[..., None]:
        return lambda module, args: out.__setitem__(of, square(args[0]))

    def experts(i: str) -> Callable[..., None]:
        def seen(module: Any, args: Any) -> None:
            x, chosen, _ = args
            mine = [x[(chosen == e).any(dim=-1)] for e in range(len(module.gate_up_proj))]
            out[f"blk.{i}.ffn_up_exps.weight"] = np.stack([square(m) for m in mine])
            halves = [(m @ w.T).chunk(2, dim=-1) for m, w in zip(mine, module.gate_up_proj, strict=True)]
            out[f"blk.{i}.ffn_down_exps.weight"] = np.stack([square(module.act_fn(g) * u) for g, u in halves])

        return seen

    for path, module in model.named_modules():
        of = OUTPUT if path == "lm_head" else name(f"{path}.weight")
        if isinstance(module, torch.nn.Linear) and of:
            module.register_forward_pre_hook(linear(of))
        elif path.endswith(".experts"):
            module.register_forward_pre_hook(experts(path.split(".")[2]))
    with torch.no_grad():
        model(torch.from_numpy(tokens), use_cache=False)
    return out


def gather(layers: Any) -> dict[str, Any]:
    return {name: m for layer in layers for name, m in layer.moments.items()}


@pytest.mark.parametrize("name", MODELS)
def test_equals_a_forward_of_the_whole_model(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, tokens = MODELS[name], some_tokens()
    monkeypatch.setattr("ptqtp_gguf.calibrate.gather.MAX_BATCH", 2)
    found = checkpoint.check(save(family, tmp_path))
    got = gather(walk(found, tokens, family.arch))
    expected = whole_model(tmp_path, family, tokens)
    assert expected.keys() <= got.keys() and OUTPUT in expected
    for of, h in expected.items():
        assert distance(got[of].h, h) < SAME, of
        assert sum(got[of].counts) == tokens.size * (2 if "_exps" in of else 1)  # two experts a token
    layers = int(str(family.settings["num_hidden_layers"]))
    assert set(family.matrices()) <= got.keys() or name == "mixtral"
    assert {m.shared for t, m in got.items() if t.startswith(f"blk.{layers - 1}.attn_")} <= got.keys()
    if "blk.0.attn_v.weight" in got:
        assert got["blk.0.attn_v.weight"].h is got["blk.0.attn_q.weight"].h
        assert got["blk.0.attn_v.weight"].shared == "blk.0.attn_q.weight"
    if name == "mixtral":
        up = got["blk.0.ffn_up_exps.weight"]
        assert up.h.shape == (4, 128, 128) and up.shared == "blk.0.ffn_gate_exps.weight"
        assert up.few(max(up.counts)) == [i for i in range(4) if up.counts[i] < max(up.counts)] != []


# ---- kept, and taken up again ----


def small(folder: Path) -> tuple[checkpoint.Checkpoint, Family]:
    family = Family("Llama", "llama", config=dict(num_hidden_layers=3))
    return checkpoint.check(save(family, folder)), family


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[t].h, b[t].h) and a[t].counts == b[t].counts for t in a)


KILLED = """
import os, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_gather import go
folder = Path(sys.argv[1])
go(folder / "model", lambda stage, done, total, what: what == "block 1" and os.kill(os.getpid(), 9), folder / "kept")
"""


def go(model: Path, progress: Any = lambda *_: None, folder: Path | None = None) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for layer in walk(checkpoint.check(model), some_tokens(), "llama", progress=progress, folder=folder):
        out.update(layer.moments)
    return out


def test_killed_and_taken_up_again(tmp_path: Path) -> None:
    """Killed by SIGKILL inside block 1; what is gathered afterwards is what one go gathers, bit by bit."""
    model, kept = tmp_path / "model", tmp_path / "kept"
    small(model)
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent), str(REPO / "tests" / "support")]
    assert subprocess.run(command, timeout=300, check=False).returncode == -9
    assert (kept / "blk.0.safetensors").exists() and (kept / "states.1.bin").exists()
    assert not (kept / "blk.1.safetensors").exists()
    seen: set[str] = set()
    got = go(model, lambda stage, done, total, what: seen.add(what), kept)
    assert "block 1" in seen and not {"embedding", "block 0"} & seen
    assert same(got, go(model))
    assert sorted(p.name for p in kept.iterdir()) == [
        "blk.0.safetensors",
        "blk.1.safetensors",
        "blk.2.safetensors",
        "index.json",
        "output.safetensors",
    ]
    seen.clear()
    assert same(got, go(model, lambda stage, done, total, what: seen.add(what), kept))
    assert not seen  # no model was run
    for change, message in (
        (dict(tokens=some_tokens() + 1), "gathered from another text"),
        (dict(wanted=["blk.0.attn_q.weight"]), "gathered from other tensors"),
        (dict(found=small(tmp_path / "other")[0]), None),  # the same weights elsewhere
    ):
        how: dict[str, Any] = dict(found=checkpoint.check(model), tokens=some_tokens(), arch="llama", folder=kept)
        layers = walk(**{**how, **change})
        if message:
            with pytest.raises(CalibrationError, match=message):
                next(layers)
        else:
            assert next(layers).done
    damage(kept)
    with pytest.raises(
        CalibrationError, match=r"blk\.2\.safetensors: blk\.2\.attn_q\.weight holds values that are not"
    ):
        go(model, folder=kept)


def damage(kept: Path) -> None:
    from safetensors.torch import load_file, save_file

    held = load_file(kept / "blk.2.safetensors")
    held["blk.2.attn_q.weight"][5, 7] = float("nan")
    save_file(held, kept / "blk.2.safetensors")


def test_what_cannot_be_walked(tmp_path: Path) -> None:
    found, _ = small(tmp_path / "model")
    with pytest.raises(CalibrationError, match="token 400 in the text, the model has 384"):
        next(walk(found, np.full((1, 8), 400), "llama"))
    config = tmp_path / "model" / "config.json"
    plain = json.loads(config.read_text())
    for change, message in (
        (dict(quantization_config={"quant_method": "fp8"}), "quantized already"),
        (dict(model_type="no-such"), r"transformers does not read its config.*no-such"),
        (dict(num_hidden_layers=4), r"no weights for .* of block 3 in the shards.*--imatrix"),
    ):
        config.write_text(json.dumps({**plain, **change}))
        with pytest.raises(CalibrationError, match=message) as e:
            gather(walk(found, some_tokens(1), "llama"))
        assert "\n" not in str(e.value)


PEAK = """
import sys
from pathlib import Path
import numpy as np, torch, transformers
from ptqtp_gguf.calibrate.gather import walk
from ptqtp_gguf.source import checkpoint

def memory(key):
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) << 10

before = 0
for folder in sys.argv[1:]:
    before = memory("VmRSS")
    for layer in walk(checkpoint.check(Path(folder)), np.full((2, 40), 7), "llama"):
        del layer
print(memory("VmHWM") - before)
"""


def test_one_block_in_memory(tmp_path: Path) -> None:
    small(tmp_path / "small")
    wide: dict[str, object] = dict(hidden_size=512, intermediate_size=3072, num_hidden_layers=14)
    found = checkpoint.check(save(Family("Llama", "llama"), tmp_path / "wide", **wide))
    command = [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "wide")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert found.nbytes > 200e6
    assert int(done.stdout) < 0.7 * found.nbytes  # a block, its moments (60 MB together), what the allocator keeps
