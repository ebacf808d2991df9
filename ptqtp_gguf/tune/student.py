"""A Hugging Face model and its quantized twin in one: the teacher's weights as loaded, the student's as s * level.

Imports torch: import it inside functions only. All tensors that are not trained (embedding and head too, unless planes
are given for them) are shared, so memory is one model, a byte a planned weight, and the scales. What is trained lies in
flat float32 tensors, of which the modules' leaves are views, gradients too: one optimizer step is a few calls, whatever
the number of layers.

Arithmetic: on CUDA, matrix products inside the blocks are bf16 (s * level is exact in bf16: at most 8 bits), the
residual stream, norms, biases and the loss float32, the head TF32 in float32 storage, since logits of 20 rounded to
bf16 would cost more KL than a late step of tuning gains. TF32 is never on elsewhere: it would spoil rotary angles.
Elsewhere everything is float32.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ..calibrate import quiet, whole_model
from ..codec import DEFAULT, TensorType
from ..errors import TuneError
from ..quantize import GROUP, Tensor, code_scales, latent_start, nearest_in_chain, nearest_levels
from ..source import transformers_reason
from .layers import Flat, PlaneEmbedding, PlaneLinear

_PLAIN = (nn.Linear, nn.Embedding)  # not what is derived from them: Gemma's embedding multiplies
LOGIT_COPIES = 5  # float32 arrays of logits alive at a time in kl_of_chunks


class _Given(nn.Module):  # type: ignore[misc]
    """Stands in for a model's body, so that its own forward makes logits of hidden states that exist already."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _Output((self.hidden,))


class _Output(tuple):  # type: ignore[type-arg]
    """What a body returns: its states, and None for all else that some family's head asks for."""

    def __getattr__(self, name: str) -> Any:
        return self[0] if name == "last_hidden_state" else None


class _Vector(NamedTuple):
    name: str
    module: Any
    leaf: str
    teacher: Tensor
    student: Tensor


