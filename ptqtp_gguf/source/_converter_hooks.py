"""Runs in the converter's own process: what is done around llama.cpp's converter, and what it tells of itself.

    python -I -u _converter_hooks.py CONVERT_HF_TO_GGUF.PY JOB [the converter's own arguments]

writes a file; _converter_child.py does the same for a stream. JOB is JSON: "trust" (run Python code that the checkpoint
brings), "pre" (name of the pre-tokenizer, "" = by the converter's own list), "mark" (begins each line that is meant for
the parent). The converter's files are not touched; methods of its classes are wrapped:

    load_hparams        entries of config.json that transformers has moved or leaves out stand where they are looked for
    prepare_metadata    metadata that the runtime reads and the converter does not write
    get_vocab_base_pre  a pre-tokenizer that its list of hashes does not know

Imports nothing of ours: the converter's own modules must come first.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import linecache
import math
import runpy
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

TRUST = "--trust-remote-code"
UNTRUSTED = f"the checkpoint brings Python code of its own, which is not run; if you trust it, give {TRUST}"
MOST_VALUES = 512  # of a list of config.json that is told

# What transformers 5 leaves out when it saves a configuration, because its class computes it so and in no other way.
# model_type -> entry -> value
FIXED: dict[str, dict[str, object]] = {
    "deepseek_v3": {"scoring_func": "sigmoid"},
    "dots1": {"scoring_func": "sigmoid"},
    "exaone_moe": {"scoring_func": "sigmoid"},
    "minimax_m2": {"scoring_func": "sigmoid"},
    "cohere2": {"rotary_pct": 1.0},
    "afmoe": {"route_norm": True},
}
# The same, where another entry has the value. model_type -> entry -> the other
SAME: dict[str, dict[str, str]] = {
    "gpt2": {"n_ctx": "n_positions"},
    "hunyuan_v1_moe": {"moe_intermediate_size": "intermediate_size"},
}
# The same, of rope_parameters.
FIXED_ROPE: dict[str, dict[str, object]] = {"solar_open": {"partial_rotary_factor": 1.0}}
# Names before transformers 5 of what stands in rope_parameters. model_type -> entry -> name there
MOVED: dict[str, dict[str, str]] = {
    "gpt_neox": {"rotary_pct": "partial_rotary_factor"},
}
# Kinds of layers of Granite hybrids as transformers 5 writes them -> before
LAYERS = {"full_attention": "attention", "linear_attention": "mamba"}
# Architectures of GGUF whose runtime has every so-manieth layer see all, where the metadata has no list of layers.
PERIODS = {"gemma2": 2, "gemma3": 6, "cohere2": 4, "gpt-oss": 2, "olmo2": 4, "afmoe": 4, "exaone-moe": 4}
# Prose, code, numbers, other scripts: what a pre-tokenizer cuts in its own way. No emoji, which upstream's tests leave
# out for some models.
SAMPLE = """The river ran past the old mill and into the town. Nobody WOULD count the boats, nobody'd seen 42 of them.
It's theirs; we'll see, I'm sure they've been told he'd go, isn't it? WE'LL SEE...
"Later!" she said (in 1999, or 12345678 years ago).

