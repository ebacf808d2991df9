"""`calibrated`: second-order quantization with the second moments of calibration text. PyTorch, CPU or CUDA.

H = sum of c * x xT over the calibration tokens, x the input of a matrix, c a weight of the token (calibration.py). The
error of a row is e H eT, e = w - q. Four steps, each kept because it paid (docs/results/accuracy.md):

1. GPTQ (arXiv 2210.17323): column by column, each column's rounding error goes to the columns not yet done, through the
   Cholesky factor of inv(H). A group's scale is chosen when its first column comes: the codes near the best one for the
   weights as they have become by then, each by the feedback that it would really cause. In a group
   of TP2_2 nine paths survive, each with its own feedback: per-survivor processing (Raheli, Polydoros, Tzou, IEEE
   Trans. Commun. 43, 1995).
2. Coordinate descent (as QuantEase, arXiv 2309.01885): a group of 32 at a time, its levels and scale code together; the
   error never grows. Levels of TP2_1 change one by one, those of TP2_2 as the best path for the whole group.
3. Joint least squares of all scales of a row, levels fixed, rounded to their codes; kept for a row where it helps.
4. Coordinate descent again.

In sequential use the inputs come from layers that are quantized already; `aim` moves the weights a part of the way to
those that would give the unquantized layer's outputs (as GPTAQ, arXiv 2504.02692, which goes the whole way).

The inner loops are native/bulk/calibrate.inc (CPU) and calibrate.cu (CUDA); gptq_reference.py is their numpy
reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..codec import TP2_1, TP2_2, TensorType, native
from ..errors import MomentsError, QuantizeError
from .cuda import driver as nvidia

if TYPE_CHECKING:
    from torch import Tensor

G = TP2_1.group
SOURCE_FILE = Path(__file__).parent / "cuda" / "calibrate.cu"
RIDGE = 1e-3  # of the scales' least squares, relative to the mean diagonal
MAX_DAMP = 1.0
ROWS_AT_ONCE = 1 << 26  # floats of least squares' systems held together
ROW_THREADS = 16  # of calibrate.cu's kernels for TP2_2
WINDOWS = {TP2_1.id: 2, TP2_2.id: 1}  # TP2_2: 0 costs 1 to 3 % of error; 2 gains .3 % in a quarter more time


@dataclass(frozen=True)
class Settings:
    """damp: added to the diagonal of H, relative to its mean; passes: coordinate descents before and after least
    squares; window: scale codes tried on either side, None = the type's of WINDOWS; aim: share of the way to the
    unquantized layer's outputs."""

    damp: float = 0.05
    passes: tuple[int, int] = (1, 1)
    window: int | None = None
    aim: float = 0.5


class Planes(NamedTuple):
    """A matrix of a type with levels, unpacked: w = scale(code) * level."""

    levels: Tensor  # int8 (R, C)
    codes: Tensor  # uint8 (R, C/32)

    def weights(self) -> Tensor:
        """float32 (R, C)."""
        from .torch_codec import code_scales

        rows, cols = self.levels.shape
        w: Tensor = (code_scales(self.codes)[..., None] * self.levels.reshape(rows, -1, G)).reshape(rows, cols)
        return w


Matrix = tuple[int, int]  # address of the first element, elements from row to row


class _Blocks(NamedTuple):
    """The inner loops on one kind of device, called as native.gptq_block and native.cd_block, a block of columns."""

    columns: int
    gptq: Callable[..., None]
    descend: Callable[..., None]


@cache
def _cuda(index: int) -> nvidia.Device:
    return nvidia.Device(index, SOURCE_FILE)


def _blocks(kind: TensorType, like: Tensor, threads: int) -> _Blocks:
    if like.device.type == "cpu":
        loops = [partial(loop, kind, threads=threads) for loop in (native.gptq_block, native.cd_block)]
        return _Blocks(4 * G, *loops)
    device, stream = _device_of(like)
    threads_a_row, chain = (ROW_THREADS, "_chain") if kind.chain else (1, "")

    def launch(name: str, rows: int, cols: int, *matrices: Matrix, window: int) -> None:
        assert cols == G
        places = [x for address, stride in matrices for x in (address, np.int64(stride))]
        device.launch(name, rows * threads_a_row, *places, np.int32(rows), np.int32(window), stream=stream)

    return _Blocks(G, partial(launch, f"gptq{chain}_group"), partial(launch, f"cd{chain}_group"))