class Student:
    """The model of a folder with planes in place of weights, and its teacher.

    planes     HF parameter name -> levels int8 (R, C), codes uint8 (R, C/32)
    kind       their type
    bf16       matrix products inside the blocks, see above; else everything is float32
    vectors    train norms and biases too; only: just those of these names, None = all
    fixed      HF parameter name -> what the file holds of an embedding or a head that has no planes, (R, C)
    latent     keep latent weights too; 0 = they begin at their level, 1 = at the original weight within its cell
    Raises TuneError for planes that do not fit the model, and for a model whose logits cannot be made in pieces.
    """

    def __init__(
        self,
        folder: Path,
        planes: Mapping[str, Any],
        device: str,
        *,
        bf16: bool,
        vectors: bool,
        latent: float | None,
        logits_bytes: int,
        only: Collection[str] | None = None,
        trust_code: bool = False,
        fixed: Mapping[str, Any] | None = None,
        kind: TensorType = DEFAULT,
    ) -> None:
        self.kind = kind
        self.device = _device(device)
        self.folder = folder
        self.model = _load(folder, trust_code)
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.notes: list[str] = []
        self.names, planned = self._planned(planes)
        self._place()
        self._teaching = False
        self._fix(fixed or {})
        self._levels(planes, planned, latent)
        self._vectors(vectors, only)
        for i, module in enumerate(planned):
            latent_leaf = self.latent.leaves[i] if self.latent else None
            leaves = self.scales.leaves[i], latent_leaf, self.level_views[i]
            for holder in self._holders(module.weight):
                forward = self._look_up if type(holder) is nn.Embedding else self._multiply
                holder.forward = functools.partial(forward, holder, *leaves)
        self.chunk = max(1, logits_bytes // (4 * LOGIT_COPIES * self.head.weight.shape[0]))
        self.embeddings = self.model.get_input_embeddings().weight.shape[0]
        self.use(teacher=False)

    def _planned(self, planes: Mapping[str, Any]) -> tuple[list[str], list[Any]]:
        """Names and modules of the planes that stand for a linear layer or an embedding; a note for each other."""
        names: list[str] = []
        planned: list[Any] = []
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name, (levels, codes) in planes.items():
            if name not in parameters:
                raise TuneError(f"{self.folder}: planes for {name}, a parameter that this model does not have")
            path, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(path)
            if type(module) not in _PLAIN or leaf != "weight":
                self.notes.append(
                    f"{name}: not tuned, its module is {type(module).__name__}, no linear layer or embedding"
                )
                continue
            if twin := next((n for n, m in zip(names, planned, strict=True) if m.weight is module.weight), None):
                self.notes.append(f"{name}: not tuned, it is {twin} too")
                continue
            rows, cols = module.weight.shape
            if np.shape(levels) != (rows, cols) or np.shape(codes) != (rows, cols // GROUP) or cols % GROUP:
                raise TuneError(
                    f"{name}: levels {np.shape(levels)} and codes {np.shape(codes)} for a weight of {rows} x {cols}; "
                    f"expected {(rows, cols)} and {(rows, cols // GROUP)}"
                )
            names.append(name)
            planned.append(module)
        if not names:
            raise TuneError(
                f"{self.folder}: none of the {len(planes)} planes stands for a linear layer or embedding of the model"
            )
        return names, planned

    def _place(self) -> None:
        """Bring the frozen model to the device, in the dtypes that the arithmetic wants."""
        model = self.model.eval().requires_grad_(False)
        self.head = model.get_output_embeddings()
        if self.dtype == torch.float32:
            model.float()
        else:
            for module in model.modules():
                if type(module) is nn.Linear and module is not self.head and module.weight.dtype != self.dtype:
                    module.weight.data = module.weight.data.to(self.dtype)
        model.to(self.device)
        model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.float())
        weight = self.head.weight.float()  # a copy where the model is bf16
        self.head.forward = lambda x: _float_linear(x, weight, self.head.bias)
        self.body = model.base_model_prefix
        if model.base_model is model or getattr(model, self.body, None) is None:
            raise TuneError(f"{self.folder}: {type(model).__name__} has no body apart from a head: it cannot be tuned")
        self.given = _Given()

    def _fix(self, fixed: Mapping[str, Any]) -> None:
        """The student's embedding and head are those of the file."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name, values in fixed.items():
            weight, rounded = parameters[name], torch.as_tensor(values).to(self.device)
            for holder in self._holders(weight):
                if type(holder) is nn.Embedding:
                    holder.forward = functools.partial(self._look_up_fixed, weight, rounded)
                else:  # float32 once, not for every piece of the logits
                    holder.forward = functools.partial(self._multiply_fixed, weight.float(), rounded, holder.bias)

    def _holders(self, weight: Tensor) -> list[Any]:
        """The linear layers and embeddings of one parameter: two where embedding and head are tied."""
        return [m for m in self.model.modules() if type(m) in _PLAIN and m.weight is weight]

    def _multiply_fixed(self, weight: Tensor, rounded: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        return _float_linear(x, weight if self._teaching else rounded, bias)

    def _look_up_fixed(self, weight: Tensor, rounded: Tensor, ids: Tensor) -> Tensor:
        return (weight if self._teaching else rounded)[ids]

    def _levels(self, planes: Mapping[str, Any], planned: list[Any], latent: float | None) -> None:
        levels = [torch.as_tensor(np.ascontiguousarray(planes[n][0])) for n in self.names]
        codes = [torch.as_tensor(np.ascontiguousarray(planes[n][1])) for n in self.names]
        for name, a, c in zip(self.names, levels, codes, strict=True):
            if a.dtype != torch.int8 or c.dtype != torch.uint8:
                raise TuneError(f"{name}: levels of {a.dtype} and codes of {c.dtype}; expected int8 and uint8")
            if not bool(torch.isin(a, torch.tensor(self.kind.levels, dtype=torch.int8)).all()):
                levels_known = ", ".join(str(v) for v in sorted(self.kind.levels) if v >= 0)
                raise TuneError(f"{name}: a level that is none of {levels_known} and their negatives")
        self.levels = torch.cat([a.flatten() for a in levels]).to(self.device)
        sizes = [a.numel() for a in levels]
        self.level_views = [v.view(a.shape) for v, a in zip(self.levels.split(sizes), levels, strict=True)]
        self.scales = Flat([code_scales(c) for c in codes], self.device)
        self.latent: Flat | None = None
        if latent is not None:
            starts = [
                a.float() if self.kind.chain else latent_start(module.weight, a, s, latent)
                for module, a, s in zip(planned, self.level_views, self.scales.leaves, strict=True)
            ]
            self.latent = Flat(starts, self.device)

    def _vectors(self, trained: bool, only: Collection[str] | None) -> None:
        """Norm weights and biases: all that a GGUF file keeps as float32."""
        found = []
        for path, module in self.model.named_modules():
            for leaf, p in module.named_parameters(recurse=False):
                norm = "norm" in type(module).__name__.lower() or "norm" in path.rpartition(".")[2]
                name, wanted = f"{path}.{leaf}", leaf == "bias" or norm
                if wanted and p.ndim == 1 and p.is_floating_point() and (only is None or name in only):
                    found.append((name, module, leaf, p))
        self.vector_values = Flat([p for *_, p in found], self.device, trained)
        self.vectors = [
            _Vector(name, module, leaf, nn.Parameter(p.detach().float(), requires_grad=False), student)
            for (name, module, leaf, p), student in zip(found, self.vector_values.leaves, strict=True)
        ]

    def _multiply(self, linear: Any, scale: Tensor, latent: Tensor | None, levels: Tensor, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # or the head would be bf16
            x = x.to(torch.float32 if linear is self.head else self.dtype)
            if self._teaching:
                y = x @ linear.weight.to(x.dtype).t()
            else:
                y = PlaneLinear.apply(x, scale, latent, levels)
            return y if linear.bias is None else y + linear.bias

    def _look_up(self, embedding: Any, scale: Tensor, latent: Tensor | None, levels: Tensor, ids: Tensor) -> Tensor:
        return embedding.weight[ids] if self._teaching else PlaneEmbedding.apply(ids, scale, latent, levels)

    def round_latent(self) -> None:
        """The levels that the latent weights stand for: the nearest ones, or the nearest that a chain can hold."""
        assert self.latent
        edge = self.kind.max_level + 0.5
        self.latent.value.clamp_(-edge, edge)
        if self.kind.chain:
            nearest_in_chain(self.latent.value, self.levels)
        else:
            self.levels.copy_(nearest_levels(self.latent.value))

    def zero_grad(self) -> None:
        for flat in (self.scales, self.vector_values, self.latent):
            if flat is not None and flat.grad is not None:
                flat.grad.zero_()

    def use(self, teacher: bool) -> None:
        """From now on the model is the teacher, or the student."""
        self._teaching = teacher
        for v in self.vectors:
            v.module._parameters[v.leaf] = v.teacher if teacher else v.student

    @contextlib.contextmanager
    def as_teacher(self) -> Iterator[None]:
        self.use(teacher=True)
        try:
            with torch.no_grad():
                yield
        finally:
            self.use(teacher=False)

    def hidden(self, ids: Tensor) -> Tensor:
        """ids int64 (N, L) -> the states that the head takes, (N * L, D)."""
        mixed = self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=mixed):
            out = getattr(self.model, self.body)(input_ids=ids, use_cache=False)
        return out.last_hidden_state.flatten(0, 1)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (n, D) -> float32 (n, vocabulary), through the model's own forward: caps and factors included."""
        body = self.model._modules[self.body]
        self.given.hidden = hidden[None].float()
        self.model._modules[self.body] = self.given
        try:
            ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=self.device)
            return self.model(input_ids=ids, use_cache=False).logits[0].float()
        finally:
            self.model._modules[self.body] = body
            self.given.hidden = None

    def check(self, ids: Tensor) -> None:
        """Raises TuneError unless logits made in pieces are the model's own. ids int64 (L,)."""
        ids = ids[None].to(self.device)
        with self.as_teacher():
            pieces = self.logits(self.hidden(ids))
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype != torch.float32):
                whole = self.model(input_ids=ids, use_cache=False).logits[0].float()
        bound = 0.02 * float(whole.abs().max())
        off = float((pieces - whole).abs().max())
        if off > bound:
            raise TuneError(f"{self.folder}: logits of {type(self.model).__name__} made in pieces are off by {off:.3g}")

    def kl(self, ids: Tensor, factor: float | None = None) -> Tensor:
        """Sum over all positions of KL(teacher || student), float64 scalar on the device, in nats.

        ids     int64 (N, L)
        factor  None: no gradient; else `factor` times the gradient of the sum is added to the leaves' gradients
        """
        ids = ids.to(self.device)
        with self.as_teacher():
            target = self.hidden(ids)
        with torch.set_grad_enabled(factor is not None):
            mine = self.hidden(ids)
        with self._head_precision():
            total, grad = self._kl_of_chunks(mine.detach(), target, factor)
        if factor is not None:
            mine.backward(grad.to(mine.dtype))
        return total

    def _kl_of_chunks(self, mine: Tensor, target: Tensor, factor: float | None) -> tuple[Tensor, Tensor]:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        grad = torch.empty_like(mine) if factor is not None else None
        for a in range(0, len(mine), self.chunk):
            with self.as_teacher():
                want = torch.log_softmax(self.logits(target[a : a + self.chunk]), -1)
            h = mine[a : a + self.chunk].clone().requires_grad_(factor is not None)
            with torch.set_grad_enabled(factor is not None):
                logits = self.logits(h)
            have = torch.log_softmax(logits.detach(), -1)
            p = want.exp()
            total += want.sub_(have).mul_(p).sum(-1).double().sum()
            if grad is not None:  # d KL / d logits = softmax(student) - softmax(teacher)
                logits.backward(have.exp_().sub_(p).mul_(factor))
                grad[a : a + self.chunk] = h.grad
        return total, grad

    @contextlib.contextmanager
    def _head_precision(self) -> Iterator[None]:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.dtype == torch.bfloat16 else before)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def _float_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), weight, bias)


def _device(name: str) -> Any:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise TuneError(f"tuning: no device '{name}' here: {str(e).strip().splitlines()[0][:200]}") from None
    return device


def _load(folder: Path, trust_code: bool) -> Any:
    with quiet():
        try:
            model = whole_model(folder, trust_code)
        except Exception as e:
            why = transformers_reason(e) or type(e).__name__
            raise TuneError(f"{folder}: transformers cannot load it: {why}") from None
    if model.get_output_embeddings() is None:
        raise TuneError(f"{folder}: {type(model).__name__} has no output head; it cannot be tuned")
    return model
