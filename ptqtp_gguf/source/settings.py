"""Settings of config.json that neither the GGUF nor the runtime carries: the file computes another function, silently.

llama.cpp's converter writes what it knows of a configuration, and the graph of an architecture takes some of it for
granted. Each check below compares one entry with what stands in the metadata, or with what the graph does whatever the
metadata says. What the graphs do is read off src/models/ of the llama.cpp that patches/UPSTREAM names, and was tried
on tiny random models of each family, an entry changed at a time (tests/source/test_settings.py has some of them).

Where the value can be carried, the converter's process sees to it (_converter_hooks.py), and nothing is said here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from . import _converter_hooks as hooks
from .base import Source
from .kinds import load_json, show

Config = dict[str, Any]

# Class defaults that matter, for entries that config.json may leave out: model_type -> entry -> value.
DEFAULTS: dict[str, Config] = {
    "mistral": {"sliding_window": 4096},
    "qwen3_moe": {"norm_topk_prob": False},
    "qwen3_vl_moe_text": {"norm_topk_prob": True},
}
# What the graphs put between the matrices of the feed-forward part. GELU is one, exact or by tanh: 1e-3 apart.
ACTIVATIONS = {
    "silu": "afmoe arctic baichuan bailingmoe bailingmoe2 bailingmoe3 chatglm cohere2 cohere2moe command-r dbrx deci "
    "deepseek deepseek2 deepseek32 dots1 dream ernie4_5 ernie4_5-moe exaone exaone-moe exaone4 falcon-h1 glm-dsa glm4 "
    "glm4moe granite granite_swa granitehybrid granitemoe grovemoe hunyuan-dense hunyuan-moe internlm2 jamba "
    "kimi-linear laguna lfm2 lfm2moe llada llada-moe llama llama4 mellum mimo2 minicpm minicpm3 minimax-m2 mistral3 "
    "mistral4 nanbeige olmo olmo2 olmoe orion phi3 phimoe plamo plamo2 plamo3 qwen2 qwen2moe qwen2vl qwen3 qwen35 "
    "qwen35moe qwen3moe qwen3next qwen3vl qwen3vlmoe refact seed_oss smollm3 stablelm xverse",
    "gelu": "bloom codeshell falcon gemma gemma2 gemma3 gemma3n gemma4 gpt2 gptneox grok mpt phi2 starcoder starcoder2",
    "relu2": "arcee jais2 nemotron nemotron_h nemotron_h_moe plm",
    "relu": "smallthinker",
}
SAME_ACTIVATION = {"swish": "silu", "relu_squared": "relu2", "relu2": "relu2", "silu": "silu", "relu": "relu"}
# Whether the weights of a token's experts are made to sum to 1, where the graph does not look at the metadata.
NORMALISED = {
    True: "arctic dbrx ernie4_5-moe granite granite_swa granitehybrid granitemoe grok grovemoe hunyuan-moe kimi-linear "
    "lfm2moe llama mellum mimo2 minimax-01 minimax-m2 mistral3 phimoe qwen35moe qwen3moe qwen3next qwen3vlmoe rnd1 "
    "smallthinker",
    False: "deepseek jamba llada-moe llama4 olmoe qwen2moe",
}
# Architectures without rotary embedding.
UNROTATED = "bloom gpt2 jais mamba mamba2 mpt refact rwkv6 rwkv7 starcoder t5".split()
# Those whose classes in transformers see only a window in all layers, where sliding_window is set and no layer_types.
ALL_WINDOWED = ("mistral", "mixtral", "phi3", "phimoe", "starcoder2")
YARN = {"beta_fast": 32.0, "beta_slow": 1.0}  # what the runtime takes
READS_YARN = ("grok", "mistral3", "mistral4")
# (entry, key of the metadata, value without effect): numbers that the runtime applies if they are in the metadata
NUMBERS: tuple[tuple[str, str, float | None], ...] = (
    ("rms_norm_eps", "attention.layer_norm_rms_epsilon", None),
    ("layer_norm_eps", "attention.layer_norm_epsilon", None),
    ("layer_norm_epsilon", "attention.layer_norm_epsilon", None),
    ("attn_logit_softcapping", "attn_logit_softcapping", 0.0),
    ("final_logit_softcapping", "final_logit_softcapping", 0.0),
    ("logit_scale", "logit_scale", 1.0),
    ("logits_scaling", "logit_scale", 1.0),
    ("residual_multiplier", "residual_scale", 1.0),
    ("attention_multiplier", "attention.scale", None),
    ("routed_scaling_factor", "expert_weights_scale", 1.0),
    ("route_scale", "expert_weights_scale", 1.0),
    ("clip_qkv", "attention.clamp_kqv", 0.0),
    ("num_experts_per_tok", "expert_used_count", None),
)
# architecture -> (entry, the only value that the graph computes)
ONLY: dict[str, tuple[tuple[str, object], ...]] = {
    "gpt2": (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)),
    "starcoder": (("scale_attn_weights", True),),
    "bloom": (("apply_residual_connection_post_layernorm", False),),
    "falcon": (("alibi", False), ("parallel_attn", True)),
    "deepseek2": (("rope_interleave", True),),
    "gpt-oss": (("swiglu_limit", 7.0),),
    "afmoe": (("mup_enabled", True),),
    "falcon-h1": (("attention_bias", False),),
}


HINT = (
    "so the file computes another function than transformers; how far they are apart, tells "
    "'ptqtp-gguf verify FILE --against FOLDER --logits'"
)


class File:
    """What the checks see of a GGUF."""

    def __init__(self, source: Source) -> None:
        self.arch = str(source.get("general.architecture"))
        self.tensors = {t.name for t in source.tensors}
        self._source = source

    def get(self, key: str) -> Any:
        """A value of the metadata, by its key without the architecture, or None."""
        return self._source.get(f"{self.arch}.{key}")


def notes(folder: Path, source: Source, config: Config | None = None) -> list[str]:
    """What the GGUF of a checkpoint computes in another way than config.json says, a line each.

    source: what was made from the folder; config: as the converter used it, or None: as it stands in the folder
    """
    try:
        config = merged(config or load_json(folder / "config.json"))
    except CheckpointError:
        return []
    found = warnings(config, File(source))
    if found:
        found.append(HINT)
    return found


def merged(config: Config) -> Config:
    """The text model's entries on top, and class defaults that matter."""
    text = config.get("text_config")
    config = {**config, **text} if isinstance(text, dict) else dict(config)
    return {**DEFAULTS.get(str(config.get("model_type")), {}), **config}


