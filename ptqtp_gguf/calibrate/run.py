"""The stage `calibrate`: text -> second moments of each matrix' inputs -> planes.

As a rule the moments come from the runtime (by_moments.py). On a GPU, and with `--effort best`, a checkpoint is
calibrated in order by transformers (in_order.py), and what is finished is kept block by block.
"""

from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..codec import F32, I8, U8
from ..errors import CalibrationError, MomentsError, OutputError, QuantizeError
from ..files import TensorInfo
from ..plan import Role, role_of
from ..quantize import gptq
from ..source import Checkpoint
from . import mapping
from .by_moments import by_moments
from .in_order import Stage, has_streams, in_order
from .sums import Moment
from .token_weights import Weights, token_weights
from .work import FEW, MIN_TOKENS, Work, rows_in

if TYPE_CHECKING:
    import torch

ENDS = (Role.EMBEDDING, Role.OUTPUT)  # not in a block: no calibration sees them, tuning does


def run(work: Work) -> None:
    """Calibrate: leave planes of every matrix that was seen in the store. Raises CalibrationError, QuantizeError."""
    if work.seen:
        by_moments(work, work.seen)
    else:
        _in_order(work)
    missing = [n for n in work.tensors if not work.store.has(n)]
    if len(missing) == len(work.tensors):
        raise CalibrationError(f"{work.source.path}: no matrix was seen by the calibration; give --imatrix instead")
    if work.how.tune:
        missing = [n for n in missing if not _begin(work, work.tensors[n])]
    if missing:
        n = f"{len(missing)} tensors, e.g. {missing[0]}" if len(missing) > 1 else missing[0]
        kinds = " or ".join(sorted({work.kinds[n].name for n in missing}))
        work.store.say(f"{n}: not seen by the calibration, or not fit for {kinds}; left to search")


def _begin(work: Work, t: TensorInfo) -> bool:
    """Planes by search for an embedding or output, which tuning begins with; whether they were made."""
    if role_of(t.name) not in ENDS or not work.fits(t.name, w := work.weights(t)):
        return False
    work.store.put(t, *work.searched(t.name, w))
    return True


def _in_order(work: Work) -> None:
    found = work.checkpoint("--calib")
    tokens = work.tokens()
    first = work.store.blocks
    if first and not has_streams(work.store.folder, first):
        raise CalibrationError(f"{work.store.folder}: the streams of block {first} are lost; start over with --restart")
    weights = _token_weights(work, found, tokens)
    name = mapping.names(work.arch, work.layers)
    for stage in in_order(
        found,
        tokens,
        name,
        work.tensors,
        work.store.folder,
        first=first,
        finished=work.store.end_block,
        weights=weights,
        device=work.device,
        progress=work.progress,
    ):
        _quantize(work, stage.moments, stage.cross)
        stage.replace(_replaced(work, stage))


def _token_weights(work: Work, found: Checkpoint, tokens: NDArray[np.int64]) -> Weights:
    if not work.how.fisher:
        return {}
    path = work.store.folder / "weights.npz"
    if not work.store.marked("weights"):
        weights = token_weights(found.folder, tokens, work.device, work.progress, found.trust_code)
        with open(path, "wb") as f:
            np.savez(f, **{k: v.astype(np.float32) for k, v in weights.items()})  # type: ignore[arg-type]
        work.store.mark("weights")
    try:
        with np.load(path) as held:
            return {k: held[k] for k in held.files}
    except OSError as e:
        raise OutputError(f"{path}: {e.strerror or 'damaged'}; start over with --restart") from None
    except (ValueError, EOFError, KeyError, AttributeError, zipfile.BadZipFile):
        raise OutputError(f"{path}: damaged; start over with --restart") from None


def _quantize(work: Work, moments: dict[str, Moment], cross: torch.Tensor | None) -> None:
    """Tensors of one input; all again where one is missing: products of other shapes may round otherwise."""

    if all(work.store.has(n) for n in moments):
        return
    todo = {n: work.weights(work.tensors[n]) for n in moments}
    todo = {n: w for n, w in todo.items() if work.fits(n, w)}
    for kind in {work.kinds[n].id: work.kinds[n] for n in todo}.values():
        flat = {n: w for n, w in todo.items() if moments[n].h.ndim == 2 and work.kinds[n] == kind}
        if not flat:
            continue
        m = moments[next(iter(flat))]
        try:
            planes = _planes(work, next(iter(flat)), np.concatenate(list(flat.values())), m.h, cross)
        except MomentsError as e:
            for n in flat:
                work.store.put(work.tensors[n], *work.searched(n, flat[n]))
                work.store.say(f"{n}: by search: {e}")
            continue
        cuts = np.cumsum([len(v) for v in flat.values()])[:-1].tolist()
        for n, levels, codes in zip(flat, *(np.split(p, cuts) for p in planes), strict=True):
            work.store.put(work.tensors[n], levels, codes)
    for n in todo:
        if moments[n].h.ndim > 2 and not work.store.has(n):
            _experts(work, n, todo[n], moments[n])


def _planes(work: Work, name: str, w: F32, h: torch.Tensor, cross: torch.Tensor | None) -> tuple[I8, U8]:
    """Levels and codes of weights (R, C). Raises MomentsError where h or cross says nothing, QuantizeError."""
    import torch

    on, kind = torch.from_numpy(w).to(work.device), work.kinds[name]
    try:
        planes = gptq.calibrate(on, h.to(work.device), cross, work.how.settings, work.options.threads, kind)
    except MomentsError:
        raise
    except QuantizeError as e:
        raise QuantizeError(f"tensor {name}: {e}") from None
    return planes.levels.cpu().numpy(), planes.codes.cpu().numpy()


def _experts(work: Work, name: str, w: F32, m: Moment) -> None:
    planes = []
    by_search: dict[str, list[int]] = {}  # why: experts
    for e, part in enumerate(np.split(w, len(m.counts))):
        try:
            if m.counts[e] < MIN_TOKENS:
                raise MomentsError(FEW)
            planes.append(_planes(work, name, part, m.h[e], None))
        except MomentsError as error:
            by_search.setdefault(str(error), []).append(e)
            planes.append(work.searched(name, part))
    for why, experts in by_search.items():
        work.say_experts(name, experts, why)
    work.store.put(work.tensors[name], *map(np.concatenate, zip(*planes, strict=True)))


def _replaced(work: Work, stage: Stage) -> dict[str, torch.Tensor]:
    """The stage's parameters with the planes in them."""
    import torch

    new: dict[str, torch.Tensor] = {}
    for n, full_name in stage.params.items():
        t = work.tensors[n]
        link = mapping.link(work.source, t, stage.parameter) if work.store.has(n) else None
        if link is None or link.hf != full_name:
            continue
        levels, codes = work.store.planes(t)
        w = gptq.Planes(torch.from_numpy(levels), torch.from_numpy(codes)).weights()
        if full_name not in new:
            new[full_name] = stage.parameter(full_name).detach().float().cpu().clone()
        flat = new[full_name].reshape(-1, t.shape[0])
        flat[rows_in(link, len(w))] = w
    return new
