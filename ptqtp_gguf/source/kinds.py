"""What a path is where it is no plain checkpoint, and what to give instead.

Nothing here loads weights. The folders and files are those that users of the field have at hand: adapters, quantized
checkpoints, clones without Git LFS, pages saved in the place of files, models of other frameworks.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import open_regular, parse_json, read_whole

MAX_JSON = 256 << 20
POINTER = b"version https://git-lfs"  # its specification: at most 1024 bytes
MOST_TEXT = 4096  # bytes of a file of weights that may be a text in its place
SHOWN = 60  # letters of such a text
# quant_method of those that dequant_model of llama.cpp's converter undoes, or stores as they are
READ = ("bitnet", "fp8", "gptq", "compressed-tensors", "modelopt", "mxfp4")
# ends of names of tensors that a quantized checkpoint has and a plain one has not
PACKED = (".absmax", ".quant_map", ".SCB", ".qweight", ".qzeros", ".W_q", "._data", ".weight_packed", ".codebooks")

# (pattern, what the folder is, what to do), the first that matches; asked where config.json or the weights are missing
_FOLDERS = (
    ("adapter_config.json", "an adapter (LoRA or the like)", ""),  # told by adapter()
    ("model_index.json", "a pipeline of diffusers (images), no language model", "a text encoder in it has a folder"),
    ("*.gguf", "a folder of GGUF files", "name the file"),
    ("consolidated.*.pth", "Meta's own format of Llama", "take the files for transformers (repositories ...-hf)"),
    ("consolidated*.safetensors", "Mistral's own format", "take the files for transformers: config.json, model*"),
    ("zero_to_fp32.py", "a state of training by DeepSpeed", "run its zero_to_fp32.py, and save the model"),
    ("*/.metadata", "a state of training by FSDP", "load it in the program that wrote it, and save_pretrained"),
    ("*.distcp", "a state of training by FSDP", "load it in the program that wrote it, and save_pretrained"),
    ("*.nemo", "a model of NVIDIA NeMo", "export it for transformers first"),
    ("tf_model.h5", "TensorFlow's weights", "save the model with PyTorch first"),
    ("saved_model.pb", "a TensorFlow model", "take the PyTorch weights"),
    ("flax_model*.msgpack", "Flax's weights", "save the model with PyTorch first"),
    ("*.onnx", "an ONNX model", "take the PyTorch weights"),
    ("openvino_model.xml", "an OpenVINO model", "take the PyTorch weights"),
    ("*.tflite", "a TensorFlow Lite model", "take the PyTorch weights"),
    ("*.mlmodelc", "a Core ML model", "take the PyTorch weights"),
    ("weights.*.safetensors", "an MLX checkpoint", "take the PyTorch weights"),
    ("*.pth", "weights for torch.load", "save_pretrained of transformers makes a checkpoint of them"),
    ("*.pt", "weights for torch.load", "save_pretrained of transformers makes a checkpoint of them"),
    ("*.ckpt", "weights for torch.load", "save_pretrained of transformers makes a checkpoint of them"),
)
# (first bytes, what the file is, what to do)
_FILES = (
    (b"PK\x03\x04", "an archive, or weights for torch.load", "unpack it, or give the folder that it lies in"),
    (b"\x1f\x8b", "a packed file", "unpack it and give the folder"),
    (b"ustar", "an archive", "unpack it and give the folder"),
    (b"\x89HDF", "an HDF5 file (TensorFlow)", "give a folder with PyTorch weights"),
    (b"lmgg", "a file in the GGML format of before GGUF", "convert the model's checkpoint"),
    (b"fmgg", "a file in the GGML format of before GGUF", "convert the model's checkpoint"),
    (b"tjgg", "a file in the GGML format of before GGUF", "convert the model's checkpoint"),
    (b"algg", "a LoRA adapter in the GGML format of before GGUF", "merge the adapter and convert the merged model"),
)


def show(text: str) -> str:
    """A name from a file, fit for one line of a message."""
    text = "".join(c if c.isprintable() else "?" for c in text[:100])
    return text[:97] + "..." if len(text) == 100 else text


def load_json(path: Path, hint: str = "") -> dict[str, Any]:
    """A JSON object. hint: what is added where there is no such file. Raises CheckpointError."""
    try:
        data = parse_json(read_whole(path, MAX_JSON, CheckpointError))
    except CheckpointError as e:
        raise CheckpointError(f"{e}; {hint}" if hint and not path.is_file() else str(e)) from None
    except ValueError as e:
        raise CheckpointError(f"{path}: not valid JSON ({e})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return data


# ---- files ----


def instead(path: Path) -> str | None:
    """What lies in the place of a checkpoint's file: a pointer of Git LFS, a page, a text, JSON in another encoding.

    None for what may well be the file. Raises OSError, CheckpointError for what is no regular file.
    """
    with open_regular(path, CheckpointError) as f:
        head = f.read(MOST_TEXT + 1)
    if head.startswith(POINTER):
        return f"{path}: a Git LFS pointer, not the file itself; run 'git lfs pull' in its folder, or download it again"
    if head.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html")):
        return f"{path}: a web page, saved in the place of the file; download it again, where needed with a token"
    if path.suffix == ".json" and head.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        return (
            f"{path}: begins with a byte order mark, which transformers and llama.cpp's converter do not read; "
            "save it as UTF-8 without one"
        )
    text = head.decode(errors="replace")
    short = path.suffix == ".safetensors" and 0 < len(head) <= MOST_TEXT
    if short and all(c.isprintable() or c.isspace() for c in text):
        return f"{path}: no weights, but the text {show(' '.join(text.split())[:SHOWN])!r}; download it again"
    return None


def file_reason(path: Path) -> str:
    """Why a file that is no GGUF cannot be converted. Raises CheckpointError, OSError."""
    if found := instead(path):
        return found
    if path.suffix in (".safetensors", ".json", ".bin", ".pth", ".pt", ".model"):
        return f"{path}: a file of a checkpoint; give the folder that holds config.json, weights and tokenizer"
    with open_regular(path, CheckpointError) as f:
        head = f.read(264)
    for magic, what, todo in _FILES:
        if head.startswith(magic) or (magic == b"ustar" and head[257:262] == magic):
            return f"{path}: {what}; {todo}"
    if path.suffix == ".gguf":
        return f"{path}: does not begin as a GGUF file does; damaged, or not wholly downloaded"
    return f"{path}: neither a GGUF file nor a checkpoint folder with config.json"


# ---- folders ----


def folder_reason(folder: Path) -> str | None:
    """What a folder is that lacks config.json or weights, and what to give instead; None where nothing tells.

    Raises CheckpointError, OSError.
    """
    if found := adapter(folder):
        return found
    names = [p.name for p in folder.iterdir()]
    if not [n for n in names if not n.startswith(".")]:
        return f"{folder}: an empty folder"
    for pattern, what, todo in _FOLDERS:
        if found_at := next(iter(sorted(folder.glob(pattern))), None):
            return f"{folder}: {what} ({found_at.relative_to(folder)}); {todo}"
    inner = [*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")]
    if inner and "config.json" not in names:
        at = sorted(p.parent for p in inner)
        more = f", one of {len(at)} such folders in it" if len(at) > 1 else ""
        return f"{folder}: no config.json here; did you mean {at[-1]}{more}?"
    return None


def adapter(folder: Path) -> str | None:
    """The message for an adapter's folder. Raises CheckpointError for a damaged adapter_config.json."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return None
    if wrong := instead(path):
        return wrong
    config = load_json(path)
    kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    what = f"a {'LoRA' if kind == 'LORA' else show(str(kind or 'PEFT'))} adapter"
    of = f" of {show(base)}" if isinstance(base, str) and base else ""
    return f"{folder}: {what}{of}, no model; merge it first (peft: merge_and_unload) and convert the merged model"


