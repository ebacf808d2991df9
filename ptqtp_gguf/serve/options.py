"""What llama-server is told besides its model and where to listen: files are looked at before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError, ServerError
from ..files import Reader, read_whole
from ..llamacpp import Adapter, check_grammar, read_grammar

POOLINGS = ("none", "mean", "cls", "last", "rank")
DEFAULT_POOLING = "mean"
MAX_TEMPLATE = 1 << 24  # bytes
MAX_GRAMMAR = 100_000  # bytes; Linux takes 131071 in one argument
# What `Server` itself sees to, and where it is said: who reaches the server, how it is found again, what it serves.
_FILE = "the file to serve is FILE"
OURS = {
    "--host": "give --host before the --",
    "--port": "give --port before the --",
    "--api-key": "give --api-key-file before the --, or set LLAMA_API_KEY",
    "--api-key-file": "give --api-key-file before the --",
    **dict.fromkeys(("--alias", "-a"), "give --alias before the --"),
    **dict.fromkeys(("--model", "-m", "--model-url", "-mu", "--docker-repo", "-dr", "--hf-file", "-hff"), _FILE),
    **dict.fromkeys(("--hf-repo", "-hf", "-hfr", "--models-dir", "--models-preset"), _FILE),
}
PREFIX = "--api-prefix"


def arguments(
    path: Path,
    ctx: int,
    *,
    embeddings: bool,
    pooling: str | None,
    reranking: bool,
    lora: Sequence[Adapter],
    draft: Path | None,
    chat_template_file: Path | None,
    slots: bool,
    grammar: Path | None,
    json_schema: Path | None,
    options: Sequence[str],
) -> list[str]:
    """The arguments of llama-server for `Server`'s parameters of these names; path, ctx: its file and context.

    Raises InputError for a file that cannot be used, ServerError for options that do not go together.
    """
    if pooling is not None and pooling not in POOLINGS:
        raise ServerError(f"--pooling {pooling}: unknown; give one of {', '.join(POOLINGS)}")
    if pooling is not None and not embeddings:
        raise ServerError("--pooling says how a text becomes one vector; give --embeddings, too")
    if embeddings and reranking:
        raise ServerError("--embeddings and --reranking: a server does one of the two; start two servers")
    if grammar and json_schema:
        raise ServerError("--grammar and --json-schema both say what may be answered; give one of them")
    made = ["--slots" if slots else "--no-slots"]
    if embeddings or reranking:  # a text must fit into one batch
        made += ["--batch-size", str(ctx), "--ubatch-size", str(ctx)]
    if embeddings:
        made += ["--embeddings", *_pooling(path, pooling)]
    if reranking:
        made.append("--reranking")
    for file, scale in lora:
        if "," in str(file) or (scale != 1 and ":" in str(file)):
            raise ServerError(f"--lora {file}: llama-server wants a name without commas and colons; rename the file")
        made += ["--lora", str(file)] if scale == 1 else ["--lora-scaled", f"{file}:{scale}"]
    if draft:
        with Reader(draft) as reader:
            if (kind := reader.get("general.type")) not in (None, "model"):
                raise InputError(f"{draft}: no model to draft with, but of the kind {kind!r}; give a small model")
        made += ["--model-draft", str(draft), "--spec-type", "draft-simple"]
    if chat_template_file:
        if not read_whole(chat_template_file, MAX_TEMPLATE).strip():
            raise InputError(f"{chat_template_file}: is empty; give a chat template")
        made += ["--chat-template-file", str(chat_template_file)]
    if rules := grammar or json_schema:
        # llama-server's own --json-schema-file breaks chat completions, and a grammar that it does not take ends it
        text = read_grammar(rules, schema=rules is json_schema)
        if (size := len(text.encode())) > MAX_GRAMMAR:
            raise InputError(
                f"{rules}: a grammar of {size} bytes, the limit is {MAX_GRAMMAR}; let each request bring it"
            )
        check_grammar(text, path, f"{rules}: ")
        made += ["--grammar", text]
    return made + _passed(options)


def _pooling(path: Path, wanted: str | None) -> list[str]:
    """What is wanted, or what the file says; where it says nothing the mean, without which there is no one vector."""
    with Reader(path) as reader:
        said = reader.get(f"{reader.get('general.architecture')}.pooling_type")
    if wanted is None and said:
        return []
    return ["--pooling", wanted or DEFAULT_POOLING]


def _passed(options: Sequence[str]) -> list[str]:
    """Options of llama-server as they are, but those that `Server` sees to. Raises ServerError."""
    for option in map(_name, options):
        if option in OURS:
            raise ServerError(f"{option}: is not passed on to llama-server; {OURS[option]}")
    return list(options)


def prefix(options: Sequence[str]) -> str:
    """What stands before all paths of the server, by its own option for that."""
    names = [_name(option) for option in options]
    return options[names.index(PREFIX) + 1] if PREFIX in names[:-1] else ""


def _name(option: str) -> str:
    return option.partition("=")[0].replace("_", "-")  # llama.cpp takes _ for -
