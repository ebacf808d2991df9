"""The inputs of a model's matrix products, seen while the runtime computes them; what llama-imatrix does, in Python.

ggml's scheduler asks a callback about each node of a graph, and hands it those that it wants when they are computed
(ggml-backend.h, ggml_backend_sched_eval_callback). Everything is computed on the CPU.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..codec import F32, I32
from ..errors import InputError, RuntimeMissing
from .install import HOW_TO_BUILD, _library, ggml_library
from .model import Model, _hushed, _llama, cores, decode, forget

F32_TYPE = 0  # GGML_TYPE_F32
OUTPUT, EMBEDDING = "output.weight", "token_embd.weight"
BEFORE_OUTPUT = (b"result_norm", b"result_embd_pooled")  # llama.cpp's names of what the output matrix is given
SOME_OPS = 64  # fewer than ggml has; products are among the first
OBJECT_BYTES = 32  # struct ggml_object of ggml.c
POOLING_NONE = 0
NO_FLASH_ATTENTION = 0  # LLAMA_FLASH_ATTN_TYPE_DISABLED
CPU_DEVICE = 0  # GGML_BACKEND_DEVICE_TYPE_CPU


class Product(NamedTuple):
    """What one matrix, or several with the same input, was given. The arrays are views that last for the call.

    weight   name of the first of the matrices
    x        float32 (T, C); of experts (T, 1, C) where all that a token is sent to get the same, else (T, U, C); of a
             matrix for each head (T, H, C)
    experts  int32 (T, U): to which experts each token went; None = no experts
    """

    weight: str
    x: F32
    experts: I32 | None


class _Tensor(ctypes.Structure):
    """struct ggml_tensor of ggml.h."""


_Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]


class _PoolParams(ctypes.Structure):
    """struct ggml_threadpool_params of ggml.h."""

    _fields_ = (
        ("cpumask", ctypes.c_bool * 512),
        ("n_threads", ctypes.c_int),
        ("prio", ctypes.c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", ctypes.c_bool),
        ("paused", ctypes.c_bool),
    )


def _operations() -> tuple[int, int]:
    """ggml's numbers of MUL_MAT and MUL_MAT_ID. Raises RuntimeMissing where its tensors are laid out otherwise."""
    lib = ggml_library()
    lib.ggml_tensor_overhead.restype = ctypes.c_size_t
    if lib.ggml_tensor_overhead() != OBJECT_BYTES + ctypes.sizeof(_Tensor):
        raise RuntimeMissing(f"the runtime's tensors are not those that this program reads; {HOW_TO_BUILD}")
    return _operation("MUL_MAT"), _operation("MUL_MAT_ID")


def _operation(name: str) -> int:
    """ggml's number of an operation. Raises RuntimeMissing where there is none."""
    lib = ggml_library()
    lib.ggml_op_name.argtypes, lib.ggml_op_name.restype = [ctypes.c_int], ctypes.c_char_p
    for i in range(SOME_OPS):
        if lib.ggml_op_name(i) == name.encode():
            return i
    raise RuntimeMissing(f"the runtime has no operation {name}; {HOW_TO_BUILD}")