def warnings(config: Config, file: File) -> list[str]:
    """A line for each entry. config: see `merged`."""
    found: list[str] = []
    for check in CHECKS:
        try:
            found += check(config, file)
        except (TypeError, ValueError, ArithmeticError, AttributeError):  # an entry of a kind that nobody expects
            continue
    return found


def _differs(entry: str, value: object, what: str) -> str:
    return f"config.json says {entry} {show(str(value))}: {what}"


def activation(config: Config, file: File) -> Iterator[str]:
    """The function of the feed-forward part."""
    entry = next((e for e in ("hidden_activation", "hidden_act", "activation_function") if config.get(e)), "")
    name = str(config.get(entry, ""))
    wanted = SAME_ACTIVATION.get(name, "gelu" if name.startswith("gelu") else name)
    does = next((act for act, names in ACTIVATIONS.items() if file.arch in names.split()), None)
    if does and name and wanted != does:
        yield _differs(entry, name, f"the runtime computes {does} in a {file.arch}")


def experts(config: Config, file: File) -> Iterator[str]:
    """How a token's experts are weighted and chosen."""
    wanted = config.get("norm_topk_prob")
    if isinstance(wanted, bool) and config.get("num_experts_per_tok", 2) > 1 and file.get("expert_count"):
        fixed = next((v for v, names in NORMALISED.items() if file.arch in names.split()), None)
        does = bool(file.get("expert_weights_norm")) if fixed is None else fixed
        if wanted != does:
            how = "always makes the weights of a token's experts sum to 1" if does else "leaves them as they are"
            yield _differs("norm_topk_prob", wanted, f"the runtime {how} in a {file.arch}")
    groups = config.get("n_group")
    if config.get("model_type") == "deepseek_v2" and isinstance(groups, int) and groups > 1:
        yield _differs("n_group", groups, "the runtime ranks groups by their best two experts, DeepSeek-V2 by the best")


