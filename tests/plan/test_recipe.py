"""Which tensor gets which type, and why."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptqtp_gguf.codec.tensor_type import TensorType
from ptqtp_gguf.codec.tp2_0 import TP2_0
from ptqtp_gguf.codec.tp2_1 import TP2_1
from ptqtp_gguf.codec.types import TYPES
from ptqtp_gguf.errors import RecipeError, RuntimeMissing
from ptqtp_gguf.files.gguf import TYPE_IDS, TensorInfo, type_name
from ptqtp_gguf.llamacpp import install
from ptqtp_gguf.plan import patterns, roles
from ptqtp_gguf.plan import recipe as recipes
from ptqtp_gguf.plan.options import Options
from ptqtp_gguf.plan.recipe import (
    MAX_BYTES,
    SHIPPED,
    Choice,
    Recipe,
    Rule,
    block_type,
    choose,
    fall_back,
    fit,
    load,
    parse,
)
from ptqtp_gguf.plan.request import Request
from ptqtp_gguf.plan.roles import Model


def info(name: str, *shape: int, kind: str = "BF16") -> TensorInfo:
    return TensorInfo(name, shape, TYPE_IDS[kind], 0, 0)


def default_rules(kind: TensorType) -> list[Rule]:
    return list(load("default").bind(kind.name).rules)


def alone(t: TensorInfo, rules: Sequence[Rule]) -> Choice:
    """The choice for the only tensor of a model."""
    return choose(t, rules, Model([t]))


@pytest.mark.parametrize(
    ("name", "shape", "target"),
    [
        ("blk.0.attn_q.weight", (576, 576), "TP2_1"),
        ("blk.11.ffn_down.weight", (4864, 896), "TP2_1"),
        ("blk.3.attn_qkv.weight", (640, 99), "TP2_1"),
        ("blk.3.ffn_gate_exps.weight", (96, 64, 8), "TP2_1"),
        ("blk.3.ffn_down_shexp.weight", (1536, 64), "TP2_1"),
        ("blk.3.ffn_gate_inp.weight", (896, 60), "BF16"),
        ("blk.3.ffn_gate_inp_shexp.weight", (896,), "BF16"),
        ("blk.0.attn_norm.weight", (576,), "BF16"),
        ("blk.0.attn_q_norm.weight", (64, 2), "BF16"),
        ("blk.0.attn_q.bias", (576,), "BF16"),
        ("blk.0.ssm_conv1d.weight", (4, 512), "BF16"),
        ("blk.0.ssm_in.weight", (512, 512), "TP2_1"),
        ("blk.0.ssm_out.weight", (512, 512), "TP2_1"),
        ("blk.0.time_mix_w1.weight", (512, 64), "BF16"),
        ("blk.0.time_mix_key.weight", (512, 512), "TP2_1"),
        ("token_embd.weight", (576, 49152), "Q8_0"),
        ("output.weight", (576, 49152), "Q8_0"),
        ("output_norm.weight", (576,), "BF16"),
        ("position_embd.weight", (576, 512), "BF16"),
        ("blk.0.odd.weight", (40, 8), "F16"),
        ("blk.0.short.weight", (64, 1), "BF16"),
    ],
)
def test_default_recipe(name: str, shape: tuple[int, ...], target: str) -> None:
    choice = alone(info(name, *shape), default_rules(TP2_1))
    assert type_name(choice.type) == target
    assert choice.reason


def test_rows_that_do_not_fit_fall_back_and_say_so() -> None:
    choice = alone(info("blk.0.a.weight", 96, 8), default_rules(TP2_0))
    assert (type_name(choice.type), choice.fallback) == ("Q8_0", True)
    assert choice.reason == "rows of 96 are not a multiple of 128 (TP2_0)"
    choice = alone(info("blk.0.a.weight", 41, 8), default_rules(TP2_1))
    assert (type_name(choice.type), choice.fallback) == ("F16", True)
    assert "rows of 41 are not a multiple of 32" in choice.reason
    choice = fall_back(info("blk.0.a.weight", 64, 8), "too large")
    assert (type_name(choice.type), choice.fallback, choice.reason) == ("Q8_0", True, "too large")


@pytest.mark.parametrize(
    ("kind", "cols", "largest", "got"),
    [
        ("TP2_2", 64, 0.0, "Q8_0"),
        ("TP2_2", 64, 8.3e6, "Q8_0"),
        ("TP2_2", 64, 8.4e6, "BF16"),
        ("TP2_2", 64, 3.4e38, "F32"),
        ("TP2_2", 40, 6e4, "F16"),
        ("TP2_2", 40, 7e4, "BF16"),
        ("Q6_K", 256, 7e4, "Q8_0"),
        ("Q8_0", 64, 0.0, "BF16"),
        ("Q8_0", 64, 3.4e38, "F32"),
        ("F16", 64, 7e4, "BF16"),
        ("F16", 40, 7e4, "BF16"),
        ("BF16", 64, 3.4e38, "F32"),
        ("BF16", 64, 0.0, "F32"),
    ],
)
def test_values_that_do_not_fit_go_to_the_next_type_that_holds_them(
    kind: str, cols: int, largest: float, got: str
) -> None:
    choice = fall_back(info("blk.0.a.weight", cols, 8), "too large", TYPE_IDS[kind], largest)
    assert (type_name(choice.type), choice.fallback, choice.reason) == (got, True, "too large")


def test_what_the_user_names_is_pinned() -> None:
    recipe = load("default").bind("TP2_2").with_overrides(("ffn_down=Q8_0",))
    tensors = [info(n, 64, 8) for n in ("blk.0.ffn_down.weight", "blk.0.ffn_up.weight")]
    assert recipe.pinned([*tensors, info("blk.0.ffn_down.bias", 64)]) == {"blk.0.ffn_down.weight"}


def test_a_quantized_embedding_stays_but_a_quantized_block_matrix_is_taken() -> None:
    rules = default_rules(TP2_1)
    choice = alone(info("token_embd.weight", 576, 9, kind="Q6_K"), rules)
    assert type_name(choice.type) == "Q6_K" and "already Q6_K" in choice.reason
    assert type_name(alone(info("blk.0.attn_q.weight", 576, 9, kind="Q5_0"), rules).type) == "TP2_1"


def test_unknown_types() -> None:
    with pytest.raises(RecipeError, match="unknown tensor type NOPE"):
        alone(info("blk.0.a.weight", 64, 8), [Rule(".*", "NOPE", "")])
    with pytest.raises(RecipeError, match="no trit-plane type 'Q4_0'; there are TP2_2, TP2_1, TP2_0"):
        block_type("Q4_0")
    assert block_type("tp2_0") is TP2_0


@pytest.mark.parametrize("kind", TYPES.values(), ids=lambda t: t.name)
def test_each_of_our_types_can_be_named(kind: TensorType) -> None:
    """By --type, by a rule, by --tensor-type; in any case."""
    lower = kind.name.lower()
    assert block_type(lower) is kind and Request.of(Options(type=lower)).kind is kind
    raw = {"pattern": r"blk\.0\..*", "type": lower, "reason": "r"}
    by_rule = parse(json.dumps({"name": "n", "description": "d", "rules": [raw]}).encode(), "x")
    for recipe in (load("small").bind(lower), by_rule, by_rule.with_overrides([f"attn={lower}"])):
        assert types(recipe, model(1))["blk.0.attn_q.weight"] == kind.name


def model(layers: int = 16, width: int = 512) -> list[TensorInfo]:
    shapes: dict[str, tuple[int, ...]] = {"attn_q": (width, width), "attn_k": (width, 64), "attn_v": (width, 64)}
    shapes |= {
        "attn_output": (width, width),
        "ffn_up": (width, 1024),
        "ffn_gate": (width, 1024),
        "ffn_down": (1024, width),
        "attn_norm": (width,),
    }
    found = [info(f"blk.{i}.{n}.weight", *s) for i in range(layers) for n, s in shapes.items()]
    return [info("token_embd.weight", width, 999), *found, info("output.weight", width, 999)]


def types(recipe: Recipe, tensors: list[TensorInfo]) -> dict[str, str]:
    return {name: type_name(c.type) for name, c in recipe.plan(tensors).items()}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes(name: str) -> None:
    recipe = load(name)
    assert recipe.name == name and all(r.reason for r in recipe.rules)
    assert parse(recipe.canonical().encode(), "x") == recipe
    bound = recipe.bind("tp2_0")
    assert "{type}" in recipe.canonical() and "{type}" not in bound.canonical()
    assert bound.canonical() != recipe.bind("TP2_1").canonical()
    choices = alone(info("blk.0.attn_q.weight", 512, 512), bound.rules)
    assert type_name(choices.type) == "TP2_0"


@pytest.mark.runtime
def test_what_small_and_quality_do() -> None:
    small = types(load("small").bind("TP2_1"), model())
    assert {small[n] for n in small if "norm" not in n} == {"TP2_1"}
    quality = types(load("quality").bind("TP2_1"), model())
    assert quality["token_embd.weight"] == quality["output.weight"] == "Q6_K"
    assert [quality[f"blk.{i}.ffn_down.weight"] for i in range(16)] == ["Q6_K"] * 2 + ["TP2_1"] * 12 + ["Q6_K"] * 2
    assert {quality[f"blk.{i}.attn_v.weight"] for i in range(16)} == {"Q6_K"}
    assert {quality[f"blk.{i}.ffn_up.weight"] for i in range(16)} == {"TP2_1"}
    assert quality["blk.0.attn_norm.weight"] == "BF16"


def test_layers_are_ranges_of_depth_of_each_stack() -> None:
    raw = [{"pattern": ".*", "layers": [[0, 0.25], [0.5, 0.75]], "type": "Q8_0", "reason": "r"}]
    recipe = parse(json.dumps({"name": "n", "description": "d", "rules": raw}).encode(), "x")
    names = [f"{s}.{i}.attn_q.weight" for s, n in (("enc.blk", 8), ("dec.blk", 4)) for i in range(n)]
    got = types(recipe, [info(n, 64, 64) for n in [*names, "output.weight"]])
    assert [n for n in names if got[n] == "Q8_0"] == [
        *(f"enc.blk.{i}.attn_q.weight" for i in (0, 1, 4, 5)),
        "dec.blk.0.attn_q.weight",
        "dec.blk.2.attn_q.weight",
    ]
    assert got["output.weight"] == "BF16"


# ---- rules that ask what else there is ----


def test_the_embedding_is_small_only_where_it_is_not_the_output_too() -> None:
    untied, recipe = model(2), load("default").bind("TP2_1")
    tied = untied[:-1]
    assert untied[-1].name == "output.weight"
    got, as_output = recipe.plan(untied), recipe.plan(tied)
    assert [type_name(got[n].type) for n in ("token_embd.weight", "output.weight")] == ["Q4_0", "Q8_0"]
    assert type_name(as_output["token_embd.weight"].type) == "Q8_0"
    for choices, why in ((got, "an error reaches one token"), (as_output, "the output too")):
        assert why in choices["token_embd.weight"].reason and not choices["token_embd.weight"].fallback
    # all else is the same, in whatever order the tensors stand; an output's bias or norm is no output
    assert {n: got[n] for n in as_output if n != "token_embd.weight"} == {
        n: c for n, c in as_output.items() if n != "token_embd.weight"
    }
    assert recipe.plan(untied[::-1]) == got
    near = [info("output.bias", 512), info("output_norm.weight", 512), info("xoutput.weight", 512, 9)]
    assert types(recipe, [*tied, *near])["token_embd.weight"] == "Q8_0"
    # rows that no block divides; a source that is quantized already; what the user says
    odd = [info("token_embd.weight", 40, 9), info("output.weight", 40, 9)]
    assert set(types(recipe, odd).values()) == {"F16"}
    quantized = [info("token_embd.weight", 64, 9, kind="Q6_K"), untied[-1]]
    kept = recipe.plan(quantized)["token_embd.weight"]
    assert type_name(kept.type) == "Q6_K" and kept.reason.endswith("; already Q6_K in the source")
    asked = recipe.with_overrides(["token_embd=Q8_0"])
    assert types(asked, untied)["token_embd.weight"] == "Q8_0"


NAMES = ["token_embd.weight", "output.weight", "blk.0.ffn_up.weight", "blk.1.ffn_up.weight"]


@given(st.sets(st.sampled_from(NAMES), min_size=1), st.data())
def test_a_rule_with_a_condition_is_there_or_is_not(names: set[str], data: st.DataObject) -> None:
    """In a model that has what the rules want they decide as if they asked nothing; in another as if they were gone."""
    kinds = st.sampled_from(["Q8_0", "Q4_0", "Q5_0", "keep"])
    wants = st.sampled_from([*map(re.escape, NAMES), "none", "outpu", r"blk\..*", r".*\.1\..*"])
    spans = st.sampled_from([(), ((0.0, 0.5),)])
    rules = data.draw(
        st.lists(
            st.builds(
                Rule,
                st.sampled_from([".*", r"blk.*", *NAMES]),
                kinds,
                st.just("r"),
                spans,
                st.booleans(),
                st.none() | wants,
            ),
            min_size=1,
            max_size=5,
        )
    )
    tensors = [info(n, 64, 8) for n in sorted(names)]
    met = [r for r in rules if r.needs is None or any(re.fullmatch(r.needs, n) for n in names)]
    plain = [Rule(r.pattern, r.target, r.reason, r.layers, r.override) for r in met]
    for t in tensors:
        assert choose(t, rules, Model(tensors)) == choose(t, plain, Model(tensors))
    recipe = Recipe("n", "d", tuple(rules))
    assert parse(recipe.canonical().encode(), "x") == recipe


def test_an_override_whose_condition_is_not_met_is_no_slip_of_the_pen() -> None:
    rule = Rule("token_embd", "Q4_0", "asked for", override=True, needs=r"output\.weight")
    recipe = Recipe("n", "d", (rule,))
    assert types(recipe, model(1))["token_embd.weight"] == "Q4_0"
    assert types(recipe, model(1)[1:-1])["blk.0.attn_q.weight"] == "BF16"
    with pytest.raises(RecipeError, match=r"^asked for: matches no tensor"):
        recipe.plan(model(1)[1:])


def test_a_condition_goes_over_the_names_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once a tensor: a file from outside may have a thousand rules and a model a hundred thousand tensors."""
    asked = Counter[str]()
    original = patterns.regex
    for module in (recipes, roles):
        monkeypatch.setattr(module, "regex", lambda pattern: asked.update([pattern]) or original(pattern))
    rules = tuple(Rule(".*", "Q8_0", "r", needs=needs) for needs in ("no", "none", "no"))
    recipe = Recipe("n", "d", rules)
    assert set(types(recipe, [info(f"blk.{i}.ffn_up.weight", 64, 8) for i in range(50)]).values()) == {"BF16"}
    assert (asked["no"], asked["none"], asked[".*"]) == (1, 1, 150)


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.attn_q_norm.weight",
        "blk.0.ffn_gate_inp.weight",
        "blk.0.ssm_conv1d.weight",
        "blk.0.ssm_a",
        "blk.0.ffn_gate_exps.bias",
        "v.patch_embd.weight",
        "a.position_embd.weight",
        "altup_proj.weight",
    ],
)
def test_no_rule_reaches_what_the_graph_needs_as_it_is(name: str) -> None:
    t = info(name, 64, 64)
    assert alone(t, [Rule(".*", "Q8_0", "all")]).type == t.type
    with pytest.raises(RecipeError, match=f"tensor-type .*: all that it matches, e.g. {name}, is always kept"):
        load("default").with_overrides([".=Q8_0"]).plan([t])


