"""From the parameters of a Hugging Face model to the tensors of a GGUF: names, and which row became which.

Names are gguf-py's table. Rows are found by looking: the converter permutes, fuses and splits by rules of its own for
each architecture, but it leaves a row's values as they are, so equal rows tell what it did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..codec import I64
from ..errors import InputError
from ..files import BF16_ID, F16_ID, F32_ID, TensorInfo, tensor_names
from ..source import Source

if TYPE_CHECKING:
    import torch

Rows = NDArray[Any]  # (R, C) of the GGUF's values as integers of their bits

SUFFIXES = (".weight", ".bias")
OFFSETS = (0.0, 1.0)  # of vectors; some models multiply by 1 + norm, and the converter adds the 1
FUSED = {  # Granite's modules, and the matrices of a block that they become; gguf-py's table has neither
    "shared_mlp.input_linear": ("ffn_gate_shexp", "ffn_up_shexp", "ffn_gate", "ffn_up"),
    "shared_mlp.output_linear": ("ffn_down_shexp", "ffn_down"),
}
_BITS = {BF16_ID: ("<u2", "bfloat16"), F16_ID: ("<u2", "float16"), F32_ID: ("<u4", "float32")}
_BLOCK = 1 << 20  # values hashed at a time


class Link(NamedTuple):
    """A GGUF tensor's rows in a parameter of a Hugging Face model, whose outer dimensions are joined to rows.

    hf      name of the parameter
    rows    int64 (R,): row i of the GGUF is row rows[i] of the parameter; None: it is row start + i. Of a vector, rows
            are its values.
    start   first row of the parameter that is used
    offset  of vectors: GGUF = parameter + offset
    """

    hf: str
    rows: I64 | None
    start: int
    offset: float


def names(arch: str, n_layers: int) -> Callable[[str], str | None]:
    """A function from a parameter's name to the GGUF tensor's name, None where there is none of its own.

    arch: general.architecture of the GGUF. Raises InputError for one that gguf-py does not know.
    """
    table = _table(arch, n_layers)

    def name(hf: str) -> str | None:
        suffix = next((s for s in SUFFIXES if hf.endswith(s)), "")
        for stem in _spellings(hf.removesuffix(suffix) if suffix else hf):
            if stem in table:
                return table[stem] + (suffix or ".weight")
        return None

    return name


def _table(arch: str, n_layers: int) -> dict[str, str]:
    table = tensor_names(arch, n_layers)
    if not table:
        raise InputError(f"architecture {arch}: not in the tables of the gguf package; pip install -U gguf")
    return table


def _spellings(stem: str) -> Iterator[str]:
    """A parameter's name, and as a text-only model has it: the text part of a larger model has a prefix."""
    yield stem
    if "language_model." in stem:
        bare = stem.replace("language_model.", "")
        yield bare
        yield f"model.{bare}"


def link(source: Source, t: TensorInfo, get_hf: Callable[[str], torch.Tensor]) -> Link | None:
    """Where the rows of a GGUF tensor stand in the Hugging Face model, or None where no such relation is found.

    source  the unquantized GGUF (bf16, f16 or f32) that was made from the model, or its stream
    get_hf  the values of a parameter by its name; KeyError where the model has none of that name
    Raises InputError where the architecture is unknown or the source cannot be read.
    """
    for hf in _candidates(source, t.name):
        try:
            w = get_hf(hf)
        except KeyError:
            continue
        found = _vector(source, t, hf, w, get_hf) if len(t.shape) == 1 else _matrix(source, t, hf, w)
        if found is not None:
            return found
    return None


def _candidates(source: Source, name: str) -> Iterator[str]:
    """Names that the parameter behind a GGUF tensor may have."""
    arch = source.get("general.architecture")
    layers = source.get(f"{arch}.block_count")
    if not isinstance(arch, str) or not isinstance(layers, int) or not 0 < layers <= len(source.tensors):
        raise InputError(f"{source.path}: the metadata do not tell architecture and number of blocks")
    suffix = next((s for s in SUFFIXES if name.endswith(s)), "")
    stem = name.removesuffix(suffix)
    for hf, gguf_name in _table(arch, layers).items():
        if gguf_name == stem:
            yield hf + suffix
            if hf.startswith("model."):
                yield f"model.language_model.{hf.removeprefix('model.')}{suffix}"
    block, _, leaf = stem.removeprefix("blk.").partition(".")
    if leaf in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):  # as transformers 5 holds experts
        fused = "down_proj" if "down" in stem else "gate_up_proj"
        yield from (f"model.layers.{block}.{m}.experts.{fused}" for m in ("mlp", "block_sparse_moe"))
    for module, made in FUSED.items():
        if leaf in made:
            yield f"model.layers.{block}.{module}{suffix}"


