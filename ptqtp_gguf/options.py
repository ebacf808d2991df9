"""How to convert: everything that a user may choose."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from . import quantize as methods
from .recipe import Recipe, block_type, load


@dataclass(frozen=True)
class Options:
    """How to convert. What decides the bytes is in `decisive`; the rest may change when a job is taken up again.

    type            type that recipes call {type}: TP2_1 or TP2_0
    recipe          name of a recipe, or path of one
    tensor_types    REGEX=TYPE, before the recipe's rules
    target_bpw      bits per weight of the whole file to stay under, or None
    overrides       KEY=TYPE:VALUE for the metadata
    split_max_size  bytes a file, 0 = one file
    threads         0 = all cores
    device          cpu, cuda or auto
    max_memory      bytes, 0 = no limit
    restart         begin anew where an unfinished conversion lies beside the target
    """

    method: str = "search"
    type: str = "TP2_1"
    recipe: str = "default"
    tensor_types: tuple[str, ...] = ()
    target_bpw: float | None = None
    overrides: tuple[str, ...] = ()
    split_max_size: int = 0
    revision: str | None = None
    keep_bf16: Path | None = None
    threads: int = 0
    device: str = "auto"
    max_memory: int = 0
    force: bool = False
    restart: bool = False
    use_reference: bool = False


def decisive(options: Options, recipe: Recipe) -> dict[str, object]:
    """What of the options decides the bytes, by the name that the command line has for it."""
    return {
        "--method": options.method,
        "--type": options.type.upper(),
        "--recipe": recipe.canonical(),
        "--target-bpw": options.target_bpw,
        "--override-kv": list(options.overrides),
        "--split-max-size": options.split_max_size,
    }


def recipe_of(options: Options) -> Recipe:
    """The recipe with the user's types in it. Raises RecipeError or QuantizeError where they do not go together."""
    kind = block_type(options.type)
    methods.require(methods.find(options.method), kind)
    return load(options.recipe).bind(kind.name).with_overrides(options.tensor_types)


def described(options: Options, recipe: Recipe) -> str:
    """The recipe in a line: its name, and what the user has put on top."""
    budget = [] if options.target_bpw is None else [f"--target-bpw {options.target_bpw:g}"]
    return ", ".join([recipe.name, *budget, *(f"--tensor-type {t}" for t in options.tensor_types)])