# ---- quantized checkpoints ----


def quantized(config: dict[str, Any]) -> str | None:
    """By what the weights are quantized already, in words, where llama.cpp's converter cannot undo it; else None."""
    text = config.get("text_config")
    sections = [config, text] if isinstance(text, dict) else [config]
    found: dict[str, Any] = {}
    for section in reversed(sections):
        if isinstance(section.get("quantization_config"), dict):
            found = section["quantization_config"]
    method = found.get("quant_method")
    if method is None and (found.get("load_in_4bit") or found.get("load_in_8bit")):
        method = "bitsandbytes"
    if method is None and isinstance(mlx := config.get("quantization"), dict) and "bits" in mlx:
        return f"MLX, {mlx['bits']} bits"
    if method is None or method in READ:
        if method == "gptq" and found.get("bits") not in (2, 4, 8):
            return f"gptq, {show(str(found.get('bits')))} bits"
        return None
    bits = 4 if found.get("load_in_4bit") else 8 if found.get("load_in_8bit") else found.get("bits")
    return show(f"{method}, {bits} bits" if isinstance(bits, int) else str(method))


def quantized_reason(folder: Path, by: str, tensors: Iterable[str] | None) -> str:
    """The message for one. tensors: names of all its tensors, if they could be read."""
    if tensors is not None and not any(name.endswith(PACKED) for name in tensors) and by.startswith("bitsandbytes"):
        return (
            f"{folder}: config.json says quantized already ({by}), but the weights are plain, as after a merge; take "
            "the entry quantization_config out of config.json, or convert the original model"
        )
    return (
        f"{folder}: its weights are quantized already ({by}), which llama.cpp's converter cannot undo; "
        "convert the original model"
    )


# ---- architectures ----


def architecture(folder: Path, config: dict[str, Any]) -> str:
    """The architecture as llama.cpp's converter finds it. Raises CheckpointError."""
    text = config.get("text_config")
    for section in (config, text if isinstance(text, dict) else {}):
        names = section.get("architectures")
        if isinstance(names, list) and names and isinstance(names[0], str):
            return names[0]
    if isinstance(config.get("ssm_cfg"), dict):  # Mamba as its authors publish it
        return f"{config['ssm_cfg'].get('layer', 'Mamba')}ForCausalLM"
    kind = config.get("model_type")
    of = f" (the class that transformers has for model_type {show(kind)!r})" if isinstance(kind, str) else ""
    raise CheckpointError(
        f"{folder / 'config.json'}: no 'architectures' entry; llama.cpp's converter needs it; add it{of}"
    )
