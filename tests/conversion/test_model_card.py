"""The model card: front matter that YAML reads back, tables that hold, no surprises from a file's metadata."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ptqtp_gguf.conversion.model_card import CardFacts, Origin, OutFile, TypeLine, card, origin_of

FACTS = CardFacts(
    files=[OutFile("smol-TP2_1.gguf", 78_000_000, "ab" * 32)],
    types=[TypeLine("TP2_1", 210, 106_000_000, 46_375_000), TypeLine("Q8_0", 1, 28_000_000, 29_750_000)],
    method="search",
    recipe="default",
    recipe_text='{"name":"default"}',
    version="0.1.0",
    source="SmolLM2-135M",
    source_type="BF16",
    origin=Origin("SmolLM2 135M", "HuggingFaceTB/SmolLM2-135M", "apache-2.0", languages=("en",)),
    errors=[(f"blk.{i}.attn_q.weight", 0.02 + i / 1000) for i in range(12)],
    fallbacks=[("blk.0.odd.weight", "F16", "rows of 40 are not a multiple of 32 (TP2_1)")],
    provenance=[("source file", "smol.gguf")],
)

hostile = st.text(max_size=30) | st.sampled_from(
    [
        'a "quoted": name',
        "line\nbreak",
        "--- #x",
        "a|b`c``",
        "\ud800",
        "\x00\x85\u2028\ufeff\ufffe",
        "<script>",
        "\U0001f600",
        "](",
    ]
)


def front(text: str) -> dict[str, object]:
    start, matter, _ = text.split("---\n", 2)
    assert start == ""
    found = yaml.safe_load(matter)
    assert isinstance(found, dict)
    return found


def test_the_whole_card() -> None:
    text = card(FACTS)
    assert front(text) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M",
        "base_model_relation": "quantized",
        "license": "apache-2.0",
        "language": ["en"],
        "tags": ["gguf", "ptqtp", "quantized"],
    }
    for line in (
        "# SmolLM2 135M, TP2_1 GGUF",
        "78.0 MB, 4.657 bits per weight, everything counted.",
        "| TP2_1 | 210 | 106,000,000 | 46,375,000 | 3.500 |",
        "| `blk.0.odd.weight` | F16 | rows of 40 are not a multiple of 32 (TP2_1) |",
        "| `blk.11.attn_q.weight` | 0.03100 |",
        "ptqtp-gguf export-q4_0 smol-TP2_1.gguf smol-TP2_1-Q4_0.gguf",
        "stock llama.cpp cannot read them",
        f"{'ab' * 32}  smol-TP2_1.gguf",
        '{"name":"default"}',
        "- source file: `smol.gguf`",
    ):
        assert line in text, line
    assert "`blk.3.attn_q.weight`" not in text  # only the worst
    assert text == card(FACTS) and text.endswith("\n") and not text.endswith("\n\n")


def test_what_is_not_known_is_not_said() -> None:
    text = card(replace(FACTS, origin=Origin(), errors=[], fallbacks=[], recipe_text=None, provenance=[]))
    assert front(text) == {"tags": ["gguf", "ptqtp", "quantized"]}
    assert "Error" not in text and "could not take" not in text and "None" not in text
    ours = card(replace(FACTS, types=[TypeLine("TP2_2", 2, 960, 420), TypeLine("TP2_1", 1, 320, 140)]))
    assert "M, TP2_2 GGUF" in ours and "The tensor types TP2_2 and TP2_1 are ours" in ours and "export-q4_0" in ours
    stock = card(replace(FACTS, types=[TypeLine("Q4_K", 1, 256, 144)]))
    assert "are ours" not in stock and "export-q4_0" not in stock
    assert "already quantized (Q5_0)" in card(replace(FACTS, quantized_source=True, source_type="Q5_0"))
    assert "already quantized" not in text


def test_front_matter_that_the_hub_takes() -> None:
    origin = Origin(
        "x", "no repository", "Other", "my: 'licence'", "LICENSE", ("en", "zh", "english", "en"), ("gguf", "chat")
    )
    assert front(card(replace(FACTS, origin=origin))) == {
        "license": "other",
        "license_name": "my: 'licence'",
        "license_link": "LICENSE",
        "language": ["en", "zh"],
        "tags": ["gguf", "ptqtp", "quantized", "chat"],
    }


def unfenced(body: str) -> list[str]:
    """The lines outside of blocks of code, in which a text may have lines that look like headings."""
    lines, fence = [], ""
    for line in body.splitlines():
        if fence:
            fence = "" if line.strip() == fence else fence
        elif ticks := re.match(r"`{3,}", line):
            fence = ticks[0]
        else:
            lines.append(line)
    assert not fence
    return lines


@settings(max_examples=100)
@given(hostile, hostile, hostile, hostile)
def test_hostile_texts(name: str, license: str, tag: str, tensor: str) -> None:
    origin = Origin(name, "a/b", license, tags=(tag,))
    facts = replace(
        FACTS,
        origin=origin,
        fallbacks=[(tensor, "F16", name)],
        errors=[(tensor, 0.5)],
        source=license,
        recipe_text=name,
    )
    text = card(facts)
    assert text.encode()
    matter = front(text)

    def survives(s: str) -> str:
        return "".join("\ufffd" if 0xD800 <= ord(c) < 0xE000 else c for c in s)

    assert matter.get("license", "") == survives(license.lower())
    assert matter["tags"] == list(dict.fromkeys(["gguf", "ptqtp", "quantized", survives(tag)]))
    body = text.split("---\n", 2)[2]
    assert [line for line in unfenced(body) if line.startswith("#")][1:] == [
        "## Run",
        "## Tensors",
        "## Error",
        "## Made how",
        "## SHA-256",
    ]
    rows = [line for line in body.split("## Made how")[0].splitlines() if line.startswith("|")]
    cells = [len(line.replace("\\\\", "").replace("\\|", "").split("|")) - 2 for line in rows]
    assert cells == [5] * 4 + [3] * 3 + [2] * 3
    headings = [line for line in unfenced(body) if line.startswith("# ")]
    assert "<" not in headings[0].replace("\\<", "")


@pytest.mark.parametrize("name", ["a b.gguf", "$(rm).gguf", "it's.gguf", "-x.gguf"])
def test_commands_can_be_pasted(name: str) -> None:
    text = card(replace(FACTS, files=[OutFile(name, 1, "00")]))
    run = next(line for line in text.splitlines() if line.startswith("ptqtp-gguf run "))
    assert shlex.split(run)[2] in (name, f"./{name}")
    twin = next(line for line in text.splitlines() if line.startswith("ptqtp-gguf export"))
    assert shlex.split(twin)[2] in (name, f"./{name}") and shlex.split(twin)[3].endswith("-Q4_0.gguf")
    assert not any(arg.startswith("-") for arg in shlex.split(twin)[1:4]) and shlex.split(twin)[4:] == ["--ollama"]


def test_several_files() -> None:
    files = [OutFile(f"m-0000{i}-of-00002.gguf", 10, f"{i}{i}") for i in (1, 2)]
    text = card(replace(FACTS, files=files))
    assert "11  m-00001-of-00002.gguf\n22  m-00002-of-00002.gguf\n" in text and "run m-00001-of-00002.gguf" in text


def test_what_a_ggufs_metadata_says() -> None:
    assert origin_of({}) == Origin()
    found = origin_of(
        {
            "general.name": " Smol ",
            "general.license": "apache-2.0",
            "general.languages": ["en", 3],
            "general.tags": "x",
            "general.repo_url": "https://huggingface.co/HuggingFaceTB/SmolLM2-135M",
            "general.license.link": 7,
            "general.base_model.0.repo_url": "https://huggingface.co/other/parent",
        }
    )
    assert found == Origin("Smol", "HuggingFaceTB/SmolLM2-135M", "apache-2.0", languages=("en",))
    assert origin_of({"general.repo_url": "https://example.org/a/b"}).base_model is None
