"""What llama.cpp's converter prints, what the hooks around it say, and why it failed, in one sentence.

Its own words about a checkpoint that it cannot read are often none: the name of an entry, an assertion. The hooks
(_converter_hooks.py) tell where it was and what it was doing; here that becomes a message with a way out.
"""

from __future__ import annotations

import ast
import difflib
import json
import os
import re
import secrets
import signal
import tempfile
import threading
from collections import deque
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, RuntimeMissing
from ..llamacpp import install
from . import _converter_hooks as hooks
from .kinds import PACKED, load_json, show

MOST_LINES = 5000  # of its log
NEAREST = 3  # names of architectures that are told
TOKENIZERS = "tokenizer.json", "*.model", "vocab*", "tekken.json", "*.tiktoken", "*vocab*.txt"
# a function of the converter -> what it does; the innermost counts
DOING = {
    "load_hparams": "reading config.json",
    "__init__": "reading config.json",
    "set_gguf_parameters": "reading config.json",
    "index_tensors": "listing the tensors",
    "dequant_model": "undoing the quantization of the weights",
    "generate_extra_tensors": "computing the factors of its rotary embedding",
    "prepare_metadata": "reading the model card",
    "set_vocab": "reading the tokenizer",
    "get_vocab_base": "reading the tokenizer",
}
# kinds of models that no GGUF of text holds: end of the architecture's name -> what it is
OTHERS = {
    "ForSequenceClassification": "a classifier",
    "ForTokenClassification": "a classifier",
    "ForQuestionAnswering": "a model for questions about a text",
    "ForImageClassification": "a model of images",
    "ForSpeechSeq2Seq": "a model of speech",
    "WhisperForConditionalGeneration": "a model of speech; whisper.cpp converts it",
    "CLIPModel": "a model of images and texts",
    "ViTModel": "a model of images",
    "Wav2Vec2ForCTC": "a model of speech",
}


