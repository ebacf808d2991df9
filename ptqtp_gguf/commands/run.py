"""What generates text with a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from ..inspect import inspect
from ..llamacpp import adapter, check_grammar, generate, load, read_grammar
from .common import Grammar, JsonSchema, Lora, Rpc, RpcLayers


def run(
    file: Annotated[Path, typer.Argument(help="A GGUF file.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.")],
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option("--temp", min=0.0, help="0 = always the likeliest token.")] = 0.8,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 1,
    threads: Annotated[int, typer.Option("--threads", "-j", min=0, help="Threads; 0 = llama.cpp's default.")] = 0,
    ctx: Annotated[int, typer.Option(min=32, help="Context length in tokens.")] = 2048,
    lora: Lora = None,
    grammar: Grammar = None,
    json_schema: JsonSchema = None,
    rpc: Rpc = None,
    rpc_layers: RpcLayers = -1,
) -> None:
    """Generate text with a file, through the patched llama-cpp-python. No chat template is used.

    Examples:

      ptqtp-gguf run model.gguf -p "The capital of France is" -n 32 --temp 0

      ptqtp-gguf run model.gguf -p "Once upon a time" --lora pirate.gguf:0.5

      ptqtp-gguf run model.gguf -p "A city as JSON: " --json-schema city.json

      ptqtp-gguf run model.gguf -p "Once upon a time" --rpc 192.168.1.2:50052
    """
    inspect(file)  # a damaged file gets our own clear line
    rules = None
    if given := grammar or json_schema:
        if grammar and json_schema:
            raise InputError("--grammar and --json-schema both say what may be answered; give one of them")
        rules = read_grammar(given, schema=given is json_schema)
        check_grammar(rules, file, f"{given}: ")
    adapters = [adapter(text) for text in lora or ()]
    model = load(file, n_ctx=ctx, threads=threads or None, rpc=rpc or (), rpc_layers=rpc_layers, lora=adapters)
    print(prompt, end="", flush=True)
    for piece in generate(model, prompt, max_tokens=max_tokens, temperature=temperature, seed=seed, grammar=rules):
        print(piece, end="", flush=True)
    print()
