"""A file against the checkpoint that it was made from: the same tokens through transformers and through the runtime.

It finds what no look at weights can: a setting that the file does not carry, a rotary embedding, a window, an expert's
weight, a row order that the graph takes otherwise. transformers computes in float32 on the CPU.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..calibrate import explained, quiet
from ..codec import F32, I32
from ..errors import CalibrationError, InputError
from ..files import FLOAT_IDS
from ..llamacpp import Model
from ..progress import Progress, no_progress
from ..source import Checkpoint, GgufSource, checkpoint, transformers_reason
from ..system import free_memory
from .scoring import Logits, score
from .text import load_text

TOKENS = 48
BATCH = 512  # tokens a call of the runtime
# An unquantized file is 0.003 to 0.01 from transformers on tiny random models, by bf16 and the f16 cache; a setting
# that is not carried makes 0.1 to 1.2.
BOUND = 0.03
ROOM = 1.3  # memory that transformers takes, by that of its weights


@dataclass(frozen=True)
class Likeness:
    """How near a file's logits are to transformers', over `tokens` tokens of text.

    distance  |a - b| / |a| of the logits, the mean of each token's taken off, a being transformers'
    median    the same of each token, the median: an expert that is chosen by a hair changes one token's only
    late      the median of the last quarter of tokens, which are beyond a window that the others are not
    kld       mean divergence of the file's distribution from transformers', nats
    same_top  share of tokens after which both find the same token the likeliest
    quantized names of the types that hold its matrices, but for plain floats; none: the file is unquantized
    bound     of the medians for an unquantized file; None for a quantized one, of which nobody knows what is normal
    """

    tokens: int
    distance: float
    median: float
    late: float
    kld: float
    same_top: float
    quantized: tuple[str, ...]
    bound: float | None

    @property
    def fault(self) -> str | None:
        """What is wrong, in words, or None."""
        if not np.isfinite(self.distance):
            return "its logits are not finite"
        apart = max(self.median, self.late)
        if self.bound is not None and apart > self.bound:
            return (
                f"another function is computed than by transformers: logits are {apart:.3f} apart (relative, median of "
                f"tokens), an unquantized file may be {self.bound:g}"
            )
        return None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def against_checkpoint(
    file: Path,
    folder: Path,
    *,
    tokens: int = TOKENS,
    trust_code: bool = False,
    threads: int = 0,
    progress: Progress = no_progress,
) -> Likeness:
    """Run text through both. file: a GGUF, of a split one any part; folder: a checkpoint that transformers can run.

    tokens      of the built-in text, which is repeated where it is shorter
    trust_code  run Python code that the checkpoint brings
    threads     of the runtime; 0 = all cores
    progress    stage "logits", 0 to 2

    Raises InputError where there is no torch or transformers, too little memory, another vocabulary, or the runtime or
    transformers cannot run the model.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no checkpoint folder; the logits of two GGUF files compares 'ptqtp-gguf eval'")
    found = checkpoint.check(folder, trust_code)
    with GgufSource(file) as source:
        path = source.readers[0].path
        weights = sum(t.n_weights for t in source.tensors)
        matrices = Counter(t.type_name for t in source.tensors if len(t.shape) > 1 and t.type not in FLOAT_IDS)
    _require_memory(folder, weights)
    progress("logits", 0, 2, "the file, by the runtime")
    ids, got = _runtime(path, tokens, threads)
    progress("logits", 1, 2, "the checkpoint, by transformers")
    wanted = _transformers(found, ids)
    progress("logits", 2, 2, "")
    return likeness(got, wanted, ids, tuple(kind for kind, _ in matrices.most_common()))


def likeness(got: F32, wanted: F32, ids: I32, quantized: Sequence[str] = ()) -> Likeness:
    """Of logits (T, V) of the file and (T, V') of transformers. Rows of the vocabulary that only one has, by padding,
    are left out."""
    n = min(got.shape[1], wanted.shape[1])
    a, b = np.ascontiguousarray(wanted[:, :n]), np.ascontiguousarray(got[:, :n])
    rows = score(Logits.of(b[:-1]), ids[1:], Logits.of(a[:-1]))
    a64 = a - a.mean(axis=1, keepdims=True, dtype=np.float64)
    apart = a64 - (b - b.mean(axis=1, keepdims=True, dtype=np.float64))
    each = np.linalg.norm(apart, axis=1) / np.linalg.norm(a64, axis=1)
    return Likeness(
        tokens=len(ids),
        distance=float(np.linalg.norm(apart) / np.linalg.norm(a64)),
        median=float(np.median(each)),
        late=float(np.median(each[-max(1, len(each) // 4) :])),
        kld=float(rows["kld"].mean()),
        same_top=float(rows["same_top"].mean()),
        quantized=tuple(quantized),
        bound=None if quantized else BOUND,
    )


def _require_memory(folder: Path, weights: int) -> None:
    need, free = int(4 * weights * ROOM), free_memory()
    if free and need > free:
        raise InputError(
            f"{folder}: transformers needs about {need / 1e9:.1f} GB of memory for it in float32, {free / 1e9:.1f} GB "
            "are free; try a smaller model of the same architecture, or leave out --logits"
        )


def _runtime(path: Path, n: int, threads: int) -> tuple[I32, F32]:
    """n tokens of text, and the file's logits behind each: int32 (n,), float32 (n, V)."""
    with Model(path) as model:
        text = load_text(None).text
        ids = model.tokens(text)
        if len(ids) < 2:
            raise InputError(f"{path}: its tokenizer makes {len(ids)} tokens of a text; has it a vocabulary?")
        ids = np.resize(ids, n) if len(ids) < n else ids[:n]
        out = np.empty((n, model.n_vocab), np.float32)
        with model.context(n, batch=min(n, BATCH), threads=threads) as context:
            for at in range(0, n, context.batch):
                part = np.arange(at, min(n, at + context.batch), dtype=np.int32)
                out[part] = context.feed(ids[part], part, np.ones(len(part), np.bool_))
    return ids, out


def _transformers(found: Checkpoint, ids: I32) -> F32:
    """transformers' logits behind each token, float32 (T, V)."""
    try:
        import torch
        import transformers
    except ImportError as e:
        raise InputError(f"--logits needs torch and transformers ({e}); pip install 'ptqtp-gguf[hf]'") from None
    version = tuple(int(n) for n in transformers.__version__.split(".")[:2])
    try:
        with quiet(), explained(found.folder, "transformers cannot run it"), torch.inference_mode():
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                found.folder,
                **{"dtype" if version >= (4, 56) else "torch_dtype": torch.float32},
                local_files_only=True,
                trust_remote_code=found.trust_code,
                attn_implementation="eager",
                output_loading_info=True,
            )
            if missing := sorted(info["missing_keys"]):
                raise InputError(f"{found.folder}: transformers finds no {missing[0]} in it, and would make one up")
            rows = model.get_input_embeddings().weight.shape[0]
            if int(ids.max()) >= rows:
                raise InputError(
                    f"{found.folder}: its embedding has {rows} rows, the file's text needs {ids.max() + 1}"
                )
            made = model.eval()(torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits[0]
            out: F32 = made.float().numpy().copy()
            del model, made
    except (MemoryError, torch.OutOfMemoryError):
        raise InputError(f"{found.folder}: memory does not suffice for it in float32; leave out --logits") from None
    except CalibrationError as e:
        reason = transformers_reason(e.__cause__) if isinstance(e.__cause__, Exception) else str(e)
        raise InputError(f"{found.folder}: transformers cannot run it: {reason}; leave out --logits") from None
    gc.collect()
    return out
