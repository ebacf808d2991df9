"""Which pre-tokenizer of the runtime cuts a text as a checkpoint's own tokenizer does.

A GGUF names one of those that llama.cpp has built in, and llama.cpp's converter finds the name by a hash of the tokens
of a long text (get_vocab_base_pre): of a tokenizer that its authors have not met it knows nothing. Here the runtime is
asked: it opens the vocabulary with one name after another, and the first that gives the tokens of the checkpoint's own
tokenizer for a sample text is taken.

A sample is a text (_converter_hooks.py has it) and its tokens by the checkpoint's own tokenizer.
"""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import CheckpointError, InputError, RuntimeMissing
from ..files import KV, Reader, build_header, kv_string
from ..llamacpp import Model, install

Sample = tuple[str, list[int]]

KEY = "tokenizer.ggml.pre"
# tried before the others: those that most tokenizers of other people are made after
FIRST = "gpt-2 llama-bpe qwen2 gpt-4o smollm tekken deepseek-v3 deepseek-llm starcoder falcon command-r".split()
OPTION = "--pre-tokenizer"


@functools.cache
def names() -> list[str]:
    """Names of pre-tokenizers, those of FIRST first; out of the converter's source, so that it follows its version."""
    try:
        source = (install.converter().parent / "conversion" / "base.py").read_text(encoding="utf-8")
    except (OSError, RuntimeMissing):
        source = ""
    found = re.findall(r'^ +res = "([\w.-]+)"', source, re.MULTILINE)
    return list(dict.fromkeys([*FIRST, *sorted(found), "default"]))


def check_name(name: str) -> None:
    """Raises InputError for a name that no pre-tokenizer has."""
    if name not in names():
        raise InputError(f"{OPTION} {name}: the runtime has none of that name; it has {', '.join(names())}")


def differs(kvs: Iterable[KV], sample: Sample) -> str | None:
    """How the runtime cuts the sample in another way than the checkpoint's own tokenizer, in words; None: in none.

    kvs: metadata of a GGUF. Raises InputError where the runtime does not take the vocabulary.
    """
    text, tokens = sample
    with _opened(kvs) as model:
        found = _tokens(model, text)
        if found == tokens:
            return None
        if _tokens(model, f" {text}") == tokens:
            return "the checkpoint's own tokenizer puts a blank before a text, the runtime does not"
        pairs = enumerate(zip(found, tokens, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(found), len(tokens)))
        before = b"".join(model.piece(t) for t in tokens[:at])
    left = text.encode()[len(before) :].decode(errors="replace")
    return f"the runtime cuts a sample text into other tokens than the checkpoint's own tokenizer, at {left[:20]!r}"


def notes(kvs: Mapping[str, KV], sample: Sample, given: str, unknown: bool) -> list[str]:
    """What is to be told of a conversion's tokenizer, a line each.

    given: the name that the user gave, or ""; unknown: the converter knew none, and one was found
    """
    name = kvs[KEY].value() if KEY in kvs else None
    found = []
    if unknown:
        found.append(
            f"pre-tokenizer {name}: llama.cpp's converter does not know this tokenizer; of those that the runtime has, "
            "this one gives the same tokens for a sample text"
        )
    if given and not sample[1]:
        found.append(f"{OPTION} {given} is not used: the tokenizer is no byte-level BPE")
    with suppress(InputError):  # why the runtime does not take it, is told where the file is checked
        if sample[1] and (how := differs(kvs.values(), sample)):
            found.append(f"pre-tokenizer {name}: {how}")
    return found


def find(kvs: Iterable[KV], sample: Sample) -> str | None:
    """The first name with which the runtime gives the sample's tokens, or else gives them for it behind a blank.

    None if there is none.
    """
    text, tokens = sample
    rest, behind_blank = [kv for kv in kvs if kv.key != KEY], None
    for name in names() if tokens else ():
        try:
            with _opened([*rest, kv_string(KEY, name)]) as model:
                if _tokens(model, text) == tokens:
                    return name
                if behind_blank is None and _tokens(model, f" {text}") == tokens:
                    behind_blank = name
        except InputError:  # the converter knows it, this runtime does not
            continue
    return behind_blank


def required(kvs: Iterable[KV], sample: Sample, of: str) -> str:
    """`find` for the checkpoint `of`. Raises CheckpointError, with the way out, if there is none."""
    if name := find(kvs, sample):
        return name
    raise CheckpointError(
        f"{of}: its tokenizer cuts text in a way (pre-tokenizer) that llama.cpp does not know: of {len(names())} that "
        f"it has none gives the same tokens; {OPTION} NAME takes one all the same, say gpt-2 or llama-bpe, and tells "
        "where the tokens differ"
    )


def required_of(path: Path, sample: Sample, of: str) -> str:
    """The same by the metadata of a GGUF file."""
    with Reader(path) as reader:
        return required(reader.header.kvs.values(), sample, of)


def _tokens(model: Model, text: str) -> list[int]:
    return [int(t) for t in model.tokens(text, special=False)]


@contextmanager
def _opened(kvs: Iterable[KV]) -> Iterator[Model]:
    """The vocabulary in the runtime."""
    with tempfile.TemporaryDirectory(prefix="ptqtp-") as folder:
        path = Path(folder) / "vocabulary.gguf"
        path.write_bytes(build_header(kvs, [], 32))
        with Model(path, vocabulary_only=True) as model:
            yield model