class ConverterLog:
    """The lines of one run of the converter.

    lines        the last of them
    config       the configuration as the converter used it: transformers' defaults and our entries in it; {} until told
    sample       a text and its tokens by the checkpoint's own tokenizer; told of a byte-level BPE only, else ("", [])
    unknown_pre  the converter does not know the pre-tokenizer, and "default" stands in the metadata
    ready        all that is told before the first tensor has been taken
    """

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=MOST_LINES)
        self.config: dict[str, Any] = {}
        self.sample: tuple[str, list[int]] = ("", [])
        self.unknown_pre = False
        self.ready = threading.Event()
        self._failed: dict[str, Any] = {}
        self._mark = f"ptqtp {secrets.token_hex(8)} "  # what a checkpoint makes the converter print cannot begin so

    def job(self, trust_code: bool, pre_tokenizer: str) -> str:
        """What the hooks are to do, as they take it."""
        return json.dumps({"trust": trust_code, "pre": pre_tokenizer, "mark": self._mark})

    def take(self, line: str) -> bool:
        """One line of its output. True if it was for us and for nobody else."""
        if not line.startswith(self._mark):
            self.lines.append(line)
            return False
        said = json.loads(line[len(self._mark) :])
        self.config = said.get("config", self.config)
        if "sample" in said:
            self.sample = (said["sample"][0], said["sample"][1])
        self.unknown_pre |= bool(said.get("unknown_pre"))
        self._failed = said.get("failed", self._failed)
        if said.get("ready"):
            self.ready.set()
        return True

    def reason(self, folder: Path, architecture: str, code: int) -> str:
        """Why it ended with this code, with the folder's name."""
        return f"{folder}: {self._why(folder, architecture, code)}"

    def _why(self, folder: Path, architecture: str, code: int) -> str:
        for line in reversed(self.lines):
            if any(word in line for word in (hooks.UNTRUSTED, "Please pass the argument `trust_remote_code=True`")):
                return hooks.UNTRUSTED
            if line.startswith("ERROR:hf-to-gguf:Model ") and line.endswith(" is not supported"):
                return unknown(architecture)
            if line.startswith(("ModuleNotFoundError", "ImportError")):
                return f"the converter needs a package: {line[:300]}; pip install 'ptqtp-gguf[hf]'"
        if code < 0:
            why = "; out of memory?" if code == -signal.SIGKILL else ""
            return f"llama.cpp's converter was killed by signal {-code} ({_signal_name(-code)}){why}"
        if self._failed:
            return self._sentence(folder, architecture)
        last = next((line.strip() for line in reversed(self.lines) if line.strip()), "no output")[:300]
        return f"llama.cpp's converter failed (exit code {code}): {last}"

    def _sentence(self, folder: Path, architecture: str) -> str:
        f = self._failed
        text, steps = str(f["text"]), f["steps"]
        where = f"{f['file']}:{f['line']}"
        reading_tokens = any("vocab" in step for step in steps)
        if f["tokens"]:
            last, rows = f["tokens"]
            return (
                f"its tokenizer has tokens up to number {last}, its embedding {rows} rows (vocab_size); transformers: "
                "model.resize_token_embeddings(len(tokenizer)) and save both, or take out the added tokens"
            )
        if f["type"] == "KeyError":
            key = re.fullmatch(r"['\"]+could not find any of: (.*?)['\"]+", text)
            entry = f"one of the entries {key[1]}" if key else f"the entry {show(text)}"
            if not reading_tokens and (key or "param" in f["code"] or "config" in f["code"]):
                return (
                    f"config.json lacks {entry}, which llama.cpp's converter needs for {architecture} ({where}); "
                    "take it over from the model's original configuration"
                )
        if found := re.search(r"Can not map tensor '(.*)'", text):
            return _unmapped(found[1], architecture)
        if reading_tokens and not any(any(folder.glob(pattern)) for pattern in TOKENIZERS):
            return (
                "no tokenizer.json and no tokenizer.model in the folder; save the tokenizer there, too: "
                "AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained(FOLDER)"
            )
        if reading_tokens and "untagged enum" in text:
            return (
                f"its tokenizer.json is of another format than the installed package tokenizers reads ({text[:150]}); "
                "pip install -U tokenizers transformers, or take the original model's tokenizer.json"
            )
        if f["type"] == "FileNotFoundError" and (lacks := re.search(r"'([^']+)'$|: ([^' ]+)$", text)):
            name = Path(lacks[1] or lacks[2]).name
            return (
                f"the folder lacks {show(name)}, which llama.cpp's converter reads for {architecture}; take it from "
                "the model that this one was made from"
            )
        if f["type"] == "JSONDecodeError" and (broken := _broken_json(folder)):
            return f"llama.cpp's converter cannot read {broken}"
        said, doing = text or f"it takes for granted: {f['code']}", self._doing()
        if {"dequant_model", "_generate_nvfp4_tensors"} & set(steps):
            doing, way = DOING["dequant_model"], "; convert the original model"
        else:
            way = "; do config.json and tensors belong to one model?" if doing.startswith("converting") else ""
        return (
            f"llama.cpp's converter failed while {doing} ({architecture}): {f['type']}: {said[:300]} ({where}){way}"
            f"{self._kept()}"
        )

    def _doing(self) -> str:
        tensor = self._failed["tensor"]
        for step in reversed(self._failed["steps"]):
            if step == "prepare_tensors" or (tensor and step == "serve"):
                break
            if "vocab" in step or step in DOING:
                return DOING.get(step, DOING["set_vocab"])
        return f"converting tensor {show(str(tensor))}" if tensor else "reading the checkpoint"

    def _kept(self) -> str:
        """Its log in a file, for whoever wants the traceback."""
        try:
            with tempfile.NamedTemporaryFile(
                "w", prefix="ptqtp-converter-", suffix=".log", delete=False, encoding="utf-8"
            ) as file:
                file.write("\n".join(self.lines) + "\n")
        except OSError:
            return ""
        return f"; all that it said is in {file.name}"


def unknown(architecture: str) -> str:
    """The message for an architecture that the converter does not know."""
    what = next((f"; it is {text}" for end, text in OTHERS.items() if architecture.endswith(end)), "")
    near = difflib.get_close_matches(architecture, architectures(), NEAREST, 0.5)
    nearest = f"; the nearest names that it knows: {', '.join(near)}" if near and not what else ""
    return f"llama.cpp's converter does not know the architecture {show(architecture)}{what}{nearest}"


def architectures() -> list[str]:
    """Names of architectures that the converter knows, read out of its source; [] where they do not stand there."""
    try:
        source = (install.converter().parent / "conversion" / "__init__.py").read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (OSError, SyntaxError, RuntimeMissing):
        return []
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            if node.target.id == "TEXT_MODEL_MAP":
                return [str(name) for name in ast.literal_eval(node.value)]
    return []


def _unmapped(name: str, architecture: str) -> str:
    what = f"tensor {show(name)} is none that llama.cpp's converter knows in {architecture}"
    if name.endswith(PACKED):
        return f"{what}: its weights are quantized already; convert the original model"
    if "lora_" in name:
        return f"{what}: an adapter that is not merged; merge it first (peft: merge_and_unload)"
    if name == "lm_head.weight":
        return f"{what}: its output is its embedding; does config.json say tie_word_embeddings false where it is true?"
    return f"{what}; does config.json name the right architecture, and is the checkpoint as transformers saves it?"


def _broken_json(folder: Path) -> str | None:
    for path in sorted(folder.glob("*.json")):
        try:
            load_json(path)
        except CheckpointError as e:
            if "not a JSON object" not in str(e):  # lists are all right
                return str(e).removeprefix(f"{folder}{os.sep}")
    return None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"
