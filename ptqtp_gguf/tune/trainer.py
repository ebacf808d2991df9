"""The training of `tuned`: the trained variables, Adam, measures, the best state, the file that keeps them.

torch is imported inside functions only.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..codec import TritPlanes
from ..errors import TuneError
from ..files import check_text_target, partial_file
from ..plan import TuneSettings
from ..progress import Progress

if TYPE_CHECKING:
    from .student import Student
from typing import NamedTuple

MEASURED_TOGETHER = 8  # windows
SAVING = 20  # a save of the state may take one part of so many of the time


class Batches:
    """Runs windows through the student, as many at a time as memory takes."""

    def __init__(self, student: Student, settings: TuneSettings) -> None:
        self.student = student
        self.micro = settings.micro_batch or settings.batch
        self.device = student.device

    def halve(self, length: int) -> None:
        """After running out of memory. Raises TuneError at one window."""
        import torch

        if self.micro == 1:
            raise TuneError(
                f"tuning: out of memory of {self.device} with one window of {length} tokens at a time; take shorter "
                "windows, a smaller logits_bytes, or a larger GPU"
            ) from None
        self.micro = (self.micro + 1) // 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def kl(self, ids: Any, train: bool) -> Any:
        """Mean KL of windows (N, L): float64 scalar on the device; train: gradients of the mean into the leaves."""
        import torch

        while True:
            try:
                if train:
                    self.student.zero_grad()
                parts = ids.split(self.micro)
                return sum(self.student.kl(p, 1 / ids.numel() if train else None) for p in parts) / ids.numel()
            except torch.cuda.OutOfMemoryError:
                pass  # leave the handler first: its traceback holds the tensors
            self.halve(ids.shape[1])

    def mean(self, ids: Any, done: Callable[[int], None]) -> float:
        """Mean KL of any number of windows, without gradients."""
        total = 0.0
        for a in range(0, len(ids), MEASURED_TOGETHER):
            part = ids[a : a + MEASURED_TOGETHER]
            total += float(self.kl(part, train=False)) * len(part)
            done(a + len(part))
        return total / len(ids)


class Run:
    """One tuning: the trained variables, Adam, measures, the best state, the file that keeps them."""

    def __init__(self, student: Student, settings: TuneSettings, train: Any, held: Any, progress: Progress) -> None:
        import torch

        from ..quantize import change_unit

        self.student, self.settings, self.train, self.held = student, settings, train, held
        self.progress, self.batches = progress, Batches(student, settings)
        self.step, self.history, self.notes = 0, list[Measure](), list(student.notes)
        self.sum, self.count, self.done = 0.0, 0, False
        self.path: Path | None = None
        self.saved, self.took, self.whole = time.monotonic(), 0.0, True
        scales, vectors = student.scales.value, student.vector_values.value
        self.scale0, self.vector0 = scales.clone(), vectors.clone()
        self.unit = torch.cat([change_unit(v) for v in student.vector_values.views(self.vector0)] or [vectors])
        self.d = {"scales": (torch.zeros_like(scales), settings.lr)}
        if settings.train_vectors and len(vectors):
            self.d["vectors"] = (torch.zeros_like(vectors), settings.lr_vectors)
        if student.latent:
            self.d["latent"] = (student.latent.value, settings.lr_planes)
        self.adam = torch.optim.Adam(
            [{"params": [d], "lr": lr} for d, lr in self.d.values()],
            betas=settings.betas,
            eps=settings.eps,
            fused=student.device.type == "cuda",
        )
        self.usual = torch.zeros((), device=student.device)  # running mean of the gradient's norm
        self.best: dict[str, Any] = {}

    def go(self) -> None:
        """Train to the end; on Ctrl-C keep the state first. Raises TuneError, OutputError, KeyboardInterrupt."""
        try:
            self.train_on()
        except KeyboardInterrupt:
            self.save()
            raise

    def train_on(self) -> None:
        s = self.settings
        while not self.done:
            due = self.step % s.every == 0 or self.step == s.steps
            if due and not (self.history and self.history[-1].step == self.step):
                self.measure()
                best = min(range(len(self.history)), key=lambda i: self.history[i].held_out)
                self.done = self.step == s.steps or len(self.history) - 1 - best >= s.patience
            else:
                self.one_step()
            self.report()
            if time.monotonic() - self.saved > max(s.save_seconds, SAVING * self.took):
                self.save()
        self.save()

    def one_step(self) -> None:
        import torch

        kl = self.batches.kl(self.batch(), train=True)
        s, student = self.settings, self.student
        with torch.no_grad():
            slope = self.scale0 * torch.exp(self.d["scales"][0]) if s.form == "log" else self.scale0
            self.d["scales"][0].grad = student.scales.grad.mul_(slope)
            if "vectors" in self.d:
                self.d["vectors"][0].grad = student.vector_values.grad.mul_(self.unit)
            if student.latent:
                student.latent.value.grad = student.latent.grad
            norm = torch.stack([d.grad.norm() for d, _ in self.d.values()]).norm()
            value, size = torch.stack([kl.float(), norm]).tolist()  # the step's only wait for the device
            if not (math.isfinite(value) and math.isfinite(size)):
                self.notes.append(
                    f"stopped at step {self.step}: KL {value:g}, gradient {size:g}; the best state before is kept; "
                    "lower lr"
                )
                self.done = True
                return
            self.whole = False  # until variables, moments and the step's number belong together again
            if self.step:
                factor = (s.clip * self.usual / norm.clamp_min(1e-30)).clamp(max=1.0)
                for d, _ in self.d.values():
                    d.grad.mul_(factor)
                self.usual.lerp_(norm * factor, 0.05)
            else:
                self.usual.copy_(norm)
            rate = self.rate()
            for group, (_, lr) in zip(self.adam.param_groups, self.d.values(), strict=True):
                group["lr"] = lr * rate
            self.adam.step()
            self.step += 1
            self.sum, self.count = self.sum + value, self.count + 1
            self.apply()
            self.whole = True

    def rate(self) -> float:
        """Share of the full rate: warm-up, then a cosine down to the floor."""
        s = self.settings
        cosine = 0.5 * (1 + math.cos(math.pi * self.step / s.steps))
        return min(1.0, (self.step + 1) / max(1, s.warmup)) * (s.floor + (1 - s.floor) * cosine)

    def batch(self) -> Any:
        """The windows of this step: a new order each time through, which depends on nothing but seed and step."""
        import torch

        n, at = len(self.train), self.step * self.settings.batch
        picked: list[Any] = []
        for i in range(at, at + self.settings.batch):
            if not picked or i % n == 0:
                turn = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + i // n)
                order = torch.randperm(n, generator=turn)
            picked.append(order[i % n])
        return self.train[torch.stack(picked)]

    def apply(self) -> None:
        """Put the variables into the student: rounded scales, vectors, levels."""
        from ..quantize import code_scales, scale_codes

        student, d = self.student, self.d["scales"][0]
        wanted = self.scale0 * (d.exp() if self.settings.form == "log" else 1 + d)
        student.scales.value.copy_(code_scales(scale_codes(wanted)))
        if "vectors" in self.d:
            student.vector_values.value.copy_(self.vector0 + self.unit * self.d["vectors"][0])
        if student.latent:
            student.round_latent()

    def measure(self) -> None:
        """Measure the held-out text; keep the state if it is the best so far. Raises TuneError if the first is none."""
        held = self.batches.mean(self.held, lambda done: None)
        if not (self.history or math.isfinite(held)):
            raise TuneError(f"tuning: the KL is {held:g} before the first step; are the planes of this model?")
        train = self.sum / self.count if self.count else math.nan
        self.whole = False
        if not self.history or held < min(m.held_out for m in self.history):
            self.best = self.snapshot()
        self.history.append(Measure(self.step, train, held))
        self.sum, self.count = 0.0, 0
        self.whole = True

    def snapshot(self) -> dict[str, Any]:
        """What the student is made of now, on the CPU."""
        from ..quantize import scale_codes

        s = self.student
        kept = {"codes": scale_codes(s.scales.value), "vectors": s.vector_values.value}
        if s.latent:
            kept["levels"] = s.levels
        return {k: v.detach().to("cpu", copy=True) for k, v in kept.items()}

    def report(self) -> None:
        last = self.history[-1]
        kl = self.sum / self.count if self.count else last.train
        shown = f"KL {kl:.4f}, " if self.step else ""
        self.progress("tuning", self.step, self.settings.steps, f"{shown}held out {last.held_out:.4f}")

    def result(self, planes: Mapping[str, Any]) -> tuple[dict[str, TritPlanes], dict[str, Any]]:
        """The best state: all the planes, and norms and biases by their HF names if they were trained."""
        student = self.student
        out = {n: TritPlanes(np.asarray(p[0]), np.asarray(p[1])) for n, p in planes.items()}
        codes = student.scales.views(self.best["codes"])
        flat = self.best.get("levels")
        shapes = [v.shape for v in student.level_views]
        levels = flat.split([s.numel() for s in shapes]) if flat is not None else [None] * len(shapes)
        for name, c, shape, a in zip(student.names, codes, shapes, levels, strict=True):
            out[name] = TritPlanes(out[name].levels if a is None else a.view(shape).numpy(), c.numpy())
        values = student.vector_values.views(self.best["vectors"]) if self.settings.train_vectors else []
        vectors = {v.name: value.clone() for v, value in zip(student.vectors, values, strict=False)}
        return out, vectors

    def keep_in(self, path: Path, job: dict[str, Any]) -> None:
        """Keep the state in a file from now on, and resume from what it holds. Raises TuneError, OutputError."""
        check_text_target(path, force=True)
        self.path, self.job = path, job
        if path.exists():
            self.load(path)

    def tensors(self) -> dict[str, Any]:
        kept = {f"best.{k}": v for k, v in self.best.items()}
        kept["usual"] = self.usual
        for name, (d, _) in self.d.items():
            kept[name] = d.detach()
            for k, v in self.adam.state[d].items():
                kept[f"{name}.{k}"] = v
        return kept

    def save(self) -> None:
        """Write the state, if a file was given and the state is one; whole or not at all. Raises OutputError."""
        from safetensors.torch import save

        if self.path is None or not self.best or not self.whole:
            return
        begun = time.monotonic()
        note = {
            "job": self.job,
            "step": self.step,
            "history": self.history,
            "notes": self.notes,
            "sum": self.sum,
            "count": self.count,
            "done": self.done,
        }
        data = save({k: v.cpu().contiguous() for k, v in self.tensors().items()}, {"tuning": json.dumps(note)})
        with partial_file(self.path) as partial:
            partial.file.write(data)
            partial.sync()
            partial.publish()
        self.saved = time.monotonic()
        self.took = self.saved - begun

    def load(self, path: Path) -> None:
        import torch
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as f:
                note = json.loads((f.metadata() or {})["tuning"])
                kept = {k: f.get_tensor(k) for k in f.keys()}
            different = [k for k, v in self.job.items() if note["job"].get(k) != v]
            if not different:
                self.best = {k.removeprefix("best."): v for k, v in kept.items() if k.startswith("best.")}
                with torch.no_grad():
                    self.usual.copy_(kept["usual"])
                    for name, (d, _) in self.d.items():
                        d.copy_(kept[name])
                        self.adam.state[d] = {
                            k.removeprefix(f"{name}."): v.to(d.device)
                            for k, v in kept.items()
                            if k.startswith(f"{name}.")
                        }
                    self.step, self.sum, self.count = note["step"], note["sum"], note["count"]
                    self.history, self.done = [Measure(*m) for m in note["history"]], note["done"]
                    self.notes = note["notes"]
                    self.apply()
        except torch.cuda.OutOfMemoryError:
            raise
        except (OSError, SafetensorError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as e:
            raise TuneError(f"{path}: not the state of a tuning ({type(e).__name__}); remove it") from None
        if different:
            raise TuneError(
                f"{path}: holds a tuning that was begun with other {' and '.join(different)}; resume it as it was "
                "begun, or remove the file"
            )


class Measure(NamedTuple):
    """KL in nats a position. train: mean since the measure before (NaN at step 0)."""

    step: int
    train: float
    held_out: float