class _Watched(ABC):
    """A model's context whose graph is watched. Use as a context manager.

    whole: the computation goes on to the end, and gives logits
    """

    def __init__(self, model: Model, length: int, batch: int, threads: int, whole: bool) -> None:
        self.model, self.length = model, length
        self._batch_size = min(batch, length)
        self._failed: BaseException | None = None
        self._product, self._experts = _operations()
        lib = _llama()
        self._callback = lib.ggml_backend_sched_eval_callback(self._called)
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = length, self._batch_size, self._batch_size
        params.n_seq_max, params.n_threads, params.n_threads_batch = 1, threads or cores(), threads or cores()
        if not whole:
            params.embeddings, params.pooling_type = True, POOLING_NONE  # every token counts to the last layer
        # keys and values as they are: flash attention rounds them to fp16, which all that comes behind would feel
        params.type_k = params.type_v = F32_TYPE
        params.flash_attn_type = NO_FLASH_ATTENTION
        params.offload_kqv = params.op_offload = False
        params.cb_eval = self._callback
        with _hushed() as complaints:
            self._context = lib.llama_init_from_model(model._model, params)
        if not self._context:
            why = complaints[0] if complaints else "no memory?"
            raise InputError(f"{model.path}: the runtime makes no context of {length} tokens: {why}")
        self._batch = lib.llama_batch_init(self._batch_size, 0, 1)
        with _hushed():
            self._pool = _Pool(self._context, threads or cores())

    def _some(self, tokens: I32, first: int, wanted: int | NDArray[np.bool_] = 1) -> None:
        self._failed = None
        positions = np.arange(first, first + len(tokens), dtype=np.int32)
        try:
            decode(self._context, self._batch, tokens, positions, wanted, 0, self.model.path)
        finally:
            if self._failed:
                raise self._failed

    # ---- in the middle of a computation ----

    def _called(self, address: int, ask: bool, _: object) -> bool:
        """ask: is the node wanted? Else it is computed; False ends the computation."""
        try:
            t = _Tensor.from_address(address)
            return self._ask(t) if ask else self._take(t)
        except BaseException as e:  # may not pass through C; raised again when the runtime has returned
            self._failed = self._failed or e
            return ask

    @abstractmethod
    def _ask(self, t: _Tensor) -> bool:
        """Whether a node is wanted when it is computed."""

    @abstractmethod
    def _take(self, t: _Tensor) -> bool:
        """Look at a node that was computed; False ends the computation."""

    def close(self) -> None:
        """Free the memory; twice does no harm."""
        if self._context:
            _llama().llama_batch_free(self._batch)
            with _hushed():
                _llama().llama_free(self._context)
            self._context = None
            self._pool.close()

    def __enter__(self: W) -> W:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


W = TypeVar("W", bound=_Watched)


class Tap(_Watched):
    """A model's context that shows the inputs of its matrices.

    wanted  names of weight tensors; output.weight is the output matrix, tied or not
    seen    called for each distinct input of each batch, in the order of computation
    length  tokens of a sequence; batch: tokens that are computed together, at most
    same    after a batch: name -> name of the matrix under which its input was shown
    Raises InputError where there is no room.
    """

    def __init__(
        self,
        model: Model,
        wanted: Collection[str],
        seen: Callable[[Product], None],
        length: int,
        batch: int,
        threads: int = 0,
    ) -> None:
        self.same = dict[str, str]()
        self._wanted, self._seen = wanted, seen
        self._output = next((name for name in (OUTPUT, EMBEDDING) if name in wanted), "")
        self._inputs: dict[tuple[int, int], str] = {}
        super().__init__(model, length, batch, threads, whole=False)

    def run(self, tokens: I32) -> None:
        """One sequence, int32 (N,), N at most `length`. Raises InputError where the runtime fails, and what `seen`
        raises."""
        forget(self._context)
        for first in range(0, len(tokens), self._batch_size):
            self._inputs.clear()
            self._some(tokens[first : first + self._batch_size], first)

    def _ask(self, t: _Tensor) -> bool:
        if t.op not in (self._product, self._experts):
            return t.name in BEFORE_OUTPUT
        weight, x = t.src[0].contents, t.src[1].contents
        name = weight.name.decode(errors="replace")
        if name not in self._wanted or x.type != F32_TYPE:
            return False
        key = ctypes.addressof(x), ctypes.addressof(t.src[2].contents) if t.op == self._experts else 0
        self.same[name] = self._inputs.setdefault(key, name)
        return bool(self.same[name] == name)

    def _take(self, t: _Tensor) -> bool:
        if t.name in BEFORE_OUTPUT:
            if self._output:
                self.same[self._output] = self._output
                self._seen(Product(self._output, _values(t, np.float32).reshape(-1, t.ne[0]), None))
            return False
        weight, x = t.src[0].contents, t.src[1].contents
        name = weight.name.decode()
        values = _values(x, np.float32)  # (ne3, ne2, ne1, ne0)
        if t.op == self._experts:
            self._seen(Product(name, values[0], _values(t.src[2].contents, np.int32)[0, 0]))
        elif weight.ne[2] > 1:
            self._seen(Product(name, values[0].swapaxes(0, 1), None))
        else:
            self._seen(Product(name, values.reshape(-1, x.ne[0]), None))
        return True