def test_overrides_search_and_come_first() -> None:
    recipe = (
        load("default").bind("TP2_1").with_overrides(["attn_v=q8_0", r"blk\.(0|1)\.attn=BF16", "(?=ffn)ffn_up=keep"])
    )
    got = recipe.plan(model(3))
    assert type_name(got["blk.0.attn_v.weight"].type) == "Q8_0"
    assert got["blk.0.attn_v.weight"].reason == "--tensor-type attn_v"
    assert type_name(got["blk.1.attn_k.weight"].type) == "BF16"
    assert type_name(got["blk.2.attn_k.weight"].type) == "TP2_1"
    assert got["blk.0.ffn_up.weight"].reason == "--tensor-type (?=ffn)ffn_up"
    assert parse(recipe.canonical().encode(), "x") == recipe
    # what the user names is done to a quantized source too; a recipe's own rule leaves it
    q8 = [info("output.weight", 64, 9, kind="Q8_0")]
    assert types(load("default").with_overrides(["output=Q4_0"]), q8) == {"output.weight": "Q4_0"}
    with pytest.raises(RecipeError, match=r"^--tensor-type attn_w: matches no tensor"):
        load("default").bind("TP2_1").with_overrides(["attn_w=Q8_0"]).plan(model(1))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("attn_v", "write REGEX=TYPE"),
        ("=Q8_0", "write REGEX=TYPE"),
        ("attn_v=", "write REGEX=TYPE"),
        ("attn_(v=Q8_0", "not a regular expression"),
        ("v=Q9_9", "unknown tensor type 'Q9_9'; there are TP2_0, TP2_1"),
        ("attn_v=Q8_K", "unknown tensor type"),
        ("attn_v=I32", "unknown"),
        ("v=iq2", "unknown tensor type 'iq2'"),
    ],
)
def test_bad_overrides(text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says) as e:
        load("default").with_overrides([text])
    assert str(e.value).startswith(f"--tensor-type {text}: ") and "\n" not in str(e.value)