def _device_of(like: Tensor) -> tuple[nvidia.Device, Any]:
    """The kernels on a tensor's device, and torch's stream there. Raises QuantizeError."""
    import torch

    try:
        device = _cuda(like.device.index or 0)
    except (nvidia.Unavailable, nvidia.CudaError) as e:
        raise QuantizeError(f"--device cuda: {e}; use --device cpu") from None
    return device, device.driver.CUstream(torch.cuda.current_stream(like.device).cuda_stream)


def nearest_in_chain(v: Tensor, levels: Tensor) -> None:
    """Writes the levels that TP2_2 can hold nearest to weights in units of their scale, each 32 by themselves.

    v float32, finite, levels int8: contiguous, of one size, a multiple of 32, on one device.
    """
    if v.device.type == "cpu":
        native.nearest_levels(v.data_ptr(), levels.data_ptr(), v.numel())
        return
    device, stream = _device_of(v)
    groups = v.numel() // G
    device.launch("nearest_tp2_2", groups, v.data_ptr(), levels.data_ptr(), np.uint32(groups), stream=stream)


def _at(t: Tensor, row: int = 0, col: int = 0) -> Matrix:
    """A matrix from one of its elements on."""
    return t.data_ptr() + t.element_size() * (row * t.stride(0) + col), t.stride(0)


def calibrate(
    w: Tensor,
    h: Tensor,
    cross: Tensor | None = None,
    settings: Settings | None = None,
    threads: int = 0,
    kind: TensorType = TP2_1,
) -> Planes:
    """Quantize one matrix.

    w      float32 (R, C), C a multiple of 32, finite and within the reach of the type
    h      float32 (C, C), second moments of the inputs; on the same device, which decides where the work is done
    cross  float32 (C, C), sum of c * x_full xT, x as in h, x_full the same input in the unquantized model; or None
    kind   TP2_1 or TP2_2
    Raises MomentsError where h or cross is not finite, or h has no direction with any power; QuantizeError.
    """
    settings = settings or Settings()
    cols = w.shape[1]
    if h.shape != (cols, cols) or cols % G:
        raise QuantizeError(
            f"second moments of shape {tuple(h.shape)} for rows of {cols}; rows must be multiples of {G}"
        )
    order = _chain_order(kind, w)
    if order is None:
        return _calibrate(w, h, cross, settings, threads, kind)
    w, h = w[:, order].contiguous(), h[order[:, None], order]
    cross = None if cross is None else cross[order[:, None], order]
    planes = _calibrate(w, h, cross, settings, threads, kind)
    levels = planes.levels.clone()
    levels[:, order] = planes.levels
    return Planes(levels, planes.codes)


def _chain_order(kind: TensorType, like: Tensor) -> Tensor | None:
    """The columns of a matrix in the order of its type's chain, group by group; None where the order is as it is."""
    import torch

    if not kind.chain:
        return None
    first = torch.arange(0, like.shape[1], G, device=like.device)
    return (first[:, None] + torch.tensor(kind.chain, device=like.device)).flatten()


def _calibrate(
    w: Tensor, h: Tensor, cross: Tensor | None, settings: Settings, threads: int, kind: TensorType
) -> Planes:
    """The steps, columns in the order in which the inner loops want them."""
    window = WINDOWS[kind.id] if settings.window is None else settings.window
    d, u = _prepare(h, settings.damp)
    if cross is not None and settings.aim:
        w = _aimed(w, h, cross, settings, kind.reach)
    blocks = _blocks(kind, w, threads)
    planes = _gptq(blocks, w, u, window)
    del u
    planes = _descend(blocks, w, d, planes, settings.passes[0], window)
    planes = _least_squares(w, d, planes)
    return _descend(blocks, w, d, planes, settings.passes[1], window)


def _prepare(h: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """H damped and scaled to a mean diagonal of 1, and the upper Cholesky factor of its inverse, both float32.

    Inputs that are never there get the mean diagonal, so that the rounding of their weights is plain. A matrix that is
    still singular in float64 is damped more.
    """
    import torch

    diagonal = h.diagonal().double()
    mean = float(diagonal.mean())
    if not (np.isfinite(mean) and mean > 0 and bool(torch.isfinite(h).all())):
        raise MomentsError("second moments are not finite or all zero")
    scaled = h.double() / mean
    dead = diagonal <= 0
    scaled.diagonal()[dead] = 1.0
    while True:
        damped = scaled.clone()
        damped.diagonal().add_(damp)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            inverse = torch.cholesky_inverse(lower)
            u, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed):
                return damped.float(), u.float().contiguous()
        if damp >= MAX_DAMP:
            raise MomentsError("second moments are singular")
        damp = min(max(damp * 4, 1e-3), MAX_DAMP)


