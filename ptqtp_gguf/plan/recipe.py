"""Which tensor gets which type: rules as data, each with its reason.

A recipe file is JSON; `ptqtp_gguf/recipes/` holds those that ship:

    {"name": "mine", "description": "what it is for", "rules": [
      {"pattern": "blk\\\\.\\\\d+\\\\.attn_v\\\\.weight", "type": "Q6_K", "reason": "small, and every head reads it"},
      {"pattern": "blk\\\\.\\\\d+\\\\.ffn_down\\\\.weight", "layers": [[0, 0.125]], "type": "Q5_K", "reason": "..."},
      {"pattern": "blk\\\\..*", "type": "{type}", "reason": "the user's --type"}]}

pattern  regular expression that matches the WHOLE name of a tensor; the first rule that matches decides
type     TP2_2, TP2_1, TP2_0, a ggml type that llama-quantize writes (some want --imatrix), "keep", or "{type}"; a
         tensor without a rule is kept
layers   optional: only layers whose depth i/n lies in one of these half-open ranges
with     optional: regular expression; only in a model that has a tensor whose WHOLE name it matches, as
         "output\\\\.weight": where embedding and output are two tensors
override optional: true for what --tensor-type asked for; its pattern is SEARCHED in the name, as llama-quantize does

Before any rule, tensors that llama-quantize never quantizes are kept (GUARDS). A tensor that cannot take the type that
it is given falls back, and the plan says why.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from ..codec import BY_NAME, TYPES, TensorType
from ..errors import RecipeError
from ..files import (
    BF16_ID,
    F16_ID,
    F32_ID,
    FLOAT_IDS,
    Q8_0_ID,
    TYPE_IDS,
    TensorInfo,
    open_regular,
    parse_json,
    type_block,
    type_name,
)
from ..llamacpp import ggml
from ..quantize import beyond
from .patterns import compile_bounded, regex
from .roles import _GUARD, WHY_GUARDED, Model, always_kept

KEEP = "keep"
USER_TYPE = "{type}"
MAX_BYTES = 1 << 20  # of a recipe file
MAX_RULES = 1000
MAX_TEXT = 1000  # characters of a pattern or reason
SHIPPED = ("default", "quality", "small")


@dataclass(frozen=True)
class Rule:
    """Tensors whose name matches `pattern` get `target`: "keep", "{type}" or a type name. See the module's text."""

    pattern: str
    target: str
    reason: str
    layers: tuple[tuple[float, float], ...] = ()
    override: bool = False
    needs: str | None = None  # "with" in the file

    def matches(self, name: str, model: Model) -> bool:
        """Whether the rule speaks of the tensor of this name in this model."""
        found = regex(self.pattern).search(name) if self.override else regex(self.pattern).fullmatch(name)
        if not found or not self.applies(model):
            return False
        depth = model.depths.get(name)
        return not self.layers or (depth is not None and any(a <= depth < b for a, b in self.layers))

    def applies(self, model: Model) -> bool:
        """Whether the model has what the rule wants beside its tensor."""
        return self.needs is None or model.has(self.needs)


# Where a type goes that wants longer blocks than the rows have: what llama-quantize does; ours go to Q8_0.
_SHORTER = {
    **{f"IQ{kind}": "IQ4_NL" for kind in ("1_S", "1_M", "2_XXS", "2_XS", "2_S", "3_XXS", "3_S", "4_XS")},
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    **{"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"},
}


@dataclass(frozen=True)
class Choice:
    """The decision on one tensor: target type id and the reason in words."""

    type: int
    reason: str
    fallback: bool = False


