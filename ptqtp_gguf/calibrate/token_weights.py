"""How much each token's error in each matrix would change the model's output: weights for second moments.

The KL divergence of a slightly changed model is, to second order, half the Fisher information of the change. With g the
gradient of log p(y) by a matrix' output, y drawn from the model itself, an error at a token with a large |g| counts
more; |g|^2 as the weight of its x xT is what GuidedQuant (arXiv 2505.07004) has by groups of outputs, this by
matrices that share an input. It needs the whole model in memory and one backward pass of the text.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CalibrationError, PtqtpError
from ..progress import Progress, no_progress
from ..source import transformers_reason
from ..system import free_memory
from .model import quiet, whole_model

MAX_BATCH = 8  # windows
LOGIT_COPIES = 6  # float32 arrays of logits alive at a time

Weights = dict[str, NDArray[np.float32]]  # parameter that is the first of those with one input -> (N, T), mean 1


def token_weights(
    folder: Path,
    tokens: NDArray[np.int64],
    device: str = "cpu",
    progress: Progress = no_progress,
    trust_code: bool = False,
) -> Weights:
    """Weights of tokens int64 (N, T), by the names that transformers gives the parameters of linear layers.

    trust_code: run Python code that the folder brings.
    Experts of a mixture get none: they see tokens of their own. Raises CalibrationError where the model cannot be
    loaded or run, or does not fit into memory.
    """
    import torch

    dev = torch.device(device)
    try:
        with quiet():
            model = whole_model(folder, trust_code)
        if dev.type == "cpu" and 4 * sum(p.numel() for p in model.parameters()) < free_memory() // 2:
            model = model.float()  # faster there
        model = model.to(dev).eval().requires_grad_(False)
        return _Pass(model, torch.from_numpy(np.ascontiguousarray(tokens)), dev).run(progress)
    except (torch.OutOfMemoryError, MemoryError):
        raise CalibrationError(
            f"{folder}: the model and a backward pass through it do not fit into the memory of {device}; calibrate "
            "with --no-fisher, which needs one block at a time"
        ) from None
    except PtqtpError:
        raise
    except Exception as e:
        text = transformers_reason(e) or type(e).__name__
        raise CalibrationError(f"{folder}: no gradients of this model: {text}; calibrate with --no-fisher") from e


class _Pass:
    """One backward pass of all windows through a model."""

    def __init__(self, model: Any, ids: Any, device: Any) -> None:
        self.model, self.ids, self.device = model, ids, device
        self.leader: dict[str, str] = {}  # linear layer -> the first one with the same input
        self.inputs: dict[int, tuple[Any, str]] = {}  # of this batch; the reference keeps the id from being used again
        self.sums: dict[str, Any] = {}
        self.seen: dict[str, list[Any]] = {}

    def run(self, progress: Progress) -> Weights:
        import torch

        n, length = self.ids.shape
        draw = torch.Generator(device=self.device).manual_seed(1)
        batch = self._batch(length)
        linear = [(f"{m_name}.weight", m) for m_name, m in self.model.named_modules() if isinstance(m, torch.nn.Linear)]
        hooks = [m.register_forward_hook(partial(self._tap, name)) for name, m in linear]
        try:
            for i in range(0, n, batch):
                progress("weighing", i, n, "tokens")
                self._backward(self.ids[i : i + batch].to(self.device), draw)
                for name, c in self.sums.items():
                    if c.numel() == length * len(self.ids[i : i + batch]):
                        self.seen.setdefault(name, []).append(c.reshape(-1, length).cpu())
        finally:
            for hook in hooks:
                hook.remove()
        progress("weighing", n, n, "tokens")
        out: Weights = {}
        for name, parts in self.seen.items():
            c = torch.cat(parts).numpy().astype(np.float32)
            if len(c) == n and np.isfinite(c).all() and c.mean() > 0:
                out[name] = c / c.mean()
        return out

    def _batch(self, length: int) -> int:
        """Windows at a time: as many as their logits leave room for on a GPU."""
        import torch

        if self.device.type != "cuda":
            return 1
        free = torch.cuda.mem_get_info(self.device)[0]
        vocabulary = len(self.model.get_output_embeddings().weight)
        return max(1, min(MAX_BATCH, int(0.3 * free // (LOGIT_COPIES * 4 * length * vocabulary))))

    def _tap(self, name: str, module: Any, args: Any, y: Any) -> None:
        if not y.requires_grad:
            return
        lead = self.leader.setdefault(name, self.inputs.setdefault(id(args[0]), (args[0], name))[1])

        def add(grad: Any) -> None:
            c = grad.float().pow(2).sum(-1).reshape(-1)
            self.sums[lead] = self.sums[lead] + c if lead in self.sums else c

        y.register_hook(add)

    def _backward(self, ids: Any, draw: Any) -> None:
        import torch
        from torch.nn import functional as F

        self.sums.clear()
        self.inputs.clear()
        x = self.model.get_input_embeddings()(ids).detach().requires_grad_(True)
        logits = self.model(inputs_embeds=x, use_cache=False).logits.float().flatten(0, 1)
        with torch.no_grad():  # by Gumbel's trick, several times faster than multinomial
            noise = torch.empty_like(logits).exponential_(generator=draw).log_()
            drawn = (logits - noise).argmax(-1)
        F.cross_entropy(logits, drawn, reduction="sum").backward()
