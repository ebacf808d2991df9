"""In order, of families of other shapes, and inputs of any magnitude: against a plain model in float32."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibrated_files import leftovers, planes_of, prose, with_
from tiny_models import DENSE, EXPERTS, Family, build
from walked_models import VOCAB, distance, save, some_tokens

from ptqtp_gguf.calibrate import mapping
from ptqtp_gguf.calibrate.in_order import in_order
from ptqtp_gguf.calibrate.model import explained
from ptqtp_gguf.calibrate.sampling import written
from ptqtp_gguf.codec import TYPES
from ptqtp_gguf.conversion.pipeline import convert
from ptqtp_gguf.errors import CalibrationError
from ptqtp_gguf.files.gguf import Reader
from ptqtp_gguf.quantize.methods import METHODS, quantize
from ptqtp_gguf.source import checkpoint

pytestmark = pytest.mark.hf

STATES: dict[str, object] = dict(state_size=16, num_attention_heads=None, num_key_value_heads=None)
HYBRID: dict[str, object] = dict(
    layer_types=["mamba", "attention"],
    num_local_experts=4,
    num_experts_per_tok=2,
    shared_intermediate_size=96,
    mamba_n_heads=8,
    mamba_d_head=32,
    mamba_d_state=16,
    mamba_chunk_size=32,
    mamba_n_groups=1,
)
SHARED = "ffn_gate_shexp ffn_up_shexp ffn_down_shexp"
MODELS = {
    "mamba": Family("Mamba", "mamba", ("ssm_in ssm_x ssm_dt ssm_out",), STATES),
    "granite": Family("GraniteMoeHybrid", "granitehybrid", ("", f"{EXPERTS} {SHARED}"), HYBRID),
}


def matrices(family: Family) -> set[str]:
    return {f"blk.{i}.{n}.weight" for i in range(2) for n in (family.blocks * 2)[i].split()}


def walked(folder: Path, family: Family, tokens: np.ndarray, work: Path) -> dict[str, Any]:
    """Moments of all matrices of a checkpoint, nothing replaced."""
    work.mkdir()
    name = mapping.names(family.arch, 2)
    stages = in_order(checkpoint.check(folder), tokens, name, matrices(family), work)
    return {n: m for stage in stages for n, m in stage.moments.items()}


def squared(x: Any) -> np.ndarray:
    x = x.detach().flatten(0, -2).double()
    return (x.T @ x).numpy()


def seen(folder: Path, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Of each linear layer of the blocks, by its name: the sum of x xT, of the whole model in float32."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: dict[str, np.ndarray] = {}

    def hook(name: str) -> Any:
        def called(module: Any, args: Any) -> None:
            found[name] = squared(args[0])

        return called

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        model(torch.from_numpy(tokens), use_cache=False)
    return found


def step_inputs(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """What the first block's dt_proj, which is not called as a layer, is given: a part of what x_proj makes."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    mixer, found = model.backbone.layers[0].mixer, []
    mixer.x_proj.register_forward_hook(lambda module, args, out: found.append(out[..., : mixer.time_step_rank]))
    with torch.no_grad():
        model(torch.from_numpy(tokens), use_cache=False)
    return squared(found[0])


def test_a_model_of_states(tmp_path: Path) -> None:
    """Its configuration has no number of heads."""
    family, tokens = MODELS["mamba"], some_tokens()
    folder = save(family, tmp_path / "model")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(re.sub(r'.*"num_(attention|key_value)_heads".*\n', "", config))
    got, want = walked(folder, family, tokens, tmp_path / "work"), seen(folder, tokens)
    assert got.keys() == matrices(family)
    for n, layer in (("ssm_in", "in_proj"), ("ssm_x", "x_proj"), ("ssm_out", "out_proj")):
        for i in range(2):
            (of,) = (k for k in want if f"layers.{i}.mixer.{layer}" in k)
            assert distance(got[f"blk.{i}.{n}.weight"].h, want[of]) < 2e-5
    assert distance(got["blk.0.ssm_dt.weight"].h, step_inputs(folder, tokens)) < 2e-5  # whose weight is on the left
    text = written(checkpoint.check(folder), 3, 12, 1, np.array([5]))
    assert text.shape == (3, 12) and (text[:, 0] == 1).all() and len(np.unique(text)) > 6 and text.max() < VOCAB


