"""How to tune: steps, rates, what is trained."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TuneSettings:
    """How to tune.

    steps, batch     steps at most, windows a step; the cosine ends at `steps`, at `floor` of the rate
    lr, lr_vectors   relative change a step of scales; of norms and biases
    form             scale = start * (1 + d) ("linear") or start * exp(d) ("log")
    every, patience  steps between measures of the held-out text; measures without improvement before it ends
    train_planes     also train levels, at rate lr_planes in units of the scale; latent_start: 0 = latent weights begin
                     at their level, 1 = at the original weight clipped into the level's cell
    micro_batch      windows at a time, 0 = as many as memory takes; logits_bytes: bound of the logits in memory
    bf16             on CUDA: bf16 matrix products inside the blocks, TF32 in the head (tune/student.py says more)
    """

    steps: int = 1000
    batch: int = 8
    warmup: int = 32
    lr: float = 1.5e-3
    lr_vectors: float = 3e-4
    floor: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-9
    clip: float = 3.0
    form: str = "linear"
    train_vectors: bool = True
    train_planes: bool = False
    lr_planes: float = 6e-3
    latent_start: float = 0.5
    every: int = 50
    patience: int = 6
    seed: int = 0
    bf16: bool = True
    micro_batch: int = 0
    logits_bytes: int = 2 << 30
    save_seconds: float = 60.0
