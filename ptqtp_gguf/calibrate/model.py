"""A Hugging Face model of which only one block is in memory at a time, run by transformers' own code.

The model is built without weights. To run block i the decoder's own forward is called, so masks, rotary embeddings and
whatever else a block is given come from the model itself; the blocks before it are stood in for by what they returned
before, and the run is stopped behind it. torch and transformers are imported when they are needed.
"""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CalibrationError, PtqtpError
from ..source import Checkpoint, transformers_reason

if TYPE_CHECKING:
    import torch

# is told of a product: the input (..., C), the name of the weight in its block, and if that holds E experts, the number
# of the one that is used and E; -1 and E: all at once, the input is (E, T, C)
Tap = Callable[["torch.Tensor", str, int, int], None]

WAY_OUT = "give an importance matrix of llama-imatrix instead (--imatrix)"


def require_transformers() -> None:
    """Raises CalibrationError where torch or transformers is not installed."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as e:
        raise CalibrationError(
            f"calibration needs torch and transformers ({e}); pip install 'ptqtp-gguf[hf]'"
        ) from None


class Stop(Exception):
    """Ends a forward pass behind the block that was wanted; a tap may raise it too."""


@contextlib.contextmanager
def explained(folder: Path, what: str) -> Iterator[None]:
    """Errors of torch and transformers about a model that is not as they expect, as CalibrationError in one line.

    What is ours is let through; so is memory that is not enough, as MemoryError or torch.OutOfMemoryError.
    """
    import torch

    try:
        yield
    except (PtqtpError, Stop, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as e:
        if isinstance(e, RuntimeError) and "can't allocate memory" in str(e):  # torch's, on the CPU
            raise MemoryError(str(e)) from None
        text = transformers_reason(e) or "no reason given"
        raise CalibrationError(f"{folder}: {what}: {type(e).__name__}: {text}; {WAY_OUT}") from e


def whole_model(folder: Path, trust_code: bool = False) -> Any:
    """The model of a checkpoint in the type that it is stored in; of float16 in float32, since the states of some
    models pass 65504, the largest number of float16. Raises what transformers raises."""
    import torch
    import transformers

    version = tuple(int(n) for n in transformers.__version__.split(".")[:2])
    option = "dtype" if version >= (4, 56) else "torch_dtype"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, trust_remote_code=trust_code, **{option: "auto"}
    )
    return model.float() if model.dtype == torch.float16 else model


class Blocks:
    """The blocks of a model. Raises CalibrationError where transformers cannot build it, or it has no plain blocks.

    Weights are float32 on the CPU, of `dtype` on a GPU.

    n       number of blocks
    prefix  full name of their list
    dtype   the checkpoint's, and that of what is kept between blocks; float32 for one of float16, whose largest number,
            65504, the states of some models pass
    """

    def __init__(self, found: Checkpoint, device: str = "cpu") -> None:
        import torch

        self.folder, self.device = found.folder, torch.device(device)
        self._shards = found.shards
        with quiet(), explained(self.folder, "transformers cannot build it"):
            self._build(found)
            self.decoder, self.prefix = self._find()
            self.blocks: Any = self.decoder.get_submodule(self._list)
            self._keys = self._assign_keys()
        self.n = len(self.blocks)
        self._through: torch.Tensor | None = None
        self.returns = 0  # length of the tuple that a block returns, 0 = no tuple; known once one has run

    def _build(self, found: Checkpoint) -> None:
        """The model without weights."""
        import torch
        import transformers

        self.config = transformers.AutoConfig.from_pretrained(
            found.folder, local_files_only=True, trust_remote_code=found.trust_code
        )
        if getattr(self.config, "quantization_config", None):
            raise CalibrationError(f"{found.folder}: its weights are quantized already; calibrate from the original")
        stored: torch.dtype = getattr(self.config.get_text_config(), "dtype", None) or torch.float32
        self.dtype = torch.float32 if stored == torch.float16 else stored
        compute = torch.float32 if self.device.type == "cpu" else self.dtype
        if hasattr(self.config, "_experts_implementation"):
            self.config._experts_implementation = "eager"  # an expert at a time, so that one can see its input
        with _parameters_on_meta():
            self.model = transformers.AutoModelForCausalLM.from_config(self.config, dtype=compute).eval()
        for module in self.model.modules():  # tables of rotary embeddings and the like; they were computed, not loaded
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(self.device)

    def _find(self) -> tuple[Any, str]:
        """The decoder, and the full name of its list of blocks."""
        import torch

        layers = getattr(self.config.get_text_config(), "num_hidden_layers", None)
        decoder = self.model.get_decoder() if hasattr(self.model, "get_decoder") else self.model.base_model
        where = {id(m): name for name, m in self.model.named_modules()}.get(id(decoder), "")
        for name, module in decoder.named_children():
            if isinstance(module, torch.nn.ModuleList) and len(module) == layers:
                self._list = name
                return decoder, f"{where}.{name}".lstrip(".")
        raise self.cannot("its decoder holds no list of blocks")

    def cannot(self, why: str) -> CalibrationError:
        """The error for a model that is not as this needs it."""
        name = (getattr(self.config, "architectures", None) or [self.config.model_type])[0]
        return CalibrationError(f"{self.folder}: {name} cannot be calibrated block by block: {why}; {WAY_OUT}")

    # ---- weights ----

    def _assign_keys(self) -> dict[int, list[tuple[str, str, str]]]:
        """(key in the shards, shard, parameter) of each block; those of the rest of the decoder under -1."""
        out: dict[int, list[tuple[str, str, str]]] = {}
        block = re.compile(re.escape(self.prefix) + r"\.(\d+)\.")
        decoder = self.prefix.removesuffix(self._list)
        target = self._targets()
        for shard in self._shards:
            with self._open(shard) as (keys, _):
                for key in keys:
                    name = target(key)
                    match = block.match(name)
                    if match or name.startswith(decoder):
                        out.setdefault(int(match[1]) if match else -1, []).append((key, str(shard), name))
        return out

    def _targets(self) -> Callable[[str], str]:
        """From a key in the shards to the parameter that it is loaded into, or to the first of those."""
        try:
            from transformers import conversion_mapping, core_model_loading
        except ImportError:  # before transformers 5 names were the same
            self._mapping: Any = None
            base = f"{self.model.base_model_prefix}."
            known = set(self.model.state_dict())
            return lambda key: key if key in known or base + key not in known else base + key
        self._mapping = conversion_mapping.get_model_conversion_mapping(self.model)
        renamings = [m for m in self._mapping if isinstance(m, core_model_loading.WeightRenaming)]
        converters = [m for m in self._mapping if isinstance(m, core_model_loading.WeightConverter)]
        meta, base = self.model.state_dict(), self.model.base_model_prefix

        def target(key: str) -> str:
            name: str = core_model_loading.rename_source_key(key, renamings, converters, base, meta)[0]
            return name

        return target

    @contextlib.contextmanager
    def _open(self, shard: Any) -> Iterator[tuple[list[str], Callable[[str], Any]]]:
        """Names of a shard's tensors, and a function to a tensor that is read when it is indexed."""
        if str(shard).endswith(".safetensors"):
            import safetensors

            with safetensors.safe_open(str(shard), "pt") as f:
                yield list(f.keys()), f.get_slice
        else:
            import torch

            held = torch.load(shard, map_location="cpu", mmap=True, weights_only=True)
            yield list(held), held.__getitem__

    def load(self, index: int) -> None:
        """Bring the weights of a block into memory; -1: embedding, norm and what else the decoder holds."""
        with contextlib.ExitStack() as stack, quiet(), explained(self.folder, f"block {index} does not load"):
            readers: dict[str, Callable[[str], Any]] = {}
            state = {}
            for key, shard, _ in self._keys.get(index, []):
                if shard not in readers:
                    readers[shard] = stack.enter_context(self._open(shard))[1]
                state[key] = readers[shard](key)
            self._put(state, index)
        module = self.blocks[index] if index >= 0 else self.decoder
        for name, p in module.named_parameters():
            if p.is_meta and not (index < 0 and name.startswith(f"{self._list}.")):
                raise CalibrationError(
                    f"{self.folder}: no weights for {name} of block {index} in the shards; {WAY_OUT}"
                )

    def _put(self, state: dict[str, Any], index: int) -> None:
        if self._mapping is None:
            import torch

            for key, _, name in self._keys.get(index, []):
                owner, _, leaf = name.rpartition(".")
                module = self.model.get_submodule(owner)
                held = getattr(module, leaf)
                made = state[key][...].to(self.device, held.dtype)
                setattr(module, leaf, torch.nn.Parameter(made, False) if leaf in module._parameters else made)
            return
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        how = LoadStateDictConfig(device_map={"": self.device}, dtype=self.dtype, weight_mapping=self._mapping)
        convert_and_load_state_dict_in_model(self.model, state, how)

    def unload(self, index: int) -> None:
        """Forget a block's weights; -1: those of the embedding."""
        (self.blocks[index] if index >= 0 else self.model.get_input_embeddings()).to("meta")

    # ---- running ----

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 (B, T) -> the input of the first block (B, T, C)."""
        caught: list[Any] = []

        def stop(module: Any, args: Any, kwargs: Any) -> None:
            caught.append(args[0] if args else kwargs["hidden_states"])
            raise Stop

        self._skip(0)
        self._decode(self.blocks[0].register_forward_pre_hook(stop, with_kwargs=True), input_ids=ids.to(self.device))
        return caught[0]

    def run(self, index: int, x: torch.Tensor, tap: Tap | None = None) -> torch.Tensor | None:
        """The output (B, T, C) of a loaded block for its input x (B, T, C); `tap` sees the input of each product.

        None where the tap raised Stop.
        """
        self._skip(index)
        caught: list[Any] = []

        def enter(module: Any, args: Any, kwargs: Any) -> Any:
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

        def leave(module: Any, args: Any, out: Any) -> None:
            caught.append(out)
            raise Stop

        block = self.blocks[index]
        hooks = block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)
        self._through = x
        with _watch()(block, tap) if tap else contextlib.nullcontext():
            self._decode(*hooks, inputs_embeds=x)
        if not caught:
            return None
        out = caught[0]
        self.returns = len(out) if isinstance(out, tuple) else 0
        result: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return result

    @contextlib.contextmanager
    def fast_products(self) -> Iterator[None]:
        """Float32 products by TF32 on a GPU: exact for inputs that come from bf16, as activations there do."""
        import torch

        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    def finish(self, x: torch.Tensor) -> torch.Tensor:
        """From the last block's output to the input of the output matrix, behind the last norm: both (B, T, C)."""
        self._skip(self.n)
        self._through = x
        return self._decode(inputs_embeds=x)[0]

    def _decode(self, *hooks: Any, **inputs: Any) -> Any:
        """The decoder's forward up to where a hook stops it; the hooks are removed."""
        try:
            with quiet(), explained(self.folder, "its forward cannot be followed"):
                return self.decoder(**inputs, use_cache=False)
        except Stop:
            return None
        finally:
            self._through = None
            for hook in hooks:
                hook.remove()

    def _skip(self, n: int) -> None:
        """Let the first n blocks be passed by."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            return (self._through, *[None] * (self.returns - 1)) if self.returns else self._through

        for i, block in enumerate(self.blocks):
            if i < n:
                block.forward = forward
            else:
                block.__dict__.pop("forward", None)


@functools.cache
def _watch() -> Any:
    """The class of contexts in which `tap` is told of every product with a weight of a block.

    Made once: a class of its own for each run would keep what it was given until cycles are collected.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class Watch(TorchFunctionMode):  # type: ignore[misc]
        def __init__(self, block: torch.nn.Module, tap: Tap) -> None:
            super().__init__()
            weights = [(name, p) for name, p in block.named_parameters() if p.ndim > 1]
            self.spans = [(p.data_ptr(), p.data_ptr() + p.nbytes, name, p) for name, p in weights]
            self.tap = tap

        def seen(self, x: torch.Tensor, w: torch.Tensor) -> bool:
            """Tell of the product of inputs (..., C) with w, if that is a weight of the block."""
            at = w.data_ptr()
            for begin, end, name, p in self.spans:
                if begin <= at < end:
                    expert = (at - begin) // (p.stride(0) * p.element_size()) if p.ndim == 3 and w.ndim == 2 else -1
                    self.tap(x, name, expert, len(p) if p.ndim == 3 else 0)
                    return True
            return False

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kind = getattr(func, "__name__", "")
            place = {"linear": 0, "matmul": 0, "__matmul__": 0, "bmm": 0, "addmm": 1}.get(kind)
            if place is not None and len(args) > place + 1 and isinstance(args[place + 1], torch.Tensor):
                x, w = args[place : place + 2]
                if not self.seen(x, w) and "matmul" in kind and w.ndim > 1:  # some families have the weight on the left
                    self.seen(w.mT, x)
            return func(*args, **(kwargs or {}))

    return Watch


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built here have parameters without memory; buffers are real."""
    import torch

    plain = torch.nn.Module.register_parameter

    def register(self: Any, name: str, param: Any) -> None:
        plain(self, name, None if param is None else torch.nn.Parameter(param.to("meta"), requires_grad=False))

    torch.nn.Module.register_parameter = register
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = plain


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' warnings and progress bars."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