def test_fused_shared_experts(tmp_path: Path) -> None:
    """Granite's `shared_mlp.input_linear` becomes two matrices, which have its input."""
    family, tokens = MODELS["granite"], some_tokens()
    folder = save(family, tmp_path / "model")
    got, want = walked(folder, family, tokens, tmp_path / "work"), seen(folder, tokens)
    assert got.keys() == matrices(family)
    prefix = "model.layers.1.shared_mlp."
    for n, layer in (("gate", "input"), ("up", "input"), ("down", "output")):
        assert distance(got[f"blk.1.ffn_{n}_shexp.weight"].h, want[f"{prefix}{layer}_linear"]) < 2e-5


def test_states_beyond_float16(tmp_path: Path) -> None:
    """A float16 checkpoint whose states pass 65504, as Gemma's: between blocks they are float32."""
    import torch
    import transformers

    family, tokens = Family("Llama", "llama", (DENSE,)), some_tokens()
    save(family, tmp_path / "f32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "f32", dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight *= 100_000
    model.half().save_pretrained(tmp_path / "model")
    got, want = walked(tmp_path / "model", family, tokens, tmp_path / "work"), seen(tmp_path / "model", tokens)
    for n, layer in (("ffn_up", "mlp.up_proj"), ("attn_q", "self_attn.q_proj"), ("ffn_down", "mlp.down_proj")):
        for i in range(2):
            assert distance(got[f"blk.{i}.{n}.weight"].h, want[f"model.layers.{i}.{layer}"]) < 2e-5
    text = written(checkpoint.check(tmp_path / "model"), 2, 8, 1, np.array([5]))
    assert text.shape == (2, 8)


# ---- inputs that say nothing ----


@pytest.mark.runtime
@pytest.mark.parametrize("effort", ["best", "quick"])
def test_inputs_of_zeros(tmp_path: Path, effort: str) -> None:
    """A block that is switched off, and one expert that is: by search, with a note; the rest is calibrated."""
    import torch
    from safetensors.torch import load_file, save_file

    family = Family("Mixtral", "llama", (EXPERTS,), dict(num_local_experts=4, num_experts_per_tok=2, vocab_size=384))
    folder = tmp_path / "model"
    folder.mkdir()
    build(family, folder, [3, 4])
    weights = load_file(folder / "model.safetensors")
    off = [n for n in weights if re.search(r"layers\.0\..*experts\.1\.w3", n)]
    off += [n for n in weights if re.search(r"layers\.1\..*v_proj", n)]
    assert len(off) == 2, sorted(weights)
    for n in off:
        weights[n] = torch.zeros_like(weights[n])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    options = with_(prose(tmp_path), effort=effort, fisher=False)
    summary = convert(folder, tmp_path / "out.gguf", options)
    told = [n for n in summary.notes if "by search: second moments are not finite or all zero" in n]
    if effort == "best":
        assert [n.partition(":")[0] for n in told] == ["blk.0.ffn_down_exps.weight", "blk.1.attn_output.weight"]
        assert "1 experts (1) by search" in told[0]
    else:
        assert len(told) == 1 and re.match(r"2 of \d+ matrices by search", told[0])
    assert not leftovers(tmp_path)
    with Reader(tmp_path / "out.gguf") as q:
        t = q.by_name["blk.1.attn_output.weight"]
        assert t.type in TYPES and planes_of(tmp_path / "out.gguf")
        made = q.bytes_of(t).reshape(-1)
    w = weights["model.layers.1.self_attn.o_proj.weight"].float().numpy()
    assert np.array_equal(made, quantize(TYPES[t.type], METHODS["search"], w).reshape(-1))


# ---- errors of torch ----


def test_memory_that_torch_cannot_have(tmp_path: Path) -> None:
    """It says so as RuntimeError on the CPU; here it is what half the windows at a time may help against."""
    import torch

    with pytest.raises(MemoryError), explained(tmp_path, "it"):
        torch.empty(1 << 60)
    with pytest.raises(CalibrationError, match=r"it: RuntimeError: .*; give an importance matrix") as e:
        with explained(tmp_path, "it"):
            torch.ones(2, 3) @ torch.ones(2, 3)
    assert "\n" not in str(e.value)