def _aimed(w: Tensor, h: Tensor, cross: Tensor, settings: Settings, limit: float) -> Tensor:
    """w + aim * w (cross - h) inv(h): towards what gives the full model's outputs on the quantized inputs."""
    import torch

    if not bool(torch.isfinite(cross).all()):
        raise MomentsError("moments with the unquantized inputs are not finite")
    mean = h.diagonal().double().mean()
    damped = h.double() / mean
    damped.diagonal().add_(settings.damp)
    gap = (cross.double() - h.double()) / mean
    step = torch.linalg.solve(damped, gap.T).T
    return (w + settings.aim * (w.double() @ step).float()).clamp(-limit, limit)


def _gptq(blocks: _Blocks, w: Tensor, u: Tensor, window: int) -> Planes:
    import torch

    rows, cols = w.shape
    v = w.clone()
    levels = torch.zeros((rows, cols), dtype=torch.int8, device=w.device)
    codes = torch.zeros((rows, cols // G), dtype=torch.uint8, device=w.device)
    for a in range(0, cols, blocks.columns):
        n = min(blocks.columns, cols - a)
        err = torch.empty((rows, n), device=w.device)
        blocks.gptq(
            rows, n, _at(v, 0, a), _at(u, a, a), _at(levels, 0, a), _at(codes, 0, a // G), _at(err), window=window
        )
        if a + n < cols:
            v[:, a + n :].addmm_(err, u[a : a + n, a + n :], alpha=-1)
    return Planes(levels, codes)


def _descend(blocks: _Blocks, w: Tensor, h: Tensor, planes: Planes, passes: int, window: int) -> Planes:
    """Coordinate descent; changes the planes in place."""
    import torch

    rows, cols = w.shape
    levels, codes = planes
    r = (w - planes.weights()) @ h
    for _ in range(passes):
        for a in range(0, cols, blocks.columns):
            n = min(blocks.columns, cols - a)
            delta = torch.empty((rows, n), device=w.device)
            places = _at(r, 0, a), _at(h, a, a), _at(levels, 0, a), _at(codes, 0, a // G), _at(delta)
            blocks.descend(rows, n, *places, window=window)
            r.addmm_(delta, h[a : a + n], alpha=-1)
    return planes


def _least_squares(w: Tensor, h: Tensor, planes: Planes) -> Planes:
    """All scales of a row together, levels fixed; a row keeps its old codes where rounding made it worse."""
    import torch

    from .torch_codec import code_scales, scale_codes

    rows, cols = w.shape
    groups = cols // G
    by_group = h.reshape(groups, G, cols)
    codes = planes.codes.clone()
    step = max(1, ROWS_AT_ONCE // (groups * groups))
    for a in range(0, rows, step):
        t = planes.levels[a : a + step].float().reshape(-1, groups, G)
        n = len(t)
        system = torch.empty((n, groups, groups), device=w.device)
        for g in range(groups):
            system[:, g] = ((t[:, g] @ by_group[g]).reshape(n, groups, G) * t).sum(-1)
        wanted = (t * (w[a : a + step] @ h).reshape(n, groups, G)).sum(-1)
        old = code_scales(planes.codes[a : a + step])
        residual = wanted - (system @ old[..., None])[..., 0]
        ridged = system.clone()
        mean = system.diagonal(dim1=1, dim2=2).mean(-1)[:, None]
        ridged.diagonal(dim1=1, dim2=2).add_(RIDGE * mean + 1e-20)
        new = old + torch.linalg.solve(ridged, residual[..., None])[..., 0]
        new = torch.where((new > old / 2) & (new < old * 2), new, old)
        new_codes = scale_codes(new)

        def cost(s: Tensor, system: Tensor = system, wanted: Tensor = wanted) -> Tensor:
            return (s * ((system @ s[..., None])[..., 0] - 2 * wanted)).sum(-1)

        better = cost(code_scales(new_codes)) < cost(old)
        codes[a : a + step] = torch.where(better[:, None], new_codes, planes.codes[a : a + step])
    return Planes(planes.levels, codes)