@dataclass(frozen=True)
class Recipe:
    """Rules in order, with a name. Immutable; see the module's text."""

    name: str
    description: str
    rules: tuple[Rule, ...]

    def with_overrides(self, overrides: Iterable[str]) -> Recipe:
        """The recipe with "REGEX=TYPE" put before its rules, the first of them first. Raises RecipeError.

        The REGEX is searched in the name, as llama-quantize does; TYPE in any case.
        """
        rules = []
        for text in overrides:
            pattern, equals, kind = text.rpartition("=")
            if not equals or not pattern or not kind:
                raise RecipeError(f"--tensor-type {text}: write REGEX=TYPE, such as attn_v=Q6_K")
            raw = {"pattern": pattern, "type": kind, "reason": f"--tensor-type {pattern}", "override": True}
            rules.append(_rule(raw, f"--tensor-type {text}"))
        return replace(self, rules=(*rules, *self.rules))

    def bind(self, block_type: str) -> Recipe:
        """The recipe with the user's --type in the place of "{type}". Raises RecipeError for an unknown type."""
        name = _target(block_type, f"--type {block_type}")
        rules = tuple(replace(r, target=name) if r.target == USER_TYPE else r for r in self.rules)
        return replace(self, rules=rules)

    def canonical(self) -> str:
        """The recipe as JSON on one line, always the same for the same rules; a valid recipe file itself."""
        rules = []
        for r in self.rules:
            rule: dict[str, object] = {"pattern": r.pattern, "type": r.target, "reason": r.reason}
            if r.layers:
                rule["layers"] = [list(span) for span in r.layers]
            if r.override:
                rule["override"] = True
            if r.needs is not None:
                rule["with"] = r.needs
            rules.append(rule)
        whole = {"name": self.name, "description": self.description, "rules": rules}
        return json.dumps(whole, sort_keys=True, separators=(",", ":"))

    def plan(self, tensors: Sequence[TensorInfo]) -> dict[str, Choice]:
        """Decide on every tensor of a model; name -> choice.

        Raises RecipeError for an override that reaches no tensor, RuntimeMissing for a type that only the patched
        runtime writes where there is none.
        """
        self.check_overrides(tensors)
        model = Model(tensors)
        choices = {t.name: choose(t, self.rules, model) for t in tensors}
        for t in tensors:
            target = choices[t.name].type
            if target != t.type and target not in TYPES:
                ggml.require(target)
        return choices

    def pinned(self, tensors: Sequence[TensorInfo]) -> frozenset[str]:
        """Names of the tensors whose type is the user's own word: --tensor-type."""
        model = Model(tensors)
        found = ((t, rule_for(t, self.rules, model)) for t in tensors)
        return frozenset(t.name for t, rule in found if rule and rule.override)

    def check_overrides(self, tensors: Sequence[TensorInfo]) -> None:
        """Raise RecipeError for an override that reaches none of the tensors: a slip of the pen, most often."""
        model = Model(tensors)
        for rule in self.rules:
            if rule.override and rule.applies(model):
                found = [t for t in tensors if rule.matches(t.name, model)]
                if not found:
                    raise RecipeError(
                        f"{rule.reason}: matches no tensor; 'ptqtp-gguf inspect --tensors' lists the names"
                    )
                if all(always_kept(t) for t in found):
                    raise RecipeError(f"{rule.reason}: all that it matches, e.g. {found[0].name}, is always kept")


def require_importance(
    tensors: Iterable[TensorInfo], choices: Mapping[str, Choice], has: Callable[[TensorInfo, int], bool], given: bool
) -> None:
    """Raise RecipeError for a tensor whose type wants an importance matrix where there is none for it, RuntimeMissing
    where there is one and only the patched runtime could use it.

    has    has(tensor, type id): whether there is one
    given  whether there is any at all
    """
    for t in tensors:
        target = choices[t.name].type
        if target in ggml.NEEDS_IMPORTANCE and target != t.type and not has(t, target):
            lacks = "the one given has nothing for it" if given else "give one with --imatrix"
            raise RecipeError(
                f"tensor {t.name}: {type_name(target)} needs an importance matrix; {lacks}, or take IQ3_S, "
                "which does without"
            )
        if target in ggml.USES_IMPORTANCE and target != t.type and has(t, target):
            ggml.require(target, weighted=True)


def load(name_or_path: str | Path) -> Recipe:
    """A recipe that ships, by its name, or one from a JSON file, by its path.

    Raises RecipeError naming file and rule for anything that is not as the module's text says.
    """
    text = str(name_or_path)
    if text in SHIPPED:
        raw = (resources.files(__package__) / "recipes" / f"{text}.json").read_bytes()
        return parse(raw, f"recipe {text}")
    path = Path(name_or_path)
    if path.suffix.lower() != ".json":
        raise RecipeError(f"no recipe '{text}'; there are {', '.join(SHIPPED)}, or give the path of a .json file")
    try:
        with open_regular(path, RecipeError) as f:
            raw = f.read(MAX_BYTES + 1)
    except OSError as e:
        raise RecipeError(f"{path}: {e.strerror}") from None
    return parse(raw, str(path))


def parse(raw: bytes, where: str) -> Recipe:
    """A recipe from the bytes of a JSON file; `where` names it in errors. Raises RecipeError."""
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{where}: larger than the limit of {MAX_BYTES} bytes for a recipe")
    try:
        whole = parse_json(raw, lambda pairs: _object(pairs, where))
    except ValueError as e:
        raise RecipeError(f"{where}: not JSON: {e}") from None
    whole = _checked(whole, where, {"name": str, "description": str, "rules": list}, {})
    if not 1 <= len(whole["rules"]) <= MAX_RULES:
        raise RecipeError(f"{where}: {len(whole['rules'])} rules; a recipe has 1 to {MAX_RULES}")
    rules = (_rule(rule, f"{where}: rule {i}") for i, rule in enumerate(whole["rules"], 1))
    return Recipe(whole["name"], whole["description"], tuple(rules))


def _object(pairs: list[tuple[str, object]], where: str) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise RecipeError(f"{where}: key '{twice[:40]}' stands twice in one object")
    return found