def f(x, y_2=3.14):   # CamelCase42
\tif x != y_2 and x >= 0x7F:
        return {"a": [x + 1, -1], 'b': x//2}


Über die Brücke, façade, naïve
Привет, мир! мир 42
你好世界 お元気ですか
100% $5.00 a@b.org https://x.y/z?q=1#e
"""


def install(job: dict[str, Any]) -> None:
    """Wrap what is listed above. What another version of the converter does not have is left out."""
    if not job["trust"]:
        distrust()
    base = importlib.import_module("conversion.base")
    model, text = base.ModelBase, base.TextModel
    if load := getattr(model, "load_hparams", None):
        model.load_hparams = staticmethod(_adapted(load))
        model.__init__ = _given(model.__init__)
    if prepare := getattr(model, "prepare_metadata", None):
        model.prepare_metadata = _supplied(prepare, job)
    if known := getattr(text, "get_vocab_base_pre", None):
        text.get_vocab_base_pre = _recognised(known, job)


def say(job: dict[str, Any], **what: object) -> None:
    """A line for the parent."""
    print(job["mark"] + json.dumps(what, default=str), file=sys.stderr, flush=True)


def run(script: str, arguments: list[str], job: dict[str, Any]) -> None:
    """Run the converter; if it fails, tell where it was, behind its own traceback."""
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except Exception as e:
        traceback.print_exc()
        say(job, failed=failure(e))
        sys.exit(1)


# ---- code of the checkpoint's own ----


def distrust() -> None:
    """Keep Python code that lies in the checkpoint's folder from being run, though the converter asks for it.

    What transformers knows by itself is used instead; else the converter ends with UNTRUSTED.
    """
    import transformers
    from transformers import dynamic_module_utils

    def refuse(*_: Any, **__: Any) -> Any:
        raise ValueError(UNTRUSTED)

    dynamic_module_utils.get_class_in_module = refuse  # the one place where such code is loaded
    for name in ("AutoConfig", "AutoTokenizer", "AutoProcessor"):
        _without_trust(getattr(transformers, name))


def _without_trust(auto: Any) -> None:
    plain = auto.from_pretrained

    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **{**kwargs, "trust_remote_code": False})

    auto.from_pretrained = from_pretrained


# ---- config.json ----


def _adapted(load: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    @functools.wraps(load)
    def load_hparams(*args: Any, **kwargs: Any) -> dict[str, Any]:
        config = load(*args, **kwargs)
        for section in (config, config.get("text_config")):
            if isinstance(section, dict):
                adapt(section)
        return config

    return load_hparams


def _given(init: Callable[..., None]) -> Callable[..., None]:
    """Some classes read config.json by themselves and hand it on."""

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(kwargs.get("hparams"), dict):
            adapt(kwargs["hparams"])
        init(self, *args, **kwargs)
        if getattr(self, "opt_num_mtp_layers", None) == 0:  # Qwen3-Next and later, saved without their draft layers
            self.no_mtp = True

    return __init__


def adapt(config: dict[str, Any]) -> None:
    """Put entries where the converter looks for them; one that is there stays as it is."""
    kind = str(config.get("model_type"))
    rope = flat_rope(config)
    found = dict(FIXED.get(kind, {}))
    found |= {name: config[other] for name, other in SAME.get(kind, {}).items() if other in config}
    found |= {name: rope[other] for name, other in MOVED.get(kind, {}).items() if other in rope}
    if kind == "falcon_h1" and not config.get("head_dim"):
        found["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    if kind == "bamba" and "partial_rotary_factor" in rope:
        width = config["hidden_size"] // config["num_attention_heads"]
        found["attn_rotary_emb"] = int(width * rope["partial_rotary_factor"])
    if kind == "minimax_m2":  # its attention turns so much of each head
        found["rotary_dim"] = int(config.get("head_dim", 128) * rope.get("partial_rotary_factor", 1.0))
    if kind == "granitemoehybrid" and isinstance(kinds := config.get("layer_types"), list):
        config["layer_types"] = [LAYERS.get(str(k), k) for k in kinds]
    if kind == "hunyuan_v1_moe":
        layers = config.get("num_hidden_layers", 0)
        for name in ("moe_intermediate_size", "moe_topk", "num_shared_expert"):
            value = config.get(name, found.get(name, 1))
            if isinstance(value, int):
                found[name] = config[name] = [value] * layers
    for into, values in ((config, found), (rope, FIXED_ROPE.get(kind, {}))):
        for name, value in values.items():
            if into.get(name) is None:
                into[name] = value


def flat_rope(config: dict[str, Any]) -> dict[str, Any]:
    """rope_parameters, or {} where kinds of layers have their own."""
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    return rope if isinstance(rope, dict) and not any(isinstance(v, dict) for v in rope.values()) else {}


# ---- metadata ----


def _supplied(prepare: Callable[..., None], job: dict[str, Any]) -> Callable[..., None]:
    @functools.wraps(prepare)
    def prepare_metadata(self: Any, *args: Any, **kwargs: Any) -> None:
        prepare(self, *args, **kwargs)
        supply(self)
        say(job, config=_short(self.hparams))

    return prepare_metadata


def supply(model: Any) -> None:
    """Metadata that llama.cpp reads for every architecture, where the converter's class for this one left it out."""
    import gguf

    writer = model.gguf_writer
    written = {key.partition(".")[2] for part in writer.kv_data for key in part}
    rope = flat_rope({"rope_parameters": getattr(model, "rope_parameters", None)})
    theta, kind, factor = rope.get("rope_theta"), rope.get("rope_type"), rope.get("factor")
    if isinstance(theta, (int, float)) and kind in (None, "default", "linear", "yarn", "llama3"):
        _set(writer, "rope.freq_base", theta, writer.add_rope_freq_base)
    if isinstance(eps := model.hparams.get("rms_norm_eps"), float) and "attention.layer_norm_rms_epsilon" in written:
        _set(writer, "attention.layer_norm_rms_epsilon", eps, writer.add_layer_norm_rms_eps)
    if kind in ("linear", "yarn") and isinstance(factor, (int, float)) and "rope.scaling.type" not in written:
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(factor)
        if kind == "yarn" and isinstance(trained := rope.get("original_max_position_embeddings"), int):
            writer.add_rope_scaling_orig_ctx_len(trained)
    if not written & {"rope.scaling.attn_factor", "rope.scaling.yarn_log_multiplier"} and kind == "yarn":
        if (attention := yarn_attention(rope)) != 1:
            writer.add_rope_scaling_attn_factors(attention)
    window, arch = model.hparams.get("sliding_window"), gguf.MODEL_ARCH_NAMES[model.model_arch]
    if (period := PERIODS.get(arch)) and "attention.sliding_window_pattern" not in written and window:
        layers = windowed(model.hparams)
        if layers and layers != [i % period < period - 1 for i in range(len(layers))]:
            writer.add_sliding_window_pattern(layers)


def _set(writer: Any, key: str, value: float, add: Callable[[float], None]) -> None:
    """Write a number, or put it in the place of one that a class of the converter took for granted."""
    for part in writer.kv_data:
        for name, written in part.items():
            if name.partition(".")[2] == key:
                written.value = value
                return
    add(value)


def windowed(config: dict[str, Any]) -> list[bool]:
    """Which layers see only a window, by layer_types; [] where it does not tell."""
    kinds = config.get("layer_types")
    if not isinstance(kinds, list) or not set(kinds) <= {"full_attention", "sliding_attention"}:
        return []
    return [kind == "sliding_attention" for kind in kinds]


def yarn_attention(rope: dict[str, Any]) -> float:
    """By how much YaRN's factor of attention differs from the usual one, 1 + ln(factor) / 10, that the runtime takes.

    As _compute_yarn_parameters of transformers' modeling_rope_utils.py has it.
    """
    factor = rope.get("factor")
    if rope.get("rope_type") != "yarn" or not isinstance(factor, (int, float)) or factor <= 1:
        return 1.0

    def scale(m: float = 1.0) -> float:
        return 0.1 * m * math.log(factor) + 1

    wanted = rope.get("attention_factor")
    if wanted is None:
        m, all_dims = rope.get("mscale"), rope.get("mscale_all_dim")
        wanted = scale(m) / scale(all_dims) if m and all_dims else scale()
    ratio = float(wanted / scale())
    return 1.0 if math.isclose(ratio, 1, rel_tol=1e-6) else ratio


def _short(value: Any) -> Any:
    """JSON of a configuration; long lists, which are tokens or labels, left out."""
    if isinstance(value, dict):
        return {str(k): _short(v) for k, v in value.items() if k not in ("id2label", "label2id")}
    if isinstance(value, (list, tuple)):
        return [_short(v) for v in value] if len(value) <= MOST_VALUES else None
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)


