"""Second moments of tiny models: by the runtime, out of a GGUF file, and by transformers, with hooks."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
from tiny_models import Family

from ptqtp_gguf.calibrate import gather as gathering
from ptqtp_gguf.calibrate.mapping import names
from ptqtp_gguf.calibrate.moments import Input, Moments
from ptqtp_gguf.files.gguf import OutTensor, Reader, TensorInfo, write_stream
from ptqtp_gguf.progress import Progress, no_progress
from ptqtp_gguf.source.opening import open_source

OUTPUT, EMBEDDING = "output.weight", "token_embd.weight"


def as_gguf(checkpoint: Path, out: Path) -> Path:
    """What llama.cpp's converter makes of a checkpoint, in bf16."""
    with open_source(checkpoint) as source:
        return source.as_file(out, no_progress)


def in_f32(bf16: Path, out: Path) -> Path:
    """The same weights in float32, with which the runtime rounds no inputs."""
    with Reader(bf16) as r, out.open("wb") as f:
        tensors = [OutTensor(t.name, t.shape, 0) for t in r.tensors]
        data = (np.ascontiguousarray(r.rows_f32(t)).view(np.uint8).reshape(-1) for t in r.tensors)
        for _ in write_stream(f, r.header.kvs.values(), tensors, r.header.alignment, data):
            pass
    return out


def matrices(model: Path) -> dict[str, TensorInfo]:
    """What can be gathered of a GGUF file: the matrices of its blocks, and the output, which may be the embedding."""
    with Reader(model) as r:
        found = {
            t.name: t for t in r.tensors if len(t.shape) > 1 and t.name.endswith(".weight") and "conv" not in t.name
        }
        return found if OUTPUT not in found else {n: t for n, t in found.items() if n != EMBEDDING}


def gather(
    model: Path,
    tokens: np.ndarray,
    folder: Path,
    wanted: Collection[str] | None = None,
    progress: Progress = no_progress,
) -> Moments:
    """Moments of a GGUF file, kept in a folder. wanted: names; None = all."""
    of = {n: t for n, t in matrices(model).items() if wanted is None or n in wanted}
    key = gathering.key_of(gathering.identity_of(model), tokens, of)
    gathering.gather(model, tokens, of, folder, key, threads=1, progress=progress)
    return Moments(folder)


def by_tensor(moments: Moments) -> dict[str, Input]:
    return {name: of for of in moments for name in of.tensors}


def squares(moments: Moments) -> dict[str, np.ndarray]:
    """Of each matrix the sums of x xT, float64 (C, C), or (E, C, C) of E experts."""
    out = {}
    for name, of in by_tensor(moments).items():
        h = np.stack([moments.second(of, e).astype(np.float64) for e in range(len(of.counts))])
        out[name] = h if len(h) > 1 else h[0]
    return out


class Seen:
    """What a whole model of transformers gives each matrix, with the tokens of each window apart.

    x: by GGUF's name float32 (N, T, C), or of experts a list of (rows, C); went: of experts, (N, T, used)
    """

    def __init__(
        self, folder: Path, family: Family, tokens: np.ndarray, change: Callable[[Any], None] | None = None
    ) -> None:
        import torch
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if change:
            change(model)
        name = names(family.arch, int(str(family.settings["num_hidden_layers"])))
        self.x: dict[str, Any] = {}
        output = EMBEDDING if model.config.tie_word_embeddings else OUTPUT

        def linear(of: str) -> Callable[..., None]:
            return lambda module, args: self.x.__setitem__(of, args[0].detach().numpy())

        def experts(i: str) -> Callable[..., None]:
            def seen(module: Any, args: Any) -> None:
                x, chosen, _ = args
                mine = [x[(chosen == e).any(dim=-1)] for e in range(len(module.gate_up_proj))]
                halves = [(m @ w.T).chunk(2, dim=-1) for m, w in zip(mine, module.gate_up_proj, strict=True)]
                self.x[f"blk.{i}.ffn_up_exps.weight"] = [m.detach().numpy() for m in mine]
                self.x[f"blk.{i}.ffn_down_exps.weight"] = [(module.act_fn(g) * u).detach().numpy() for g, u in halves]

            return seen

        for path, module in model.named_modules():
            of = output if path == "lm_head" else name(f"{path}.weight")
            if isinstance(module, torch.nn.Linear) and of:
                module.register_forward_pre_hook(linear(of))
            elif path.endswith(".experts"):
                module.register_forward_pre_hook(experts(path.split(".")[2]))
        with torch.no_grad():
            model(torch.from_numpy(tokens), use_cache=False)

    def squares(self) -> dict[str, np.ndarray]:
        """The sums of x xT, as `squares` has them."""
        return {n: np.stack([_square(p) for p in x]) if isinstance(x, list) else _square(x) for n, x in self.x.items()}

    def counts(self) -> dict[str, list[int]]:
        return {n: [len(p) for p in x] if isinstance(x, list) else [x.size // x.shape[-1]] for n, x in self.x.items()}


def _square(x: np.ndarray) -> np.ndarray:
    flat: np.ndarray = x.astype(np.float64).reshape(-1, x.shape[-1])
    squared: np.ndarray = flat.T @ flat
    return squared