RULE = {"pattern": ".*", "type": "Q8_0", "reason": "r"}


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ([], "0 rules"),
        ([RULE, 3], "rule 2: must be a JSON object"),
        ([RULE, {**RULE, "pattrn": "x"}], "rule 2: unknown key 'pattrn'"),
        ([{"pattern": ".*", "type": "Q8_0"}], "rule 1: key 'reason' is missing"),
        ([{**RULE, "pattern": "(x"}], "rule 1: pattern '.x' is not a regular expression: missing"),
        ([{**RULE, "pattern": 3}], "rule 1: 'pattern' must be a string"),
        ([{**RULE, "pattern": "x" * 1001}], "rule 1: 'pattern' must be one line of 1 to 1000"),
        ([{**RULE, "reason": "a\nb"}], "rule 1: 'reason' must be one line"),
        ([{**RULE, "type": "Q4_KM"}], "rule 1: unknown tensor type 'Q4_KM'"),
        ([RULE, RULE, {**RULE, "type": "IQ1"}], "rule 3: unknown tensor type 'IQ1'"),
        ([{**RULE, "layers": [[0.5, 0.5]]}], "rule 1: 'layers' must be"),
        ([{**RULE, "layers": [[0, float("nan")]]}], "rule 1: 'layers' must be"),
        ([{**RULE, "layers": [[False, True]]}], "rule 1: 'layers' must be"),
        ([{**RULE, "override": 1}], "rule 1: 'override' must be a true or false"),
        ([{**RULE, "with": "(x"}], "rule 1: with '.x' is not a regular expression: missing"),
        ([RULE, {**RULE, "with": "(a+)+b"}], "rule 2: with '.a...b' has a repeat within a repeat"),
        ([{**RULE, "with": "a*" * 9}], "rule 1: with '(a[*]){9}' could take too long to match: 9 repeats"),
        ([{**RULE, "with": ["x"]}], "rule 1: 'with' must be a string"),
        ([{**RULE, "with": None}], "rule 1: 'with' must be a string"),
        ([{**RULE, "with": ""}], "rule 1: 'with' must be one line of 1 to 1000"),
        ([RULE] * 1001, "1001 rules"),
    ],
)
def test_bad_rules_are_named_by_file_and_number(tmp_path: Path, rules: list[object], says: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"name": "n", "description": "d", "rules": rules}))
    with pytest.raises(RecipeError, match=says) as e:
        load(path)
    assert str(e.value).startswith(f"{path}: ") and "\n" not in str(e.value)