def _checked(raw: object, where: str, must: dict[str, type], may: dict[str, type]) -> dict[str, Any]:
    """raw, if it is an object with all keys of `must`, none but those and `may`, and values of their types."""
    if not isinstance(raw, dict):
        raise RecipeError(f"{where}: must be a JSON object with {', '.join(must)}")
    for key in raw:
        if key not in must and key not in may:
            raise RecipeError(f"{where}: unknown key '{key[:40]}'; there are {', '.join([*must, *may])}")
    for key, kind in (must | may).items():
        if key not in raw:
            if key in must:
                raise RecipeError(f"{where}: key '{key}' is missing")
        elif not isinstance(raw[key], kind):
            raise RecipeError(f"{where}: '{key}' must be a {_JSON_NAMES[kind]}")
        elif kind is str and (len(raw[key]) > MAX_TEXT or not raw[key].isprintable() or not raw[key].strip()):
            raise RecipeError(f"{where}: '{key}' must be one line of 1 to {MAX_TEXT} characters")
    return raw


_JSON_NAMES = {str: "string", list: "list", bool: "true or false"}


def _rule(raw: object, where: str) -> Rule:
    may = {"layers": list, "override": bool, "with": str}
    raw = _checked(raw, where, {"pattern": str, "type": str, "reason": str}, may)
    for key in ("pattern", "with"):
        try:
            compile_bounded(raw.get(key, ""))
        except ValueError as e:
            raise RecipeError(f"{where}: {key} '{raw[key]}' {e}") from None
    layers = []
    for span in raw.get("layers", []):
        numbers = isinstance(span, list) and len(span) == 2 and all(type(x) in (int, float) for x in span)
        if not numbers or not 0 <= span[0] < span[1] <= 1:
            raise RecipeError(f"{where}: 'layers' must be a list of ranges of depth such as [0, 0.125]")
        layers.append((float(span[0]), float(span[1])))
    target, override = _target(raw["type"], where), raw.get("override", False)
    return Rule(raw["pattern"], target, raw["reason"], tuple(layers), override, raw.get("with"))


def _target(name: str, where: str) -> str:
    """The type's name as we write it. Raises RecipeError for one that cannot be a target."""
    if name.lower() in (KEEP, USER_TYPE):
        return name.lower()
    type_id = TYPE_IDS.get(name.upper())
    if type_id is None or not (type_id in TYPES or type_id in ggml.WRITABLE):
        known = ", ".join(type_name(i) for i in [*TYPES, *sorted(ggml.WRITABLE)])
        raise RecipeError(f"{where}: unknown tensor type '{name[:40]}'; there are {known}, {KEEP}")
    return name.upper()


def rule_for(t: TensorInfo, rules: Sequence[Rule], model: Model) -> Rule | None:
    """The rule that decides on a tensor of the model; None for one that is kept."""
    if always_kept(t):
        return None
    return next((r for r in rules if r.matches(t.name, model)), None)


def choose(t: TensorInfo, rules: Sequence[Rule], model: Model) -> Choice:
    """Apply the rules to one tensor of the model. Raises RecipeError for a rule with an unknown type."""
    rule = rule_for(t, rules, model)
    if rule is None:
        guarded = _GUARD.fullmatch(t.name)
        why = WHY_GUARDED if guarded else "a vector, not a matrix" if always_kept(t) else "no rule names it"
        return Choice(t.type, why)
    if rule.target == KEEP:
        return Choice(t.type, rule.reason)
    if rule.target not in TYPE_IDS:
        raise RecipeError(f"recipe: unknown tensor type {rule.target}")
    target = TYPE_IDS[rule.target]
    if t.type not in FLOAT_IDS and target not in TYPES and not rule.override:
        return Choice(t.type, f"{rule.reason}; already {t.type_name} in the source")
    return fit(t, target, rule.reason)


def fit(t: TensorInfo, target: int, reason: str) -> Choice:
    """target if the rows divide into its blocks, else the type that llama-quantize takes then, else F16."""
    shorter = TYPE_IDS[_SHORTER.get(type_name(target), "Q8_0")]
    for type_id in (target, shorter, F16_ID):
        if t.shape[0] % type_block(type_id) == 0:
            if type_id == target:
                return Choice(type_id, reason)
            why = f"rows of {t.shape[0]} are not a multiple of {type_block(target)} ({type_name(target)})"
            return Choice(type_id, why, fallback=True)
    raise AssertionError("F16 has blocks of one")


def fall_back(t: TensorInfo, why: str, kind: int | None = None, largest: float = 0.0) -> Choice:
    """The type for a tensor whose values the type `kind`, or one of ours, cannot hold, up to `largest`: the next of
    Q8_0 (F16, where rows do not divide), BF16 and F32 that can. F32 holds everything."""
    chain = [fit(t, Q8_0_ID, why).type, BF16_ID, F32_ID]
    if kind in FLOAT_IDS and kind not in chain:
        chain = chain[1:]
    rest = chain[chain.index(kind) + 1 :] if kind in chain else chain
    return Choice(next(k for k in rest if not beyond(k, largest)), why, fallback=True)


def block_type(name: str) -> TensorType:
    """One of our types by its name, any case. Raises RecipeError."""
    try:
        return BY_NAME[name.upper()]
    except KeyError:
        known = ", ".join(sorted(BY_NAME, reverse=True))
        raise RecipeError(f"no trit-plane type '{name}'; there are {known}") from None