def window(config: Config, file: File) -> Iterator[str]:
    """Which layers see only the last tokens."""
    size, length = config.get("sliding_window"), file.get("context_length")
    layers = hooks.windowed(config)
    if not layers and config.get("model_type") in ALL_WINDOWED:
        layers = [True] * int(config.get("num_hidden_layers", 0))
    if not layers and config.get("use_sliding_window") is True:
        first = config.get("max_window_layers", 0)
        layers = [i >= first for i in range(int(config.get("num_hidden_layers", 0)))]
    if not isinstance(size, int) or not any(layers) or (isinstance(length, int) and size >= length):
        return
    does = _runtime_windows(file, len(layers))
    if does is not None and does != layers:
        what = "does not apply it" if not any(does) else "applies it in other layers than layer_types says"
        yield _differs(
            "sliding_window",
            size,
            f"the runtime {what} in a {file.arch}; right up to {size} tokens of context, not beyond",
        )


def _runtime_windows(file: File, layers: int) -> list[bool] | None:
    """Which layers the runtime gives a window; None if that is not known."""
    pattern, period = file.get("attention.sliding_window_pattern"), hooks.PERIODS.get(file.arch)
    known = period and (file.get("attention.sliding_window") or file.arch == "gemma2")
    if file.arch == "exaone4":  # in the one with 64 layers only
        known, period = layers == 64, 4
    if isinstance(pattern, list):
        return [bool(x) for x in pattern[:layers]] if known or file.arch not in _WITHOUT else [False] * layers
    if known and period:
        period = pattern if isinstance(pattern, int) else period
        return [i % period < period - 1 for i in range(layers)]
    return [False] * layers if file.arch in _WITHOUT else None


# architectures whose graphs have no window, though classes of transformers have one
_WITHOUT = frozenset(
    "exaone4 llama mistral3 phi3 phimoe qwen2 qwen2moe qwen2vl qwen3 qwen3moe qwen3vl qwen3vlmoe smollm3 starcoder2 "
    "seed_oss hunyuan-dense hunyuan-moe minicpm minimax-m2 dots1".split()
)


def rope(config: Config, file: File) -> Iterator[str]:
    """The rotary embedding, where all layers have the same."""
    params = hooks.flat_rope(config)
    if not params or file.arch in UNROTATED:
        return
    theta = params.get("rope_theta", config.get("rope_theta"))
    base = file.get("rope.freq_base") or 10000.0
    if isinstance(theta, (int, float)) and not math.isclose(theta, base, rel_tol=1e-5):
        yield _differs("rope_theta", theta, f"the runtime computes with {base:g}")
    kind = params.get("rope_type", params.get("type", "default"))
    entry = f"rope type {show(str(kind))!r}, factor"
    factor, scaling = params.get("factor"), file.get("rope.scaling.type")
    left_out = f"the file of a {file.arch} does not carry it, and the runtime does not scale"
    if kind == "llama3" and "rope_freqs.weight" not in file.tensors:
        yield _differs(entry, factor, left_out)
    elif kind in ("longrope", "su") and not any("rope_factors_long" in name for name in file.tensors):
        yield _differs(entry, factor, left_out)
    elif kind == "dynamic" and not file.arch.startswith("hunyuan"):
        most = config.get("max_position_embeddings")
        yield _differs(entry, factor, f"the runtime does not scale; right up to {most} tokens of context, not beyond")
    elif kind in ("linear", "yarn"):
        if scaling != kind:
            yield _differs(
                entry, factor, f"the file of a {file.arch} does not carry it, and the runtime does not scale"
            )
        elif kind == "yarn" or file.arch == "deepseek2":
            yield from _yarn(config, params, file, kind)
    elif kind not in ("default", "linear", "llama3", "longrope", "su", "dynamic", "proportional", "mrope", "xdrope"):
        yield f"config.json says rope type {show(str(kind))!r}: the runtime does not know it and does not scale"