def test_bad_files(tmp_path: Path) -> None:
    for raw, says in [
        (b"", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[]", "must be a JSON object"),
        (b"[" * 100000, "too deeply"),
        (b'{"name": "a", "name": "b"}', "key 'name' stands twice"),
        (b" " * (MAX_BYTES + 1), "larger than the limit"),
        (b'{"name": "n", "description": "d", "rules": {}}', "'rules' must be a list"),
    ]:
        with pytest.raises(RecipeError, match=says):
            parse(raw, "x")
    with pytest.raises(RecipeError, match="no recipe 'smal'; there are default, quality, small"):
        load("smal")
    with pytest.raises(RecipeError, match="No such file"):
        load(tmp_path / "none.json")
    with pytest.raises(RecipeError, match="unknown tensor type 'tp3'"):
        load("default").bind("tp3")


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.sampled_from(["Q8_0", ".*", "keep"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from("name description rules pattern type reason layers override with".split()), inner
            )
        ),
    )
)
def test_a_recipe_is_read_or_refused(value: object) -> None:
    raw = json.dumps(value).encode()
    try:
        recipe = parse(raw, "x")
    except RecipeError as e:
        assert str(e).startswith("x: ") and len(str(e).splitlines()) == 1
    else:
        assert parse(recipe.canonical().encode(), "x") == recipe