class Probe(_Watched):
    """A model's context in which outputs of matrices are changed while it computes.

    length: tokens of a sequence, which is computed at once
    """

    def __init__(self, model: Model, length: int, threads: int = 0) -> None:
        self._changed: Collection[str] = ()
        self._change: Callable[[str, F32], None] = lambda name, y: None
        self._look_up = _operation("GET_ROWS")
        super().__init__(model, length, length, threads, whole=True)

    def run(
        self, tokens: I32, wanted: NDArray[np.bool_], changed: Collection[str], change: Callable[[str, F32], None]
    ) -> F32:
        """Logits behind the wanted tokens, float32 (wanted, n_vocab), a view that lasts until the next call.

        tokens   int32 (N,), N at most `length`; wanted bool (N,)
        changed  names of weight tensors, token_embd.weight as the one that is looked up in too
        change   called with such a name and outputs of it, float32 (..., R), which it changes in place
        Raises InputError where the runtime fails, and what `change` raises.
        """
        forget(self._context)
        self._changed, self._change = changed, change
        self._some(tokens, 0, wanted)
        rows = int(np.count_nonzero(wanted))
        logits = _llama().llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (rows, self.model.n_vocab))

    def _ask(self, t: _Tensor) -> bool:
        if t.op not in (self._product, self._experts, self._look_up) or t.type != F32_TYPE:
            return False
        return t.src[0].contents.name.decode(errors="replace") in self._changed

    def _take(self, t: _Tensor) -> bool:
        self._change(t.src[0].contents.name.decode(), _values(t, np.float32))
        return True


def _values(t: _Tensor, dtype: type) -> Any:
    """A tensor's values where they lie, (ne3, ne2, ne1, ne0)."""
    shape, strides = tuple(reversed(t.ne)), tuple(reversed(t.nb))
    nbytes = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + np.dtype(dtype).itemsize
    memory = (ctypes.c_char * nbytes).from_address(t.data)
    return np.ndarray(shape, dtype, memory, 0, strides)


class _Pool:
    """Threads for a context that sleep between computations instead of spinning: others compute meanwhile."""

    def __init__(self, context: Any, threads: int) -> None:
        base, front, p = ggml_library(), _library("ggml"), ctypes.c_void_p
        self._pool = None
        functions: tuple[tuple[Any, list[Any], Any], ...] = (
            (front.ggml_backend_dev_by_type, [ctypes.c_int], p),
            (base.ggml_backend_dev_backend_reg, [p], p),
            (base.ggml_backend_reg_get_proc_address, [p, ctypes.c_char_p], p),
            (base.ggml_threadpool_params_default, [ctypes.c_int], _PoolParams),
        )
        for function, arguments, result in functions:
            function.argtypes, function.restype = arguments, result
        reg = base.ggml_backend_dev_backend_reg(front.ggml_backend_dev_by_type(CPU_DEVICE))
        make = base.ggml_backend_reg_get_proc_address(reg, b"ggml_threadpool_new")
        self._free = base.ggml_backend_reg_get_proc_address(reg, b"ggml_threadpool_free")
        if not (make and self._free):
            return
        params = base.ggml_threadpool_params_default(threads)
        params.poll = 0
        self._pool = ctypes.CFUNCTYPE(p, ctypes.POINTER(_PoolParams))(make)(ctypes.byref(params))
        if self._pool:
            attach = _library("llama").llama_attach_threadpool  # llama-cpp-python does not declare it
            attach.argtypes, attach.restype = [p, p, p], None
            attach(context, self._pool, self._pool)

    def close(self) -> None:
        """Free the threads, after the context."""
        if self._pool:
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._free)(self._pool)
            self._pool = None