def _matrix(source: Source, t: TensorInfo, hf: str, w: torch.Tensor) -> Link | None:
    cols = t.shape[0]
    if t.type not in _BITS or w.ndim < 2 or w.shape[-1] != cols:
        return None
    theirs = _bits(w, t.type)
    n = t.n_weights // cols
    if len(theirs) < n:
        return None
    pieces, first, same = [], 0, len(theirs) == n
    for raw in source.pieces(t):
        ours = raw.view(_BITS[t.type][0])
        same = same and np.array_equal(ours, theirs[first : first + len(ours)])
        if not same and first:
            pieces.append(theirs[:first])  # equal so far
            first = 0
        if not same:
            pieces.append(ours)
        else:
            first += len(ours)
    if same:
        return Link(hf, None, 0, 0.0)
    rows = _find(np.concatenate(pieces), theirs, _guesses(source, n))
    if rows is None:
        return None
    start = int(rows.min())
    return Link(hf, None if np.array_equal(rows, np.arange(start, start + n)) else rows, start, 0.0)


def _vector(
    source: Source, t: TensorInfo, hf: str, w: torch.Tensor, get_hf: Callable[[str], torch.Tensor]
) -> Link | None:
    """Values repeat in a vector, so its order is its matrix's, or it is unchanged."""
    if t.type not in _BITS or w.numel() < t.n_weights:
        return None
    ours = np.concatenate(list(source.chunks(t, t.nbytes))).view(_BITS[t.type][0])
    orders: list[tuple[I64 | None, int]] = [(None, 0)]
    matrix = next((m for m in source.tensors if m.name == t.name.removesuffix(".bias") + ".weight"), None)
    if t.name.endswith(".bias") and matrix is not None and (of := link(source, matrix, get_hf)) is not None:
        orders.insert(0, (of.rows, of.start))
    for offset in OFFSETS:
        theirs = _bits(w.float() + offset if offset else w, t.type, flat=True)
        for rows, start in orders:
            wanted = np.arange(start, start + len(ours)) if rows is None else rows
            if len(theirs) > wanted.max() and np.array_equal(theirs[wanted], ours):
                return Link(hf, rows, start, offset)
    return None


def _bits(w: torch.Tensor, type_id: int, flat: bool = False) -> Rows:
    """A parameter's values in the GGUF's type, rounded to nearest even as the converter does; as integers."""
    import torch

    code, dtype = _BITS[type_id]
    w = w.detach().to("cpu", getattr(torch, dtype)).contiguous()
    bits: Rows = w.view(torch.uint8).numpy().view(code) if w.ndim else w.reshape(1).view(torch.uint8).numpy().view(code)
    return bits.reshape(-1) if flat else bits.reshape(-1, w.shape[-1])


def _guesses(source: Source, n: int) -> Iterator[I64]:
    """Orders of rows to be tried first, where equal rows (of zeros) would leave a choice: llama's, a head at a time,
    the two halves that rotate together interleaved."""
    arch = source.get("general.architecture")
    for key in ("head_count", "head_count_kv"):
        heads = source.get(f"{arch}.attention.{key}")
        if isinstance(heads, int) and heads > 0 and n % (2 * heads) == 0:
            yield np.arange(n, dtype=np.int64).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def _find(ours: Rows, theirs: Rows, guesses: Iterator[I64]) -> I64 | None:
    """int64 (R,): the row of `theirs` that each row of `ours` equals, each used once; None where one has none."""
    for rows in guesses:
        if len(theirs) == len(ours) and np.array_equal(theirs[rows], ours):
            return rows
    a, b = _digests(ours), _digests(theirs)
    order = np.argsort(b, kind="stable")
    mine = np.argsort(a, kind="stable")
    sorted_a = a[mine]
    place = np.searchsorted(b[order], sorted_a) + np.arange(len(a)) - np.searchsorted(sorted_a, sorted_a)
    if place.max() >= len(b):
        return None
    rows = np.empty(len(a), np.int64)
    rows[mine] = order[place]
    step = max(1, _BLOCK // ours.shape[1])
    for i in range(0, len(rows), step):
        if not np.array_equal(theirs[rows[i : i + step]], ours[i : i + step]):
            return None
    return rows


def _digests(rows: Rows) -> NDArray[np.uint64]:
    """64 bits a row, equal for equal rows."""
    weights = np.random.default_rng(0).integers(0, 1 << 64, rows.shape[1], np.uint64) | np.uint64(1)
    out = np.empty(len(rows), np.uint64)
    step = max(1, _BLOCK // rows.shape[1])
    for i in range(0, len(rows), step):
        out[i : i + step] = (rows[i : i + step].astype(np.uint64) * weights).sum(axis=1, dtype=np.uint64)
    return out