# ---- tokenizer ----


def _recognised(known: Callable[..., str], job: dict[str, Any]) -> Callable[..., str]:
    @functools.wraps(known)
    def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
        name = job["pre"]
        if not name:
            try:
                name = known(self, tokenizer)
            except NotImplementedError:
                say(job, unknown_pre=True)
                name = "default"
        text = spelt(tokenizer)
        say(job, sample=[text, list(tokenizer.encode(text, add_special_tokens=False))])
        return str(name)

    return get_vocab_base_pre


def spelt(tokenizer: Any) -> str:
    """The lines of SAMPLE that the tokenizer has letters for: a small one may lack some, and then drops them."""

    def whole(line: str) -> bool:
        ids = tokenizer.encode(line, add_special_tokens=False)
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)).strip() == line.strip()

    return "".join(line for line in SAMPLE.splitlines(keepends=True) if whole(line))


# ---- failures ----


def failure(e: BaseException) -> dict[str, object]:
    """What the parent needs for a sentence about an exception: what it says, where it was raised, what was being done.

    type, text       of the exception
    file, line       in the converter, the innermost of its frames; code: that line
    steps            names of its functions, outermost first
    tensor           that was being made, or None
    tokens           (number of the last token, rows of the vocabulary) where these do not go together, or None
    """
    frames = list(_walk(e.__traceback__))
    inner = [(f, n) for f, n in frames if _of_converter(f)] or frames
    frame, number = inner[-1]
    path = frame.f_code.co_filename
    return {
        "type": type(e).__name__,
        "text": " ".join(str(e).split())[:1000],
        "file": Path(path).name,
        "line": number,
        "code": linecache.getline(path, number).strip(),
        "steps": [f.f_code.co_name for f, _ in frames],
        "tensor": _tensor(frames),
        "tokens": _tokens(e, frame),
    }