def _yarn(config: Config, params: Config, file: File, kind: str) -> Iterator[str]:
    m, all_dims = params.get("mscale"), params.get("mscale_all_dim")
    if file.arch == "deepseek2" and not (kind == "yarn" and m and m == all_dims and not params.get("attention_factor")):
        what = f"mscale {m}, mscale_all_dim {all_dims}" if kind == "yarn" else f"rope type {kind!r}"
        yield f"config.json says {what}: the runtime scales attention in a deepseek2 as with both mscale alike"
    if kind != "yarn" or file.arch in READS_YARN:
        return
    for entry, does in YARN.items():
        value = params.get(entry)
        if value is not None and float(value) != does:
            yield _differs(entry, value, f"the runtime computes YaRN in a {file.arch} with {does:g}")
    if params.get("truncate") is False:
        yield _differs("truncate", False, "the runtime rounds the borders of YaRN's ramp, which tells in long contexts")


def numbers(config: Config, file: File) -> Iterator[str]:
    """Numbers that the metadata holds."""
    if file.arch == "falcon-h1":  # they are in its weights
        return
    for entry, key, neutral in NUMBERS:
        value, does = config.get(entry), file.get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value == neutral:
            continue
        if does is None and neutral is None:
            continue  # not of this architecture
        if does is None or not (math.isclose(value, does, rel_tol=1e-4) or math.isclose(1 / value, does, rel_tol=1e-4)):
            took = "does not carry it" if does is None else f"holds {does:g}"
            yield _differs(entry, value, f"the file of a {file.arch} {took}")


def head(config: Config, file: File) -> Iterator[str]:
    """An output of its own that was left out."""
    architectures = config.get("architectures") or [""]
    text = str(architectures[0]).endswith(("ForCausalLM", "LMHeadModel"))
    if text and config.get("tie_word_embeddings") is False and "output.weight" not in file.tensors:
        yield _differs("tie_word_embeddings", False, "the file has no output of its own, its embedding is taken for it")


def scale(config: Config, file: File) -> Iterator[str]:
    """Gemma's scale of attention, which the runtime knows by the number of layers."""
    value, width = config.get("query_pre_attn_scalar"), file.get("attention.key_length")
    if file.arch not in ("gemma2", "gemma3") or not isinstance(value, (int, float)) or not width:
        return
    if file.get("block_count") == {"gemma2": 46, "gemma3": 62}[file.arch]:
        width = file.get("embedding_length") // file.get("attention.head_count")
    if value != width:
        yield _differs("query_pre_attn_scalar", value, f"the runtime computes with {width}")


def rotated(config: Config, file: File) -> Iterator[str]:
    """Layers without rotary embedding, and heads of which a part has it."""
    part = hooks.flat_rope(config).get("partial_rotary_factor", 1.0)
    if config.get("model_type") == "bamba" and part != 1.0:
        yield _differs("partial_rotary_factor", part, "llama.cpp's converter orders rows as for whole heads")
    windowed = hooks.windowed(config)
    if file.arch == "afmoe" and windowed and windowed != [i % 4 < 3 for i in range(len(windowed))]:
        yield "config.json has layer_types of its own: the runtime does not rotate every fourth layer of an afmoe"
    layers = config.get("no_rope_layers")
    if file.arch == "smollm3" and isinstance(layers, list) and layers:
        if [bool(x) for x in layers] != [(i + 1) % 4 != 0 for i in range(len(layers))]:
            yield "config.json has no_rope_layers of its own: the runtime leaves out every fourth layer of a smollm3"


def only(config: Config, file: File) -> Iterator[str]:
    """Switches that a graph has in one position."""
    for entry, does in ONLY.get(file.arch, ()):
        value = config.get(entry)
        if value is not None and value != does:
            yield _differs(entry, value, f"the runtime computes a {file.arch} as with {does}")


CHECKS: tuple[Callable[[Config, File], Iterator[str]], ...] = (
    activation,
    experts,
    window,
    rope,
    numbers,
    head,
    scale,
    rotated,
    only,
)
