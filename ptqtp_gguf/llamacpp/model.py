"""A GGUF file opened by the runtime: text out (`load`, `generate`), or tokens in and logits out (`Model`, `Context`).

llama-cpp-python is imported by bindings.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..codec import F32, I32
from ..errors import InputError, RuntimeMissing
from ..files import Reader
from . import bindings, rpc
from .grammar import bound
from .install import HOW_TO_BUILD, _library, ggml_library, version
from .loadable import reason, why_not_loadable
from .lora import Adapter


def system_info() -> dict[str, str]:
    """What the runtime found of this CPU and chose: {"AVX2": "1", "PTQTP": "avx2", ...}. Raises RuntimeMissing."""
    text = _llama().llama_print_system_info().decode(errors="replace")
    pairs = (part.rpartition(":")[2].partition("=") for part in text.split("|"))
    return {key.strip(): value.strip() for key, equals, value in pairs if equals}


USUAL_CONTEXT = 4096  # tokens; the memory of a context grows with it, and models are trained on up to a million


def context_for(path: Path, ctx: int) -> int:
    """Tokens of context to run a file with: ctx, or if it is 0 what the model was trained on, at most 4096.

    Reads the header only. Raises InputError if the file is damaged, or of another version of our format.
    """
    with Reader(path) as reader:
        trained = reader.get(f"{reader.get('general.architecture')}.context_length")
    if ctx:
        return ctx
    return min(trained, USUAL_CONTEXT) if isinstance(trained, int) and trained > 0 else USUAL_CONTEXT


def load(
    path: Path,
    *,
    n_ctx: int = 2048,
    threads: int | None = None,
    verbose: bool = False,
    rpc: Sequence[str] = (),
    rpc_layers: int = -1,
    lora: Sequence[Adapter] = (),
) -> Any:
    """Open a GGUF file as llama_cpp.Llama, the class of llama-cpp-python, with all that it can do.

    n_ctx       tokens of context
    threads     None = llama-cpp-python's default, half the cores
    rpc         "host:port" of rpc-servers that hold and compute layers, shared out by their memory
    rpc_layers  how many layers, the last ones, they get; the output counts as one; -1 = all
    lora        LoRA adapters, as GGUF files, and how strongly each counts; 1.0 = as it was trained

    Threads may load at the same time: of the process nothing is changed but, as by llama-cpp-python itself, how much
    later models of other origin log. Its chat template is read when it is used.
    With rpc, the servers stay in use by this process until it ends; where one of them dies, llama.cpp ends this process
    (one line on standard error, exit code 1).
    Raises RuntimeMissing without the patched runtime, InputError if it cannot load the file or an adapter, ServerError
    where an rpc-server cannot be used.
    """
    _llama()
    from .opened import Opened

    if rpc:
        use_servers(rpc)
    more = {"n_gpu_layers": rpc_layers} if rpc else {}
    hush: contextlib.AbstractContextManager[list[str]] = contextlib.nullcontext([]) if verbose else _hushed()
    with hush as complaints:
        try:
            return Opened(
                str(path),
                n_ctx=n_ctx,
                n_threads=threads,
                n_threads_batch=threads,
                verbose=verbose,
                adapters=[(str(file), scale) for file, scale in lora],
                **more,
            )
        except (ValueError, RuntimeError) as e:
            why = reason(complaints) if complaints else why_not_loadable(path) or e
            raise InputError(f"{path}: the runtime cannot load this file: {why}") from None


def use_servers(texts: Sequence[str]) -> None:
    """Compute on rpc-servers ("host:port") from now on, as on GPUs. Raises ServerError, RuntimeMissing."""
    _llama()
    with _hushed() as complaints:
        rpc.attach(ggml_library(), _library("ggml"), _library("ggml-rpc"), rpc.endpoints(texts), complaints)


def generate(
    model: Any,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    stop: list[str] | None = None,
    grammar: str | None = None,
) -> Iterator[str]:
    """Continue the prompt; yields pieces of text as they come. temperature 0 = greedy; grammar: what may come, as GBNF.

    Raises InputError if the prompt does not fit into the model's context, or the runtime refuses the grammar or fails.
    """
    how: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "stop": stop}
    for text, _ in pieces(model, prompt, grammar=grammar, **how):
        yield text


def pieces(
    model: Any,
    prompt: str | list[int],
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    stop: list[str] | None = None,
    grammar: str | None = None,
) -> Iterator[tuple[str, str | None]]:
    """Continue a prompt, text or tokens; yields text as it comes and, with the last of it, "stop" or "length".

    What the prompt has in common with the one before is not computed again. Raises InputError as `generate` does.
    """
    stream = model.create_completion(
        prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        stop=stop or [],
        stream=True,
        grammar=None if grammar is None else bound(grammar, model),
    )
    try:
        for piece in stream:
            yield piece["choices"][0]["text"], piece["choices"][0]["finish_reason"]
    except (ValueError, RuntimeError) as e:
        raise InputError(f"the runtime cannot continue this prompt: {e}") from None


# ---- tokens in, logits out: llama.cpp's C interface ----

UNKNOWN = 1  # LLAMA_TOKEN_ATTR_UNKNOWN
FIRST = 1024  # tokens among which that for the unknown is looked for
MAX_PIECE = 1024  # bytes of a token


@functools.cache
def _llama() -> Any:
    """The module llama_cpp, its backend started. Raises RuntimeMissing, InputError."""
    version()
    try:
        llama_cpp = bindings.load()
        from . import log
    except (OSError, RuntimeError, ImportError) as e:
        raise RuntimeMissing(f"the runtime cannot be loaded: {e}; {HOW_TO_BUILD}") from None
    ggml_library()  # what ends in one line, ends so here too
    with log.hushed():  # of a wheel for all CPUs, which libraries it has chosen
        llama_cpp.llama_backend_init()
    return llama_cpp


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _hushed() -> Iterator[list[str]]:
    """llama.cpp prints nothing for this thread meanwhile; its errors are collected."""
    _llama()
    from . import log

    with log.hushed() as complaints:
        yield complaints


class Model:
    """A GGUF file opened by the runtime, its weights mapped. Use as a context manager.

    n_vocab    tokens of its vocabulary
    bos        the token that begins a text, or None where the tokenizer adds none
    trained    tokens of the context that it was trained on
    Raises InputError where the runtime cannot load it, RuntimeMissing.
    """

    def __init__(self, path: Path, *, vocabulary_only: bool = False) -> None:
        self.path = path
        lib = _llama()
        params = lib.llama_model_default_params()
        params.vocab_only = vocabulary_only
        with _hushed() as complaints:
            self._model = lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise InputError(f"{path}: the runtime cannot load this file: {reason(complaints)}")
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.n_vocab: int = lib.llama_vocab_n_tokens(self._vocab)
        self.bos: int | None = lib.llama_vocab_bos(self._vocab) if lib.llama_vocab_get_add_bos(self._vocab) else None
        self.trained: int = lib.llama_model_n_ctx_train(self._model)

    @property
    def unknown(self) -> int | None:
        """The token for what the vocabulary does not know, or None."""
        attr = _llama().llama_vocab_get_attr
        return next((i for i in range(min(self.n_vocab, FIRST)) if attr(self._vocab, i) & UNKNOWN), None)

    @property
    def bos_text(self) -> str:
        """The token that begins a text as a chat template names it; "" where there is none."""
        return self._name(_llama().llama_vocab_bos(self._vocab))

    @property
    def eos_text(self) -> str:
        """The token that ends a text, likewise."""
        return self._name(_llama().llama_vocab_eos(self._vocab))

    def _name(self, token: int) -> str:
        return "" if token < 0 else self.piece(token, special=True).decode(errors="replace")

    def piece(self, token: int, special: bool = False) -> bytes:
        """What a token stands for. special: the name of a special one, else nothing."""
        buffer = (ctypes.c_char * MAX_PIECE)()
        n = _llama().llama_token_to_piece(self._vocab, token, buffer, MAX_PIECE, 0, special)
        return buffer.raw[: max(0, n)]

    def tokens(self, text: str, *, special: bool = True, parse: bool = False) -> I32:
        """The text's tokens, int32 (N,). special: with those that the tokenizer puts around a text (BOS). parse: names
        of special tokens in the text mean these."""
        raw = text.encode()
        room = len(raw) + 16
        for _ in range(2):
            out = (ctypes.c_int32 * room)()
            n = _llama().llama_tokenize(self._vocab, raw, len(raw), out, room, special, parse)
            if n >= 0:
                return np.array(out[:n], np.int32)
            room = -n
        raise InputError(f"{self.path}: its tokenizer fails on a text of {len(raw)} bytes; give another text")

    def context(self, length: int, *, batch: int = 0, sequences: int = 1, threads: int = 0) -> Context:
        """Room for `length` tokens, in at most so many sequences together.

        batch    tokens a call, at most; 0 = length
        threads  0 = all cores
        """
        return Context(self, length, min(batch or length, length), sequences, threads)

    def close(self) -> None:
        """Let go of the weights; twice does no harm."""
        if self._model:
            _llama().llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> Model:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def forget(context: Any) -> None:
    """Empty the memory of a llama_context."""
    lib = _llama()
    lib.llama_memory_clear(lib.llama_get_memory(context), True)


def decode(
    context: Any,
    batch: Any,
    tokens: I32,
    positions: I32,
    wanted: NDArray[np.bool_] | int,
    sequence: I32 | int,
    path: Path,
) -> None:
    """Run tokens through a llama_context, by a llama_batch with room for them; see Context.feed. Raises InputError."""
    n, lib = len(tokens), _llama()
    batch.n_tokens = n
    for field, values in ((batch.token, tokens), (batch.pos, positions), (batch.n_seq_id, 1), (batch.logits, wanted)):
        np.ctypeslib.as_array(field, (n,))[:] = values
    for i, s in enumerate(np.broadcast_to(sequence, (n,)).tolist()):
        batch.seq_id[i][0] = s
    with _hushed() as complaints:
        failed = lib.llama_decode(context, batch)
    if failed:
        why = complaints[0] if complaints else f"code {failed}"
        raise InputError(f"{path}: the runtime cannot run {n} tokens: {why}")
    lib.llama_synchronize(context)


class Context:
    """A model's memory of what it was fed. Use as a context manager. Raises InputError where there is no room."""

    def __init__(self, model: Model, length: int, batch: int, sequences: int, threads: int) -> None:
        lib = _llama()
        self.model, self.length, self.batch = model, length, batch
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch = length, batch
        params.n_ubatch = min(batch, params.n_ubatch)
        params.n_seq_max, params.kv_unified = sequences, False  # each sequence its own cells: computed as if alone
        params.n_threads = params.n_threads_batch = threads or cores()
        with _hushed() as complaints:
            self._context = lib.llama_init_from_model(model._model, params)
        if not self._context:
            why = complaints[0] if complaints else "no memory?"
            raise InputError(f"{model.path}: the runtime makes no context of {length} tokens: {why}; give fewer")
        self._batch = lib.llama_batch_init(batch, 0, 1)

    def feed(self, tokens: I32, positions: I32, wanted: NDArray[np.bool_], sequence: I32 | int = 0) -> F32:
        """Logits behind each wanted token: float32 (wanted, n_vocab), a view that lasts until the next call.

        tokens     int32 (N,), N at most `batch`
        positions  int32 (N,), each token's place in its sequence
        sequence   one number for all, or int32 (N,)
        Raises InputError where the runtime fails.
        """
        assert len(tokens) <= self.batch
        decode(self._context, self._batch, tokens, positions, wanted, sequence, self.model.path)
        rows = int(np.count_nonzero(wanted))
        if not rows:
            return np.empty((0, self.model.n_vocab), np.float32)
        return np.ctypeslib.as_array(_llama().llama_get_logits(self._context), (rows, self.model.n_vocab))

    def forget(self) -> None:
        """Empty the memory: the next token begins a sequence."""
        forget(self._context)

    def close(self) -> None:
        """Free the memory; twice does no harm."""
        if self._context:
            _llama().llama_batch_free(self._batch)
            with _hushed():
                _llama().llama_free(self._context)
            self._context = None

    def __enter__(self) -> Context:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