def _walk(tb: TracebackType | None) -> list[tuple[FrameType, int]]:
    out = []
    while tb:
        out.append((tb.tb_frame, tb.tb_lineno))
        tb = tb.tb_next
    return out


def _of_converter(frame: FrameType) -> bool:
    path = Path(frame.f_code.co_filename)
    return path.parent.name == "conversion" or path.name == "convert_hf_to_gguf.py"


def _tensor(frames: list[tuple[FrameType, int]]) -> str | None:
    for frame, _ in reversed(frames):
        name, seen = frame.f_code.co_name, frame.f_locals
        if name == "prepare_tensors" and isinstance(seen.get("name"), str):
            return str(seen["name"])
        if name == "serve" and "info" in seen:  # of _converter_child.py
            return str(getattr(seen["info"], "name", "")) or None
    return None


def _tokens(e: BaseException, frame: FrameType) -> tuple[int, int] | None:
    seen = frame.f_locals
    size, tokenizer = seen.get("vocab_size"), seen.get("tokenizer")
    if not isinstance(e, AssertionError) or not isinstance(size, int) or tokenizer is None:
        return None
    try:
        last = max(tokenizer.get_vocab().values())
    except Exception:
        return None
    return (last, size) if last >= size else None


def main() -> None:
    """Write a file. Linux ends this with its parent, so that nobody goes on writing the file when a killed conversion
    is begun again. -I keeps the current folder and PYTHONPATH out."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
    script, job = sys.argv[1], json.loads(sys.argv[2])
    converter_first(script)
    install(job)
    run(script, sys.argv[3:], job)


def converter_first(script: str) -> None:
    """The converter's own gguf-py must come before PyPI's, which claims the same version."""
    folder = Path(script).parent
    sys.path[:0] = [str(folder / "gguf-py"), str(folder)]


if __name__ == "__main__":
    main()