@pytest.mark.parametrize(
    ("wanted", "row", "got"),
    [
        ("Q6_K", 576, "Q8_0"),
        ("Q5_K", 576, "Q5_1"),
        ("Q4_K", 576, "Q5_0"),
        ("Q3_K", 576, "Q4_0"),
        ("Q2_K", 576, "Q4_0"),
        ("TQ1_0", 576, "Q4_0"),
        ("IQ4_XS", 576, "IQ4_NL"),
        ("IQ3_S", 576, "IQ4_NL"),
        ("IQ1_M", 576, "IQ4_NL"),
        ("Q6_K", 100, "F16"),
        ("Q4_0", 100, "F16"),
        ("TP2_0", 96, "Q8_0"),
        ("TP2_2", 96, "TP2_2"),
        ("TP2_2", 48, "F16"),
        ("MXFP4", 40, "F16"),
        ("Q6_K", 512, "Q6_K"),
    ],
)
def test_where_rows_do_not_divide_llama_quantizes_table_holds(wanted: str, row: int, got: str) -> None:
    choice = fit(info("blk.0.a.weight", row, 8), TYPE_IDS[wanted], "asked for")
    assert (type_name(choice.type), choice.fallback) == (got, got != wanted)
    assert choice.reason == "asked for" if got == wanted else f"rows of {row} are not a multiple of" in choice.reason


def test_without_the_runtime_a_k_type_is_refused_in_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> None:
        raise RuntimeMissing("the patched llama-cpp-python is not installed; build it")

    monkeypatch.setattr(install, "ggml_library", gone)
    with pytest.raises(
        RuntimeMissing, match=r"^Q6_K is quantized by the patched runtime: the patched llama-cpp-python"
    ):
        load("quality").bind("TP2_1").plan(model(1))
    got = types(load("default").bind("TP2_1"), model(1))
    assert (got["token_embd.weight"], got["output.weight"]) == ("Q4_0", "Q8_0")
